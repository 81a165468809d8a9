"""What all allocators are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from lora_da_core.interfaces import RankAllocator
from lora_da_core.types import LayerSpec


@dataclass(frozen=True)
class AllocatorOptions:
    """Options of a rank allocator.

    Attributes:
        total: The whole budget in the allocator's units; None takes what the configured ranks come to.
        minimum: Least rank of a layer.
        largest: Largest rank of a layer, as a multiple of its configured one; every layer is solved at that rank.
    """

    total: int | None = None
    minimum: int = 1
    largest: float = 4.0

    def __post_init__(self) -> None:
        if self.total is not None and self.total < 1:
            raise ValueError(f"total is {self.total!r}; it must be at least 1, or None")
        if self.minimum < 1:
            raise ValueError(f"minimum is {self.minimum!r}; it must be at least 1: PEFT knows no rank 0")
        if not 1 <= self.largest < float("inf"):
            raise ValueError(f"largest is {self.largest!r}; it must be at least 1")


OptionsT = TypeVar("OptionsT", bound=AllocatorOptions)


class BudgetedAllocator(RankAllocator[OptionsT]):
    """Reads budget and bounds from the options."""

    @property
    def budget(self) -> int | None:
        return self.options.total

    @property
    def smallest_rank(self) -> int:
        return self.options.minimum

    def largest_rank(self, spec: LayerSpec) -> int:
        return max(self.options.minimum, int(self.options.largest * spec.rank))
