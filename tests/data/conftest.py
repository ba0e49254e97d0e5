"""The real text beside the repository; a test that wants it is skipped where it is absent."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def shakespeare() -> Path:
    return _present(SHARED / "tinyshakespeare" / "input.txt")


@pytest.fixture
def wikitext() -> Path:
    return _present(SHARED / "wikitext2-small")


def _present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"the real text {path} is not on this machine")
    return path
