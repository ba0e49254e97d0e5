"""Whether a saved state has the form of this training's: names, kinds, shapes, ranges.

A digest tells that a file is as it was written, not that a well-meaning program wrote it, nor for which training. So
all that can be compared is compared before anything is put back: else an error would come from deep within a step, or
never. Not known here, and left to the model: the form of a hidden state. Raises ValueError with the place; changes
nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fivestep.loop.canonical_names import canonical, weights_of

LARGEST = 1 << 63  # of counts
MOMENTS = {  # what these read of a parameter's state without looking whether it is there
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}
FACTORED = ("Adafactor",)  # whose state is of other shapes than the parameters


def require(held: bool, place: str, what: str) -> None:
    """Raise ValueError unless `held`."""
    if not held:
        raise ValueError(f"its {place} is not {what}")


def check_count(value: Any, place: str) -> None:
    """A whole number of [0, 2**63)."""
    require(type(value) is int and 0 <= value < LARGEST, place, "a count")


def check_number(value: Any, place: str) -> None:
    """An int of 64 bits or a float; NaN and infinity are numbers."""
    sized = type(value) is int and -LARGEST <= value < LARGEST
    require(sized or isinstance(value, float), place, "a number")


def check_names(value: Any, names: Sequence[str], place: str) -> None:
    """A table with these very names."""
    require(isinstance(value, dict) and value.keys() == set(names), place, f"a table of {', '.join(names)}")


def check_full(saved: Any) -> None:
    """None, or the form of a training's first window."""
    if saved is not None:
        check_names(saved, ("window", "carried"), "full")
        require(isinstance(saved["window"], str) and isinstance(saved["carried"], bool), "full", "a form")


def check_held(saved: Any, names: Mapping[str, Any], optimizers: int) -> None:
    """Groups of known parameters, each once; names of frozen parameters, and of modules in eval()."""
    check_names(saved, ("groups", "frozen", "eval_modules"), "held")
    owned = saved["groups"]
    require(isinstance(owned, list) and len(owned) == optimizers, "held.groups", f"a list of {optimizers}")
    require(
        all(isinstance(one, list) and all(isinstance(g, list) for g in one) for one in owned), "held.groups", "lists"
    )
    held = [name for one in owned for group in one for name in group]
    require(
        all(isinstance(name, str) and name in names for name in held), "held.groups", "of this model's parameters"
    )
    require(len(set(held)) == len(held), "held.groups", "each parameter once")
    for place in ("frozen", "eval_modules"):
        listed = saved[place] if saved[place] is not None or place == "frozen" else []
        require(isinstance(listed, list) and all(isinstance(name, str) for name in listed), f"held.{place}", "names")


def check_clock(saved: Any, place: str) -> None:
    """Counts, and seconds that are finite."""
    counts, seconds = ("step", "epoch", "samples", "tokens"), ("seconds", "waiting")
    check_names(saved, (*counts, *seconds), place)
    for name in counts:
        check_count(saved[name], f"{place}.{name}")
    for name in seconds:
        check_number(saved[name], f"{place}.{name}")
        require(0 <= saved[name] < math.inf, f"{place}.{name}", "a time")


def check_mean(saved: Any, place: str) -> None:
    """The sums of a mean."""
    check_names(saved, ("total", "weight", "entries"), place)
    check_number(saved["total"], f"{place}.total")
    check_number(saved["weight"], f"{place}.weight")
    check_count(saved["entries"], f"{place}.entries")


def check_tensor(saved: Any, own: Tensor, place: str) -> None:
    """Of the shape and dtype of `own`."""
    require(isinstance(saved, Tensor), place, "a tensor")
    if not is_lazy(own):
        like = saved.shape == own.shape and saved.dtype == own.dtype
        require(like, place, f"{own.dtype} {list(own.shape)}, but {saved.dtype} {list(saved.shape)}")


def loads_by_itself(module: nn.Module) -> bool:
    """Return whether `module` may load weights of other names than its own."""
    own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return bool(module._load_state_dict_pre_hooks) or (own and not type(module).__module__.startswith("torch."))


def check_weights(saved: Any, model: nn.Module, place: str = "model") -> None:
    """The state of `model`, name by name, unless one of its modules loads other names by itself."""
    require(isinstance(saved, dict), place, "a table of weights")
    own_weights = weights_of(model)
    others = own_weights.keys() ^ {canonical(str(name)) for name in saved}
    if others and not any(map(loads_by_itself, model.modules())):
        shown = ", ".join(sorted(others)[:3]) + (", ..." if len(others) > 3 else "")
        raise ValueError(f"its {place} has other weights than this one: {shown} not in both")
    for name, value in saved.items():
        if (own := own_weights.get(canonical(str(name)))) is not None:
            check_tensor(value, own, f"{place}.{name}")


