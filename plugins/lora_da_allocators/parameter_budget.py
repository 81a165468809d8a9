"""The best ranks for a budget of parameters, by dynamic programming over integers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_da_allocators._options import AllocatorOptions, BudgetedAllocator
from lora_da_core import hookimpl
from lora_da_core.interfaces import RankAllocator
from lora_da_core.types import LayerSpectrum, RankUnit


@dataclass(frozen=True)
class ParameterBudgetOptions(AllocatorOptions):
    """Options of the allocation by parameters.

    Attributes:
        cells: Most entries of the table. Where the budget over the costs' common divisor has more, costs are rounded
            up to a coarser unit: the budget still holds, and the optimum is that of the rounded costs.
    """

    cells: int = 200_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cells < 1:
            raise ValueError(f"cells is {self.cells!r}; it must be at least 1")


class ParameterBudget(BudgetedAllocator[ParameterBudgetOptions]):
    """Maximises Σ_l Σ_{i ≤ r_l} max(0, −σ_l² λ_li) subject to Σ_l r_l (in_l + out_l) ≤ budget.

    Layers of one cost are one concave sequence of gains, of which the first k are best, so the table has one stage for
    each distinct cost (derived). Exact as long as `cells` is not exceeded.
    """

    name = "parameter_budget"
    api_version = 1
    Options = ParameterBudgetOptions

    @property
    def unit(self) -> RankUnit:
        return "parameter"

    def allocate(
        self, spectra: Mapping[str, LayerSpectrum], costs: Mapping[str, int], budget: int
    ) -> Mapping[str, int]:
        least = self.options.minimum
        left = budget - least * sum(costs.values())
        divisor = math.gcd(*costs.values())
        unit = divisor * max(1, math.ceil(left / divisor / self.options.cells))
        gains = {name: spectrum.gains[least:] for name, spectrum in spectra.items()}
        # (gain, layer), the largest first; of equal ones the earlier direction, and the layer that comes first.
        items: dict[int, list[tuple[float, str]]] = {}
        for name, values in gains.items():
            items.setdefault(math.ceil(costs[name] / unit), []).extend(
                (gain, name) for gain in values.tolist() if gain > 0
            )
        for found in items.values():
            found.sort(key=lambda item: -item[0])
        counts = _best_counts([(cost, [gain for gain, _ in found]) for cost, found in items.items()], left // unit)
        ranks = dict.fromkeys(spectra, least)
        for count, found in zip(counts, items.values(), strict=True):
            for _, name in found[:count]:
                ranks[name] += 1
        return ranks


def _best_counts(stages: Sequence[tuple[int, Sequence[float]]], budget: int) -> list[int]:
    """How many of each stage's items to take, each stage's in order, at most `budget` in all.

    Args:
        stages: What one item costs, and what each gains.
        budget: The budget.

    Returns:
        Counts by stage.
    """
    best: NDArray[np.float64] = np.zeros(budget + 1)
    choices: list[NDArray[np.int32]] = []
    for cost, gains in stages:
        found, taken = best.copy(), np.zeros(budget + 1, dtype=np.int32)
        total = 0.0
        for count, gain in enumerate(gains[: budget // cost], start=1):
            total += gain
            start = count * cost
            candidate = best[: budget + 1 - start] + total
            better = candidate > found[start:]
            found[start:][better] = candidate[better]
            taken[start:][better] = count
        best = found
        choices.append(taken)
    counts, left = [], budget
    for (cost, _), taken in zip(reversed(stages), reversed(choices), strict=True):
        counts.append(int(taken[left]))
        left -= cost * counts[-1]
    return counts[::-1]


@hookimpl
def lora_da_rank_allocators() -> list[type[RankAllocator[Any]]]:
    """Offers `parameter_budget`."""
    return [ParameterBudget]
