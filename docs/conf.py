"""The site: `make docs`. Nothing is fetched; a warning is an error, and so is a reference that leads nowhere."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import fivestep

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
autodoc_default_options = {"members": True, "special-members": "__call__", "show-inheritance": False}

nitpicky = True
# Other packages' objects are named, not linked: their inventories would have to be fetched.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!fivestep\b).*"),
    (r"py:.*", r"fivestep\.data\.(order|tokenizer)\.(Int64Array|Ids)"),
    (r"py:.*", r"fivestep\.data\.stream\.BatchT_co"),
    (r"py:.*", r"fivestep\.run\.config\.Config"),
]


def as_restructured_text(app, what, name, obj, options, lines):
    """The docstrings are plain text that reads well with `help()`; this gives them the markup that they mean.

    `code` in single backticks, indented blocks as they are, and `argument: what it is` as a list.
    """
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines[:] = [line for paragraph in paragraphs for line in [*_paragraph(paragraph), ""]]


def _paragraph(text):
    if text.startswith((" ", "\t")):
        return ["::", "", *("    " + line for line in text.splitlines())]
    done = []
    for line in text.splitlines():
        argument = re.match(r"([a-z_]+(?:, [a-z_]+)*): ", line)
        if argument and (what := line[argument.end() :]):
            done += ["", f"- **{_escaped(argument[1])}**: {_marked(what)}"]
        elif any(one.startswith("- ") for one in done) and not line.startswith("Raises"):
            done.append("  " + _marked(line.strip()))
        elif line.startswith((" ", "\t")):
            done += ["", "::", "", "    " + line, ""]
        else:
            done += [*([""] if line.startswith("Raises") else []), _marked(line)]
    return done


def _marked(line):
    parts = re.split(r"`([^`]+)`", line)
    return "".join(f"``{part}``" if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _escaped(text):
    return re.sub(r"([\\*|_`])", r"\\\1", text)


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text)
