"""word_language_model's LSTM beside the loop that pytorch/examples trains it with, and after an epoch of each.

    python -m benchmarks.word_lstm [--epoch] [--texts FOLDER] [--json [PATH]]

Settings of word_language_model: embeddings and 2 layers of 200, bptt 35, batch 20, dropout 0.2, gradients clipped at
0.25, SGD at 20. The plain loop is written by hand: log_softmax, NLLLoss, `p.data.add_(-lr * grad)`. Ours is
`fs.train` with the fused loss and SGD built from its name. All begin with the same weights, random states and
batches, and take turns in one process, a few steps each; "bf16" is torch's autocast, in both loops. The text is
wikitext2-small where FOLDER has it, else Python's manual. `--epoch` trains an epoch of each instead and compares
validation perplexities, in float32, over the whole split.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import fivestep as fs
from fivestep.data.corpus import load_corpus
from fivestep.data.segments import CoveringSegments, Segments
from fivestep.data.tokenizer import build_tokenizer
from fivestep.loop.optimizer import build_optimizer
from fivestep.models.rnn import RNN

LAYERS, BPTT, BATCH_SIZE, DROPOUT, RATE, CLIP = 2, 35, 20, 0.2, 20.0, 0.25
TARGETS = {"ours": 0.7, "ours, bf16": 0.45}  # of the plain loop's time a batch in float32, at most
Figure = dict[str, Any]


class Turns:
    """A way to train, a few steps at a time: its own weights, random state, and the losses so far."""

    def __init__(self, steps: Callable[[RNN], Any], start: dict[str, Tensor], sizes: tuple[int, int]):
        torch.manual_seed(1111)
        words, width = sizes
        self.model = RNN(words, width, width, LAYERS, "lstm", DROPOUT)
        self.model.load_state_dict(start)
        torch.manual_seed(1111)
        self.random = torch.get_rng_state()
        self.losses: list[float] = []
        self.steps = steps(self.model)

    def take(self, n: int, clock: Callable[[], float]) -> float:
        """Seconds a step over the next `n`; fewer where the epoch ends."""
        torch.set_rng_state(self.random)
        begun, taken = clock(), []
        for _, loss in zip(range(n), self.steps, strict=False):
            taken.append(loss)
        seconds = (clock() - begun) / max(1, len(taken))
        self.random = torch.get_rng_state()
        self.losses += [float(loss) for loss in taken]
        return seconds


def plain(tokens: Tensor, bf16: bool) -> Callable[[RNN], Any]:
    """The loop by hand."""
    n = len(tokens) // BATCH_SIZE
    source = tokens[: n * BATCH_SIZE].view(BATCH_SIZE, n).t().contiguous()
    criterion = nn.NLLLoss()

    def steps(model: RNN) -> Any:
        model.train()
        hidden: Any = model.init_hidden(BATCH_SIZE)
        for i in range(0, len(source) - 1, BPTT):
            seq_len = min(BPTT, len(source) - 1 - i)
            data, target = source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].reshape(-1)
            model.zero_grad()
            hidden = tuple(state.detach() for state in hidden)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output, hidden = model(data, hidden)
                loss = criterion(torch.log_softmax(output.view(-1, output.shape[-1]), 1), target)
            loss.backward()
            clip_grad_norm_(model.parameters(), CLIP)
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-RATE)
            yield loss.item()

    return steps


def ours(tokens: Any, fused: bool, precision: str) -> Callable[[RNN], Any]:
    """fivestep's loop."""

    def steps(model: RNN) -> Any:
        optimizer = build_optimizer(model, "sgd", RATE)
        objective, segments = fs.TruncatedBPTT(fused=fused), Segments(tokens, BATCH_SIZE, BPTT)
        options: dict[str, Any] = {"clip_norm": CLIP, "precision": precision, "epochs": 1}
        for info in fs.train(model, segments, objective, optimizer, **options):
            yield info.loss

    return steps


def contestants(tokens: Any) -> dict[str, Callable[[RNN], Any]]:
    """The ways to train; the first is what the others are compared with."""
    ids = torch.from_numpy(tokens.astype("int64"))
    return {
        "plain": plain(ids, bf16=False),
        "ours": ours(tokens, fused=True, precision="fp32"),
        "ours, plain loss": ours(tokens, fused=False, precision="fp32"),
        "plain, bf16": plain(ids, bf16=True),
        "ours, bf16": ours(tokens, fused=True, precision="bf16"),
    }


