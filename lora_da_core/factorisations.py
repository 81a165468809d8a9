"""Eigenvalues and singular values by LAPACK or cuSOLVER, checked, with other ways where one fails; public to plugins.

A divide-and-conquer driver fails now and then on matrices with many close values; the same matrix on another library,
or by QR iteration, does not. Whatever was tried is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_da_core.errors import ConvergenceError

logger = logging.getLogger(__name__)

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Eigenpairs:
    """All eigenpairs of a symmetric matrix.

    Attributes:
        values: (…, n), ascending, float64.
        vectors: (…, n, n), orthonormal columns, float64.
        remedies: What had to be done to find them, in order; empty where nothing had to.
    """

    values: Tensor
    vectors: Tensor
    remedies: tuple[str, ...] = ()


def eigh(matrix: Tensor, what: str, workers: Executor | None = None) -> Eigenpairs:
    """Decomposes in float64 where the matrix is; where that fails on the CPU, and at last there by QR iteration.

    Args:
        matrix: (…, n, n), symmetric; its lower triangle is read.
        what: What it is and of which layer, for messages.
        workers: Decompose the matrices of a batch on the CPU beside each other, to the same bytes.

    Returns:
        The eigenpairs, on the matrix's device.

    Raises:
        ConvergenceError: The matrix holds NaN or infinity, or every way fails.
    """
    wide = matrix.double()
    ways: dict[str, Callable[[Tensor], Parts]] = {
        "as it is": lambda each: _one_by_one(each, workers) if workers else tuple(torch.linalg.eigh(each)),
        "by QR iteration": lambda each: _by_scipy(each, "eigh", driver="ev"),
    }
    (values, vectors), remedies = _first_that_works(wide, what, "eigenvalues", ways)
    return Eigenpairs(values, vectors, remedies)


def svd(matrix: Tensor, what: str, *, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values and vectors in the matrix's dtype, by the same ways as `eigh`.

    Args:
        matrix: (m, n), float32 or float64.
        what: What it is, for messages.
        full_matrices: As `torch.linalg.svd` takes it.

    Returns:
        U, the values, descending, and Vᵀ, on the matrix's device.

    Raises:
        ConvergenceError: The matrix holds NaN or infinity, or every way fails.
    """
    ways: dict[str, Callable[[Tensor], Parts]] = {
        "as it is": lambda each: tuple(torch.linalg.svd(each, full_matrices=full_matrices)),
        "by QR iteration": lambda each: _by_scipy(each, "svd", full_matrices=full_matrices, lapack_driver="gesvd"),
    }
    (u, values, vh), _ = _first_that_works(matrix, what, "singular values", ways)
    return u, values, vh


def _first_that_works(
    matrix: Tensor, what: str, wanted: str, ways: dict[str, Callable[[Tensor], Parts]]
) -> tuple[Parts, tuple[str, ...]]:
    if not bool(matrix.isfinite().all()):
        raise ConvergenceError(
            f"{what} holds NaN or infinity, so it has no {wanted}; check the gradients and the damping of the Fisher "
            "it was made from."
        )
    remedies: list[str] = []
    for name, attempt in _attempts(matrix, ways):
        try:
            parts = attempt()
        except (RuntimeError, ValueError) as error:
            if not _is_numerical(error):
                raise
            reason = str(error).splitlines()[0]
        else:
            if all(bool(part.isfinite().all()) for part in parts):
                for remedy in remedies:
                    logger.warning("%s; solved %s", remedy, name)
                solved = tuple(f"{remedy}; solved {name}" for remedy in remedies[-1:])
                return parts, (*remedies[:-1], *solved)
            reason = "the answer holds NaN or infinity"
        remedies.append(f"{what}: the {wanted} could not be found {name} ({reason})")
    raise ConvergenceError(". ".join(remedies) + ". Raise the damping, or leave the layer out of the targets.")


def _attempts(matrix: Tensor, ways: dict[str, Callable[[Tensor], Parts]]) -> Iterator[tuple[str, Callable[[], Parts]]]:
    first, *others = ways.items()
    yield first[0], lambda: first[1](matrix)
    on_host = matrix.cpu()
    if matrix.device.type != "cpu":
        yield "on the CPU", lambda: tuple(part.to(matrix.device) for part in first[1](on_host))
    for name, way in others:
        yield name, lambda way=way: tuple(part.to(matrix.device) for part in way(on_host))  # type: ignore[misc]


def _one_by_one(matrix: Tensor, workers: Executor) -> Parts:
    """Eigenpairs of each matrix of a batch by a call of its own, as many at a time as there are workers."""
    if matrix.device.type != "cpu" or matrix.ndim < 3:
        return tuple(torch.linalg.eigh(matrix))
    each = list(workers.map(torch.linalg.eigh, matrix.flatten(0, -3)))
    stacked = [torch.stack(parts) for parts in zip(*each, strict=True)]
    return tuple(part.reshape(*matrix.shape[:-2], *part.shape[1:]) for part in stacked)


def _by_scipy(matrix: Tensor, name: str, **options: Any) -> Parts:
    """A decomposition of scipy's of each matrix of a batch."""
    import scipy.linalg

    decompose = getattr(scipy.linalg, name)
    each = [decompose(part.numpy(), **options) for part in matrix.reshape(-1, *matrix.shape[-2:])]
    stacked = [torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*each, strict=True)]
    return tuple(part.reshape(*matrix.shape[:-2], *part.shape[1:]) for part in stacked)


def _is_numerical(error: Exception) -> bool:
    """Whether a library gave up on the numbers; running out of memory and bugs of ours are not that."""
    if isinstance(error, (torch.linalg.LinAlgError, np.linalg.LinAlgError)):  # type: ignore[attr-defined]
        return True
    text = str(error).lower()
    return any(name in text for name in ("cusolver", "magma", "infs or nans"))
