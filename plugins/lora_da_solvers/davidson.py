"""Block Davidson, preconditioned by the operator's own approximate inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_da_core import hookimpl
from lora_da_core.interfaces import Solver
from lora_da_core.operators import SymmetricOperator
from lora_da_core.types import EigenResult
from lora_da_solvers._expansion import BASIS_BLOCKS, Expansion, Inverse
from lora_da_solvers._ritz import check_request, dense_smallest, each_of_batch, relative_tolerance
from lora_da_solvers._subspace import Subspace

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
        return each_of_batch(operator, lambda single: self._solve(single, rank, generator))

    def _solve(self, operator: SymmetricOperator, rank: int, generator: torch.Generator) -> EigenResult:
        width = max(8, rank)
        space = Subspace(operator, min(BASIS_BLOCKS * width, operator.size - width), generator)
        space.append(space.orthonormalise(space.random_block(width)))
        expansion = Expansion(
            space,
            rank,
            width,
            tolerance=relative_tolerance(self.options.tolerance, operator.dtype),
            budget=self.options.max_applies,
            inverse=_Preconditioner(operator),
        )
        return expansion.result()


class _Preconditioner:
    """The operator's approximate (Ω + shift·I)⁻¹ for a shift near −θ_1, made anew where θ_1 has moved."""

    def __init__(self, operator: SymmetricOperator) -> None:
        self._operator = operator
        self._shift = 0.0
        self._inverse: Inverse | None = None

    def __call__(self, space: Subspace) -> Inverse | None:
        lowest = float(space.ritz().values[0])
        shift = max(-lowest, _LEAST_SHIFT * float(space.norm))
        if shift > 0 and abs(shift - self._shift) > _SHIFT_DRIFT * self._shift:
            self._shift = shift
            self._inverse = self._operator.preconditioner(shift)
        return self._inverse


@hookimpl
def lora_da_solvers() -> list[type[Solver[Any]]]:
    """The block Davidson solver."""
    return [Davidson]
