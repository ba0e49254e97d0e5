"""Data: from text or tensors to batches. Nothing here knows the model, the device or the process count.

    corpus.py ──> tokenizer.py ──> tokens.py ──┬─> windows.py   (xb, yb), for models without a state
    text, splits  text <-> ids     ids, mapped └─> segments.py  (data, target), for models that carry one
                                       tensors ──> examples.py  (features, labels)

    order.py says which position comes when, pure in (seed, epoch, position); stream.py what the loop asks of
    any of them; files.py writes files whole or not at all.

The text side (corpus, tokenizer, tokens, order) does not import torch.
"""
