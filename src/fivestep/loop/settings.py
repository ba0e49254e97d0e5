"""What a training was begun with, and what a resume does where the script now says something else.

    settings_of(step, data, ...)   -> {"optimizers.0.0.lr": 0.1, "data.batch_size": 8, ...}, saved with the state
    changes(saved, own)            -> the settings that differ: name, old value, new value
    adopt(state, saved, changes)   -> `saved` made to fit the new settings; the place in the data is kept in rows

Only what the script constructs is compared: that of the first start with that of the resume. A learning rate that a
scheduler or the loop's body moved meanwhile is no changed setting. Runs only where a run begins or resumes.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from fivestep.data.description import described, sample_digest
from fivestep.errors import UsageError
from fivestep.loop.canonical_names import canonical, weights_of
from fivestep.loop.clock import Clock
from fivestep.loop.lean import plain_step

PROBED = (0, *(2**power for power in range(17)))  # completed updates at which two schedules are compared
MOVING = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "base_lrs", "verbose"}
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # options of a group that a scheduler sets
Settings = dict[str, Any]


class Change(NamedTuple):
    """A setting that differs from the saved one."""

    name: str
    old: Any
    new: Any

    @property
    def shown(self) -> str:
        """The name for a person: `lr`, or `lr of group 1`."""
        if not self.name.startswith("optimizers."):
            return self.name.removeprefix("data.")
        _, *place, name = self.name.split(".", 3)
        numbers = zip(("optimizer", "group"), place, strict=False)
        where = "".join(f" of {what} {number}" for what, number in reversed(list(numbers)) if number != "0")
        return ("optimizer" if name == "class" else name) + where

    def __str__(self) -> str:
        return f"{self.shown} ({_short(self.old)} -> {_short(self.new)})"


def with_settings(step: Any, data: Any, accumulate: int, **others: Any) -> Any:
    """Return the state of `step` with its settings, where it has none yet."""
    step.state.settings = step.state.settings or settings_of(step, data, accumulate, **others)
    return step.state


def settings_of(step: Any, data: Any, accumulate: int, **others: Any) -> Settings:
    """Describe what `step` (a TrainStep) and `data` were constructed with, before any state is loaded into them."""
    average, trigger = step.state.average, step.learning_rate.trigger
    found: Settings = {
        "clip_norm": step.clip_norm,
        "clip_value": step.clip_value,
        "precision": str(getattr(step.autocast, "fast_dtype", "torch.float32")).removeprefix("torch."),
        "ema": average.decay,
        "on_nonfinite": step.on_nonfinite,
        "scheduler_every": [trigger.every, trigger.unit],
        "accumulate": accumulate,
        **others,
    }
    criterion = step.criterion
    if isinstance(criterion, nn.Module) and type(criterion).__module__.startswith("torch.nn"):
        found["criterion"] = _kind(criterion)
        plain = _plain(vars(criterion))
        found |= {f"criterion.{name}": value for name, value in plain if not name.startswith(("_", "training"))}
        for name in ("weight", "pos_weight"):
            if hasattr(criterion, name):
                found[f"criterion.{name}"] = sample_digest([getattr(criterion, name)])
    names = parameter_names(step.state)
    found["frozen"] = frozen(step.state)
    if (evaluated := evaluated_modules(step.model)) is not None:
        found["eval_modules"] = evaluated
    found["optimizers"] = len(step.optimizers)
    for i, optimizer in enumerate(step.optimizers):
        found[f"optimizers.{i}.class"] = _kind(optimizer)
        found[f"optimizers.{i}.groups"] = len(optimizer.param_groups)
        for j, group in enumerate(optimizer.param_groups):
            found[f"optimizers.{i}.{j}.parameters"] = [names[id(parameter)] for parameter in group["params"]]
            options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
            options["lr"] = group.get("initial_lr", group.get("lr"))
            found |= {f"optimizers.{i}.{j}.{name}": value for name, value in _plain(options)}
    found |= _scheduler(step.learning_rate)
    return found | {f"data.{name}": value for name, value in described(data).items()}


def parameter_names(state: Any) -> dict[int, str]:
    """Name each parameter by its id, as the model does; those of a criterion follow."""
    owners = [("", state.model), *([("criterion.", state.criterion)] if state.criterion is not None else [])]
    found: dict[int, str] = {}
    for prefix, owner in owners:
        for name, parameter in owner.named_parameters():
            found.setdefault(id(parameter), prefix + canonical(name))
    return found


def frozen(state: Any) -> list[str]:
    """Name the parameters that do not train."""
    owners = [("", state.model), *([("criterion.", state.criterion)] if state.criterion is not None else [])]
    return [
        prefix + canonical(n) for prefix, owner in owners for n, p in owner.named_parameters() if not p.requires_grad
    ]


def evaluated_modules(model: nn.Module) -> list[str] | None:
    """Name the modules that are kept in eval() while `model` trains; None where the whole model is in eval()."""
    if not model.training:
        return None
    return list(dict.fromkeys(canonical(n) for n, module in model.named_modules() if not module.training))


def groups(state: Any) -> list[list[list[str]]]:
    """Name the parameters of each group of each optimizer."""
    names = parameter_names(state)
    return [
        [[names[id(p)] for p in group["params"] if id(p) in names] for group in optimizer.param_groups]
        for optimizer in state.optimizers
    ]


def packed(optimizer: Any, names: Mapping[int, str]) -> dict[str, Any]:
    """Return `optimizer.state_dict()` without parameters that left its groups, or that the model has lost."""
    kept = [[p for p in group["params"] if id(p) in names] for group in optimizer.param_groups]
    known = {id(p) for group in kept for p in group}
    left = [p for p in optimizer.state if isinstance(p, Tensor) and id(p) not in known]
    if not left and all(len(a) == len(g["params"]) for a, g in zip(kept, optimizer.param_groups, strict=True)):
        return optimizer.state_dict()  # type: ignore[no-any-return]
    plain = copy(optimizer)
    plain.state = {p: value for p, value in optimizer.state.items() if not isinstance(p, Tensor) or id(p) in known}
    plain.param_groups = [{**g, "params": a} for g, a in zip(optimizer.param_groups, kept, strict=True)]
    return plain.state_dict()  # type: ignore[no-any-return]


def _scheduler(rate: Any) -> Settings:
    if rate.factor is not None:
        found: Settings = {"scheduler": _kind(rate.factor)}
        if isinstance(rate.factor, partial):
            found["scheduler"] = _kind(rate.factor.func)
            found |= {f"scheduler.{name}": value for name, value in _plain(rate.factor.keywords)}
        return found | {"scheduler.factors": [_probed(rate.factor, n) for n in PROBED]}
    found = {"scheduler": [_kind(one) for one in rate.schedulers] or None}
    for i, one in enumerate(rate.schedulers):
        place = f"scheduler.{i}" if len(rate.schedulers) > 1 else "scheduler"
        found |= {f"{place}.{name}": value for name, value in _plain(one.state_dict())}
        found |= _functions(one, place)
    return found


def _functions(scheduler: Any, place: str) -> Settings:
    """Describe a torch scheduler's functions, which its state does not hold, by their values; those inside it too."""
    functions = [*getattr(scheduler, "lr_lambdas", ()), getattr(scheduler, "scale_fn", None)]
    found: Settings = {
        f"{place}.factors.{j}": [_probed(function, n) for n in PROBED]
        for j, function in enumerate(functions)
        if function
    }
    for j, inner in enumerate(getattr(scheduler, "_schedulers", ())):
        found |= _functions(inner, f"{place}.inner.{j}")
    return found


