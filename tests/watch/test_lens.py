"""The lens: its figures are those of a slow reference, training does not notice it, and it names planted faults."""

import io
import json
import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.errors import UsageError
from fivestep.models.gpt import GPT
from fivestep.run.difference import difference
from fivestep.watch.lens import DEAD, Judge, Lens, Strips, block, grouped, norms, pooled
from fivestep.watch.progress import Progress
from fivestep.watch.screen import Console
from tests.run.cli import fivestep  # noqa: F401


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def batches(count, rows=16, features=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, features, generator=generator), torch.randn(rows, 1, generator=generator))
        for _ in range(count)
    ]


def images(count):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 2, 5, 5, generator=generator), torch.randn(6, 1, generator=generator)) for _ in range(count)
    ]


def conv():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3, 1),
    ]
    return nn.Sequential(*layers)


def looks(history):
    return [row for row in history if row["split"] == "lens"]


# --- the figures ---


def reference(model, criterion, optimizer, window, clip):
    """One step by hand, and each layer's figures from whole tensors, gathered and concatenated."""
    layers = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    read, gave = {name: [] for name in layers}, {name: [] for name in layers}

    def noting(name):
        def hook(_, given, output):
            read[name].append(given[0].detach())
            gave[name].append(output.detach())

        return hook

    hooks = [module.register_forward_hook(noting(name)) for name, module in layers.items()]
    optimizer.zero_grad()
    for x, y in window:
        (criterion(model(x), y) * (len(x) / sum(len(x) for x, _ in window))).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    before = {
        name: torch.cat([p.detach().flatten() for p in m.parameters(recurse=False)]) for name, m in layers.items()
    }
    optimizer.step()
    for hook in hooks:
        hook.remove()
    found = {}
    for index, (name, module) in enumerate(layers.items()):
        after = torch.cat([p.detach().flatten() for p in module.parameters(recurse=False)])
        grads = torch.cat([p.grad.flatten() for p in module.parameters(recurse=False)])
        outputs = torch.cat([output.flatten() for output in gave[name]]).double()
        inputs = torch.cat(read[name])
        unit = 1 if inputs.ndim == 4 else inputs.ndim - 1
        columns = inputs.movedim(unit, 0).flatten(1)
        found[name] = {
            "grad_norm": grads.double().norm().item(),
            "update": ((after - before[name]).double().norm() / before[name].double().norm()).item(),
            "mean": outputs.mean().item(),
            "std": outputs.std(correction=0).item(),
            "dead": None if index == 0 else sum(bool((column == 0).all()) for column in columns) / len(columns),
        }
    return found


@pytest.mark.parametrize(
    "build, data, accumulate",
    [(net, batches, 1), (net, batches, 3), (conv, images, 1)],
    ids=["mlp", "window", "conv"],
)
def test_figures_equal_a_slow_reference(build, data, accumulate):
    """Every figure of every layer, at three looks; dropout drawn alike, gradients clipped, a window of three."""
    clip, every, steps = 0.05, 2, 6
    model, data = build(), data(steps * accumulate)
    with torch.no_grad():
        if isinstance(model[1], nn.BatchNorm2d):  # some units are dead
            model[1].weight[:2], model[1].bias[:2] = 0.0, -1.0
        else:
            model[0].bias[:3] = -100.0
    other = build()
    other.load_state_dict(model.state_dict())
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, other)]
    torch.manual_seed(7)
    history = fs.fit(
        model,
        data,
        nn.MSELoss(),
        optimizers[0],
        epochs=1,
        accumulate=accumulate,
        clip_norm=clip,
        lens=every,
        progress=False,
    )
    torch.manual_seed(7)
    other.train()
    windows = [data[start : start + accumulate] for start in range(0, len(data), accumulate)]
    slow = [reference(other, nn.MSELoss(), optimizers[1], window, clip) for window in windows]
    rows = looks(history)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        expected = slow[row["step"] - 1]
        assert row["layers"].keys() == expected.keys()
        for name, of_layer in row["layers"].items():
            for figure, value in of_layer.items():
                wanted = expected[name][figure]
                same = value is None if wanted is None else value == pytest.approx(wanted, rel=2e-5, abs=2e-7)
                assert same, (row["step"], name, figure, value, wanted)
    assert any(of_layer["dead"] for of_layer in rows[0]["layers"].values())


