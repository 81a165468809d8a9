"""What a user may name as a source: a path or an id; settings files; and the one line that says why not."""

from __future__ import annotations

import difflib
import json
import socket
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

LARGEST_SETTINGS = 2**16
"""Bytes of the largest file of settings that is read; dotted keys take time that grows with the square of theirs."""

_UNREACHABLE = (ConnectionError, TimeoutError, socket.gaierror)
"""What a machine without a network says, in words that do not mention it."""


def looks_like_path(source: str, suffixes: Collection[str]) -> bool:
    """Whether a name that is no existing path was meant as one, and not as an id on the hub.

    >>> looks_like_path("openai/gsm8k", [".jsonl"]), looks_like_path("dat/rows.jsonl.gz", [".jsonl"])
    (False, True)

    Args:
        source: What the user wrote.
        suffixes: Suffixes of the files that are read, lower case.
    """
    if not source or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        return True
    return any(suffix.lower() in suffixes for suffix in Path(source).suffixes)


def missing(kind: str, source: str | Path, suffixes: Collection[str]) -> str:
    """What to say of a path that does not exist, and of an address, which is no path.

    >>> missing("model", "https://hub.example/acme/small", [])
    "model 'https://hub.example/acme/small' is an address; give the id of what is on the hub, or download it first."

    Args:
        kind: What it is a source of.
        source: What the user wrote.
        suffixes: Files of these suffixes are named where no name is similar.
    """
    if "://" in str(source):
        return f"{kind} '{source}' is an address; give the id of what is on the hub, or download it first."
    return f"{kind} '{source}' does not exist. {_nearby(local_path(source), suffixes)}"


def _nearby(path: Path, suffixes: Collection[str]) -> str:
    if not is_kind(path.parent, "directory"):
        return f"There is no folder '{path.parent}'."
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not close:
        close = [name for name in names if Path(name).suffix.lower() in suffixes][:3]
    return f"In that folder there is: {', '.join(close)}." if close else "Nothing in that folder comes close."


def reason(error: BaseException) -> str:
    """One line that says why: the innermost cause, which names the fault and not the step that met it.

    >>> reason(ConnectionRefusedError("Connection refused"))
    'the network cannot be reached: Connection refused.'
    """
    error = _innermost(error)
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    if isinstance(error, _UNREACHABLE):
        text = f"the network cannot be reached: {text}"
    return text if text.endswith((".", "!")) else f"{text}."


def is_unreachable(error: BaseException) -> bool:
    """Whether what an error was raised from is that the network cannot be reached."""
    return isinstance(_innermost(error), _UNREACHABLE)


def asked_of_hub(kind: str, source: str | Path, suffixes: Collection[str]) -> tuple[str, ...]:
    """What to say before a source is looked for, which takes long where the network is dead; nothing of a path.

    >>> asked_of_hub("model", "./here", [".gguf"])
    ()

    Args:
        kind: What it is a source of.
        source: What the user wrote.
        suffixes: Suffixes of the files that are read, lower case.

    Returns:
        A sentence, or none.
    """
    path = local_path(source)
    if is_kind(path, "file") or is_kind(path, "directory") or looks_like_path(str(source), suffixes):
        return ()
    return (f"looking for {kind} '{source}' on the hub; without a network, giving up can take a minute",)


def _innermost(error: BaseException) -> BaseException:
    while (cause := _cause(error)) is not None:
        error = cause
    return error


def _cause(error: BaseException) -> BaseException | None:
    """What an error was raised from; HTTP clients hide that it was a socket's."""
    context = error.__context__
    return error.__cause__ or (context if isinstance(context, _UNREACHABLE) else None)


def read_settings_file(path: Path) -> Any:
    """The content of a TOML file, or of a JSON file by its suffix.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, no UTF-8, malformed, or nested deeper than its parser goes.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST_SETTINGS + 1)
    if len(content) > LARGEST_SETTINGS:
        raise ValueError(f"it is larger than {LARGEST_SETTINGS} bytes")
    text = content.decode("utf-8-sig")  # editors of Windows begin a file with a mark
    try:
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def local_path(source: str | Path) -> Path:
    """The path that a source would have on this machine; `~` is the home of its user, where there is such a user."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def is_kind(path: Path, kind: str) -> bool:
    """Whether a path is a `"file"` or a `"directory"`; a name that no file system takes is neither."""
    try:
        return path.is_file() if kind == "file" else path.is_dir()
    except (OSError, ValueError):
        return False
