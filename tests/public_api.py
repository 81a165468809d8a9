"""The public API as text, one line per name; `python tests/public_api.py --write` writes it down at a release."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import typer

RELEASED = Path(__file__).with_name("public_api.txt")
"""The API of the last release."""
MODULES = ("interfaces", "operators", "types", "errors", "hookspecs", "testing")
"""Modules whose public names are all public API, beside `lora_da_core` itself."""
PARTS = {
    "data": ("load_rows", "encode_text", "batches", "TextOptions", "TextData"),
    "models": ("load_model", "LoadedModel"),
    "memory": ("Workload", "Plan"),
    "ablation": ("Grid", "Plan", "make_grid", "plan", "read_grid", "run_grid"),
}
"""Of these modules the names that docs/reference/api.md lists."""


def lines() -> list[str]:
    """Every public name with its signature or default, sorted."""
    import lora_da_core

    found = [line for name in lora_da_core.__all__ for line in of(f"lora_da_core.{name}", getattr(lora_da_core, name))]
    for module in MODULES:
        found += of_module(module)
    for module, names in PARTS.items():
        owner = importlib.import_module(f"lora_da_core.{module}")
        found += [line for name in names for line in of(f"lora_da_core.{module}.{name}", getattr(owner, name))]
    return sorted({*found, *commands(), *components()})


def of_module(module: str) -> Iterator[str]:
    """The names that a module defines itself."""
    owner = importlib.import_module(f"lora_da_core.{module}")
    for name, value in vars(owner).items():
        home = getattr(value, "__module__", None)
        if not name.startswith("_") and home == owner.__name__:
            yield from of(f"{owner.__name__}.{name}", value)


def of(name: str, value: Any) -> Iterator[str]:
    """A function, a class with its public members, or a constant."""
    if inspect.isclass(value):
        yield from of_class(name, value)
    elif inspect.isroutine(value):
        yield f"{name}{signature(value)}"
    else:
        yield name


def of_class(name: str, value: type) -> Iterator[str]:
    """A class: its bases, its fields with their defaults, its own methods and properties."""
    bases = [base.__name__ for base in value.__bases__ if base is not object]
    yield f"class {name}({', '.join(bases)})"
    if is_dataclass(value):
        for entry in fields(value):
            made = entry.default_factory is not MISSING
            default = "" if entry.default is MISSING else f" = {entry.default!r}"
            yield f"{name}.{entry.name}: {entry.type}{' = <made>' if made else default}"
    elif "__init__" in vars(value):
        yield f"{name}.__init__{signature(vars(value)['__init__'])}"
    for member, definition in vars(value).items():
        if member.startswith("_"):
            continue
        plain = definition.__func__ if isinstance(definition, (classmethod, staticmethod)) else definition
        if isinstance(plain, property):
            yield f"{name}.{member}: property"
        elif inspect.isroutine(plain):
            yield f"{name}.{member}{signature(plain)}"


def signature(function: Any) -> str:
    """Parameters with annotations and defaults, as written."""
    return str(inspect.signature(function)).replace("'", '"')


def commands() -> Iterator[str]:
    """Commands and their options."""
    from lora_da_core.cli import app

    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield f"lora-da {name}"
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                yield f"lora-da {name} {option}"


def components() -> Iterator[str]:
    """Names of this distribution's components with their options' names."""
    from lora_da_core.registry import HOOK_OF_KIND, Registry

    registry = Registry()
    for kind in HOOK_OF_KIND:
        for name, component in registry.names(kind).items():
            if registry.origin(kind, component).startswith("lora-da-core "):
                options = [entry.name for entry in fields(component.Options)] if inspect.isclass(component) else []
                yield f"{kind} {name}({', '.join(options)})"


def name_of(line: str) -> str:
    """What a changelog calls the name of a line: its last part, or a command's option."""
    text = line.removeprefix("class ")
    if text.startswith("lora-da "):
        return text.rpartition(" ")[2]
    return text.partition("(")[0].partition(":")[0].rpartition(".")[2].rpartition(" ")[2]


if __name__ == "__main__":
    text = "\n".join(lines()) + "\n"
    if "--write" in sys.argv[1:]:
        RELEASED.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
