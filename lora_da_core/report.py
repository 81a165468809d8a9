"""How a run is shown on a terminal, and its picture as a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.table import Table
from rich.text import Text

from lora_da_core.display import abbreviate, number, shared_prefix
from lora_da_core.errors import StorageError
from lora_da_core.summaries import KIND_HEADER, kind_rows, missed_layers, summary
from lora_da_core.types import RunReport

WIDE: Final = 130
"""Columns that a wide table needs."""
NARROW_NAME: Final = 16
"""Widest module name in a table for 80 columns."""
WIDE_RITZ: Final = 4
"""How many Ritz values a wide table shows, the last of the layer among them."""

_FAILED: Final = "bold red"


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
    table.add_column(KIND_HEADER[0], overflow="fold")
    for header in KIND_HEADER[1:]:
        table.add_column(header, justify="right", no_wrap=True)
    for row in kind_rows(report.layers):
        kind, *cells = row.cells
        table.add_row(Text(kind), *cells, style="" if row.converged else _FAILED)
    return table


def totals(report: RunReport) -> Table:
    """What the whole run did: components, data, convergence, scale, time."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    missed = missed_layers(report)
    for key, value in summary(report).items():
        table.add_row(key, Text(value, style=_FAILED if missed and key == "not converged" else ""))
    return table


def _legend(report: RunReport, names: Sequence[str]) -> str:
    shared = shared_prefix([layer.name for layer in report.layers])
    prefix = f"layers are under {shared[:-1]}; " if shared and names and not names[0].startswith(shared) else ""
    return (
        f"{prefix}σ = ‖Δ_raw‖₂; λ1…λr: smallest eigenvalues of Ω; gap = λ(r+1) − λr; "
        "resid = largest ‖Ωu − λu‖/‖Ω‖; s: seconds of the solve; – unknown"
    )


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
    from lora_da_core.spectra import DPI, spectra_figure

    figure = spectra_figure(report)
    try:
        # A link may lead out of a directory that came from elsewhere.
        if Path(path).is_symlink() and not Path(path).is_dir():
            Path(path).unlink()
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    except OSError as error:
        raise StorageError(f"cannot write the picture {path}: {error.strerror or error}.") from error
