"""A run's directory: a stock PEFT adapter and its report, there completely or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from lora_da_core.errors import StorageError
from lora_da_core.types import LayerReport, RunReport

REPORT_FILE = "lora_da_report.json"
SETTINGS_FILE = "lora_da_config.json"
ADAPTER_CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT writes of an adapter."""
LARGEST_JSON = 2**26
"""Bytes of the largest report or settings that are read; those of a thousand layers have two million."""

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_SUFFIX = ".partial"
"""How the names of temporary siblings end."""
_NEW, _OLD = "new", "old"
"""What a temporary sibling holds: the directory that is being written, and the one that it replaces."""


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Refuses an output directory that cannot be written, before any work.

    Args:
        directory: Where the run will be written.
        overwrite: Whether an earlier run there may be replaced.

    Raises:
        StorageError: It is a file, holds something that is not an earlier run, or may not be replaced.
    """
    check_writable(directory)
    if directory.exists():
        # What replaces it is written beside it.
        _try_writing(directory.absolute().parent, f"{directory} cannot be replaced: ")
    settle_leftovers(directory)
    if directory.exists() and any(directory.iterdir()):
        if not overwrite:
            raise StorageError(f"{directory} exists and is not empty; give another directory, or --overwrite.")
        if not (directory / REPORT_FILE).exists():
            raise StorageError(f"{directory} holds no earlier run of lora-da, so it is not overwritten.")


def save_run(
    directory: Path,
    write_adapter: Callable[[str], Any],
    report: RunReport,
    *,
    settings: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes adapter, report and settings: into a temporary sibling, flushed to disk, then renamed.

    Args:
        directory: Where the run belongs.
        write_adapter: Writes the adapter's files into the directory it is given, e.g. `PeftModel.save_pretrained`.
        report: The run's report.
        settings: Whatever made the run, JSON-representable.
        overwrite: Whether an earlier run there may be replaced.

    Raises:
        StorageError: Something cannot be written; nothing is left behind.
    """
    directory = directory.absolute()
    check_output(directory, overwrite=overwrite)

    def fill(fresh: Path) -> None:
        write_adapter(str(fresh))
        write_json(fresh / REPORT_FILE, report_to_json(report))
        write_json(fresh / SETTINGS_FILE, dict(settings))

    replace_directory(directory, fill)


def replace_directory(directory: Path, fill: Callable[[Path], None]) -> None:
    """Writes a directory completely or not at all: a temporary sibling, flushed to disk, then renamed.

    Args:
        directory: Where it belongs, absolute; what is there is replaced.
        fill: Writes the files into the directory it is given.

    Raises:
        StorageError: Something cannot be written; nothing is left behind.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _workspace(directory) as workspace:
            fresh, old = workspace / _NEW, workspace / _OLD
            fresh.mkdir()
            fill(fresh)
            _make_durable(fresh, mode=_usual_mode(workspace))
            _exchange(fresh, directory, old)
            _flush(directory.parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{directory} cannot be written: {error}") from error


def settle_leftovers(directory: Path) -> None:
    """Ends what a killed process began on a directory: a replacement that was complete is made, anything else removed.

    Whether a temporary sibling is in use is told by its lock, which ends with the process that holds it.

    Args:
        directory: What was to be replaced.

    Raises:
        StorageError: Something cannot be renamed.
    """
    directory = directory.absolute()
    for workspace in directory.parent.glob(f".{glob.escape(directory.name)}.*{_SUFFIX}"):
        random_part = workspace.name.removeprefix(f".{directory.name}.").removesuffix(_SUFFIX)
        # Another directory's, whose name begins as this one's does, has a dot there.
        if "." in random_part or not workspace.is_dir():
            continue
        with _locked(workspace, wait=False) as ours:
            if not ours:
                continue
            try:
                # Between the two renames of `_exchange`: what is new was flushed before.
                if (workspace / _OLD).exists() and not directory.exists():
                    (workspace / _NEW).rename(directory)
                    _flush(directory.parent)
            except OSError as error:
                raise StorageError(f"{directory} cannot be restored from {workspace}: {error}") from error
            shutil.rmtree(workspace, ignore_errors=True)


@contextlib.contextmanager
def _workspace(directory: Path) -> Iterator[Path]:
    """A temporary sibling, locked while it is in use and removed afterwards."""
    while True:
        workspace = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=_SUFFIX, dir=directory.parent))
        with _locked(workspace, wait=True) as ours:
            if not ours:  # somebody took it for a leftover before it was locked
                continue
            try:
                yield workspace
            finally:
                shutil.rmtree(workspace, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(workspace: Path, *, wait: bool) -> Iterator[bool]:
    """A lock on a directory, which ends with the process; False where another has it or the directory is gone."""
    try:
        descriptor = os.open(workspace, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = os.path.exists(workspace)
        except OSError:
            # Some file systems know no locks: then nobody can tell, and leftovers stay.
            held = wait
        yield held
    finally:
        os.close(descriptor)


def _usual_mode(workspace: Path) -> int:
    """The mode that the user's umask gives to a new file."""
    sample = workspace / "mode"
    sample.touch()
    return sample.stat().st_mode


def _make_durable(fresh: Path, *, mode: int) -> None:
    """Gives every file the usual mode (safetensors writes 0600), and flushes it to disk."""
    for path in [*fresh.rglob("*"), fresh]:
        if path.is_file():
            path.chmod(mode)
        _flush(path)


def _exchange(fresh: Path, directory: Path, old: Path) -> None:
    """Puts `fresh` in the directory's place; what was there comes back if that fails."""
    replaced = directory.exists()
    if replaced:
        directory.rename(old)
    try:
        fresh.rename(directory)
    except BaseException:  # Ctrl-C among them: what is in `old` goes with the workspace
        if replaced and not directory.exists():
            old.rename(directory)
        raise


