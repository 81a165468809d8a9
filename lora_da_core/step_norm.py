"""σ², the largest eigenvalue of Δ_raw Δ_rawᵀ, from what was found of Ω: two products instead of a second solve."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lora_da_core.operators import LinearMap
from lora_da_core.types import EigenResult


@dataclass(frozen=True)
class Bracket:
    """σ² lies between `least` and `least` + `excess`; an infinite excess says that nothing is known."""

    least: float
    excess: float

    def within(self, tolerance: float) -> bool:
        """Whether `least` is σ² up to a relative error of `tolerance`."""
        return self.least > 0 and self.excess <= tolerance * self.least


def bracket(step: LinearMap, found: EigenResult, alpha: float, variance_norm: float) -> Bracket:
    """Bounds of σ² from the bottom eigenvectors U of σ²Ω = −αΔΔᵀ + cV (derived).

    In an orthonormal basis [U, U⊥] let ΔΔᵀ be [[H, Eᵀ], [E, F]]. θ, the largest eigenvalue of H, is a bound from below.
    What is orthogonal to U has xᵀ(σ²Ω)x ≥ λ_r, the last of the found eigenvalues, so ‖F‖ ≤ f = (c‖V‖ − λ_r)/α, and
    ΔΔᵀ is at most [[θ, ‖E‖], [‖E‖, f]] in norm, which is θ + ‖E‖²/(θ − f) to first order.

    Args:
        step: Δ_raw, (in, out).
        found: The eigenpairs, a converged result.
        alpha: α ≥ 0.
        variance_norm: A bound of ‖cV‖.

    Returns:
        The bounds.
    """
    projected = step.rmatmat(found.vectors)
    inside = projected.mT.double() @ projected.double()
    outside = step.matmat(projected) - found.vectors @ inside.to(projected.dtype)
    coupling = float(torch.linalg.matrix_norm(outside.double()))
    least = float(torch.linalg.eigvalsh(inside.cpu())[-1])
    last = float(found.values[-1]) - float(found.residuals.max())
    beyond = max(0.0, (variance_norm - last) / alpha) if alpha > 0 else math.inf
    if not beyond < least:
        return Bracket(least, math.inf)
    half = 0.5 * (least - beyond)
    return Bracket(least, math.hypot(half, coupling) - half)
