"""A grid file's [run] table, and the tables within it, to settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Final

from lora_da_core.ablation.settings import FinetuneSettings, RunSettings, SourceSettings
from lora_da_core.errors import OptionError

INNER: Final[Mapping[str, type[Any]]] = {"finetune": FinetuneSettings, "source": SourceSettings}
"""Tables within [run]."""


def run_settings(where: str, table: Mapping[str, Any]) -> RunSettings:
    """The settings that a table gives.

    Args:
        where: What error messages call it, `… [run]`.
        table: Its content.

    Returns:
        The settings.

    Raises:
        OptionError: A name is unknown, something is missing, or a value is out of range.
    """
    values = dict(table)
    for name, cls in INNER.items():
        inner = values.get(name)
        if inner is not None:
            if not isinstance(inner, Mapping):
                raise OptionError(f"{where} {name} is {inner!r}; write a [run.{name}] table.")
            values[name] = _made(f"{where[:-1]}.{name}]", cls, inner)
    made = _made(where, RunSettings, values)
    assert isinstance(made, RunSettings)
    return made


def _made(where: str, cls: type[Any], table: Mapping[str, Any]) -> Any:
    known(where, table, tuple(entry.name for entry in fields(cls)))
    missing = [
        entry.name
        for entry in fields(cls)
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in table
    ]
    if missing:
        raise OptionError(f"{where}: {', '.join(missing)} must be given.")
    for name in ("seeds", "learning_rates", "eval_steps"):
        if name in table and not isinstance(table[name], (list, tuple)):
            raise OptionError(f"{where}: {name} is {table[name]!r}; write a list.")
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error


def known(where: str, table: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses keys that are none of the names.

    Args:
        where: What the error calls the table.
        table: The table.
        names: What it may hold.

    Raises:
        OptionError: It holds another key.
    """
    for key in table:
        if key not in names:
            raise OptionError(f"{where}: unknown key {key!r}.{hint(key, names)}")


def hint(word: str, names: Sequence[str]) -> str:
    """The names that are close to a word, and all of them, as the end of an error message."""
    close = difflib.get_close_matches(word, names, n=2)
    meant = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    return f"{meant} Known: {', '.join(names)}."
