"""The three loops of the seeds, written plainly: what the engine is held to, bit for bit.

Nothing of the loop floor is imported here. Each function trains `model` in place.
"""

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_


def truncated_bptt(model, tokens, *, batch_size, bptt, epochs, optimizer, clip):
    """Seed 000: epochs over contiguous segments; the hidden state carried and detached."""
    criterion = nn.CrossEntropyLoss()
    n = len(tokens) // batch_size
    source = tokens[: n * batch_size].view(batch_size, n).t().contiguous()
    for _ in range(epochs):
        model.train()
        hidden = model.init_hidden(batch_size) if hasattr(model, "init_hidden") else None
        for i in range(0, len(source) - 1, bptt):
            seq_len = min(bptt, len(source) - 1 - i)
            data = source[i : i + seq_len]
            target = source[i + 1 : i + 1 + seq_len].reshape(-1)
            optimizer.zero_grad()
            if hidden is None:
                output = model(data)
            else:
                hidden = tuple(h.detach() for h in hidden) if isinstance(hidden, tuple) else hidden.detach()
                output, hidden = model(data, hidden)
            loss = criterion(output.view(-1, output.shape[-1]), target)
            loss.backward()
            clip_grad_norm_(model.parameters(), clip)
            optimizer.step()


def supervised(model, loader, *, criterion, optimizer, epochs):
    """Seed 001: epochs over (features, labels); returns each epoch's plain mean of batch losses."""
    averages = []
    for _ in range(epochs):
        model.train()
        total = 0.0
        for features, labels in loader:
            optimizer.zero_grad()
            outputs = model(features)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        averages.append(total / len(loader))
    return averages


def characters(model, tokens, offsets, *, block_size, optimizer):
    """Seed 002: one iteration a row of `offsets` [max_iters, batch]; gradients are reset after each update."""
    for starts in offsets:
        xb = torch.stack([tokens[i : i + block_size] for i in starts.tolist()])
        yb = torch.stack([tokens[i + 1 : i + 1 + block_size] for i in starts.tolist()])
        logits = model(xb)
        batch, time, vocabulary = logits.shape
        loss = nn.functional.cross_entropy(logits.view(batch * time, vocabulary), yb.view(batch * time))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
