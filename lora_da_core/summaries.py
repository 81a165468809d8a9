"""What a run's report says in a few rows, for whatever shows them: a terminal, a notebook, a printed line."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lora_da_core.display import brief, html_table, number, same, some

if TYPE_CHECKING:
    from lora_da_core.types import LayerReport, RunReport

KIND_HEADER: Final = ("module", "layers", "in×out", "r", "σ med", "λ1 med", "gap min", "resid max", "conv", "s")
"""Names of the columns of `kind_rows`."""


@dataclass(frozen=True)
class KindRow:
    """How the layers of one kind fared.

    Attributes:
        cells: As `KIND_HEADER` names them.
        converged: Whether all of them converged.
    """

    cells: tuple[str, ...]
    converged: bool


def by_kind(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    """Layers by the last part of their name that is no number."""
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kind = next((part for part in reversed(layer.name.split(".")) if not part.isdigit()), layer.name)
        groups.setdefault(kind, []).append(layer)
    return groups


def kind_rows(layers: Sequence[LayerReport]) -> list[KindRow]:
    """One row per kind of module, in the order in which they come."""
    rows = []
    for kind, found in by_kind(layers).items():
        converged = sum(layer.converged for layer in found)
        cells = (
            kind,
            str(len(found)),
            same([f"{layer.in_features}×{layer.out_features}" for layer in found]),
            same([str(layer.rank) for layer in found]),
            number(_median([layer.sigma for layer in found])),
            number(_median([layer.ritz_values[0] for layer in found if layer.ritz_values])),
            number(min(_finite([layer.gap for layer in found]), default=math.nan)),
            number(max(_finite([layer.residual for layer in found]), default=math.nan), digits=1),
            f"{converged}/{len(found)}",
            number(sum(layer.seconds for layer in found)),
        )
        rows.append(KindRow(cells, converged == len(found)))
    return rows


def missed_layers(report: RunReport) -> list[str]:
    """Names of the layers whose solver missed its tolerance."""
    return [layer.name for layer in report.layers if not layer.converged]


def parameters(layers: Sequence[LayerReport]) -> int:
    """Numbers in the factors of these layers."""
    return sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)


def summary(report: RunReport) -> dict[str, str]:
    """What the whole run did: components, data, convergence, scale, time; and what went wrong, if anything did."""
    layers = report.layers
    missed = missed_layers(report)
    mended = [layer for layer in layers if layer.remedies]
    solvers = ", ".join(dict.fromkeys(layer.solver for layer in layers))
    worst = max(_finite([layer.residual for layer in layers]), default=math.nan)
    rows: dict[str, str] = {
        "components": ", ".join(f"{kind} {name}" for kind, name in report.components.items()),
        "layers": f"{len(layers)}, {parameters(layers):,} adapter parameters",
        "data": f"{report.samples:,} samples, {report.label_tokens:,} labels, "
        f"mean loss {number(report.loss, digits=4)}",
        "solved by": f"{solvers or 'nothing'}; {len(layers) - len(missed)} of {len(layers)} converged, "
        f"largest relative residual {number(worst)}",
        "scale": _scaling(report.scale),
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
        rows["not converged"] = some(missed)
    if mended:
        kinds = dict.fromkeys(remedy for layer in mended for remedy in layer.remedies)
        rows["remedies"] = f"in {len(mended)} layers: {some(list(kinds))}"
    return rows


def _scaling(scale: Mapping[str, Any]) -> str:
    """How the step was scaled, and what became of the loss where a search did that."""
    said = [_scaled(key, value) for key, value in scale.items()]
    match scale:
        case {"base_loss": float(base), "multiplier": float(multiplier), "tried": [*tried]}:
            pairs = [each for each in tried if isinstance(each, (list, tuple)) and len(each) == 2]
            losses = [loss for at, loss in pairs if at == multiplier and isinstance(loss, float)]
            end = f"to {number(losses[0], digits=4)}" if losses else "which no step surely lowers"
            said[[*scale].index("base_loss")] = f"loss {number(base, digits=4)} {end}"
    return ", ".join(said) or "unscaled"


def _scaled(key: str, value: Any) -> str:
    """A word on the scaling: of a line search how often it tried, as its losses are many."""
    shown = f"{len(value)} times" if key == "tried" and isinstance(value, (list, tuple)) else brief(value)
    return f"{key.replace('_', ' ')} {shown}"


def in_brief(report: RunReport) -> str:
    """The run in half a line."""
    layers = report.layers
    missed = len(missed_layers(report))
    ranks = same([str(layer.rank) for layer in layers]) if layers else "none"
    failed = f", {missed} not converged" if missed else ""
    counts = f"{len(layers)} layers, rank {ranks}, {parameters(layers):,} parameters"
    return f"{counts}, from {report.samples:,} samples{failed}"


def as_html(report: RunReport) -> str:
    """Summary, kinds of layers and notes as tables for a notebook."""
    rows = [*summary(report).items(), *(("note", sentence) for sentence in report.notes)]
    return html_table(rows) + html_table([row.cells for row in kind_rows(report.layers)], KIND_HEADER)


def records(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """One flat mapping per layer, beside its name: `ritz_1`, … and `damping_<factor>` in place of nested values."""
    nested = ("name", "ritz_values", "damping", "gradient")
    found = []
    for layer in layers:
        row = {key: value for key, value in vars(layer).items() if key not in nested}
        row["remedies"] = ", ".join(layer.remedies)
        row |= {f"ritz_{place}": value for place, value in enumerate(layer.ritz_values, 1)}
        row |= {f"damping_{factor}": value for factor, value in layer.damping.items()}
        row |= {f"gradient_{name}": value for name, value in layer.gradient.items()}
        found.append(row)
    return found


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _median(values: Sequence[float]) -> float:
    return statistics.median(finite) if (finite := _finite(values)) else math.nan
