"""The text of an ejected file: pieces of source, chosen and filled in by what a configuration uses.

    configuration -> facts (what it uses), values -> pieces (plain/*.txt) -> one Python file

A piece is Python as it would be written by hand, with lines that stand only where a fact holds:

    @if dropout ... @else ... @end         lines between
    x = norm(x)  @if not dropout           a line
    $rows                                  a value or a name

What the file does not use is not in it: an import or a constant stands there because a line names it. Owns the facts,
the order of the pieces and the lines that depend on more than a fact. The arithmetic of the pieces is the loop's, the
models' and the data's own; a test holds each recipe's weights to it, bit for bit. Reads no data and writes no file.
"""

import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from importlib import resources
from itertools import pairwise
from pathlib import Path
from string import Template
from textwrap import indent
from typing import Any

import msgspec
import torch
from torch import nn

from fivestep.loop.clock import parse_amount
from fivestep.loop.optimizer import OPTIMIZERS, freeze, hidden_matrices
from fivestep.run.build import WINDOWED, build_model, build_optimizers
from fivestep.run.config import Config

WIDTH = 118  # of a line

# Constants of the file in their order, with their comment; those that a line names are there.
CONSTANTS = {
    "paths": "the text",
    "min_count": "words seen less often are <unk>",
    "max_vocabulary": "words, <unk> and <eos> included",
    "vocab_size": "rows of the embedding table",
    "n_features": "",
    "n_outputs": "",
    "block_size": "tokens of a window",
    "max_len": "positions with weights of their own",
    "bptt": "tokens of a segment",
    "n_layer": "layers",
    "n_head": "attention heads",
    "n_embd": "width",
    "n_hidden": "width of the hidden layers",
    "ngrams": "ids of the longest n-gram with an embedding",
    "dropout": "share of activations dropped in training",
    "batch_size": "of a step",
    "accumulate": "micro-batches that make a step",
    "micro_batch_size": "",
    "eval_batch_size": "in validation",
    "label_smoothing": "in training only",
    "learning_rate": "",
    "muon_learning_rate": "of the hidden matrices",
    "momentum": "",
    "betas": "decay of Adam's two averages",
    "weight_decay": "",
    "no_decay": "names of parameters without decay",
    "freeze": "names of parameters that stay as they are",
    "clip_norm": "largest norm of all gradients together",
    "clip_value": "largest element of a gradient",
    "warmup_iters": "steps of linear warm-up",
    "decay_iters": "steps of decay at the end",
    "min_learning_rate": "where the schedule ends",
    "anneal": "divides the learning rate where validation does not improve",
    "anneal_patience": "validations without improvement that are let pass",
    "early_stop": "validations in a row without improvement that end the training",
    "ema": "decay of the averaged weights",
    "epochs": "",
    "max_iters": "steps in all",
    "eval_every": "steps between validations",
    "seed": "",
    "threads": "",
    "device": "",
}
# Names, and the import that each needs, in the order of isort.
STANDARD = {
    "itertools": "import itertools",
    "math": "import math",
    "Counter": "from collections import Counter",
    "fnmatchcase": "from fnmatch import fnmatchcase",
    "Path": "from pathlib import Path",
    "topics": "from pydoc_data.topics import topics",
}
OTHERS = {
    "np": "import numpy as np",
    "torch": "import torch",
    "F": "import torch.nn.functional as F",
    "nn": "from torch import nn",
    "AveragedModel": "from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn",
}
FACTS = """
    manual file files split_files cut test chars bytes words limited rows_given mapped line digits
    windows segments rows replacement accumulate device bf16
    dropout tied ngrams deep projected hidden lstm
    frozen two two_rates rate ema clip_norm clip_value
    constant cosine linear wsd gradual warmup floor default_decay
    anneal patience early_stop accuracy
    flat nested counting seldom by_epochs both eval_in_epochs
"""  # what a condition may name
HIDDEN = {  # of a model's parameters those that Muon takes: `hidden_matrices`, written out
    "gpt": 'name.startswith("blocks.")',
    "gpt2": 'name.startswith("blocks.") and p.ndim == 2',
    "rnn": 'name.startswith(("rnn.", "projection.")) and p.ndim == 2',
    "transformer": 'name.startswith("layers.") and p.ndim == 2',
    "mlp": "p.ndim == 2 and p is not model.layers[-1].weight",
}
MODELS = {"bigram": "Bigram", "gpt": "GPT", "gpt2": "GPT2", "rnn": "RNN", "transformer": "Transformer", "mlp": "MLP"}
ROW = {"windows": "windows", "segments": "columns", "rows": "rows"}
BATCH = {"windows": "xb, yb", "segments": "data, target", "rows": "features, labels"}
SHAPES = {"constant": "1", "cosine": "half a cosine", "linear": "a straight line", "wsd": "1, and a line at the end"}
DEVICE = '"cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"'


