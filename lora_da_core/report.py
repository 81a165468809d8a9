"""How a run is shown: tables for the terminal and a picture of the spectra."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from lora_da_core.errors import StorageError
from lora_da_core.types import LayerReport, RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE: Final = 130
"""Columns that a wide table needs."""
NARROW_NAME: Final = 16
"""Widest module name in a table for 80 columns."""
WIDE_RITZ: Final = 4
"""How many Ritz values a wide table shows, the last of the layer among them."""
MAX_PANELS: Final = 8
"""Kinds of modules that get a panel of their own in the picture; the rest share the last one."""

_FAILED: Final = "bold red"


# Tables


def layer_table(report: RunReport, *, wide: bool = False) -> Table:
    """One row per layer: shape, rank, σ, Ritz values, gap, residual, converged, damping used, seconds.

    Args:
        report: The report.
        wide: Show full names and more Ritz values (130 columns or more) instead of fitting 80 columns.
    """
    layers = report.layers
    names = [layer.name for layer in layers] if wide else abbreviate([layer.name for layer in layers], NARROW_NAME)
    keys = tuple(dict.fromkeys(key for layer in layers for key in layer.damping))
    ritz = [f"λ{place + 1}" for place in range(WIDE_RITZ - 1)] if wide else ["λ1"]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", caption_justify="left")
    table.add_column("layer", no_wrap=wide, overflow="fold")
    for header in ("in×out", "r", "σ", *ritz, "λr", "gap", "resid"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("ok", no_wrap=True)
    table.add_column("damping" + ("\n" + "/".join(keys) if keys else ""), justify="right", no_wrap=wide)
    table.add_column("s", justify="right", no_wrap=True)
    for name, layer in zip(names, layers, strict=True):
        values = list(layer.ritz_values[: len(ritz)]) + [math.nan] * (len(ritz) - len(layer.ritz_values))
        table.add_row(
            Text(name),
            f"{layer.in_features}×{layer.out_features}",
            str(layer.rank),
            number(layer.sigma),
            *(number(value) for value in values),
            number(layer.ritz_values[-1] if layer.ritz_values else math.nan),
            number(layer.gap),
            number(layer.residual, digits=1),
            "✓" if layer.converged else "✗",
            "/".join(number(layer.damping.get(key, math.nan), digits=1) for key in keys),
            number(layer.seconds),
            style="" if layer.converged else _FAILED,
        )
    table.caption = _legend(report, names)
    return table


def plugin_table(records: Sequence[Mapping[str, str]]) -> Table:
    """One row per component or broken plugin, as `list_plugins` gives them."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for header in ("kind", "name", "distribution"):
        table.add_column(header, no_wrap=header != "distribution", overflow="fold")
    table.add_column("status", overflow="fold")
    for record in records:
        status = f"{record['status']}: {record['reason']}" if record["reason"] else record["status"]
        cells = (record["kind"], record["name"], f"{record['distribution']} {record['version']}".strip(), status)
        table.add_row(*(Text(cell) for cell in cells), style="" if record["status"] == "ok" else _FAILED)
    return table


def group_table(report: RunReport) -> Table:
    """One row per kind of module (the last part of its name): how its layers fared, for models of many layers."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("module", overflow="fold")
    for header in ("layers", "in×out", "r", "σ med", "λ1 med", "gap min", "resid max", "conv", "s"):
        table.add_column(header, justify="right", no_wrap=True)
    for kind, layers in _by_kind(report.layers).items():
        converged = sum(layer.converged for layer in layers)
        table.add_row(
            Text(kind),
            str(len(layers)),
            _same([f"{layer.in_features}×{layer.out_features}" for layer in layers]),
            _same([str(layer.rank) for layer in layers]),
            number(_median([layer.sigma for layer in layers])),
            number(_median([layer.ritz_values[0] for layer in layers if layer.ritz_values])),
            number(min(_finite([layer.gap for layer in layers]), default=math.nan)),
            number(max(_finite([layer.residual for layer in layers]), default=math.nan), digits=1),
            f"{converged}/{len(layers)}",
            number(sum(layer.seconds for layer in layers)),
            style="" if converged == len(layers) else _FAILED,
        )
    return table


def totals(report: RunReport) -> Table:
    """What the whole run did: components, data, convergence, scale, time."""
    layers = report.layers
    parameters = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)
    missed = [layer.name for layer in layers if not layer.converged]
    mended = [layer for layer in layers if layer.remedies]
    solvers = ", ".join(dict.fromkeys(layer.solver for layer in layers))
    worst = max(_finite([layer.residual for layer in layers]), default=math.nan)
    rows: dict[str, str] = {
        "components": ", ".join(f"{kind} {name}" for kind, name in report.components.items()),
        "layers": f"{len(layers)}, {parameters:,} adapter parameters",
        "data": f"{report.samples:,} samples, {report.label_tokens:,} labels, "
        f"mean loss {number(report.loss, digits=4)}",
        "solved by": f"{solvers or 'nothing'}; {len(layers) - len(missed)} of {len(layers)} converged, "
        f"largest relative residual {number(worst)}",
        "scale": ", ".join(f"{key} {_brief(value)}" for key, value in report.scale.items()) or "unscaled",
        "seconds": ", ".join(f"{phase} {number(value, digits=3)}" for phase, value in report.seconds.items())
        + f"; {number(sum(report.seconds.values()), digits=3)} in all",
    }
    if report.allocation and layers:
        ranks, shared = sorted(layer.rank for layer in layers), report.allocation
        rows["ranks"] = (
            f"{ranks[0]} to {ranks[-1]}, {shared['spent']:,} of {shared['budget']:,} {shared['unit']}s; gain "
            f"{number(shared['gain'])} against {number(shared['configured_gain'])} as configured"
        )
    if missed:
        rows["not converged"] = _some(missed)
    if mended:
        kinds = dict.fromkeys(remedy for layer in mended for remedy in layer.remedies)
        rows["remedies"] = f"in {len(mended)} layers: {_some(list(kinds))}"
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, Text(value, style=_FAILED if key == "not converged" else ""))
    return table


def number(value: float, *, digits: int = 2) -> str:
    """A number in few characters.

    >>> number(0.000312), number(-1.0), number(12345.6), number(float("nan")), number(0.0)
    ('3.1e-4', '-1', '1.2e4', '–', '0')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.{digits - 1}e}"
    if "e" not in text:
        return text
    # Written out where that is no longer: 1.2e+02 is 120.
    if 1e-3 <= abs(value) < 1e4:
        return f"{float(text):.0f}"
    mantissa, exponent = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def abbreviate(names: Sequence[str], width: int) -> list[str]:
    """Module names in at most `width` characters where that keeps them apart.

    Parts that all names share in front are dropped, then parts in the middle; names that would become the
    same are kept in full.

    >>> abbreviate(["model.layers.3.self_attn.q_proj", "model.layers.12.mlp.up_proj"], 16)
    ['3.…q_proj', '12.mlp.up_proj']
    """
    shared = _shared_prefix(names)
    short = [_squeeze(name.removeprefix(shared), width) for name in names]
    return [
        text if short.count(text) == 1 else name.removeprefix(shared) for text, name in zip(short, names, strict=True)
    ]


