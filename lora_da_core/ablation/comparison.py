"""Records to comparisons: configurations under short names, bands over seeds, differences paired by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lora_da_core.ablation.grid import COMPONENTS, CONFIG_AXES
from lora_da_core.ablation.results import DONE, Record

CONFIDENCE: Final = 0.95

_SYMBOLS: Final = {"alpha": "α", "beta": "β", "gamma": "γ", "rank": "r", "samples": "n", "damping": "ρ"}


@dataclass
class Configuration:
    """Cells that differ in their seed alone.

    Attributes:
        label: Short name: what distinguishes it from the others of the report.
        first: The record of one of its cells, for its settings.
        by_seed: Its finished cells.
    """

    label: str
    first: Record
    by_seed: dict[int, Record] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """Mean of a field over seeds; NaN where no cell has it."""
        values = [record[name] for record in self.by_seed.values() if record.get(name) is not None]
        return statistics.fmean(values) if values else math.nan

    def losses(self, rate: float) -> dict[int, dict[int, float]]:
        """Held-out losses by seed and step, at one learning rate; NaN where training diverged."""
        found: dict[int, dict[int, float]] = {}
        for seed, record in self.by_seed.items():
            for curve in record["curves"]:
                if curve["learning_rate"] == rate:
                    losses = [math.nan if loss is None else loss for loss in curve["losses"]]
                    found[seed] = dict(zip(curve["steps"], losses, strict=True))
        return found


@dataclass(frozen=True)
class Interval:
    """A mean and its t-interval; the bounds are NaN with fewer than two values."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """A configuration against the baseline, paired by seed."""

    label: str
    measure: str
    mean: float
    other: float
    interval: Interval


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    from scipy import stats

    count = len(values)
    mean = statistics.fmean(values) if values else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def configurations(records: Sequence[Record]) -> list[Configuration]:
    """Finished cells by configuration.

    Args:
        records: Any records.

    Returns:
        Configurations in the order of their first record, with labels that tell them apart.
    """
    done = [record for record in records if record["status"] == DONE]
    varied = _varied([record for record in done if record["baseline"] is None])
    ranks = len({record["rank"] for record in done}) > 1
    found: dict[str, Configuration] = {}
    for record in done:
        key = json.dumps([record[name] for name in _settings()], sort_keys=True)
        if key not in found:
            found[key] = Configuration(_label(record, varied, ranks), record)
        # Seeds of a configuration that was run under two identities (another device, say): the last one counts.
        found[key].by_seed[record["seed"]] = record
    return list(found.values())


def baseline_of(found: Sequence[Configuration], wanted: str | None) -> str | None:
    """The name everything is compared to: the wanted one, else the first baseline, else the first estimator."""
    names = [name for each in found for name in (each.first["baseline"], each.first["estimator"]) if name]
    if wanted is not None:
        return wanted if wanted in names else None
    return next((each.first["baseline"] for each in found if each.first["baseline"]), names[0] if names else None)


def differences(found: Sequence[Configuration], baseline: str) -> list[Difference]:
    """Every configuration against the baseline's of the same rank, seed by seed.

    The measure is the held-out loss at the last step, at each learning rate and at each one's best (by mean over
    seeds); without fine-tunes it is the angle to the reference.

    Args:
        found: Configurations.
        baseline: A baseline's or an estimator's name.

    Returns:
        Differences (configuration − baseline): negative is better.
    """
    result = []
    for each in found:
        other = _counterpart(found, each, baseline)
        if other is None or other is each:
            continue
        rates = learning_rates([each, other])
        pairs = [(f"loss, lr {rate:g}", final_losses(each, rate), final_losses(other, rate)) for rate in rates]
        if len(rates) > 1:
            pairs.append(("loss, best lr", best_final_losses(each), best_final_losses(other)))
        if not rates:
            pairs = [("angle [°]", _angles(each), _angles(other))]
        for measure, ours, theirs in pairs:
            seeds = sorted(set(ours) & set(theirs))
            if seeds:
                gaps = interval([ours[seed] - theirs[seed] for seed in seeds])
                mine, base = (statistics.fmean(side[seed] for seed in seeds) for side in (ours, theirs))
                result.append(Difference(each.label, measure, mine, base, gaps))
    return result


def learning_rates(found: Sequence[Configuration]) -> list[float]:
    """All learning rates of some configurations, ascending."""
    curves = [curve for each in found for record in each.by_seed.values() for curve in record["curves"]]
    return sorted({curve["learning_rate"] for curve in curves})


def final_losses(each: Configuration, rate: float) -> dict[int, float]:
    """Held-out loss at the last evaluated step by seed; seeds that diverged are left out."""
    finals = {seed: losses[max(losses)] for seed, losses in each.losses(rate).items()}
    return {seed: loss for seed, loss in finals.items() if math.isfinite(loss)}


def best_final_losses(each: Configuration) -> dict[int, float]:
    """`final_losses` at the rate whose mean over seeds is lowest, among those where the most seeds survived."""
    rates = {rate: final_losses(each, rate) for rate in learning_rates([each])}
    alive = {rate: losses for rate, losses in rates.items() if losses}
    if not alive:
        return {}
    return min(alive.values(), key=lambda losses: (-len(losses), statistics.fmean(losses.values())))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other beats in both coordinates (smaller is better), by the first one.

    >>> pareto([(1, 5), (2, 6), (3, 1), (0.5, 9)])
    [3, 0, 2]
    """
    front: list[int] = []
    lowest = math.inf
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if points[place][1] < lowest:
            front.append(place)
            lowest = points[place][1]
    return front


