"""The pictures of a grid: cost against fidelity, and loss curves."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from lora_da_core.ablation.comparison import (
    Configuration,
    best_final_losses,
    interval,
    learning_rates,
    pareto,
)
from lora_da_core.report import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CURVES: Final = 8
"""Configurations in the picture of loss curves: the best ones, and what they are compared to."""

WIDE_RANGE: Final = 10.0
"""From this ratio on, costs are drawn on a logarithmic axis."""

SMALL_ANGLE: Final = 1.0
"""Degrees; where the smallest angle is below it, angles are drawn on a logarithmic axis."""

COSTS: Final = (
    ("seconds", 1.0, "time of the initialisation [s]"),
    ("peak_bytes", 2.0**20, "peak memory of the initialisation [MiB]"),
)
_MARKERS: Final = "osD^v<>Ph*"
_COLOURS: Final = 10


def pareto_picture(found: Sequence[Configuration]) -> bytes | None:
    """Time and memory against the angle to the reference, one point per configuration.

    Args:
        found: Configurations.

    Returns:
        A PNG; None where nothing has an angle.
    """
    shown = [each for each in found if math.isfinite(each.mean("angle"))]
    if not shown:
        return None
    figure = _figure(12, 5.2 + 0.19 * ((len(shown) + 2) // 3))
    panels = figure.subplots(1, 2)
    for axes, (name, unit, title) in zip(panels, COSTS, strict=True):
        _draw_costs(axes, shown, name, unit)
        axes.set(xlabel=title, ylabel="angle to the reference, median over layers [°]")
    _legend_below(figure, panels[0])
    figure.suptitle("Cost against fidelity (means over seeds; dashed: not beaten in both)", fontsize=11)
    return _png(figure)


def loss_picture(found: Sequence[Configuration], baseline: str | None) -> bytes | None:
    """Held-out loss by step, one panel per learning rate, with 95 % bands over seeds.

    Args:
        found: Configurations.
        baseline: Name of what is compared to, which is always shown.

    Returns:
        A PNG; None where nothing was trained.
    """
    from matplotlib.ticker import MaxNLocator

    rates = learning_rates(found)
    if not rates:
        return None
    shown = _leading(found, baseline)
    columns = min(3, len(rates))
    rows = -(-len(rates) // columns)
    figure = _figure(max(6.0, 4.4 * columns), 3.6 * rows + 0.4 + 0.19 * ((len(shown) + 2) // 3))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, axes in enumerate(panels.flat):
        if place >= len(rates):
            axes.set_visible(False)
            continue
        for order, each in enumerate(shown):
            _draw_curve(axes, each, rates[place], f"C{order % _COLOURS}", dashed=_is(each, baseline))
        axes.set(title=f"learning rate {rates[place]:g}", xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.25, lw=0.5)
        if place % columns == 0:
            axes.set_ylabel("held-out loss [nats per token]")
    _legend_below(figure, panels.flat[0])
    left = f"; {len(shown)} of {len(found)} configurations" if len(shown) < len(found) else ""
    figure.suptitle(f"Held-out loss, mean and 95 % band over seeds{left}", fontsize=11)
    return _png(figure)


def _leading(found: Sequence[Configuration], baseline: str | None) -> list[Configuration]:
    trained = [each for each in found if best_final_losses(each)]
    ranked = sorted(trained, key=lambda each: interval(list(best_final_losses(each).values())).mean)
    base = [each for each in ranked if _is(each, baseline)][: MOST_CURVES // 2]
    others = [each for each in ranked if each not in base][: MOST_CURVES - len(base)]
    return base + others


def _is(each: Configuration, baseline: str | None) -> bool:
    return baseline is not None and baseline in (each.first["baseline"], each.first["estimator"])


def _draw_costs(axes: Axes, shown: Sequence[Configuration], name: str, unit: float) -> None:
    from matplotlib import colormaps

    kinds = _kinds(shown)
    names = list(dict.fromkeys(kinds))
    palette = colormaps["tab10" if len(shown) <= _COLOURS else "tab20"]
    colours = [palette(place) for place in range(palette.N)]
    points = []
    for place, each in enumerate(shown):
        point = (each.mean(name) / unit, math.degrees(each.mean("angle")))
        points.append(point)
        kind = names.index(kinds[place])
        axes.plot(
            *point,
            ls="",
            marker=_MARKERS[kind % len(_MARKERS)],
            color=colours[place % len(colours)],
            ms=7,
            alpha=0.85,
            mec="black" if each.first["baseline"] else "none",
            label=each.label,
        )
    front = [points[place] for place in pareto(points)]
    axes.plot(*zip(*front, strict=True), ls="--", lw=1, color="grey", zorder=0)
    costs = [cost for cost, _ in points]
    if 0 < WIDE_RANGE * min(costs) < max(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda cost, _: number(cost))
        axes.xaxis.set_minor_formatter(lambda cost, _: "")
    angles = [angle for _, angle in points]
    if 0 < min(angles) < SMALL_ANGLE:
        axes.set_yscale("log")
    else:
        axes.set_ylim(-3, 93)
        axes.set_yticks(range(0, 91, 15))
    axes.grid(alpha=0.25, lw=0.5)


def _kinds(shown: Sequence[Configuration]) -> list[str]:
    """What the marker tells: the estimator, or the solver where all have the same estimator."""
    estimators = {each.first["estimator"] for each in shown} - {None}
    name = "estimator" if len(estimators) > 1 else "solver"
    return [str(each.first["baseline"] or each.first[name]) for each in shown]


def _draw_curve(axes: Axes, each: Configuration, rate: float, colour: str, *, dashed: bool) -> None:
    by_seed = each.losses(rate)
    steps = sorted({step for losses in by_seed.values() for step in losses})
    bands = [
        interval([losses[step] for losses in by_seed.values() if math.isfinite(losses.get(step, math.nan))])
        for step in steps
    ]
    style = "--" if dashed else "-"
    axes.plot(steps, [band.mean for band in bands], style, color=colour, marker=".", ms=4, lw=1.4, label=each.label)
    if any(band.count > 1 for band in bands):
        lows, highs = [band.low for band in bands], [band.high for band in bands]
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, lw=0)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()
