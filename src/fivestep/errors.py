"""The errors that fivestep raises on purpose, each with the exit code of the command line.

Owns the exception types and the "did you mean" helper. Does not print and does not exit: `cli.py` does.
A message is one sentence or two: what was given, what is allowed, what to change.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class FivestepError(Exception):
    """An error that was foreseen; the command line shows its message without a traceback."""

    exit_code = 1


class UsageError(FivestepError, ValueError):
    """Bad usage, configuration or data: the caller can mend it."""

    exit_code = 2


class ProcessError(FivestepError):
    """Another process failed; the message names it."""


class NonFiniteError(FivestepError, ArithmeticError):
    """A loss or gradient was not finite; the update was not applied.

    details: what was found, as JSON can hold it: step, epoch, batches, where, loss, grad_norm, and which gradients,
    parameters, buffers, inputs and module were not finite.
    """

    exit_code = 3

    def __init__(self, message: str, details: dict[str, Any] | None = None):
        super().__init__(message)
        self.details = details or {}


def named(value: object) -> str:
    """`value` for a sentence: a number or text as it is, anything larger by its type's name."""
    if isinstance(value, str | int | float | None):
        return repr(value)
    return value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"


def brief(error: BaseException, most: int = 300) -> str:
    """What an error says, in one printable line of at most `most` characters: it may quote a damaged file."""
    text = " ".join(str(error)[: 4 * most].split()) or type(error).__name__
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return `text` with control characters and changes of direction shown as escapes; new lines and tabs stay.

    Names of files, runs and metrics come from other people: a terminal must not obey what is in them.
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def suggestion(given: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed word, or an empty string."""
    near = get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
