"""The hooks through which plugins offer their classes, so that names can be listed and clashes be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from lora_da_core.interfaces import (
    FisherEstimator,
    GradientEstimator,
    Objective,
    RankAllocator,
    Regularizer,
    Solver,
    TrainerPlugin,
)
from lora_da_core.types import LayerReport

if TYPE_CHECKING:
    from lora_da_core.config import Preset

PROJECT = "lora_da_core"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
"""Marks a hook's specification."""
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's implementation of a hook."""


@hookspec
def lora_da_fisher_estimators() -> Sequence[type[FisherEstimator[Any]]]:  # type: ignore[empty-body]
    """Fisher estimators this plugin offers."""


@hookspec
def lora_da_gradient_estimators() -> Sequence[type[GradientEstimator[Any]]]:  # type: ignore[empty-body]
    """Gradient estimators this plugin offers."""


@hookspec
def lora_da_solvers() -> Sequence[type[Solver[Any]]]:  # type: ignore[empty-body]
    """Eigen-solvers this plugin offers."""


@hookspec
def lora_da_objectives() -> Sequence[type[Objective[Any]]]:  # type: ignore[empty-body]
    """Objectives this plugin offers."""


@hookspec
def lora_da_rank_allocators() -> Sequence[type[RankAllocator[Any]]]:  # type: ignore[empty-body]
    """Rank allocators this plugin offers."""


@hookspec
def lora_da_regularizers() -> Sequence[type[Regularizer[Any]]]:  # type: ignore[empty-body]
    """Regularizers this plugin offers."""


@hookspec
def lora_da_trainer_plugins() -> Sequence[type[TrainerPlugin[Any]]]:  # type: ignore[empty-body]
    """Optimizers and callbacks for trainers this plugin offers."""


@hookspec
def lora_da_presets() -> Sequence[Preset]:  # type: ignore[empty-body]
    """Presets this plugin offers: full pipeline settings under a name."""


@hookspec(firstresult=True)
def lora_da_choose_solver(
    size: int, rank: int, device_type: str, available: Mapping[str, type[Solver[Any]]]
) -> str | None:
    """The solver that `solver="auto"` should take for a layer, or None for no opinion."""


@hookspec
def lora_da_layer_finished(layer: str, report: LayerReport) -> None:
    """A layer has been solved. An observer: its errors are logged, never raised."""
