"""What the solvers have in common: checks, canonical signs, explicit residuals, the dense answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lora_da_core.errors import OptionError
from lora_da_core.factorisations import eigh
from lora_da_core.operators import Dense, SymmetricOperator
from lora_da_core.types import EigenResult

FLOAT32_FLOOR = 5e-6
"""Residual relative to ‖Ω‖ below which float32 products are noise."""
FLOAT64_FLOOR = 1e-12
"""The same for float64."""


def check_request(operator: SymmetricOperator, rank: int) -> None:
    """Refuse a rank that the operator does not have.

    Raises:
        OptionError: Where rank is not in 1 … size.
    """
    if not 1 <= rank <= operator.size:
        raise OptionError(f"rank is {rank}, but the operator has order {operator.size}; ask for 1 to {operator.size}.")


def relative_tolerance(asked: float, dtype: torch.dtype) -> float:
    """The asked relative residual, or the floor that products in `dtype` allow."""
    return max(asked, FLOAT64_FLOOR if dtype == torch.float64 else FLOAT32_FLOOR)


def canonical_signs(vectors: Tensor) -> Tensor:
    """Flip columns so that the largest entry in magnitude of each is positive; (…, size, r)."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1, 1)


def residual_norms(product: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    """‖ΩU − UΛ‖ by column, (…, r), from the product ΩU.

    Norms are taken in float64: squares of small float32 residuals would underflow to a false zero.
    """
    norms: Tensor = torch.linalg.vector_norm(
        product.double() - vectors.double() * values.double().unsqueeze(-2), dim=-2
    )
    return norms


def finish(
    operator: SymmetricOperator,
    values: Tensor,
    vectors: Tensor,
    *,
    norm: Tensor,
    tolerance: float,
    applies: int,
    next_value: Tensor,
) -> EigenResult:
    """Assemble a result whose residuals are computed anew, from the vectors that are returned.

    Args:
        operator: The operator.
        values: (…, r), ascending.
        vectors: (…, size, r), orthonormal.
        norm: (…), estimate of ‖Ω‖.
        tolerance: Residual relative to `norm` that counts as converged.
        applies: Block products so far; the one made here is added.
        next_value: (…), NaN where unknown.
    """
    vectors = vectors.to(operator.device, operator.dtype)
    values = values.to(operator.device, operator.dtype)
    residuals = residual_norms(operator.matmat(vectors), vectors, values)
    return assemble(
        operator,
        values,
        vectors,
        residuals,
        converged=(residuals <= tolerance * norm.to(residuals).unsqueeze(-1)).all(-1),
        applies=applies + 1,
        next_value=next_value,
    )


def assemble(
    operator: SymmetricOperator,
    values: Tensor,
    vectors: Tensor,
    residuals: Tensor,
    *,
    converged: Tensor,
    applies: int,
    next_value: Tensor,
) -> EigenResult:
    """A result in the operator's dtype, on its device, with canonical signs; `residuals` are explicit already."""
    values = values.to(operator.device, operator.dtype)
    next_value = next_value.to(operator.device, operator.dtype)
    return EigenResult(
        values=values,
        vectors=canonical_signs(vectors.to(operator.device, operator.dtype)),
        residuals=residuals.to(operator.device, operator.dtype),
        converged=converged.to(operator.device),
        applies=applies,
        # Both are upper bounds; among equal eigenvalues rounding must not put the next one below the last.
        next_value=torch.maximum(next_value, values[..., -1]),
    )


def dense_smallest(operator: SymmetricOperator, rank: int, *, applies: int = 0) -> EigenResult:
    """The answer by float64 `eigh` of the formed matrix, by whatever way it is found.

    Args:
        operator: The operator; its matrix is formed.
        rank: How many eigenpairs.
        applies: Block products already made; forming the matrix counts as one.

    Returns:
        The answer; `remedies` says where LAPACK or cuSOLVER failed.

    Raises:
        ConvergenceError: Where the matrix holds NaN or infinity.
    """
    found = eigh(operator.to_dense(), f"the operator of order {operator.size}")
    values, vectors = found.values, found.vectors
    unknown = values.new_full(values.shape[:-1], torch.nan)
    answer = finish(
        operator,
        values[..., :rank],
        vectors[..., :rank],
        norm=values.abs().amax(-1),
        tolerance=relative_tolerance(0.0, operator.dtype),
        applies=applies + 1,
        next_value=values[..., rank] if rank < operator.size else unknown,
    )
    return replace(answer, remedies=found.remedies)


class _Selected(SymmetricOperator):
    """One matrix of a batched operator."""

    def __init__(self, operator: SymmetricOperator, index: tuple[int, ...]) -> None:
        self.operator = operator
        self.index = index

    @property
    def size(self) -> int:
        return self.operator.size

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        return self.operator.device

    def matmat(self, block: Tensor) -> Tensor:
        return self.operator.matmat(block.expand(*self.operator.batch_shape, *block.shape))[self.index]

    def to_dense(self) -> Tensor:
        return self.operator.to_dense()[self.index]

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        inner = self.operator.preconditioner(shift)
        if inner is None:
            return None
        return lambda block: inner(block.expand(*self.operator.batch_shape, *block.shape))[self.index]


def _select(operator: SymmetricOperator, index: tuple[int, ...]) -> SymmetricOperator:
    return Dense(operator.matrix[index]) if isinstance(operator, Dense) else _Selected(operator, index)


def each_of_batch(operator: SymmetricOperator, solve: Callable[[SymmetricOperator], EigenResult]) -> EigenResult:
    """Run a solver without batching on every matrix of the batch and stack what it found.

    Args:
        operator: The operator, batched or not.
        solve: Called with one unbatched operator at a time.
    """
    shape = operator.batch_shape
    if not shape:
        return solve(operator)
    indices = torch.cartesian_prod(*(torch.arange(length) for length in shape)).reshape(-1, len(shape))
    results = [solve(_select(operator, tuple(index))) for index in indices.tolist()]

    def stacked(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).reshape(*shape, *parts[0].shape)

    return EigenResult(
        values=stacked([result.values for result in results]),
        vectors=stacked([result.vectors for result in results]),
        residuals=stacked([result.residuals for result in results]),
        converged=stacked([result.converged for result in results]),
        applies=sum(result.applies for result in results),
        next_value=stacked([result.next_value for result in results]),
        remedies=tuple(remedy for result in results for remedy in result.remedies),
    )
