"""Configuration to objects: the model, the streams, the objective, the optimizer.

    corpus -> tokenizer (fitted on the training split) -> token file -> streams      (language models)
    token file, made beforehand -> streams                                           (language models)
    features, labels -> streams                                                      (rows)

Owns which object an option makes. Makes no directory and trains nothing: what is refused here leaves no run behind.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fivestep.data import tokenizer as tokenizers
from fivestep.data.corpus import Corpus, Report, load_corpus, unreported
from fivestep.data.examples import Examples, digits, line
from fivestep.data.files import expanded
from fivestep.data.preparation import fitted, tokenized
from fivestep.data.segments import CoveringSegments, Segments
from fivestep.data.tokenizer import Tokenizer
from fivestep.data.tokens import TokenFile, is_token_file, open_tokens
from fivestep.data.windows import CoveringWindows, Windows
from fivestep.errors import UsageError
from fivestep.loop.clock import Limit
from fivestep.loop.evaluate import accuracy
from fivestep.loop.objective import NextToken, Supervised, TruncatedBPTT
from fivestep.loop.optimizer import build_optimizer
from fivestep.loop.schedule import constant, warmup_cosine, warmup_linear
from fivestep.models.bigram import Bigram
from fivestep.models.gpt import GPT
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from fivestep.models.transformer import Transformer
from fivestep.run.config import Config

ROWS: dict[str, Callable[..., Any]] = {"line": line, "digits": digits}  # sources of rows instead of text
WINDOWED = ("bigram", "gpt")


@dataclass(frozen=True)
class Data:
    """The streams of a job and what is known of them."""

    train: Any
    val: Any
    test: Any  # None where there is no test split
    inputs: int  # vocabulary size, or features of a row
    outputs: int
    name: str
    digest: str | None = None  # SHA-256 of the text
    tokenizer: Tokenizer | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Everything `fit` needs."""

    data: Data
    model: nn.Module
    objective: Supervised
    optimizer: Optimizer
    scheduler: Callable[[int], float] | None
    metrics: dict[str, Any]
    device: torch.device


def build_job(config: Config, report: Report = unreported) -> Job:
    """The objects of a run; `report` is told how far a text's preparation is.

    Seeds torch's generators. Raises UsageError for what does not fit together.
    """
    device = build_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = build_rows(config) if config.model == "mlp" else build_text(config, report)
    torch.manual_seed(config.seed)
    try:
        model = build_model(config, data.inputs, data.outputs).to(device)
    except (RuntimeError, MemoryError) as error:
        raise UsageError(
            f"the model does not fit into memory ({str(error).splitlines()[0][:80]}); "
            "lower --n-embd, --n-hidden or --n-layer"
        ) from error
    return Job(
        data=data,
        model=model,
        objective=build_objective(config, data.tokenizer),
        optimizer=build_optimizer_of(config, model),
        scheduler=build_schedule(config, len(data.train)),
        metrics={"accuracy": accuracy} if config.model == "mlp" and config.criterion == "cross-entropy" else {},
        device=device,
    )


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


def build_text(config: Config, report: Report = unreported) -> Data:
    """Streams over a tokenized text: windows for bigram and gpt, contiguous segments for rnn and transformer."""
    for source in config.data:
        if source in ROWS:
            raise UsageError(f"--data {source} has rows, but --model {config.model} reads text; use --model mlp")
    tokens = build_tokens(config, report)
    tokenizer = tokens.tokenizer
    splits, eval_batch_size = tokens.splits, config.eval_batch_size or config.batch_size
    train: Any
    covering: Callable[..., Any]
    if config.model in WINDOWED:
        rows = micro_batch_size(config)
        train = Windows(splits["train"], config.block_size, rows, config.seed, config.replacement)
        covering = partial(CoveringWindows, block_size=config.block_size, batch_size=eval_batch_size)
    else:
        train = Segments(splits["train"], config.batch_size, config.bptt)
        covering = partial(CoveringSegments, batch_size=eval_batch_size, bptt=config.bptt)
    notes = [
        f"{split}: {len(ids):,} tokens"
        + (f", {tokens.unknown[split]:,} of them <unk>" if tokens.unknown[split] else "")
        for split, ids in splits.items()
    ]
    size = tokenizer.vocab_size
    return Data(
        train=train,
        val=covering(splits["val"]),
        test=covering(splits["test"]) if "test" in splits else None,
        inputs=size,
        outputs=size,
        name=tokens.metadata["name"],
        digest=tokens.metadata["source"],
        tokenizer=tokenizer,
        notes=notes,
    )


