"""How close a cell's subspace is to the best one that can be had from the same data."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from lora_da_core.ablation.axes import CAUSAL_LM, Choice
from lora_da_core.ablation.grid_cell import omega_key
from lora_da_core.ablation.memory import available_bytes
from lora_da_core.components import Components
from lora_da_core.config import LoraDAConfig
from lora_da_core.errors import OptionError
from lora_da_core.estimation import Estimates
from lora_da_core.omega import formed, omega
from lora_da_core.pipeline import DEFAULT_PRESET, Pipeline
from lora_da_core.registry import Registry
from lora_da_core.types import LayerSpec

logger = logging.getLogger(__name__)

REFERENCES: Final = ("empirical", "ekfac")
"""What `auto` tries, the most exact first."""
SHARE: Final = 3
"""Statistics of a reference, and the matrices kept of it, may each take this part of the free memory."""


@dataclass(frozen=True)
class ReferenceLayer:
    """Ω of one layer in float64, (in, in), and its bottom eigenpairs: values (r,), vectors (in, r)."""

    matrix: Tensor
    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Fidelity:
    """Largest principal angle in radians and relative gap of the objective, over layers."""

    reference: str
    angle: float
    angle_max: float
    worst_layer: str
    objective_gap: float
    objective_gap_max: float


def principal_angle(first: Tensor, second: Tensor) -> float:
    """The largest principal angle between two subspaces of one dimension.

    Args:
        first: (n, r), orthonormal columns, float64.
        second: Likewise.

    Returns:
        The angle in radians, from both its sine and its cosine: exact near 0 and near π/2.
    """
    across = first.mT @ second
    sine = torch.linalg.matrix_norm(second - first @ across, ord=2)
    cosine = torch.linalg.svdvals(across)[-1]
    return math.atan2(float(sine), float(cosine))


def span(a: Tensor) -> Tensor:
    """An orthonormal basis (in, r) in float64 of the rows of A (r, in), on the CPU."""
    basis: Tensor = torch.linalg.qr(a.detach().cpu().double().mT).Q
    return basis


class Reference:
    """The best available Fisher of one data draw, solved densely in float64 for any Ω."""

    def __init__(self, name: str, pipeline: Pipeline, estimates: Estimates) -> None:
        self.name = name
        self._pipeline, self._estimates = pipeline, estimates
        self._key = ""
        self._layers: dict[str, ReferenceLayer] = {}
        widths = [spec.in_features for spec in estimates.task.specs]
        self._keeps = 8 * sum(width * width for width in widths) <= available_bytes(torch.device("cpu")) // SHARE

    def fidelity(self, factors: Mapping[str, Tensor], config: LoraDAConfig) -> Fidelity:
        """Compares A of every layer.

        Args:
            factors: A (r, in) by layer.
            config: α, β, N and damping of Ω.

        Returns:
            Median and largest value over layers.
        """
        angles: dict[str, float] = {}
        gaps: dict[str, float] = {}
        for name, a in factors.items():
            basis = span(a)
            layer = self._layer(name, config, basis.shape[1])
            angles[name] = principal_angle(layer.vectors[:, : basis.shape[1]], basis)
            best = float(layer.values[: basis.shape[1]].sum())
            reached = float((basis * (layer.matrix @ basis)).sum())
            gaps[name] = (reached - best) / abs(best) if best else math.nan
        worst = max(angles, key=lambda name: angles[name])
        known = [gap for gap in gaps.values() if math.isfinite(gap)] or [math.nan]
        return Fidelity(
            f"{self.name}, eigh in float64",
            statistics.median(angles.values()),
            angles[worst],
            worst,
            statistics.median(known),
            max(known),
        )

    def _layer(self, name: str, config: LoraDAConfig, rank: int) -> ReferenceLayer:
        if self._key != omega_key(config):
            self._key, self._layers = omega_key(config), {}
        found = self._layers.get(name)
        if found is None or len(found.values) < rank:
            found = self._solved(name, config, rank)
            if self._keeps:
                self._layers[name] = found
        return found

    def _solved(self, name: str, config: LoraDAConfig, rank: int) -> ReferenceLayer:
        data = self._estimates.statistics.of_layer(name)
        fisher = self._pipeline.components.estimator.fisher(
            replace(data, shared={}),
            damping=config.damping,
            damping_kind=config.damping_kind,
            fisher_scale=config.fisher_scale,
        )
        population = data.samples if config.population is None else config.population
        step = formed(fisher.step(self._estimates.gradient(data.spec)))
        ours = omega(step, fisher.inverse_input_trace(), alpha=config.alpha, beta_over_n=config.beta / population)
        matrix = ours.to_dense().detach().double()
        values, vectors = torch.linalg.eigh(matrix)
        return ReferenceLayer(matrix.cpu(), values[:rank].cpu().clone(), vectors[:, :rank].cpu().clone())


def reference_name(
    registry: Registry, wanted: str, specs: Sequence[LayerSpec], *, samples: int, tokens: int, device: torch.device
) -> str:
    """The estimator of the reference.

    Args:
        registry: The installed plugins.
        wanted: A name, or `auto` for the most exact one whose statistics fit.
        specs: The layers.
        samples: Samples that will be read.
        tokens: Tokens of those samples.
        device: Where statistics are kept.

    Returns:
        A name that the registry knows.

    Raises:
        OptionError: None is installed, or none fits.
    """
    if wanted != "auto":
        return wanted
    free, needed = available_bytes(device), {}
    for name in REFERENCES:
        if name in registry.names("estimator"):
            estimator = registry.create("estimator", name)
            sizes = (estimator.statistics_bytes(spec, samples=samples, tokens=tokens, itemsize=4) for spec in specs)
            needed[name] = sum(shared + own for shared, own in sizes)
            if needed[name] <= free // SHARE:
                return name
    listed = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in needed.items()) or "none installed"
    raise OptionError(
        f"no reference fits into a third of the free {free / 2**30:.1f} GiB ({listed}); "
        "take fewer samples or layers, or reference = 'none'."
    )


def reference_pipeline(
    registry: Registry, name: str, config: LoraDAConfig, objective: Choice | None = None
) -> Pipeline:
    """A pipeline with the reference's estimator and the exact gradient of the default preset.

    Args:
        registry: The installed plugins.
        name: The estimator.
        config: Token mask and seed are read.
        objective: What is differentiated; None is the language model's own loss.

    Returns:
        The pipeline.
    """
    preset: Any = registry.resolve("preset", DEFAULT_PRESET)
    parts = Components(
        estimator=registry.create("estimator", name),
        gradient=registry.create("gradient", preset.gradient),
        objective=registry.create("objective", objective or CAUSAL_LM),
        solver=None,
    )
    return Pipeline(registry, parts, replace(config, samples=None))
