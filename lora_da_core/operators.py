"""Symmetric operators and linear maps that are known by their products with skinny blocks.

All tensors may carry leading batch dimensions: an operator on (…, size) multiplies blocks (…, size, k).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lora_da_core.errors import OptionError
from lora_da_core.wide_products import gram, product


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: the larger of float32 and `dtype`.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(torch.float32, dtype) if dtype.is_floating_point else torch.float32


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += leftᵀ·right in place, summed in total's dtype.

    On CUDA half-precision operands are multiplied as they are, with float32 sums inside the product.

    Args:
        total: (m, n), the running sum, float32 or float64.
        left: (rows, m).
        right: (rows, n), or the places of the ones of one-hot rows, (rows,), int64.
    """
    if holds_places(right):
        total.index_add_(1, right, left.to(total.dtype).mT)
        return
    halves = (torch.bfloat16, torch.float16)
    if total.is_cuda and total.dtype == torch.float32 and left.dtype == right.dtype and left.dtype in halves:
        torch.addmm(total, left.mT, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype).mT, right.to(total.dtype))


_STRIPS, _LEAST_STRIP = 4, 512
"""Strips that a Gram matrix is summed in, and the least rows of one: smaller products gain nothing."""


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Total += rowsᵀ·rows in place, as `add_product`, on and below the diagonal: ten of sixteen parts of the work.

    What is above the diagonal is left undefined until `mirror_lower`.

    Args:
        total: (n, n), the running sum, float32 or float64.
        rows: (rows, n).
    """
    for start, stop in _strips(len(total)):
        add_product(total[start:stop, :stop], rows[:, start:stop], rows[:, :stop])


def mirror_lower(total: Tensor) -> None:
    """Writes the transpose of what is below the diagonal of a sum of `add_gram`, (n, n), above it."""
    for start, stop in _strips(len(total)):
        total[:start, start:stop] = total[start:stop, :start].mT


def _strips(size: int) -> Iterator[tuple[int, int]]:
    rows = max(_LEAST_STRIP, -(-size // _STRIPS))
    return ((start, min(start + rows, size)) for start in range(0, size, rows))


def holds_places(rows: Tensor) -> bool:
    """Whether rows are given as the places of their ones, (rows,) int64, instead of as a matrix."""
    return rows.ndim == 1 and not rows.is_floating_point()


def rows_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows·matrix, (k, n) by (n, m) to (k, m); one-hot rows may be given by the places of their ones, (k,)."""
    return matrix[rows] if holds_places(rows) else rows @ matrix


def row_major(block: Tensor) -> Tensor:
    """The block in row-major order: CPU libraries multiply skinny column-major blocks up to 40 times slower."""
    return block.contiguous()


class SymmetricOperator(ABC):
    """A symmetric matrix of order `size`, or a batch of them, known by `matmat`."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Order of the matrix."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of products."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of products."""

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions; empty for a single matrix."""
        return torch.Size()

    @abstractmethod
    def matmat(self, block: Tensor) -> Tensor:
        """The product with `block` (…, size, k), of the same shape."""

    def to_dense(self) -> Tensor:
        """The matrix itself, (…, size, size), exactly symmetric."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        dense = self.matmat(eye.expand(*self.batch_shape, self.size, self.size))
        return 0.5 * (dense + dense.mT)

    def diagonal(self) -> Tensor:
        """The diagonal, (…, size)."""
        return self.to_dense().diagonal(dim1=-2, dim2=-1)

    def trace(self) -> Tensor:
        """The trace, (…)."""
        return self.diagonal().sum(-1)

    def norm_bound(self) -> float:
        """A number that ‖self‖₂ of a single matrix does not exceed; infinite where none is cheap."""
        return math.inf

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        """A cheap product with (self + shift·I)⁻¹ on blocks (size, k), or None where there is none."""
        return None


