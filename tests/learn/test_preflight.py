"""Each planted fault is found by one check, and by no other; healthy jobs and the recipes pass."""

import json
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fivestep.data.windows import CoveringWindows, Windows
from fivestep.learn import preflight_data, preflight_learning
from fivestep.learn.preflight import CHECKS, checked, run_check
from fivestep.learn.preflight_job import examined_objects
from fivestep.learn.preflight_learning import Trial
from fivestep.loop.language import NextToken
from fivestep.loop.schedule import constant, warmup_linear
from fivestep.run.config import recipes
from tests.run.cli import fivestep  # noqa: F401

VOCABULARY = 29


class Classifier(nn.Module):
    """Eight features, three classes; a subclass plants what is wrong."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.hidden, self.drop, self.out = nn.Linear(8, 32), nn.Dropout(dropout), nn.Linear(32, 3)

    def forward(self, x):
        return self.out(self.drop(torch.relu(self.hidden(x))))


class Reader(nn.Module):
    """A small language model."""

    def __init__(self):
        super().__init__()
        self.table, self.gru = nn.Embedding(VOCABULARY, 16), nn.GRU(16, 32, batch_first=True)
        self.out = nn.Linear(32, VOCABULARY)

    def forward(self, xb):
        return self.out(self.gru(self.table(xb))[0])


def rows(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return x, (x[:, :3] + 0.1 * torch.randn(n, 3, generator=generator)).argmax(1)


def loader(x, y, shuffle=True):
    return DataLoader(TensorDataset(x, y), batch_size=25, shuffle=shuffle)


def classes(model=None, train=None, criterion=None, lr=1e-2, val=None, optimizer=torch.optim.Adam, **rest):
    model = model or Classifier()
    train, val = train or loader(*rows()), val or loader(*rows(100, seed=1))
    own = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    return examined_objects("a job", model, train, criterion or nn.CrossEntropyLoss(), own, val, **rest)


def windows(shift=1, first=0):
    random, ids = np.random.default_rng(0), [0]
    for step in random.integers(0, 4, 4000):
        ids.append((ids[-1] * 5 + int(step)) % VOCABULARY)
    ids = torch.tensor(ids)
    starts = torch.arange(first, first + 1900, 12).split(8)

    def cut(some, by):
        return torch.stack([ids[i + by : i + by + 12] for i in some])

    return [(cut(some, 0), cut(some, shift)) for some in starts]


def language(model=None, shift=1, criterion=None):
    model = model or Reader()
    own = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return examined_objects("a reader", model, windows(shift), criterion or NextToken(), own, windows(shift, 2000))


def found(job):
    return {one.name: one.finding for one in checked(job)}


def failures(job):
    return {name: finding for name, finding in found(job).items() if finding.verdict == "failed"}


@pytest.fixture
def known_rate(monkeypatch):
    """The machine's rate is measured once a job, which takes longer than most of the checks together."""
    monkeypatch.setattr(preflight_data, "matmul_rate", lambda device, precision: 5e10)


# --- the faults ---


def sure():
    model = Classifier()
    with torch.no_grad():
        model.out.bias[0] = 8.0
    return classes(model)


def mixed_up():
    x, y = rows()
    return classes(train=loader(x, y[torch.randperm(len(y))]))


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(1, 1)

    def forward(self, x):
        return self.out(x[:, :1])


def bottleneck():
    x = rows()[0]
    model, data = Narrow(), loader(x, x[:, :1] + 1.5 * x[:, 1:2])
    own = torch.optim.Adam(model.parameters(), lr=1e-2)
    return examined_objects("narrow", model, data, nn.MSELoss(), own)


class Unused(Classifier):
    def __init__(self):
        super().__init__()
        self.forgotten = nn.Linear(8, 3)


class Centred(Classifier):
    def forward(self, x):
        return super().forward(x - 0.5 * x.mean(0))


class Ahead(Reader):
    def forward(self, xb):
        embedded = self.table(xb)
        return self.out(self.gru(embedded + embedded.mean(1, keepdim=True))[0])


class Moody(Classifier):
    def forward(self, x):
        return super().forward(x if self.training else 1.2 * x)


