"""What a user may name as a source: a path or an id; and the one line that says why it could not be read."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path


def looks_like_path(source: str, suffixes: Collection[str]) -> bool:
    """Whether a name that is no existing path was meant as one, and not as an id on the hub.

    >>> looks_like_path("openai/gsm8k", [".jsonl"]), looks_like_path("dat/rows.jsonl", [".jsonl"])
    (False, True)

    Args:
        source: What the user wrote.
        suffixes: Suffixes of the files that are read, lower case.
    """
    if not source or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        return True
    return Path(source).suffix.lower() in suffixes


def nearby(path: Path, suffixes: Collection[str]) -> str:
    """A sentence with what could have been meant by a path that does not exist.

    Args:
        path: The missing path.
        suffixes: Files of these suffixes are named where no name is similar.
    """
    if not path.parent.is_dir():
        return f"There is no folder '{path.parent}'."
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not close:
        close = [name for name in names if Path(name).suffix.lower() in suffixes][:3]
    return f"In that folder there is: {', '.join(close)}." if close else "Nothing in that folder comes close."


def reason(error: BaseException) -> str:
    """One line that says why: the innermost cause, which names the fault and not the step that met it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if text.endswith((".", "!")) else f"{text}."
