"""Everything a grid may list: components of the initialisation and of the training, baselines, settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Final

from lora_da_core.config import NO_ALLOCATOR, LoraDAConfig
from lora_da_core.errors import OptionError
from lora_da_core.registry import Registry

Choice = tuple[str, dict[str, Any]]
"""A component's name and all its options, the default ones included."""

BASELINES: Final = ("default", "eva", "lora_ga", "pissa", "olora", "corda")
"""PEFT's own initialisations that a grid may name."""

NEEDED_MODULES: Final = {"corda": ("attr", "attrs")}
"""What PEFT imports for a baseline without requiring it: the module and the package that has it."""

NOTHING: Final = "none"
"""What an axis of the training takes where nothing of its kind is wanted."""

COMPONENTS: Final = ("estimator", "gradient", "solver", "allocator", "objective")
"""What makes an initialisation."""
TRAINING: Final = ("regularizer", "source_fisher", "trainer")
"""What the fine-tune is changed by; cells that differ in these alone share their start."""
CHOICES: Final = (*COMPONENTS, *TRAINING)
KIND: Final = {"source_fisher": "estimator"}
"""The registry's kind of an axis, where it is called otherwise."""
AUTOMATIC: Final = {"solver": "auto", "allocator": NO_ALLOCATOR, **dict.fromkeys(TRAINING, NOTHING)}
"""What an axis takes in the place of a component; no plugin answers to it, and it has no options."""
CAUSAL_LM: Final = "causal_lm"
"""The objective of a grid that names none: a grid's models are causal language models."""
USUAL: Final = {**AUTOMATIC, "objective": CAUSAL_LM}
"""What cells of before there was an axis have in common on it."""
_NO_AXES: Final = ("seed", "samples", "distributed", "process_timeout")
CONFIG_AXES: Final = tuple(entry.name for entry in fields(LoraDAConfig) if entry.name not in _NO_AXES)
AXES: Final = (*CHOICES, "preset", "baseline", "rank", "samples", *CONFIG_AXES)
"""All names."""

ABSENT: Final[Mapping[str, tuple[Any, ...]]] = {
    "allocator": (None, NO_ALLOCATOR),
    "allocator_options": (None, {}),
    "objective": (None, CAUSAL_LM),
    "objective_options": (None, {}),
    "pairing": (None, "same"),
    "offset": (None, "none"),
    "frozen": (None, "none"),
    "statistics_device": (None, "auto"),
    **dict.fromkeys(TRAINING, (NOTHING,)),
    **dict.fromkeys([f"{name}_options" for name in TRAINING], ({},)),
}
"""Values of settings that came later and are no part of an identity: cells keep the names they had before."""


def kind_of(axis: str) -> str:
    """The registry's kind of an axis of components."""
    return KIND.get(axis, axis)


def choice_of(registry: Registry, axis: str, value: Any) -> Choice:
    """A component as a grid file names it.

    Args:
        registry: The installed plugins.
        axis: The axis.
        value: A name, a mapping of `name` and options, or a pair of both.

    Returns:
        The name and all options, the default ones included.

    Raises:
        OptionError: There is no such component, or it does not take the options.
    """
    if isinstance(value, Mapping):
        options = dict(value)
        name = options.pop("name", None)
    elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        name, options = value[0], dict(value[1])
    else:
        name, options = value, {}
    if not isinstance(name, str):
        raise OptionError(f'{axis} {value!r} has no name; write {{name = "…", option = …}}.')
    if name == AUTOMATIC.get(axis):
        if options:
            raise OptionError(f"{axis} {name!r} takes no options.")
        return name, {}
    return name, asdict(registry.create(kind_of(axis), (name, options)).options)
