"""Inverses from Cholesky factors; public to plugins."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAF = 512
"""Order up to which a triangular matrix is inverted by a library's call."""


def inverse_from_cholesky(root: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ by large products on an accelerator: `potri` takes four times as long there as the factorisation.

    Args:
        root: L, (size, size), lower triangular, zeros above the diagonal; overwritten.

    Returns:
        The inverse, (size, size).
    """
    if not _by_products(root.device):
        return torch.cholesky_inverse(root)
    _invert(root)
    return _gram(root)


def _by_products(device: torch.device) -> bool:
    return device.type != "cpu"


def _invert(root: Tensor) -> None:
    """L = [[A, 0], [B, C]] to L⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]] in place, block by block: ⅔ n³ operations."""
    size = len(root)
    if size <= _LEAF:
        eye = torch.eye(size, dtype=root.dtype, device=root.device)
        root.copy_(torch.linalg.solve_triangular(root, eye, upper=False))
        return
    half = size // 2
    first, beside, last = root[:half, :half], root[half:, :half], root[half:, half:]
    _invert(first)
    _invert(last)
    beside.copy_(last @ (beside @ first)).neg_()


def _gram(lower: Tensor) -> Tensor:
    """PᵀP of a lower triangular P = [[A, 0], [B, C]], block by block: ⅔ n³ operations."""
    size = len(lower)
    if size <= _LEAF:
        return lower.mT @ lower
    half = size // 2
    beside, last = lower[half:, :half], lower[half:, half:]
    found = torch.empty_like(lower)
    found[:half, :half] = torch.addmm(_gram(lower[:half, :half]), beside.mT, beside)
    found[half:, half:] = _gram(last)
    found[half:, :half] = last.mT @ beside
    found[:half, half:] = found[half:, :half].mT
    return found
