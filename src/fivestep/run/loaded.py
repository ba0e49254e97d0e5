"""A trained run, ready to be used: its model with its weights, its tokenizer, its configuration.

Owns what `fs.load` gives back. Trains nothing and writes nothing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.data import tokenizer as tokenizers
from fivestep.data.files import expanded, read_bounded
from fivestep.data.tokenizer import Tokenizer
from fivestep.errors import UsageError, brief, named, suggestion
from fivestep.loop.batch import shapes
from fivestep.loop.evaluate import undisturbed
from fivestep.run.build import build_device, build_model
from fivestep.run.checkpoint import WEIGHTS, checkpoints
from fivestep.run.config import FIXED, Config, load_config
from fivestep.run.export import is_export, read_export
from fivestep.run.names import CONFIG, ENVIRONMENT, METRICS, SAVED, TOKENIZER
from fivestep.run.run import MOST_FACTS, load_weights
from fivestep.run.writing import write


@dataclass(frozen=True)
class Loaded:
    """A trained model with what it needs to be used."""

    model: nn.Module
    tokenizer: Tokenizer | None
    config: Config
    step: int

    def generate(
        self,
        prompt: str | None = None,
        max_new_tokens: int = 500,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        cache: bool = True,
    ) -> str:
        """`prompt` (a new line if not given) and at most `max_new_tokens` tokens after it, up to a `stop` string.

        The arguments are those of `models.generate.generate`. Raises UsageError for bad ones, and for a model
        without a tokenizer.
        """
        return "".join(
            self.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                stop=stop,
                seed=seed,
                cache=cache,
            )
        )

    def stream(self, prompt: str | None = None, **how: Any) -> Iterator[str]:
        """The text of `generate`, with the same arguments by name, in pieces as they come: the prompt first."""
        if self.tokenizer is None:
            raise UsageError(
                f"this run's model ({self.config.model}) learned rows, not text: it has nothing to write"
            )
        return write(self.model, self.tokenizer, prompt, **how)

    def predict(self, features: Any) -> Any:
        """Return the model's output for a tensor of features or token ids, in eval mode, without gradients.

        Raises UsageError for text, for what is no tensor, and for a tensor that the model cannot take.
        """
        if not isinstance(features, Tensor):
            hint = "torch.as_tensor makes one"
            if isinstance(features, str):
                hint = "this model learned rows, not text"
                if self.tokenizer is not None:
                    hint = (
                        "generate(text) continues a text. A batch of its token ids is "
                        "torch.tensor(loaded.tokenizer.encode(text), dtype=torch.long)[None]"
                    )
            raise UsageError(f"predict takes a tensor, and got {named(features)}: {hint}")
        try:
            with undisturbed(self.model):
                self.model.eval()
                return self.model(features.to(next(self.model.parameters()).device))
        except (RuntimeError, IndexError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError | UsageError):
                raise
            kind = str(features.dtype).removeprefix("torch.")
            raise UsageError(
                f"this run's model ({self.config.model}) cannot take {shapes(features)} of {kind}. torch: {error}"
            ) from error


def check_unedited(path: Path, config: Config, facts: dict[str, Any]) -> None:
    """Raise UsageError where the run's configuration describes another model than the one that was trained.

    A run of an earlier version does not say what it was begun with: nothing is compared.
    """
    begun = facts.get("settings")
    for name in FIXED:
        now = getattr(config, name)
        if isinstance(begun, dict) and name in begun and begun[name] != now:
            raise UsageError(
                f"{path / CONFIG} says {name} = {now!r}, but the run was trained with {begun[name]!r}: the file has "
                "been edited; put that value back"
            )


def checked_tokenizer(path: Path, facts: dict[str, Any]) -> Tokenizer | None:
    """Load the run's tokenizer; None where it learned rows. Raises UsageError where another one was trained with."""
    if not (path / TOKENIZER).exists():
        return None
    tokenizer = tokenizers.load(path / TOKENIZER)
    if facts.get("tokenizer_sha256") not in (None, tokenizer.fingerprint):
        raise UsageError(
            f"{path / TOKENIZER} is not the tokenizer that the run was trained with ({ENVIRONMENT} has its SHA-256): "
            "the file has been edited or replaced; put the old one back"
        )
    return tokenizer


def check_sizes(path: Path, which: str, config: Config, inputs: int, outputs: int) -> None:
    """Raise UsageError, before memory is asked for, where the model is larger than the weights that were saved."""
    found = [read_export(path)] if is_export(path) else checkpoints(path / "checkpoints")
    sizes = [checkpoint.bytes_of(WEIGHTS) for checkpoint in found]
    if not sizes:
        load_weights(path, nn.Identity(), which)  # says why there are none
    try:
        with torch.device("meta"):
            parameters = list(build_model(config, inputs, outputs).parameters())
        need = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    except (RuntimeError, TypeError, ArithmeticError) as error:
        raise UsageError(f"{path} describes a model that cannot be: {brief(error)}") from error
    if need > max(sizes):
        raise UsageError(
            f"{path} describes a model of {need:,} bytes, but its weights have {max(sizes):,}: {CONFIG} or "
            f"{ENVIRONMENT} is not the run's own"
        )


def load(path: str | Path, which: str = "best", device: str = "auto") -> Loaded:
    """The model of the run at `path` with its `best` or `last` weights, its tokenizer and its configuration.

    Of a folder that `fivestep export` wrote: with the weights that are in it.
    """
    path = expanded(path)
    if not (path / CONFIG).is_file():
        raise UsageError(why_no_run(path))
    config = load_config(str(path / CONFIG), {})
    try:
        facts = json.loads(read_bounded(path / ENVIRONMENT, MOST_FACTS))
        inputs, outputs = int(facts["inputs"]), int(facts["outputs"])
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise UsageError(f"{path / ENVIRONMENT} is missing or damaged, so the model's sizes are not known") from error
    check_unedited(path, config, facts)
    tokenizer = checked_tokenizer(path, facts)
    if tokenizer is None and facts.get("tokenizer_sha256") is not None:
        raise UsageError(f"{path / TOKENIZER} is missing, so the run's token ids have no meaning: put it back")
    check_sizes(path, which, config, inputs, outputs)
    model = build_model(config, inputs, outputs).to(build_device(device))
    step = load_weights(path, model, which)
    model.eval()
    return Loaded(model, tokenizer, config, step)


def why_no_run(path: Path) -> str:
    """What is said where `path` has no configuration; names the runs that can be loaded, where there are such."""
    if (path / METRICS).is_file():
        return f"{path} was made from Python (fs.Run): load its weights with fs.load_weights"
    known = {str(one.parents[2]) for place in {path, path.parent, Path("runs")} for one in place.glob(f"*/{SAVED}")}
    sound = sorted(run for run in known if Path(run, CONFIG).is_file())
    hint = suggestion(str(path), sound)
    if not hint and sound:
        hint = f"; there {'is' if len(sound) == 1 else 'are'} {', '.join(sound[:5])}"
    reason = f"is not a run of fivestep train: it has no {CONFIG}" if path.exists() else "does not exist"
    return f"{path} {reason}{hint}"
