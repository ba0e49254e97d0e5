"""A model in shards: each process writes its own, all read them; built by process 0 alone."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

import fivestep as fs
from fivestep.run.checkpoint import DamagedError, checkpoints, load_checkpoint, load_state
from fivestep.run.export import export, read_weights
from tests.processes import memory, shards
from tests.processes.launched import started, torchrun

pytestmark = pytest.mark.multiprocess
FILES = {f"{kind}-0000{n}-of-00002.safetensors" for kind in ("model", "state") for n in (1, 2)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What two processes told, and the run that they left when one was killed while it saved."""
    folder = tmp_path_factory.mktemp("shards")
    done = started(2, shards.__file__, folder / "told.json", folder / "run")
    assert (folder / "told.json").exists(), done.stderr
    assert done.returncode != 0
    return json.loads((folder / "told.json").read_text()), folder / "run", done.stderr


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def alone():
    return [loss for _, loss in shards.steps(shards.job(), 2 * shards.STEPS)]


def test_built_in_process_0_alone_it_trains_as_in_one(made, alone):
    assert made[0]["dtypes"] == ["torch.float64"]
    assert made[0]["losses"] == pytest.approx(alone[: shards.STEPS], rel=1e-12)


def test_shards_stay_as_they_are_where_copies_travel_in_half_precision(made):
    assert made[0]["bf16"] == ["torch.float32"]


def test_what_has_no_values_anywhere_is_refused(made):
    assert "on the device meta" in made[0]["nobody"]
    assert "parallel='fsdp'" in made[0]["ddp"]
    with pytest.raises(fs.UsageError, match="on the device meta, so it has no values"):
        shards.steps(shards.job(meta=True), 1)


def test_blocks_that_are_computed_again_change_no_bit(made):
    plain, again, plain_ddp, again_ddp = made[0]["twice"]
    assert plain == again and plain_ddp == again_ddp
    assert plain == pytest.approx(plain_ddp, rel=1e-12)


def test_one_process_that_cannot_write_is_told_by_all(made):
    told, _, _ = made
    assert len(told["failing"]) == 2
    assert all("rank 1 on" in one and "No space left" in one for one in told["failing"])
    assert told["left"] == ["step-00000005", "step-00000010"]


def test_killed_while_it_writes_nothing_counts(made):
    _, run, _ = made
    assert [one.step for one in checkpoints(run / "checkpoints")] == [5, 10]


def test_no_file_but_safetensors_and_json(made):
    for one in checkpoints(made[1] / "checkpoints"):
        assert {path.name for path in one.path.iterdir()} == FILES | {"state.json", "manifest.json"}
        for name in FILES:
            content = (one.path / name).read_bytes()
            begin = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:begin])
            spans = sorted(value["data_offsets"] for key, value in header.items() if key != "__metadata__")
            assert spans[0][0] == 0 and spans[-1][1] == len(content) - begin, "nothing lies between or behind tensors"
            assert all(left[1] == right[0] for left, right in pairwise(spans))
        for name in ("state.json", "manifest.json"):
            json.loads((one.path / name).read_bytes())


def test_torchs_own_loading_reads_them(made):
    from torch.distributed import checkpoint as dcp

    newest = checkpoints(made[1] / "checkpoints")[-1]
    ours = load_state(newest)["model"]
    theirs = {f"model.{name}": torch.empty_like(value) for name, value in ours.items()}
    with pytest.warns(UserWarning):  # that there is one process
        dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(newest.path)))
    for name, value in ours.items():
        assert torch.equal(theirs[f"model.{name}"], value), name


def test_it_goes_on_alone(run, alone):
    told = []
    with fs.Run(run, say=told.append) as again:
        found = [loss for _, loss in shards.steps(shards.job(), 2 * shards.STEPS, again)]
    assert found == pytest.approx(alone[shards.STEPS :], rel=1e-12)
    assert not list((run / "checkpoints").glob(".*")), "what the killed one left is cleared away"
    assert {path.name for path in checkpoints(run / "checkpoints")[-1].path.iterdir()} > {"model.safetensors"}


def test_damage_is_named_and_the_one_before_it_taken(run, alone):
    newest = checkpoints(run / "checkpoints")[-1]
    file = newest.path / "state-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    file.unlink()
    with pytest.raises(DamagedError, match=r"state-00002-of-00002\.safetensors cannot be read"):
        load_state(newest)
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=r"state-00002-of-00002\.safetensors is damaged"):
        load_state(newest)
    told = []
    with fs.Run(run, say=told.append) as again:
        found = [loss for _, loss in shards.steps(shards.job(), shards.STEPS, again)]
    assert "state-00002-of-00002.safetensors is damaged" in told[0]
    assert found == pytest.approx(alone[5 : shards.STEPS], rel=1e-12)


def test_the_weights_are_the_averaged_ones_and_exported_whole(made, tmp_path):
    newest = checkpoints(made[1] / "checkpoints")[-1]
    model = shards.job()[0]
    load_checkpoint(newest, model)
    state = load_state(newest)
    for kept, weight in zip(state["average"]["weights"], model.parameters(), strict=True):
        assert torch.equal(kept, weight)
    assert any(not torch.equal(value, model.state_dict()[name]) for name, value in state["model"].items())
    export(made[1], tmp_path / "out", "last")
    plain = load_file(tmp_path / "out" / "model.safetensors")
    assert plain.keys() == read_weights(tmp_path / "out" / "model.safetensors").keys() == model.state_dict().keys()
    assert all(torch.equal(plain[name], value) for name, value in model.state_dict().items())
    other = shards.job()[0]
    assert fs.load_weights(tmp_path / "out", other) == shards.STEPS
    assert all(torch.equal(one, two) for one, two in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.torture
def test_others_read_their_own_shards_of_them(run, alone, tmp_path):
    done = started(3, shards.__file__, tmp_path / "told.json", run, "on")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "told.json").read_text())
    assert found == pytest.approx(alone[shards.STEPS :], rel=1e-12)
    assert len(list(checkpoints(run / "checkpoints")[-1].path.iterdir())) == 2 * 3 + 2


@pytest.mark.torture
def test_each_process_holds_about_its_share(tmp_path):
    out, own = tmp_path / "held.json", {"MALLOC_MMAP_THRESHOLD_": "131072"}
    for steps in (2, 3):  # the second start reads what the first wrote
        done = torchrun(2, memory.__file__, out, tmp_path / "run", "fsdp", steps, "meta", **own)
        assert done.returncode == 0, done.stderr
        print(found := json.loads(out.read_text()))
        for one in found:
            weights = one["MiB of weights"]
            assert one["saves"] - one["trains"] < 1.6 * weights, "its part of weights and two moments: half of three"
            assert steps == 2 or one["begins"] < one["saves"]
        assert steps == 3 or found[1]["begins"] < 0.9 * found[1]["MiB of weights"], "it never held the whole model"