def _angles(each: Configuration) -> dict[int, float]:
    return {seed: math.degrees(record["angle"]) for seed, record in each.by_seed.items() if record["angle"] is not None}


def _counterpart(found: Sequence[Configuration], each: Configuration, baseline: str) -> Configuration | None:
    alike = [
        other
        for other in found
        if baseline in (other.first["baseline"], other.first["estimator"]) and other.first["rank"] == each.first["rank"]
    ]
    if each in alike:
        return alike[0]
    # An estimator as baseline: the cell with the most settings in common.
    return max(alike, key=lambda other: _common(other.first, each.first), default=None)


def _common(one: Mapping[str, Any], two: Mapping[str, Any]) -> int:
    return sum(one[name] == two[name] for name in _settings())


def _settings() -> tuple[str, ...]:
    parts = tuple(name for kind in COMPONENTS for name in (kind, f"{kind}_options"))
    return ("baseline", *parts, "rank", "samples", *CONFIG_AXES)


def _varied(records: Sequence[Record]) -> set[str]:
    """Settings with several values; `kind name option` for options of one component."""
    seen: dict[str, set[str]] = {}
    for record in records:
        for name in _settings():
            seen.setdefault(name, set()).add(json.dumps(record[name], sort_keys=True))
        for kind in COMPONENTS:
            for key, value in (record[f"{kind}_options"] or {}).items():
                seen.setdefault(f"{kind} {record[kind]} {key}", set()).add(json.dumps(value, sort_keys=True))
    return {name for name, values in seen.items() if len(values) > 1}


def _label(record: Record, varied: set[str], ranks: bool) -> str:
    if record["baseline"] is not None:
        return f"PEFT {record['baseline']}" + (f" r={record['rank']}" if ranks else "")
    parts = [_component(record, kind, varied) for kind in COMPONENTS if kind == "estimator" or _touches(kind, varied)]
    for name in _settings():
        if name in varied and name.removesuffix("_options") not in COMPONENTS and record[name] is not None:
            value = record[name]
            shown = f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
            parts.append(f"{_SYMBOLS.get(name, name)}={shown}")
    return " ".join(parts)


def _touches(kind: str, varied: set[str]) -> bool:
    return bool({kind, f"{kind}_options"} & varied)


def _component(record: Record, kind: str, varied: set[str]) -> str:
    options = record[f"{kind}_options"] or {}
    shown = [f"{key}={value}" for key, value in options.items() if f"{kind} {record[kind]} {key}" in varied]
    return f"{record[kind]}({', '.join(shown)})" if shown else str(record[kind])
