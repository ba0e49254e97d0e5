"""Configuration to objects: the model, the streams, the objective, the optimizer.

    corpus -> tokenizer (fitted on the training split) -> token file -> streams      (language models)
    token files, made beforehand -> streams                                          (language models)
    features, labels -> streams                                                      (rows)

Owns which object an option makes. Makes no directory and trains nothing: what is refused here leaves no run behind.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from fivestep import processes
from fivestep.data import tokenizer as tokenizers
from fivestep.data.corpus import Report, load_corpus, unreported
from fivestep.data.examples import Examples, digits, line
from fivestep.data.files import expanded
from fivestep.data.mixture import InTurn, Mixture
from fivestep.data.preparation import fitted, tokenized
from fivestep.data.remote import is_url
from fivestep.data.segments import CoveringSegments, Segments, longest
from fivestep.data.shards import ShardedIds, is_token_source, open_token_source
from fivestep.data.sources import BUILTINS, source_notes
from fivestep.data.stream import FirstBatches, steps_in
from fivestep.data.tokenizer import Tokenizer
from fivestep.data.tokens import SPLITS, TokenFile, check_ids
from fivestep.data.weights import weighted
from fivestep.data.windows import CoveringWindows, Windows
from fivestep.errors import UsageError
from fivestep.loop.clock import Limit
from fivestep.loop.evaluate import accuracy
from fivestep.loop.language import NextToken, TruncatedBPTT
from fivestep.loop.objective import Supervised
from fivestep.loop.optimizer import build_muon, build_optimizer, freeze
from fivestep.loop.precision import autocast
from fivestep.loop.schedule import constant, warmup_cosine, warmup_linear, warmup_stable_decay
from fivestep.loop.vocabulary import is_fused
from fivestep.models.bigram import Bigram
from fivestep.models.gpt import GPT
from fivestep.models.gpt2 import GPT2
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from fivestep.models.transformer import Transformer
from fivestep.run.config import Config
from fivestep.run.writing import prompt_ids

ROWS: dict[str, Callable[..., Any]] = {"line": line, "digits": digits}  # sources of rows instead of text
WINDOWED = ("bigram", "gpt", "gpt2")


@dataclass(frozen=True)
class Data:
    """The streams of a job and what is known of them."""

    train: Any
    val: Any
    test: Any  # None where there is no test split
    inputs: int  # rows of the embedding table, or features of a row
    outputs: int
    name: str
    digest: str | None = None  # SHA-256 of the text
    tokenizer: Tokenizer | None = None
    notes: list[str] = field(default_factory=list)
    files: list[TokenFile] = field(default_factory=list)


@dataclass(frozen=True)
class Corpora:
    """The token files of a job. weights: of each, where windows are drawn from several; else None."""

    names: list[str]
    files: list[TokenFile]
    weights: list[Fraction] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that all have."""
        return self.files[0].tokenizer

    @property
    def name(self) -> str:
        """For people."""
        if self.weights is None:
            return self.files[0].name
        return " + ".join(f"{float(weight):g} {name}" for name, weight in zip(self.names, self.weights, strict=True))

    @property
    def digest(self) -> str:
        """SHA-256 of the text, or of the texts' and their weights."""
        texts = [file.metadata["source"] for file in self.files]
        if self.weights is None:
            return texts[0]
        return hashlib.sha256(json.dumps([texts, list(map(str, self.weights))]).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """Everything `fit` needs."""

    data: Data
    model: nn.Module
    objective: Supervised
    optimizers: list[Optimizer]
    scheduler: Callable[[int], float] | None
    metrics: dict[str, Any]
    device: torch.device


def build_job(config: Config, data: Data | None = None) -> Job:
    """The objects of a run, around `data` where it is built already.

    Seeds torch's, Python's and NumPy's generators. Raises UsageError for what does not fit together.
    """
    device = build_device(config.device)
    autocast(config.precision, device)  # says what this device cannot do
    use_threads(config.threads)
    data = data or build_data(config)
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    try:
        model = build_whole_or_empty(config, data.inputs, data.outputs, device)
    except (RuntimeError, MemoryError) as error:
        raise UsageError(
            f"the model does not fit into memory ({str(error).splitlines()[0][:80]}); "
            "lower --n-embd, --n-hidden, --n-layer or --vocab-size"
        ) from error
    frozen = freeze(model, config.freeze)
    if frozen:
        data.notes.append(f"frozen: {frozen:,} parameters")
    objective = build_objective(config, data.tokenizer)
    if isinstance(objective, NextToken):
        windowed = config.model in WINDOWED
        rows = micro_batch_size(config) * config.block_size if windowed else config.batch_size * config.bptt
        with autocast(config.precision, device):
            if is_fused(objective.fused, model, objective.criterion, rows):
                data.notes.append("loss: fused, equal to the plain one to rounding (--loss)")
    return Job(
        data=data,
        model=model,
        objective=objective,
        optimizers=build_optimizers(config, model),
        scheduler=build_schedule(config, data.train),
        metrics=build_metrics(config),
        device=device,
    )


def build_whole_or_empty(config: Config, inputs: int, outputs: int, device: torch.device) -> nn.Module:
    """The model on `device`; where it is to be cut into shards, whole on the host in process 0, elsewhere on meta."""
    cut = config.parallel == "fsdp" and processes.size() > 1
    with torch.device("meta") if cut and not processes.is_first() else nullcontext():
        model = build_model(config, inputs, outputs)
    if not cut and next(model.parameters()).device.type != device.type:  # without storage it cannot be moved at all
        model.to(device)
    return model


SMALL = 50_000  # parameters: the steps of larger models gain little from being compiled
LONG = 200_000  # steps: `--graph auto` compiles for runs of this length, which gain more than compiling costs
WORTH_A_HINT = 5_000  # steps: from here on a run with a step that is compiled already is faster by a second or more


def step_options(config: Config, job: Job) -> dict[str, Any]:
    """What `TrainStep` takes beside the model, the objective and the optimizer."""
    return {
        "scheduler": job.scheduler,
        "clip_norm": config.clip_norm or None,
        "clip_value": config.clip_value or None,
        "precision": config.precision,
        "ema": config.ema or None,
        "on_nonfinite": config.on_nonfinite,
        "graph": is_by_program(config, job),
        "activation_checkpointing": config.activation_checkpointing,
    }


def is_by_program(config: Config, job: Job) -> bool:
    """Return whether the job's step is to be compiled."""
    return takes_graph(config, count_parameters(job.model), job.device.type)


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def takes_graph(config: Config, parameters: int, device: str) -> bool:
    """Return whether the step is to be compiled.

    `auto` is a function of the arguments alone. It ignores how fast this machine is and what the cache holds, so
    that the same command trains the same bits in its first run and in its second. A compiled step saves 0.1 to
    0.4 ms, and compiling takes 10 to 20 s.
    """
    if config.graph != "auto":
        return config.graph == "on"
    return gains_by_graph(config, parameters, device, LONG)


def gains_by_graph(config: Config, parameters: int, device: str, steps: int) -> bool:
    """Return whether `auto` applies here: one process, a small model on the CPU, a run of `steps` or more."""
    if processes.announced() > 1 or config.parallel != "auto" or config.activation_checkpointing:
        return False
    return parameters <= SMALL and device == "cpu" and (config.max_iters or 0) >= steps


def graph_notes(config: Config, job: Job, asked: bool) -> list[str]:
    """Return what to say of `graph = "auto"`: its decision if asked, and that `on` would make later runs faster."""
    if config.graph != "auto":
        return []
    notes, compiles = [], is_by_program(config, job)
    if asked:
        decided = "is compiled" if compiles else "runs eagerly"
        otherwise = "run it eagerly anyway, give --graph off" if compiles else "compile it anyway, give --graph on"
        notes = [
            f"graph: the step {decided}. auto compiles it only on the CPU, for at most {SMALL:,} parameters and at "
            f"least {LONG:,} steps (--max-iters). To {otherwise}"
        ]
    if not compiles and gains_by_graph(config, count_parameters(job.model), job.device.type, WORTH_A_HINT):
        notes.append(
            "graph: --graph on makes later runs of this job faster; the first compiles the step, in 10 to 20 s"
        )
    return notes


def build_device(name: str) -> torch.device:
    """`auto`: a GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # a device that holds no numbers (meta) is none either
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device = '{name}' cannot be used here ({reason}); try --device cpu") from error
    return device


def use_threads(threads: int | None) -> None:
    """Let torch compute with so many CPU threads, from here on; as many as before where None is given."""
    if threads:
        torch.set_num_threads(threads)


def torchs_threads(device: str) -> int:
    """The CPU threads that torch would train with on `device`, by its own choice; 1 beside a GPU."""
    return torch.get_num_threads() if build_device(device).type == "cpu" else 1


def build_data(config: Config, report: Report = unreported) -> Data:
    """The streams: over rows for an mlp, over a text for every other model.

    `report` is told how far a text's preparation is.
    """
    data = build_rows(config) if config.model == "mlp" else build_text(config, report)
    if not config.overfit_batches:
        return data
    few = FirstBatches(data.train, config.overfit_batches)
    note = f"overfitting: the first {few.n} batches are all there is, for training and validation"
    return replace(data, train=few, val=few, test=None, notes=[*data.notes, note])


def build_text(config: Config, report: Report = unreported) -> Data:
    """Streams over tokenized texts: windows for bigram, gpt and gpt2, segments for rnn and transformer."""
    for source in sources_of(config.data):
        if source in ROWS:
            raise UsageError(f"--data {source} has rows, but --model {config.model} reads text; use --model mlp")
    corpora = build_corpora(config, report=report)
    tokenizer = corpora.tokenizer
    if config.sample_prompt is not None:
        prompt_ids(tokenizer, config.sample_prompt)  # refused now rather than after hours
    train = build_training(config, corpora)
    size, covering = embedding_rows(config, tokenizer), build_covering(config, corpora)
    return Data(
        train=train,
        val=covering["val"],
        test=covering.get("test"),
        inputs=size,
        outputs=size,
        name=corpora.name,
        digest=corpora.digest,
        tokenizer=tokenizer,
        notes=text_notes(config, corpora, train),
        files=corpora.files,
    )


def build_training(config: Config, corpora: Corpora) -> Any:
    """The stream to learn from."""
    if config.model in WINDOWED:
        rows, order = micro_batch_size(config), (config.seed, config.replacement)
        if corpora.weights is None:
            return Windows(corpora.files[0].splits["train"], config.block_size, rows, *order)
        texts = {name: file.splits["train"] for name, file in zip(corpora.names, corpora.files, strict=True)}
        return Mixture(texts, corpora.weights, config.block_size, rows, *order)
    if corpora.weights is not None:
        raise UsageError(
            f"--model {config.model} reads one text from its beginning to its end, so --data takes no weights; "
            f"a mixture is for {', '.join(WINDOWED)}"
        )
    ids = corpora.files[0].splits["train"]
    return Segments(ids, config.batch_size, config.bptt, config.variable_bptt, config.seed)


def text_notes(config: Config, corpora: Corpora, train: Any) -> list[str]:
    """What is worth knowing of the texts, a line each."""
    sources = sources_of(config.data)
    notes = [note for source in sources if not is_token_source(source) for note in source_notes(source)]
    notes += [
        f"{file.metadata['uncached']}: nothing is cached" for file in corpora.files if "uncached" in file.metadata
    ]
    passes = train.passes() if isinstance(train, Mixture) else {}
    for name, file in zip(corpora.names, corpora.files, strict=True):
        prefix = f"{name}, " if passes else ""
        notes += [
            f"{prefix}{split}: {len(ids):,} tokens"
            + (f", {file.unknown[split]:,} of them <unk>" if file.unknown.get(split) else "")
            + (f" in {ids.shards:,} shard{'s' * (ids.shards > 1)}" if isinstance(ids, ShardedIds) else "")
            + (f", passed {passes[name]:.2f} times in an epoch" if passes and split == "train" else "")
            for split, ids in file.splits.items()
        ]
    if passes:
        notes.append("val: each corpus's, every target once, so a longer one counts for more whatever its weight")
    if is_token_source(sources[0]):
        notes.append("splits and tokenizer are the token file's")
    elif config.tokenizer_file is not None:
        notes.append(f"tokenizer: from {config.tokenizer_file}")
    return notes


def embedding_rows(config: Config, tokenizer: Tokenizer) -> int:
    """How many ids the model knows: the tokenizer's, or more where `vocab_size` asks for more."""
    size = config.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UsageError(
            f"vocab_size = {size} is below the {tokenizer.vocab_size} tokens of the tokenizer's vocabulary; "
            "raise --vocab-size, or leave it out"
        )
    return size


def build_covering(config: Config, corpora: Corpora) -> dict[str, Any]:
    """For each split the stream that scores each target of it once, of every corpus that has the split.

    Raises UsageError for a split without a target.
    """
    each = [_covering(config, file.splits) for file in corpora.files]
    if len(each) == 1:
        return each[0]
    splits = [split for split in SPLITS if any(split in one for one in each)]
    return {split: InTurn([one[split] for one in each if split in one]) for split in splits}


def _covering(config: Config, splits: Mapping[str, Any]) -> dict[str, Any]:
    for split, ids in splits.items():
        if len(ids) < 2:
            fraction = "--test-fraction" if split == "test" else "--val-fraction"
            raise UsageError(
                f"the {split} split has {len(ids)} token, and needs 2 to have a target: give more text (--data), or "
                f"change {fraction}"
            )
    rows = config.eval_batch_size or config.batch_size
    if config.model in WINDOWED:
        return {split: CoveringWindows(ids, config.block_size, rows) for split, ids in splits.items()}
    return {split: CoveringSegments(ids, rows, config.bptt) for split, ids in splits.items()}


def build_metrics(config: Config) -> dict[str, Any]:
    """What evaluation adds to the objective's figures."""
    return {"accuracy": accuracy} if config.model == "mlp" and config.criterion == "cross-entropy" else {}


def as_used(config: Config, tokenizer: Tokenizer | None) -> Config:
    """`config` with the tokenizer's options as they were used: a tokenizer brought along takes none of them."""
    given = config.tokenizer_file is not None or any(map(is_token_source, sources_of(config.data)))
    if tokenizer is None or not given:
        return config
    return msgspec.structs.replace(config, tokenizer=tokenizer.kind, min_count=1, max_vocabulary=None)


def sources_of(data: Sequence[str]) -> list[str]:
    """What `--data` names, without the weights."""
    weights = weighted(data)
    return list(data) if weights is None else list(weights)


def resolved(data: Sequence[str]) -> list[str]:
    """The same sources by whole paths, with their weights: those that a run can be repeated from anywhere with."""
    weights, known = weighted(data), {"-", *BUILTINS, *ROWS}
    paths = [
        source if source in known or is_url(source) else str(expanded(source).resolve())
        for source in sources_of(data)
    ]
    if weights is None:
        return paths
    return [f"{path}:{given.rpartition(':')[2]}" for path, given in zip(paths, data, strict=True)]


def build_corpora(config: Config, tokenizer: Tokenizer | None = None, report: Report = unreported) -> Corpora:
    """The token files of the configured text, or of several with weights. Raises UsageError."""
    weights = weighted(config.data)
    if weights is None:
        file = build_tokens(config, tokenizer, report)
        return Corpora([file.name], [file])
    each = {source: msgspec.structs.replace(config, data=[source]) for source in weights}
    files = {source: build_tokens(one, tokenizer, report) for source, one in each.items()}
    first, *others = files
    for source in others:
        if files[source].tokenizer.fingerprint != files[first].tokenizer.fingerprint:
            raise UsageError(
                f"--data {first} and --data {source} have different tokenizers, and a mixture needs one: make both "
                "with `fivestep data make --tokenizer-file`, or give --tokenizer-file or --tokenizer bytes with texts"
            )
    names = [file.name for file in files.values()]
    distinct = len(set(names)) == len(names)
    return Corpora(names if distinct else list(files), list(files.values()), list(weights.values()))


def build_tokens(config: Config, tokenizer: Tokenizer | None = None, report: Report = unreported) -> TokenFile:
    """The token file of one text: the one, or the shards, named by --data, or one made, or kept, in the cache.

    tokenizer: the one to use; else the one named by --tokenizer-file, or one fitted on the training split. A token
    file brings its own splits and tokenizer: options that would make others do not apply. Raises UsageError.
    """
    if tokenizer is None and config.tokenizer_file is not None:
        tokenizer = tokenizers.load(expanded(config.tokenizer_file))
    made = [source for source in config.data if is_token_source(source)]
    if not made:
        if tokenizer is None:  # before the text is read, which can take long
            tokenizers.check_options(config.tokenizer, config.min_count, config.max_vocabulary)
        corpus = load_corpus(
            config.data, config.val_fraction, config.test_fraction, text_field=config.text_field, report=report
        )
        if tokenizer is None:
            tokenizer = fitted(corpus, config.tokenizer, config.min_count, config.max_vocabulary, report=report)
        return tokenized(corpus, tokenizer, report=report)
    if len(config.data) > 1:
        raise UsageError(
            f"--data {made[0]} is a token file, so it must be given alone, or each with a weight (--data A:0.7 "
            "--data B:0.3)"
        )
    tokens = open_token_source(made[0])
    if not isinstance(next(iter(tokens.splits.values())), ShardedIds):  # those look at each id that they read
        check_ids(tokens, tokens.tokenizer.vocab_size, report)
    if not {"train", "val"} <= set(tokens.splits) or not {"name", "source"} <= set(tokens.metadata):
        raise UsageError(f"--data {made[0]} lacks a split or its source's name: make it with `fivestep data make`")
    if tokenizer is not None and tokenizer.fingerprint != tokens.tokenizer.fingerprint:
        raise UsageError(
            f"--data {made[0]} was made with another tokenizer than the one asked for: give the text itself"
        )
    return tokens


def build_rows(config: Config) -> Data:
    """Streams over rows of features and labels."""
    if len(config.data) != 1 or config.data[0] not in ROWS:
        raise UsageError(
            f"--model mlp reads rows: --data must be one of {', '.join(ROWS)}; got {' '.join(config.data)}"
        )
    name = config.data[0]
    splits = ROWS[name]()  # the same rows and splits whatever the seed: figures of two seeds compare
    features, labels = splits["train"]
    classes = not labels.is_floating_point()
    if classes != (config.criterion == "cross-entropy"):
        fitting = "cross-entropy" if classes else "mse"
        raise UsageError(f"--criterion {config.criterion} does not fit --data {name}; use --criterion {fitting}")
    rows = config.eval_batch_size or config.batch_size
    covering = {split: Examples(x, y, rows, shuffle=False) for split, (x, y) in splits.items()}
    return Data(
        train=Examples(features, labels, micro_batch_size(config), config.seed),
        val=covering["val"],
        test=covering["test"],
        inputs=features.shape[1],
        outputs=int(labels.max()) + 1 if classes else labels.shape[1],
        name=name,
        notes=[f"{split}: {len(labels):,} rows" for split, (_, labels) in splits.items()],
    )


def micro_batch_size(config: Config) -> int:
    """Rows of one micro-batch: the configured batch is the whole step's."""
    if config.batch_size % config.accumulate:
        raise UsageError(
            f"batch_size = {config.batch_size} cannot be cut into accumulate = {config.accumulate} equal "
            "micro-batches (--batch-size, --accumulate)"
        )
    return config.batch_size // config.accumulate


def build_model(config: Config, inputs: int, outputs: int) -> nn.Module:
    """The model for a vocabulary of `inputs`, or for rows of `inputs` features and `outputs` values or classes."""
    if config.model == "bigram":
        return Bigram(inputs)
    if config.model in ("gpt", "gpt2"):
        decoder = partial(GPT, ngrams=config.ngrams) if config.model == "gpt" else GPT2
        return decoder(
            inputs,
            block_size=(config.model == "gpt2" and config.max_len) or config.block_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            dropout=config.dropout,
            tied=config.tied,
        )
    if config.model == "mlp":
        return MLP([inputs, *[config.n_hidden] * config.n_layer, outputs], dropout=config.dropout)
    sizes = {"n_embd": config.n_embd, "n_hidden": config.n_hidden, "n_layer": config.n_layer}
    if config.model == "rnn":
        return RNN(inputs, **sizes, cell=config.cell, dropout=config.dropout, tied=config.tied)
    return Transformer(
        inputs,
        **sizes,
        n_head=config.n_head,
        dropout=config.dropout,
        tied=config.tied,
        block_size=config.bptt,
        max_len=longest(config.bptt) if config.variable_bptt else config.bptt,
    )


def build_objective(config: Config, tokenizer: Tokenizer | None = None) -> Supervised:
    """What is learned: next tokens of windows or segments, or labels of rows. tokenizer: the data's own, if known."""
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    if config.model == "mlp":
        mean_squared = config.criterion == "mse"
        if mean_squared and config.label_smoothing:
            raise UsageError("label_smoothing (--label-smoothing) is for classes; --criterion mse has none")
        return Supervised(nn.MSELoss() if mean_squared else cross_entropy)
    if config.criterion != "cross-entropy":
        raise UsageError(f"--criterion {config.criterion} does not fit --model {config.model}; use cross-entropy")
    kind = config.tokenizer if tokenizer is None else tokenizer.kind
    chars_per_token = 1.0 if kind == "chars" else None
    fused = "auto" if config.loss == "auto" else config.loss == "fused"
    if config.model in WINDOWED:
        return NextToken(cross_entropy, chars_per_token, fused)
    return TruncatedBPTT(cross_entropy, chars_per_token, config.bptt if config.variable_bptt else None, fused)


def build_optimizers(config: Config, model: nn.Module) -> list[Optimizer]:
    """The optimizer by name, with those of the options that it takes; for muon two of them."""
    rate, decay, betas = config.learning_rate, config.weight_decay, (config.beta1, config.beta2)
    shared: dict[str, Any] = {"no_decay": config.no_decay, "weight_decay": decay}
    fused: dict[str, Any] = {"fused": True} if config.fused else {}
    if config.optimizer == "sgd":
        return [build_optimizer(model, "sgd", rate, momentum=config.momentum or 0.0, **fused, **shared)]
    if config.optimizer == "muon":
        momentum = 0.95 if config.momentum is None else config.momentum
        matrix_rate = config.muon_learning_rate or rate
        return build_muon(model, matrix_rate, momentum, rate, betas=betas, **fused, **shared)
    return [build_optimizer(model, config.optimizer, rate, betas=betas, **fused, **shared)]


def build_schedule(config: Config, train: Any) -> Callable[[int], float] | None:
    """The learning rate's factor as a function of completed updates; None where it never changes."""
    if config.schedule == "constant":
        return partial(constant, warmup_iters=config.warmup_iters) if config.warmup_iters else None
    steps = Limit(config.epochs, config.max_iters).total_steps(partial(steps_in, train, config.accumulate))
    assert steps is not None  # the configuration's own check asks for max_iters or epochs
    floor = config.min_learning_rate / config.learning_rate
    if config.schedule == "wsd":
        decay_iters = config.decay_iters or max(1, steps // 5)
        if config.warmup_iters + decay_iters > steps:
            raise UsageError(
                f"warmup_iters = {config.warmup_iters} and decay_iters = {decay_iters} are more than the "
                f"{steps} steps of the run (--warmup-iters, --decay-iters)"
            )
        return partial(
            warmup_stable_decay,
            max_iters=steps,
            decay_iters=decay_iters,
            warmup_iters=config.warmup_iters,
            floor=floor,
        )
    decay = warmup_cosine if config.schedule == "cosine" else warmup_linear
    return partial(decay, max_iters=steps, warmup_iters=config.warmup_iters, floor=floor)
