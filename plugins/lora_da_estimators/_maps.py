"""Linear maps in one dtype, so that every product of a layer's step and variance has it."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_da_core.operators import DenseMap, LinearMap, LowRankMap


class _Converted(LinearMap):
    """A map whose blocks and products have another dtype than its own arithmetic."""

    def __init__(self, inner: LinearMap, dtype: torch.dtype) -> None:
        self.inner = inner
        self._dtype = dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def matmat(self, block: Tensor) -> Tensor:
        return self.inner.matmat(block.to(self.inner.dtype)).to(self._dtype)

    def rmatmat(self, block: Tensor) -> Tensor:
        return self.inner.rmatmat(block.to(self.inner.dtype)).to(self._dtype)

    def to_dense(self) -> Tensor:
        return self.inner.to_dense().to(self._dtype)


def converted(linear_map: LinearMap, dtype: torch.dtype) -> LinearMap:
    """The same map with products in `dtype`; stored maps are converted once, so that M and Mᵀ stay exact transposes."""
    if linear_map.dtype == dtype:
        return linear_map
    if isinstance(linear_map, DenseMap):
        return DenseMap(linear_map.matrix.to(dtype))
    if isinstance(linear_map, LowRankMap):
        return LowRankMap(linear_map.left.to(dtype), linear_map.right.to(dtype))
    return _Converted(linear_map, dtype)


class ScaledTranspose(LinearMap):
    """`factor` times the transpose of a map, float64."""

    def __init__(self, inner: LinearMap, factor: float) -> None:
        self.inner = converted(inner, torch.float64)
        self.factor = factor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.inner.shape
        return (columns, rows)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def matmat(self, block: Tensor) -> Tensor:
        return self.factor * self.inner.rmatmat(block)

    def rmatmat(self, block: Tensor) -> Tensor:
        return self.factor * self.inner.matmat(block)

    def to_dense(self) -> Tensor:
        return self.factor * self.inner.to_dense().mT
