"""The flat, typed configuration: what a run is made from.

    recipe (TOML in the package)  <  file (TOML)  <  explicit flags

Owns the options, their kinds, ranges and help, and the precedence. Builds nothing; imports no torch, so that
`--help` is quick.
"""

import re
import tomllib
from collections.abc import Collection, Mapping
from importlib import resources
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec
import tomli_w

from fivestep.data.files import expanded, read_bounded
from fivestep.data.weights import as_sources, weighted
from fivestep.errors import UsageError, brief, suggestion
from fivestep.loop.clock import parse_amount, parse_steps
from fivestep.loop.plateau import PlateauRule

DEFAULT_RECIPE = "gpt-chars"
MOST_CONFIG, DEEPEST = 1 << 18, 50  # bytes of a file; dots in a name
STEPS = ("max_iters", "warmup_iters", "decay_iters", "lens", "keep_every")  # numbers of steps: 250, 10k
LIMITS = ("max_iters", "epochs", "until")
# Headings of --help: the option that each begins with, in the order of Config.
HEADINGS = {
    "data": "Data",
    "model": "Model",
    "batch_size": "Step",
    "schedule": "Schedule",
    "max_iters": "Length and intervals",
    "run_dir": "Run",
}


def option(help: str, **constraints: Any) -> msgspec.Meta:
    """The help text of a field and its range (`ge`, `gt`, `le`, `lt`)."""
    return msgspec.Meta(description=help, **constraints)


Size = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]


