"""Products of tall blocks with each other, whose results are small."""

from __future__ import annotations

import torch
from torch import Tensor

_PARTS = (32, 16, 8)
"""Parts that rows are divided into, the first that divides them evenly: then no part is copied."""
_LEAST_ROWS = 64
"""Least rows of a part."""


def tall_product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ·right of (…, size, m) and (…, size, k), (…, m, k).

    An accelerator gives so small a result to one group of threads, which goes through all rows one after the other. In
    parts of the rows, summed at the end, as many groups share them.
    """
    parts = _parts(left.shape[-2]) if _by_parts(left.device) else 1
    if parts == 1:
        return left.mT @ right
    *batch, rows, _ = left.shape
    split = (*batch, parts, rows // parts, -1)
    return (left.reshape(split).mT @ right.reshape(split)).sum(-3)


def _by_parts(device: torch.device) -> bool:
    return device.type != "cpu"


def _parts(rows: int) -> int:
    return next((parts for parts in _PARTS if rows % parts == 0 and rows // parts >= _LEAST_ROWS), 1)