def a_batch(
    ways: dict[str, Turns], tokens: Any, repeats: int, steps: int, clock: Callable[[], float]
) -> list[Figure]:
    """Milliseconds a batch, and how far the fused loss is from the plain one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for way in ways.values():
        way.take(2, clock)  # kernels are made, memory is touched for the first time
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(ways[name].take(steps, clock) * 1e3)
    figures = [against(f"a batch, {name}", seconds[name], seconds["plain"], "ms") for name in names[1:]]
    for one, name in zip(figures, names[1:], strict=True):
        one["target"] = TARGETS.get(name)
    return [*figures, *apart(ways["plain"].model, tokens)]


def apart(model: RNN, tokens: Any, batches: int = 8) -> list[Figure]:
    """How far the fused loss and its gradients are from the plain ones, at equal weights, each over its size.

    Two trainings cannot be compared step by step for long: at a learning rate of 20 any rounding grows tenfold within
    a few steps.
    """
    differences: list[tuple[float, float]] = []
    model.train()
    for batch, _ in zip(Segments(tokens, BATCH_SIZE, BPTT), range(batches), strict=False):
        found = []
        for fused in (True, False):
            torch.manual_seed(1111)
            loss, _ = fs.TruncatedBPTT(fused=fused).loss(model, batch, None)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            found.append((loss.detach(), torch.cat([one.flatten() for one in gradients])))
        (a, da), (b, db) = found
        differences.append((float((a - b).abs() / b), float((da - db).norm() / db.norm())))
    figures = []
    for name, values in zip(("loss", "gradient"), zip(*differences, strict=True), strict=True):
        one = {"name": f"largest relative difference of a {name}, ours", "value": max(values), "unit": ""}
        spread = [min(values), max(values)]
        figures.append(
            {**one, "baseline": None, "ratio": None, "repeats": len(values), "spread": spread, "target": None}
        )
    return figures


def an_epoch(ways: dict[str, Turns], val: Any, clock: Callable[[], float]) -> list[Figure]:
    """Validation perplexity after an epoch, and the epoch's seconds, of each way to train."""
    figures, base = [], {}
    for name, way in ways.items():
        if name == "ours, plain loss":
            continue  # the plain loop's own bits
        begun = clock()
        way.take(1 << 40, clock)
        seconds = clock() - begun
        perplexity = math.exp(fs.evaluate(way.model, val, fs.TruncatedBPTT())["loss"])
        base = base or {"perplexity": perplexity, "seconds": seconds}
        figures.append(against(f"perplexity, {name}", [perplexity], [base["perplexity"]], ""))
        figures.append(against(f"an epoch, {name}", [seconds], [base["seconds"]], "s"))
    return figures


def against(name: str, values: list[float], baseline: list[float], unit: str) -> Figure:
    """A figure: medians, and the median and spread of the ratios within each repeat."""
    ratios = [a / b for a, b in zip(values, baseline, strict=True)]
    figure = {"name": name, "value": median(values), "unit": unit, "baseline": median(baseline)}
    return {**figure, "ratio": median(ratios), "repeats": len(values), "spread": [min(ratios), max(ratios)]}


def prepared(options: argparse.Namespace) -> tuple[str, Any, Any, int]:
    """The text's name, its training ids, its validation segments, and its number of words."""
    folder = Path(options.texts) / "wikitext2-small"
    source = str(folder) if folder.is_dir() and not options.quick else "python-manual"
    corpus = load_corpus(source)
    tokenizer = build_tokenizer("words", corpus.splits["train"])
    train, val = (tokenizer.encode(corpus.splits[split]) for split in ("train", "val"))
    return Path(source).name, train, CoveringSegments(val, BATCH_SIZE, BPTT), tokenizer.vocab_size


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts = os.environ.get("FIVESTEP_TEXTS", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--texts", default=texts, help="a folder with wikitext2-small/")
    parser.add_argument("--repeats", type=int, default=12, help="turns of each  [12]")
    parser.add_argument("--steps", type=int, default=4, help="batches a turn  [4]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads  [2]")
    parser.add_argument("--epoch", action="store_true", help="an epoch of each, and validation perplexities")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, figures that mean nothing")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds: for a busy machine, with --threads 1"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="PATH", help="the figures as JSON, to a file or printed"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = process_time if options.cpu_time else perf_counter
    name, train, val, words = prepared(options)
    if options.quick:
        train, options.repeats, options.steps = train[: BATCH_SIZE * 400], 2, 2
    torch.manual_seed(1111)
    width = 8 if options.quick else 200
    start = RNN(words, width, width, LAYERS, "lstm", DROPOUT).state_dict()
    ways = {way: Turns(steps, start, (words, width)) for way, steps in contestants(train).items()}
    if options.epoch:
        figures = an_epoch(ways, val, clock)
    else:
        figures = a_batch(ways, train, options.repeats, options.steps, clock)
    if options.json == "-":
        print(json.dumps(figures, indent=1))
        return
    print(f"{name}: {words:,} words, {len(train):,} tokens; torch {torch.__version__}, {options.threads} threads")
    print(f"{'':48} {'value':>9}    {'plain':>9}  {'ratio':>6}  least to most")
    for one in figures:
        least, most = one["spread"]
        if one["ratio"] is None:
            print(f"{one['name']:48} {one['value']:9.1e}")
        else:
            row = f"{one['value']:9.1f} {one['unit']:2} {one['baseline']:9.1f}  {one['ratio']:5.2f}×"
            print(f"{one['name']:48} {row}  {least:.2f} to {most:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
