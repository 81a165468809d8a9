"""Chooses the size of the first step by a line search on the loss; pure, it only calls the function it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

START = 2.0**-4
"""First multiplier tried: a step of spectral norm 1/16 in every layer's weights."""

DOUBLINGS = 14
"""How many factors of two the search may go up or down."""


SURE = 2.0
"""Standard errors by which the mean loss must fall: that of 16 samples of one label each falls by chance as well."""


@dataclass(frozen=True)
class LineSearch:
    """What the search found.

    Attributes:
        multiplier: Of the multipliers tried that surely lower the loss the best; 0 where none does.
        base_loss: The mean loss at 0.
        tried: (multiplier, mean loss) in the order they were tried.
        standard_error: Of the change of the mean loss at the lowest one tried, from its samples; None of one sample.
    """

    multiplier: float
    base_loss: float
    tried: tuple[tuple[float, float], ...]
    standard_error: float | None


def line_search(losses: Callable[[float], Tensor], margin: float = SURE) -> LineSearch:
    """Finds a multiplier near the minimum of the mean loss by powers of two and one parabola through the best three.

    Non-finite losses count as infinitely bad. A multiplier is chosen only where the mean change of the samples' losses
    is below zero by `margin` of its standard errors, so that a direction that is good for these few by chance is not
    taken (one sample has no standard error: its loss decides alone).

    Args:
        losses: The losses of the samples (n,) at a multiplier ≥ 0, of the same samples at each.
        margin: In standard errors; 0 lets the mean decide alone.

    Returns:
        The multiplier and everything that was tried.

    >>> import torch
    >>> found = line_search(lambda t: torch.tensor([(t - 0.10) ** 2, (t - 0.12) ** 2]))
    >>> abs(found.multiplier - 0.11) < 0.02
    True
    >>> line_search(lambda t: torch.tensor([t, t])).multiplier
    0.0
    >>> line_search(lambda t: torch.tensor([(t - 0.11) ** 2, 1 + t / 10])).multiplier
    0.0
    """
    base = losses(0.0).double()
    tried: dict[float, float] = {}
    errors: dict[float, float | None] = {}

    def at(multiplier: float) -> float:
        if multiplier not in tried:
            found = losses(multiplier).double()
            value = float(found.mean())
            tried[multiplier] = value if math.isfinite(value) else math.inf
            errors[multiplier] = _standard_error(found - base)
        return tried[multiplier]

    at_zero = float(base.mean())
    best = _descend(at, START, at_zero)
    _refine(at, best)
    sure = [each for each, loss in tried.items() if loss < at_zero - margin * (errors[each] or 0.0)]
    chosen = min(sure, key=lambda multiplier: tried[multiplier], default=0.0)
    lowest = min(tried, key=lambda multiplier: tried[multiplier])
    return LineSearch(chosen, at_zero, tuple(tried.items()), errors[lowest])


def _standard_error(changes: Tensor) -> float | None:
    """Of the mean of (n,) values; None of one value and of what is not finite."""
    if len(changes) < 2:
        return None
    found = float(changes.std() / math.sqrt(len(changes)))
    return found if math.isfinite(found) else None


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