def script(config: Config, out: Path, data_facts: dict[str, bool], data_values: dict[str, Any]) -> str:
    """The whole file."""
    facts = {**dict.fromkeys(FACTS.split(), False), **facts_of(config), **data_facts}
    values = {**values_of(config, facts), **data_values}
    optimizer = optimizer_lines(config, meta_model(config, data_values))

    def piece(name: str, **more: str) -> str:
        return kept(name, facts, {**values, **more})

    source = next((name for name in ("line", "digits") if facts[name]), "tokens" if facts["mapped"] else "text")
    order = [] if facts["segments"] else ["draws" if facts["replacement"] else "permutation"]
    body = spaced(
        [
            *(["torch.set_num_threads(threads)"] if config.threads else []),
            piece(source),
            *map(piece, order),
            piece(values["stream"]),
            *([piece("accumulated")] if facts["accumulate"] else []),
            *([piece("length")] if needs_length(facts) else []),
            piece(config.model),
            "\n".join(line for line in (piece("model"), optimizer, averaged(facts)) if line),
            *([piece("schedule")] if facts["gradual"] or facts["constant"] or facts["wsd"] else []),
            piece("evaluate"),
            loop(facts, piece),
            piece("saved"),
        ]
    )
    constants = constants_of(config, facts, data_values, body)
    text = "\n\n".join([header(config, out, source), imports_of(f"{constants}\n{body}"), constants, body])
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"


def spaced(pieces: list[str]) -> str:
    """The pieces one after another: two blank lines around a function or a class, else one."""
    text = pieces[0]
    for before, piece in pairwise(pieces):
        heads = [line for line in before.splitlines() if line and not line.startswith((" ", ")"))]
        defines = [line.startswith(("def ", "class ", "@")) for line in (heads[-1], piece)]
        text += ("\n\n\n" if any(defines) else "\n\n") + piece
    return text


def kept(name: str, facts: Mapping[str, bool], values: Mapping[str, Any]) -> str:
    """The piece of this name: its lines whose conditions hold, with `$names` filled in."""
    text = (resources.files("fivestep.learn") / "plain" / f"{name}.txt").read_text("utf-8")
    lines: list[str] = []
    open_conditions: list[bool] = []
    for line in text.splitlines():
        word = line.strip()
        if word.startswith("@if "):
            open_conditions.append(holds(word.removeprefix("@if "), facts))
        elif word == "@else":
            open_conditions[-1] = not open_conditions[-1]
        elif word == "@end":
            open_conditions.pop()
        elif all(open_conditions):
            plain, _, condition = line.partition("  @if ")
            if not condition or holds(condition, facts):
                lines.append(plain)
    return Template("\n".join(lines)).substitute(values).strip("\n")


def holds(condition: str, facts: Mapping[str, bool]) -> bool:
    """Whether all of `a and not b` hold."""
    return all(facts[word.removeprefix("not ")] != word.startswith("not ") for word in condition.split(" and "))


def facts_of(config: Config) -> dict[str, bool]:
    """What the configuration uses, beside its data."""
    kind = stream_of(config)
    in_epochs = parse_amount(config.eval_every, "eval_every")[0] == "epoch"
    nested = config.max_iters is None and in_epochs
    schedule = config.schedule if config.schedule != "constant" or config.warmup_iters else ""
    two_rates = config.muon_learning_rate not in (None, config.learning_rate)
    return {
        kind: True,
        "replacement": config.replacement and kind == "windows",
        "accumulate": config.accumulate > 1,
        "device": config.device != "cpu",
        "bf16": config.precision == "bf16",
        "dropout": config.dropout > 0,
        "tied": config.tied,
        "ngrams": config.ngrams > 1,
        "deep": config.n_layer > 1,
        "projected": config.tied and config.n_hidden != config.n_embd,
        "hidden": config.model == "rnn",
        "lstm": config.cell == "lstm",
        "rows_given": config.vocab_size is not None,
        "frozen": bool(config.freeze),
        "two": config.optimizer == "muon",
        "two_rates": two_rates,
        "rate": bool(schedule or config.anneal),
        "ema": config.ema > 0,
        "clip_norm": config.clip_norm > 0,
        "clip_value": config.clip_value > 0,
        **({schedule: True} if schedule else {}),
        "gradual": schedule in ("cosine", "linear"),
        "warmup": config.warmup_iters > 0,
        "floor": config.min_learning_rate > 0,
        "default_decay": schedule == "wsd" and config.decay_iters is None,
        "anneal": config.anneal > 0,
        "patience": config.anneal_patience > 0,
        "early_stop": config.early_stop is not None,
        "accuracy": kind == "rows" and config.criterion == "cross-entropy",
        "flat": not nested,
        "nested": nested,
        "counting": nested and bool(schedule),
        "seldom": nested and eval_amount(config) > 1,
        "by_epochs": config.max_iters is None and (not nested or schedule not in ("", "constant")),
        "both": config.max_iters is not None and config.epochs is not None,
        "eval_in_epochs": in_epochs,
    }


