"""What fine-tunes forget: the loss on the source's held-out rows beside what was learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_da_core.ablation.comparison import Configuration, Interval, interval, paired
from lora_da_core.ablation.downstream import AtBest
from lora_da_core.ablation.figures import Picture, legend_below, new_figure, png, ranks_of
from lora_da_core.ablation.labels import MARKER, Named, Point, place_labels
from lora_da_core.ablation.page import Cell, Column, Table
from lora_da_core.ablation.tables import gap_cell, nats, with_half
from lora_da_core.display import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Forgotten:
    """A configuration at its best learning rate, over the seeds that survived.

    Attributes:
        configuration: What was trained.
        rate: The rate.
        base: What it is compared to; None where there is nothing.
        learnt: Held-out loss at the last step.
        before: Source loss at the first evaluated step.
        after: Source loss at the last.
        learnt_gap: `learnt` minus the baseline's, paired by seed; None for the baseline itself.
        after_gap: `after` minus the baseline's, likewise.
    """

    configuration: Configuration
    rate: float
    base: Configuration | None
    learnt: Interval
    before: Interval
    after: Interval
    learnt_gap: Interval | None = None
    after_gap: Interval | None = None


def forgotten(entries: Sequence[AtBest]) -> list[Forgotten]:
    """What there is to say of the configurations whose loss on a source was taken.

    Args:
        entries: Configurations at their best rates.

    Returns:
        By rank, what forgets least first.
    """
    rates = {id(entry.configuration): entry.rate for entry in entries}
    found = []
    for entry in entries:
        each, base = entry.configuration, entry.base
        learnt, source = _ends(each, entry.rate)
        if not source:
            continue
        gaps: list[Interval | None] = [None, None]
        if base is not None and not entry.is_base and id(base) in rates:
            theirs = _ends(base, rates[id(base)])
            gaps = [paired(_last(ours), _last(other)) for ours, other in zip((learnt, source), theirs, strict=True)]
        ends = (_last(learnt), {seed: first for seed, (first, _) in source.items()}, _last(source))
        found.append(Forgotten(each, entry.rate, base, *(interval(list(values.values())) for values in ends), *gaps))
    return sorted(found, key=lambda one: (one.configuration.rank, one.after.mean))


Ends = Mapping[int, tuple[float, float]]
"""First and last loss by seed."""


def _ends(each: Configuration, rate: float) -> tuple[Ends, Ends]:
    alive = each.survivors(rate)
    sides = (alive, {seed: losses for seed, losses in each.losses(rate, "source_losses").items() if seed in alive})
    learnt, source = ({s: (losses[min(losses)], losses[max(losses)]) for s, losses in side.items()} for side in sides)
    return learnt, source


def _last(ends: Ends) -> dict[int, float]:
    return {seed: last for seed, (_, last) in ends.items()}


def forgetting_table(rows: Sequence[Forgotten], measured: str, base: str | None) -> Table:
    """Losses on what was learnt and on the source.

    Args:
        rows: In their order.
        measured: What the losses on the learnt data are.
        base: How what they are compared to is called, or None.

    Returns:
        One row each.
    """
    columns = [
        Column("configuration", kind="text"), Column("lr"), Column("seeds"), Column(measured),
        Column("first step", "source loss"), Column("last step", "source loss"),
    ]  # fmt: skip
    if base is not None:
        columns += [Column(measured, f"difference to {base}"), Column("source loss", f"difference to {base}")]

    def cells(row: Forgotten) -> tuple[Cell, ...]:
        first = (row.configuration.label, f"{row.rate:g}", str(row.after.count))
        found = [*map(Cell, first), *(Cell(with_half(part)) for part in (row.learnt, row.before, row.after))]
        if base is not None:
            found += [gap_cell(row.learnt_gap, nats), gap_cell(row.after_gap, nats)]
        return tuple(found)

    return Table(tuple(columns), tuple(map(cells, rows)))


def forgetting_pictures(rows: Sequence[Forgotten], measured: str) -> list[Picture]:
    """Source loss against what was learnt, one picture per rank; strengths of one regularizer are joined.

    Args:
        rows: In any order.
        measured: What the losses on the learnt data are.

    Returns:
        The pictures.
    """
    ranks = ranks_of([row.configuration for row in rows])
    return [_picture([row for row in rows if row.configuration.rank == rank], measured) for rank in ranks]


def _picture(rows: Sequence[Forgotten], measured: str) -> Picture:
    lines: dict[str, list[Forgotten]] = {}
    for row in rows:
        record = row.configuration.first
        kept = ("baseline", "estimator", "estimator_options", "preset", "solver")
        key = [value for name, value in record.items() if name in kept]
        kinds = [record.get(name) for name in ("regularizer", "source_fisher", "source_fisher_options", "trainer")]
        lines.setdefault(json.dumps([key, kinds]), []).append(row)
    names = [_line_name(line) for line in lines.values()]
    figure = new_figure(names)
    axes = figure.subplots()
    drawn: list[list[Point]] = []
    named: list[Named] = []
    for place, (name, line) in enumerate(zip(names, lines.values(), strict=True)):
        colour = f"C{place}"
        drawn += _draw(axes, line, name, colour)
        named += _names(line, colour)
    axes.margins(0.12)
    axes.set(xlabel=f"{measured}, learnt [nats per token]", ylabel="loss on the source [nats per token]")
    rank = rows[0].configuration.rank
    title = f"Learnt and forgotten, rank {rank}"
    axes.set_title(title)
    axes.grid(alpha=0.25, lw=0.5)
    legend_below(figure, axes)
    place_labels(axes, named, lines=drawn)
    return Picture(f"forgetting_r{rank}", title, png(figure))


def _varied(line: Sequence[Forgotten]) -> list[str]:
    """Options of the regularizer that differ along a line, where they tell its points apart."""
    options = [row.configuration.first.get("regularizer_options") or {} for row in line]
    varied = [key for key in options[0] if len({json.dumps(each.get(key)) for each in options}) > 1]
    alone = {json.dumps([each.get(key) for key in varied]) for each in options}
    return varied if len(alone) == len(line) else []


def _line_name(line: Sequence[Forgotten]) -> str:
    """The name that its points share: what differs is written at the points."""
    name, varied = line[0].configuration.name, _varied(line)
    for key in varied:
        name = name.replace(f"{key}={line[0].configuration.first['regularizer_options'][key]}", f"{key}=…")
    return name if varied or len(line) == 1 else f"{name} … ({len(line)})"


def _names(line: Sequence[Forgotten], colour: str) -> list[Named]:
    """What is written at each point: the options that differ along its line, or its name where none does."""
    varied, named = _varied(line), []
    for row in line:
        values = [row.configuration.first["regularizer_options"][key] for key in varied]
        text = ", ".join(number(value) if isinstance(value, float) else str(value) for value in values)
        named.append(Named(text or row.configuration.name, (row.learnt.mean, row.after.mean), colour))
    return named


def _draw(axes: Axes, line: Sequence[Forgotten], name: str, colour: str) -> list[list[Point]]:
    """Draws points that are joined, with their intervals; returns every line's corners."""
    ordered = sorted(line, key=lambda row: row.after.mean)
    across, up = ([getattr(row, side) for row in ordered] for side in ("learnt", "after"))
    x, y = ([part.mean for part in side] for side in (across, up))
    wide, high = ([0.0 if part.count < 2 else part.half for part in side] for side in (across, up))
    axes.errorbar(
        x, y, high, wide,
        fmt="o-", ms=MARKER, lw=1.1, elinewidth=0.8, capsize=2, color=colour, ecolor=(colour, 0.5), label=name,
    )  # fmt: skip
    bars = []
    for here, there, half, height in zip(x, y, wide, high, strict=True):
        bars += [[(here - half, there), (here + half, there)], [(here, there - height), (here, there + height)]]
    return [list(zip(x, y, strict=True)), *bars]
