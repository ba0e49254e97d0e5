"""Metrics: several figures of one, what is averaged over what, and what is refused before the first step."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs


def rows(n=40, classes=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, generator=generator), torch.randint(0, classes, (n,), generator=generator)


def loader(batch_size=16, **options):
    return DataLoader(TensorDataset(*rows()), batch_size=batch_size, **options)


def fitted(metrics, val=None, criterion=None, **options):
    torch.manual_seed(0)
    model, steps = nn.Linear(5, 3), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watchers = [lambda result, rows: steps.append(result.step)]
    try:
        history = fs.fit(
            model, loader(), criterion or nn.CrossEntropyLoss(), optimizer, epochs=2, progress=False,
            val=loader() if val is None else val, metrics=metrics, watchers=watchers, **options,
        )  # fmt: skip
    except fs.UsageError:
        assert not steps, "refused before the first step"
        raise
    return model, history


def right(outputs, labels):
    return (outputs.argmax(1) == labels).float()


@pytest.mark.parametrize(
    "metric",
    [
        lambda outputs, labels: {"right": right(outputs, labels), "wrong": 1 - right(outputs, labels).mean()},
        lambda outputs, labels: {"right": right(outputs, labels).mean().item(), "wrong": 1 - right(outputs, labels)},
    ],
    ids=["items and a mean", "a number and items"],
)
def test_a_function_may_return_several_figures(metric):
    model, history = fitted({"share": metric})
    features, labels = rows()
    by_hand = float(right(model(features), labels).mean())
    assert history[-1]["share.right"] == pytest.approx(by_hand)
    assert history[-1]["share.wrong"] == pytest.approx(1 - by_hand)


def test_a_collection_gives_a_figure_each():
    torchmetrics = pytest.importorskip("torchmetrics")
    kinds = {
        "acc": torchmetrics.classification.MulticlassAccuracy(3, average="micro"),
        "f1": torchmetrics.classification.MulticlassF1Score(3),
    }
    model, history = fitted({"all": torchmetrics.MetricCollection(kinds)})
    features, labels = rows()
    assert history[-1]["all.acc"] == pytest.approx(float(right(model(features), labels).mean()))
    assert history[-1]["all.f1"] == pytest.approx(float(kinds["f1"](model(features), labels)))


def test_the_mean_of_a_batch_counts_by_what_is_not_ignored():
    """Sequences of different lengths: each target is an item, as in the loss."""
    model = nn.Embedding.from_pretrained(torch.eye(7)[[0, 1, 3, 2, 4, 5, 6]])  # wrong on 2 and 3
    ids = torch.arange(12).remainder(7).view(3, 4)
    targets = ids.clone()
    targets[1, 2:] = -100
    batches = [(ids[:1], targets[:1]), (ids[1:], targets[1:])]

    def share(outputs, labels):
        hits = outputs.argmax(-1 if outputs.ndim == 2 else 1) == labels
        return hits.float().mean()

    class Swapped(nn.Module):
        def forward(self, x):
            return model(x).movedim(-1, 1)

    kept = targets != -100
    by_hand = (model(ids).argmax(-1) == targets)[kept].float().mean()
    figures = fs.evaluate(Swapped(), batches, nn.CrossEntropyLoss(), metrics={"share": share})
    assert figures["share"] == pytest.approx(float(by_hand))


class Counting:
    """An objective of one's own with as many methods as a test wants."""

    def count(self, batch):
        return len(batch[1])

    def loss(self, model, batch, carry):
        return nn.functional.cross_entropy(model(batch[0]), batch[1]), None


class WithForward(Counting):
    def forward(self, model, batch, carry):
        return model(batch[0]), batch[1], None


class WithCompare(Counting):
    def compare(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)


class WithBoth(WithForward, WithCompare):
    pass


@pytest.mark.parametrize(
    ("objective", "lacking"), [(Counting(), "no forward and no compare"), (WithForward(), "no compare"),
                               (WithCompare(), "no forward")]
)  # fmt: skip
def test_what_an_objective_lacks_is_named_before_the_first_step(objective, lacking):
    with pytest.raises(fs.UsageError, match=lacking):
        fitted({"accuracy": fs.accuracy}, criterion=objective)