def read_report(directory: Path) -> RunReport:
    """The report of a run.

    Args:
        directory: A directory that `save_run` wrote.

    Returns:
        The report.

    Raises:
        StorageError: There is none, or it is damaged.
    """
    path = directory / REPORT_FILE
    content = _read_json(path)
    try:
        return report_from_json(_without_controls(content))
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from error


def read_settings(directory: Path) -> dict[str, Any]:
    """The settings of a run.

    Args:
        directory: A directory that `save_run` wrote.

    Returns:
        What was given to `save_run`.

    Raises:
        StorageError: There are none, or they are damaged.
    """
    settings = _read_json(directory / SETTINGS_FILE)
    if not isinstance(settings, dict):
        raise StorageError(f"{directory / SETTINGS_FILE} is not a settings file.")
    return settings


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The configuration of a saved PEFT adapter.

    Args:
        directory: The adapter's directory.

    Returns:
        Its values; texts do nothing to a terminal that they are shown on.

    Raises:
        StorageError: There is none, or it is damaged.
    """
    config = _without_controls(_read_json(directory / ADAPTER_CONFIG_FILE))
    if not isinstance(config, dict):
        raise StorageError(f"{directory / ADAPTER_CONFIG_FILE} is no adapter's configuration.")
    return config


def report_to_json(report: RunReport) -> dict[str, Any]:
    """The report as JSON values; what is not finite becomes null."""
    cleaned = _finite_or_none(asdict(report))
    assert isinstance(cleaned, dict)
    return cleaned


def report_from_json(data: Any) -> RunReport:
    """The inverse of `report_to_json`.

    Args:
        data: Parsed JSON.

    Returns:
        The report.

    Raises:
        StorageError: A field is missing or unknown.
    """
    try:
        layers = tuple(_layer_from_json(layer) for layer in data["layers"])
        rest = {key: value for key, value in data.items() if key != "layers"}
        values = _fields_from_json(RunReport, rest)
        _check_allocation(values.get("allocation", {}))
        return RunReport(layers=layers, **values)
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise StorageError(f"this is not a lora-da report: {why}.") from error


def _check_allocation(allocation: Mapping[str, Any]) -> None:
    """Refuses an allocation that no run writes: what of it is shown must be there, and be numbers."""
    if allocation and not isinstance(allocation["unit"], str):
        raise TypeError("allocation: its unit is no text")
    for name in ("spent", "budget", "gain", "configured_gain") if allocation else ():
        if not isinstance(allocation[name], (int, float)):
            raise TypeError(f"allocation: its {name} is no number")


def _layer_from_json(data: Mapping[str, Any]) -> LayerReport:
    return LayerReport(**_fields_from_json(LayerReport, data))


def _fields_from_json(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a report's fields, each of the type that the class says."""
    hints, values = get_type_hints(cls), dict(data)
    for entry in fields(cls):
        if entry.name in values:
            try:
                values[entry.name] = _value_from_json(hints[entry.name], values[entry.name])
            except TypeError as error:
                raise TypeError(f"{entry.name}: {error}") from error
    return values


def _value_from_json(hint: Any, value: Any) -> Any:
    """The inverse of `_finite_or_none` for a type; what was not finite is NaN."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value_from_json(inner[0], each) for each in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: _value_from_json(inner[1], each) for key, each in value.items()}
    if hint is float and (value is None or (isinstance(value, int) and not isinstance(value, bool))):
        return math.nan if value is None else float(value)
    if origin is not None or not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        raise TypeError(f"a {type(value).__name__} where a {getattr(hint, '__name__', hint)} belongs")
    return value


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite_or_none(inner) for key, inner in value.items()}
    return [_finite_or_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _without_controls(value: Any) -> Any:
    """JSON values whose texts do nothing to a terminal that they are shown on."""
    if isinstance(value, str):
        return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {_without_controls(key): _without_controls(inner) for key, inner in value.items()}
    return [_without_controls(inner) for inner in value] if isinstance(value, list) else value


def check_writable(directory: Path) -> None:
    """Refuses a directory that cannot be made or written into, before any work.

    Args:
        directory: Where something will be written.

    Raises:
        StorageError: It is a file or a link to nothing, or it or the nearest parent that exists is not writable.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise StorageError(f"{directory} is a file; give a directory.")
        if directory.is_symlink() and not directory.exists():
            raise StorageError(f"{directory} is a link to what does not exist; give a directory.")
        parents = [directory.absolute(), *directory.absolute().parents]
        parent = next(parent for parent in parents if parent.exists())
        if not parent.is_dir():
            raise StorageError(f"{directory} cannot be created: {parent} is a file; give another directory.")
    except (OSError, ValueError) as error:  # a name that the file system does not take
        raise StorageError(f"{directory} cannot be created: {error}") from error
    _try_writing(parent, "" if parent == parents[0] else f"{directory} cannot be created: ")


def _try_writing(parent: Path, consequence: str) -> None:
    """Asked by doing, as permissions do not tell that a file system takes no directories."""
    try:
        Path(tempfile.mkdtemp(prefix=".lora-da-", dir=parent)).rmdir()
    except OSError as error:
        raise StorageError(f"{consequence}{parent} is not writable; give another directory.") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value, which must hold finite numbers alone."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise StorageError(f"{path} is larger than any that is written.")
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StorageError(f"{path} does not exist; give a directory that 'lora-da init' wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {error}; run 'lora-da init' again.") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
