"""The greedy choice: one rank after the other to the layer whose next one gains most for its cost."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def greedy_ranks(
    marginals: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, minimum: int
) -> dict[str, int]:
    """Ranks by marginal gain per cost, on top of `minimum` everywhere.

    Exactly optimal where all costs are equal and every layer's marginals do not increase: the total is then separable
    and concave, and the largest marginals form a feasible set. Ties go to the layer that comes first.

    Args:
        marginals: What each further rank of a layer gains, by layer; the first `minimum` are taken whatever they gain.
        costs: Units that one rank takes, by layer.
        budget: Units to spend at most.
        minimum: Rank that every layer gets.

    Returns:
        Ranks; nothing is spent on ranks that gain nothing.

    >>> greedy_ranks({"a": [5, 4, 1], "b": [3, 2, 0]}, {"a": 1, "b": 1}, 4, 1)
    {'a': 2, 'b': 2}
    """
    ranks = dict.fromkeys(marginals, minimum)
    left = budget - minimum * sum(costs[name] for name in marginals)
    waiting: list[tuple[float, int, str]] = []

    def offer(place: int, name: str) -> None:
        if ranks[name] < len(marginals[name]) and marginals[name][ranks[name]] > 0:
            heapq.heappush(waiting, (-marginals[name][ranks[name]] / costs[name], place, name))

    for place, name in enumerate(marginals):
        offer(place, name)
    while waiting:
        _, place, name = heapq.heappop(waiting)
        if costs[name] <= left:
            left -= costs[name]
            ranks[name] += 1
            offer(place, name)
    return ranks
