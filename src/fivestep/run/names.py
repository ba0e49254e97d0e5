"""The names of a run's files, for all that reads or writes them. Imports no other part."""

import shlex

CONFIG, ENVIRONMENT, TOKENIZER, METRICS = "config.toml", "environment.json", "tokenizer.json", "metrics.jsonl"
SAVED = "checkpoints/step-*/manifest.json"  # its checkpoints


def printable(text: str) -> str:
    """Return `text` with what would move the cursor, break the line or turn its direction shown as an escape."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode()


def shell_word(path: object) -> str:
    """Return `path` as a shell reads it in a command: quoted, and never taken for a flag."""
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if text.isprintable():
        return shlex.quote(text)
    escaped = "".join(_quoted(c) for c in text)
    return f"$'{escaped}'"  # bash, zsh and ksh read it


def _quoted(character: str) -> str:
    if character in "'\\":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