class Config(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Every option of a run. The names are the TOML keys, and with dashes the flags."""

    # --- what is learned ---
    recipe: Annotated[str, option("Name of the recipe this configuration came from.")] = ""
    data: Annotated[
        list[str],
        option(
            "A text file or JSON lines (.txt, .jsonl, also as .gz, .zst), a directory of them (train.txt, valid.txt, "
            "test.txt are its splits), a token file (.safetensors) or directory of shards from `fivestep data make`, "
            "a URL of either, - for standard input, python-manual or python-stdlib; for rows: line, digits. Give it "
            "once for each file; with a weight, as in wiki:0.7, windows are drawn from each."
        ),
    ] = []
    text_field: Annotated[str, option("The field of JSON lines that holds the text.")] = "text"
    tokenizer: Annotated[Literal["chars", "bytes", "words", "bpe"], option("What a token is.")] = "chars"
    tokenizer_file: Annotated[
        str | None, option("Use this tokenizer.json: ours, or one like GPT-2's from Hugging Face.")
    ] = None
    min_count: Annotated[int, option("Words seen less often become <unk>; byte pairs are not merged.", ge=1)] = 1
    max_vocabulary: Annotated[Natural | None, option("Keep at most so many tokens; bpe: 50257 if not given.")] = None
    val_fraction: Annotated[float, option("Last part of a single text, for validation.", gt=0, lt=1)] = 0.1
    test_fraction: Annotated[float, option("Part after that, for the test.", ge=0, lt=1)] = 0.0
    replacement: Annotated[bool, option("Draw windows with replacement.")] = False
    criterion: Annotated[Literal["cross-entropy", "mse"], option("The loss.")] = "cross-entropy"

    loss: Annotated[
        Literal["auto", "plain", "fused"],
        option(
            "Of words: plain holds all logits, as in a plain loop; fused never does, equal to rounding; auto: fused "
            "where it is faster."
        ),
    ] = "auto"

    # --- the model ---
    model: Annotated[Literal["bigram", "rnn", "transformer", "gpt", "gpt2", "mlp"], option("Which model.")] = "gpt"
    block_size: Annotated[int, option("Window of bigram, gpt and gpt2, in tokens.", ge=1, le=1 << 20)] = 64
    max_len: Annotated[
        Size | None, option("Positions that gpt2 has weights for; as many as block_size if not given.")
    ] = None
    bptt: Annotated[int, option("Segment of rnn and transformer, in tokens.", ge=1, le=1 << 20)] = 35
    variable_bptt: Annotated[bool, option("Segments of varying length around bptt, the learning rate with them.")] = (
        False
    )
    vocab_size: Annotated[
        Size | None,
        option("Rows of the embedding table where that is more than the tokenizer's vocabulary."),
    ] = None
    n_layer: Annotated[int, option("Layers.", ge=1, le=1000)] = 4
    n_head: Annotated[int, option("Attention heads.", ge=1)] = 4
    n_embd: Annotated[int, option("Width of the embedding.", ge=1)] = 128
    n_hidden: Annotated[int, option("Width of hidden layers (rnn, transformer, mlp).", ge=1)] = 200
    cell: Annotated[Literal["rnn_tanh", "rnn_relu", "lstm", "gru"], option("Cell of the rnn.")] = "lstm"
    dropout: Annotated[float, option("Share of activations dropped in training.", ge=0, lt=1)] = 0.0
    tied: Annotated[bool, option("Share the embedding's weights with the decoder's.")] = False
    ngrams: Annotated[
        int, option("gpt: n-grams of up to so many tokens have embeddings too; 1: none.", ge=1, le=64)
    ] = 1

    # --- the step ---
    batch_size: Annotated[int, option("Examples, windows or columns a step.", ge=1, le=1_000_000)] = 32
    accumulate: Annotated[int, option("Micro-batches that make a step.", ge=1)] = 1
    optimizer: Annotated[
        Literal["sgd", "adam", "adamw", "muon"],
        option("Which optimizer; muon: Muon on the hidden matrices, adamw on the rest."),
    ] = "adamw"
    learning_rate: Annotated[float, option("Learning rate, or its peak.", gt=0, le=1e6)] = 3e-4
    muon_learning_rate: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None,
        option("Learning rate of the hidden matrices (muon); learning_rate if not given."),
    ] = None
    momentum: Annotated[
        Annotated[float, msgspec.Meta(ge=0, lt=1)] | None, option("Momentum of sgd (0) and muon (0.95).")
    ] = None
    beta1: Annotated[float, option("First moment of adam, adamw.", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, option("Second moment of adam, adamw.", ge=0, lt=1)] = 0.999
    fused: Annotated[
        bool, option("sgd, adam, adamw as one kernel: faster, and equal to torch's loop but for rounding.")
    ] = False
    weight_decay: Annotated[float, option("Weight decay.", ge=0, le=1e6)] = 0.0
    no_decay: Annotated[list[str], option("Name patterns without decay, e.g. '*.bias'.")] = []
    clip_norm: Annotated[float, option("Largest global gradient norm; 0: none.", ge=0)] = 0.0
    clip_value: Annotated[float, option("Largest gradient element; 0: none.", ge=0)] = 0.0
    freeze: Annotated[list[str], option("Name patterns of parameters that stay as they are, e.g. 'blocks.0.*'.")] = []
    label_smoothing: Annotated[
        float, option("Share of the target spread over all classes, in training only.", ge=0, lt=1)
    ] = 0.0
    ema: Annotated[
        float, option("Decay of averaged weights, e.g. 0.999: they are evaluated and kept; 0: none.", ge=0, lt=1)
    ] = 0.0
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], option("Arithmetic of forward and loss (fp16: on a GPU).")
    ] = "fp32"
    graph: Annotated[
        Literal["auto", "on", "off"],
        option("The step as one compiled program (CPU); auto: for small models that train for many steps."),
    ] = "auto"
    activation_checkpointing: Annotated[
        bool,
        option("Compute each block once more in the backward pass instead of keeping it: less memory, more time."),
    ] = False
    on_nonfinite: Annotated[
        Literal["stop", "skip"], option("At a loss or gradient that is not finite: stop, or leave the step out.")
    ] = "stop"

    # --- the schedule ---
    schedule: Annotated[
        Literal["constant", "cosine", "linear", "wsd"],
        option("Learning rate over time; wsd: warm up, stay, decay at the end."),
    ] = "constant"
    warmup_iters: Annotated[int, option("Steps of linear warm-up.", ge=0)] = 0
    decay_iters: Annotated[Size | None, option("Steps of wsd's decay; a fifth of all if not given.")] = None
    min_learning_rate: Annotated[float, option("Where cosine, linear and wsd end.", ge=0)] = 0.0
    anneal: Annotated[
        float, option("Divide the learning rate by this where validation does not improve, e.g. 4; 0: never.", ge=0)
    ] = 0.0
    anneal_patience: Annotated[int, option("Validations without improvement that are let pass before.", ge=0)] = 0
    early_stop: Annotated[
        Size | None, option("End after so many validations in a row without improvement; never if not given.")
    ] = None
    to_best: Annotated[bool, option("Anneal, and stop early, from the best weights so far.")] = False

    # --- how long, how often (250 steps, 1ep, 10Mtok, 5min) ---
    max_iters: Annotated[Size | None, option("End after so many steps.")] = None
    epochs: Annotated[Size | None, option("End after so many epochs.")] = None
    until: Annotated[str | None, option("End after so much: 10Mtok, 5min.")] = None
    eval_every: Annotated[str, option("Validate so often: 250, 1ep, 5min.")] = "1ep"
    log_every: Annotated[str | None, option("Training rows between validations, so often.")] = None
    lens: Annotated[
        Size | None, option("Look into each layer every so many steps: gradient, update, activations; e.g. 50.")
    ] = None
    sample_every: Annotated[str | None, option("Write a sample so often: 500, 1ep, 5min.")] = None
    sample_prompt: Annotated[str | None, option("What samples go on from; a new line if not given.")] = None
    sample_tokens: Annotated[int, option("Tokens of a sample, also of the one at the end; 0: none.", ge=0)] = 200
    overfit_batches: Annotated[int, option("Learn only the first so many batches, by heart; 0: all.", ge=0)] = 0
    eval_batch_size: Annotated[Size | None, option("Batch in evaluation; as in training if not given.")] = None

    # --- the run ---
    run_dir: Annotated[str | None, option("Directory of the run; runs/RECIPE-N if not given.")] = None
    checkpoint_every: Annotated[
        str, option("Save the whole state so often, beside each best validation and the end: 500, 1ep, 5min.")
    ] = "5min"
    keep_last: Annotated[int, option("Newest checkpoints that stay, beside the best.", ge=1)] = 2
    keep_every: Annotated[Size | None, option("Also keep every checkpoint of a multiple of so many steps.")] = None
    seed: Annotated[int, option("Of the order of the data and of all random numbers.", ge=0, le=2**63 - 1)] = 1337
    device: Annotated[str, option("auto, cpu, cuda, cuda:1, mps.")] = "auto"
    parallel: Annotated[
        Literal["auto", "ddp", "fsdp"],
        option("Several processes (torchrun): whole weights in each, or shards of them; auto: ddp."),
    ] = "auto"
    threads: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=1024)] | None, option("CPU threads; torch's choice if not given.")
    ] = None


class Option(NamedTuple):
    """One field of Config as the command line needs it."""

    name: str
    kind: Any  # bool, int, float, str, list, or a tuple of choices
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """`max_iters` -> `--max-iters`."""
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """Return the flag of an option: `max_iters` -> `--max-iters`."""
    return "--" + name.replace("_", "-")


def options() -> list[Option]:
    """Every option that has a flag, in the order of Config."""
    hints = get_type_hints(Config, include_extras=True)
    return [
        Option(field.name, _kind(hints[field.name]), _default(field), _help(hints[field.name]))
        for field in msgspec.structs.fields(Config)
        if field.name != "recipe"
    ]


def _kind(hint: Any) -> Any:
    kind = get_args(hint)[0]
    if get_origin(kind) in (Union, UnionType):
        kind = next(arg for arg in get_args(kind) if arg is not NoneType)
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return get_args(kind)
    return get_origin(kind) or kind


def _help(hint: Any) -> str:
    return str(get_args(hint)[1].description)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def recipes() -> list[str]:
    """The names of the recipes in the package."""
    folder = resources.files("fivestep.run") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def description(recipe: str) -> str:
    """What a recipe is, in a sentence: the first of the comment that its file begins with."""
    lines = (resources.files("fivestep.run") / "recipes" / f"{recipe}.toml").read_text("utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"\.\s+(?=[A-Z])", comment)[0].rstrip(".") + "." if comment else ""  # "et al. 2019" goes on


def load_config(source: str | None, flags: Mapping[str, Any]) -> Config:
    """The configuration of a recipe's name or a TOML file's path, overridden by explicit `flags`.

    A file may name a `recipe` to start from. A limit (max_iters, epochs, until) given in a higher layer replaces all
    limits of the lower ones. Raises UsageError with a suggestion for what is unknown.
    """
    source = source or DEFAULT_RECIPE
    if source in recipes():
        layers = [recipe_values(source)]
    elif source.endswith(".toml") or expanded(source).is_file():
        values = file_values(expanded(source))
        base = str(values.get("recipe", ""))
        layers = [recipe_values(base) if base else {}, values]
    else:
        raise UsageError(
            f"'{source}' is neither a recipe ({', '.join(recipes())}) nor a .toml file{suggestion(source, recipes())}"
        )
    merged: dict[str, Any] = {}
    for values in [*layers, dict(flags)]:
        if any(name in values for name in LIMITS):
            merged = {name: value for name, value in merged.items() if name not in LIMITS}
        merged |= values
    return validated(merged)


def recipe_values(name: str) -> dict[str, Any]:
    """The options a recipe sets."""
    if name not in recipes():
        raise UsageError(f"recipe = '{name}' is not one of {', '.join(recipes())}{suggestion(name, recipes())}")
    text = (resources.files("fivestep.run") / "recipes" / f"{name}.toml").read_text("utf-8")
    return {"recipe": name, **tomllib.loads(text)}


def file_values(path: Path) -> dict[str, Any]:
    """The options a TOML file sets."""
    try:
        return parsed(read_bounded(path, MOST_CONFIG).decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise UsageError(f"the configuration {path} is not valid TOML: {brief(error)}") from error


def parsed(text: str) -> dict[str, Any]:
    """A TOML document. Raises ValueError, also for names with so many dots that the parser's time, their square,
    would be noticed; and RecursionError."""
    keys = (line.partition("=")[0].lstrip() for line in text.splitlines())
    if any(key.count(".") > DEEPEST and key[0] not in "\"'" for key in keys):
        raise ValueError(f"a name has more than {DEEPEST} dots")
    return tomllib.loads(text)


def validated(values: Mapping[str, Any]) -> Config:
    """`values` as a Config; unknown names, wrong kinds and values out of range are refused by name."""
    known = [field.name for field in msgspec.structs.fields(Config)]
    if isinstance(values.get("data"), Mapping):
        values = {**values, "data": as_sources(values["data"])}
    for name in values:
        if name not in known:
            raise UsageError(f"unknown option '{name}'{suggestion(name, known)}")
    counts = {name: values[name] for name in STEPS if isinstance(values.get(name), str)}
    values = {**values, **{name: parse_steps(text, f"{name} ({flag_of(name)})") for name, text in counts.items()}}
    try:
        config = msgspec.convert(dict(values), Config)
    except msgspec.ValidationError as error:
        raise UsageError(_explained(str(error), values)) from error
    _check_together(config)
    return config


def _explained(message: str, values: Mapping[str, Any]) -> str:
    what, _, path = message.rpartition(" - at `$.")
    name = path.rstrip("`").split("[")[0]
    found = {option.name: option for option in options()}.get(name)
    if found is None:
        return message
    given = values[name]
    if isinstance(found.kind, tuple):
        return (
            f"{name} = {given!r} is not one of {', '.join(found.kind)} ({found.flag})"
            f"{suggestion(str(given), found.kind)}"
        )
    return f"{name} = {given!r}: {what[0].lower()}{what[1:].replace('`', '')} ({found.flag})"


def _check_together(config: Config) -> None:
    if not config.data:
        raise UsageError("no data is named: give --data FILE, a directory, or python-manual")
    weighted(config.data)  # refuses
    if config.activation_checkpointing and config.graph == "on":
        raise UsageError(
            "one program keeps what it needs itself: give --graph off, or leave --activation-checkpointing out"
        )
    if config.max_iters is None and config.epochs is None and config.until is None:
        raise UsageError("nothing says how long to train: give --max-iters, --epochs or --until")
    for name in ("eval_every", "log_every", "sample_every", "checkpoint_every", "until"):
        if (amount := getattr(config, name)) is not None:
            parse_amount(amount, f"{name} (--{name.replace('_', '-')})")
    if config.max_len is not None and config.max_len < config.block_size:
        raise UsageError(
            f"block_size = {config.block_size} is above max_len = {config.max_len}, the positions that the model has "
            "weights for (--block-size, --max-len)"
        )
    if config.schedule != "constant" and config.max_iters is None and config.epochs is None:
        raise UsageError(f"the {config.schedule} schedule needs a planned end: give --max-iters or --epochs")
    PlateauRule(config.anneal or None, config.anneal_patience, config.early_stop, config.to_best)  # refuses
    _check_effects(config)
    if config.sample_every is not None and (config.model == "mlp" or not config.sample_tokens):
        reason = f"model = '{config.model}' writes no text" if config.model == "mlp" else "sample_tokens is 0"
        raise UsageError(f"sample_every = {config.sample_every!r}, but {reason} (--sample-every)")
    if config.min_learning_rate > config.learning_rate:
        raise UsageError(
            f"min_learning_rate = {config.min_learning_rate} is above learning_rate = {config.learning_rate} "
            "(--min-learning-rate, --learning-rate)"
        )


def _check_effects(config: Config) -> None:
    """Refuse what was asked for and would change nothing."""
    optimizer, schedule, model = config.optimizer, config.schedule, config.model
    idle = [
        (config.momentum is not None and optimizer not in ("sgd", "muon"), "momentum", "--optimizer sgd or muon"),
        (config.muon_learning_rate is not None and optimizer != "muon", "muon_learning_rate", "--optimizer muon"),
        (config.decay_iters is not None and schedule != "wsd", "decay_iters", "--schedule wsd"),
        (config.loss == "fused" and model not in ("rnn", "transformer"), "loss", "--model rnn or transformer"),
        (bool(config.anneal_patience) and not config.anneal, "anneal_patience", "--anneal"),
        (config.variable_bptt and model not in ("rnn", "transformer"), "variable_bptt", "--model rnn or transformer"),
        (
            config.activation_checkpointing and model not in ("transformer", "gpt", "gpt2"),
            "activation_checkpointing",
            "--model transformer, gpt or gpt2, whose blocks it computes again",
        ),
    ]
    for asked, name, needed in idle:
        if asked:
            raise UsageError(f"{name} (--{name.replace('_', '-')}) does nothing here: it needs {needed}")


MAY_CHANGE = (  # on a resume: what has no part in the order of the steps and in their arithmetic
    *LIMITS, "eval_every", "log_every", "lens", "sample_every", "sample_prompt", "sample_tokens", "eval_batch_size",
    "run_dir", "checkpoint_every", "keep_last", "keep_every", "device", "threads", "parallel", "early_stop",
    "activation_checkpointing",
)  # fmt: skip


FIXED = (  # on a resume: what decides the weights' shapes, what an id means, and the order of an epoch
    "recipe", "tokenizer", "min_count", "max_vocabulary", "model", "block_size", "max_len", "bptt", "variable_bptt",
    "vocab_size", "n_layer", "n_head", "n_embd", "n_hidden", "cell", "tied", "ngrams", "overfit_batches", "seed",
    "replacement",
)  # fmt: skip
BY_CONTENT = ("data", "tokenizer_file")  # what is the same wherever it lies: see `training.check_same_run`


def check_same(config: Config, before: Config, run_dir: str, wished: Collection[str] | None) -> None:
    """Raise UsageError where `config` would train something else than the run it is to go on with.

    wished: the options that may differ nonetheless; None: all but those in `FIXED`.
    """
    for name in (field.name for field in msgspec.structs.fields(Config)):
        given, was = getattr(config, name), getattr(before, name)
        if given == was or name in (*MAY_CHANGE, *BY_CONTENT):
            continue
        text = f"{name} = {given!r}, but the run in {run_dir} started with {was!r}"
        back = f"Set it back to {was!r}" if was is not None else "Leave it out"
        if name in FIXED:
            flag = "the recipe" if name == "recipe" else _flag(name)
            raise UsageError(
                f"{text}, and a resume cannot change it. {back} (in config.toml, or {flag} with `fivestep train`), "
                "or start a new run in another directory"
            )
        if wished is not None and name not in wished:
            raise UsageError(f"{text}. {back} ({_flag(name)}), or give --adopt-changes to continue with {given!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings(config: Config) -> dict[str, Any]:
    """Return the options that a resume may change only if it is told to, or not at all."""
    return {name: value for name, value in msgspec.to_builtins(config).items() if name not in MAY_CHANGE}


def to_toml(config: Config) -> str:
    """The whole configuration, every option resolved, under a comment, as TOML that `load_config` reads back."""
    values = {name: value for name, value in msgspec.to_builtins(config).items() if value is not None and value != ""}
    return f"# Every option; those that belong to another model or optimizer have no effect.\n{tomli_w.dumps(values)}"
