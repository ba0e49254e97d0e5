"""One readable file that trains what a configuration says, with nothing of ours in it.

    configuration -> what a plain file does not do is refused -> its text (script.py) -> the file
                     what it cannot read by itself             -> .npy beside it

Owns what is written where, what is refused, and what is said of the differences. The text is `script.py`'s.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fivestep.data.corpus import split_files
from fivestep.data.files import expanded, written_whole
from fivestep.data.sources import BUILTINS, RECORDS, text_files
from fivestep.data.tokens import is_token_file
from fivestep.errors import UsageError
from fivestep.learn.script import meta_model, quoted, script
from fivestep.loop.clock import parse_amount
from fivestep.run.build import ROWS, build_rows, build_text, takes_graph
from fivestep.run.config import Config
from fivestep.watch.preparation import preparation_shown
from fivestep.watch.screen import Console

MOST_FILES = 8  # that a file names; the ids of more are written beside it


class Ejected(NamedTuple):
    """The file's lines, the data files beside it, what differs from the run it came from, and what it will write."""

    lines: int
    beside: list[Path]
    notes: list[str]
    weights: Path


def eject(config: Config, out: Path, force: bool = False) -> Ejected:
    """Write the file `out` that trains what `config` says, and beside it the data that it could not read by itself.

    Raises UsageError for what is there already (unless `force`), and for what a plain file does not do.
    """
    check_written_out(config)
    check_place(out, force)
    weights = out.with_suffix(".npz")
    if weights == out:
        raise UsageError(f"--out {out} is where the file would keep its weights; give it a name that ends in .py")
    beside, facts, values = data_of(config, out)
    for path in beside:
        check_place(path, force)
    source = script(config, out, facts, values)
    files: dict[Path, Callable[[Any], Any]] = {**beside, out: lambda file: file.write(source.encode())}
    for path, write in files.items():
        try:
            with written_whole(path) as file:
                write(file)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror or error}; give another --out") from error
    parameters = sum(p.numel() for p in meta_model(config, values).parameters())
    return Ejected(source.count("\n"), list(beside), notes(config, parameters), weights)


def text_of(config: Config, out: Path) -> str:
    """The text of the file `out`; nothing is written."""
    check_written_out(config)
    _, facts, values = data_of(config, out)
    return script(config, out, facts, values)


def check_place(path: Path, force: bool) -> None:
    """Raise UsageError where `path` cannot be written, or holds something and `force` is not given."""
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a directory" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise UsageError(f"--out {path} {reason}; give the name of a file to write")
    if path.exists() and not force:
        raise UsageError(f"{path} is there already; give --force to overwrite it, or another --out")


def check_written_out(config: Config) -> None:
    """Raise UsageError for what a plain file does not do."""
    unit, _ = parse_amount(config.eval_every, "eval_every (--eval-every)")
    refused = [
        (config.until is not None, "until", "--max-iters or --epochs"),
        (unit not in ("step", "epoch"), "eval_every", "a number of steps or epochs (250, 1ep)"),
        (config.precision == "fp16", "precision", "--precision fp32 or bf16"),
        (config.variable_bptt, "variable_bptt", "--variable-bptt false"),
        (config.to_best, "to_best", "--to-best false"),
        (bool(config.overfit_batches), "overfit_batches", "--overfit-batches 0"),
    ]
    for is_refused, name, instead in refused:
        if is_refused:
            raise UsageError(
                f"{name} = {getattr(config, name)!r} is not written out as a plain loop: give {instead} "
                f"(--{name.replace('_', '-')})"
            )


def notes(config: Config, parameters: int) -> list[str]:
    """A sentence for each thing that the file does otherwise than `fivestep train`, to rounding or more.

    parameters: how many the model has, at least: the vocabulary may not be known yet.
    """
    device = "cpu" if config.device == "auto" else config.device
    halved = config.precision == "bf16" and config.model in ("gpt", "gpt2")
    said = {
        "graph: the steps are eager ones; a run as one program equals them to rounding (--graph off: bit for bit)": (
            takes_graph(config, parameters, device)
        ),
        "loss: the plain one; a run may take the fused one, equal to rounding (--loss plain: bit for bit)": (
            config.model in ("rnn", "transformer") and config.loss != "plain"
        ),
        "precision: attention is torch's own; on a CPU a run in bf16 takes plain products, equal to rounding": halved,
        "parallel: the script trains in one process": config.parallel != "auto",
        "activation_checkpointing: the script keeps all activations": config.activation_checkpointing,
        "on_nonfinite: a loss that is not finite is not skipped": config.on_nonfinite == "skip",
        "the test split is left out; fivestep eval scores it": bool(config.test_fraction) or config.model == "mlp",
    }
    return [sentence for sentence, holds in said.items() if holds]


