"""Block Lanczos with full reorthogonalisation, thick restart and a verification round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.factorisations import eigh
from lora_da_core.interfaces import Solver
from lora_da_core.operators import Dense, SymmetricOperator
from lora_da_core.types import EigenResult
from lora_da_solvers._ritz import assemble, check_request, dense_smallest, relative_tolerance, residual_norms
from lora_da_solvers._shift_invert import inverted
from lora_da_solvers._subspace import Subspace, orthonormal

_KRYLOV_BLOCKS = 12
"""Blocks that the basis holds beyond the wanted vectors before it is restarted."""
_KEPT_BLOCKS = 4
"""Blocks' worth of further Ritz vectors that a restart keeps."""
_MARGIN = 0.8
"""Fraction of the tolerance to iterate to, so that rounding does not undo convergence."""
_LEAST_STEPS = 3
"""Products that a verification round makes at least."""
_LEAST_PROBE = 4
"""Columns of a verification round's random block at least: one column alone can be nearly orthogonal to a copy."""
_OVERSAMPLING = 4
"""Columns beyond the rank that a block has by default, and from which on it can miss none of the wanted vectors."""
_LEVEL = 1e-3
"""Accuracy relative to the wanted eigenvalues at which a verification round may end without a gap in sight."""
_FIRST_LOOK = 5
"""Products before the first look where looks are kept few: the basis is small yet, and so is its eigenproblem."""
_STRIDE = 3
"""Least products from one look at the Ritz values to the next where looks are kept few."""
_PATIENCE = 30
"""Products over which convergence is watched before a matrix may be given up."""
_HOPE = 2
"""A matrix is given up that at its rate over those products needs this many times what is left of the budget."""
_BRIEF_PATIENCE = 16
"""The same as `_PATIENCE` for a matrix that can be inverted."""
_PRODUCTS_OF_AN_INVERSE = 64
"""Products that take as long as an inverse and the few steps with it: a matrix that needs more of them is inverted.

Measured on one H200 at orders 4,096 and 11,008: 7 and 58 ms for the inverse, 0.1 to 1 ms for a product and what a
step makes of it.
"""
_ATTEMPTS = 4
"""How often residuals recomputed from fresh products may contradict the kept ones before rounding is blamed."""


@dataclass(frozen=True)
class LanczosOptions:
    """Options of `Lanczos`.

    Attributes:
        block_size: Columns p of one product, at least 1; None takes max(8, rank + 4).
        tolerance: Residual relative to ‖Ω‖ (the largest |Ritz value|), above 0; not taken below 5e-6 in float32.
        max_applies: Block products after which it gives up, at least 1; enough blocks to hold the rank and the final
            residuals are always made.
        shift_invert: Whether a stored matrix whose Krylov space converges slowly is inverted below its spectrum, at
            cubic cost; None on accelerators alone.
    """

    block_size: int | None = None
    tolerance: float = 1e-8
    max_applies: int = 200
    shift_invert: bool | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}; give a whole number of at least 1, or None.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; give a number between 0 and 1.")
        if self.max_applies < 1:
            raise ValueError(f"max_applies is {self.max_applies}; give a whole number of at least 1.")


class Lanczos(Solver[LanczosOptions]):
    """Matrix-free block Lanczos for one matrix or a batch, on any device.

    Krylov methods see at most block-size copies of an eigenvalue, and their residuals are small all the same.
    So convergence is only believed after a verification round: the converged vectors are locked, a random block
    is driven through at least three products, until it shows where the rest of the spectrum starts, and the
    result is accepted if the sum of the wanted Ritz values did not fall. Otherwise iteration goes on from the
    better vectors. Operators too small for a Krylov space are solved densely. Stored matrices that need more
    products than an inverse costs are shifted and inverted on an accelerator, see `inverted`.

    Sources: Golub and Underwood 1977 (block Lanczos); Wu and Simon 2000, SIAM J. Matrix Anal. Appl. 22(2),
    602-616 (thick restart).
    """

    name = "lanczos"
    api_version = 1
    Options = LanczosOptions

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        check_request(operator, rank)
        width = self.options.block_size or max(8, rank + _OVERSAMPLING)
        if operator.size < rank + 4 * max(width, rank, _LEAST_PROBE):
            return dense_smallest(operator, rank)
        stored = operator if isinstance(operator, Dense) and self._inverts(operator.device) else None
        run = _Run(operator, rank, width, self.options, generator, inverts=stored is not None)
        found = run.result()
        left = self.options.max_applies - found.applies
        if stored is None or left < 1 or bool(found.converged.all()):
            return found
        norm = run.space.norm
        return inverted(stored, found, norm, tolerance=run.tolerance, budget=left, generator=generator)

    def _inverts(self, device: torch.device) -> bool:
        return _is_patient(device) if self.options.shift_invert is None else self.options.shift_invert


@dataclass(frozen=True)
class _Candidate:
    """Orthonormal vectors, fresh products, Ritz values, residual norms: what is explicitly known."""

    vectors: Tensor
    products: Tensor
    values: Tensor
    residuals: Tensor