def test_pooled():
    parts = [torch.randn(5), torch.randn(3) + 2, torch.randn(1)]
    pairs = [(part.std(correction=0).item(), part.mean().item()) for part in parts]
    whole = torch.cat(parts)
    expected = (whole.mean().item(), whole.std(correction=0).item())
    assert pooled([5, 3, 1], pairs) == (pytest.approx(expected[0], rel=1e-5), pytest.approx(expected[1], rel=1e-5))
    assert pooled([], []) == (None, None)


def test_norms_of_several_kinds_of_numbers():
    kinds = [torch.float64, torch.bfloat16, torch.float32, torch.float16]
    found = norms([torch.full((100,), 3.0, dtype=kind) for kind in kinds])
    assert [float(one) for one in found] == [30.0] * 4
    assert [one.dtype for one in found] == [torch.float64, *[torch.float32] * 3]


def test_what_has_no_figure_is_none():
    """Ids are no units; weights of 0 have no ratio; what is used by its weights alone gives nothing."""
    torch.manual_seed(0)
    model = GPT(11, block_size=4, n_layer=1, n_head=1, n_embd=8, ngrams=2)
    ids = torch.randint(11, (3, 5))
    data = [(ids[:, :-1], ids[:, 1:])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (row,) = looks(fs.fit(model, data, fs.NextToken(), optimizer, epochs=1, lens=1, progress=False))
    layers = row["layers"]
    assert layers["token_embedding_table"]["dead"] is None and layers["token_embedding_table"]["std"] > 0
    assert layers["blocks.0.mlp.output"]["update"] is None and layers["blocks.0.mlp.output"]["grad_norm"] > 0
    assert layers["ngrams.table"]["mean"] is None and layers["ngrams.table"]["grad_norm"] > 0
    json.dumps(row)


# --- training does not notice ---


def words():
    """A model whose loss never makes the logits: hooks on it or its decoder would have it take another path."""
    from fivestep.models.rnn import RNN

    torch.manual_seed(0)
    return RNN(3000, n_embd=8, n_hidden=8, n_layer=1, cell="lstm", dropout=0.1)


def segments():
    from fivestep.data.segments import Segments

    return Segments(torch.randint(3000, (600,), generator=torch.Generator().manual_seed(0)).numpy(), 4, 8)


@pytest.mark.parametrize(
    "build, data, criterion",
    [
        (net, lambda: batches(9), nn.MSELoss),
        (conv, lambda: images(9), nn.MSELoss),
        (words, segments, lambda: fs.TruncatedBPTT(fused=True)),
    ],
    ids=["dropout", "batch norm", "fused loss"],
)
def test_not_a_bit_of_the_training_changes(build, data, criterion):
    found = []
    for lens in (None, 1, 3):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(5)
        history = fs.fit(
            model, data(), criterion(), optimizer, epochs=1, max_iters=9, log_every=3, lens=lens, progress=False
        )
        rows = [
            {name: row[name] for name in ("step", "split", "loss", "grad_norm")} for row in history if "loss" in row
        ]
        found.append((model.state_dict(), optimizer.state_dict()["state"], rows, torch.get_rng_state()))
        assert len(looks(history)) == (9 // lens if lens else 0)
    for weights, moments, rows, random in found[1:]:
        assert all(torch.equal(weights[name], found[0][0][name]) for name in weights)
        for index, state in moments.items():
            assert all(torch.equal(value, found[0][1][index][name]) for name, value in state.items())
        assert rows == found[0][2]
        assert torch.equal(random, found[0][3])


def hooks_of(model):
    return [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


def test_hooks_are_there_at_the_chosen_steps_alone():
    model, seen = net(), []

    def criterion(output, target):
        seen.append(len(hooks_of(model)))
        return nn.functional.mse_loss(output, target)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fs.fit(model, batches(5), criterion, optimizer, epochs=1, lens=2, progress=False, watchers=[
        lambda result, rows: seen.append(len(hooks_of(model)))
    ])  # fmt: skip
    assert seen[:10] == [0, 0, 3, 0, 0, 0, 3, 0, 0, 0] and not any(seen[10:])


def test_hooks_go_after_an_error_too():
    model = net()

    def criterion(output, target):
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="own"):
        fs.fit(model, batches(1), criterion, torch.optim.SGD(model.parameters()), epochs=1, lens=1, progress=False)
    assert hooks_of(model) == []


def test_a_step_that_is_left_out_has_no_row():
    """Step 2 is left out once, for its batch is not finite; the next one takes its number, and is looked at."""
    data = batches(4)
    data[1] = (data[1][0] * float("nan"), data[1][1])
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, lens=2, on_nonfinite="skip", progress=False)
    (row,) = looks(history)
    assert row["step"] == 2 and math.isfinite(row["layers"]["0"]["std"])


def training(path, until, lens=2):
    model = net()
    with fs.Run(path, say=lambda text: None) as run:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(3)
        return fs.fit(
            model, batches(5), nn.MSELoss(), optimizer, max_iters=until, lens=lens, val=batches(1), eval_every=4,
            log_every=3, run=run, progress=False,
        )  # fmt: skip


def test_a_run_keeps_the_rows_and_goes_on_exactly(tmp_path):
    whole = training(tmp_path / "whole", 12)
    training(tmp_path / "parts", 8)
    parts = training(tmp_path / "parts", 12)
    assert difference(tmp_path / "whole", tmp_path / "parts") is None
    assert looks(whole) == looks(parts) and [row["step"] for row in looks(whole)] == [2, 4, 6, 8, 10, 12]
    assert [row["split"] for row in whole if row["step"] == 4] == ["lens", "train", "val"]


def test_refused():
    model = net()
    for every in (0, -1, 2.5, True, "50"):
        with pytest.raises(UsageError, match=r"--lens"):
            fs.fit(model, batches(1), nn.MSELoss(), torch.optim.SGD(model.parameters()), epochs=1, lens=every)


@pytest.mark.parametrize("refused, activations", [(None, False), ("it has hooks", True)])
def test_a_step_by_program_is_asked_for_gradients_and_updates_alone(monkeypatch, refused, activations):
    """What a program leaves behind is what the lens reads; it puts on no hook, which a program would not call."""
    model = net()
    step = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), graph=True)
    step.graph.refused = refused
    monkeypatch.setattr(type(step.graph), "__call__", lambda *_: None)  # each step is the eager one
    lens = Lens(step, 1)
    row = lens.look(lens(batches(1)[0]))
    for figures in row["layers"].values():
        assert figures["grad_norm"] > 0 and figures["update"] > 0
        assert (figures["mean"] is not None) == activations