def _squeeze(name: str, width: int) -> str:
    parts = name.split(".")
    if len(name) <= width or len(parts) < 3:
        return name
    head = parts[0]
    for part in parts[1:-2]:
        if len(f"{head}.{part}.…{parts[-1]}") > width:
            break
        head = f"{head}.{part}"
    return f"{head}.…{parts[-1]}"


def _shared_prefix(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) + "." if shared else ""


def _legend(report: RunReport, names: Sequence[str]) -> str:
    shared = _shared_prefix([layer.name for layer in report.layers])
    prefix = f"layers are under {shared[:-1]}; " if shared and names and not names[0].startswith(shared) else ""
    return (
        f"{prefix}σ = ‖Δ_raw‖₂; λ1…λr: smallest eigenvalues of Ω; gap = λ(r+1) − λr; "
        "resid = largest ‖Ωu − λu‖/‖Ω‖; s: seconds of the solve; – unknown"
    )


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return number(value, digits=3)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_brief(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_brief(entry) for entry in value) + "]" if len(value) <= 3 else f"{len(value)} times"
    return str(value)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _same(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else "varies"


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _median(values: Sequence[float]) -> float:
    return statistics.median(finite) if (finite := _finite(values)) else math.nan


# Picture


def plot_spectra(report: RunReport, path: Path | str) -> None:
    """Save a PNG: |Ritz values| by kind of module and depth, and each layer's residual.

    Args:
        report: The report.
        path: Where to write; the folder must exist.

    Raises:
        StorageError: If the report has no layer, or the file cannot be written.
    """
    if not report.layers:
        raise StorageError("the report holds no layer, so there is no spectrum to draw.")
    figure = _spectra_figure(report)
    try:
        if Path(path).is_symlink():  # it may lead out of a directory that came from elsewhere
            Path(path).unlink()
        figure.savefig(path, format="png", dpi=130, metadata={"Software": None})
    except OSError as error:
        raise StorageError(f"cannot write the picture {path}: {error.strerror or error}.") from error


def _spectra_figure(report: RunReport) -> Figure:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    groups = _panels(report.layers)
    depths = {layer.name: _depth(layer.name, place) for place, layer in enumerate(report.layers)}
    shades = ScalarMappable(Normalize(min(depths.values()), max(depths.values())), "viridis")
    colours = dict(zip(depths, shades.to_rgba(np.array(list(depths.values()))), strict=True))
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(max(3.2 * columns, 7), 2.6 * rows + 3.2), layout="constrained")
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
    from matplotlib.ticker import MaxNLocator

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
    from matplotlib.ticker import MaxNLocator

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


def _by_kind(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kind = next((part for part in reversed(layer.name.split(".")) if not part.isdigit()), layer.name)
        groups.setdefault(kind, []).append(layer)
    return groups


def _panels(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    groups = list(_by_kind(layers).items())
    if len(groups) <= MAX_PANELS:
        return dict(groups)
    rest = [layer for _, group in groups[MAX_PANELS - 1 :] for layer in group]
    return {**dict(groups[: MAX_PANELS - 1]), "others": rest}


def _depth(name: str, place: int) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), place)