class Dense(SymmetricOperator):
    """A stored symmetric matrix, (…, size, size)."""

    def __init__(self, matrix: Tensor) -> None:
        # Symmetric, so its transpose is the same matrix: LAPACK returns column-major results.
        self.matrix = matrix if matrix.is_contiguous() else matrix.mT

    @property
    def size(self) -> int:
        return self.matrix.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def batch_shape(self) -> torch.Size:
        return self.matrix.shape[:-2]

    def matmat(self, block: Tensor) -> Tensor:
        return product(self.matrix, row_major(block))

    def to_dense(self) -> Tensor:
        return 0.5 * (self.matrix + self.matrix.mT)

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1)

    def norm_bound(self) -> float:
        """‖·‖₁, which is no less than ‖·‖₂ where the matrix is symmetric."""
        return float(torch.linalg.matrix_norm(self.matrix, 1))


class Diagonal(SymmetricOperator):
    """A diagonal matrix, stored as (…, size)."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries

    @property
    def size(self) -> int:
        return self.entries.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.entries.dtype

    @property
    def device(self) -> torch.device:
        return self.entries.device

    @property
    def batch_shape(self) -> torch.Size:
        return self.entries.shape[:-1]

    def matmat(self, block: Tensor) -> Tensor:
        return self.entries.unsqueeze(-1) * block

    def to_dense(self) -> Tensor:
        return torch.diag_embed(self.entries)

    def diagonal(self) -> Tensor:
        return self.entries

    def norm_bound(self) -> float:
        return float(self.entries.abs().max())

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        shifted = (self.entries + shift).unsqueeze(-1)
        return lambda block: block / shifted


class LowRank(SymmetricOperator):
    """U diag(weights) Uᵀ with U (…, size, k) and weights (…, k)."""

    def __init__(self, basis: Tensor, weights: Tensor) -> None:
        self.basis = basis
        self.weights = weights

    @property
    def size(self) -> int:
        return self.basis.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        return self.basis.dtype

    @property
    def device(self) -> torch.device:
        return self.basis.device

    @property
    def batch_shape(self) -> torch.Size:
        return self.basis.shape[:-2]

    def matmat(self, block: Tensor) -> Tensor:
        return self.basis @ (self.weights.unsqueeze(-1) * (self.basis.mT @ block))

    def diagonal(self) -> Tensor:
        return (self.basis.square() * self.weights.unsqueeze(-2)).sum(-1)


class Sum(SymmetricOperator):
    """The sum of operators of one size, dtype and device."""

    def __init__(self, terms: Sequence[SymmetricOperator]) -> None:
        self.terms = tuple(terms)

    @property
    def size(self) -> int:
        return self.terms[0].size

    @property
    def dtype(self) -> torch.dtype:
        return self.terms[0].dtype

    @property
    def device(self) -> torch.device:
        return self.terms[0].device

    @property
    def batch_shape(self) -> torch.Size:
        return self.terms[0].batch_shape

    def matmat(self, block: Tensor) -> Tensor:
        total = self.terms[0].matmat(block)
        for term in self.terms[1:]:
            total = total + term.matmat(block)
        return total

    def to_dense(self) -> Tensor:
        total = self.terms[0].to_dense()
        for term in self.terms[1:]:
            total = total + term.to_dense()
        return total

    def diagonal(self) -> Tensor:
        return torch.stack([term.diagonal() for term in self.terms]).sum(0)


class Scaled(SymmetricOperator):
    """`factor` times an operator."""

    def __init__(self, operator: SymmetricOperator, factor: float) -> None:
        self.operator = operator
        self.factor = factor

    @property
    def size(self) -> int:
        return self.operator.size

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        return self.operator.device

    @property
    def batch_shape(self) -> torch.Size:
        return self.operator.batch_shape

    def matmat(self, block: Tensor) -> Tensor:
        return self.factor * self.operator.matmat(block)

    def to_dense(self) -> Tensor:
        return self.factor * self.operator.to_dense()

    def norm_bound(self) -> float:
        return abs(self.factor) * self.operator.norm_bound()

    def diagonal(self) -> Tensor:
        return self.factor * self.operator.diagonal()

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        if self.factor == 0:
            return None
        inner = self.operator.preconditioner(shift / self.factor)
        return None if inner is None else lambda block: inner(block) / self.factor


class Stacked(SymmetricOperator):
    """Operators of one size, dtype and device as one with a leading batch dimension."""

    def __init__(self, operators: Sequence[SymmetricOperator]) -> None:
        """Take in at least one unbatched operator.

        Raises:
            OptionError: They differ in size, dtype or device.
        """
        self.operators = tuple(operators)
        kinds = sorted({f"order {each.size} in {each.dtype} on {each.device}" for each in self.operators})
        if len(kinds) != 1:
            raise OptionError(
                f"a batch needs operators of one order, dtype and device, not {', '.join(kinds) or 'none'}; "
                "solve those that differ apart."
            )

    @property
    def size(self) -> int:
        return self.operators[0].size

    @property
    def dtype(self) -> torch.dtype:
        return self.operators[0].dtype

    @property
    def device(self) -> torch.device:
        return self.operators[0].device

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size([len(self.operators)])

    def matmat(self, block: Tensor) -> Tensor:
        return torch.stack([operator.matmat(part) for operator, part in zip(self.operators, block, strict=True)])

    def to_dense(self) -> Tensor:
        return torch.stack([operator.to_dense() for operator in self.operators])

    def diagonal(self) -> Tensor:
        return torch.stack([operator.diagonal() for operator in self.operators])


class LinearMap(ABC):
    """A rectangular matrix M (rows, columns), known by the products M·X and Mᵀ·Y with skinny blocks."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of products."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of products."""

    @abstractmethod
    def matmat(self, block: Tensor) -> Tensor:
        """M·block, (columns, k) to (rows, k)."""

    @abstractmethod
    def rmatmat(self, block: Tensor) -> Tensor:
        """Mᵀ·block, (rows, k) to (columns, k)."""

    def apply_to_rows(self, rows: Tensor) -> Tensor:
        """rows·Mᵀ, (k, columns) to (k, rows): the map as a layer applies it to tokens.

        One-hot rows may be given by the places of their ones, (k,), int64.
        """
        return rows_product(rows, self.to_dense().mT) if holds_places(rows) else self.matmat(rows.mT).mT

    def to_dense(self) -> Tensor:
        """M itself, (rows, columns)."""
        return self.matmat(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))


class DenseMap(LinearMap):
    """A stored matrix."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[-2], self.matrix.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def matmat(self, block: Tensor) -> Tensor:
        return product(self.matrix, row_major(block))

    def rmatmat(self, block: Tensor) -> Tensor:
        return product(self.matrix.mT, row_major(block))

    def to_dense(self) -> Tensor:
        return self.matrix


