"""The empirical Fisher itself: the mean of outer products of per-sample gradients, inverted by Woodbury's identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch

from lora_da_core import hookimpl
from lora_da_core.interfaces import Accumulator, FisherEstimator
from lora_da_core.types import DampingKind, FisherScale, FisherStatistics, LayerSpec
from lora_da_estimators._gradients import SampleGradients, Storage, stored_bytes
from lora_da_estimators._low_rank import LowRankFisher, damped, empirical_spectrum, request_of
from lora_da_estimators._sums import NoSums


@dataclass(frozen=True)
class EmpiricalOptions:
    """Options of the empirical Fisher.

    Attributes:
        storage: Whether a sample's gradient is kept as a matrix (`"rows"`), as its tokens (`"factored"`), or in the
            smaller of the two forms, sample by sample (`"auto"`).
    """

    storage: Storage = "auto"

    def __post_init__(self) -> None:
        if self.storage not in get_args(Storage):
            raise ValueError(f"storage is {self.storage!r}; choose one of {', '.join(get_args(Storage))}")


class Empirical(FisherEstimator[EmpiricalOptions]):
    """J = (1/n) Σ_n vec(G_n) vec(G_n)ᵀ + λI; relative damping ρ is ρ times the mean diagonal."""

    name = "empirical"
    api_version = 1
    Options = EmpiricalOptions

    @property
    def additive(self) -> bool:
        return False

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return NoSums()

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return SampleGradients(spec, self.options.storage, device=device, dtype=dtype)

    def fisher(
        self,
        statistics: FisherStatistics,
        *,
        damping: float,
        damping_kind: DampingKind,
        fisher_scale: FisherScale,
    ) -> LowRankFisher:
        """The damped Fisher; `fisher_scale` has no effect, as gradients are of whole samples."""
        request = request_of(statistics, damping, damping_kind)
        return damped(empirical_spectrum(statistics, request, keep=None), statistics, request)

    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        return (0, stored_bytes(spec, self.options.storage, samples=samples, tokens=tokens, itemsize=itemsize))


@hookimpl
def lora_da_fisher_estimators() -> list[type[FisherEstimator[Any]]]:
    """Offer the empirical Fisher."""
    return [Empirical]