class AlwaysDrops(Classifier):
    def forward(self, x):
        return self.out(F.dropout(torch.relu(self.hidden(x)), 0.1))


class Noisy(Classifier):
    def forward(self, x):
        return super().forward(x) + float(np.random.default_rng().normal()) * 1e-4


class Counting(Classifier):
    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (1 + 1e-3 * max(0, self.calls - 1))


def broken_row():
    x, y = rows()
    x[390, 3] = torch.nan
    return classes(train=loader(x, y, shuffle=False))


def constant_columns():
    (x, y), (other, labels) = rows(), rows(100, seed=1)
    x, other = torch.cat([x, torch.zeros(400, 12)], 1), torch.cat([other, torch.zeros(100, 12)], 1)
    model = Classifier()
    model.hidden = nn.Linear(20, 32)
    return classes(model, train=loader(x, y), val=loader(other, labels))


class Slow(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        time.sleep(0.001)
        return self.x[index], self.y[index]


FAULTS = {
    "initial loss": sure,
    "inputs alone": mixed_up,
    "one batch by heart": bottleneck,
    "gradients": lambda: classes(Unused()),
    "examples apart": lambda: classes(Centred()),
    "causality": lambda: language(Ahead()),
    "next tokens": lambda: language(shift=0),
    "modes": lambda: classes(Moody()),
    "accumulation": lambda: classes(criterion=lambda out, y: F.cross_entropy(out, y, ignore_index=0)),
    "repeats": lambda: classes(Noisy()),
    "saves and loads": lambda: classes(Counting()),
    "overlap": lambda: classes(val=loader(*(part[:50] for part in rows()))),
    "features": broken_row,
    "learning rate": lambda: classes(lr=300.0),
    "schedule": lambda: classes(scheduler=partial(constant, warmup_iters=1000), steps=200),
    "speed": lambda: classes(train=DataLoader(Slow(*rows()), batch_size=25)),
    "memory and disk": lambda: classes(),
}
OTHERS = {
    "drops in evaluation": ("modes", lambda: classes(AlwaysDrops()), "training=self.training"),
    "constant columns": ("features", constant_columns, "12 constant"),
    "rate too low": ("learning rate", lambda: classes(lr=1e-9), "raise the learning rate"),
    "two tokens on": ("next tokens", lambda: language(shift=2), "the input after the next"),
    "targets far from 0": ("initial loss", lambda: away_from_zero(), "standardize the targets"),
    "a leak that makes NaN": ("examples apart", lambda: logarithms(), "move by inf"),
    "one loader for both": ("overlap", lambda: classes(train=(one := loader(*rows())), val=one), "one loader"),
    "the same text": ("overlap", lambda: same_text(), "100 % of"),
    "the same windows": ("overlap", lambda: same_windows(), "100 % of 40 validation 50-grams"),
    "decay too short": (
        "schedule", lambda: classes(scheduler=partial(warmup_linear, max_iters=100), steps=400), "75 % of the run"
    ),
    "decay too long": (
        "schedule", lambda: classes(scheduler=partial(warmup_linear, max_iters=4000), steps=400), "decay ends after"
    ),
}  # fmt: skip


def away_from_zero():
    x = rows()[0]
    model = nn.Linear(8, 1)
    return examined_objects(
        "far", model, loader(x, x[:, :1] + 50), nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    )


class Logarithms(Classifier):
    """Centred over the batch: what one example has no logarithm of is lost to all."""

    def forward(self, x):
        x = x.log()
        return super().forward(x - x.mean(0))


def logarithms():
    x, y = rows()
    return classes(Logarithms(), train=loader(x.abs() + 1, y), val=loader(x.abs() + 2, y))


def same_text():
    ids, model = np.random.default_rng(0).integers(0, VOCABULARY, 2000), Reader()
    train, val = Windows(ids, 12, 8), CoveringWindows(ids[500:1500], 12, 8)
    return examined_objects("text", model, train, NextToken(), torch.optim.AdamW(model.parameters()), val)


def same_windows():
    """Other windows than those of the training, of the same text."""
    ids, model = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, 4000)), Reader()

    def cut(first, n, length):
        starts = range(first, first + n * length, length)
        return [tuple(torch.stack([ids[at + by : at + by + length] for at in starts]) for by in (0, 1))]

    own = torch.optim.AdamW(model.parameters())
    return examined_objects("windows", model, cut(0, 10, 300), NextToken(), own, cut(0, 40, 50))


