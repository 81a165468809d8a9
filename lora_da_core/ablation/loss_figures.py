"""The pictures of fine-tunes: losses, differences to the baseline, learning rates, compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lora_da_core.ablation.comparison import Interval, final_losses, interval, learning_rates
from lora_da_core.ablation.downstream import AtBest
from lora_da_core.ablation.figures import Picture, legend_below, new_figure, png
from lora_da_core.display import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CURVES: Final = 6
"""Configurations in a picture beside what they are compared to: those with the lowest final loss."""

EARLY: Final = 0.1
"""Share of the compute after which losses are shown in full; those before may leave the frame."""

SETTLED: Final = 1 / 3
"""Share of the steps after which differences are shown in full; those before may leave the frame."""

_Draw = Callable[["Axes", Sequence["Line"], str], None]

_SPREAD: Final = 0.02
"""Relative distance between neighbours that are drawn at one learning rate."""


@dataclass(frozen=True)
class Line:
    """A configuration in a picture."""

    entry: AtBest
    colour: str
    style: str


def leading(entries: Sequence[AtBest]) -> list[AtBest]:
    """What is drawn of one rank: what the others are compared to, and the best of the rest.

    Args:
        entries: Of one rank, the best first.

    Returns:
        At most `MOST_CURVES` and what they are compared to.
    """
    return [entry for entry in entries if entry.is_base] + [entry for entry in entries if not entry.is_base][
        :MOST_CURVES
    ]


def loss_pictures(entries: Sequence[AtBest], measured: str) -> list[Picture]:
    """The pictures of one rank.

    Args:
        entries: Its configurations, the best first; at least one.
        measured: What the losses are, `held-out loss [nats per label token]` for instance.

    Returns:
        Losses and differences by step, final losses by learning rate, losses by compute; what would be empty is
        left out.
    """
    shown = leading(entries)
    colours = {id(entry): f"C{place}" for place, entry in enumerate(entry for entry in shown if not entry.is_base)}
    lines = [Line(entry, colours.get(id(entry), "0.25"), "--" if entry.is_base else "-") for entry in shown]
    compared = [line for line in lines if line.entry.differences]
    plots: list[tuple[str, str, Sequence[Line], _Draw]] = [("losses", "Each at its best rate", lines, _losses)]
    if compared:
        bases = {line.entry.base.name for line in compared if line.entry.base is not None}
        title = f"Difference to {bases.pop() if len(bases) == 1 else 'its counterpart'}"
        plots.append(("differences", title, compared, _differences))
    if len(learning_rates([entry.configuration for entry in shown])) > 1:
        plots.append(("rates", "Learning rates", lines, _rates))
    costed = [line for line in lines if math.isfinite(line.entry.start_cost)]
    if any(line.entry.start_cost > 0 for line in costed):
        plots.append(("compute", "Loss against compute", costed, _compute))
    rank = shown[0].configuration.rank
    return [
        _picture(f"{stem}_r{rank}", f"{title}, rank {rank}", some, draw, measured) for stem, title, some, draw in plots
    ]


def _picture(name: str, title: str, lines: Sequence[Line], draw: _Draw, measured: str) -> Picture:
    figure = new_figure([_name(line) for line in lines])
    axes = figure.subplots()
    draw(axes, lines, measured)
    axes.set_title(title)
    axes.grid(alpha=0.25, lw=0.5)
    legend_below(figure, axes)
    return Picture(name, title, png(figure))


def _name(line: Line) -> str:
    return f"{line.entry.configuration.name} (lr {line.entry.rate:g})"


def _losses(axes: Axes, lines: Sequence[Line], measured: str) -> None:
    for line in lines:
        _band(axes, line, line.entry.losses)
    _whole_steps(axes)
    axes.set(xlabel="step", ylabel=f"{measured}")


def _compute(axes: Axes, lines: Sequence[Line], measured: str) -> None:
    bands = []
    for line in lines:
        _band(axes, line, line.entry.losses, line.entry.start_cost)
        bands += [(step + line.entry.start_cost, band) for step, band in line.entry.losses.items()]
    last = max(place for place, _ in bands)
    _frame(axes, [(place, band) for place, band in bands if place >= EARLY * last])
    axes.set(xlabel="compute [steps, the initialisation's included]", ylabel=f"{measured}")


def _frame(axes: Axes, bands: Sequence[tuple[float, Interval]], *more: float) -> None:
    """The range of what comes late enough, with some room."""
    ends = [bound for _, band in bands for bound in (band.low, band.mean, band.high) if math.isfinite(bound)]
    low, high = min([*ends, *more]), max([*ends, *more])
    room = 0.08 * (high - low) or 1e-6
    axes.set_ylim(low - room, high + room)


def _differences(axes: Axes, lines: Sequence[Line], measured: str) -> None:
    axes.axhline(0, color="0.25", ls="--", lw=1.2)
    for line in lines:
        _band(axes, line, line.entry.differences)
    _whole_steps(axes)
    bands = [band for line in lines for band in line.entry.differences.items()]
    last = max(step for step, _ in bands)
    _frame(axes, [(step, band) for step, band in bands if step >= SETTLED * last], 0.0)
    axes.set(xlabel="step", ylabel=f"difference of {measured}")


def _rates(axes: Axes, lines: Sequence[Line], measured: str) -> None:
    middle = (len(lines) - 1) / 2
    for place, line in enumerate(lines):
        each = line.entry.configuration
        bands = {rate: interval(list(final_losses(each, rate).values())) for rate in learning_rates([each])}
        shown = {rate: band for rate, band in bands.items() if band.count}
        spread = 1 + _SPREAD * (place - middle)
        halves = [0.0 if math.isnan(band.half) else band.half for band in shown.values()]
        axes.errorbar(
            [rate * spread for rate in shown], [band.mean for band in shown.values()], halves,
            fmt=f"o{line.style}", ms=3.5, lw=1.2, elinewidth=0.9, capsize=2, color=line.colour, label=each.name,
        )  # fmt: skip
    rates = learning_rates([line.entry.configuration for line in lines])
    axes.set_xscale("log")
    axes.set_xticks(rates, [number(rate) for rate in rates])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="learning rate", ylabel=f"final {measured}")


def _band(axes: Axes, line: Line, bands: Mapping[int, Interval], shift: float = 0.0) -> None:
    places = [step + shift for step in bands]
    means = [band.mean for band in bands.values()]
    axes.plot(places, means, line.style, color=line.colour, marker=".", ms=4, lw=1.4, label=_name(line))
    if any(band.count > 1 for band in bands.values()):
        lows, highs = [band.low for band in bands.values()], [band.high for band in bands.values()]
        axes.fill_between(places, lows, highs, color=line.colour, alpha=0.1, lw=0)


def _whole_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