def stream_of(config: Config) -> str:
    """The kind of batches: windows, segments or rows."""
    return "rows" if config.model == "mlp" else "windows" if config.model in WINDOWED else "segments"


def eval_amount(config: Config) -> int:
    """The number in `eval_every`, of steps or epochs."""
    return int(parse_amount(config.eval_every, "eval_every")[1])


def needs_length(facts: Mapping[str, bool]) -> bool:
    """Whether a line asks how many steps an epoch has."""
    in_flat = facts["flat"] and (facts["eval_in_epochs"] or facts["hidden"])
    return facts["by_epochs"] or facts["both"] or in_flat


def values_of(config: Config, facts: Mapping[str, bool]) -> dict[str, str]:
    """What stands for each `$name` of the pieces."""
    kind, accumulates = stream_of(config), facts["accumulate"]
    rows = "micro_batch_size" if accumulates and kind != "segments" else "batch_size"
    micro_batches = {
        "windows": f"math.ceil(n_windows / {rows})",
        "segments": "math.ceil((len(source) - 1) / bptt)",
        "rows": f"math.ceil(len(train_labels) / {rows})",
    }[kind]
    tied_width = "n_embd" if config.tied else "n_hidden"
    start = "a linear warm-up, then " if facts["warmup"] else ""
    rate = "schedule(step)" if any(facts[name] for name in SHAPES) else ""
    return {
        "stream": kind,
        "rows": rows,
        "steps_in_epoch": f"math.ceil({micro_batches} / accumulate)" if accumulates else micro_batches,
        "int64": ".astype(np.int64)" if facts["mapped"] else "",
        "eval_epochs": f"{eval_amount(config)} * steps_per_epoch" if eval_amount(config) > 1 else "steps_per_epoch",
        "to": ".to(device)" if facts["device"] else "",
        "kind": "device" if facts["device"] else '"cpu"',
        "eval_rows": "eval_batch_size" if config.eval_batch_size else "batch_size",
        "criterion": "F.mse_loss" if config.criterion == "mse" else "F.cross_entropy",
        "smoothing": ", label_smoothing=label_smoothing" if config.label_smoothing else "",
        "model": MODELS[config.model],
        "cell": cell(config),
        "width": tied_width,
        "positions": "max_len" if config.max_len not in (None, config.block_size) else "block_size",
        "shape": start + SHAPES[config.schedule],
        "rate": " * ".join(filter(None, [rate, "annealing" if facts["anneal"] else ""])),
        "at_rate": " the weights" + (", at this step's learning rate" if facts["rate"] else ""),
        "pair": BATCH[kind],
        "targets": BATCH[kind].split(", ")[1],
        "embedded": "self.token_embedding_table(xb)" + (" + self.ngrams(xb)" if facts["ngrams"] else ""),
        "batch": "window" if accumulates else BATCH[kind],
        "batches": "windows" if accumulates else "batches",
        "judged": "averaged" if facts["ema"] else "model",
        "kept_model": "averaged.module" if facts["ema"] else "model",
    }


def cell(config: Config) -> str:
    """The recurrent layers of an rnn; dropout is between layers, so one layer has none."""
    between = ", dropout=dropout" if config.dropout and config.n_layer > 1 else ""
    kind = {"lstm": "LSTM", "gru": "GRU"}.get(config.cell, "RNN")
    activation = ', nonlinearity="relu"' if config.cell == "rnn_relu" else ""
    return f"nn.{kind}(n_embd, n_hidden, n_layer{between}{activation})"


