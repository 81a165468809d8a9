"""Linear maps in float64, so that every product of a layer's step and variance has one dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_da_core.operators import DenseMap, LinearMap, LowRankMap


class _Widened(LinearMap):
    """A map whose blocks and products are float64 though its own arithmetic is not."""

    def __init__(self, inner: LinearMap) -> None:
        self.inner = inner

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def matmat(self, block: Tensor) -> Tensor:
        return self.inner.matmat(block.to(self.inner.dtype)).double()

    def rmatmat(self, block: Tensor) -> Tensor:
        return self.inner.rmatmat(block.to(self.inner.dtype)).double()

    def to_dense(self) -> Tensor:
        return self.inner.to_dense().double()


def double(linear_map: LinearMap) -> LinearMap:
    """The same map with float64 products; stored maps are converted once, so that M and Mᵀ stay exact transposes."""
    if linear_map.dtype == torch.float64:
        return linear_map
    if isinstance(linear_map, DenseMap):
        return DenseMap(linear_map.matrix.double())
    if isinstance(linear_map, LowRankMap):
        return LowRankMap(linear_map.left.double(), linear_map.right.double())
    return _Widened(linear_map)


class ScaledTranspose(LinearMap):
    """`factor` times the transpose of a map, float64."""

    def __init__(self, inner: LinearMap, factor: float) -> None:
        self.inner = double(inner)
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