def build_tokens(config: Config, report: Report = unreported) -> TokenFile:
    """The token file of the configured text: the one named by --data, or one made, or kept, in the cache.

    A token file brings its own splits and tokenizer: the options that would make them do not apply.
    """
    paths = [path for path in map(expanded, config.data) if is_token_file(path)]
    if not paths:
        corpus = load_corpus(
            config.data, config.val_fraction, config.test_fraction, text_field=config.text_field, report=report
        )
        return tokenized(corpus, build_tokenizer(config, corpus, report), report=report)
    if len(config.data) > 1:
        raise UsageError(f"--data {paths[0]} is a token file, so it must be given alone, not with others")
    tokens = open_tokens(paths[0])
    if not {"train", "val"} <= set(tokens.splits) or not {"name", "source"} <= set(tokens.metadata):
        raise UsageError(f"--data {paths[0]} lacks a split or its source's name: make it with `fivestep data make`")
    tokenizer = tokens.tokenizer
    named = config.tokenizer_file
    if named and tokenizers.load(expanded(named)).fingerprint != tokenizer.fingerprint:
        raise UsageError(f"--data {paths[0]} has another tokenizer than {named}: drop --tokenizer-file")
    return tokens


def build_tokenizer(config: Config, corpus: Corpus, report: Report = unreported) -> Tokenizer:
    """The tokenizer of the file that is named, else one fitted on the corpus's training split."""
    if config.tokenizer_file is not None:
        return tokenizers.load(expanded(config.tokenizer_file))
    return fitted(corpus, config.tokenizer, config.min_count, config.max_vocabulary, report=report)


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
    if config.model == "gpt":
        return GPT(
            inputs,
            block_size=config.block_size,
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
        max_len=config.bptt,
    )


def build_objective(config: Config, tokenizer: Tokenizer | None = None) -> Supervised:
    """What is learned: next tokens of windows or segments, or labels of rows. tokenizer: the data's own, if known."""
    if config.model == "mlp":
        return Supervised(nn.MSELoss() if config.criterion == "mse" else nn.CrossEntropyLoss())
    if config.criterion != "cross-entropy":
        raise UsageError(f"--criterion {config.criterion} does not fit --model {config.model}; use cross-entropy")
    kind = NextToken if config.model in WINDOWED else TruncatedBPTT
    tokens = config.tokenizer if tokenizer is None else tokenizer.kind
    return kind(chars_per_token=1.0 if tokens == "chars" else None)


def build_optimizer_of(config: Config, model: nn.Module) -> Optimizer:
    """The optimizer by name, with those of the options that it takes."""
    if config.optimizer == "sgd":
        options: dict[str, Any] = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    else:
        options = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    return build_optimizer(model, config.optimizer, config.learning_rate, no_decay=config.no_decay, **options)


def build_schedule(config: Config, batches_per_epoch: int) -> Callable[[int], float] | None:
    """The learning rate's factor as a function of completed updates; None where it never changes."""
    if config.schedule == "constant":
        return partial(constant, warmup_iters=config.warmup_iters) if config.warmup_iters else None
    steps = Limit(config.epochs, config.max_iters).total_steps(-(-batches_per_epoch // config.accumulate))
    assert steps is not None  # the configuration's own check asks for max_iters or epochs
    decay = warmup_cosine if config.schedule == "cosine" else warmup_linear
    floor = config.min_learning_rate / config.learning_rate
    return partial(decay, max_iters=steps, warmup_iters=config.warmup_iters, floor=floor)
