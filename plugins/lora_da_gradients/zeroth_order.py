"""The mean gradient from forward passes alone: finite differences along random directions.

Simultaneous perturbation of all layers (Spall 1992, IEEE Trans. Autom. Control 37(3)), directions by seed instead of
by storage (Malladi et al. 2023, arXiv 2305.17333), and the first moment of R-AdaZO (arXiv 2502.01014) in place of a
single estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import GradientEstimator, LossProbe
from lora_da_core.operators import LinearMap
from lora_da_core.types import LayerSpec
from lora_da_gradients._directions import add_to, direction, drawn, scaled, zeros
from lora_da_gradients._forward import FromDifferences
from lora_da_gradients._losses import sum_of_losses

Difference = Literal["central", "forward"]
Layers = Literal["together", "in_turn"]


@dataclass(frozen=True)
class ZerothOrderOptions:
    """Options of the zeroth-order gradient.

    Attributes:
        steps: Estimates g that enter the first moment m, one after the other.
        probes: Directions that one estimate averages.
        beta1: β1 in m ← β1·m + (1 − β1)·g. At 1, the limit, all steps count equally: the weights stay where they
            are, so older estimates are as good as new ones, and below 1 the variance stops falling at
            (1 − β1)/(1 + β1) of one estimate's, however many the steps.
        mu: Root mean square of the change of one weight; a direction of unit length over d weights is moved along
            by mu·√d.
        difference: `"central"`, (f(+) − f(−))/2μ, which curvature does not disturb, or `"forward"`, (f(+) − f(0))/μ,
            for nearly half the forward passes.
        layers: Whether a probe changes all layers `"together"`, or each layer gets probes of its own, `"in_turn"`, at
            as many times the forward passes as there are layers. For the same number of passes the former serves the
            layers with the largest gradients best, the latter all layers alike.
        rank: Rank of the directions of a layer; None takes dense ones, which need as much memory as the weights.
    """

    steps: int = 64
    probes: int = 4
    beta1: float = 1.0
    mu: float = 1e-3
    difference: Difference = "central"
    layers: Layers = "together"
    rank: int | None = 1

    def __post_init__(self) -> None:
        for name in ("steps", "probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")
        if not 0 <= self.beta1 <= 1:
            raise ValueError(f"beta1 is {self.beta1!r}; it must lie between 0 and 1")
        if not 0 < self.mu < math.inf:
            raise ValueError(f"mu is {self.mu!r}; it must be above 0")
        for name, allowed in (("difference", get_args(Difference)), ("layers", get_args(Layers))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}; it must be at least 1, or None for dense directions")

    def weights(self) -> Tensor:
        """What each direction's estimate contributes to the bias-corrected moment, (steps·probes,), of sum 1."""
        ages = torch.arange(self.steps - 1, -1, -1, dtype=torch.float64)
        powers = torch.pow(torch.tensor(self.beta1, dtype=torch.float64), ages)
        return (powers / powers.sum() / self.probes).repeat_interleave(self.probes)


