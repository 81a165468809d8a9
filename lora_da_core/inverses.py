"""Inverses from Cholesky factors; public to plugins."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAF = 256
"""Order up to which the diagonal blocks of a triangular matrix are inverted by a library's call."""


def inverse_from_cholesky(root: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ by large products on an accelerator: `potri` takes four times as long there as the factorisation.

    Args:
        root: L, (size, size), lower triangular, zeros above the diagonal; overwritten.

    Returns:
        The inverse, (size, size).
    """
    if not _by_products(root.device):
        return torch.cholesky_inverse(root)
    size, halvings = len(root), _halvings(len(root))
    evenly = _filled_up(root, -size % 2**halvings)
    _invert(evenly, halvings)
    return _gram(evenly, halvings)[:size, :size].contiguous()


def _by_products(device: torch.device) -> bool:
    return device.type != "cpu"


def _halvings(size: int) -> int:
    """How often a matrix of that order is halved until its blocks are no larger than a leaf."""
    return max(0, math.ceil(math.log2(size / _LEAF)))


def _filled_up(root: Tensor, missing: int) -> Tensor:
    """The matrix with a unit matrix as a further diagonal block, or itself where none is missing."""
    if not missing:
        return root
    size = len(root)
    filled = torch.eye(size + missing, dtype=root.dtype, device=root.device)
    filled[:size, :size] = root
    return filled


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Views of the blocks on the diagonal, (n / size, size, size)."""
    count = len(matrix) // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _blocks_beside(matrix: Tensor, size: int, *, upper: bool = False) -> Tensor:
    """Views of the blocks below every other diagonal block, or above those between, (n / 2 size, size, size)."""
    count = len(matrix) // (2 * size)
    pairs = matrix.view(count, 2, size, count, 2, size)
    one = pairs[:, 0, :, :, 1] if upper else pairs[:, 1, :, :, 0]
    return one.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _invert(root: Tensor, halvings: int) -> None:
    """L = [[A, 0], [B, C]] to L⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]] in place, blocks of a size at once: ⅔ n³ steps."""
    size = len(root) >> halvings
    blocks = _diagonal_blocks(root, size)
    eye = torch.eye(size, dtype=root.dtype, device=root.device)
    blocks.copy_(torch.linalg.solve_triangular(blocks.contiguous(), eye.expand_as(blocks), upper=False))
    for halving in reversed(range(halvings)):
        blocks, beside = _diagonal_blocks(root, size), _blocks_beside(root, size)
        beside.copy_(blocks[1::2] @ (beside @ blocks[0::2])).neg_()
        size = len(root) >> halving


def _gram(lower: Tensor, halvings: int) -> Tensor:
    """PᵀP of a lower triangular P = [[A, 0], [B, C]], all blocks of a size at once: ⅔ n³ operations."""
    size = len(lower) >> halvings
    found = torch.empty_like(lower, memory_format=torch.contiguous_format)
    blocks = _diagonal_blocks(lower, size)
    _diagonal_blocks(found, size).copy_(blocks.mT @ blocks)
    for halving in reversed(range(halvings)):
        beside, last = _blocks_beside(lower, size), _diagonal_blocks(lower, size)[1::2]
        _diagonal_blocks(found, size)[0::2].add_(beside.mT @ beside)
        below = last.mT @ beside
        _blocks_beside(found, size).copy_(below)
        _blocks_beside(found, size, upper=True).copy_(below.mT)
        size = len(lower) >> halving
    return found
