"""A basis expanded by preconditioned residuals, for one matrix or a batch: what Davidson and shift-and-invert share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_da_core.types import EigenResult
from lora_da_solvers._ritz import assemble, residual_norms
from lora_da_solvers._subspace import Subspace, orthonormal

BASIS_BLOCKS = 10
"""Blocks that the basis holds before it is restarted."""
_KEPT_BLOCKS = 3
"""Blocks of Ritz vectors that a restart keeps."""
_VERIFICATION_STEPS = 3
"""Products after a random block was injected, before convergence is believed."""
_MARGIN = 0.8
"""Fraction of the tolerance to iterate to, so that rounding does not undo convergence."""

Inverse = Callable[[Tensor], Tensor]
"""A product with an approximate (Ω + shift·I)⁻¹ on blocks (…, size, k)."""


class Expansion:
    """Rayleigh-Ritz on a basis that grows by preconditioned residuals.

    Residuals are those of Ω itself, so what the preconditioner loses to rounding costs steps and no accuracy.
    Convergence is believed after a random block was injected and the sum of the wanted Ritz values did not fall over
    three products. A batch goes on until all its matrices are verified, or the budget is spent.
    """

    def __init__(
        self,
        space: Subspace,
        rank: int,
        width: int,
        *,
        tolerance: float,
        budget: int,
        inverse: Callable[[Subspace], Inverse | None],
    ) -> None:
        """Start from what the space holds.

        Args:
            space: With at least one block, and room for `BASIS_BLOCKS` of them where the order allows it.
            rank: How many eigenpairs are wanted.
            width: Columns of a block, at least the rank.
            tolerance: Residual relative to ‖Ω‖ that counts as converged.
            budget: Products after which it gives up.
            inverse: Asked before every expansion for the preconditioner; None expands by plain residuals.
        """
        self.space = space
        self.rank = rank
        self.width = width
        self.tolerance = tolerance
        self.budget = budget
        self._inverse = inverse
        self._verified_sum = torch.full(space.operator.batch_shape, torch.inf, dtype=torch.float64)
        """Sums of the wanted Ritz values that the last verification left standing; infinite where there was none."""

    def result(self) -> EigenResult:
        """Iterate to a verified result, or to the end of the budget."""
        space = self.space
        verified = torch.zeros(space.operator.batch_shape, dtype=torch.bool)
        while not bool(verified.all()) and space.applies < self.budget - 1:  # the last is for the final residuals
            if bool((self._worst_residual() > _MARGIN).any()):
                self._expand(self._residuals(0))
            elif space.applies + _VERIFICATION_STEPS < self.budget:
                self._verify()
            else:
                break
            verified = self._stands() & (self._worst_residual() <= 1.0)
        return self._found(verified)

    def _found(self, verified: Tensor) -> EigenResult:
        space, pairs = self.space, self.space.ritz()
        values = pairs.values[..., : self.rank]
        vectors = orthonormal(space.ritz_vectors(self.rank)[0])
        residuals = residual_norms(space.operator.matmat(vectors), vectors, values.to(vectors.device)).cpu()
        unknown = values.new_full(values.shape[:-1], torch.nan)
        return assemble(
            space.operator,
            values,
            vectors,
            residuals,
            converged=verified & (residuals <= self._allowed().unsqueeze(-1)).all(-1),
            applies=space.applies + 1,
            next_value=pairs.values[..., self.rank] if space.filled > self.rank else unknown,
        )

    def _allowed(self) -> Tensor:
        """The residual that counts as converged, (…); above 0 even for a zero matrix."""
        return (self.tolerance * self.space.norm).clamp_min(torch.finfo(torch.float64).tiny)

    def _worst_residual(self) -> Tensor:
        """The largest residual of the wanted pairs in units of the tolerance, (…)."""
        return self.space.residual_norms(self.rank).amax(-1) / self._allowed()

    def _residuals(self, first: int) -> Tensor:
        """Residuals of a block's width of Ritz pairs, from pair `first` on."""
        last = min(first + self.width, self.space.filled)
        vectors, products = self.space.ritz_vectors(last)
        values = self.space.ritz().values[..., :last].to(vectors)
        return (products - vectors * values.unsqueeze(-2))[..., first:]

    def _expand(self, residuals: Tensor) -> None:
        """Take preconditioned directions into the basis; restarts it where it is full."""
        space = self.space
        inverse = self._inverse(space)
        # Restarting first is safe: unlike a Lanczos block, residuals do not rest on what a restart discards.
        if space.filled + residuals.shape[-1] > space.capacity:
            space.restart(min(_KEPT_BLOCKS * self.width, space.capacity - self.width))
        space.append(space.orthonormalise(residuals if inverse is None else inverse(residuals)))

    def _sum(self) -> Tensor:
        return self.space.ritz().values[..., : self.rank].sum(-1)

    def _holds(self, before: Tensor) -> Tensor:
        """Whether the sum of the wanted Ritz values is what it was, to the tolerance, (…)."""
        return before - self._sum() <= self.rank * self.tolerance * self.space.norm

    def _stands(self) -> Tensor:
        """Whether the sum was verified and did not fall since, (…).

        Among close eigenvalues a random block mixes the Ritz vectors anew, so residuals may be above the tolerance
        right after it; a second block would only do the same again.
        """
        return (self._verified_sum < torch.inf) & self._holds(self._verified_sum)

    def _verify(self) -> None:
        """Inject a random block, expand where the unwanted pairs are worst known, and see whether the sum stands."""
        before = self._sum()
        self._expand(self.space.random_block(self.width))
        for _ in range(_VERIFICATION_STEPS - 1):
            self._expand(self._residuals(self.rank))
        self._verified_sum = torch.where(self._holds(before), self._sum(), torch.inf)
