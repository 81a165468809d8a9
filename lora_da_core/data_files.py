"""What a data file may be: UTF-8, no archive, which is unpacked unasked, and nested no deeper than its reader bears."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lora_da_core.errors import DataError

DEEPEST = 256
"""Most levels of nested JSON. Arrow's reader recurses without a limit of its own: some ten thousand end the process."""

_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
}
"""How files begin that `datasets` unpacks, whatever they are called."""

_TAR = (257, b"ustar")
_JSON = (".json", ".jsonl")
_TEXT = (*_JSON, ".csv")
_CHUNK = 2**24
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_data(path: Path) -> None:
    """Refuses a data file, or a directory that holds one, that is an archive, not UTF-8 or nested too deeply.

    Args:
        path: A file or a directory.

    Raises:
        DataError: Naming the file.
    """
    for file in _files(path):
        try:
            kind = _archive(file)
            if kind is not None:
                raise DataError(f"data file '{file}' is a {kind} archive; unpack it and give what it holds.")
            if file.suffix.lower() in _TEXT:
                _check_encoding(file)
            if file.suffix.lower() in _JSON and _depth(file) > DEEPEST:
                raise DataError(f"data file '{file}' is nested deeper than {DEEPEST} levels; rows hold text.")
        except OSError as error:
            raise DataError(f"data file '{file}' cannot be read: {error.strerror or error}.") from error


def _files(path: Path) -> Iterator[Path]:
    """The file, or all regular files below the directory; links to directories are not followed."""
    return (file for file in sorted(path.rglob("*")) if file.is_file()) if path.is_dir() else iter([path])


def _archive(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(512)
    start, tar = _TAR
    if head[start : start + len(tar)] == tar:
        return "tar"
    return next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None)


def _check_encoding(path: Path) -> None:
    """Refuses text in another encoding than UTF-8, which readers pass on until a row is looked at."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place = before - pending + error.start
                raise DataError(
                    f"data file '{path}' is not UTF-8 at byte {place}; convert it, for instance by "
                    "'iconv -f LATIN1 -t UTF-8', and give the result."
                ) from error
            if not chunk:
                return
            before += len(chunk)


def _depth(path: Path) -> int:
    """How deeply brackets nest outside of strings, over the whole file: within a value a line break ends nothing."""
    level, deepest, rest = 0, 0, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            bare = _STRING.sub(b"", rest + chunk)
            quote = bare.find(b'"')  # a string that goes on in the next chunk
            bare, rest = (bare, b"") if quote < 0 else (bare[:quote], bare[quote:])
            brackets = np.frombuffer(bare.translate(None, delete=_NO_BRACKETS), dtype=np.uint8)
            if len(brackets):
                opening = (brackets == ord("[")) | (brackets == ord("{"))
                levels = level + np.cumsum(np.where(opening, 1, -1))
                level, deepest = int(levels[-1]), max(deepest, int(levels.max()))
    return deepest
