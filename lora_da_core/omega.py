"""Pure maths between a layer's Fisher and its factors: Δ, Ω, and eigenvectors to A and B (arXiv 2510.24561)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da_core.operators import DenseMap, LinearMap, NegatedGram, Scaled, Sum, SymmetricOperator
from lora_da_core.types import LoraFactors

DENSE_STEP_ELEMENTS = 2**22
"""Up to this many elements Δ_raw is formed: fewer products per application than through the Fisher's factors."""

DEFAULT_A_SCALE = 3.0**-0.5
"""RMS ratio between a default LoRA's A (uniform, ±1/√in) and an orthonormal one: both have r rows."""


class Omega(Sum):
    """σ²Ω = −αΔ_rawΔ_rawᵀ + (β/N)V, whose eigenvectors are Ω's; its values are σ² times Ω's."""

    def __init__(self, bias: SymmetricOperator | None, variance: SymmetricOperator | None) -> None:
        super().__init__([term for term in (bias, variance) if term is not None])
        self.variance = variance

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        """(βV/N + shift)⁻¹ where V offers it: the bias term has low rank and may be left out."""
        return None if self.variance is None else self.variance.preconditioner(shift)


def formed(step: LinearMap) -> LinearMap:
    """Δ_raw as a stored matrix where it is small, as it came otherwise."""
    rows, columns = step.shape
    return DenseMap(step.to_dense()) if rows * columns <= DENSE_STEP_ELEMENTS else step


def omega(step: LinearMap, variance: SymmetricOperator, *, alpha: float, beta_over_n: float) -> Omega:
    """σ²Ω from Δ_raw (in, out) and V (in, in), maths of the paper's equation for Ω.

    Args:
        step: Δ_raw.
        variance: V, the partial trace of J⁻¹ over outputs.
        alpha: α ≥ 0.
        beta_over_n: β/N ≥ 0; not both may be 0.

    Returns:
        The operator, unformed.
    """
    bias = NegatedGram(step, alpha) if alpha else None
    return Omega(bias, Scaled(variance, beta_over_n) if beta_over_n else None)


@dataclass(frozen=True)
class Subspace:
    """A layer's solution before scaling.

    Attributes:
        basis: A0 (in, r), the bottom eigenvectors of Ω.
        projected: B0ᵀ = Δᵀ A0 (out, r), with Δ = Δ_raw/σ where Δ is normalised.
        scaling: PEFT's factor on B·A.
    """

    basis: Tensor
    projected: Tensor
    scaling: float


def subspace(vectors: Tensor, step: LinearMap, sigma: float, scaling: float) -> Subspace:
    """B0 = A0ᵀΔ, the Frobenius-optimal B for orthonormal A0.

    Args:
        vectors: A0, (in, r).
        step: Δ_raw, (in, out).
        sigma: σ > 0, or 1 where Δ is not normalised.
        scaling: PEFT's factor on B·A.

    Returns:
        The layer's solution.
    """
    return Subspace(vectors, step.rmatmat(vectors) / sigma, scaling)


def fixed_factors(solution: Subspace, gamma: float, dtype: torch.dtype) -> LoraFactors:
    """A = A0ᵀ/√γ and B = B0ᵀ/√γ, as the original program scales them.

    Args:
        solution: The layer's solution.
        gamma: γ > 0.
        dtype: Dtype of the factors.

    Returns:
        A (r, in) and B (out, r).
    """
    root = gamma**-0.5
    return _stored(solution.basis.mT * root, solution.projected * root, dtype)


def balanced_factors(solution: Subspace, multiplier: float, dtype: torch.dtype) -> LoraFactors:
    """A with the norm of a default LoRA's A, and B such that PEFT's scaling·B·A = multiplier·(A0 B0)ᵀ.

    The norm of A acts as a multiplier on B's learning rate, so keeping LoRA's own norm keeps LoRA's own rate.

    Args:
        solution: The layer's solution.
        multiplier: Size of the step in weights, ≥ 0.
        dtype: Dtype of the factors.

    Returns:
        A (r, in) and B (out, r).
    """
    b = solution.projected * (multiplier / (solution.scaling * DEFAULT_A_SCALE))
    return _stored(solution.basis.mT * DEFAULT_A_SCALE, b, dtype)


def _stored(a: Tensor, b: Tensor, dtype: torch.dtype) -> LoraFactors:
    return LoraFactors(a.to(dtype).contiguous(), b.to(dtype).contiguous())