def test_an_objective_with_both_has_metrics():
    model, history = fitted({"accuracy": fs.accuracy}, criterion=WithBoth())
    features, labels = rows()
    assert history[-1]["accuracy"] == pytest.approx(float(right(model(features), labels).mean()))


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (lambda outputs: 0.0, "the metric 'mine' fails on outputs"),
        (lambda outputs, labels: outputs @ labels, "the metric 'mine' fails on outputs"),
        (lambda outputs, labels: "good", "the metric 'mine' returned"),
        (lambda outputs, labels: {"a": None}, "the metric 'mine.a' returned"),
        (lambda outputs, labels: torch.ones(3), r"the metric 'mine' returned a tensor \[3\] for a batch of 16 items"),
        (0.5, "the metric 'mine' is"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_the_first_step(metric, sentence):
    with pytest.raises(fs.UsageError, match=sentence):
        fitted({"mine": metric})


def test_a_metric_with_a_figure_for_each_class_is_refused_before_the_first_step():
    torchmetrics = pytest.importorskip("torchmetrics")
    kind = torchmetrics.classification.MulticlassAccuracy(3, average=None)
    with pytest.raises(fs.UsageError, match="computes 3 numbers; it must be one"):
        fitted({"mine": kind})


@pytest.mark.parametrize("val", [5, "validation.csv", {"features": 1}, rows])
def test_a_val_of_a_wrong_kind_is_refused_before_the_first_step(val):
    with pytest.raises(fs.UsageError, match="val is .*; it must be a DataLoader"):
        fitted(None, val=val)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_trial_leaves_no_trace(workers):
    """Weights, random states and the order in which a loader shuffles are those of a training without metrics."""
    ends = []
    for metrics in (None, {"accuracy": fs.accuracy}):
        generator = torch.Generator().manual_seed(3)
        val = loader(shuffle=True, generator=generator, num_workers=workers)
        model, history = fitted(metrics, val=val)
        ends.append((model.weight, generator.get_state(), torch.get_rng_state()))
        assert history[-1]["loss"] == pytest.approx(fs.evaluate(model, loader(), nn.CrossEntropyLoss())["loss"])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_what_keeps_a_state_is_reset_after_the_trial():
    class Sum:
        def __init__(self):
            self.reset()

        def reset(self):
            self.seen = 0

        def update(self, outputs, labels):
            self.seen += len(labels)

        def compute(self):
            return self.seen

    _, history = fitted({"seen": Sum()})
    assert [row["seen"] for row in history if row["split"] == "val"] == [40, 40]


@pytest.mark.parametrize(
    ("criterion", "targets", "sentence"),
    [
        (nn.BCEWithLogitsLoss(), torch.ones(4, 1, dtype=torch.int64), r"needs targets of floats.*labels\.float\(\)"),
        (nn.BCEWithLogitsLoss(), torch.ones(4, 1, dtype=torch.bool), r"needs targets of floats.*labels\.float\(\)"),
        (nn.HuberLoss(), torch.ones(4, 1, dtype=torch.int32), r"needs targets of floats.*labels\.float\(\)"),
        (nn.functional.binary_cross_entropy_with_logits, torch.ones(4, 1).long(), r"labels\.float\(\)"),
        (nn.BCEWithLogitsLoss(), torch.ones(4).long(), r"labels\.float\(\)\.unsqueeze\(1\)"),
        (nn.MSELoss(), torch.ones(4, 1, 1), r"\[4, 1\] with targets \[4, 1, 1\].*labels\.squeeze\(2\)"),
        (nn.MSELoss(), torch.ones(2, 2), r"with targets \[2, 2\]; give both the same shape$"),
        (nn.CrossEntropyLoss(), torch.zeros(4), r"needs class indices of int64.*|with targets"),
        (nn.CrossEntropyLoss(), torch.zeros(4, dtype=torch.int32), r"needs class indices of int64.*labels\.long\(\)"),
    ],
)
def test_targets_of_another_kind_are_named(criterion, targets, sentence):
    model = nn.Linear(3, 1)
    five = fs.TrainStep(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(fs.UsageError, match=sentence):
        five((torch.randn(4, 3), targets))


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss()])
def test_integers_that_torch_takes_are_taken(criterion):
    weights = []
    for targets in (torch.ones(4, 1, dtype=torch.int64), torch.ones(4, 1)):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        fs.TrainStep(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1))((torch.ones(4, 3), targets))
        weights.append(model.weight)
    assert torch.equal(*weights)


