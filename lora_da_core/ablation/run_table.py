"""A grid file's [run] table, and the tables within it, to settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any, Final

from lora_da_core.ablation.axes import CAUSAL_LM, choice_of
from lora_da_core.ablation.settings import FinetuneSettings, RunSettings, SourceSettings
from lora_da_core.errors import OptionError
from lora_da_core.registry import Registry

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


def with_objective(where: str, registry: Registry, run: RunSettings) -> RunSettings:
    """The settings with all of the objective's options.

    Args:
        where: What error messages call the table.
        registry: The installed plugins.
        run: The settings as the table gives them.

    Returns:
        The settings; `objective` is None where it is the language model's own loss.

    Raises:
        OptionError: There is no such objective, or a fine-tune cannot train it.
    """
    if run.objective is None:
        return run
    try:
        name, options = choice_of(registry, "objective", run.objective)
    except OptionError as error:
        raise type(error)(f"{where}: {error}") from error
    if name == CAUSAL_LM:
        return replace(run, objective=None)
    if run.finetune is not None:
        if not registry.create("objective", (name, options)).takes_pairs:
            raise OptionError(
                f"{where}: a grid's fine-tunes train causal language models, by {CAUSAL_LM!r} or by an objective of "
                f"pairs of texts; objective is {name!r}."
            )
        if run.finetune.together > 1:
            raise OptionError(f"{where}: objective {name!r} is trained one adapter at a time; set together = 1.")
        if run.source is not None:
            raise OptionError(
                f"{where}: what a source loses is compared to a language model's loss, and objective is {name!r}; "
                "leave [run.source] or the objective out."
            )
    return replace(run, objective={"name": name, **options})


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
