"""The command that installs an extra of this package, for whoever lacks one. Installs nothing."""

import json
import shlex
import sys
from pathlib import Path


def installing(extra: str) -> str:
    """`.venv/bin/pip install -e '.[plot]'` where the package came from a checkout, else with the package's name.

    Where it came from stands in direct_url.json, which installers leave (PEP 610).
    """
    from importlib import metadata  # these two are asked once, by whoever lacks an extra, and take long to import
    from urllib.request import url2pathname

    try:
        origin = json.loads(metadata.distribution("fivestep").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        origin = {}
    beside = Path(sys.executable).with_name("pip")
    pip = shown(beside) if sys.prefix != sys.base_prefix and beside.is_file() else "pip"
    scheme, _, place = origin.get("url", "").partition("://")
    checkout = Path(url2pathname(place))
    if scheme != "file" or not (checkout / "pyproject.toml").is_file():
        return f"{pip} install {shlex.quote(f'fivestep[{extra}]')}"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"{pip} install {editable}{shlex.quote(f'{shown(checkout)}[{extra}]')}"


def shown(path: Path) -> str:
    """A path as it is typed here: relative where it is within the current directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
