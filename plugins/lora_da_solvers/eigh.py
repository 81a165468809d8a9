"""Dense symmetric eigendecomposition: the reference that every other solver is measured against."""

from __future__ import annotations

from typing import Any

import torch

from lora_da_core import hookimpl
from lora_da_core.interfaces import NoOptions, Solver
from lora_da_core.operators import SymmetricOperator
from lora_da_core.types import EigenResult
from lora_da_solvers._ritz import check_request, dense_smallest


class Eigh(Solver[NoOptions]):
    """Forms the matrix and decomposes it in float64 by LAPACK or cuSOLVER, whatever the operator's dtype.

    Costs O(size³) and 3·size² float64 values per matrix. Batches are solved in one call. `next_value` is exact.
    """

    name = "eigh"
    api_version = 1
    Options = NoOptions

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        check_request(operator, rank)
        return dense_smallest(operator, rank)


@hookimpl
def lora_da_solvers() -> list[type[Solver[Any]]]:
    """The dense solver."""
    return [Eigh]
