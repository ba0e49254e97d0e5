"""What earlier versions saved is read: the golden files of each version of the format, with every kind of state."""

from pathlib import Path

import pytest
import torch

from fivestep.run.checkpoint import VERSION, load_state, read_manifest, save_checkpoint
from tests.golden import make
from tests.same import assert_same_tree

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("version", [2, 4])
def test_each_version_is_read(version):
    checkpoint = read_manifest(GOLDEN / f"checkpoint-v{version}" / "step-00000007")
    assert (checkpoint.step, checkpoint.val_loss) == (make.STEP, make.VAL_LOSS)
    assert_same_tree(load_state(checkpoint), make.STATE)


def test_the_newest_is_what_this_version_writes(tmp_path):
    written = save_checkpoint(tmp_path, make.WEIGHTS, make.STATE, make.STEP, make.VAL_LOSS)
    for path in (GOLDEN / f"checkpoint-v{VERSION}" / "step-00000007").iterdir():
        assert path.read_bytes() == (written / path.name).read_bytes(), path.name


def test_same_is_strict():
    for left, right in [
        (1, 1.0),
        (0.0, -0.0),
        ((1,), [1]),
        (torch.zeros(1), torch.zeros(1).double()),
        ({"a": 1}, {}),
    ]:
        with pytest.raises(AssertionError):
            assert_same_tree(left, right)