def loop(facts: Mapping[str, bool], piece: Callable[..., str]) -> str:
    """The five steps, in the loop over steps or in those over epochs and batches; what validation brings."""
    forward = piece("forward")
    if facts["bf16"]:
        forward = piece("autocast") + "\n" + indent(forward, "    ")
    inner, tally = f"{forward}\n{piece('backward')}", piece("tally") if facts["nested"] else ""
    if facts["accumulate"]:
        inner, tally = piece("window") + "\n" + indent(f"{inner}\n{tally}".rstrip(), "    "), ""
    steps = f"{piece('zero')}\n{inner}\n{piece('update')}\n{tally}".rstrip()
    judge = piece("judge") if facts["anneal"] or facts["early_stop"] else ""
    if facts["flat"]:
        text = piece("flat", steps=indent(steps, "    ")) + "\n" + indent(judge, " " * 8)
    else:
        told = indent(f"{piece('told')}\n{judge}", " " * (8 if facts["seldom"] else 4))
        text = piece("nested", steps=indent(steps, " " * 8), told=told)
    start = piece("judge_start") if judge else ""
    return f"# The loop, and in it the five steps.\n{start}\n{text}".replace("\n\n", "\n").rstrip()


def averaged(facts: Mapping[str, bool]) -> str:
    """The line of the averaged weights, if there are any."""
    return "averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))" if facts["ema"] else ""


# --- the optimizer ---


def meta_model(config: Config, data_values: Mapping[str, Any]) -> nn.Module:
    """The model without storage: its parameters' names and shapes. Raises UsageError for what does not fit."""
    inputs = data_values.get("n_features") or data_values.get("vocab_size") or config.vocab_size or 2
    with torch.device("meta"):
        model = build_model(config, inputs, data_values.get("n_outputs", 2))
    freeze(model, config.freeze)
    build_optimizers(msgspec.structs.replace(config, fused=False), model)
    return model


def optimizer_lines(config: Config, model: nn.Module) -> str:
    """The optimizer, or the two of Muon, over all parameters or groups of them."""
    names = [name for name, _ in model.named_parameters()]
    groups: list[str] = []  # the lines that choose parameters
    if config.optimizer != "muon":
        params = grouped(config, names, "", "", groups)
        return "\n".join(
            [*groups, call("optimizer", TORCHS[config.optimizer], params, options(config, config.optimizer))]
        )
    hidden = hidden_matrices(model)
    condition = HIDDEN[config.model]
    matrices = grouped(config, [name for name in names if name in hidden], condition, "matrices", groups)
    outer = f"not ({condition})" if " and " in condition else f"not {condition}"
    rest = grouped(config, [name for name in names if name not in hidden], outer, "rest", groups)
    muon = call("muon", TORCHS["muon"], matrices, options(config, "muon"))
    adamw = call("adamw", TORCHS["adamw"], rest, options(config, "adamw"))
    why = "# Muon orthogonalises each hidden matrix's update; embeddings and the output layer are AdamW's."
    return "\n".join([why, *groups, muon, adamw, "optimizers = [muon, adamw]"])


def grouped(config: Config, names: list[str], condition: str, called: str, lines: list[str]) -> str:
    """What an optimizer is built over: an expression; `lines` gets those that it needs before."""
    spared = [name for name in names if any(fnmatchcase(name, pattern) for pattern in config.no_decay)]
    if not (spared and config.weight_decay):
        if not condition:
            return "model.parameters()"
        lines.append(chosen(called, condition))
        return called
    if not any(line.startswith("def ") for line in lines):
        lines[:0] = [SPARES]
    spared_name = f"{called}_spared" if called else "spared"
    both = f"{condition} and " if condition else ""
    parts = [f'{{"params": {spared_name}, "weight_decay": 0.0}}']
    if len(spared) < len(names):
        decayed_name = called or "decayed"
        lines.append(chosen(decayed_name, f"{both}not is_spared(name)"))
        parts.insert(0, f'{{"params": {decayed_name}}}')
    lines.append(chosen(spared_name, f"{both}is_spared(name)"))
    return f"[{', '.join(parts)}]"


def chosen(called: str, condition: str) -> str:
    """`called = [the parameters for which `condition` holds]`, broken as a formatter would."""
    parts = ["p", "for name, p in model.named_parameters()", f"if {condition}"]
    inside = " ".join(parts)
    if len(f"{called} = [{inside}]") <= WIDTH:
        return f"{called} = [{inside}]"
    return "\n".join([f"{called} = [", indent(inside if len(inside) <= WIDTH - 4 else "\n".join(parts), "    "), "]"])


SPARES = """

def is_spared(name):
    return any(fnmatchcase(name, pattern) for pattern in no_decay)


"""
TORCHS = {
    "sgd": "torch.optim.SGD",
    "adam": "torch.optim.Adam",
    "adamw": "torch.optim.AdamW",
    "muon": "torch.optim.Muon",
}


