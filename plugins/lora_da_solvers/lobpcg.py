"""Locally optimal block preconditioned conjugate gradients, as torch ships it."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.factorisations import eigh
from lora_da_core.interfaces import Solver
from lora_da_core.operators import Dense, SymmetricOperator
from lora_da_core.types import EigenResult
from lora_da_solvers._ritz import check_request, dense_smallest, each_of_batch, finish, relative_tolerance
from lora_da_solvers._subspace import estimated_norm, orthonormal

_TRACKED = threading.Lock()
"""Held by the one iteration that is tracked: torch puts a tracker on the class of all of them."""


@dataclass(frozen=True)
class LOBPCGOptions:
    """Options of `LOBPCG`.

    Attributes:
        iterations: Most iterations, at least 1; the original LoRA-DA program takes 10, which leaves visible angles.
        tolerance: Residual relative to ‖Ω‖, above 0; not taken below 5e-6 in float32.
    """

    iterations: int = 500
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; give a whole number of at least 1.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; give a number between 0 and 1.")


class LOBPCG(Solver[LOBPCGOptions]):
    """`torch.lobpcg` on the formed matrix, in float64: the solver of the original LoRA-DA program.

    torch takes stored matrices alone, so this saves no memory over `eigh`. Its own test for convergence is not
    relied on: `converged` comes from residuals computed afterwards. Matrices of a batch are solved one after the
    other; orders below three times the rank, which torch refuses, and zero matrices densely.

    Sources: Knyazev 2001, SIAM J. Sci. Comput. 23(2), 517-541; Stathopoulos and Wu 2002, SIAM J. Sci. Comput.
    23(6), 2165-2182 (the orthonormalisation).
    """

    name = "lobpcg"
    api_version = 1
    Options = LOBPCGOptions

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        check_request(operator, rank)
        # Formed once, not once per matrix of a batch.
        formed = Dense(operator.to_dense())
        return each_of_batch(formed, lambda single: self._solve(single, rank, generator))

    def _solve(self, operator: SymmetricOperator, rank: int, generator: torch.Generator) -> EigenResult:
        matrix = operator.to_dense().double()
        largest = float(matrix.abs().max())
        if operator.size < 3 * rank or not 0 < largest < torch.inf:
            return dense_smallest(operator, rank)
        start = torch.randn(operator.size, rank, dtype=torch.float64, device=operator.device, generator=generator)
        scaled = Dense(matrix / largest)  # torch's tests hold absolute thresholds
        norm, norm_applies = estimated_norm(scaled, generator)
        vectors, steps = self._iterate(scaled.matrix, orthonormal(start))
        projected = vectors.mT @ scaled.matmat(vectors)
        ritz = eigh(0.5 * (projected + projected.mT), "the Ritz matrix")
        values, rotation = ritz.values, ritz.vectors
        return finish(
            operator,
            values * largest,
            orthonormal((vectors @ rotation).to(operator.dtype)),
            norm=norm * largest,
            tolerance=relative_tolerance(self.options.tolerance, operator.dtype),
            applies=norm_applies + steps + 1,
            next_value=values.new_tensor(torch.nan),
        )

    def _iterate(self, matrix: Tensor, start: Tensor) -> tuple[Tensor, int]:
        """The last finite iterate, orthonormal, and the number of iterations."""
        last, steps = start, 0

        def remember(worker: Any) -> None:
            nonlocal last, steps
            steps += 1
            if bool(torch.isfinite(worker.X).all()):
                last = worker.X.clone()
            else:
                worker.bvars["force_stop"] = True

        # torch asserts that its count of converged pairs never falls, and rounding near its tolerance can make it
        # fall; a singular Gram matrix is a LinAlgError. The last iterate stands, and is judged by its residuals.
        with _TRACKED, suppress(AssertionError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            torch.lobpcg(
                matrix,
                k=start.shape[-1],
                X=start.clone(),
                niter=self.options.iterations,
                tol=0.5 * self.options.tolerance,
                largest=False,
                method="ortho",
                tracker=cast(None, remember),
            )
        return orthonormal(last), steps


@hookimpl
def lora_da_solvers() -> list[type[Solver[Any]]]:
    """The LOBPCG solver."""
    return [LOBPCG]