# --- warnings ---


def warned(model, rate=0.01, steps=6, optimizer=torch.optim.SGD, every=1, **how):
    """What is said while `model` trains."""
    shown = io.StringIO()
    progress = Progress(steps, Console(file=shown, width=200))
    built = optimizer(model.parameters(), lr=rate)
    fs.fit(
        model, batches(steps), nn.MSELoss(), built, epochs=1, lens=every, progress=progress,
        on_nonfinite="skip", **how,
    )  # fmt: skip
    return re.findall(r"lens, step (\d+): (\S+) (.*)", shown.getvalue())


def test_a_healthy_training_is_not_warned_of():
    assert warned(net(), steps=30) == []


def test_a_dead_layer():
    model = net()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # its ReLU gives 0 for every row
    told = warned(model)
    assert ("2", "3", told[1][2]) == told[1] and told[1][2].startswith("reads a dead layer: 100% of the units")
    assert [name for _, name, _ in told] == ["0", "3"]  # each once; behind the dead units no gradient reaches "0"
    assert told[0][2].startswith("does not move: its gradient is 0")


def test_an_explosion():
    """The rate grows tenfold each step: updates are larger than weights, and outputs follow."""
    told = warned(net(), rate=10.0, clip_norm=1.0, scheduler=lambda step: 10.0**step)
    assert {name for _, name, _ in told} == {"0", "3", "5"} and len(told) == 3
    assert all("explodes" in text for _, _, text in told)


def test_an_output_that_explodes_is_told_at_once():
    calm = {"a": {"grad_norm": 1.0, "update": 1e-3, "mean": 0.0, "std": 0.5, "dead": None}}
    for wild in (2e3, math.nan, math.inf):
        judge = Judge()
        judge.see(calm, 1.0)
        judge.see({"a": {**calm["a"], "std": wild}}, 1.0)
        assert len(judge.found) == 1 and "explodes" in judge.found[0]


