"""What saving costs a training loop: a GPT-2 of 124 M parameters with AdamW, one checkpoint a minute.

    python -m benchmarks.save_cost

Blocks of steps with and without a save alternate in one process. What a block with a save takes longer is what the
save costs: the snapshot, for which the loop waits, and the writing, which shares the cores with the steps.
"""

import shutil
import tempfile
from pathlib import Path
from time import perf_counter

import torch

import fivestep as fs
from benchmarks.measure import add_options, figure, parsed, report
from fivestep.models.gpt2 import GPT2


def main() -> None:
    """Measure, and print a table."""
    parser = add_options(__doc__, repeats=2, quick=1)
    parser.add_argument("--steps", type=int, default=None, help="of a block; it should outlast the writing  [12]")
    parser.add_argument("--tokens", type=int, default=64, help="of a batch  [64]")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model  [12: GPT-2's 124 M]")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch  [torch's choice]")
    parser.add_argument("--folder", type=Path, default=None, help="where to save  [a temporary folder]")
    options = parsed(parser)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = (64, 64, 1, 2, 16) if options.quick else (50_257, 1024, options.layers, 12, 768)
    vocabulary, steps_of_block = sizes[0], options.steps or (2 if options.quick else 12)
    model = GPT2(vocabulary, sizes[1], n_layer=sizes[2], n_head=sizes[3], n_embd=sizes[4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(vocabulary, (1, options.tokens + 1))
    data = [(ids[:, :-1], ids[:, 1:])] * 10_000
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    plain, saving, stalls, writing = [], [], [], []
    try:
        with fs.Run(folder / "run", checkpoint_every=None, keep_last=1) as run:
            steps = fs.train(model, data, fs.NextToken(), optimizer, run=run)

            def block() -> float:
                return timed(lambda: [next(steps) for _ in range(steps_of_block)])

            state = next(steps).state
            for _ in range(options.repeats + 1):  # the first brings memory and disk into their steady state
                plain.append(block())
                stalls.append(timed(lambda: run.save(state)))
                saving.append(stalls[-1] + block())
                writing.append(timed(run.saver.wait))
            steps.close()
    finally:
        shutil.rmtree(folder)
    plain, saving, stalls, writing = plain[1:], saving[1:], stalls[1:], writing[1:]
    costs = [with_save - without for without, with_save in zip(plain, saving, strict=True)]
    parameters = sum(p.numel() for p in model.parameters())
    figures = [
        figure(
            f"a block of {steps_of_block} steps with a save, {parameters:,} parameters", saving, "s", against=plain
        ),
        figure("a checkpoint costs", costs, "s"),
        figure("share of a loop that saves once a minute", [cost / 60 for cost in costs], "%", scale=100),
        figure("of this, the loop waits", stalls, "s"),
        figure("not written by the block's end", writing, "s"),
    ]
    report(options, figures)


def timed(work) -> float:  # type: ignore[no-untyped-def]
    """Seconds that `work()` takes."""
    begun = perf_counter()
    work()
    return perf_counter() - begun


if __name__ == "__main__":
    main()
