"""Chooses the size of the first step by a line search on the loss; pure, it only calls the function it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

START = 2.0**-4
"""First multiplier tried: a step of spectral norm 1/16 in every layer's weights."""

DOUBLINGS = 14
"""How many factors of two the search may go up or down."""


@dataclass(frozen=True)
class LineSearch:
    """What the search found.

    Attributes:
        multiplier: The best multiplier tried; 0 where none lowers the loss.
        base_loss: The loss at 0.
        tried: (multiplier, loss) in the order they were tried.
    """

    multiplier: float
    base_loss: float
    tried: tuple[tuple[float, float], ...]


def line_search(loss: Callable[[float], float]) -> LineSearch:
    """Finds a multiplier near the minimum of `loss` by powers of two and one parabola through the best three.

    Non-finite losses count as infinitely bad. The result never has a higher loss than 0 has.

    Args:
        loss: The loss at a multiplier ≥ 0.

    Returns:
        The multiplier and everything that was tried.

    >>> found = line_search(lambda t: (t - 0.11) ** 2)
    >>> abs(found.multiplier - 0.11) < 0.02
    True
    >>> line_search(lambda t: t).multiplier
    0.0
    """
    tried: dict[float, float] = {}

    def at(multiplier: float) -> float:
        if multiplier not in tried:
            value = loss(multiplier)
            tried[multiplier] = value if math.isfinite(value) else math.inf
        return tried[multiplier]

    base = loss(0.0)
    best = _descend(at, START, base)
    _refine(at, best)
    chosen = min(tried, key=lambda multiplier: tried[multiplier])
    if tried[chosen] >= base:
        chosen = 0.0
    return LineSearch(chosen, base, tuple(tried.items()))


def _descend(at: Callable[[float], float], start: float, base: float) -> float:
    """Doubles or halves from `start` while the loss falls (or, halving, while it is no better than at 0)."""
    best = start
    for _ in range(DOUBLINGS):
        if at(best * 2) >= at(best):
            break
        best *= 2
    if best > start:
        return best
    for _ in range(DOUBLINGS):
        if at(best / 2) >= at(best) and at(best) < base:
            break
        best /= 2
    return best


def _refine(at: Callable[[float], float], best: float) -> None:
    """Tries the vertex of the parabola through the losses at half, once and twice the best, over log t."""
    low, mid, high = at(best / 2), at(best), at(best * 2)
    curvature = low - 2 * mid + high
    if math.isfinite(curvature) and curvature > 0:
        shift = max(-0.9, min(0.9, (low - high) / (2 * curvature)))
        if abs(shift) > 0.1:
            at(best * 2.0**shift)
