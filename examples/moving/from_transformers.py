"""Hugging Face's Trainer, and the same with fivestep: dict batches, and a model that returns its own loss.

Both train a small GPT-2 from scratch on characters with accumulation, a linear schedule and clipping, and end with
the same weights within rounding: the two divide a window's losses at different places. Needs `transformers` and
`accelerate`.
"""

import tempfile

import torch
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

import fivestep as fs
from fivestep.data.corpus import load_corpus
from fivestep.data.tokenizer import build_tokenizer

max_steps, accumulation, batch_size, block_size = 20, 2, 8, 32

text = load_corpus("python-manual").splits["train"][:12_000]
tokenizer = build_tokenizer("chars", text)
ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))
windows = ids[: len(ids) // block_size * block_size].view(-1, block_size)
dataset = [{"input_ids": window, "labels": window} for window in windows]  # GPT-2 shifts the labels itself


def start():
    torch.manual_seed(0)
    sizes = {"n_positions": block_size, "n_embd": 32, "n_layer": 2, "n_head": 2}
    none = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=tokenizer.vocab_size, **sizes, **none))
    # Without this the Trainer (5.23) divides GPT-2's loss by all 32 labels of a window, though 31 are predicted.
    model.loss_type = "ForCausalLM"
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, optimizer, get_linear_schedule_with_warmup(optimizer, 5, max_steps)


# --- with the Trainer ---
theirs, optimizer, scheduler = start()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(theirs, arguments, train_dataset=dataset, optimizers=(optimizer, scheduler))
    trainer.remove_callback(PrinterCallback)
    trainer.train()


# --- the same with fivestep ---
class ModelsOwnLoss:
    """`model(**batch).loss` is a mean over the labels that have a predecessor and are not -100."""

    def count(self, batch):
        return (batch["labels"][:, 1:] != -100).sum()

    def loss(self, model, batch, carry):
        return model(**batch).loss, None


ours, optimizer, scheduler = start()
loader = DataLoader(dataset, batch_size=batch_size)
arguments = {"accumulate": accumulation, "scheduler": scheduler, "clip_norm": 1.0}
for info in fs.train(ours, loader, ModelsOwnLoss(), optimizer, max_iters=max_steps, **arguments):
    if info.step % 5 == 0:
        print(f"step {info.step}: loss {info.loss.item():.4f}, lr {info.learning_rate:.2e}")

losses = [fs.evaluate(model, loader, ModelsOwnLoss())["loss"] for model in (theirs, ours)]
print(f"Trainer:  {losses[0]:.6f}")
print(f"fivestep: {losses[1]:.6f}")
apart = max((a - b).abs().max().item() for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
print(f"weights: at most {apart:.1e} apart")
assert abs(losses[0] - losses[1]) < 1e-5 and apart < 1e-5
