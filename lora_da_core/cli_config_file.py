"""The file of `--config`: its values become the defaults of the options that the command line does not give."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_da_core.errors import OptionError
from lora_da_core.sources import read_settings_file


def file_defaults(path: Path, known: Mapping[str, bool]) -> dict[str, Any]:
    """A file's values by parameter name, as the command line would give them.

    Args:
        path: A TOML file, or JSON such as an earlier run's `lora_da_config.json`.
        known: By parameter name, whether it is repeatable.

    Returns:
        The values of the parameters that the file names.

    Raises:
        OptionError: The file cannot be read, names what is unknown, or allows a model's code to run.
    """
    defaults: dict[str, Any] = {}
    for key, value in _parse_file(path).items():
        name = key.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0].replace('_', '-')!r}?" if close else ""
            raise OptionError(f"{path}: unknown option {key!r}.{hint} Run 'lora-da init --help' for all of them.")
        if name == "trust_remote_code":
            # A file that came with an adapter must not make a stranger's code run.
            if value is not False:
                raise OptionError(
                    f"{path}: {key!r} is taken from the command line alone; give --trust-remote-code there."
                )
            continue
        if name in defaults:
            raise OptionError(f"{path}: option {key!r} is given twice.")
        defaults[name] = _as_option(path, key, value, repeatable=known[name])
    return defaults


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        content = read_settings_file(path)
    except OSError as error:
        raise OptionError(f"--config {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise OptionError(
            f"--config {path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise OptionError(f"--config {path} holds no options by name.")
    return content


def _as_option(path: Path, key: str, value: Any, *, repeatable: bool) -> Any:
    if repeatable and isinstance(value, dict):
        return [f"{name}={_text(entry)}" for name, entry in value.items()]
    if repeatable:
        return [value] if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value) and key.endswith("modules"):
        return ",".join(value)
    if isinstance(value, (list, dict)):
        raise OptionError(f"{path}: option {key!r} takes one value, not a {type(value).__name__}.")
    return value


def _text(value: Any) -> str:
    """The value as an option KEY=VALUE gives it again; TOML's dates and times, which JSON has not, as text."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
