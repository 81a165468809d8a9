"""The full mean gradient G, summed token by token from inputs and output gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import Accumulator, GradientEstimator, NoOptions
from lora_da_core.operators import DenseMap, LinearMap, add_product
from lora_da_core.types import LayerSpec


class _GradientSum(Accumulator):
    """Σ g xᵀ, (out, in)."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        if output_grads is None:
            raise TypeError("the full gradient needs output gradients")
        add_product(self.total, output_grads, inputs)

    def statistics(self) -> dict[str, Tensor]:
        return {"gradient": self.total}


class Full(GradientEstimator[NoOptions]):
    """G = (1/n) Σ_n Σ_t g_nt x_ntᵀ, exactly (arXiv 2510.24561, the gradient of the mean loss)."""

    name = "full"
    api_version = 1

    @property
    def takes_one_hot(self) -> bool:
        return True

    def accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return _GradientSum(torch.zeros(spec.out_features, spec.in_features, device=device, dtype=dtype))

    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        return DenseMap(statistics["gradient"] / samples)

    def statistics_bytes(self, spec: LayerSpec, *, itemsize: int) -> int:
        return spec.out_features * spec.in_features * itemsize


@hookimpl
def lora_da_gradient_estimators() -> list[type[GradientEstimator[Any]]]:
    """Offers `full`."""
    return [Full]