def test_there_is_a_fault_for_each_check():
    assert list(FAULTS) == [name for name, _ in CHECKS]


@pytest.mark.parametrize("check", FAULTS)
def test_a_planted_fault_is_found_by_one_check_alone(check, monkeypatch, known_rate):
    if check == "memory and disk":
        monkeypatch.setattr(preflight_data, "free", lambda device: 1000)
    failed = failures(FAULTS[check]())
    assert list(failed) == [check], failed
    assert failed[check].remedy
    assert "\n" not in failed[check].figure + failed[check].remedy


@pytest.mark.parametrize("fault", OTHERS)
def test_other_faults_are_found_by_their_check(fault):
    check, build, words = OTHERS[fault]
    finding = run_check(dict(CHECKS)[check], build())
    assert finding.verdict == "failed", finding
    assert words in finding.figure + finding.remedy


def test_healthy_jobs_pass_and_stay_as_they_were():
    job = classes(Classifier(dropout=0.1))
    job.model.hidden.weight.grad = torch.ones_like(job.model.hidden.weight)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    all_found = found(job)
    del all_found["speed"]  # on a busy machine a small step may well wait
    assert {finding.verdict for finding in all_found.values()} <= {"ok", "not applicable"}, all_found
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())
    assert torch.equal(job.model.hidden.weight.grad, torch.ones(32, 8))
    assert job.model.training
    assert job.optimizers[0].state_dict()["state"] == {}


def test_a_healthy_language_model_passes():
    all_found = found(language())
    assert not [finding for finding in all_found.values() if finding.verdict == "failed"], all_found
    for name in ("causality", "next tokens", "examples apart", "accumulation"):
        assert all_found[name].verdict == "ok", all_found


def test_batch_norm_joins_examples_in_training_and_that_is_said():
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    all_found = found(classes(model))
    assert not [finding for finding in all_found.values() if finding.verdict == "failed"], all_found
    assert "batch norm" in all_found["examples apart"].figure


@pytest.mark.parametrize(
    ("own", "best", "verdict", "words"),
    [
        (0.6, 1.0, "ok", ""),
        (0.4, 1.0, "ok", "0.1 learns more in these steps"),  # less than half of the gain
        (1.2, 1.9, "ok", "0.1 learns more in these steps"),  # more than twice of the loss is left
        (0.04, 1.0, "warning", "a slow rate"),
    ],
)
def test_a_much_better_rate_is_told(monkeypatch, own, best, verdict, words):
    """Of a loss of 2.0 the rate ten times the job's own gains `best` in the trial."""
    gains = {1.0: own, 10.0: best}
    tried = lambda job, factor, steps: Trial(0.01 * factor, 2.0, 2.0 - gains.get(factor, 0.0))  # noqa: E731
    monkeypatch.setattr(preflight_learning, "try_rate", tried)
    finding = preflight_learning.learning_rate(classes())
    assert finding.verdict == verdict and bool(finding.remedy) == bool(words) and words in finding.remedy


@pytest.mark.parametrize(("columns", "words"), [(1, "1 feature of 800 rows"), (2, "2 features of 800 rows")])
def test_one_feature_is_one(columns, words):
    table = np.random.default_rng(0).normal(size=(800, columns))
    assert preflight_data.judged_features(table).figure.startswith(words)


class OwnObjective:
    def count(self, batch):
        return len(batch["x"])

    def loss(self, model, batch, carry):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean(), None


def test_an_objective_of_the_jobs_own_with_batches_of_its_own(known_rate):
    x, model = rows()[0], nn.Linear(8, 1)
    batches = [{"x": some, "y": some.sum(1, keepdim=True)} for some in x.split(20)]
    own = torch.optim.Adam(model.parameters(), lr=1e-2)
    all_found = found(examined_objects("own", model, batches, OwnObjective(), own))
    assert not [finding for finding in all_found.values() if finding.verdict == "failed"], all_found
    for name in ("one batch by heart", "gradients", "modes", "repeats", "saves and loads", "learning rate"):
        assert all_found[name].verdict == "ok", all_found


