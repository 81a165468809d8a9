"""Damped Kronecker factors: positive definite matrices that were checked, factorised and inverted in float64.

On an accelerator, where products with skinny blocks are limited by the bytes that they read, products with a
well-conditioned factor's inverse are made in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_da_core.errors import DataError, ModelError
from lora_da_core.factorisations import eigh
from lora_da_core.inverses import inverse_from_cholesky
from lora_da_core.operators import Dense, Diagonal, SymmetricOperator, row_major
from lora_da_core.types import DampingKind, FisherStatistics

_RESOLUTION = 1e3
"""Machine epsilons, times the mean diagonal, below which eigenvalues of a sum are taken for rounding noise.

Measured: at a condition of 5e9 float32 sums leave a good subspace from a relative damping of about 1e-4 up.
"""

_NARROW_CONDITION = 1e4
"""Largest condition number, in the 1-norm, of a factor whose inverse is multiplied in float32.

The inverse itself is exact to float32's rounding of its entries; a product of a step's factors may lose that times the
condition, 6e-4 at the worst.
"""

_LADDER = 4
"""How many dampings are tried, each ten times the last, before the eigenvalues are clamped instead."""


def require_tokens(statistics: FisherStatistics) -> None:
    """Refuse statistics without data.

    Args:
        statistics: Sums of a layer.

    Raises:
        DataError: Naming the layer.
    """
    if statistics.tokens < 1 or statistics.samples < 1:
        raise DataError(
            f"layer {statistics.spec.name!r}: no token passed the token mask, so its Fisher is undefined. "
            f"Check that samples hold labels, or leave the layer out of the targets."
        )


def require_finite(values: Tensor, layer: str, label: str) -> None:
    """Refuse a statistic that is not finite.

    Args:
        values: The statistic.
        layer: Name of the layer, for the message.
        label: Name of the statistic, for the message.

    Raises:
        ModelError: Naming both.
    """
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"layer {layer!r}: {label} holds NaN or infinity, or overflows when squared. "
            f"Look for NaN in the model or the data, or load the model in a wider dtype."
        )


@dataclass(frozen=True)
class FactorRequest:
    """What is to be damped and factorised.

    Attributes:
        layer: Name of the layer, for messages.
        label: Name of the factor, for messages.
        source: What the sums run over ("inputs", "output gradients"), for messages.
        damping: Damping of the Fisher as asked for.
        damping_kind: How `damping` is meant.
        exponent: Power of a relative damping that falls to this factor: one half where there are two.
    """

    layer: str
    label: str
    source: str
    damping: float
    damping_kind: DampingKind
    exponent: float = 0.5

    def check(self, values: Tensor) -> None:
        """Refuse a statistic that is not finite, see `require_finite`."""
        require_finite(values, self.layer, f"{self.label} ({self.source})")

    def amount(self, mean_diagonal: float) -> float:
        """Damping of this factor: the damping itself, or its power times the mean diagonal.

        Raises:
            DataError: The statistic is zero and so would be the damping: there is nothing to invert.
        """
        amount = self.damping if self.damping_kind == "absolute" else self.damping**self.exponent * mean_diagonal
        if mean_diagonal == 0 and amount == 0:
            raise DataError(
                f"layer {self.layer!r}: all {self.source} are zero on the counted tokens, so {self.label} cannot be "
                f"inverted. Use an absolute damping above 0, other data, or leave the layer out of the targets."
            )
        return amount


class DampedFactor(ABC):
    """A positive definite matrix M of float64 with its inverse; blocks come back in the dtype that they came in."""

    damping: float
    dtype: torch.dtype
    """The least dtype that products with M⁻¹ should be made in."""
    remedies: tuple[str, ...]

    @abstractmethod
    def multiply(self, block: Tensor) -> Tensor:
        """M·block, (size, k)."""

    @abstractmethod
    def solve(self, block: Tensor) -> Tensor:
        """M⁻¹·block, (size, k)."""

    @abstractmethod
    def inverse_trace(self) -> float:
        """The trace of M⁻¹."""

    @abstractmethod
    def inverse_operator(self, dtype: torch.dtype) -> SymmetricOperator:
        """M⁻¹ as an operator with blocks in `dtype`."""


class DiagonalFactor(DampedFactor):
    """A diagonal factor, (size,)."""

    def __init__(self, entries: Tensor, damping: float, remedies: tuple[str, ...] = ()) -> None:
        self.entries = entries
        # Elementwise division loses nothing to the condition.
        self.dtype = torch.float32 if _narrows(entries.device) else torch.float64
        self.damping = damping
        self.remedies = remedies

    def multiply(self, block: Tensor) -> Tensor:
        return self.entries.unsqueeze(-1).to(block.dtype) * block

    def solve(self, block: Tensor) -> Tensor:
        return block / self.entries.unsqueeze(-1).to(block.dtype)

    def inverse_trace(self) -> float:
        return float(self.entries.reciprocal().sum())

    def inverse_operator(self, dtype: torch.dtype) -> SymmetricOperator:
        return Diagonal(self.entries.reciprocal().to(dtype))


class DenseFactor(DampedFactor):
    """A full factor, (size, size), and its inverse, which is kept in the dtype that its products are made in.

    An accelerator, where many layers wait for a batched solve, keeps no factor that can be made again.
    """

    def __init__(
        self,
        matrix: Tensor,
        inverse: Tensor,
        damping: float,
        remedies: tuple[str, ...],
        again: Callable[[], Tensor] | None = None,
    ) -> None:
        self._matrix = matrix if again is None or not _narrows(matrix.device) else again
        self.dtype = narrowest_dtype(matrix, inverse)
        self.inverse = inverse.to(self.dtype)
        self.damping = damping
        self.remedies = remedies

    @property
    def matrix(self) -> Tensor:
        """The factor, (size, size), float64."""
        return self._matrix if isinstance(self._matrix, Tensor) else self._matrix()

    def multiply(self, block: Tensor) -> Tensor:
        matrix = self.matrix
        return (matrix @ block.to(matrix.dtype)).to(block.dtype)

    def solve(self, block: Tensor) -> Tensor:
        return Dense(self.inverse).matmat(block.to(self.dtype)).to(block.dtype)

    def inverse_trace(self) -> float:
        return float(self.inverse.diagonal().sum(dtype=torch.float64))

    def inverse_operator(self, dtype: torch.dtype) -> SymmetricOperator:
        return InverseOperator(self, dtype)


class InverseOperator(Dense):
    """M⁻¹ of a full factor as an operator with blocks in `dtype`; it can be shifted and inverted through M."""

    def __init__(self, factor: DenseFactor, dtype: torch.dtype) -> None:
        super().__init__(factor.inverse)
        self.factor = factor
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def matmat(self, block: Tensor) -> Tensor:
        return self.factor.solve(row_major(block))

    def to_dense(self) -> Tensor:
        return super().to_dense().to(self._dtype)

    def diagonal(self) -> Tensor:
        return super().diagonal().to(self._dtype)

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        """(M⁻¹ + shift·I)⁻¹ = (I + shift·M)⁻¹ M, which needs no inverse of an inverse."""
        shifted = _shifted(shift * self.factor.matrix, 1.0)
        root, info = torch.linalg.cholesky_ex(shifted)
        if int(info) != 0:
            return None
        return lambda block: torch.cholesky_solve(self.factor.multiply(block.to(root.dtype)), root).to(block.dtype)


def _narrows(device: torch.device) -> bool:
    return device.type != "cpu"


def narrowest_dtype(matrix: Tensor, inverse: Tensor) -> torch.dtype:
    """The dtype for products with the inverse of a factor.

    Args:
        matrix: The damped factor, (size, size), float64.
        inverse: Its inverse.

    Returns:
        float32 on an accelerator where ‖M‖₁‖M⁻¹‖₁ allows it, float64 otherwise.
    """
    if not _narrows(matrix.device):
        return torch.float64
    condition = torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(inverse, 1)
    return torch.float32 if float(condition) <= _NARROW_CONDITION else torch.float64


def damp_diagonal(sums: Tensor, count: int, request: FactorRequest) -> DiagonalFactor:
    """A damped diagonal factor from a sum of squares.

    Args:
        sums: A vector (size,) or any other shape, any floating dtype.
        count: What the sums are divided by.
        request: Names and damping.

    Returns:
        The factor in float64; entries that damping leaves at zero are lifted, with a remedy.
    """
    entries = sums.double() / count
    request.check(entries)
    amount = request.amount(float(entries.mean()))
    damped = entries + amount
    floor = torch.finfo(sums.dtype).eps * float(damped.max())
    low = int((damped < floor).sum())
    if not low:
        return DiagonalFactor(damped, amount)
    remedy = f"{request.label}: {low} of {damped.numel()} damped entries lay below {floor:.3g} and were set to it"
    return DiagonalFactor(damped.clamp(min=floor), amount, (remedy,))


def damp_dense(sums: Tensor, count: int, request: FactorRequest) -> DenseFactor:
    """A damped full factor from a sum of outer products.

    Cholesky in float64; where that fails the damping grows tenfold a few times, and after that eigenvalues are
    clamped. Whatever was done is in `remedies`.

    Args:
        sums: (size, size), any floating dtype, symmetric up to rounding.
        count: What the sums are divided by.
        request: Names and damping.

    Returns:
        The factor in float64.
    """
    matrix = _mean(sums, count)
    request.check(matrix)
    diagonal = matrix.diagonal().clone()
    mean_diagonal = float(diagonal.mean())
    asked = request.amount(mean_diagonal)
    remedies = _precision_notice(asked, mean_diagonal, sums.dtype, request.label)
    amounts = [asked]
    first = 10 * asked if asked > 0 else _RESOLUTION * torch.finfo(sums.dtype).eps * mean_diagonal
    amounts += [first * 10.0**step for step in range(_LADDER - 1)]
    for amount in amounts:
        matrix.diagonal().copy_(diagonal + amount)
        root, info = torch.linalg.cholesky_ex(matrix)
        inverse = inverse_from_cholesky(root) if int(info) == 0 else None
        if inverse is not None and bool(inverse.isfinite().all()):
            if amount != asked:
                remedies += (f"{request.label}: not positive definite at damping {asked:.3g}; raised to {amount:.3g}",)
            again = partial(_damped_mean, sums, count, amount)
            return DenseFactor(matrix, inverse, amount, remedies, again)
    matrix.diagonal().copy_(diagonal)
    return _clamp(matrix, asked, amounts[-1], remedies, request)


def _mean(sums: Tensor, count: int) -> Tensor:
    matrix = sums.double()
    return (matrix + matrix.mT) / (2 * count)


def _shifted(matrix: Tensor, amount: float) -> Tensor:
    matrix.diagonal().add_(amount)
    return matrix


def _damped_mean(sums: Tensor, count: int, amount: float) -> Tensor:
    return _shifted(_mean(sums, count), amount)


def _precision_notice(amount: float, mean_diagonal: float, dtype: torch.dtype, label: str) -> tuple[str, ...]:
    least = _RESOLUTION * torch.finfo(dtype).eps
    if amount >= least * mean_diagonal:
        return ()
    name = str(dtype).removeprefix("torch.")
    return (
        f"{label}: damping {amount:.3g} is {amount / mean_diagonal:.2g} of the mean diagonal, below the {least:.2g} "
        f"that {name} sums resolve; its weakest directions may be rounding noise",
    )


def _clamp(
    matrix: Tensor, asked: float, floor: float, remedies: tuple[str, ...], request: FactorRequest
) -> DenseFactor:
    label = request.label
    found = eigh(matrix, f"{label} of layer {request.layer!r}")
    values, vectors = found.values, found.vectors
    damped = (values + asked).clamp(min=floor)
    low = int((values + asked < floor).sum())
    remedies += found.remedies
    remedies += (f"{label}: not positive definite at damping {floor:.3g}; {low} eigenvalues were clamped to it",)
    return DenseFactor((vectors * damped) @ vectors.mT, (vectors / damped) @ vectors.mT, asked, remedies)
