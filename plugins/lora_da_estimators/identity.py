"""The Fisher as a multiple of the identity: no statistics, no curvature.

The step is then the negative gradient and the initial subspace that of LoRA-One (arXiv 2502.01235).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.errors import OptionError
from lora_da_core.interfaces import Accumulator, FisherEstimator, LayerFisher, NoOptions
from lora_da_core.operators import Diagonal, LinearMap, SymmetricOperator
from lora_da_core.types import DampingKind, FisherScale, FisherStatistics, LayerSpec
from lora_da_estimators._maps import ScaledTranspose
from lora_da_estimators._sums import NoSums

_PLACE = "place"


class _Place(NoSums):
    """Remembers the layer's device in an empty tensor; there is nothing else to keep."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.empty = torch.zeros(0, device=device, dtype=dtype)

    def statistics(self) -> dict[str, Tensor]:
        return {_PLACE: self.empty}


class IdentityFisher(LayerFisher):
    """J = λI; results are float64."""

    def __init__(self, spec: LayerSpec, scale: float, device: torch.device) -> None:
        self.spec = spec
        self.scale = scale
        self.device = device
        self.damping = {"lambda": scale}

    def solve(self, gradient: Tensor) -> Tensor:
        return gradient.double() / self.scale

    def apply(self, weights: Tensor) -> Tensor:
        return weights.double() * self.scale

    def inverse_input_trace(self) -> SymmetricOperator:
        """V = (out/λ)·I."""
        value = self.spec.out_features / self.scale
        return Diagonal(torch.full((self.spec.in_features,), value, dtype=torch.float64, device=self.device))

    def step(self, gradient: LinearMap) -> LinearMap:
        return ScaledTranspose(gradient, -1.0 / self.scale)


class Identity(FisherEstimator[NoOptions]):
    """J = λI with λ the damping itself, absolute or relative."""

    name = "identity"
    api_version = 1

    @property
    def needs_output_grads(self) -> bool:
        return False

    @property
    def takes_one_hot(self) -> bool:
        return True

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return NoSums()

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return _Place(device, dtype)

    def fisher(
        self,
        statistics: FisherStatistics,
        *,
        damping: float,
        damping_kind: DampingKind,
        fisher_scale: FisherScale,
    ) -> IdentityFisher:
        """λI, whatever the kind of damping and the scale.

        Args:
            statistics: Statistics of the layer.
            damping: λ > 0.
            damping_kind: Without effect: a multiple of the identity has no scale of its own.
            fisher_scale: Without effect.

        Returns:
            The Fisher, in float64.

        Raises:
            OptionError: The damping is zero.
        """
        if damping <= 0:
            raise OptionError("damping is 0, but the identity Fisher is damping times I; give damping above 0.")
        return IdentityFisher(statistics.spec, damping, statistics.layer[_PLACE].device)

    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        return (0, 0)


@hookimpl
def lora_da_fisher_estimators() -> list[type[FisherEstimator[Any]]]:
    """Offer the identity."""
    return [Identity]
