"""Fine-tunes compared, each at its best learning rate: losses, differences, steps, compute, robustness."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lora_da_core.ablation.comparison import (
    Configuration,
    Interval,
    best_rate,
    counterpart,
    final_losses,
    interval,
    learning_rates,
    paired,
)

Curve = Sequence[tuple[float, float]]
"""Places, ascending, and the loss at each; straight lines in between."""


@dataclass(frozen=True)
class AtBest:
    """A configuration at the learning rate that suits it best, and how it compares to the baseline at its own.

    Everything that compares takes the seeds that both survived, and is NaN (or empty) without a baseline.

    Attributes:
        configuration: What was trained.
        base: What it is compared to; itself for the baseline, None where there is none of its rank.
        rate: Its best learning rate.
        losses: Held-out loss over the surviving seeds, by step.
        differences: Loss minus the baseline's, paired by seed, by step; empty for the baseline itself.
        start_cost: What the initialisation's data passes cost, in training steps.
        reach: First step at which the mean curve is as low as the baseline's ever gets; infinite where it never is.
        reach_share: The same as a share of the steps that the baseline takes to get there.
        ahead_from: Compute in steps, the initialisation's included, from which on the mean curve stays below the
            baseline's; infinite where it ends above it.
        worst: Final loss at the worst rate minus that at the best, paired by seed; infinite where seeds diverged, NaN
            with one rate.
    """

    configuration: Configuration
    base: Configuration | None
    rate: float
    losses: Mapping[int, Interval]
    differences: Mapping[int, Interval]
    start_cost: float
    reach: float
    reach_share: float
    ahead_from: float
    worst: Interval

    @property
    def is_base(self) -> bool:
        """Whether it is what others are compared to."""
        return self.base is self.configuration

    @property
    def final(self) -> float:
        """Mean loss at the last step."""
        return self.losses[max(self.losses)].mean


def at_best(found: Sequence[Configuration], baseline: str | None, batch_size: int) -> list[AtBest]:
    """Every configuration that was trained, at its best learning rate.

    Args:
        found: Configurations.
        baseline: Name of what they are compared to.
        batch_size: Samples per training step, the unit of `start_cost`.

    Returns:
        One entry for each with a seed that survived; by rank, the lowest final loss first.
    """
    entries = [_entry(found, each, baseline, batch_size) for each in found if best_rate(each) is not None]
    return sorted(entries, key=lambda entry: (entry.configuration.rank, entry.final))


def start_cost(each: Configuration, batch_size: int) -> float:
    """What the initialisation's passes over samples cost, in training steps; NaN where it is not known.

    A pass of the estimator counts as a step of training on its samples, a forward pass of the line search as half of
    one: with a frozen base a step is a forward and a backward pass of about equal cost.

    Args:
        each: A configuration.
        batch_size: Samples per training step.

    Returns:
        Steps.
    """
    searched = each.mean("searched")
    forward = 0.0 if math.isnan(searched) else searched / 2
    return (each.mean("passes") * int(each.first["samples"]) + forward) / batch_size


def reached(curve: Curve, level: float) -> float:
    """The first place at which a curve is at or below a level.

    >>> reached([(0, 4.0), (10, 2.0), (20, 3.0)], 2.5)
    7.5

    Args:
        curve: The curve.
        level: The level.

    Returns:
        The place; infinite where the curve stays above.
    """
    if curve and curve[0][1] <= level:
        return curve[0][0]
    for (start, high), (end, low) in pairwise(curve):
        if low <= level:
            return start + (high - level) / (high - low) * (end - start)
    return math.inf


def stays_below(curve: Curve, other: Curve) -> float:
    """The place from which on a curve stays below another, within the range that both cover.

    >>> stays_below([(0, 5.0), (10, 1.0)], [(0, 4.0), (10, 2.0)])
    5.0

    Args:
        curve: The curve.
        other: What it is held against.

    Returns:
        The place; infinite where it is not below at the end, NaN where they share no range or a place is unknown.
    """
    low, high = max(curve[0][0], other[0][0]), min(curve[-1][0], other[-1][0])
    if low > high or any(math.isnan(each[0][0]) for each in (curve, other)):
        return math.nan
    places = sorted({low, high, *(place for place, _ in (*curve, *other) if low <= place <= high)})
    gaps = [(place, _at(curve, place) - _at(other, place)) for place in places]
    if gaps[-1][1] >= 0:
        return math.inf
    for (start, before), (end, after) in reversed(list(pairwise(gaps))):
        if before >= 0:
            return start + before / (before - after) * (end - start)
    return low


def shifted(curve: Curve, by: float) -> list[tuple[float, float]]:
    """A curve moved along its places."""
    return [(place + by, loss) for place, loss in curve]


def worst_rate(each: Configuration) -> Interval:
    """What the worst learning rate costs: its final loss minus the best rate's, paired by seed.

    Args:
        each: A configuration with at least one seed that survived.

    Returns:
        The interval; infinite where a seed diverged at some rate, NaN with one rate.
    """
    best, rates = best_rate(each), learning_rates([each])
    others = [rate for rate in rates if rate != best]
    if best is None or not others:
        return interval([])
    if any(len(each.survivors(rate)) < len(each.losses(rate)) for rate in rates):
        return Interval(math.inf, math.nan, math.nan, 0)
    found = [paired(final_losses(each, rate), final_losses(each, best)) for rate in others]
    return max(found, key=lambda gap: gap.mean)


def _entry(found: Sequence[Configuration], each: Configuration, baseline: str | None, batch_size: int) -> AtBest:
    rate, cost = best_rate(each), start_cost(each, batch_size)
    assert rate is not None
    base = None if baseline is None else counterpart(found, each, baseline)
    ours = each.survivors(rate)
    unknown = dict.fromkeys(("reach", "reach_share", "ahead_from"), math.nan)
    alone = AtBest(each, base, rate, _by_step(ours), {}, cost, worst=worst_rate(each), **unknown)
    base_rate = None if base is None else best_rate(base)
    if base is None or base_rate is None:
        return alone
    theirs = base.survivors(base_rate)
    seeds = sorted(set(ours) & set(theirs))
    curve, other = (_mean_curve([side[seed] for seed in seeds]) for side in (ours, theirs))
    if not curve or not other:
        return alone
    lowest = min(loss for _, loss in other)
    reach, first = reached(curve, lowest), reached(other, lowest)
    compared = replace(alone, reach=reach, reach_share=reach / first if first > 0 else math.nan)
    if compared.is_base:
        return compared
    steps = sorted({step for step, _ in curve} & {step for step, _ in other})
    gaps = {
        step: paired({seed: ours[seed][step] for seed in seeds}, {seed: theirs[seed][step] for seed in seeds})
        for step in steps
    }
    ahead = stays_below(shifted(curve, cost), shifted(other, start_cost(base, batch_size)))
    return replace(compared, differences=gaps, ahead_from=ahead)


def _by_step(losses: Mapping[int, Mapping[int, float]]) -> dict[int, Interval]:
    steps = sorted({step for by_step in losses.values() for step in by_step})
    return {step: interval([by_step[step] for by_step in losses.values() if step in by_step]) for step in steps}


def _mean_curve(curves: Sequence[Mapping[int, float]]) -> list[tuple[int, float]]:
    """Mean over seeds at the steps that all have."""
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, statistics.fmean(curve[step] for curve in curves)) for step in steps]


def _at(curve: Curve, place: float) -> float:
    for (start, first), (end, last) in pairwise(curve):
        if start <= place <= end:
            return first + (last - first) * (place - start) / (end - start)
    return curve[0][1]
