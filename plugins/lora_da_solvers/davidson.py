"""Block Davidson, preconditioned by the operator's own approximate inverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import Solver
from lora_da_core.operators import SymmetricOperator
from lora_da_core.types import EigenResult
from lora_da_solvers._ritz import check_request, dense_smallest, each_of_batch, finish, relative_tolerance
from lora_da_solvers._subspace import Subspace, orthonormal

_BASIS_BLOCKS = 10
"""Blocks that the basis holds before it is restarted."""
_KEPT_BLOCKS = 3
"""Blocks of Ritz vectors that a restart keeps."""
_VERIFICATION_STEPS = 3
"""Products after a random block was injected, before convergence is believed."""
_SHIFT_DRIFT = 0.1
"""Relative change of the lowest Ritz value that is worth a new factorisation of the preconditioner."""
_LEAST_SHIFT = 1e-6
"""Least shift relative to ‖Ω‖, where the lowest eigenvalue is not negative."""


@dataclass(frozen=True)
class DavidsonOptions:
    """Options of `Davidson`.

    Attributes:
        tolerance: Residual relative to ‖Ω‖, above 0; not taken below 5e-6 in float32.
        max_applies: Block products after which it gives up, at least 1; a first block and the final residuals are
            always made.
    """

    tolerance: float = 1e-8
    max_applies: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; give a number between 0 and 1.")
        if self.max_applies < 1:
            raise ValueError(f"max_applies is {self.max_applies}; give a whole number of at least 1.")


class Davidson(Solver[DavidsonOptions]):
    """Expands the basis by preconditioned residuals, for spectra that reach far above the wanted end.

    Where ‖Ω‖ is orders of magnitude above |λ_1|, Krylov spaces spend themselves on the top of the spectrum.
    Residuals times `operator.preconditioner(−θ_1)` do not. An operator that offers none is expanded by plain
    residuals, which is block Lanczos with Davidson's bookkeeping. Convergence is believed after a random block was
    injected and the sum of the wanted Ritz values did not fall over three products. Matrices of a batch are
    solved one after the other; operators of order below five blocks densely.

    Sources: Davidson 1975, J. Comput. Phys. 17, 87-94; Morgan and Scott 1986, SIAM J. Sci. Stat. Comput. 7(3),
    817-825 (other preconditioners than the diagonal).
    """

    name = "davidson"
    api_version = 1
    Options = DavidsonOptions

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        check_request(operator, rank)
        if operator.size < 5 * max(8, rank):
            return dense_smallest(operator, rank)
        return each_of_batch(operator, lambda single: _Run(single, rank, self.options, generator).result())


class _Run:
    """One matrix."""

    def __init__(
        self, operator: SymmetricOperator, rank: int, options: DavidsonOptions, generator: torch.Generator
    ) -> None:
        self.operator = operator
        self.rank = rank
        self.width = max(8, rank)
        self.tolerance = relative_tolerance(options.tolerance, operator.dtype)
        self.budget = options.max_applies
        self.space = Subspace(operator, min(_BASIS_BLOCKS * self.width, operator.size - self.width), generator)
        self._shift = 0.0
        self._inverse: Callable[[Tensor], Tensor] | None = None
        self._verified_sum = torch.inf
        """Sum of the wanted Ritz values that the last verification left standing; infinite where there was none."""

    def result(self) -> EigenResult:
        """Iterate to a verified result, or to the end of the budget."""
        space = self.space
        space.append(space.orthonormalise(space.random_block(self.width)))
        verified = False
        while not verified and space.applies < self.budget - 1:  # the last product is for the final residuals
            if self._worst_residual() > 0.8:
                self._expand(self._residuals(0))
            elif space.applies + _VERIFICATION_STEPS < self.budget:
                self._verify()
            else:
                break
            verified = self._stands() and self._worst_residual() <= 1.0
        pairs = space.ritz()
        found = finish(
            self.operator,
            pairs.values[: self.rank],
            orthonormal(space.ritz_vectors(self.rank)[0]),
            norm=space.norm,
            tolerance=self.tolerance,
            applies=space.applies,
            next_value=pairs.values[self.rank] if space.filled > self.rank else pairs.values.new_tensor(torch.nan),
        )
        return found if verified else replace(found, converged=torch.zeros_like(found.converged))

    def _worst_residual(self) -> float:
        """The largest residual of the wanted pairs in units of the tolerance."""
        residual = self.space.residual_norms(self.rank).max()
        return float(residual / (self.tolerance * self.space.norm).clamp_min(torch.finfo(torch.float64).tiny))

    def _residuals(self, first: int) -> Tensor:
        """Residuals of a block's width of Ritz pairs, from pair `first` on."""
        last = min(first + self.width, self.space.filled)
        vectors, products = self.space.ritz_vectors(last)
        return (products - vectors * self.space.ritz().values[:last].to(vectors))[:, first:]

    def _expand(self, residuals: Tensor) -> None:
        """Take preconditioned directions into the basis; restarts it where it is full."""
        space = self.space
        inverse = self._preconditioner()
        # Restarting first is safe: unlike a Lanczos block, residuals do not rest on what a restart discards.
        if space.filled + residuals.shape[-1] > space.capacity:
            space.restart(min(_KEPT_BLOCKS * self.width, space.capacity - self.width))
        space.append(space.orthonormalise(residuals if inverse is None else inverse(residuals)))

    def _preconditioner(self) -> Callable[[Tensor], Tensor] | None:
        """The operator's approximate (Ω + shift·I)⁻¹ for a shift near −θ_1, made anew where θ_1 has moved."""
        lowest = float(self.space.ritz().values[0])
        shift = max(-lowest, _LEAST_SHIFT * float(self.space.norm))
        if shift > 0 and abs(shift - self._shift) > _SHIFT_DRIFT * self._shift:
            self._shift = shift
            self._inverse = self.operator.preconditioner(shift)
        return self._inverse

    def _sum(self) -> float:
        return float(self.space.ritz().values[: self.rank].sum())

    def _holds(self, before: float) -> bool:
        """Whether the sum of the wanted Ritz values is what it was, to the tolerance."""
        return before - self._sum() <= self.rank * self.tolerance * float(self.space.norm)

    def _stands(self) -> bool:
        """Whether the sum was verified and did not fall since.

        Among close eigenvalues a random block mixes the Ritz vectors anew, so residuals may be above the tolerance
        right after it; a second block would only do the same again.
        """
        return self._verified_sum < torch.inf and self._holds(self._verified_sum)

    def _verify(self) -> None:
        """Inject a random block, expand where the unwanted pairs are worst known, and see whether the sum stands."""
        before = self._sum()
        self._expand(self.space.random_block(self.width))
        for _ in range(_VERIFICATION_STEPS - 1):
            self._expand(self._residuals(self.rank))
        self._verified_sum = self._sum() if self._holds(before) else torch.inf


@hookimpl
def lora_da_solvers() -> list[type[Solver[Any]]]:
    """The block Davidson solver."""
    return [Davidson]
