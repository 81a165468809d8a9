"""Random directions of layers, made anew from a seed wherever they are needed, and sums of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lora_da_core.operators import DenseMap, LinearMap, LowRankMap
from lora_da_core.types import LayerSpec
from lora_da_gradients._seeds import named_generator

Places = Mapping[str, tuple[torch.device, torch.dtype]]
"""Where each layer's changes lie, and their dtype."""


class Draw(Protocol):
    """`direction` or `gaussian`."""

    def __call__(
        self, spec: LayerSpec, rank: int | None, generator: torch.Generator, *, device: torch.device, dtype: torch.dtype
    ) -> LinearMap: ...


def drawn(
    draw: Draw, specs: Sequence[LayerSpec], places: Places, *, rank: int | None, seed: int, index: int
) -> dict[str, LinearMap]:
    """One direction for every layer; the same seed, layer and index give the same one.

    Args:
        draw: How a direction is drawn.
        specs: The layers.
        places: Of the layers.
        rank: As `draw` takes it.
        seed: Of all directions.
        index: The probe's.

    Returns:
        By layer.
    """
    found = {}
    for spec in specs:
        device, dtype = places[spec.name]
        found[spec.name] = draw(spec, rank, named_generator(seed, spec.name, index), device=device, dtype=dtype)
    return found


def zeros(specs: Sequence[LayerSpec], places: Places) -> dict[str, Tensor]:
    """A zero matrix (out, in) for every layer."""
    found = {}
    for spec in specs:
        device, dtype = places[spec.name]
        found[spec.name] = torch.zeros(spec.out_features, spec.in_features, device=device, dtype=dtype)
    return found


def direction(
    spec: LayerSpec, rank: int | None, generator: torch.Generator, *, device: torch.device, dtype: torch.dtype
) -> LinearMap:
    """A random U (out, in) with ‖U‖_F² = out·in and E[vec(U) vec(U)ᵀ] = I.

    Dense, it is uniform on that sphere. Of rank r it is √(out·in/r)·QPᵀ with Q (out, r) and P (in, r) uniform among
    matrices with orthonormal columns: its law does not change under rotations of outputs or inputs, so its second
    moment is a multiple of the identity, and the length makes that multiple 1.

    Args:
        spec: The layer.
        rank: r, at most what the layer's shape allows is taken; None for a dense one.
        generator: Source of its numbers, on the CPU.
        device: Device of the result.
        dtype: Dtype of the result; the numbers are drawn in float32 whatever it is.

    Returns:
        The direction.
    """
    out_features, in_features = spec.out_features, spec.in_features
    length = float(out_features * in_features) ** 0.5
    if rank is None:
        dense = torch.randn(out_features, in_features, generator=generator).to(device, dtype)
        return DenseMap(dense * (length / dense.norm()))
    columns = min(rank, out_features, in_features)
    left = _orthonormal(out_features, columns, generator).to(device, dtype)
    right = _orthonormal(in_features, columns, generator).to(device, dtype)
    return LowRankMap(left * (length / columns**0.5), right)


def gaussian(
    spec: LayerSpec, rank: int | None, generator: torch.Generator, *, device: torch.device, dtype: torch.dtype
) -> LinearMap:
    """A random Ξ (out, in) with E[vec(Ξ) vec(Ξ)ᵀ] = I and vanishing third moments.

    Dense, its entries are independent standard normal. Of rank r it is QPᵀ/√r with such entries in Q and P.

    Args:
        spec: The layer.
        rank: r; None for a dense one.
        generator: Source of its numbers, on the CPU.
        device: Device of the result.
        dtype: Dtype of the result; the numbers are drawn in float32 whatever it is.

    Returns:
        The direction.
    """
    if rank is None:
        return DenseMap(torch.randn(spec.out_features, spec.in_features, generator=generator).to(device, dtype))
    left = torch.randn(spec.out_features, rank, generator=generator).to(device, dtype)
    right = torch.randn(spec.in_features, rank, generator=generator).to(device, dtype)
    return LowRankMap(left / rank**0.5, right)


def scaled(change: LinearMap, factor: float) -> LinearMap:
    """`factor` times a direction."""
    if isinstance(change, LowRankMap):
        return LowRankMap(change.left * factor, change.right)
    return DenseMap(change.to_dense() * factor)


def add_to(total: Tensor, change: LinearMap, factor: float) -> None:
    """Adds `factor` times a direction to `total` (out, in), in place."""
    if isinstance(change, LowRankMap):
        total.addmm_(change.left, change.right.mT, alpha=factor)
    else:
        total.add_(change.to_dense(), alpha=factor)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniform among matrices (rows, columns) with orthonormal columns."""
    normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(normal)
    # Without the signs the result would depend on how the decomposition chooses them.
    uniform: Tensor = basis * triangle.diagonal().sign()
    return uniform
