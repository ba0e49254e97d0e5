"""A checkpoint of a run on a whole split: the run's own configuration, tokenizer, data and arithmetic.

Owns what `fivestep eval` measures. The best weights on the validation split give the very figure that training
recorded, on the same machine, versions and thread count.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fivestep import processes
from fivestep.data.examples import Examples
from fivestep.data.files import expanded, read_bounded
from fivestep.errors import UsageError, suggestion
from fivestep.loop.evaluate import evaluate
from fivestep.run.build import (
    ROWS,
    build_corpora,
    build_covering,
    build_data,
    build_device,
    build_metrics,
    build_objective,
    use_threads,
)
from fivestep.run.config import Config
from fivestep.run.export import which_weights
from fivestep.run.loaded import Loaded, load
from fivestep.run.metrics import readable_rows
from fivestep.run.names import ENVIRONMENT, METRICS
from fivestep.run.run import MOST_FACTS
from fivestep.watch.table import figures_of, number

SPLITS = ("train", "val", "test", "all")


def evaluate_run(
    path: str | Path,
    which: str = "best",
    split: str | None = None,
    data: Sequence[str] = (),
    batch_size: int | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """The figures of the `best` or `last` weights of the run at `path`: loss, perplexity, accuracy, count, ...

    split: "train", "val", "test", or "all": every split, each on its own, averaged over all targets.
    data: other sources in place of the run's; then the default is "all", or "val" of a folder with splits.
    batch_size: as in training if not given (for rnn and transformer it is the number of columns, and the figure
    depends on it a little). device, threads: the run's if not given. Adds run, weights, step, split, data, and for
    the run's own data `recorded`, the loss in metrics.jsonl, and `data_changed`. Of several processes (torchrun) each
    takes its part of every batch. Raises UsageError.
    """
    processes.join_here()
    with processes.together():
        return evaluated(path, which, split, data, batch_size, device, threads)


def evaluated(
    path: str | Path,
    which: str,
    split: str | None,
    data: Sequence[str],
    batch_size: int | None,
    device: str | None,
    threads: int | None,
) -> dict[str, Any]:
    """The same, of one process or of several that have joined."""
    if split is not None and split not in SPLITS:
        raise UsageError(f"split = '{split}' is not one of {', '.join(SPLITS)} (--split){suggestion(split, SPLITS)}")
    loaded = load(path, which, "cpu")
    config = msgspec.structs.replace(
        loaded.config,
        data=list(data) or loaded.config.data,
        eval_batch_size=batch_size or loaded.config.eval_batch_size or loaded.config.batch_size,
    )
    loaded.model.to(processes.local_device(build_device(device or config.device)))
    use_threads(threads or config.threads)
    folder = len(data) == 1 and (expanded(data[0]) / "train.txt").is_file()
    split = split or ("all" if data and not folder and config.model != "mlp" else "val")
    streams, digest = build_streams(config, loaded)
    if split != "all" and split not in streams:
        raise UsageError(
            f"{' '.join(config.data)} has no {split} split in this run (test_fraction = {config.test_fraction}); "
            f"--split may be {', '.join(streams)} or all"
        )
    which = which_weights(expanded(path), which)
    result = {"run": str(path), "weights": which, "step": loaded.step, "split": split, "data": config.data}
    chosen = list(streams.values()) if split == "all" else [streams[split]]
    result |= averaged(config, loaded, chosen)
    if not data:
        changed = digest is not None and digest != recorded_digest(expanded(path))
        result |= {"recorded": recorded_loss(expanded(path), split, loaded.step), "data_changed": changed}
    return result


def build_streams(config: Config, loaded: Loaded) -> tuple[dict[str, Any], str | None]:
    """For each split the stream that scores every target of it once, and the SHA-256 of the text."""
    if loaded.tokenizer is None:
        return row_streams(config, loaded), None
    if config.overfit_batches and config.data == loaded.config.data:  # the run's validation was its training batches
        data = build_data(config)
        return {"val": data.val}, data.digest
    corpora = build_corpora(config, loaded.tokenizer)
    return build_covering(config, corpora), corpora.digest


def row_streams(config: Config, loaded: Loaded) -> dict[str, Any]:
    """The same for rows of features and labels."""
    name = config.data[0]
    if len(config.data) != 1 or name not in ROWS:
        raise UsageError(f"this run's model reads rows: --data must be one of {', '.join(ROWS)}")
    if name != loaded.config.data[0]:
        raise UsageError(f"this run's model was made for the rows of {loaded.config.data[0]}, not of {name} (--data)")
    rows = config.eval_batch_size or config.batch_size
    return {split: Examples(x, y, rows, shuffle=False) for split, (x, y) in ROWS[name]().items()}


def averaged(config: Config, loaded: Loaded, streams: Sequence[Any]) -> dict[str, float]:
    """The figures over all `streams`, each weighted by its targets."""
    objective, metrics = build_objective(config, loaded.tokenizer), build_metrics(config)
    parts = [
        evaluate(loaded.model, stream, objective, metrics=metrics, precision=config.precision) for stream in streams
    ]
    if len(parts) == 1:
        return parts[0]
    count = sum(part["count"] for part in parts)
    figures = {name: sum(part[name] * part["count"] for part in parts) / count for name in ("loss", *metrics)}
    return {**figures, "count": count, **objective.figures(figures["loss"])}


def recorded_loss(path: Path, split: str, step: int) -> float | None:
    """The loss that training wrote down for `split` at `step`; None where it did not (or over its own steps only)."""
    if split == "train":
        return None
    try:
        rows = list(readable_rows(path / METRICS)) if (path / METRICS).is_file() else []  # a pipe would wait
    except OSError:
        rows = []
    losses = [row.get("loss") for row in rows if row.get("split") == split and row.get("step") == step]
    return losses[-1] if losses and isinstance(losses[-1], float) else None


def recorded_digest(path: Path) -> str | None:
    """The SHA-256 of the text that the run was trained on."""
    try:
        digest = json.loads(read_bounded(path / ENVIRONMENT, MOST_FACTS)).get("data_sha256")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return digest if isinstance(digest, str) else None


def in_lines(result: dict[str, Any]) -> str:
    """The result for people: a figure a line."""
    figures = {name: value for name, value in result.items() if name != "recorded"}
    rows = {"loss": number(result["loss"]), **figures_of(figures)}
    rows["targets"] = f"{int(result['count']):,}"
    if result.get("recorded") is not None:
        same = (
            "the same" if result["recorded"] == result["loss"] else f"{result['loss'] - result['recorded']:+.2e} now"
        )
        rows["recorded"] = f"{number(result['recorded'])} ({same})"
    lines = [f"{result['run']}, {result['weights']} weights (step {result['step']:,}), {result['split']} split"]
    lines += [f"  {title:<12}{text}" for title, text in rows.items()]
    if result.get("data_changed"):
        lines.append(f"note: {' '.join(result['data'])} is no longer the text that this run was trained on")
    return "\n".join(lines)
