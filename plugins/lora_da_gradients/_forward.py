"""What gradient estimators without a backward pass have in common."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_da_core.interfaces import GradientEstimator, OptionsT
from lora_da_core.operators import DenseMap, LinearMap
from lora_da_core.types import LayerSpec


class ForwardOnly(GradientEstimator[OptionsT]):
    """A gradient estimator that overrides `estimate` and takes no tokens."""

    @property
    def forward_only(self) -> bool:
        return True


class FromDifferences(ForwardOnly[OptionsT]):
    """Estimates G by differences of losses; its statistics hold `gradient` (out, in), n times the estimate."""

    @property
    def exact(self) -> bool:
        return False

    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        return DenseMap(statistics["gradient"] / samples)


class OtherTarget(ForwardOnly[OptionsT]):
    """Puts something else in the gradient's place, whatever the loss says."""

    @property
    def follows_loss(self) -> bool:
        return False
