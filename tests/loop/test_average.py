"""Averaged weights: torch's own average, bit for bit; evaluated, kept, and never in the way of training."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fivestep as fs
from fivestep.models.mlp import MLP
from tests.same import assert_same_bits, twins


def batches(n=12):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(n)]


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def test_equal_to_a_loop_by_hand():
    ours, theirs = twins(MLP([3, 8, 1], dropout=0.2))
    torch.manual_seed(1)
    history = fs.fit(ours, batches(), nn.MSELoss(), adamw(ours), epochs=2, val=batches(), ema=0.9, progress=False)
    torch.manual_seed(1)
    optimizer, averaged = adamw(theirs), AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    losses = []
    for _ in range(2):
        theirs.train()
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.mse_loss(theirs(x), y).backward()
            optimizer.step()
            averaged.update_parameters(theirs)
        losses.append(fs.evaluate(averaged.module, batches(), nn.MSELoss())["loss"])
    assert [row["loss"] for row in history if row["split"] == "val"] == losses
    assert_same_bits(ours, theirs)  # training never sees the average


def test_in_place_and_out_again():
    model, untouched = twins(MLP([3, 8, 1]))
    storage = [p.data_ptr() for p in model.parameters()]
    steps = fs.train(model, batches(), nn.MSELoss(), adamw(model), epochs=1, ema=0.5)
    for result in steps:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ZeroDivisionError), result.state.averaged():
            inside = [p.detach().clone() for p in model.parameters()]
            raise ZeroDivisionError
        assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
        assert result.step == 1 or not all(torch.equal(a, b) for a, b in zip(before, inside, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == storage
    plain = fs.train(untouched, batches(), nn.MSELoss(), adamw(untouched), epochs=1)
    assert sum(1 for _ in plain) == 12
    assert_same_bits(model, untouched)


def test_a_run_keeps_what_was_evaluated(tmp_path):
    model, other = twins(MLP([3, 8, 1]))
    with fs.Run(tmp_path / "run") as run:
        history = fs.fit(
            model,
            batches(),
            nn.MSELoss(),
            adamw(model),
            epochs=3,
            val=batches(),
            ema=0.9,
            progress=False,
            run=run,
        )
    best = min((row for row in history if row["split"] == "val"), key=lambda row: row["loss"])
    assert fs.load_weights(tmp_path / "run", other, "best") == best["step"]
    assert fs.evaluate(other, batches(), nn.MSELoss())["loss"] == best["loss"]


def test_resumed():
    def start():
        torch.manual_seed(0)
        model = MLP([3, 8, 1])
        return model, adamw(model)

    def losses(model, optimizer, epochs, state):
        rows = fs.fit(
            model,
            batches(),
            nn.MSELoss(),
            optimizer,
            epochs=epochs,
            val=batches(),
            ema=0.9,
            progress=False,
            state=state,
        )
        return [row["loss"] for row in rows if row["split"] == "val"]

    model, optimizer = start()
    whole = losses(model, optimizer, 4, None)
    first, first_optimizer = start()
    state = fs.TrainStep(first, nn.MSELoss(), first_optimizer, ema=0.9).state
    assert losses(first, first_optimizer, 2, state) == whole[:2]
    again, again_optimizer = start()
    other = fs.TrainStep(again, nn.MSELoss(), again_optimizer, ema=0.9).state
    other.load_state_dict(state.state_dict())
    assert losses(again, again_optimizer, 4, other) == whole[2:]
    without = fs.TrainStep(*(lambda m: (m, nn.MSELoss(), adamw(m)))(MLP([3, 8, 1]))).state
    with pytest.raises(fs.UsageError, match="ema"):
        without.load_state_dict(state.state_dict())


@pytest.mark.parametrize("decay", [1, -0.1, True, "often"])
def test_refused(decay):
    model = MLP([3, 1])
    with pytest.raises(fs.UsageError, match=r"ema = .*--ema"):
        fs.TrainStep(model, nn.MSELoss(), adamw(model), ema=decay)


def test_what_does_not_train_is_itself():
    """A frozen mask of -inf has no average (-inf less -inf is NaN); a frozen table of integers neither."""

    class Masked(MLP):
        def __init__(self):
            super().__init__([3, 8, 1])
            self.mask = nn.Parameter(torch.tensor([0.0, -torch.inf]), requires_grad=False)
            self.table = nn.Parameter(torch.arange(3), requires_grad=False)

        def forward(self, x):
            return super().forward(x) + self.mask.exp()[:1]

    model = Masked()
    history = fs.fit(model, batches(), nn.MSELoss(), adamw(model), epochs=2, val=batches(), ema=0.9, progress=False)
    assert all(row["loss"] == row["loss"] for row in history)
    assert model.mask.tolist() == [0.0, -torch.inf]


def test_narrow_weights_are_averaged_in_float32():
    model = MLP([3, 8, 1]).bfloat16()
    data = [(x.bfloat16(), y.bfloat16()) for x, y in batches()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    mean, averages = None, []
    for result in fs.train(model, data, nn.MSELoss(), optimizer, epochs=30, ema=0.99):
        now = [p.detach().float() for p in model.parameters()]
        mean = now if mean is None else [0.99 * a + 0.01 * b for a, b in zip(mean, now, strict=True)]
        averages = result.state.average.weights
    for ours, theirs in zip(averages, mean, strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_criterion_that_learns_is_averaged_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return ((outputs - targets) ** 2).mean() * self.scale.exp() - self.scale

    model, criterion = MLP([3, 1]), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.05)
    for result in fs.train(model, batches(), criterion, optimizer, epochs=1, ema=0.9):
        own = criterion.scale.item(), result.step
    assert own[1] == 12
    with result.state.averaged():
        assert criterion.scale.item() != own[0]
    assert criterion.scale.item() == own[0]


def test_a_new_decay_counts():
    model = MLP([3, 1])
    optimizer = adamw(model)
    state = fs.TrainStep(model, nn.MSELoss(), optimizer, ema=0.9).state
    assert fs.TrainStep(model, nn.MSELoss(), optimizer, ema=0.5, state=state).state.average.decay == 0.5
