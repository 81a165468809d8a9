"""Products of large float32 matrices on tensor cores, to float32's accuracy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_LEAST_SIDE = 512
"""Smallest side of a product that is worth splitting: below it, a product takes no longer than its launch."""

_PARTS = 3
"""bfloat16 numbers of 8 bits each whose sum is a float32 number of 24 bits."""

_GRAM_PARTS = 2
"""Of them, as many as a Gram matrix is made of."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """left·right, (…, m, k) and (…, k, n); on CUDA large float32 matrices are multiplied in parts of bfloat16.

    A float32 matrix is the sum of three bfloat16 ones to its last bit. The products of parts are exact and summed in
    float32 inside the tensor cores; the three least of the nine, 2⁻²⁴ of the whole, are left out (Henry, Tang and
    Heinecke 2019, arXiv 1904.06376). On an H100 six of them take less than half the time of one in float32.

    Args:
        left: (…, m, k).
        right: (…, k, n), of the same dtype.

    Returns:
        (…, m, n).
    """
    if not _splits(left, right):
        return left @ right
    return _sum_of_products(parts(left), parts(right))


def gram(matrix: Tensor) -> Tensor:
    """matrix·matrixᵀ, (m, k) to (m, m), exactly symmetric; where `product` takes parts, to 2⁻¹⁶ of ‖matrix‖².

    Nothing cancels in a Gram matrix, so the two largest parts are enough: their third product is the transpose of
    the second, their fourth too small to count.
    """
    if not _splits(matrix, matrix.mT):
        found = matrix @ matrix.mT
        return 0.5 * (found + found.mT)
    first, second = parts(matrix, _GRAM_PARTS)
    half = _added(_added(None, first, first.mT).mul_(0.5), first, second.mT)
    return half + half.mT


def parts(matrix: Tensor, count: int = _PARTS) -> list[Tensor]:
    """The bfloat16 matrices that sum to a float32 one, largest first; three are exact but for underflow."""
    found, rest = [], matrix
    for place in range(count):
        found.append(rest.to(torch.bfloat16))
        if place < count - 1:
            rest = rest - found[-1]
    return found


def _sum_of_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Σ leftᵢ·rightⱼ over i + j < `_PARTS`, the smallest first."""
    total: Tensor | None = None
    for order in reversed(range(_PARTS)):
        for index in range(order + 1):
            total = _added(total, left[index], right[order - index])
    assert total is not None
    return total


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Total + left·right of bfloat16 matrices, summed in float32."""
    if not left.is_cuda:
        found = left.float() @ right.float()
        return found if total is None else total + found
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _splits(left: Tensor, right: Tensor) -> bool:
    return (
        left.is_cuda
        and left.dtype == right.dtype == torch.float32
        and left.dim() == right.dim() == 2
        and min(*left.shape, right.shape[-1]) >= _LEAST_SIDE
    )


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 in float32, whatever was allowed before: TF32's 10 bits would decide where residuals end."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