# --- the data ---

Writer = Callable[[Any], None]


def data_of(config: Config, out: Path) -> tuple[dict[Path, Writer], dict[str, bool], dict[str, Any]]:
    """The files to write beside `out`, the facts about the data and the values that the pieces need."""
    if config.model == "mlp":
        return rows_of(config, out)
    facts, values = plain_text(config)
    if facts:
        return {}, facts, values
    with preparation_shown(Console()) as report:  # byte pairs of a large text take minutes
        data = build_text(config, report)
    paths = {split: out.with_name(f"{out.stem}-{split}.npy") for split in ("train", "val")}
    ids = {"train": np.asarray(data.train.tokens), "val": np.asarray(data.val.tokens)}
    beside: dict[Path, Writer] = {path: saving(np.save, arr=ids[split]) for split, path in paths.items()}
    values = {f"{split}_file": quoted(path.name) for split, path in paths.items()}
    return beside, {"mapped": True}, {**values, "vocab_size": data.inputs}


def rows_of(config: Config, out: Path) -> tuple[dict[Path, Writer], dict[str, bool], dict[str, Any]]:
    """The same for rows: points about a line are made anew; the digits, which scikit-learn has, are written out."""
    data = build_rows(config)
    values: dict[str, Any] = {"n_features": data.inputs, "n_outputs": data.outputs}
    if config.data == ["line"]:
        return {}, {"line": True}, values
    path = out.with_name(f"{out.stem}-{config.data[0]}.npz")
    splits = {"train": data.train, "val": data.val}
    arrays = {f"{split}_features": stream.features.numpy() for split, stream in splits.items()}
    arrays |= {f"{split}_labels": stream.labels.numpy() for split, stream in splits.items()}
    return (
        {path: saving(np.savez_compressed, **arrays)},
        {"digits": True},
        {**values, "digits_file": quoted(path.name)},
    )


def saving(save: Any, **arrays: Any) -> Writer:
    """A function that writes arrays into a file."""
    return lambda file: save(file, **arrays)


def plain_text(config: Config) -> tuple[dict[str, bool], dict[str, Any]]:
    """Facts and values for a text that a few lines read and tokenize; none where it takes more."""
    values: dict[str, Any] = {}
    source = config.data[0]
    paths = plain_paths(config.data)
    splits = split_files(source) if len(config.data) == 1 else {}
    counted = config.min_count == 1 and config.max_vocabulary is None
    known = config.tokenizer == "words" or (config.tokenizer in ("chars", "bytes") and counted)
    if not known or config.tokenizer_file is not None or paths is None or "test" in splits:
        return {}, {}
    facts = {config.tokenizer: True, "limited": config.max_vocabulary is not None}
    kept = "word for word, n in counts.most_common() if n >= min_count"
    values["kept_words"] = "word for word, _ in counts.most_common()" if config.min_count == 1 else kept
    if splits:
        values |= {f"{split}_path": quoted(str(path)) for split, path in splits.items()}
        return {**facts, "split_files": True}, {**values, "rest": "val_text"}
    if config.data == ["python-manual"]:
        facts["manual"] = True
    elif len(paths) == 1:
        facts["file"], values["path"] = True, quoted(str(paths[0]))
    else:
        facts["files"], values["paths"] = True, [str(path) for path in paths]
    values["train_share"] = repr(round(1 - config.val_fraction - config.test_fraction, 12))
    values["val_end"] = repr(round(1 - config.test_fraction, 12))
    values["rest"] = "text[cut:]" if config.test_fraction else "val_text"
    return {**facts, "cut": True, "test": config.test_fraction > 0}, values


def plain_paths(sources: list[str]) -> list[Path] | None:
    """The text files that `sources` are, none for Python's manual; None for what a plain file does not read."""
    if sources == ["python-manual"]:
        return []
    found: list[Path] = []
    for source in sources:
        path = expanded(source)
        if source == "-" or source in BUILTINS or source in ROWS or is_token_file(path):
            return None
        found += text_files(path) if path.is_dir() else [path]
    packed = any(path.name.lower().endswith((".gz", ".zst", *RECORDS)) for path in found)
    return None if packed or not found or len(found) > MOST_FILES or not all(map(Path.is_file, found)) else found