class Counted:
    """A metric with a state, whose `compute` does what it is made with."""

    def __init__(self, compute):
        self.compute = compute

    def reset(self): ...
    def update(self, outputs, labels): ...


def raising(*_):
    return 1 / 0


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (raising, "fails on outputs"),
        (lambda outputs, labels: 10**400, "returned 1000"),
        (Counted(raising), "fails in compute"),
        (Counted(lambda: None), "is None"),
        (Counted(lambda: "good"), "is 'good'"),
        (Counted(lambda: {"a": {"b": 1.0}}), "is a dict"),
        (Counted, "is the class Counted"),
    ],
)
def test_what_a_metric_raises_or_computes_wrongly_names_the_metric(metric, said):
    with pytest.raises(fs.UsageError, match=f"the metric 'mine.*{said}"):
        fitted({"mine": metric})


@pytest.mark.parametrize("name", [3, None, True, (1, 2)])
def test_the_name_of_a_metric_is_a_text(name):
    with pytest.raises(fs.UsageError, match="a name must be a text"):
        fitted({name: right})


class Own:
    def count(self, batch):
        return len(batch[1])

    def loss(self, model, batch, carry):
        return nn.functional.cross_entropy(model(batch[0]), batch[1]), None


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"step": 1}, "named 'step'"),
        ({"loss": 1.0}, "named 'loss'"),
        ({3: 1.0}, "named 3"),
        ({"a": torch.ones(2)}, r"'a' .* is a tensor \[2\]"),
        ({"a": "good"}, "is 'good'"),
        (None, "returned None"),
    ],
)
def test_figures_that_no_row_can_hold_are_refused_before_the_first_step(figures, said):
    objective = Own()
    objective.figures = lambda loss: figures
    with pytest.raises(fs.UsageError, match=said):
        fitted(None, criterion=objective)
    with pytest.raises(fs.UsageError, match=said):
        fs.evaluate(nn.Linear(5, 3), loader(), objective)


def test_figures_of_one_element_become_numbers():
    objective, seen = Own(), []
    objective.figures = lambda loss: {"a": torch.tensor([loss]), "b": right(torch.eye(3), torch.arange(3)).numpy()[0]}
    _, history = fitted(None, criterion=objective)
    seen = [(type(row["a"]), type(row["b"])) for row in history]
    assert set(seen) == {(float, float)}


def test_figures_that_need_what_a_loss_leaves_behind_are_not_refused():
    objective, losses = Own(), []
    plain = objective.loss
    objective.loss = lambda *given: losses.append(1) or plain(*given)
    objective.figures = lambda loss: {"a": 1 / len(losses)}
    assert fitted(None, criterion=objective)[1][-1]["a"] > 0


def test_the_objective_that_judges_and_its_forward_are_checked_before_the_first_step():
    objective = Own()
    objective.in_evaluation = lambda: None
    with pytest.raises(fs.UsageError, match=r"in_evaluation\(\) returned None"):
        fitted(None, criterion=objective)
    objective = Own()
    objective.forward, objective.compare = (
        lambda model, batch, carry: (model(batch[0]), batch[1]),
        nn.CrossEntropyLoss(),
    )
    with pytest.raises(fs.UsageError, match="returned 2 values; it must return 3: outputs, targets, the carry"):
        fitted({"right": right}, criterion=objective)
