"""Records to comparisons: configurations under short names, bands over seeds, differences paired by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lora_da_core.ablation.axes import CHOICES, COMPONENTS, CONFIG_AXES, NOTHING, TRAINING, USUAL
from lora_da_core.ablation.results import DONE, Record
from lora_da_core.config import NO_ALLOCATOR
from lora_da_core.display import number

CONFIDENCE: Final = 0.95

LOSS: Final = "loss"
BEST: Final = f"{LOSS}, best lr"
"""Measures of a difference."""

_SYMBOLS: Final = {"alpha": "α", "beta": "β", "gamma": "γ", "samples": "n", "damping": "ρ"}


@dataclass
class Configuration:
    """Cells that differ in their seed alone.

    Attributes:
        label: Short name: what distinguishes it from the others of the report.
        name: The same without the rank.
        kind: What it is drawn as: its estimator or baseline; its solver where there is one estimator alone.
        first: The record of one of its cells, for its settings.
        by_seed: Its finished cells.
    """

    label: str
    name: str
    kind: str
    first: Record
    by_seed: dict[int, Record] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """LoRA's r."""
        return int(self.first["rank"])

    def mean(self, name: str) -> float:
        """Mean of a field over seeds; NaN where no cell has it."""
        values = [record[name] for record in self.by_seed.values() if record.get(name) is not None]
        return statistics.fmean(values) if values else math.nan

    def losses(self, rate: float, of: str = "losses") -> dict[int, dict[int, float]]:
        """Losses by seed and step, at one learning rate; NaN where training diverged.

        Args:
            rate: The learning rate.
            of: `losses` on the held-out rows, or `source_losses`.

        Returns:
            Of the seeds that have some.
        """
        found: dict[int, dict[int, float]] = {}
        for seed, record in self.by_seed.items():
            for curve in record["curves"]:
                if curve["learning_rate"] == rate and curve.get(of):
                    losses = [math.nan if loss is None else loss for loss in curve[of]]
                    found[seed] = dict(zip(curve["steps"], losses, strict=True))
        return found

    def survivors(self, rate: float) -> dict[int, dict[int, float]]:
        """`losses` of the seeds that did not diverge."""
        return {
            seed: losses
            for seed, losses in self.losses(rate).items()
            if losses and all(map(math.isfinite, losses.values()))
        }


