"""The diagonal of the empirical Fisher, of per-sample or of per-token gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import Accumulator, FisherEstimator, LayerFisher
from lora_da_core.operators import Diagonal as DiagonalOperator
from lora_da_core.operators import SymmetricOperator, add_product, holds_places
from lora_da_core.types import DampingKind, FisherScale, FisherStatistics, LayerSpec
from lora_da_estimators._factors import DiagonalFactor, FactorRequest, damp_diagonal, require_tokens
from lora_da_estimators._samples import by_sample
from lora_da_estimators._sums import SQUARES, NoSums, required

Per = Literal["sample", "token"]


@dataclass(frozen=True)
class DiagonalOptions:
    """Options of the diagonal Fisher.

    Attributes:
        per: Whether a `"sample"`'s tokens are summed before squaring, or each `"token"` is squared by itself,
            which leaves products between tokens out and costs one matrix product per batch.
    """

    per: Per = "sample"

    def __post_init__(self) -> None:
        if self.per not in get_args(Per):
            raise ValueError(f"per is {self.per!r}; choose one of {', '.join(get_args(Per))}")


class SampleSquares(Accumulator):
    """Σ_n G_n∘G_n, (out, in), with G_n the gradient of sample n."""

    def __init__(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> None:
        self.total = torch.zeros(spec.out_features, spec.in_features, device=device, dtype=dtype)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        g = required(output_grads).to(self.total)
        if holds_places(inputs):
            for places, grads_of_one in by_sample(inputs, g, example):
                columns, place = torch.unique(places, return_inverse=True)
                gradient = g.new_zeros(g.shape[1], len(columns)).index_add_(1, place, grads_of_one.mT)
                self.total[:, columns] += gradient.square()
            return
        for inputs_of_one, grads_of_one in by_sample(inputs.to(self.total), g, example):
            gradient = grads_of_one.mT @ inputs_of_one
            self.total.addcmul_(gradient, gradient)

    def statistics(self) -> dict[str, Tensor]:
        return {SQUARES: self.total}


class TokenSquares(SampleSquares):
    """Σ over tokens of (g∘g)(x∘x)ᵀ, (out, in)."""

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        g = required(output_grads).to(self.total)
        # A one-hot row is its own square.
        add_product(self.total, g.square(), inputs if holds_places(inputs) else inputs.to(self.total).square())


class DiagonalFisher(LayerFisher):
    """J = diag(F + λ), (out, in) entries in float64."""

    def __init__(self, factor: DiagonalFactor) -> None:
        self.entries = factor.entries
        self.damping = {"lambda": factor.damping}
        self.remedies = factor.remedies

    def solve(self, gradient: Tensor) -> Tensor:
        return gradient.double() / self.entries

    def apply(self, weights: Tensor) -> Tensor:
        return weights.double() * self.entries

    def inverse_input_trace(self) -> SymmetricOperator:
        return DiagonalOperator(self.entries.reciprocal().sum(0))


class Diagonal(FisherEstimator[DiagonalOptions]):
    """F_oi = (1/n) Σ G_oi²; relative damping ρ is ρ times the mean of F."""

    name = "diagonal"
    api_version = 1
    Options = DiagonalOptions

    @property
    def takes_one_hot(self) -> bool:
        return True

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return NoSums()

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        kind = SampleSquares if self.options.per == "sample" else TokenSquares
        return kind(spec, device=device, dtype=dtype)

    def fisher(
        self,
        statistics: FisherStatistics,
        *,
        damping: float,
        damping_kind: DampingKind,
        fisher_scale: FisherScale,
    ) -> DiagonalFisher:
        """The damped diagonal; `fisher_scale` has no effect, as the sums are of whole samples either way."""
        require_tokens(statistics)
        request = FactorRequest(
            statistics.spec.name, "diagonal Fisher", "gradients", damping, damping_kind, exponent=1.0
        )
        return DiagonalFisher(damp_diagonal(statistics.layer[SQUARES], statistics.samples, request))

    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        return (0, spec.out_features * spec.in_features * itemsize)


@hookimpl
def lora_da_fisher_estimators() -> list[type[FisherEstimator[Any]]]:
    """Offer the diagonal Fisher."""
    return [Diagonal]
