"""Shift and invert: what finds the bottom of a stored matrix where its own Krylov space converges slowly."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_da_core.inverses import inverse_from_cholesky
from lora_da_core.operators import Dense
from lora_da_core.types import EigenResult
from lora_da_solvers._expansion import BASIS_BLOCKS, Expansion
from lora_da_solvers._subspace import Subspace

_WIDER = 8.0
"""Factor on the distance between shift and Ritz value where an eigenvalue lies below the shift."""


def inverted(
    operator: Dense,
    found: EigenResult,
    norm: Tensor,
    *,
    tolerance: float,
    budget: int,
    generator: torch.Generator,
) -> EigenResult:
    """Solves what is not converged anew, by residuals times (Ω − σI)⁻¹ with σ just below the spectrum.

    A Krylov space takes about √(‖Ω − λ_1‖/gap) products, one of the inverse √((λ_r − σ)/gap) of them: where cV
    outweighs the bias term the gaps are those at the end of Z's spectrum, far below ‖Ω‖. A Cholesky factor exists
    only for a σ below all eigenvalues, so where there is one nothing can hide under the shift.

    Sources: Ericsson and Ruhe 1980, Math. Comp. 35, 1251-1268 (the spectral transformation); Davidson 1975, J.
    Comput. Phys. 17, 87-94 (residuals of Ω itself, which leave rounding of the inverse without effect).

    Args:
        operator: Ω, (…, size, size).
        found: What a Krylov space gave; its vectors and values are where the search starts.
        norm: (…), estimate of ‖Ω‖, float64, on the CPU.
        tolerance: Residual relative to ‖Ω‖ that counts as converged.
        budget: Products with Ω after which it gives up, for a batch as for one matrix.
        generator: Source of random blocks.

    Returns:
        `found` with the matrices that had not converged replaced.
    """
    missed = ~found.converged.cpu()
    rank, order = found.values.shape[-1], operator.size
    # Not copied where none converged.
    matrices = (
        operator.matrix.reshape(-1, order, order) if missed.all() else operator.matrix[missed.to(operator.device)]
    )
    norms = norm[missed]
    values = found.values.cpu().double()[missed]
    part, width = Dense(matrices), max(8, rank)
    inverse = Dense(_inverses(matrices, values, norms))
    space = Subspace(part, min(BASIS_BLOCKS * width, order - width), generator)
    vectors = found.vectors[missed.to(operator.device)]
    space.norm = norms
    space.seed(vectors, part.matmat(vectors))
    space.applies = 1
    expansion = Expansion(space, rank, width, tolerance=tolerance, budget=budget, inverse=lambda _: inverse.matmat)
    return _merged(found, missed, expansion.result())


def _inverses(matrices: Tensor, values: Tensor, norms: Tensor) -> Tensor:
    """(Ω − σI)⁻¹ of every matrix (b, size, size), σ below its eigenvalues, from Ritz values (b, r) and norms (b,)."""
    inverses = torch.empty_like(matrices)
    resolution = torch.finfo(matrices.dtype).eps ** 0.5
    for matrix, ritz, norm, inverse in zip(matrices, values.tolist(), norms.tolist(), inverses, strict=True):
        # Near enough to tell the wanted values apart, and no nearer than the inverse's entries resolve.
        distance = max(ritz[-1] - ritz[0], resolution * norm, torch.finfo(torch.float64).tiny)
        root = _root(matrix, ritz[0] - distance)
        while root is None:
            distance *= _WIDER
            root = _root(matrix, ritz[0] - distance)
        inverse.copy_(inverse_from_cholesky(root))
    return inverses


def _root(matrix: Tensor, shift: float) -> Tensor | None:
    """The Cholesky factor of matrix − shift·I in float64, None where that is not positive definite."""
    shifted = matrix.double()
    if shifted is matrix:
        shifted = matrix.clone()
    shifted.diagonal().sub_(shift)
    root, info = torch.linalg.cholesky_ex(shifted)
    return root if int(info) == 0 else None


def _merged(found: EigenResult, missed: Tensor, again: EigenResult) -> EigenResult:
    """`found` with the matrices where `missed` is set taken from `again`."""

    def merged(before: Tensor, after: Tensor) -> Tensor:
        whole = before.clone()
        whole[missed.to(whole.device)] = after
        return whole

    return replace(
        found,
        values=merged(found.values, again.values),
        vectors=merged(found.vectors, again.vectors),
        residuals=merged(found.residuals, again.residuals),
        converged=merged(found.converged, again.converged),
        next_value=merged(found.next_value, again.next_value),
        applies=found.applies + again.applies,
    )