def check_like(saved: Any, own: Any, place: str) -> None:
    """Of the kinds of `own`; names of `own` may be missing, and None stands for what is not there yet."""
    if own is None or (saved is None and isinstance(own, bool)):  # a switch that may be left to torch
        return
    if isinstance(own, Tensor) or isinstance(saved, Tensor):
        require(_is_scalar(own) and _is_scalar(saved), place, "a number")
    elif isinstance(own, Mapping):
        require(isinstance(saved, dict) and saved.keys() <= own.keys(), place, "a table as this training has it")
        for name in saved:
            check_like(saved[name], own[name], f"{place}.{name}")
    elif isinstance(own, list | tuple):
        require(isinstance(saved, list | tuple) and len(saved) == len(own), place, f"a list of {len(own)}")
        for i, (part, mine) in enumerate(zip(saved, own, strict=True)):
            check_like(part, mine, f"{place}.{i}")
    elif isinstance(own, int | float) and not isinstance(own, bool):
        check_number(saved, place)
    else:
        require(type(saved) is type(own), place, f"a {type(own).__name__}")


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, float) or _is_count(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < LARGEST


def check_optimizer(saved: Any, own: Optimizer, place: str) -> None:
    """Groups with the options of `own`; of torch's own optimizers, tensors of each parameter's shape."""
    check_names(saved, ("state", "param_groups"), place)
    groups = own.state_dict()["param_groups"]
    require(isinstance(saved["param_groups"], list), f"{place}.param_groups", "a list")
    require(len(saved["param_groups"]) == len(groups), f"{place}.param_groups", f"a list of {len(groups)}")
    for i, (group, mine) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        where = f"{place}.param_groups.{i}"
        require(isinstance(group, dict), where, "a table")
        require(group.get("params") == mine["params"], f"{where}.params", "the numbers of the parameters")
        for name in group.keys() & mine.keys():
            check_option(group[name], mine[name], f"{where}.{name}")
        betas = group.get("betas", ())
        require(all(0 <= float(beta) < 1 for beta in betas), f"{where}.betas", "of [0, 1)")
        require("lr" in group or "lr" not in mine, where, "whole: it has no lr")
    check_moments(saved["state"], own, f"{place}.state")


def check_option(saved: Any, own: Any, place: str) -> None:
    """An option of a group: a switch is as it was, a number may be another."""
    if isinstance(saved, bool) and isinstance(own, bool):
        require(saved == own, place, f"{own}, as in this training")
    require(own is not None or isinstance(saved, bool | int | float | None), place, "an option's value")
    check_like(saved, own, place)


def check_moments(saved: Any, own: Optimizer, place: str) -> None:
    """What an optimizer keeps of each parameter, by its number."""
    require(isinstance(saved, dict), place, "a table")
    parameters = [parameter for group in own.param_groups for parameter in group["params"]]
    torchs = type(own).__module__.startswith("torch.optim") and type(own).__name__ not in FACTORED
    for number, kept in saved.items():
        where = f"{place}.{number}"
        if isinstance(number, str):  # an optimizer's own note, of no parameter
            continue
        require(type(number) is int and 0 <= number < len(parameters), where, "of a parameter")
        require(isinstance(kept, dict), where, "a table")
        needed = MOMENTS.get(type(own), set())
        require(not kept or needed <= kept.keys(), where, f"a table of {', '.join(sorted(needed))}")
        for name, value in kept.items() if torchs else ():
            unknown = is_lazy(parameters[number]) or not isinstance(value, Tensor) or value.numel() == 1
            fits = unknown or value.shape == parameters[number].shape
            fits &= not isinstance(value, str | bytes | list | tuple | dict)
            if not fits:  # of a lazy parameter there is no shape to tell
                require(False, f"{where}.{name}", f"of the shape {list(parameters[number].shape)}")
            if name == "step":
                require(_is_scalar(value) and float(value) >= 0, f"{where}.step", "a count")
            present = name not in needed or isinstance(value, Tensor) or (name == "step" and _is_scalar(value))
            require(present, f"{where}.{name}", "there")


def check_plateau(saved: Any, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """What validation reached, with the best weights where they are kept."""
    check_names(saved, ("best_loss", "since_best", "since_annealed", "annealing", "best"), "plateau")
    check_number(saved["best_loss"], "plateau.best_loss")
    check_number(saved["annealing"], "plateau.annealing")
    require(0 < saved["annealing"] <= 1, "plateau.annealing", "a factor")
    for name in ("since_best", "since_annealed"):
        check_count(saved[name], f"plateau.{name}")
    best = saved["best"]
    if best is not None:
        check_names(best, ("model", "criterion", "optimizers", "average"), "plateau.best")
        check_weights(best["model"], model, "plateau.best.model")
        require(isinstance(best["optimizers"], list), "plateau.best.optimizers", "a list")
        count = len(optimizers)
        require(len(best["optimizers"]) == count, "plateau.best.optimizers", f"a list of {count}")
        for i, (kept, own) in enumerate(zip(best["optimizers"], optimizers, strict=True)):
            check_moments(kept, own, f"plateau.best.optimizers.{i}")


def check_average(saved: Any, own: Sequence[Tensor], place: str = "average") -> None:
    """Averaged weights."""
    check_names(saved, ("updates", "weights"), place)
    check_count(saved["updates"], f"{place}.updates")
    require(isinstance(saved["weights"], list), f"{place}.weights", "a list")
    require(len(saved["weights"]) == len(own), f"{place}.weights", f"a list of {len(own)}")
    for i, (weight, mine) in enumerate(zip(saved["weights"], own, strict=True)):
        check_tensor(weight, mine, f"{place}.weights.{i}")


def check_last(saved: Any) -> None:
    """What the last step gave."""
    check_names(saved, ("step", "epoch", "loss", "count", "grad_norm", "learning_rate"), "last")
    check_count(saved["step"], "last.step")
    check_count(saved["epoch"], "last.epoch")
    for name in ("loss", "count", "grad_norm", "learning_rate"):
        require(_is_scalar(saved[name]), f"last.{name}", "a number")


def check_skipped(saved: Any) -> None:
    """Steps that were left out."""
    require(isinstance(saved, list), "skipped", "a list")
    for entry in saved:
        require(isinstance(entry, dict), "skipped", "a list of tables")
        for name in ("epoch", "position", "batches"):
            check_count(entry.get(name), f"skipped.{name}")