def test_ln_v_is_found_behind_a_function_and_outputs_of_any_shape(known_rate):
    def criterion(logits, yb):
        return F.cross_entropy(logits.flatten(0, 1), yb.flatten())

    finding = run_check(dict(CHECKS)["initial loss"], language(criterion=criterion))
    assert f"ln {VOCABULARY} is" in finding.figure


def test_nan_data_repeat_themselves(known_rate):
    x, y = rows()
    x[3, 2] = torch.nan
    all_found = found(classes(train=loader(x, y, shuffle=False)))
    assert {name for name, finding in all_found.items() if finding.verdict == "failed"} == {
        "initial loss", "gradients", "features", "learning rate",
    }  # fmt: skip


def test_a_sound_job_in_bf16_passes(known_rate):
    x = rows()[0].bfloat16()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).bfloat16()
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    job = examined_objects("half", model, loader(x[:300], x[:300, :1]), nn.MSELoss(), own)
    for name in ("accumulation", "features"):
        assert run_check(dict(CHECKS)[name], job).verdict == "ok"
    wrong = examined_objects("half", model, loader(x, x[:, :1]), lambda out, y: (out - y).pow(2).sum(), own)
    assert run_check(dict(CHECKS)["accumulation"], wrong).verdict == "failed"


def test_inputs_of_several_lengths_have_no_features_to_compare():
    data = [(torch.randn(8, 5 + i % 3), torch.randn(8, 1)) for i in range(6)]
    finding = run_check(dict(CHECKS)["features"], summed(data))
    assert (finding.verdict, finding.figure) == (
        "not applicable",
        "its inputs are of several lengths; all are finite",
    )


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(1, 1)

    def forward(self, x):
        return self.out(x.sum(1, keepdim=True))


def summed(train, val=None, criterion=None):
    model = Sum()
    own = torch.optim.SGD(model.parameters(), lr=0.01)
    return examined_objects("sums", model, train, criterion or nn.MSELoss(), own, val)


def test_a_loader_that_is_spent_is_not_said_to_be_sound():
    data = [(torch.randn(8, 5), torch.randn(8, 1)) for _ in range(6)]
    checks = dict(CHECKS)
    for train, val in ((iter(data), data), (data, iter(data))):
        finding = run_check(checks["overlap"], summed(train, val))
        assert (finding.verdict, finding.figure) == ("not applicable", "its loader can be iterated only once")
    assert run_check(checks["features"], summed(iter(data))).verdict == "not applicable"


def test_what_is_wrong_with_the_objects_is_said_as_it_is():
    data = [(torch.randn(8, 5), torch.randn(8, 1)) for _ in range(6)]
    with pytest.raises(ValueError, match="^the validation data of sums .list. gave no batch"):
        summed(data, [])
    with pytest.raises(ValueError, match="^the criterion's reduction is 'sum'"):
        summed(data, criterion=nn.MSELoss(reduction="sum"))


def test_a_job_that_cannot_be_copied_is_refused():
    model = Classifier()
    model.lock = __import__("threading").Lock()
    with pytest.raises(ValueError, match="cannot be copied"):
        classes(model)


JOB = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def job():
    x = torch.randn(200, 4)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    def data(rows):
        return DataLoader(TensorDataset(x[rows], x[rows].sum(1, keepdim=True)), batch_size=20, shuffle=True)
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, data(slice(0, 160)), nn.MSELoss(), own, data(slice(160, 200))

def of_a_run(run): ...
def too_little(): return nn.Linear(1, 1)
def raises(): raise KeyError("planted")
def misfits():
    model = nn.Linear(3, 1)
    return model, [(torch.ones(4, 5), torch.ones(4, 1))], nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)
