"""The largest gains of all layers, for a budget of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_da_allocators._marginal import greedy_ranks
from lora_da_allocators._options import AllocatorOptions, BudgetedAllocator
from lora_da_core import hookimpl
from lora_da_core.interfaces import RankAllocator
from lora_da_core.types import LayerSpectrum


class Greedy(BudgetedAllocator[AllocatorOptions]):
    """Maximises Σ_l Σ_{i ≤ r_l} max(0, −σ_l² λ_li) over ranks of a given sum, exactly.

    The gain of direction i of layer l is what it takes off E‖D − AB‖² (arXiv 2510.24561, the theorem on Ω), in squared
    weights, so that layers compare; the total is separable and concave in the ranks, where taking the largest gains
    is optimal (derived). Ranks that gain nothing are not given.
    """

    name = "greedy"
    api_version = 1
    Options = AllocatorOptions

    def allocate(
        self, spectra: Mapping[str, LayerSpectrum], costs: Mapping[str, int], budget: int
    ) -> Mapping[str, int]:
        gains = {name: spectrum.gains.tolist() for name, spectrum in spectra.items()}
        return greedy_ranks(gains, costs, budget, self.options.minimum)


@hookimpl
def lora_da_rank_allocators() -> list[type[RankAllocator[Any]]]:
    """Offers `greedy`."""
    return [Greedy]
