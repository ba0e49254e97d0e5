"""The site: `make docs`. Nothing is fetched; a warning is an error, and so is a reference that leads nowhere."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import fivestep

ARGUMENTS = r"[a-z_]+(?:, [a-z_]+)*"

project = "fivestep"
release = fivestep.__version__
copyright = "the fivestep maintainers"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fivestep"
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "special-members": "__call__"}

nitpicky = True
# Other packages' objects are named, not linked: their inventories would have to be fetched.
nitpick_ignore_regex = [
    ("py:class", r"fivestep\.data\.tokens\.JoinedIds"),  # a protocol of the floor below
    (r"py:.*", r"(?!fivestep\b).*"),
    (
        r"py:.*",
        r"fivestep\.(run\.config\.Config|data\.stream\.BatchT_co|data\.corpus\.Text|models\.cache\.Memory|watch\.screen\.Console|data\.reader\.Reader|loop\.copies\.Copies|loop\.settings\.Change)",
    ),
]


def as_restructured_text(app, what, name, obj, options, lines):
    """The docstrings are plain text that reads well with `help()`; this gives them the markup that they mean.

    `code` in single backticks, indented blocks as they are, and `argument: what it is` as a list.
    """
    if lines[:1] == ["Call self as a function."]:  # Python's own, where ours has none
        lines.clear()
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines[:] = [line for paragraph in paragraphs for line in [*_paragraph(paragraph), ""]]


def _paragraph(text):
    if text.startswith((" ", "\t")):
        return ["::", "", *("    " + line for line in text.splitlines())]
    done, listing = [], False
    for line in re.sub(rf"\. ({ARGUMENTS}: )", r".\n\1", text).splitlines():
        argument = re.match(rf"({ARGUMENTS}): ", line)
        if argument and (what := line[argument.end() :]):
            done += ["", f"- **{_escaped(argument[1])}**: {_marked(what)}"]
            listing = True
        elif line.startswith((" ", "\t")):
            done += ["", "::", "", "    " + line, ""]
        elif listing and not (done[-1].endswith(".") and line[:1].isupper()):
            done.append("  " + _marked(line))
        else:
            done += [*([""] if listing else []), _marked(line)]
            listing = False
    return done


def _marked(line):
    parts = re.split(r"`([^`]+)`", line)
    return "".join(_code(part) if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _code(text):
    return f":py:obj:`~fivestep.{text}`" if text in fivestep.__all__ else f"``{text}``"


def _escaped(text):
    return re.sub(r"([\\*|_`])", r"\\\1", text)


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text)
