"""The long form of tests/promises/test_07_damage.py: 10,000 random damages (FIVESTEP_DAMAGES for another number)."""

import os

import pytest

from tests.promises.test_07_damage import original, trials  # noqa: F401  (a fixture)

TRIALS = int(os.environ.get("FIVESTEP_DAMAGES", "10000"))


@pytest.mark.torture
@pytest.mark.parametrize("part", range(10))
def test_every_damage_is_detected(original, tmp_path, capsys, part):  # noqa: F811
    damaged = trials(original, tmp_path / "run", TRIALS // 10, part + 1, capsys)
    with capsys.disabled():
        print(f"\n{damaged:,} damages detected of {TRIALS // 10:,} trials")
    assert damaged > 0.97 * (TRIALS // 10)