def _probed(function: Any, n: int) -> float | None:
    try:
        return float(function(n))
    except Exception:  # a user's function need not know a step that it never reaches
        return None


def _plain(table: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """The values of a table that can be compared and saved, those inside other tables too, by dotted names."""
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        if name in MOVING:
            continue
        if isinstance(value, Tensor):
            value = value.item() if value.numel() == 1 else None
        if isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found += [(f"{name}.{inner}", one) for inner, one in _plain(value)]
        elif isinstance(value, list | tuple) and all(isinstance(one, bool | int | float | str) for one in value):
            found.append((str(name), list(value)))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append((str(name), value))
    return found


def _kind(thing: Any) -> str | None:
    if thing is None:
        return None
    return getattr(thing, "__qualname__", type(thing).__name__)


def changes(saved: Settings, own: Settings) -> list[Change]:
    """List the settings that both know and that differ. What one version does not record is not compared."""
    found = [
        Change(name, saved[name], own[name])
        for name in saved.keys() & own.keys()
        if repr(saved[name]) != repr(own[name])
    ]
    for name in saved.keys() ^ own.keys():  # a milestone, or an inner scheduler, that the other has not
        if (
            name.startswith("scheduler.")
            and saved.get("scheduler") == own.get("scheduler")
            and saved.get("scheduler")
        ):
            found.append(Change(name, saved.get(name), own.get(name)))
    order = [*own, *saved]
    return sorted(found, key=lambda change: order.index(change.name))


def listed(found: Sequence[Change]) -> str:
    """Write changes out for a person, without those that follow from another one that is listed."""
    names = {change.name for change in found}
    told = {name for name in names if name.startswith("scheduler") and ".factors" not in name}
    beside = {name for name in names if ".factors" in name} if told else set()
    beside |= {"data.batches"} if names & {"data.batch_size", "data.rows"} else set()
    return ", ".join(str(change) for change in found if change.name not in beside)


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    text = ", ".join(map(str, value[:3])) + (f", ... {len(value)} in all" if len(value) > 3 else "")
    return text or "none"


def is_of_model(saved: dict[str, Any], model: nn.Module) -> bool:
    """Return whether the saved weights have the names that `model` has."""
    both = [{canonical(name) for name in weights} for weights in (saved["model"], model.state_dict())]
    return both[0] == both[1]


def changes_of_options(state: Any, saved: dict[str, Any]) -> list[Change]:
    """List the optimizer options that differ from a state of an earlier version, which has no settings.

    Options that a scheduler sets are left out: such a state does not say what they were at the start.
    """
    found: Settings = {}
    for i, optimizer in enumerate(saved["optimizers"]):
        for j, group in enumerate(optimizer["param_groups"]):
            scheduled = "initial_lr" in group
            options = {n: v for n, v in group.items() if n != "params" and not (scheduled and n in RATES)}
            found |= {f"optimizers.{i}.{j}.{name}": value for name, value in _plain(options)}
    return changes(found, state.settings or {})


def refusal(run: Any, found: Sequence[Change]) -> str:
    """Say what differs, and how to wish it."""
    return (
        f"{run} started with other settings: {listed(found)}. Put the old values back, or continue with the new "
        "ones: fs.Run(..., adopt_changes=True) (--adopt-changes)"
    )


# --- adopting ---


def adopt(state: Any, saved: dict[str, Any], found: Sequence[Change]) -> None:
    """Change `saved`, a state of a training that `found` tells apart from this one, so that `state` loads it.

    Raises UsageError where the place within an epoch cannot be kept.
    """
    names = {change.name: change for change in found}
    if saved.get("settings") is None:  # of an earlier version
        for change in found:
            _, i, j, name = change.name.split(".", 3)
            group, own = (
                each["param_groups"][int(j)]
                for each in (saved["optimizers"][int(i)], state.optimizers[int(i)].state_dict())
            )
            group[name] = own[name]
        return
    rescheduled = any(name.split(".")[0] in ("scheduler", "scheduler_every") for name in names)
    regrouped = any(
        name.startswith("optimizers") and name.endswith(("groups", "parameters", "optimizers")) for name in names
    )
    cyclic = any(isinstance(one, OneCycleLR | CyclicLR) for one in state.schedulers)
    rescheduled |= bool(state.schedulers) and regrouped
    rescheduled |= cyclic and any(name.startswith("optimizers.") and name.endswith(RATES) for name in names)
    if rescheduled:
        _advance(state, Clock(**saved["clock"]))
    _adopt_optimizers(state, saved, names, rescheduled)
    if rescheduled:
        saved["schedulers"] = [scheduler.state_dict() for scheduler in state.schedulers]
    else:
        _adopt_rates(state, saved, names)
    if any(name.split(".")[0] == "criterion" for name in names):
        saved["criterion"] = weights_of(state.criterion) if state.criterion is not None else {}
    for name in ("frozen", "eval_modules"):
        if name in names:
            saved["held"][name] = names[name].new
    if (not state.average) != (saved["average"] is None):
        saved["average"] = state.average.state_dict()
        if saved["plateau"]["best"] is not None:
            saved["plateau"]["best"]["average"] = saved["average"]
    if any(name.startswith("data.") for name in names):
        saved["full"] = None
        _adopt_place(saved, state.settings)
    saved["settings"] = state.settings


def _advance(state: Any, clock: Clock) -> None:
    """Step this training's torch schedulers as often as they would have been from the beginning."""
    every, unit = state.settings["scheduler_every"]
    times = int(getattr(clock, unit) // every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a scheduler that is stepped before its optimizer
        for _ in range(times):
            for scheduler in state.schedulers:
                scheduler.step()


def _adopt_optimizers(state: Any, saved: dict[str, Any], names: Mapping[str, Change], rescheduled: bool) -> None:
    """Carry over what is known of each parameter, by its name; options that were changed are this training's."""
    old, now = saved["held"]["groups"], groups(state)
    best = saved["plateau"]["best"]
    if "optimizers" in names:  # another number of them
        _adopt_number(state, saved, now)
        return
    for i, optimizer in enumerate(state.optimizers):
        own = optimizer.state_dict()
        other = f"optimizers.{i}.class" in names or i >= len(saved["optimizers"])
        theirs = {"state": {}, "param_groups": []} if other else saved["optimizers"][i]
        regrouped = any(
            name.startswith(f"optimizers.{i}.") and name.endswith(("parameters", "groups")) for name in names
        )
        where = old[i] if not other else []
        kept = {} if other else theirs["state"]
        if regrouped and not other:
            kept = _by_name(kept, where, now[i])
            if best is not None:
                best["optimizers"][i] = _by_name(best["optimizers"][i], where, now[i])
        if other and best is not None:
            best["optimizers"][i : i + 1] = [{}]
        made = []
        for j, group in enumerate(own["param_groups"]):
            # A group goes on with the options of the group that held its first parameters.
            before = [k for k, held in enumerate(where) if not regrouped or set(held) & set(now[i][j])]
            k = j if not regrouped and j < len(where) else next(iter(before), None)
            options = dict(theirs["param_groups"][k]) if k is not None else {}
            mine = [name for name in group if f"optimizers.{i}.{j}.{name}" in names]
            mine += [name for name in RATES if rescheduled and name in group]
            if rescheduled and any(isinstance(one, OneCycleLR | CyclicLR) for one in state.schedulers):
                mine += ["momentum", "betas"]
            forced = {name: group[name] for name in mine if name in group}
            if rescheduled and "initial_lr" not in group:
                options.pop("initial_lr", None)
            made.append({**group, **options, **forced, "params": group["params"]})
        if any(name.startswith(f"optimizers.{i}.") for name in names) and not other:
            kept = _completed(kept, optimizer, made)
        if not regrouped and not other:  # groups that the training itself added stay
            made += [dict(group) for group in theirs["param_groups"][len(made) :]]
            now[i] += where[len(now[i]) :]
        saved["optimizers"][i : i + 1] = [{**own, "state": kept, "param_groups": made}]
    del saved["optimizers"][len(state.optimizers) :]
    if best is not None:
        del best["optimizers"][len(state.optimizers) :]
    saved["held"]["groups"] = now


def _adopt_number(state: Any, saved: dict[str, Any], now: list[list[list[str]]]) -> None:
    """Give each optimizer what those of its class knew of its parameters; its options are this training's."""
    old, kinds = saved["held"]["groups"], [_kind(optimizer) for optimizer in state.optimizers]

    def carried(states: Sequence[Mapping[int, Any]]) -> list[dict[int, Any]]:
        known = {
            (saved["settings"][f"optimizers.{i}.class"], name): kept[n]
            for i, kept in enumerate(states)
            for n, name in enumerate(name for group in old[i] for name in group)
            if n in kept
        }
        own = [enumerate(name for group in one for name in group) for one in now]
        return [
            {n: known[kind, name] for n, name in pairs if (kind, name) in known}
            for kind, pairs in zip(kinds, own, strict=True)
        ]

    states = carried([one["state"] for one in saved["optimizers"]])
    saved["optimizers"] = [
        {**optimizer.state_dict(), "state": kept} for optimizer, kept in zip(state.optimizers, states, strict=True)
    ]
    if (best := saved["plateau"]["best"]) is not None:
        best["optimizers"] = carried(best["optimizers"])
    saved["held"]["groups"] = now


def _completed(kept: Mapping[Any, Any], optimizer: Any, made: Sequence[dict[str, Any]]) -> dict[Any, Any]:
    """Add to what is known of each parameter what new options need, such as amsgrad's maxima, as it begins: zeros."""
    found = dict(kept)
    if not type(optimizer).__module__.startswith("torch.optim"):
        return found
    for group, own in zip(made, optimizer.param_groups, strict=True):
        for number, parameter in zip(group["params"], own["params"], strict=True):
            if found.get(number):
                stand_in = nn.Parameter(torch.zeros_like(parameter))
                stand_in.grad = torch.zeros_like(stand_in)
                private = copy(optimizer)
                private.state, private.param_groups = defaultdict(dict), [{**group, "params": [stand_in]}]
                with torch.no_grad():
                    plain_step(type(optimizer))(private)
                found[number] = {**private.state[stand_in], **found[number]}
    return found


def _by_name(kept: Mapping[int, Any], old: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> dict[int, Any]:
    numbers = {name: number for number, name in enumerate(name for group in old for name in group)}
    names = [name for group in now for name in group]
    return {n: kept[numbers[name]] for n, name in enumerate(names) if numbers.get(name, -1) in kept}


def _adopt_rates(state: Any, saved: dict[str, Any], names: Mapping[str, Change]) -> None:
    """Move the rate where the schedule stands by the ratio of the new base rate to the old one."""
    for i, optimizer in enumerate(state.optimizers):
        own = optimizer.state_dict()["param_groups"]
        for j, group in enumerate(saved["optimizers"][i]["param_groups"][: len(own)]):
            change = names.get(f"optimizers.{i}.{j}.lr")
            if change is None or "initial_lr" not in own[j]:
                continue
            group["initial_lr"] = own[j]["initial_lr"]
            for scheduler, theirs in zip(state.schedulers, saved["schedulers"], strict=True):
                if scheduler.optimizer is optimizer:
                    ratio = change.new / change.old if change.old else 0.0
                    base = getattr(scheduler, "base_lrs", None)
                    _rescale(theirs, j, ratio, base)
                    if "_last_lr" in theirs and j < len(theirs["_last_lr"]):
                        group["lr"] = theirs["_last_lr"][j]


def _rescale(state: Any, j: int, ratio: float, base: Any) -> None:
    """Scale what a scheduler's state, and those inside it, say of the rates of group `j`."""
    if isinstance(state, list | tuple):
        for one in state:
            _rescale(one, j, ratio, base)
    elif isinstance(state, dict):
        for name, value in state.items():
            if name in ("_last_lr", "base_lrs") and j < len(value):
                state[name] = [rate * ratio if at == j else rate for at, rate in enumerate(value)]
                if name == "base_lrs" and base is not None and j < len(base):
                    state[name][j] = base[j]
            else:
                _rescale(value, j, ratio, base)


def _adopt_place(saved: dict[str, Any], own: Settings) -> None:
    """Say the place in the epoch in batches of the new size, and how many rows of the next batch were trained."""
    position, epoch, was = saved["position"], saved["clock"]["epoch"], saved["settings"]
    old, new = was.get("data.batch_size"), own.get("data.batch_size")
    if not position or old == new:
        return
    if not (was.get("data.by_rows") and own.get("data.by_rows")):
        raise UsageError(
            f"batch_size changes from {old} to {new} after batch {position} of epoch {epoch + 1}, and the order of "
            "this data depends on the batch size: finish the epoch with the old batch size, then change it"
        )
    if position == was.get("data.batches"):  # the epoch is complete
        saved["position"] = own["data.batches"]
        return
    cut = saved.get("cut") or {}
    rows = position * old
    if (cut.get("epoch"), cut.get("position")) == (epoch, position):
        rows += cut["rows"]
    saved["position"], rest = divmod(rows, new)
    saved["cut"] = {"epoch": epoch, "position": saved["position"], "rows": rest}