def test_a_layer_that_does_not_move():
    model = net()

    def optimizer(parameters, lr):
        groups = [{"params": list(model[:4].parameters()), "lr": 1e-12}, {"params": list(model[4:].parameters())}]
        return torch.optim.SGD(groups, lr=lr)

    told = warned(model, rate=1e-13, optimizer=optimizer)
    assert {name for _, name, _ in told} == {"0", "3", "5"} and all("does not move" in text for _, _, text in told)


def test_nobody_is_warned_where_the_rate_is_at_its_end():
    still = {"a": {"grad_norm": 1.0, "update": 1e-9, "mean": 0.0, "std": 1.0, "dead": None}}
    moving = {"a": {**still["a"], "update": 1e-3}}
    judge = Judge()
    for layers, rate in ((moving, 1.0), (still, 1e-3), (still, 1e-3)):
        judge.see(layers, rate)
        assert judge.found == []
    for rate in (1.0, 1.0, 1.0):
        judge.see(still, rate)
        assert len(judge.found) == (1 if rate == 1.0 and "a" in judge.told and judge.found else 0)
    assert judge.told == {"a"}


def test_one_look_alone_warns_of_nothing():
    dead = {"a": {"grad_norm": 1.0, "update": 1e-3, "mean": 0.0, "std": 1.0, "dead": DEAD}}
    alive = {"a": {**dead["a"], "dead": DEAD - 0.01}}
    judge = Judge()
    for layers in (dead, alive, dead):
        judge.see(layers, 1.0)
        assert judge.found == []
    judge.see(dead, 1.0)
    assert len(judge.found) == 1


# --- under the bar ---


def test_strips_stand_under_the_bar_of_a_terminal():
    for terminal in (True, False):
        shown = io.StringIO()
        progress = Progress(4, Console(file=shown, force_terminal=terminal, width=90, height=40))
        progress.screen.every = 0.0
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fs.fit(model, batches(4), nn.MSELoss(), optimizer, epochs=1, lens=1, progress=progress)
        assert ("update/weight" in shown.getvalue()) == terminal
        assert bool(re.search("[▁▂▃▄▅▆▇█]{2}", shown.getvalue())) == terminal


def test_strips():
    strips, figures = Strips(), {"grad_norm": 3.0, "update": 1e-3, "mean": 0.0, "std": 1.0, "dead": 0.25}
    for _ in range(20):
        lines = strips.lines({"one": figures, "two": {**figures, "update": float("nan"), "dead": None}}, 70)
    assert [len(text) <= 70 for text, _ in lines] == [True] * 3
    assert re.fullmatch(r"one  (.)\1{11}  1\.0e-03   3\.0e\+00     25%", lines[1][0])
    assert [style for _, style in lines[1:]] == ["cyan", "bold red"]


def test_blocks_grow_with_the_update():
    shown = [block(10.0**power) for power in range(-8, 3)]
    assert shown[0] == "▁" and shown[-1] == "█" and all(low <= high for low, high in pairwise(shown))
    assert block(0.0) == " " and block(math.inf) == "█" and block(math.nan) == " "


def test_many_layers_share_lines():
    names = ["wte", *(f"blocks.{n}.{part}.weight" for n in range(12) for part in ("attention", "mlp")), "head"]
    groups = grouped(names)
    assert list(groups) == ["wte", *(f"blocks.{n}" for n in range(12)), "head"]
    assert sum(map(len, groups.values())) == len(names)
    assert len(grouped([f"layer{n}" for n in range(100)])) == 16


def test_from_the_command_line(fivestep):  # noqa: F811
    done = fivestep(
        "train", "bigram", "--max-iters", 6, "--lens", 3, "--run-dir", "a", "--sample-tokens", 0, "--graph", "off"
    )
    assert done.code == 0, done.err
    assert done.out.endswith('\nlayers:    a/metrics.jsonl, the rows with "split": "lens"\n')
    rows = [json.loads(line) for line in open("a/metrics.jsonl")]  # noqa: PTH123, SIM115
    assert [row["step"] for row in looks(rows)] == [3, 6]
    for verb in (("runs", "a"), ("eval", "a"), ("resume", "a", "--max-iters", 8, "--lens", 4)):
        assert fivestep(*verb).code == 0
    assert fivestep("train", "bigram", "--lens", 0).code == 2
