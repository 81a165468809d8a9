"""The weights themselves in the gradient's place: their principal part is then what is solved for (PiSSA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import GradientEstimator, LossProbe, NoOptions
from lora_da_core.operators import DenseMap, LinearMap, accumulation_dtype
from lora_da_core.types import LayerSpec
from lora_da_gradients._forward import OtherTarget


class Weights(OtherTarget[NoOptions]):
    """G = −W, so that with J = I the step −J⁻¹G is W and its best approximation of rank r is PiSSA's start.

    PiSSA (arXiv 2404.02948) starts from the top r singular triplets of W. Nothing of the data enters; the statistics
    are the model's own weights, not a copy.
    """

    name = "weights"
    api_version = 1

    def estimate(
        self, probe: LossProbe, specs: Sequence[LayerSpec], *, generator: torch.Generator
    ) -> dict[str, dict[str, Tensor]]:
        return {spec.name: {"weights": probe.weights(spec.name)} for spec in specs}

    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        weights = statistics["weights"]
        return DenseMap(-weights.to(accumulation_dtype(weights.dtype)))

    def statistics_bytes(self, spec: LayerSpec, *, itemsize: int) -> int:
        return spec.out_features * spec.in_features * itemsize


@hookimpl
def lora_da_gradient_estimators() -> list[type[GradientEstimator[Any]]]:
    """Offers `weights`."""
    return [Weights]
