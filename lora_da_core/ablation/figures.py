"""What every picture of a report shares, and the pictures of cost against fidelity."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from lora_da_core.ablation.comparison import Configuration, pareto
from lora_da_core.ablation.labels import MARKER, Named, place_labels
from lora_da_core.display import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MOST_RANKS: Final = 4
"""Ranks that get pictures of their own, the smallest ones; tables hold all."""

MOST_NAMES: Final = 12
"""Points of a picture that are all named; where there are more, only those that no other beats are."""

WIDE_RANGE: Final = 10.0
"""From this ratio on, costs are drawn on a logarithmic axis."""

SMALL_ANGLE: Final = 5.0
"""Degrees; where half of the angles are below it, angles are drawn on a logarithmic axis."""

COSTS: Final = (
    ("time", "seconds", 1.0, "time of the initialisation [s]"),
    ("memory", "peak_bytes", 2.0**20, "peak memory of the initialisation [MiB]"),
)

_SIZE: Final = (5.6, 4.0)
_LEGEND_ROW: Final = 0.19
_LEGEND_WIDTH: Final = 78
"""Characters that a row of a legend holds."""
_DPI: Final = 170
_MARKERS: Final = "osD^v<>Ph*X"


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes:
        name: Of its file, without the ending.
        title: What it shows, for those who do not see it.
        png: The file.
    """

    name: str
    title: str
    png: bytes


def ranks_of(found: Sequence[Configuration]) -> list[int]:
    """The ranks that are drawn."""
    return sorted({each.rank for each in found})[:MOST_RANKS]


def with_angle(found: Sequence[Configuration]) -> list[Configuration]:
    """Configurations whose fidelity is known."""
    return [each for each in found if math.isfinite(each.mean("angle"))]


def front_of(found: Sequence[Configuration], cost: str) -> list[Configuration]:
    """Configurations that no other of their rank beats in both a cost and the angle.

    Args:
        found: Configurations.
        cost: Name of a record's field.

    Returns:
        Rank by rank, the cheapest first.
    """
    front = []
    for rank in sorted({each.rank for each in found}):
        alike = [each for each in with_angle(found) if each.rank == rank and math.isfinite(each.mean(cost))]
        front += [alike[place] for place in pareto([(each.mean(cost), each.mean("angle")) for each in alike])]
    return front


def cost_pictures(found: Sequence[Configuration]) -> list[Picture]:
    """Time and memory against the angle to the reference, one point per configuration, for each rank.

    Args:
        found: Configurations.

    Returns:
        Two pictures per rank; none where nothing has an angle.
    """
    shown = with_angle(found)
    return [
        _cost_picture([each for each in shown if each.rank == rank], cost) for rank in ranks_of(shown) for cost in COSTS
    ]


def _cost_picture(shown: Sequence[Configuration], cost: tuple[str, str, float, str]) -> Picture:
    what, name, unit, title = cost
    kinds = list(dict.fromkeys(each.kind for each in shown))
    front = front_of(shown, name)
    named = [*front, *(each for each in shown if each not in front)] if len(shown) <= MOST_NAMES else front
    points = {id(each): (each.mean(name) / unit, math.degrees(each.mean("angle"))) for each in shown}
    figure = new_figure(kinds)
    axes = figure.subplots()
    for place, kind in enumerate(kinds):
        alike = [points[id(each)] for each in shown if each.kind == kind]
        hollow = any(each.first["baseline"] for each in shown if each.kind == kind)
        axes.plot(
            *zip(*alike, strict=True),
            ls="",
            marker=_MARKERS[place % len(_MARKERS)],
            color=f"C{place}",
            mfc="none" if hollow else None,
            ms=MARKER,
            mew=1.4 if hollow else 0.0,
            alpha=0.9,
            label=kind,
        )
    corners = _steps([points[id(each)] for each in front])
    axes.plot(*zip(*corners, strict=True), ls="--", lw=1, color="0.55", zorder=0)
    axes.margins(0.1)
    cost_axis(axes.xaxis, [point[0] for point in points.values()])
    _angle_axis(axes, [point[1] for point in points.values()])
    axes.set(
        xlabel=title,
        ylabel="angle to the reference [°]",
        title=f"{what.capitalize()} and fidelity, rank {shown[0].rank}",
    )
    axes.grid(alpha=0.25, lw=0.5)
    legend_below(figure, axes)
    others = [points[id(each)] for each in shown if each not in named]
    place_labels(axes, [Named(each.name, points[id(each)]) for each in named], others, [corners])
    return Picture(
        f"cost_{what}_r{shown[0].rank}", f"{what} against the angle to the reference, rank {shown[0].rank}", png(figure)
    )


def _steps(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The line below which nothing is: from each point at its angle to the next one's cost, then down."""
    corners = list(front[:1])
    for (_, angle), point in pairwise(front):
        corners += [(point[0], angle), point]
    return corners


def cost_axis(axis: Axis, values: Sequence[float]) -> None:
    """A logarithmic axis where the values' range is wide; zeros keep a place of their own at its low end.

    Args:
        axis: The axis.
        values: What is drawn along it, none negative.
    """
    positive = [value for value in values if value > 0]
    if not positive or max(positive) < WIDE_RANGE * min(positive):
        return
    _logarithmic(axis, min(positive), zeros=len(positive) < len(values))


def _angle_axis(axes: Axes, angles: Sequence[float]) -> None:
    positive = sorted(angle for angle in angles if angle > 0)
    if positive and positive[len(positive) // 2] < SMALL_ANGLE:
        _logarithmic(axes.yaxis, positive[0], zeros=len(positive) < len(angles))
        return
    axes.set_ylim(-5, 95)
    axes.set_yticks(range(0, 91, 15))


def _logarithmic(axis: Axis, smallest: float, *, zeros: bool) -> None:
    from matplotlib.ticker import NullFormatter

    decade = 10.0 ** math.floor(math.log10(smallest))
    options = {"linthresh": decade, "linscale": 0.5} if zeros else {}
    set_scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    set_scale("symlog" if zeros else "log", **options)
    axis.set_major_formatter(lambda value, _: number(value))
    axis.set_minor_formatter(NullFormatter())


# Figures


def new_figure(names: Sequence[str]) -> Figure:
    """A figure of the report's size, with room for a legend of these names below it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = _SIZE
    lines = [len(wrapped(name).split("\n")) for name in names]
    rows = -(-sum(lines) // _columns(names)) if names else 0
    figure = Figure(figsize=(width, height + _LEGEND_ROW * rows), layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend, in as many columns as its names allow."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        [wrapped(name) for name in names],
        loc="outside lower center",
        ncols=_columns(names),
        fontsize=8,
        frameon=False,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def wrapped(name: str) -> str:
    """A name in lines that fit into a legend."""
    return "\n".join(textwrap.wrap(name, _LEGEND_WIDTH, break_on_hyphens=False))


def _columns(names: Sequence[str]) -> int:
    longest = max(len(name) for name in names) + 6
    return max(1, min(len(names), 4, _LEGEND_WIDTH // longest))


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()
