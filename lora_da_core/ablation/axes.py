"""Everything a grid may list: components of the initialisation and of the training, baselines, settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from lora_da_core.config import NO_ALLOCATOR, LoraDAConfig

Choice = tuple[str, dict[str, Any]]
"""A component's name and all its options, the default ones included."""

BASELINES: Final = ("default", "eva", "lora_ga", "pissa", "olora", "corda")
"""PEFT's own initialisations that a grid may name."""

NEEDED_MODULES: Final = {"corda": ("attr", "attrs")}
"""What PEFT imports for a baseline without requiring it: the module and the package that has it."""

NOTHING: Final = "none"
"""What an axis of the training takes where nothing of its kind is wanted."""

COMPONENTS: Final = ("estimator", "gradient", "solver", "allocator")
"""What makes an initialisation."""
TRAINING: Final = ("regularizer", "source_fisher", "trainer")
"""What the fine-tune is changed by; cells that differ in these alone share their start."""
CHOICES: Final = (*COMPONENTS, *TRAINING)
KIND: Final = {"source_fisher": "estimator"}
"""The registry's kind of an axis, where it is called otherwise."""
AUTOMATIC: Final = {"solver": "auto", "allocator": NO_ALLOCATOR, **dict.fromkeys(TRAINING, NOTHING)}
"""What an axis takes in the place of a component; no plugin answers to it, and it has no options."""
_NO_AXES: Final = ("seed", "samples", "distributed", "process_timeout")
CONFIG_AXES: Final = tuple(entry.name for entry in fields(LoraDAConfig) if entry.name not in _NO_AXES)
AXES: Final = (*CHOICES, "preset", "baseline", "rank", "samples", *CONFIG_AXES)
"""All names."""

ABSENT: Final[Mapping[str, tuple[Any, ...]]] = {
    "allocator": (None, NO_ALLOCATOR),
    "allocator_options": (None, {}),
    "pairing": (None, "same"),
    "offset": (None, "none"),
    "frozen": (None, "none"),
    **dict.fromkeys(TRAINING, (NOTHING,)),
    **dict.fromkeys([f"{name}_options" for name in TRAINING], ({},)),
}
"""Values of settings that came later and are no part of an identity: cells keep the names they had before."""


def kind_of(axis: str) -> str:
    """The registry's kind of an axis of components."""
    return KIND.get(axis, axis)
