"""What data may be: UTF-8, no archive, which is unpacked unasked, nested no deeper than its reader bears; no model."""

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

_MODELS = ("config.json", "adapter_config.json")
_WEIGHTS = (".safetensors", ".bin", ".gguf")
"""What a directory of a saved model or adapter holds."""

_NO_SETTINGS = (".jsonl", ".csv", ".parquet")
"""Data files that no model is saved with."""

_TAR = (257, b"ustar")
_JSON = (".json", ".jsonl")
_TEXT = (*_JSON, ".csv")
_CHUNK = 2**24
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_data(path: Path) -> None:
    """Refuses a data file, or a directory that holds one, that is an archive, not UTF-8 or nested too deeply.

    A directory of a saved model without other data is refused as well: its JSON files would be read for rows.

    Args:
        path: A file or a directory.

    Raises:
        DataError: Naming the file.
    """
    if path.is_dir():
        _check_directory(path)
    for file in _files(path):
        try:
            kind = _archive(file)
            if kind is not None:
                raise DataError(f"data file '{file}' is a {kind} archive; unpack it and give what it holds.")
            if file.suffix.lower() in _TEXT:
                _check_text(file)
        except OSError as error:
            raise DataError(f"data file '{file}' cannot be read: {error.strerror or error}.") from error


def _check_directory(path: Path) -> None:
    names = sorted(entry.name for entry in path.glob("*"))
    settings = [name for name in names if name in _MODELS]
    weights = [name for name in names if Path(name).suffix in _WEIGHTS]
    if settings and weights and not any(file.suffix.lower() in _NO_SETTINGS for file in _files(path)):
        raise DataError(
            f"'{path}' holds a saved model ({settings[0]}, {weights[0]}) and no data; give a .jsonl, .json, .csv or "
            ".parquet file, a directory of such files, or the id of a data set on the hub."
        )


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


def _check_text(path: Path) -> None:
    encoding = _Encoding(path)
    nesting = _Nesting() if path.suffix.lower() in _JSON else None
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            encoding.read(chunk)
            if nesting is not None:
                nesting.read(chunk)
    encoding.read(b"", last=True)
    if nesting is not None and nesting.deepest > DEEPEST:
        raise DataError(f"data file '{path}' is nested deeper than {DEEPEST} levels; rows hold text.")


class _Encoding:
    """Refuses text in another encoding than UTF-8, which readers pass on until a row is looked at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._before = 0

    def read(self, chunk: bytes, *, last: bool = False) -> None:
        pending = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(chunk, final=last)
        except UnicodeDecodeError as error:
            place = self._before - pending + error.start
            raise DataError(
                f"data file '{self._path}' is not UTF-8 at byte {place}; convert it, for instance by "
                "'iconv -f LATIN1 -t UTF-8', and give the result."
            ) from error
        self._before += len(chunk)


class _Nesting:
    """How deeply brackets nest outside of strings, over the whole file: within a value a line break ends nothing."""

    def __init__(self) -> None:
        self.deepest = 0
        self._level = 0
        self._rest = b""

    def read(self, chunk: bytes) -> None:
        bare = _STRING.sub(b"", self._rest + chunk)
        quote = bare.find(b'"')  # a string that goes on in the next chunk
        bare, self._rest = (bare, b"") if quote < 0 else (bare[:quote], bare[quote:])
        brackets = np.frombuffer(bare.translate(None, delete=_NO_BRACKETS), dtype=np.uint8)
        if len(brackets):
            opening = (brackets == ord("[")) | (brackets == ord("{"))
            levels = self._level + np.cumsum(np.where(opening, 1, -1))
            self._level, self.deepest = int(levels[-1]), max(self.deepest, int(levels.max()))
