"""What a check of a preflight says: a verdict, the figure it rests on, and what to do.

Owns the four verdicts and their words. Knows no check.
"""

from dataclasses import dataclass

OK, WARNING, FAILED, LEFT_OUT = "ok", "warning", "failed", "not applicable"


@dataclass(frozen=True)
class Finding:
    """One check's answer; the remedy is one line, empty where there is nothing to do."""

    verdict: str
    figure: str
    remedy: str = ""


def ok(figure: str, remark: str = "") -> Finding:
    """Nothing to do; a remark may be worth a try."""
    return Finding(OK, figure, remark)


def warning(figure: str, remedy: str) -> Finding:
    """True, and worth knowing; the job may still be as it should be."""
    return Finding(WARNING, figure, remedy)


def failed(figure: str, remedy: str) -> Finding:
    """The job is not what it seems to be."""
    return Finding(FAILED, figure, remedy)


def left_out(why: str) -> Finding:
    """The check has nothing to say here."""
    return Finding(LEFT_OUT, why)


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def share(value: float) -> str:
    """`0.0123` -> `1.23 %`."""
    return f"{100 * value:.3g} %"


def listed(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def seconds(value: float) -> str:
    """`0.0123` -> `12.3 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"
