"""Saved and reported names are the model's own, whether torch.compile has wrapped all of it, a part, or nothing."""

import shutil

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.loop.canonical_names import canonical, load_weights_into, weights_of
from fivestep.loop.optimizer import build_optimizer, freeze
from fivestep.run.checkpoint import checkpoints, load_state, save_checkpoint
from fivestep.run.export import export, load_export, read_weights
from fivestep.watch.lens import layers_of

NAMES = ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]


def compiled(value):
    return torch.compile(value, backend="eager")


def net(kind="plain"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2))
    if kind == "part":
        model[0] = compiled(model[0])
    if kind == "both":
        model[0] = compiled(model[0])
        return compiled(model)
    return compiled(model) if kind == "whole" else model


def data(n=4):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, generator=draw), torch.randint(0, 2, (6,), generator=draw)) for _ in range(n)]


def trained(kind, folder, epochs, **options):
    model = net(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with fs.Run(folder, say=lambda text: None) as run:
        fs.fit(
            model, data(), nn.CrossEntropyLoss(), optimizer, epochs=epochs, val=data(2), run=run, progress=False,
            ema=0.5, early_stop=9, to_best=True, **options,
        )  # fmt: skip
    return model


def assert_same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def compiled_layer(kind, folder, max_iters, stays=True):
    """Train a single layer, whose wrapper has no length, beside one that is kept in eval()."""
    torch.manual_seed(0)
    if kind == "layer":
        model = compiled(nn.Linear(3, 2))
    else:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        if kind == "part":
            model[1] = compiled(model[1])
        if stays:
            model[1].eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with fs.Run(folder, say=str) as run:
        for info in fs.train(model, data(), nn.CrossEntropyLoss(), optimizer, max_iters=max_iters, run=run):
            if info.step == 2 and not stays:
                model[1].eval()
    return model


@pytest.mark.parametrize(
    ("first", "then", "stays"),
    [("layer", "layer", True), ("plain", "part", True), ("part", "plain", True), ("plain", "part", False)],
)
def test_a_compiled_layer_and_its_mode_are_resumed(tmp_path, first, then, stays):
    uncut = compiled_layer(first, tmp_path / "uncut", 9, stays)
    compiled_layer(first, tmp_path / "run", 5, stays)
    assert_same_weights(compiled_layer(then, tmp_path / "run", 9, stays), uncut)


@pytest.mark.parametrize("other", [nn.Sequential(nn.Linear(3, 2)), nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)])
def test_weights_of_another_model_change_nothing(tmp_path, other):
    compiled_layer("layer", tmp_path, 2)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(fs.UsageError, match="does not fit"):
        fs.load_weights(tmp_path, other, "last")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_names():
    assert canonical("_orig_mod.0._orig_mod.weight") == "0.weight"
    assert canonical("mine_orig_mod.weight") == "mine_orig_mod.weight"
    for kind in ("plain", "part", "whole", "both"):
        assert list(weights_of(net(kind))) == NAMES
        with pytest.raises(RuntimeError, match="Missing key"):
            load_weights_into(net(kind), {"0.0.weight": torch.zeros(4, 3)})


@pytest.mark.parametrize(("first", "then"), [("whole", "plain"), ("plain", "both"), ("part", "whole")])
def test_a_run_is_resumed_with_another_kind(tmp_path, first, then):
    whole = trained("plain", tmp_path / "whole", 4)
    trained(first, tmp_path / "run", 2)
    assert_same_weights(trained(then, tmp_path / "run", 4), whole)
    for kind in ("plain", "part"):
        fs.load_weights(tmp_path / "run", loaded := net(kind), "last")
        fs.load_weights(tmp_path / "whole", right := net(), "last")
        assert_same_weights(loaded, right)


def test_checkpoints_with_names_of_the_wrapper_load(tmp_path):
    """Earlier versions saved a compiled model under the wrapper's names."""
    whole = trained("plain", tmp_path / "whole", 4)
    trained("plain", tmp_path / "run", 2)
    (found,) = [one for one in checkpoints(tmp_path / "run/checkpoints") if one.step == 8]
    state = load_state(found)

    def wrapped(weights):
        return {f"_orig_mod.{name}": value for name, value in weights.items()}

    fs.load_weights(tmp_path / "run", right := net(), "last")
    state["model"] = wrapped(state["model"])
    state["plateau"]["best"]["model"] = wrapped(state["plateau"]["best"]["model"])
    for one in checkpoints(tmp_path / "run/checkpoints"):
        shutil.rmtree(one.path)
    save_checkpoint(tmp_path / "run/checkpoints", wrapped(weights_of(right)), state, 8, None)
    fs.load_weights(tmp_path / "run", loaded := net(), "last")
    assert_same_weights(loaded, right)
    export(tmp_path / "run", tmp_path / "given", "last", say=lambda text: None)
    assert sorted(read_weights(tmp_path / "given/model.safetensors")) == sorted(NAMES)
    load_export(tmp_path / "given", loaded := net("whole"))
    assert_same_weights(loaded, right)
    assert_same_weights(trained("whole", tmp_path / "run", 4), whole)


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: compiled(loss)])
def test_a_compiled_criterion_counts_as_the_plain_one(wrap):
    loss = wrap(nn.CrossEntropyLoss(torch.tensor([1.0, 3.0]), ignore_index=7, label_smoothing=0.2))
    features, labels = data(1)[0]
    labels[2] = 7
    model = net()
    result = fs.TrainStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))((features, labels))
    assert float(result.count) == float(torch.tensor([1.0, 3.0])[labels[labels != 7]].sum())
    smoothed = fs.evaluate(model, [(features, labels)], nn.CrossEntropyLoss(torch.tensor([1.0, 3.0]), ignore_index=7))
    assert fs.evaluate(model, [(features, labels)], loss) == smoothed
    assert loss.label_smoothing == 0.2
    squares = compiled(nn.functional.mse_loss)
    assert fs.evaluate(model, [(features, torch.zeros(6, 2))], squares)["count"] == 12


def test_names_that_are_reported():
    model = net("both")
    five = fs.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert [layer.name for layer in layers_of(five)] == ["0.0", "1"]
    model._orig_mod[1].weight.data[0, 0] = torch.nan
    with pytest.raises(fs.NonFiniteError) as caught:
        five(data(1)[0])
    assert caught.value.details["parameters"]["names"] == ["1.weight"]
    assert caught.value.details["origin"]["name"] == "1"
    assert freeze(net("both"), ["0.0.*"]) == 16
    (spared,) = build_optimizer(net("both"), "sgd", 0.1, no_decay=["0.0.*"]).param_groups[1:]
    assert len(spared["params"]) == 2
