"""Randomised block Krylov projection with oversampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_da_core import hookimpl
from lora_da_core.interfaces import Solver
from lora_da_core.operators import SymmetricOperator
from lora_da_core.types import EigenResult
from lora_da_solvers._ritz import check_request, dense_smallest, finish, relative_tolerance
from lora_da_solvers._subspace import Subspace, orthonormal


@dataclass(frozen=True)
class RandomizedSVDOptions:
    """Options of `RandomizedSVD`.

    Attributes:
        oversampling: Columns beyond the rank that the sketch has, at least 1.
        depth: Powers of the operator that one Krylov space holds beyond the zeroth, at least 1.
        tolerance: Residual relative to ‖Ω‖ that ends the iteration, above 0; not taken below 5e-6 in float32.
        max_applies: Block products after which it stops, at least 1; `depth` + 1 makes it a single sketch.
    """

    oversampling: int = 8
    depth: int = 8
    tolerance: float = 1e-5
    max_applies: int = 300

    def __post_init__(self) -> None:
        for name in ("oversampling", "depth", "max_applies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a whole number of at least 1.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; give a number between 0 and 1.")


class RandomizedSVD(Solver[RandomizedSVDOptions]):
    """Rayleigh-Ritz on the Krylov space of a random block, restarted from its best vectors.

    A plain randomised SVD finds the eigenvalues of largest magnitude. Ω is indefinite and its smallest eigenvalues
    are wanted; a Krylov space holds all shifted powers of Ω, so Rayleigh-Ritz on it needs no shift. The block is
    wider than the rank, which covers any multiplicity that matters. Residuals are the error estimate: one below
    ε‖Ω‖ puts an eigenvalue within ε‖Ω‖ of the Ritz value. Operators of order below three blocks are solved
    densely. Batches are solved in one go.

    Sources: Halko, Martinsson and Tropp 2011, SIAM Review 53(2), 217-288; Musco and Musco 2015,
    arXiv 1504.05477 (block Krylov).
    """

    name = "randomized_svd"
    api_version = 1
    Options = RandomizedSVDOptions

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        check_request(operator, rank)
        options = self.options
        width = rank + options.oversampling
        if operator.size < 3 * width:
            return dense_smallest(operator, rank)
        tolerance = relative_tolerance(options.tolerance, operator.dtype)
        space = Subspace(operator, min((options.depth + 1) * width, operator.size - width), generator)
        space.append(space.orthonormalise(space.random_block(width)))
        while space.applies < options.max_applies - 1:  # the last product is for the final residuals
            if bool((space.residual_norms(rank).amax(-1) <= 0.8 * tolerance * space.norm).all()):
                break
            if space.filled + width > space.capacity:
                space.restart(width)
            space.append(space.orthonormalise(space.products[..., space.filled - width :]))
        pairs = space.ritz()
        return finish(
            operator,
            pairs.values[..., :rank],
            orthonormal(space.ritz_vectors(rank)[0]),
            norm=space.norm,
            tolerance=tolerance,
            applies=space.applies,
            next_value=pairs.values[..., rank],
        )


@hookimpl
def lora_da_solvers() -> list[type[Solver[Any]]]:
    """The randomised block Krylov solver."""
    return [RandomizedSVD]