"""


def test_a_function_with_nothing_of_ours_in_it(fivestep, tmp_path):  # noqa: F811
    (tmp_path / "mine.py").write_text(JOB)
    run = fivestep("doctor", "mine.py:job", "--json")
    assert run.code == 0, run.out + run.err
    told = json.loads(run.out)
    assert told["healthy"]
    assert [one["check"] for one in told["checks"]] == [name for name, _ in CHECKS]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mine.py:of_a_run"], "takes arguments; for a preflight it must take none"),
        (["mine.py:too_little"], "returned a Linear; it must return model, loader, criterion, optimizer"),
        (["mine.py:raises"], "mine.py:raises raised KeyError: 'planted'"),
        (["mine.py:misfits"], "the first batch of mine.py:misfits has no loss: RuntimeError: mat1 and mat2"),
        (["mine.py"], "name the function too: mine.py:job"),
        (["nothere.py"], "fivestep: there is no file nothere.py\n"),
        (["nothere.py:job"], "fivestep: there is no file nothere.py\n"),
        (["mine.py:not-a-name"], "'not-a-name' in mine.py:not-a-name cannot be a function's name"),
        (["mine.py:jobs"], "did you mean 'job'"),
        (["mine.py:job", "--n-layer", "2"], "--n-layer is of recipes"),
        (["regresion"], "did you mean 'regression'"),
        (["regression", "--find-lr", "--find-batch"], "give one of"),
        (["bigram", "--data", "-"], "only once"),
    ],
)
def test_bad_usage_is_a_sentence(fivestep, tmp_path, arguments, expected):  # noqa: F811
    (tmp_path / "mine.py").write_text(JOB)
    run = fivestep("doctor", *arguments)
    assert run.code == 2
    assert expected in run.err


SMALL = ["--data", "my.txt", "--n-embd", "16", "--n-layer", "1"]
WORDS = [*SMALL, "--n-hidden", "16", "--bptt", "12", "--tokenizer", "chars", "--batch-size", "8", "--dropout", "0.1"]
WINDOW = [*SMALL, "--n-head", "2", "--batch-size", "8", "--accumulate", "1", "--block-size", "16"]
TINY = {
    "regression": [],
    "digits": ["--n-hidden", "32"],
    "bigram": [],
    "gpt-chars": [*WINDOW, "--ngrams", "1"],
    "gpt2-124m": [*WINDOW, "--tokenizer", "chars", "--vocab-size", "64", "--max-iters", "4000"],
    "rnn-words": WORDS,
    "transformer-words": WORDS,
}


def test_every_recipe_is_tried():
    assert sorted(TINY) == recipes()


@pytest.mark.parametrize("recipe", TINY)
def test_a_recipe_passes(fivestep, tmp_path, recipe):  # noqa: F811
    if recipe == "digits":
        pytest.importorskip("sklearn")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), random.integers(2, 6))) for _ in range(60)]
    (tmp_path / "my.txt").write_text(" ".join(random.choice(words, 4000)))
    run = fivestep("doctor", recipe, *TINY[recipe])
    assert run.code == 0, run.out + run.err
    assert "healthy: " in run.out
    assert [path.name for path in tmp_path.iterdir()] == ["my.txt"]


def test_a_fault_is_told_and_exits_with_1(fivestep):  # noqa: F811
    run = fivestep("doctor", "regression", "--learning-rate", "1e5")
    assert run.code == 1, run.out
    assert "  failed    learning rate" in run.out
    assert "-> lower the learning rate" in run.out
    assert "1 failed: " in run.out


class Forces(nn.Module):
    """Gradients of an energy: a model that differentiates in its forward."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1, bias=False))

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Slope:
    """An objective that differentiates what the model computes."""

    def count(self, batch):
        return len(batch[0])

    def loss(self, model, batch, carry):
        x = batch[0].detach().requires_grad_()
        slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        return (slope - batch[1]).square().mean(), carry


@pytest.mark.parametrize(("model", "criterion"), [(Forces, nn.MSELoss()), (lambda: Forces().energy, Slope())])
def test_models_and_objectives_that_differentiate_are_evaluated(model, criterion):
    torch.manual_seed(0)
    x, model = torch.randn(200, 2), model()
    data = loader(x, x.sin())
    job = classes(model, data, criterion, val=data)
    for check in (preflight_learning.initial_loss, preflight_learning.one_batch, preflight_learning.learning_rate):
        finding = run_check(check, job)
        assert "RuntimeError" not in finding.figure, finding
