"""The same rank for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora_da_allocators._options import AllocatorOptions, BudgetedAllocator
from lora_da_core import hookimpl
from lora_da_core.interfaces import RankAllocator
from lora_da_core.types import LayerSpectrum, RankUnit

Per = Literal["rank", "parameter"]


@dataclass(frozen=True)
class UniformOptions(AllocatorOptions):
    """Options of the uniform allocation.

    Attributes:
        per: What the budget counts: ranks, or parameters.
    """

    per: Per = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in get_args(Per):
            raise ValueError(f"per is {self.per!r}; choose one of {', '.join(get_args(Per))}")


class Uniform(BudgetedAllocator[UniformOptions]):
    """The largest rank that fits for all; a layer that cannot have it has its own largest.

    What is left over, less than one rank for every layer, is not spent.
    """

    name = "uniform"
    api_version = 1
    Options = UniformOptions

    @property
    def unit(self) -> RankUnit:
        return self.options.per

    def allocate(
        self, spectra: Mapping[str, LayerSpectrum], costs: Mapping[str, int], budget: int
    ) -> Mapping[str, int]:
        limits = {name: len(spectrum.values) for name, spectrum in spectra.items()}
        rank = self.options.minimum
        while rank < max(limits.values()) and _cost(limits, costs, rank + 1) <= budget:
            rank += 1
        return {name: min(rank, limit) for name, limit in limits.items()}


def _cost(limits: Mapping[str, int], costs: Mapping[str, int], rank: int) -> int:
    return sum(costs[name] * min(rank, limit) for name, limit in limits.items())


@hookimpl
def lora_da_rank_allocators() -> list[type[RankAllocator[Any]]]:
    """Offers `uniform`."""
    return [Uniform]
