"""The directory of a grid: one line per finished cell that survives any crash, and what made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from lora_da_core.errors import StorageError
from lora_da_core.sources import local_path
from lora_da_core.storage import file_digest

Record = dict[str, Any]
"""One cell's line: settings, status, costs, fidelity, loss curves."""

RESULTS: Final = "results.jsonl"
PARQUET: Final = "results.parquet"
RUN: Final = "run.json"
LOCK: Final = ".lock"

DONE: Final = "done"
FAILED: Final = "failed"

PACKAGES: Final = ("lora-da-core", "torch", "transformers", "peft", "datasets", "numpy", "scipy")


class Results:
    """`results.jsonl` of a directory: appended to and flushed to disk cell by cell."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / RESULTS

    def read(self) -> list[Record]:
        """The last record of every cell, in the order they were first written.

        Returns:
            The records; a torn last line is not among them.

        Raises:
            StorageError: A line that is not the last is damaged.
        """
        records: dict[str, Record] = {}
        for number, line in enumerate(self._whole_lines(), 1):
            try:
                record = json.loads(line)
                records[record["cell"]] = record
            except (ValueError, TypeError, KeyError) as error:
                raise StorageError(f"{self.path} line {number} is not a record: {error}; delete that line.") from error
        return list(records.values())

    def drop_torn_line(self) -> bool:
        """Cuts off what a crash left of a line; to be called before anything is appended.

        Returns:
            Whether there was one.
        """
        if not self.path.exists():
            return False
        with self.path.open("rb+") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end == len(content):
                return False
            file.truncate(end)
            _to_disk(file.fileno())
        return True

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line in one piece, and has it on the disk before it returns.

        Args:
            record: JSON values; what is not finite becomes null.

        Raises:
            StorageError: It cannot be written.
        """
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.write(descriptor, line) != len(line):
                    raise StorageError(f"{self.path} cannot be written: the disk is full.")
                _to_disk(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error}") from error

    def _whole_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a second run out of the directory; the lock goes with the process, however that ends.

    Args:
        directory: It must exist.

    Raises:
        StorageError: Another process is at work there.
    """
    if sys.platform == "win32":
        import msvcrt

        def hold(descriptor: int) -> None:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        def hold(descriptor: int) -> None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    with (directory / LOCK).open("a+b") as file:
        try:
            hold(file.fileno())
        except OSError as error:
            raise StorageError(
                f"another run is writing to {directory}; wait for it, or give another --output."
            ) from error
        yield


def write_run(directory: Path, entry: Mapping[str, Any]) -> None:
    """Writes `run.json`; what an earlier, different grid had there is kept under `earlier`.

    Args:
        directory: The directory.
        entry: Versions, configuration, seeds, fingerprints.

    Raises:
        StorageError: The file there is damaged, or the same model or data set has changed since.
    """
    before = read_run(directory)
    fresh = json.loads(json.dumps(finite(dict(entry)), allow_nan=False))
    earlier: list[Any] = []
    if before is not None:
        earlier = before.pop("earlier", [])
        for past in [before, *earlier]:
            _same_content(directory, past, fresh)
        if before != fresh:
            earlier = [before, *earlier]
    if before != fresh:
        write_json(directory / RUN, {**fresh, "earlier": earlier})


def read_run(directory: Path) -> dict[str, Any] | None:
    """`run.json`, or None where there is none.

    Args:
        directory: The directory.

    Returns:
        Its content.

    Raises:
        StorageError: It is damaged.
    """
    try:
        content = json.loads((directory / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(f"{directory / RUN} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{directory / RUN} is not a run's record; give another directory.")
    return content


def _same_content(directory: Path, past: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for kind in ("model", "data", "source"):
        old, new = past.get(kind, {}), now.get(kind, {})
        same_source = all(old.get(key) == new.get(key) for key in ("source", "split", "dtype"))
        if same_source and old.get("fingerprint") != new.get("fingerprint"):
            raise StorageError(
                f"{kind} {new['source']!r} has changed since {directory} was begun (its fingerprint differs), so the "
                "cells would not be comparable. Give another --output."
            )


def data_fingerprint(source: str, rows: Any) -> str:
    """SHA-256 of a file's (or a directory's files') bytes, or the fingerprint of a data set from the hub.

    Args:
        source: What it was read from.
        rows: What was read.

    Returns:
        A text that changes with the content.
    """
    path = local_path(source)
    if not path.exists():
        return str(getattr(rows, "_fingerprint", ""))
    if path.is_file():
        return file_digest(path)
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    listing = "".join(f"{file.relative_to(path)} {file_digest(file)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of everything whose change may change a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def write_parquet(directory: Path, records: Sequence[Record]) -> None:
    """Writes `results.parquet`, one row per record; what has parts of its own is written as JSON text.

    Args:
        directory: The directory.
        records: At least one.
    """
    import pyarrow
    from pyarrow import parquet

    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {name: [_flat(record.get(name)) for record in records] for name in names}
    for values in columns.values():
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1:
            as_one = float if kinds <= {int, float} else str
            values[:] = [None if value is None else as_one(value) for value in values]
    temporary = directory / f".{PARQUET}"
    parquet.write_table(pyarrow.table(columns), temporary)
    temporary.replace(directory / PARQUET)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary sibling, so that the file is there completely or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file through a temporary sibling.

    Args:
        path: The file.
        content: Its bytes.

    Raises:
        StorageError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            _to_disk(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error


def finite(value: Any) -> Any:
    """JSON values, with null for what is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _flat(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def _to_disk(descriptor: int) -> None:
    os.fsync(descriptor)
