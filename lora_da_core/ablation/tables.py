"""The tables of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from lora_da_core.ablation import comparison, figures
from lora_da_core.ablation.comparison import Configuration, Difference, Interval
from lora_da_core.ablation.downstream import AtBest
from lora_da_core.ablation.page import Cell, Column, Table
from lora_da_core.ablation.results import Record
from lora_da_core.display import number

MOST_STEPS: Final = 6
"""Evaluated steps that get columns of their own: the first, the last, and others evenly among them."""

_NONE: Final = "–"
_LOWER, _HIGHER = " ▼", " ▲"


def cost_table(found: Sequence[Configuration]) -> Table:
    """What each configuration costs and how close it comes to the reference: by rank, the smallest angle first.

    Args:
        found: Configurations.

    Returns:
        One row each.
    """
    fronts = {what: figures.front_of(found, name) for what, name, _, _ in figures.COSTS}
    columns: list[tuple[Column, Callable[[Configuration], str]]] = [
        (Column("configuration", kind="text"), lambda each: each.label),
        (
            Column("unbeaten in", kind="text"),
            lambda each: ", ".join(what for what, front in fronts.items() if each in front),
        ),
        (Column("seeds"), lambda each: str(len(each.by_seed))),
        (Column("time [s]"), lambda each: _three_digits(each.mean("seconds"))),
        *([(Column("search [s]"), lambda each: _three_digits(_search_seconds(each)))] if searched(found) else []),
        (Column("peak [MiB]"), lambda each: _three_digits(each.mean("peak_bytes") / 2**20)),
        (Column("passes"), lambda each: number(each.mean("passes"))),
        (Column("median [°]", "angle"), lambda each: _three_digits(math.degrees(each.mean("angle")))),
        (Column("largest [°]", "angle"), lambda each: _three_digits(math.degrees(each.mean("angle_max")))),
        (Column("objective gap"), lambda each: number(each.mean("objective_gap"))),
        (Column("not conv."), lambda each: number(each.mean("not_converged"))),
    ]
    order = sorted(found, key=lambda each: (each.rank, _unknown_last(each.mean("angle")), each.mean("seconds")))
    rows = tuple(tuple(Cell(write(each)) for _, write in columns) for each in order)
    return Table(tuple(column for column, _ in columns), rows)


def searched(found: Sequence[Configuration]) -> bool:
    """Whether some configuration has a scale that was searched for."""
    return any(math.isfinite(_search_seconds(each)) for each in found)


def at_best_table(entries: Sequence[AtBest], measured: str, base: str | None) -> Table:
    """Losses, differences, steps and compute of each configuration at its best learning rate.

    Args:
        entries: In the order of the rows.
        measured: What the losses are.
        base: How what they are compared to is called, or None.

    Returns:
        One row each.
    """
    steps = steps_of(entries)
    columns: list[tuple[Column, Callable[[AtBest], Cell]]] = [
        (Column("configuration", kind="text"), lambda entry: Cell(entry.configuration.label)),
        (Column("lr"), lambda entry: Cell(f"{entry.rate:g}")),
        (Column("seeds"), lambda entry: Cell(_seeds(entry))),
        (Column("worst lr costs"), lambda entry: Cell(_worst(entry))),
    ]
    if base is not None:
        columns += [
            (Column("steps", f"to {base}'s minimum"), lambda entry: Cell(_steps(entry.reach))),
            (Column("share", f"to {base}'s minimum"), lambda entry: Cell(_share(entry.reach_share))),
            (Column("start", "compute [steps]"), lambda entry: Cell(_three_digits(entry.start_cost))),
            (Column("ahead from", "compute [steps]"), lambda entry: Cell(_steps(entry.ahead_from))),
        ]
    columns += [
        (
            Column(str(step), f"{measured} at step"),
            lambda entry, step=step: Cell(with_half(entry.losses.get(step))),  # type: ignore[misc]
        )
        for step in steps
    ]
    if base is not None:
        columns += [
            (
                Column(str(step), f"difference to {base} at step"),
                lambda entry, step=step: gap_cell(entry.differences.get(step), nats),  # type: ignore[misc]
            )
            for step in steps
        ]
    rows = tuple(tuple(write(entry) for _, write in columns) for entry in entries)
    return Table(tuple(column for column, _ in columns), rows)


def steps_of(entries: Sequence[AtBest]) -> list[int]:
    """The evaluated steps that have columns: at most `MOST_STEPS`, evenly by their position, the ends included."""
    steps = sorted({step for entry in entries for step in entry.losses})
    if len(steps) <= MOST_STEPS:
        return steps
    return [steps[round(place * (len(steps) - 1) / (MOST_STEPS - 1))] for place in range(MOST_STEPS)]


def difference_table(rows: Sequence[Difference]) -> Table:
    """Paired differences, one row per configuration: by rank, the lowest first.

    Args:
        rows: The differences; at least one.

    Returns:
        Each configuration's mean and difference by measure, the one at the best learning rate in front.
    """
    measures = sorted(dict.fromkeys(row.measure for row in rows), key=lambda measure: measure != comparison.BEST)
    found: dict[str, dict[str, Difference]] = {}
    for row in rows:
        found.setdefault(row.configuration.label, {})[row.measure] = row
    columns = [Column("configuration", kind="text"), Column("seeds")]
    for measure in measures:
        columns += [Column("mean", measure), Column("difference", measure)]
    order = sorted(found, key=lambda label: (*_order(found[label], measures), label))
    return Table(tuple(columns), tuple(_difference_row(label, found[label], measures) for label in order))


def failure_table(failed: Sequence[Record]) -> Table:
    """What failed, with its error; seeds that failed alike share a row.

    Args:
        failed: Records of failed cells.

    Returns:
        The table.
    """
    alike: dict[tuple[str, str, str], list[Record]] = {}
    for record in failed:
        what = str(record["baseline"] or f"{record['estimator']}, {record['solver']}")
        alike.setdefault((what, str(record["rank"]), str(record["error"])), []).append(record)
    columns = (
        Column("what", kind="text"), Column("rank"), Column("seeds"),
        Column("error", kind="prose"), Column("cells", kind="prose"),
    )  # fmt: skip
    rows = []
    for (what, rank, error), records in alike.items():
        seeds = dict.fromkeys(str(record["seed"]) for record in records)
        notes = dict.fromkeys(f"({note})" for record in records for note in record["notes"])
        cells = ", ".join(record["cell"] for record in records)
        rows.append(tuple(map(Cell, (what, rank, ", ".join(seeds), " ".join([error, *notes]), cells))))
    return Table(columns, tuple(rows))


def _order(of: Mapping[str, Difference], measures: Sequence[str]) -> tuple[int, float]:
    """By rank, then by the first measure that there is."""
    first = next(of[measure] for measure in measures if measure in of)
    return first.configuration.rank, first.interval.mean


def _difference_row(label: str, of: Mapping[str, Difference], measures: Sequence[str]) -> tuple[Cell, ...]:
    most = max(row.interval.count for row in of.values())
    row = [Cell(label), Cell(str(most))]
    for measure in measures:
        if measure not in of:
            row += [Cell(_NONE), Cell(_NONE)]
            continue
        write = nats if measure.startswith(comparison.LOSS) else _three_digits
        gap, count = gap_cell(of[measure].interval, write), of[measure].interval.count
        row += [Cell(write(of[measure].mean)), gap if count == most else Cell(f"{gap.text} ({count} seeds)", gap.tone)]
    return tuple(row)


def gap_cell(found: Interval | None, write: Callable[[float], str]) -> Cell:
    """A difference with its interval, marked where that excludes zero in the digits that are shown."""
    if found is None:
        return Cell(_NONE)

    def signed(value: float) -> str:
        return f"+{write(value)}" if value > 0 else write(value)

    text = signed(found.mean)
    if found.count > 1:
        text += f" [{signed(found.low)}, {signed(found.high)}]"
    rounds_to_zero = write(0.0) in (write(abs(found.low)), write(abs(found.high)))
    if not found.excludes_zero or rounds_to_zero:
        return Cell(text)
    return Cell(text + _LOWER, "better") if found.high < 0 else Cell(text + _HIGHER, "worse")


def _search_seconds(each: Configuration) -> float:
    """What the line search took; NaN where the scale is fixed."""
    if each.first["scale"] != "auto":
        return math.nan
    return statistics.fmean(record["phases"]["scale"] for record in each.by_seed.values())


def _seeds(entry: AtBest) -> str:
    ran, survived = len(entry.configuration.losses(entry.rate)), len(entry.configuration.survivors(entry.rate))
    return str(ran) if ran == survived else f"{survived} of {ran}"


def _worst(entry: AtBest) -> str:
    return "diverged" if math.isinf(entry.worst.mean) else with_half(entry.worst)


def _steps(value: float) -> str:
    return "never" if math.isinf(value) else _three_digits(value)


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else _steps(value)


def with_half(found: Interval | None) -> str:
    """A mean loss with half its interval."""
    if found is None or math.isnan(found.mean):
        return _NONE
    return nats(found.mean) + (f" ± {nats(found.half)}" if found.count > 1 else "")


def nats(value: float) -> str:
    """A loss."""
    return f"{value:.4f}"


def _three_digits(value: float) -> str:
    return number(value, digits=3)


def _unknown_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
