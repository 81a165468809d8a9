"""K-FAC whose output factor is block-diagonal: full within each attention head, zero between heads.

J = Y ⊗ Z with Z = E[x xᵀ] and Y = diag(Y_1, …, Y_k), Y_j = E[g_j g_jᵀ] of the j-th block of outputs. Between the
diagonal and the full output factor of K-FAC in cost, k times smaller than the latter, and exact where heads do not
interact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_core import OptionError, hookimpl
from lora_da_core.interfaces import Accumulator, FisherEstimator, LayerFisher
from lora_da_core.operators import Dense, SymmetricOperator
from lora_da_core.types import DampingKind, FisherScale, FisherStatistics, LayerSpec


@dataclass(frozen=True)
class HeadBlocksOptions:
    """Options of the block-diagonal K-FAC.

    Attributes:
        blocks: Number of equal blocks of outputs, for an attention projection its heads. A layer whose outputs it
            does not divide gets the largest number of blocks below it that does.
    """

    blocks: int = 8

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks!r}; it must be at least 1")


class SecondMoments(Accumulator):
    """Σ v vᵀ of each of `blocks` equal parts of the vectors, (blocks, width, width)."""

    def __init__(self, size: int, blocks: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.total = torch.zeros(blocks, size // blocks, size // blocks, device=device, dtype=dtype)

    def add(self, vectors: Tensor) -> None:
        """Adds tokens, (tokens, size)."""
        blocks, width, _ = self.total.shape
        parts = vectors.to(self.total).view(-1, blocks, width).transpose(0, 1)
        self.total.baddbmm_(parts.mT, parts)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        self.add(inputs)

    def statistics(self) -> dict[str, Tensor]:
        return {"second_moments": self.total}


class OutputSecondMoments(SecondMoments):
    """The same of output gradients."""

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        if output_grads is None:
            raise TypeError("head_blocks needs output gradients")
        self.add(output_grads)


class HeadBlocksFisher(LayerFisher):
    """J = Y ⊗ Z, from damped Z (in, in) and the blocks of damped Y (blocks, width, width), float64."""

    def __init__(self, inputs: Tensor, blocks: Tensor) -> None:
        self.inputs, self.blocks = inputs, blocks
        self.inputs_inverse = torch.cholesky_inverse(torch.linalg.cholesky(inputs))
        self.blocks_inverse = torch.cholesky_inverse(torch.linalg.cholesky(blocks))

    def solve(self, gradient: Tensor) -> Tensor:
        return _times(self.blocks_inverse, gradient.double()) @ self.inputs_inverse

    def apply(self, weights: Tensor) -> Tensor:
        return _times(self.blocks, weights.double()) @ self.inputs

    def inverse_input_trace(self) -> SymmetricOperator:
        """V = Σ_o (Y⁻¹)[o, o] · Z⁻¹."""
        return Dense(self.blocks_inverse.diagonal(dim1=-2, dim2=-1).sum() * self.inputs_inverse)


class HeadBlocks(FisherEstimator[HeadBlocksOptions]):
    """K-FAC with an output factor that is exact within blocks."""

    name = "head_blocks"
    api_version = 1
    Options = HeadBlocksOptions

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return SecondMoments(spec.in_features, 1, device=device, dtype=dtype)

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return OutputSecondMoments(spec.out_features, self.blocks_of(spec), device=device, dtype=dtype)

    def fisher(
        self, statistics: FisherStatistics, *, damping: float, damping_kind: DampingKind, fisher_scale: FisherScale
    ) -> LayerFisher:
        """The damped product; relative damping is the root of it on each factor, so that λ = ρ(tr Z/in)(tr Y/out)."""
        if damping <= 0:
            raise OptionError("head_blocks needs damping above 0: its factors may be singular.")
        count = statistics.tokens if fisher_scale == "token_mean" else statistics.samples
        inputs = _damped(statistics.input["second_moments"] / statistics.tokens, damping, damping_kind)
        return HeadBlocksFisher(inputs[0], _damped(statistics.layer["second_moments"] / count, damping, damping_kind))

    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        return spec.in_features**2 * itemsize, spec.out_features**2 // self.blocks_of(spec) * itemsize

    def blocks_of(self, spec: LayerSpec) -> int:
        """The number of blocks of a layer."""
        most = min(self.options.blocks, spec.out_features)
        return next(count for count in range(most, 0, -1) if spec.out_features % count == 0)


def _times(blocks: Tensor, matrix: Tensor) -> Tensor:
    """The block-diagonal matrix times (out, in)."""
    count, width, _ = blocks.shape
    return (blocks @ matrix.reshape(count, width, -1)).reshape(matrix.shape)


def _damped(moments: Tensor, damping: float, damping_kind: DampingKind) -> Tensor:
    moments = moments.double()
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    shift = damping**0.5 * float(diagonal.mean()) if damping_kind == "relative" else damping
    return moments + shift * torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)


@hookimpl
def lora_da_fisher_estimators() -> list[type[FisherEstimator[Any]]]:
    """Offers `head_blocks`."""
    return [HeadBlocks]
