"""What the README says of the package's names is so. Its commands and its Python are run by `tests/docs`."""

from pathlib import Path

import fivestep as fs

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_public_name_is_there():
    for name in fs.__all__:
        assert getattr(fs, name) is not None
        assert name in README or name.endswith("Error") or name in ("State", "warmup_linear"), name
