"""No gradient: A then comes from the Fisher alone, and B is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import GradientEstimator, LossProbe, NoOptions
from lora_da_core.operators import LinearMap, LowRankMap
from lora_da_core.types import LayerSpec
from lora_da_gradients._forward import OtherTarget


class NoGradient(OtherTarget[NoOptions]):
    """G = 0, so that Ω = βV/N: with J = I ⊗ Z, A spans the top eigenvectors of the inputs' second moment (EVA)."""

    name = "none"
    api_version = 1

    def estimate(
        self, probe: LossProbe, specs: Sequence[LayerSpec], *, generator: torch.Generator
    ) -> dict[str, dict[str, Tensor]]:
        found = {}
        for spec in specs:
            device, dtype = probe.place(spec.name)
            found[spec.name] = {"place": torch.zeros(0, device=device, dtype=dtype)}
        return found

    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        place = statistics["place"]
        return LowRankMap(place.new_zeros(spec.out_features, 1), place.new_zeros(spec.in_features, 1))

    def statistics_bytes(self, spec: LayerSpec, *, itemsize: int) -> int:
        return 0


@hookimpl
def lora_da_gradient_estimators() -> list[type[GradientEstimator[Any]]]:
    """Offers `none`."""
    return [NoGradient]
