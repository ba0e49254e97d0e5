"""The one object that must survive: everything that a step changes.

Nothing else may change between steps. `state_dict()` holds tensors, numbers, strings, None, lists and dicts only;
`load_state_dict()` puts it back so that the next step is the one that would have followed. Writing it to a disk is
not done here.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fivestep import processes
from fivestep.data.generators import random_state, restore_random_state
from fivestep.data.reader import Reader, build_reader
from fivestep.errors import UsageError, brief, named
from fivestep.loop.average import NO_AVERAGE, Average, NoAverage
from fivestep.loop.batch import to_device, whole, without_first_rows
from fivestep.loop.canonical_names import canonical, load_weights_into, weights_of
from fivestep.loop.clock import Clock
from fivestep.loop.copies import Copies, copied
from fivestep.loop.form import (
    check_average,
    check_clock,
    check_count,
    check_full,
    check_held,
    check_last,
    check_like,
    check_mean,
    check_names,
    check_number,
    check_optimizer,
    check_plateau,
    check_skipped,
    check_weights,
    require,
)
from fivestep.loop.mean import Mean
from fivestep.loop.parallel import Parallel
from fivestep.loop.plateau import Plateau
from fivestep.loop.precision import UNSCALED, LossScale, Unscaled
from fivestep.loop.settings import evaluated_modules, frozen, groups, packed, parameter_names

SAVED = (  # what a saved state consists of
    "model", "optimizers", "schedulers", "criterion", "clock", "position", "carry", "epoch_loss", "logged_loss",
    "data", "plateau", "average", "loss_scale", "last", "told", "skipped", "full", "random", "settings", "held",
    "cut",
)  # fmt: skip


@dataclass(slots=True)
class State:
    """Model, optimizers, schedulers, clock, stream position, carry and running averages of one training.

    `TrainStep` makes it, and takes one back as `state=`, for the same model and optimizers.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[Any] = field(default_factory=list)  # torch's; a pure function has no state
    criterion: nn.Module | None = None  # where it has parameters or buffers of its own
    clock: Clock = field(default_factory=Clock)
    position: int = 0  # micro-batches drawn in the current epoch
    carry: Any = None  # what the next batch needs of the last (hidden state, detached)
    epoch_loss: Mean = field(default_factory=Mean)  # since the epoch's start
    logged_loss: Mean = field(default_factory=Mean)  # since the last training row
    reader: Reader | None = None  # of the data that is being read
    reading_on: dict[str, Any] | None = None  # a loaded state of the reader, until the data is given
    plateau: Plateau = field(default_factory=Plateau)  # what validation reached, and the annealing factor
    average: Average | NoAverage = NO_AVERAGE  # averaged weights
    loss_scale: LossScale | Unscaled = UNSCALED  # of fp16
    last: dict[str, Any] | None = None  # what the last step gave: the fields of its result
    told: Clock | None = None  # when `fit` last made rows: what is due is counted from here
    begun: Clock = field(default_factory=Clock)  # where this process began, or took a saved state; not saved
    before: dict[str, Any] | None = None  # "random", "data": as they were before the step that is being made
    skipped: list[dict[str, Any]] = field(default_factory=list)  # steps left out: epoch (from 0), position, batches
    cuda: bool = field(default_factory=torch.cuda.is_available)
    parallel: Parallel | None = None  # of several processes: how this one's part fits to theirs
    sharers: int = field(default_factory=processes.size)  # processes that made the epoch's steps so far
    full: dict[str, Any] | None = None  # under graph: the form of the first window, and whether a carry followed
    settings: dict[str, Any] | None = None  # what the run was begun with, to compare at a resume
    cut: dict[str, int] | None = (
        None  # epoch, position: rows of that batch that were trained in batches of another size
    )
    latch: Any = None  # under graph: what `confirm` reads
    inside: bool = False  # a step of the loop is being made: from its first pass until all has moved
    updating: bool = False  # from the first changed weight until all has moved: nothing may be saved

    def begin_step(self, batches: int) -> bool:
        """Begin the step of the next so many `batches`. Return whether it was skipped before, and is to be again."""
        self.inside = True
        if not self.skipped:
            return False
        here = (self.clock.epoch, self.position, batches)
        size = (self.settings or {}).get("data.batch_size")
        return any(
            (one["epoch"], one["position"], one["batches"]) == here and one.get("batch_size", size) == size
            for one in self.skipped
        )

    def place(self) -> str:
        """Return the place of the next batch in the data, for an error; empty where the caller draws the batches."""
        return f" at batch {self.position} of epoch {self.clock.epoch + 1}" if self.inside else ""

    def move_past(self, batches: int, result: Any, left_out: dict[str, Any]) -> None:
        """Move means and data position past the step's `batches`; note the figures of a step that was left out."""
        if result is not None:
            self.epoch_loss.add(result.loss, result.count)
            self.logged_loss.add(result.loss, result.count)
        elif left_out:
            here = {"epoch": self.clock.epoch, "position": self.position, "batches": batches}
            size = (self.settings or {}).get("data.batch_size")
            if size is not None:
                here["batch_size"] = size  # the position counts batches of this size
            self.skipped.append({**here, **left_out})
        self.position += batches

    def confirm(self) -> None:
        """Raise NonFiniteError where a step of a graph was not finite and nobody has looked yet. Reads the device."""
        if self.latch is not None:
            self.latch.confirm(self)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights to evaluate, sample and keep: the averaged ones, where there are."""
        self.confirm()
        return self.average.in_place(self.resharded)

    def resharded(self) -> None:
        """The parameters' shards are others now: what was gathered of them is not used again."""
        if self.parallel is not None:
            self.parallel.reshard()

    def keep_best(self) -> None:
        """Remember the weights, and what the optimizers know of them, as the best so far."""
        self.plateau.best = copied(
            {
                "model": weights_of(self.model),
                "criterion": weights_of(self.criterion) if self.criterion is not None else {},
                "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
                "average": self.average.state_dict(),
            }
        )

    def return_to_best(self) -> None:
        """Put back what `keep_best` remembered; learning rates, clock, order and random states go on."""
        best = copied(self.plateau.best)
        if best is not None:
            self.updating = True
            load_weights_into(self.model, best["model"])
            if self.criterion is not None:
                load_weights_into(self.criterion, best["criterion"])
            for optimizer, state in zip(self.optimizers, best["optimizers"], strict=True):
                groups, held = optimizer.state_dict()["param_groups"], optimizer.param_groups
                optimizer.load_state_dict({"state": state, "param_groups": groups})
                optimizer.param_groups = held  # the very same ones: schedules count on their own rates
            self.average.load_state_dict(best["average"])
            self.updating = False

    def reading(self, data: Any) -> Reader:
        """The reader of `data`: the same one while the data is the same object, put where a loaded state was.

        Other data that goes on within an epoch takes over from the data before it; between epochs it begins anew.
        """
        if self.reader is None or self.reader.data is not data:
            if self.reader is not None and self.reading_on is None and self.position > 0:
                self.reading_on = self.reader.state_dict()
            self.reader = build_reader(data)
        if self.reading_on is not None:
            try:
                self.reader.load_state_dict(self.reading_on)
            except UsageError:
                raise
            except Exception as error:  # a user's own loader may raise anything
                raise UsageError(
                    f"the saved place in the data cannot be taken up: {brief(error)}; "
                    "give the data that the training began with"
                ) from error
            self.reading_on = None
        return self.reader

    def parts(self) -> dict[str, Any]:
        """What is saved, but for the random states, as it is: later steps change it. Reads the device."""
        return {
            "model": weights_of(self.model),
            "optimizers": [packed(optimizer, parameter_names(self)) for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "criterion": weights_of(self.criterion) if self.criterion is not None else {},
            "clock": table(self.clock),
            "position": self.position,
            "carry": self.carry,
            "epoch_loss": self.epoch_loss.state_dict(),
            "logged_loss": self.logged_loss.state_dict(),
            "data": self.reader.state_dict() if self.reader and not self.reading_on else self.reading_on,
            "plateau": table(self.plateau),
            "average": self.average.state_dict(),
            "loss_scale": self.loss_scale.state_dict(),
            "last": self.last,
            "told": table(self.told) if self.told else None,
            "skipped": self.skipped,
            "full": self.full,
            "settings": self.settings,
            "held": {
                "groups": groups(self),
                "frozen": frozen(self),
                "eval_modules": evaluated_modules(self.model),
            },
            "cut": self.cut,
        }

    def live(self) -> dict[str, Any]:
        """All that is saved, as it is: later steps change it; in shards where it lies in shards. Reads the device."""
        self.confirm()
        parts = self.parts() if self.parallel is None else self.parallel.joined(self.parts())
        before = {**random_state(), **self.before["random"]} if self.before else random_state()
        data = self.before.get("data", parts["data"]) if self.before else parts["data"]
        return {**parts, "data": data, "random": before}

    def state_dict(self, copies: Copies | None = None) -> dict[str, Any]:
        """A snapshot, gathered, made by `copies` if given: later steps do not change it. Reads the device."""
        live = self.live()
        before = live.pop("random")
        return {**(copies or Copies()).of(live if self.parallel is None else whole(live)), "random": before}

    def layout(self) -> dict[str, Tensor]:
        """Of what lies in shards here, the tensors by their names in a saved state: see `Parallel.layout`."""
        return {} if self.parallel is None else self.parallel.layout(self)

    def before_drawing(self) -> None:
        """Remember what drawing a window uses up, for a training that is broken off before its step is complete."""
        if self.reader is not None:
            self.before = {"random": random_state(), "data": copied(self.reader.state_dict())}

    def before_step(self) -> None:
        """The same of what the model draws, from torch; what one draws from Python or NumPy is not remembered."""
        if self.before is None:
            cuda = {"cuda": torch.cuda.get_rng_state_all()} if self.cuda else {}
            self.before = {"random": {"torch": torch.get_rng_state(), **cuda}}

    def step_is_made(self) -> None:
        """Note that weights, averaged weights, clock, schedulers, data position and means have all moved."""
        self.before, self.inside, self.updating = None, False, False

    def check_whole(self) -> None:
        """Raise UsageError where an error left an update half made: no training can go on from here."""
        if self.updating:
            raise UsageError(
                f"an error broke off the update after step {self.clock.step}, and the weights are in between two "
                "steps. Load a saved state (load_state_dict), or start again: fs.Run resumes from its checkpoint"
            )

    def check(self, saved: dict[str, Any]) -> None:
        """Raise ValueError, and change nothing, where `saved` is no state of this training."""
        known = {name: value for name, value in saved.items() if name != "processes"}  # where there were several
        earlier = dict.fromkeys(("full", "settings", "held", "cut"))  # what earlier versions did not save
        check_names({**earlier, **known}, SAVED, "state")
        check_weights(saved["model"], self.model)
        owners = {"optimizers": self.optimizers, "schedulers": self.schedulers}
        for name, own in owners.items():
            require(isinstance(saved[name], list) and len(saved[name]) == len(own), name, f"a list of {len(own)}")
        for i, optimizer in enumerate(self.optimizers):
            check_optimizer(saved["optimizers"][i], optimizer, f"optimizers.{i}")
        for i, scheduler in enumerate(self.schedulers):
            check_like(saved["schedulers"][i], scheduler.state_dict(), f"schedulers.{i}")
        if self.criterion is not None:
            check_weights(saved["criterion"], self.criterion, "criterion")
        check_clock(saved["clock"], "clock")
        check_count(saved["position"], "position")
        check_mean(saved["epoch_loss"], "epoch_loss")
        check_mean(saved["logged_loss"], "logged_loss")
        require(saved["data"] is None or isinstance(saved["data"], dict), "data", "a table")
        check_plateau(saved["plateau"], self.model, self.optimizers)
        if self.average and saved["average"] is not None:
            check_average(saved["average"], self.average.weights)
            if saved["plateau"]["best"] is not None:
                check_average(saved["plateau"]["best"]["average"], self.average.weights, "plateau.best.average")
        if saved["loss_scale"] is not None:
            check_names(saved["loss_scale"], ("scale", "good_steps"), "loss_scale")
            check_number(saved["loss_scale"]["scale"], "loss_scale.scale")
            check_count(saved["loss_scale"]["good_steps"], "loss_scale.good_steps")
        if saved["last"] is not None:
            check_last(saved["last"])
        if saved["told"] is not None:
            check_clock(saved["told"], "told")
        check_skipped(saved["skipped"])
        check_full(saved.get("full"))
        require(isinstance(saved.get("settings"), dict | None), "settings", "a table")
        if (cut := saved.get("cut")) is not None:
            check_names(cut, ("epoch", "position", "rows"), "cut")
            for name, value in cut.items():
                check_count(value, f"cut.{name}")
        check_names(saved["random"], ("python", "numpy", "torch", "cuda", "mps"), "random")

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a snapshot back, random states included. Raises ValueError for one of another training."""
        with self.regrouped(saved.get("held")):
            self.check(saved)
        self.sharers = len((saved.get("processes") or {}).get("random", [])) or 1
        if self.parallel is not None:
            saved = self.parallel.scattered(saved, self)
        load_weights_into(self.model, saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            own = optimizer.state_dict()["param_groups"]  # of an option that the saving version did not have
            groups = [{**mine, **group} for mine, group in zip(own, state["param_groups"], strict=True)]
            optimizer.load_state_dict(copied({**state, "param_groups": groups}))
        for scheduler, state in zip(self.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(copied(state))
            if saved["clock"]["step"]:  # else torch warns where the end of an epoch is the first thing resumed
                scheduler.optimizer._opt_called = True
        if self.criterion is not None:
            load_weights_into(self.criterion, saved["criterion"])
        for name, value in saved["clock"].items():
            setattr(self.clock, name, value)
        self.told = Clock(**saved["told"]) if saved["told"] else None
        self.begun = replace(self.clock)
        device = next(self.model.parameters()).device
        self.position, self.carry = saved["position"], to_device(copied(saved["carry"]), device)
        self.epoch_loss.load_state_dict(saved["epoch_loss"])
        self.logged_loss.load_state_dict(saved["logged_loss"])
        self.reading_on, self.updating = copied(saved["data"]), False
        self.before, self.inside = None, False
        self.plateau = Plateau(**copied(saved["plateau"]))
        if (not self.average) != (saved["average"] is None):
            raise UsageError(
                "the saved state and this training differ in averaged weights: give the same ema (--ema)"
            )
        self.average.load_state_dict(saved["average"])
        self.skipped, self.full = copied(saved["skipped"]), copied(saved.get("full"))
        if self.loss_scale and saved["loss_scale"] is not None:
            self.loss_scale = LossScale(**saved["loss_scale"])
        self.last = copied(saved["last"])
        self.settings, self.cut = copied(saved.get("settings") or self.settings), copied(saved.get("cut"))
        self.hold(saved.get("held"))
        restore_random_state(saved["random"])

    @contextmanager
    def regrouped(self, held: dict[str, Any] | None) -> Iterator[None]:
        """Give the optimizers the groups that training left, which its body may have extended; undone by an error."""
        if held is None:  # of an earlier version
            yield
            return
        owners = {name: by_id for by_id, name in parameter_names(self).items()}
        check_held(held, owners, len(self.optimizers))
        owned = [self.model] if self.criterion is None else [self.model, self.criterion]
        parameters = {id(p): p for owner in owned for p in owner.parameters()}
        before = [
            (optimizer, list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups])
            for optimizer in self.optimizers
        ]
        try:
            for optimizer, now, names in zip(self.optimizers, groups(self), held["groups"], strict=True):
                if now != names:
                    _regroup(optimizer, [[parameters[owners[name]] for name in group] for group in names])
            yield
        except BaseException:
            for optimizer, kept, params in before:
                optimizer.param_groups[:] = kept
                for group, own in zip(kept, params, strict=True):
                    group["params"] = own
            raise

    def hold(self, held: dict[str, Any] | None) -> None:
        """Put back which parameters train, and which modules are kept in eval(), as training left them."""
        if held is None:
            return
        if set(held["frozen"]) != set(frozen(self)):
            if self.parallel is not None:
                raise UsageError(
                    "the saved training froze or unfroze parameters on the way. Distributed training cannot resume "
                    "that. Set requires_grad before training starts"
                )
            for prefix, owner in (("", self.model), ("criterion.", self.criterion)):
                for name, parameter in owner.named_parameters() if owner is not None else ():
                    parameter.requires_grad_(prefix + canonical(name) not in held["frozen"])
        if held["eval_modules"] is not None and self.model.training:
            for name, module in self.model.named_modules():
                module.training = canonical(name) not in held["eval_modules"]

    def rest_of_epoch(self, reader: Reader) -> Iterator[Any]:
        """Return the batches from the position on, less the rows that were trained in batches of another size."""
        if not (rows := self.rows_cut()):
            return reader.epoch(self.clock.epoch, self.position)
        return without_first_rows(reader.epoch(self.clock.epoch, self.position, begun=True), rows)

    def is_new_epoch(self) -> bool:
        """Return whether no row of the epoch has been trained."""
        return self.position == 0 and not self.rows_cut()

    def rows_cut(self) -> int:
        """Return how many rows of the next batch were trained in batches of another size."""
        cut = self.cut
        if cut is None or (cut["epoch"], cut["position"]) != (self.clock.epoch, self.position):
            return 0
        return cut["rows"]


def _regroup(optimizer: Optimizer, wanted: list[list[nn.Parameter]]) -> None:
    del optimizer.param_groups[len(wanted) :]
    for group, parameters in zip(optimizer.param_groups, wanted, strict=False):
        group["params"] = parameters
    for parameters in wanted[len(optimizer.param_groups) :]:
        optimizer.add_param_group({"params": parameters})


def table(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, as they are."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def state_of(
    given: State | None, model: nn.Module, criterion: Any, optimizers: list[Optimizer], schedulers: list[Any]
) -> State:
    """A new state, or the one given, which must be of these very objects."""
    own = criterion if isinstance(criterion, nn.Module) and criterion.state_dict() else None
    if given is None:
        return State(model, optimizers, schedulers, own)
    if not isinstance(given, State):
        raise UsageError(f"state is {named(given)}; it must be a fivestep.State, such as a StepResult's")
    held = [given.model, given.criterion, *given.optimizers, *given.schedulers]
    wanted = [model, own, *optimizers, *schedulers]
    given.inside = False  # a step of another loop that an error broke off
    if len(held) != len(wanted) or any(old is not new for old, new in zip(held, wanted, strict=True)):
        raise UsageError(
            "state= belongs to another model, criterion, optimizer or scheduler: "
            "take TrainStep(...).state of these, and its load_state_dict"
        )
    return given
