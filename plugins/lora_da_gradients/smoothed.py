"""The gradient of a smoothed objective: losses need no derivative, so rewards that are 0 or 1 will do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import GradientEstimator, LossProbe
from lora_da_core.types import LayerSpec
from lora_da_gradients._directions import add_to, drawn, gaussian, scaled, zeros
from lora_da_gradients._forward import FromDifferences
from lora_da_gradients._losses import sum_of_losses


@dataclass(frozen=True)
class SmoothedOptions:
    """Options of the smoothed objective's gradient.

    Attributes:
        probes: Random changes of the weights, n.
        smoothing: λ, the standard deviation of a weight's change. It must be large enough that rewards change. The bias
            is O(λ) and the statistical error O(1/(λ√n)), so for n times as many probes λ should be n^¼ times smaller.
        rank: Rank of the changes of a layer; None takes dense ones, which need as much memory as the weights.
    """

    probes: int = 512
    smoothing: float = 1e-2
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.probes < 2:
            raise ValueError(f"probes is {self.probes!r}; it must be at least 2")
        if not 0 < self.smoothing < math.inf:
            raise ValueError(f"smoothing is {self.smoothing!r}; it must be above 0")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}; it must be at least 1, or None for dense changes")


class Smoothed(FromDifferences[SmoothedOptions]):
    """∇f_λ = E[(f(x + λΞ) − f(x)) Ξ]/λ, Ξ standard normal, f_λ(x) = E f(x + λΞ) (arXiv 2407.17200, carried over).

    f_λ is smooth whatever f is, so the objective may be a reward without a derivative, such as an exact match. For a
    quadratic f the two gradients agree for every λ: a curvature's part, ½λΞᵀHΞ·Ξ, has odd moments and vanishes.
    All layers are changed together; directions follow from a seed and are not stored. Sums over samples add, so shards
    that were given the same generator merge.
    """

    name = "smoothed"
    api_version = 1
    Options = SmoothedOptions

    def estimate(
        self, probe: LossProbe, specs: Sequence[LayerSpec], *, generator: torch.Generator
    ) -> dict[str, dict[str, Tensor]]:
        """Runs all probes.

        Args:
            probe: Evaluates the loss.
            specs: The layers, all of which every probe changes.
            generator: Gives one number, from which all directions follow.

        Returns:
            By layer `gradient` (out, in), n times the estimate, and `squares` (1,), the mean of ‖slope·Ξ‖² over probes.
        """
        seed, options = int(torch.randint(2**62, (), generator=generator)), self.options
        losses = partial(sum_of_losses, probe, estimator="smoothed", option="smoothing")
        places = {spec.name: probe.place(spec.name) for spec in specs}
        totals, squares = zeros(specs, places), dict.fromkeys(places, 0.0)
        before = losses({})
        for index in range(options.probes):
            changes = drawn(gaussian, specs, places, rank=options.rank, seed=seed, index=index)
            after = losses({name: scaled(change, options.smoothing) for name, change in changes.items()})
            slope = (after - before) / options.smoothing
            for name, change in changes.items() if slope else ():
                add_to(totals[name], change, slope / options.probes)
                squares[name] += slope**2 * float(change.to_dense().double().square().sum()) / options.probes
        return {
            name: {"gradient": total, "squares": torch.tensor([squares[name]], dtype=torch.float64)}
            for name, total in totals.items()
        }

    def diagnostics(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> dict[str, float]:
        """How noisy the estimate is, as an average of independent probes.

        Args:
            statistics: As `gradient` takes them.
            spec: The layer.
            samples: As `gradient` takes it.

        Returns:
            `variance`, an estimate of E‖g − ∇f_λ‖_F²; `relative_error`, its root over ‖g‖_F (0 where g is 0).
        """
        norm = float(statistics["gradient"].double().norm()) / samples
        spread = float(statistics["squares"]) / samples**2 - norm**2
        variance = spread / (self.options.probes - 1)
        return {"variance": variance, "relative_error": max(variance, 0.0) ** 0.5 / norm if norm > 0 else 0.0}

    def statistics_bytes(self, spec: LayerSpec, *, itemsize: int) -> int:
        return spec.out_features * spec.in_features * itemsize + 8


@hookimpl
def lora_da_gradient_estimators() -> list[type[GradientEstimator[Any]]]:
    """Offers `smoothed`."""
    return [Smoothed]
