"""What a solver's answer must be, what is said of it, and what stands for an answer that there is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_da_core.operators import SymmetricOperator
from lora_da_core.types import EigenResult

ORTHONORMAL = 1e-3
"""Largest |UᵀU − I| that counts as orthonormal; solvers in float32 stay far below."""


def fault_of(result: Any, operator: SymmetricOperator, rank: int) -> str:
    """What is wrong with a solver's answer.

    Args:
        result: What it returned.
        operator: What it was asked about.
        rank: How many eigenpairs were wanted.

    Returns:
        Empty where nothing is wrong.
    """
    if not isinstance(result, EigenResult):
        return f"it returned {type(result).__name__}, not an EigenResult"
    batch = operator.batch_shape
    if result.values.shape != (*batch, rank) or result.vectors.shape != (*batch, operator.size, rank):
        return f"values {tuple(result.values.shape)} and vectors {tuple(result.vectors.shape)} for rank {rank}"
    for name, shape in {"residuals": (*batch, rank), "converged": tuple(batch), "next_value": tuple(batch)}.items():
        if tuple(getattr(result, name).shape) != shape:
            return f"{name} of shape {tuple(getattr(result, name).shape)}, not {shape}"
    if result.vectors.dtype != operator.dtype or result.vectors.device != operator.device:
        return f"vectors in {result.vectors.dtype} on {result.vectors.device}, the operator in {operator.dtype}"
    tensors: tuple[Tensor, ...] = (result.values, result.vectors, result.residuals)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        return "NaN or Inf in values, vectors or residuals"
    gram = result.vectors.mT @ result.vectors
    if float((gram - torch.eye(rank, dtype=gram.dtype, device=gram.device)).abs().max()) > ORTHONORMAL:
        return "vectors are not orthonormal"
    return ""


def member(result: EigenResult, index: int) -> EigenResult:
    """The answer for one matrix of a batch."""
    return EigenResult(
        values=result.values[index],
        vectors=result.vectors[index],
        residuals=result.residuals[index],
        converged=result.converged[index],
        applies=result.applies,
        next_value=result.next_value[index],
        remedies=result.remedies,
    )


def relative_residual(result: EigenResult) -> float:
    """The largest residual relative to the largest wanted |λ|, which is at most ‖Ω‖."""
    norm = float(result.values.abs().max())
    return float(result.residuals.max()) / norm if norm > 0 else float(result.residuals.max())


def broken_down(operator: SymmetricOperator, rank: int, reason: str) -> EigenResult:
    """Stands for the answer of a solver that gave up on a single matrix: nothing converged, NaN everywhere."""
    nothing = torch.full((operator.size, rank), torch.nan, dtype=operator.dtype, device=operator.device)
    return EigenResult(
        values=nothing[0],
        vectors=nothing,
        residuals=nothing[0],
        converged=torch.tensor(False, device=operator.device),
        applies=0,
        next_value=nothing[0, 0],
        remedies=(reason,),
    )


def is_broken(result: EigenResult) -> bool:
    """Whether there is no answer at all."""
    return not bool(result.vectors.isfinite().all())


def in_dtype_of(operator: SymmetricOperator, result: EigenResult) -> EigenResult:
    """The answer for a wider copy of an operator as one for the operator itself; residuals stay those of the copy."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(operator.device, operator.dtype)

    return EigenResult(
        values=moved(result.values),
        vectors=moved(result.vectors),
        residuals=moved(result.residuals),
        converged=result.converged.to(operator.device),
        applies=result.applies,
        next_value=moved(result.next_value),
        remedies=result.remedies,
    )