class LowRankMap(LinearMap):
    """left · rightᵀ with left (rows, k) and right (columns, k)."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left = left
        self.right = right

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[-2], self.right.shape[-2])

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    def matmat(self, block: Tensor) -> Tensor:
        return self.left @ (self.right.mT @ block)

    def rmatmat(self, block: Tensor) -> Tensor:
        return self.right @ (self.left.mT @ block)

    def apply_to_rows(self, rows: Tensor) -> Tensor:
        return rows_product(rows, self.right) @ self.left.mT

    def to_dense(self) -> Tensor:
        return self.left @ self.right.mT


class NegatedGram(SymmetricOperator):
    """−weight · M Mᵀ of a linear map: the bias term of Ω, and for weight 1 the operator whose least value is −σ²."""

    def __init__(self, linear_map: LinearMap, weight: float = 1.0) -> None:
        self.linear_map = linear_map
        self.weight = weight

    @property
    def size(self) -> int:
        return self.linear_map.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.linear_map.dtype

    @property
    def device(self) -> torch.device:
        return self.linear_map.device

    def matmat(self, block: Tensor) -> Tensor:
        return -self.weight * self.linear_map.matmat(self.linear_map.rmatmat(block))

    def to_dense(self) -> Tensor:
        return -self.weight * gram(self.linear_map.to_dense())

    def diagonal(self) -> Tensor:
        return -self.weight * self.linear_map.to_dense().square().sum(-1)