@dataclass(frozen=True)
class Interval:
    """A mean and its t-interval; the bounds are NaN with fewer than two values."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return self.high - self.mean

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it lies on one side of zero; never with fewer than two values."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """A configuration against the baseline, paired by seed.

    Attributes:
        configuration: What is compared.
        measure: What of it.
        mean: Its mean over the seeds that both have.
        other: The baseline's.
        interval: Of the differences (configuration − baseline).
    """

    configuration: Configuration
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
    wording = _Wording(done)
    found: dict[str, Configuration] = {}
    for record in done:
        key = json.dumps([record.get(name) for name in _settings()], sort_keys=True)
        if key not in found:
            found[key] = Configuration(wording.label(record), wording.name(record), wording.kind(record), record)
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
        other = counterpart(found, each, baseline)
        if other is None or other is each:
            continue
        rates = learning_rates([each, other])
        pairs = [(f"{LOSS}, lr {rate:g}", final_losses(each, rate), final_losses(other, rate)) for rate in rates]
        if len(rates) > 1:
            pairs.append((BEST, best_final_losses(each), best_final_losses(other)))
        if not rates:
            pairs = [("angle [°]", _angles(each), _angles(other))]
        for measure, ours, theirs in pairs:
            seeds = sorted(set(ours) & set(theirs))
            if seeds:
                mine, base = (statistics.fmean(side[seed] for seed in seeds) for side in (ours, theirs))
                result.append(Difference(each, measure, mine, base, paired(ours, theirs)))
    return result


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """Mean and interval of ours − theirs over the seeds that both have.

    >>> paired({0: 1.0, 1: 2.0, 2: 9.0}, {0: 2.0, 1: 4.0}).mean
    -1.5
    """
    return interval([ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))])


def learning_rates(found: Sequence[Configuration]) -> list[float]:
    """All learning rates of some configurations, ascending."""
    curves = [curve for each in found for record in each.by_seed.values() for curve in record["curves"]]
    return sorted({curve["learning_rate"] for curve in curves})


def final_losses(each: Configuration, rate: float) -> dict[int, float]:
    """Held-out loss at the last evaluated step by seed; seeds that diverged are left out."""
    return {seed: losses[max(losses)] for seed, losses in each.survivors(rate).items()}


def best_rate(each: Configuration) -> float | None:
    """The rate whose mean final loss is lowest, among those where the most seeds survived; None without any."""
    rates = {rate: final_losses(each, rate) for rate in learning_rates([each])}
    alive = [rate for rate, losses in rates.items() if losses]
    return min(alive, key=lambda rate: (-len(rates[rate]), statistics.fmean(rates[rate].values())), default=None)


def best_final_losses(each: Configuration) -> dict[int, float]:
    """`final_losses` at `best_rate`."""
    rate = best_rate(each)
    return {} if rate is None else final_losses(each, rate)


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


def counterpart(found: Sequence[Configuration], each: Configuration, baseline: str) -> Configuration | None:
    """What a configuration is compared to.

    Args:
        found: All configurations.
        each: One of them.
        baseline: A baseline's or an estimator's name.

    Returns:
        The baseline's configuration of the same rank, which may be `each` itself; None where there is none.
    """
    alike = [
        other
        for other in found
        if baseline in (other.first["baseline"], other.first["estimator"]) and other.rank == each.rank
    ]
    # Without a penalty or a plugin where there is one, the first in the order of the records otherwise.
    alike.sort(key=lambda other: sum(_part(other.first, kind) != NOTHING for kind in TRAINING))
    if each in alike:
        return alike[0]
    # An estimator as baseline: the cell with the most settings in common.
    return max(alike, key=lambda other: _common(other.first, each.first), default=None)


def _common(one: Mapping[str, Any], two: Mapping[str, Any]) -> int:
    return sum(one.get(name) == two.get(name) for name in _settings())


def _settings() -> tuple[str, ...]:
    """What tells configurations apart; records of an earlier version may lack some."""
    parts = tuple(name for kind in CHOICES for name in (kind, f"{kind}_options"))
    return ("baseline", *parts, "rank", "samples", *CONFIG_AXES)


class _Wording:
    """Short names for the configurations of some finished cells.

    A setting is named where it differs among the cells of one preset; what differs between presets alone is told by
    the preset's name.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        ours = [record for record in records if record["baseline"] is None]
        self.ranks = len({record["rank"] for record in records}) > 1
        self.presets = len({record.get("preset") for record in ours}) > 1
        self.varied = _varied(records)
        self.by = next((kind for kind in CHOICES if len({self._component(r, kind) for r in ours}) > 1), "estimator")

    def label(self, record: Record) -> str:
        """The name, and the rank where there are several."""
        return f"{self.name(record)} r={record['rank']}" if self.ranks else self.name(record)

    def name(self, record: Record) -> str:
        """What tells the configuration from others of its rank."""
        if record["baseline"] is not None:
            return " ".join([f"PEFT {record['baseline']}", *self._training(record)])
        preset = record.get("preset")
        parts = [str(preset)] if self.presets else []
        named = [self._component(record, kind) for kind in COMPONENTS if kind == "estimator" or self._touches(kind)]
        parts += [component for component in named if component != NO_ALLOCATOR]
        for setting in _settings():
            value = record.get(setting)
            if setting in self.varied and setting.removesuffix("_options") not in CHOICES and setting != "rank":
                if value is None:
                    continue
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                shown = number(value, digits=6) if is_number else str(value)
                parts.append(f"{_SYMBOLS.get(setting, setting)}={shown}")
        return " ".join([*parts, *self._training(record)])

    def _training(self, record: Record) -> list[str]:
        """What the fine-tune was changed by; nothing where it was AdamW's alone."""
        found = []
        for kind, word in (("regularizer", "+"), ("source_fisher", "of"), ("trainer", "+")):
            if _part(record, kind) != NOTHING:
                found += [word, self._component(record, kind)]
        return found

    def kind(self, record: Record) -> str:
        """Estimator, solver or gradient: the first of them that varies; a baseline is a kind of its own."""
        return self._component(record, self.by) if record["baseline"] is None else f"PEFT {record['baseline']}"

    def _touches(self, kind: str) -> bool:
        return bool({kind, f"{kind}_options"} & self.varied)

    def _component(self, record: Record, kind: str) -> str:
        chosen, options = _part(record, kind), record.get(f"{kind}_options") or {}
        shown = [f"{key}={value}" for key, value in options.items() if f"{kind} {chosen} {key}" in self.varied]
        return f"{chosen}({', '.join(shown)})" if shown else chosen


def _part(record: Record, kind: str) -> str:
    """A component's name; records of before there was its kind have none."""
    value = record.get(kind)
    return str(USUAL.get(kind) if value is None else value)


def _varied(records: Sequence[Record]) -> set[str]:
    """Settings with several values within a preset; `kind name option` for options of one component."""
    seen: dict[tuple[Any, str], set[str]] = {}

    def note(record: Record, name: str, value: Any) -> None:
        seen.setdefault((record.get("preset"), name), set()).add(json.dumps(value, sort_keys=True))

    for record in records:
        for name in _settings():
            note(record, name, _part(record, name) if name in CHOICES else record.get(name))
        for kind in CHOICES:
            for key, value in (record.get(f"{kind}_options") or {}).items():
                note(record, f"{kind} {_part(record, kind)} {key}", value)
    return {name for (_, name), values in seen.items() if len(values) > 1}