class ZerothOrder(FromDifferences[ZerothOrderOptions]):
    """G ≈ m/(1 − β1ᵀ) after T steps, with g = (1/K) Σ_k (f(W + μU_k) − f(W − μU_k))/2μ · U_k.

    Every layer has a direction U of its own with ‖U‖_F² = d = out·in, drawn anew for each probe. That is the estimator
    for unit directions with its factor d already in: E[vec(U) vec(U)ᵀ] = I, so g is unbiased up to O(μ²) with central
    differences and up to O(μ) with forward ones, and for a quadratic loss exactly with either. R-AdaZO divides m by
    √v to choose a step; that would turn G's directions, so m alone is taken.

    The variance is that of d unknowns seen through one number per probe: of one probe E‖g − G‖² = (d − 1)·‖G‖² plus
    d times the squared gradients of the layers changed with it. So the subspace of a layer shows after a multiple of
    d probes, and later where other layers' gradients are larger: the method is for small layers and for models that
    no backward pass fits, and `diagnostics` says how far it got. Directions are never stored, and statistics are sums
    over samples, so shards that were given the same generator add.
    """

    name = "zeroth_order"
    api_version = 1
    Options = ZerothOrderOptions

    def estimate(
        self, probe: LossProbe, specs: Sequence[LayerSpec], *, generator: torch.Generator
    ) -> dict[str, dict[str, Tensor]]:
        """Runs all probes.

        Args:
            probe: Evaluates the loss.
            specs: The layers, all of which every probe changes.
            generator: Gives one number, from which all directions follow.

        Returns:
            By layer `gradient` (out, in), n times the bias-corrected moment, and `slopes` (steps·probes,), the sums
            over samples of the difference quotients.

        Raises:
            ModelError: A loss is not finite.
        """
        seed = int(torch.randint(2**62, (), generator=generator))
        base = _sum_of_losses(probe, {}) if self.options.difference == "forward" else 0.0
        groups = [specs] if self.options.layers == "together" else [[spec] for spec in specs]
        found: dict[str, dict[str, Tensor]] = {}
        for group in groups:
            found.update(self._estimate_group(probe, group, seed, base))
        return found

    def diagnostics(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> dict[str, float]:
        """How noisy the estimate is.

        With weights w_i of the directions' estimates g_i and m = Σ w_i g_i, Σ w_i ‖g_i‖² − ‖m‖² has the mean
        (1 − Σ w_i²)·E‖g − G‖²; ‖g_i‖² is slope² · out·in, because all directions have that length.

        Args:
            statistics: As `gradient` takes them.
            spec: The layer.
            samples: As `gradient` takes it.

        Returns:
            `probe_variance`, an estimate of E‖g − G‖_F² of one probe; `variance`, of E‖m − G‖_F²; `relative_error`,
            √variance/‖m‖_F (0 for m = 0). NaN where there was one probe.
        """
        weights = self.options.weights()
        slopes = statistics["slopes"].double().cpu() / samples
        norm = float(statistics["gradient"].double().norm()) / samples
        share = float(weights.square().sum())
        spread = float((weights * slopes.square()).sum()) * spec.in_features * spec.out_features - norm**2
        probe_variance = spread / (1 - share) if len(weights) > 1 and share < 1 else math.nan
        variance = share * probe_variance
        relative = max(variance, 0.0) ** 0.5 / norm if norm > 0 else 0.0
        return {
            "probe_variance": probe_variance,
            "variance": variance,
            "relative_error": math.nan if math.isnan(variance) else relative,
        }

    def statistics_bytes(self, spec: LayerSpec, *, itemsize: int) -> int:
        return spec.out_features * spec.in_features * itemsize + 8 * self.options.steps * self.options.probes

    def _estimate_group(
        self, probe: LossProbe, specs: Sequence[LayerSpec], seed: int, base: float
    ) -> dict[str, dict[str, Tensor]]:
        """The statistics of layers that are changed together."""
        places = {spec.name: probe.place(spec.name) for spec in specs}
        totals, slopes = zeros(specs, places), []
        for index, weight in enumerate(self.options.weights().tolist()):
            directions = drawn(direction, specs, places, rank=self.options.rank, seed=seed, index=index)
            slopes.append(self._slope(probe, directions, base))
            for name, change in directions.items():
                add_to(totals[name], change, weight * slopes[-1])
        quotients = torch.tensor(slopes, dtype=torch.float64)
        return {name: {"gradient": total, "slopes": quotients.clone()} for name, total in totals.items()}

    def _slope(self, probe: LossProbe, directions: Mapping[str, LinearMap], base: float) -> float:
        """Σ_n of the difference quotients of ℓ_n."""
        mu = self.options.mu
        ahead = _sum_of_losses(probe, {name: scaled(change, mu) for name, change in directions.items()})
        if self.options.difference == "forward":
            return (ahead - base) / mu
        behind = _sum_of_losses(probe, {name: scaled(change, -mu) for name, change in directions.items()})
        return (ahead - behind) / (2 * mu)


_sum_of_losses = partial(sum_of_losses, estimator="zeroth-order", option="mu")


@hookimpl
def lora_da_gradient_estimators() -> list[type[GradientEstimator[Any]]]:
    """Offers `zeroth_order`."""
    return [ZerothOrder]