def options(config: Config, name: str) -> list[str]:
    """The arguments that differ from torch's own defaults."""
    momentum = 0.95 if name == "muon" and config.momentum is None else config.momentum or 0.0
    given = {
        "momentum": (momentum, "momentum"),
        "betas": ((config.beta1, config.beta2), "betas"),
        "weight_decay": (config.weight_decay, "weight_decay"),
        "adjust_lr_fn": ("match_rms_adamw", '"match_rms_adamw"'),
        "fused": (config.fused or None, "True"),
    }
    defaults = inspect.signature(OPTIMIZERS[name]).parameters
    two_rates = name == "muon" and config.muon_learning_rate not in (None, config.learning_rate)
    rate = "lr=muon_learning_rate" if two_rates else "lr=learning_rate"
    known = {option: value for option, value in given.items() if option in defaults}
    return [
        rate,
        *(f"{option}={text}" for option, (value, text) in known.items() if value != defaults[option].default),
    ]


def call(target: str, function: str, first: str, arguments: list[str]) -> str:
    """`target = function(first, arguments)`, broken as a formatter would."""
    whole = f"{target} = {function}({', '.join([first, *arguments])})"
    if len(whole) <= WIDTH:
        return whole
    return "\n".join([f"{target} = {function}(", *(f"    {argument}," for argument in [first, *arguments]), ")"])


# --- the head of the file ---


def header(config: Config, out: Path, source: str) -> str:
    """The docstring."""
    name = out.name if re.fullmatch(r"[\w.-]+", out.name) else "FILE"
    beside = {"tokens": f"{out.stem}-train.npy and {out.stem}-val.npy", "digits": f"{out.stem}-digits.npz"}.get(
        source
    )
    reads = f"It reads {beside}, beside it.\n" if beside and name != "FILE" else ""
    title = (
        f"The training loop of {config.recipe or config.model}, with PyTorch, NumPy and the standard library alone."
    )
    writes = f"It writes the weights that it ends with to {Path(name).stem}.npz, beside it, over what is there.\n"
    return f'"""{title}\n\n    python {name}\n\nprints the loss on the whole validation split.\n{reads}{writes}"""'


def imports_of(code: str) -> str:
    """The imports of the names in `code`."""
    names = loaded(code)
    sections = [[line for name, line in section.items() if name in names] for section in (STANDARD, OTHERS)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def loaded(code: str) -> set[str]:
    """The names that `code` reads."""
    nodes = ast.walk(ast.parse(code))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def constants_of(config: Config, facts: Mapping[str, bool], data_values: Mapping[str, Any], body: str) -> str:
    """The constants that the body names, a line each."""
    texts = {name: literal(getattr(config, name)) for name in CONSTANTS if hasattr(config, name)}
    texts |= {name: literal(data_values[name]) for name in CONSTANTS if name in data_values}
    texts |= {
        "betas": literal((config.beta1, config.beta2)),
        "micro_batch_size": "batch_size // accumulate",
        "device": DEVICE if config.device == "auto" else literal(config.device),
        "eval_every": str(eval_amount(config)),
    }
    computed = {"max_iters": facts["by_epochs"], "eval_every": facts["flat"] and facts["eval_in_epochs"]}
    computed |= {"decay_iters": facts["default_decay"], "vocab_size": texts["vocab_size"] == "None"}
    comments = {**CONSTANTS, "batch_size": f"{ROW[stream_of(config)]} a step"}
    comments["eval_every"] = f"{'epochs' if facts['nested'] else 'steps'} between validations"
    needed, lines = loaded(body), list[str]()
    for name in reversed(CONSTANTS):
        if name in needed and not computed.get(name):
            needed |= loaded(texts[name])
            lines.insert(0, constant(name, texts[name], comments[name]))
    return "\n".join(lines)


def constant(name: str, text: str, comment: str) -> str:
    """`name = text  # comment`, a list too long for a line one item a line."""
    line = f"{name} = {text}" + (f"  # {comment}" if comment else "")
    if len(line) <= WIDTH or not text.startswith("["):
        return line
    return "\n".join([f"{name} = [", *(f"    {quoted(item)}," for item in ast.literal_eval(text)), "]"])


def literal(value: Any) -> str:
    """A value as Python writes it, text in double quotes."""
    if isinstance(value, list | tuple):
        inside = ", ".join(map(literal, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return quoted(value) if isinstance(value, str) else repr(value)


def quoted(text: str) -> str:
    """Text as Python's string in double quotes."""
    return json.dumps(text)