class _Run:
    """One call of the solver. Decisions are taken on the CPU, from small matrices and norms."""

    def __init__(
        self,
        operator: SymmetricOperator,
        rank: int,
        width: int,
        options: LanczosOptions,
        generator: torch.Generator,
        *,
        inverts: bool,
    ) -> None:
        self.operator = operator
        self.rank = rank
        self.inverts = inverts
        self.width = width
        self.probe = max(width, _LEAST_PROBE)
        self.tolerance = relative_tolerance(options.tolerance, operator.dtype)
        self.budget = options.max_applies
        self.patient = _is_patient(operator.device)
        capacity = min(rank + _KRYLOV_BLOCKS * max(self.probe, rank), operator.size - self.probe)
        self.keep = min(rank + _KEPT_BLOCKS * self.probe, capacity - self.probe)
        self.space = Subspace(operator, capacity, generator)
        self.next_value = torch.full(operator.batch_shape, torch.inf, dtype=torch.float64)
        self.hopeless = torch.zeros(operator.batch_shape, dtype=torch.bool)
        """Matrices that the others of the batch no longer wait for."""
        self._watched: tuple[int, Tensor] | None = None
        """Products and residuals, in units of the tolerance, that progress is measured from."""

    def result(self) -> EigenResult:
        """Iterate until the candidates of all matrices pass verification, or the budget is spent."""
        space = self.space
        space.append(space.orthonormalise(space.random_block(self.width)))
        verified = torch.zeros(self.operator.batch_shape, dtype=torch.bool)
        contradicted = 0
        while True:
            started = space.applies
            self._iterate()
            candidate = self._candidate()
            accurate = self._accurate(candidate)
            last = space.applies >= self._iteration_budget or contradicted == _ATTEMPTS
            if not bool((accurate | self.hopeless).all()) and not last:
                contradicted += 1
                self._resume(candidate)
                continue
            if not bool(accurate.any()):
                break
            verified = accurate & self._verify(candidate, space.applies - started)
            if bool((verified | self.hopeless).all()) or last or space.applies >= self._iteration_budget:
                break
            # What the round found has as many inaccurate directions as its block had columns.
            self.width = self.probe
            self._resume(self._candidate())
        unknown = torch.where(self.next_value.isinf(), torch.nan, self.next_value)
        return assemble(
            self.operator,
            candidate.values,
            candidate.vectors,
            candidate.residuals,
            converged=verified,
            applies=space.applies,
            next_value=unknown,
        )

    @property
    def _iteration_budget(self) -> int:
        """Applies after which iteration stops, so that what has converged by then can still be verified."""
        return self.budget - self.budget // 4

    def _advance(self, width: int) -> None:
        """One Krylov step from the newest block, of that width; restarts the basis where it is full."""
        space = self.space
        block = space.orthonormalise(space.products[..., space.filled - width :])
        if space.filled + width > space.capacity:
            space.restart(self.keep)
        space.append(block)

    def _iterate(self) -> None:
        """Krylov steps until the kept products say that all matrices have converged, or the budget is spent."""
        pause, worst, self._watched = self._to_first_look(), torch.inf, None
        while True:
            for _ in range(pause):
                if self.space.applies < self._iteration_budget or self.space.filled < self.rank:
                    self._advance(self.width)
            before, worst = worst, self._worst_residual()
            if worst <= _MARGIN or self.space.applies >= self._iteration_budget:
                return
            pause = self._to_next_look(before, worst, pause)

    def _to_first_look(self) -> int:
        """Krylov steps before the first look at the Ritz values; the second comes where a restart needs them anyway."""
        return max(2, min(_FIRST_LOOK - 1, self._room())) if self.patient else 2

    def _to_next_look(self, before: float, worst: float, steps: int) -> int:
        """Steps to go, from the residuals at the last two looks: on an accelerator all that should be needed."""
        if not self.patient:
            return max(1, min(4, int(0.5 * _needed(before, worst, steps, 4))))
        return max(_STRIDE, min(self._room(), math.ceil(_needed(before, worst, steps, self._room()))))

    def _room(self) -> int:
        """Steps until the basis is full, after a restart where it is."""
        filled = self.space.filled if self.space.filled + self.width <= self.space.capacity else self.keep
        return (self.space.capacity - filled) // self.width

    def _worst_residual(self) -> float:
        """The largest residual in units of the tolerance, over the matrices that are waited for; 0 without any."""
        space = self.space
        if space.filled <= self.rank:
            return torch.inf
        self._note_next_value()
        relative = space.residual_norms(self.rank).amax(-1) / self._allowed()
        self._give_up(relative)
        return float(relative.masked_fill(self.hopeless, 0.0).max())

    def _give_up(self, relative: Tensor) -> None:
        """Marks the matrices whose residuals, in units of the tolerance, fall too slowly to end within the budget.

        Or sooner, where something else takes less.
        """
        applies = self.space.applies
        if self._watched is None:
            self._watched = applies, relative
        since, before = self._watched
        if applies - since < (_BRIEF_PATIENCE if self.inverts else _PATIENCE):
            return
        bearable = _HOPE * (self._iteration_budget - applies)
        if self.inverts:
            bearable = min(bearable, _PRODUCTS_OF_AN_INVERSE)
        rate = (before / relative).log() / (applies - since)
        needed = relative.log() / rate.clamp_min(torch.finfo(rate.dtype).tiny)
        self.hopeless |= (relative > 1) & (needed > bearable)
        self._watched = applies, relative

    def _allowed(self) -> Tensor:
        """The residual that counts as converged, (…); above 0 even for a zero matrix."""
        return (self.tolerance * self.space.norm).clamp_min(torch.finfo(torch.float64).tiny)

    def _note_next_value(self) -> None:
        """Ritz values bound eigenvalues from above in every subspace, so the least one seen is the best."""
        self.next_value = torch.minimum(self.next_value, self.space.ritz().values[..., self.rank])

    def _candidate(self) -> _Candidate:
        """The wanted Ritz pairs, orthonormalised anew, with fresh products."""
        space = self.space
        vectors = orthonormal(space.ritz_vectors(self.rank)[0])
        products = self.operator.matmat(vectors)
        space.applies += 1
        projected = (vectors.mT @ products).to("cpu", torch.float64)
        ritz = eigh(0.5 * (projected + projected.mT), "the Ritz matrix")
        values, rotation = ritz.values, ritz.vectors.to(vectors.device, vectors.dtype)
        vectors, products = vectors @ rotation, products @ rotation
        residuals = residual_norms(products, vectors, values.to(vectors.device)).cpu()
        return _Candidate(vectors, products, values, residuals)

    def _accurate(self, candidate: _Candidate) -> Tensor:
        """Which matrices' candidates meet the tolerance, (…)."""
        return (candidate.residuals <= self._allowed().unsqueeze(-1)).all(-1)

    def _verify(self, candidate: _Candidate, effort: int) -> Tensor:
        """Look for something lower in the complement of the candidate; which matrices' sums stand, (…).

        Stops once the least Ritz value of the complement is known well enough to lie above the wanted ones, or
        after the `effort` that finding the candidate took: a hidden copy shows at least as fast.
        """
        space = self.space
        space.seed(candidate.vectors, candidate.products)
        space.append(space.orthonormalise(space.random_block(self.probe)))
        steps, look = 1, _LEAST_STEPS
        if self.width >= self.rank + _OVERSAMPLING:
            effort = 0
        while space.applies < self.budget and (steps < _LEAST_STEPS or steps < effort):
            if steps >= look:
                if self._separated():
                    break
                look = 2 * steps if self.patient else steps + 1
            self._advance(self.probe)
            steps += 1
        self._note_next_value()
        fallen = candidate.values.sum(-1) - space.ritz().values[..., : self.rank].sum(-1)
        stands = fallen <= self.rank * self.tolerance * space.norm
        return stands if steps >= _LEAST_STEPS else torch.zeros_like(stands)

    def _separated(self) -> bool:
        """Whether the first unwanted Ritz value is accurate to its distance from the last wanted one."""
        values = self.space.ritz().values[..., : self.rank + 1]
        residual = self.space.residual_norms(self.rank + 1)[..., -1]
        distance = values[..., -1] - values[..., -2]
        level = torch.maximum(_LEVEL * values.abs().amax(-1), 10 * self._allowed())
        return bool((residual <= torch.maximum(distance, level)).all())

    def _resume(self, candidate: _Candidate) -> None:
        """Go on from a candidate with its worst residuals as the next block, filled up with random columns."""
        space = self.space
        residual = candidate.products - candidate.vectors * candidate.values.to(candidate.vectors).unsqueeze(-2)
        worst = residual.norm(dim=-2, keepdim=True).argsort(dim=-1, descending=True, stable=True)
        block = residual.gather(-1, worst.expand_as(residual))[..., : self.width]
        space.seed(candidate.vectors, candidate.products)
        fresh = space.random_block(self.width - block.shape[-1])
        space.append(space.orthonormalise(torch.cat([block, fresh], -1)))


def _is_patient(device: torch.device) -> bool:
    """Whether looks at the Ritz values are kept few: an accelerator waits for the host's small eigenproblems.

    They take longer than its products, so there the Ritz values are looked at once while the basis is small and then
    where it is full, and before that only where the observed rate says that convergence comes sooner.
    """
    return device.type != "cpu"


def _needed(before: float, worst: float, steps: int, unknown: float) -> float:
    """Steps that convergence takes at the rate of the last ones; `unknown` where they made no progress."""
    if not worst < before < torch.inf:
        return unknown
    return steps * math.log(worst) / math.log(before / worst) if worst > 1 else 1.0


@hookimpl
def lora_da_solvers() -> list[type[Solver[Any]]]:
    """The block Lanczos solver."""
    return [Lanczos]
