"""ARPACK's implicitly restarted Lanczos method through scipy: few products, on the CPU."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import Solver
from lora_da_core.operators import SymmetricOperator
from lora_da_core.types import EigenResult
from lora_da_solvers._ritz import check_request, dense_smallest, each_of_batch, finish, relative_tolerance
from lora_da_solvers._subspace import estimated_norm, orthonormal

Array = NDArray[np.float64]

_EXTRA_VECTORS = 24
"""Lanczos vectors beyond twice the wanted ones; slow spectra need more than scipy's default of 20 in all."""
_TAKES_RNG = "rng" in inspect.signature(eigsh).parameters
"""Since scipy 1.17 random restarts come from a generator that is seeded by the system unless one is passed."""


@dataclass(frozen=True)
class ArpackOptions:
    """Options of `Arpack`.

    Attributes:
        tolerance: Residual relative to ‖Ω‖, above 0; not taken below 5e-6 in float32.
        max_restarts: Restarts after which one run of ARPACK gives up, at least 1.
    """

    tolerance: float = 1e-8
    max_restarts: int = 300

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; give a number between 0 and 1.")
        if self.max_restarts < 1:
            raise ValueError(f"max_restarts is {self.max_restarts}; give a whole number of at least 1.")


class Arpack(Solver[ArpackOptions]):
    """`scipy.sparse.linalg.eigsh` on the operator's products, one vector at a time.

    ARPACK measures residuals against the eigenvalue, which may be zero, and holds absolute thresholds, so it is
    given Ω/‖Ω‖ − 2I. It sees one copy of a multiple eigenvalue, so the complement of what it found is searched
    until nothing lower turns up. Vectors live in float64 on the CPU; products are made in the operator's dtype on
    its device. Matrices of a batch are solved one after the other; operators of order below 4·(rank + 1) or 32
    densely, because ARPACK needs room.

    Source: Lehoucq, Sorensen and Yang 1998, ARPACK Users' Guide.
    """

    name = "arpack"
    api_version = 1
    Options = ArpackOptions

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        check_request(operator, rank)
        if operator.size < max(4 * (rank + 1), 32):
            return dense_smallest(operator, rank)
        return each_of_batch(operator, lambda single: _Run(single, rank, self.options, generator).result())


class _Run:
    """One matrix."""

    def __init__(
        self, operator: SymmetricOperator, rank: int, options: ArpackOptions, generator: torch.Generator
    ) -> None:
        self.operator = operator
        self.rank = rank
        self.tolerance = relative_tolerance(options.tolerance, operator.dtype)
        self.max_restarts = options.max_restarts
        self.generator = generator
        norm, self.applies = estimated_norm(operator, generator)
        self.norm = float(norm)

    def result(self) -> EigenResult:
        """The wanted pairs, after the complement was searched for lower ones."""
        found = self._random(self.rank)
        if self.norm == 0.0:  # a product with a random block vanishes for the zero matrix alone
            return self._finish(np.zeros(self.rank), np.linalg.qr(found)[0], next_value=0.0)
        found, _ = self._eigsh(self.rank, np.empty((self.operator.size, 0)))
        values, vectors = self._rayleigh_ritz(found)
        next_value = np.nan
        # Every fall adds one copy of an eigenvalue at least, and no more than `rank` copies can be wanted.
        for _ in range(2 * self.rank):
            extra, searched = self._eigsh(1, vectors)
            all_values, all_vectors = self._rayleigh_ritz(np.concatenate([vectors, extra], axis=1))
            fallen = values.sum() - all_values[: self.rank].sum()
            next_value = all_values[self.rank]
            if fallen <= self.rank * self.tolerance * self.norm:
                return self._finish(values, vectors, next_value, believed=searched)
            values, vectors = all_values[: self.rank], all_vectors[:, : self.rank]
        return self._finish(values, vectors, next_value, believed=False)

    def _random(self, columns: int) -> Array:
        shape = (self.operator.size, columns)
        device = self.operator.device
        block = torch.randn(shape, dtype=torch.float64, device=device, generator=self.generator)
        return block.cpu().numpy()

    def _product(self, block: Array) -> Array:
        """ΩX for a block of columns."""
        self.applies += 1
        return self.operator.matmat(self._tensor(block)).to("cpu", torch.float64).numpy()

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.operator.device, self.operator.dtype)

    def _eigsh(self, count: int, locked: Array) -> tuple[Array, bool]:
        """Lowest eigenvectors (size, count) orthogonal to `locked`, and whether ARPACK calls them converged."""
        size = self.operator.size

        def without_locked(block: Array) -> Array:
            return block - locked @ (locked.T @ block)

        def shifted(block: Array) -> Array:
            # Locked directions get eigenvalue 0, above all others after the shift.
            block = without_locked(block.reshape(size, -1))
            return without_locked(self._product(block) / self.norm - 2.0 * block)

        start = without_locked(self._random(1))[:, 0]
        seeded: dict[str, Any] = {"rng": np.random.default_rng(self._seed())} if _TAKES_RNG else {}
        try:
            _, vectors = eigsh(
                LinearOperator((size, size), matvec=shifted, matmat=shifted, dtype=np.float64),
                k=count,
                which="SA",
                v0=start,
                ncv=min(size, 2 * count + _EXTRA_VECTORS),
                tol=self.tolerance / 3.0,  # relative to the shifted eigenvalues, of 1 to 3
                maxiter=self.max_restarts,
                **seeded,
            )
            return vectors, True
        except ArpackNoConvergence as failure:
            # What did converge is kept; random columns take the place of the rest, and residuals will say so.
            vectors = failure.eigenvectors[:, :count]
            return np.concatenate([vectors, without_locked(self._random(count - vectors.shape[1]))], axis=1), False

    def _seed(self) -> int:
        device = self.operator.device
        return int(torch.randint(2**31, (1,), device=device, generator=self.generator))

    def _rayleigh_ritz(self, block: Array) -> tuple[Array, Array]:
        """Ritz values, ascending, and vectors of the span of `block`."""
        basis = np.linalg.qr(block)[0]
        projected = basis.T @ self._product(basis)
        values, rotation = np.linalg.eigh(0.5 * (projected + projected.T))
        return values, basis @ rotation

    def _finish(self, values: Array, vectors: Array, next_value: float, believed: bool = True) -> EigenResult:
        found = finish(
            self.operator,
            torch.from_numpy(values.copy()),
            orthonormal(self._tensor(vectors)),
            norm=torch.tensor(self.norm, dtype=torch.float64),
            tolerance=self.tolerance,
            applies=self.applies,
            next_value=torch.tensor(next_value, dtype=torch.float64),
        )
        return found if believed else replace(found, converged=torch.zeros_like(found.converged))


@hookimpl
def lora_da_solvers() -> list[type[Solver[Any]]]:
    """The ARPACK solver."""
    return [Arpack]
