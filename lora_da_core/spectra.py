"""The picture of a run's spectra. Importing it imports matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_da_core.summaries import by_kind

if TYPE_CHECKING:
    from lora_da_core.types import LayerReport, RunReport

MAX_PANELS: Final = 8
"""Kinds of modules that get a panel of their own in the picture; the rest share the last one."""
DPI: Final = 130


class SpectraFigure(Figure):
    """A figure that a notebook shows without any setting."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def spectra_figure(report: RunReport) -> SpectraFigure:
    """|Ritz values| by kind of module and depth, and each layer's residual.

    Args:
        report: The report; it holds at least one layer.

    Returns:
        The figure, which belongs to no window.
    """
    groups = _panels(report.layers)
    depths = {layer.name: _depth(layer.name, place) for place, layer in enumerate(report.layers)}
    shades = ScalarMappable(Normalize(min(depths.values()), max(depths.values())), "viridis")
    colours = dict(zip(depths, shades.to_rgba(np.array(list(depths.values()))), strict=True))
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = SpectraFigure(figsize=(max(3.2 * columns, 7), 2.6 * rows + 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.0] * rows + [1.1])
    first: Axes | None = None
    panels = []
    for place, (kind, layers) in enumerate(groups.items()):
        axes = figure.add_subplot(grid[place // columns, place % columns], sharey=first)
        first = first or axes
        panels.append(axes)
        _draw_spectra(axes, kind, layers, colours)
        if place % columns == 0:
            axes.set_ylabel("|Ritz value of Ω|")
        else:
            axes.tick_params(labelleft=False)
    if len(set(depths.values())) > 1:
        figure.colorbar(shades, ax=panels, label="depth (block)", pad=0.01, aspect=30)
    _draw_residuals(figure.add_subplot(grid[rows, :]), groups, depths)
    figure.suptitle(f"LoRA-DA: {len(report.layers)} layers, {', '.join(report.components.values())}", fontsize=11)
    return figure


def _draw_spectra(axes: Axes, kind: str, layers: Sequence[LayerReport], colours: Mapping[str, Any]) -> None:
    any_positive = False
    for layer in layers:
        index = list(range(1, len(layer.ritz_values) + 1))
        size = [abs(value) if value != 0 and math.isfinite(value) else math.nan for value in layer.ritz_values]
        axes.plot(index, size, color=colours[layer.name], lw=1, marker=".", ms=3, alpha=0.85)
        positive = [(i, s) for i, s, value in zip(index, size, layer.ritz_values, strict=True) if value > 0]
        if positive:
            any_positive = True
            axes.plot(*zip(*positive, strict=True), ls="", marker="o", ms=5, mfc="none", mec="crimson", mew=0.8)
    if any_positive:
        axes.plot([], [], ls="", marker="o", ms=5, mfc="none", mec="crimson", label="λ > 0")
        axes.legend(fontsize=7, loc="best")
    _log_scale(axes, [value for layer in layers for value in layer.ritz_values])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_title(f"{kind} ({len(layers)})", fontsize=9)
    axes.set_xlabel("index", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.5)


def _draw_residuals(axes: Axes, groups: Mapping[str, Sequence[LayerReport]], depths: Mapping[str, int]) -> None:
    markers = "osD^v<>P"
    every = [layer for layers in groups.values() for layer in layers]
    for place, (kind, layers) in enumerate(groups.items()):
        known = [layer for layer in layers if math.isfinite(layer.residual) and layer.residual > 0]
        axes.plot(
            [depths[layer.name] + 0.08 * (place - (len(groups) - 1) / 2) for layer in known],
            [layer.residual for layer in known],
            ls="",
            marker=markers[place % len(markers)],
            ms=4,
            color=f"C{place}",
            label=kind,
        )
    for layer in every:
        if not layer.converged:
            where = layer.residual if math.isfinite(layer.residual) and layer.residual > 0 else 1.0
            axes.plot(depths[layer.name], where, ls="", marker="x", ms=9, mew=1.5, color="red", zorder=3)
    if any(not layer.converged for layer in every):
        axes.plot([], [], ls="", marker="x", ms=9, mew=1.5, color="red", label="not converged")
    _log_scale(axes, [layer.residual for layer in every])
    axes.set_xlabel("depth (block)")
    axes.set_ylabel("residual, ‖Ωu − λu‖/‖Ω‖")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=MAX_PANELS + 1, frameon=False)
    axes.set_xlim(min(depths.values()) - 0.6, max(depths.values()) + 0.6)
    axes.grid(alpha=0.25, lw=0.5)


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    # A log axis without any positive value has no limits.
    if any(math.isfinite(value) and value != 0 for value in values):
        axes.set_yscale("log")


def _panels(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    groups = list(by_kind(layers).items())
    if len(groups) <= MAX_PANELS:
        return dict(groups)
    rest = [layer for _, group in groups[MAX_PANELS - 1 :] for layer in group]
    return {**dict(groups[: MAX_PANELS - 1]), "others": rest}


def _depth(name: str, place: int) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), place)
