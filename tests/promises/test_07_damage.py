"""PAINS row 7: a damaged checkpoint is never accepted in silence: it is named, and the one before it is taken.

The peers accept one flipped bit in 60 to 96 of 100 cases. The long form, 10,000 damages, is in tests/torture.
"""

import random

import pytest

import fivestep as fs
from tests.promises.damage import Original, attached, check, damage
from tests.same import assert_same_tree

TRIALS = 200


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return Original(tmp_path_factory.mktemp("damage") / "run")


def test_random_damage_is_detected_named_and_gone_around(original, tmp_path, capsys):
    done = trials(original, tmp_path / "run", TRIALS, 0, capsys)
    assert done > 0.97 * TRIALS, "hardly a damage may change nothing"


def trials(original, folder, n, seed, capsys):
    """How many of `n` damages changed something; each is checked."""
    damaged = 0
    for number in range(n):
        chance = random.Random(f"{seed} {number}")
        original.write(folder)
        damaged += check(original, folder, damage(chance, folder), capsys)
    return damaged


def test_every_bit_of_the_manifest_and_the_headers(original, tmp_path, capsys):
    """Each byte of the newest manifest and of both headers, a bit of it flipped: always the checkpoint before."""
    folder, newest = tmp_path / "run", original.names[-1]
    original.write(folder)
    for file in ("manifest.json", "model.safetensors", "state.safetensors"):
        path = folder / "checkpoints" / newest / file
        content = path.read_bytes()
        end = len(content) if file == "manifest.json" else 8 + int.from_bytes(content[:8], "little")
        for at in range(0, end, 7):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            found = fs.Run(folder, say=(said := []).append).newest_sound()
            assert found["clock"]["step"] == 8, (file, at)
            assert f"{newest}/{file}" in said[0], (file, at, said)
        path.write_bytes(content)
    assert fs.Run(folder).newest_sound()["clock"]["step"] == 12


def test_without_damage_the_newest_is_taken(original, tmp_path):
    original.write(tmp_path / "run")
    assert_same_tree(attached(tmp_path / "run", said := []), original.states[original.names[-1]])
    assert len(said) == 1


@pytest.mark.parametrize("name", ["step-00000012-1", "step-00000013", "step-99999999999999999999", "best"])
def test_another_name(original, tmp_path, name):
    """Also one that a checkpoint of this very step could have: it says which of them is the newest."""
    original.write(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / original.names[-1]
    newest.rename(newest.with_name(name))
    assert_same_tree(attached(tmp_path / "run", said := []), original.states[original.names[-2]])
    assert name in said[0]
