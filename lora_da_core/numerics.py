"""How exact a saved adapter's A is, layer by layer: recomputed in float64 on the CPU from the run's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da_core.blame import blamed
from lora_da_core.errors import DataError, OptionError
from lora_da_core.estimation import Estimates
from lora_da_core.factorisations import eigh
from lora_da_core.interfaces import LayerFisher
from lora_da_core.operators import DenseMap
from lora_da_core.pipeline import Pipeline
from lora_da_core.rounds import population
from lora_da_core.types import FisherStatistics, LayerSpec, LoraFactors, RunReport

LIMIT = 1e-4
"""Largest deviation that passes; A is stored in float32, whose rounding leaves some 1e-7 of ‖Ω‖."""
_SAME_LOSS = 1e-4
"""Relative difference of mean losses up to which statistics count as those of the run."""


@dataclass(frozen=True)
class LayerNumerics:
    """One layer's figures; Ω is σ²Ω, from sums, damping, α, β and N of the run.

    Attributes:
        name: The layer.
        orthogonality: Largest |âᵢ·âⱼ|, i ≠ j, of A's normalised rows.
        residual: ‖ΩQ − Q(QᵀΩQ)‖₂/‖Ω‖₂ with Q an orthonormal basis of A's rows.
        objective: tr(QᵀΩQ).
        least: The sum of the r smallest eigenvalues of Ω, by dense decomposition: no Q does better.
        excess: (objective − least)/Σ|λᵢ| over these eigenvalues.
        inversion: ‖J·(J⁻¹G) − G‖/‖G‖, what inverting the damped Fisher lost; 0 where G is zero.
        condition: Condition number of V, and so of the damped input factor where the Fisher is a Kronecker product.
        remedies: What had to be done to factorise the Fisher, then and now.
    """

    name: str
    orthogonality: float
    residual: float
    objective: float
    least: float
    excess: float
    inversion: float
    condition: float
    remedies: tuple[str, ...]


def recomputed(
    pipeline: Pipeline, estimates: Estimates, factors: Mapping[str, LoraFactors], report: RunReport
) -> list[LayerNumerics]:
    """Every layer's figures.

    Args:
        pipeline: With the components and the configuration of the run.
        estimates: Its statistics, from its data or its cache.
        factors: What its adapter holds, by layer.
        report: Its report.

    Returns:
        One entry per layer of the report.

    Raises:
        OptionError: What A spans is not the bottom of one Ω: several rounds, paired blocks, an allocator's own order.
        DataError: The statistics are not those of the run.
    """
    config, allocator = pipeline.config, pipeline.components.allocator
    for reason, holds in {
        f"rounds={config.rounds}": config.rounds > 1,
        f"pairing={config.pairing!r}": config.pairing != "same",
        f"allocator {getattr(allocator, 'name', None)!r}": allocator is not None and allocator.needs_curvature,
    }.items():
        if holds:
            raise OptionError(
                f"with {reason} the rows of A are not the bottom eigenvectors of one Ω; nothing to check."
            )
    _check_same_run(estimates, report)
    specs = {spec.name: spec for spec in estimates.task.specs}
    found = []
    for layer in report.layers:
        spec = specs[layer.name]
        with blamed(f"estimator {pipeline.components.estimator.name!r}", f" on layer {layer.name}"):
            found.append(_layer(pipeline, estimates, spec, factors[layer.name].A, layer.remedies))
    return found


def layer_numerics(
    name: str, fisher: LayerFisher, gradient: Tensor, held: Tensor, *, alpha: float, beta_over_n: float
) -> LayerNumerics:
    """One layer's figures.

    Args:
        name: The layer.
        fisher: Its damped Fisher, on the CPU.
        gradient: G, (out, in), float64 on the CPU.
        held: A, (r, in), or of a convolution (r, channels, height, width).
        alpha: α.
        beta_over_n: β/N.

    Returns:
        The figures.
    """
    step = fisher.step(DenseMap(gradient)).to_dense().double()
    variance = fisher.inverse_input_trace().to_dense().double()
    omega = beta_over_n * variance - alpha * (step @ step.mT)
    pairs = eigh(omega, f"Ω of layer {name}")
    rows = held.detach().to("cpu", torch.float64).flatten(1)
    basis = torch.linalg.qr(rows.mT).Q
    product = omega @ basis
    wanted = pairs.values[: len(rows)]
    objective, least = float((basis * product).sum()), float(wanted.sum())
    norm, total = float(pairs.values.abs().max()), float(wanted.abs().sum())
    size = float(gradient.norm())
    lost = float((fisher.apply(fisher.solve(gradient)) - gradient).norm()) / size if size else 0.0
    spread = eigh(variance, f"V of layer {name}").values
    return LayerNumerics(
        name=name,
        orthogonality=_orthogonality(rows),
        residual=float(torch.linalg.matrix_norm(product - basis @ (basis.mT @ product), 2)) / (norm or 1.0),
        objective=objective,
        least=least,
        excess=(objective - least) / (total or 1.0),
        inversion=lost,
        condition=float(spread[-1] / spread[0]),
        remedies=tuple(dict.fromkeys((*fisher.remedies, *pairs.remedies))),
    )


def _layer(
    pipeline: Pipeline, estimates: Estimates, spec: LayerSpec, held: Tensor, earlier: tuple[str, ...]
) -> LayerNumerics:
    config, statistics = pipeline.config, estimates.statistics
    fisher = pipeline.components.estimator.fisher(
        _on_cpu(statistics.of_layer(spec.name)),
        damping=config.damping,
        damping_kind=config.damping_kind,
        fisher_scale=config.fisher_scale,
    )
    gradient = estimates.gradient(spec).to_dense().to("cpu", torch.float64)
    beta_over_n = config.beta / population(config, statistics.samples)
    found = layer_numerics(spec.name, fisher, gradient, held, alpha=config.alpha, beta_over_n=beta_over_n)
    return replace(found, remedies=tuple(dict.fromkeys((*earlier, *found.remedies))))


def _orthogonality(rows: Tensor) -> float:
    directions = rows / rows.norm(dim=1, keepdim=True)
    return float((directions @ directions.mT - torch.eye(len(rows), dtype=rows.dtype)).abs().max())


def _on_cpu(statistics: FisherStatistics) -> FisherStatistics:
    """The same sums, in their own dtype, which what they resolve depends on."""
    return replace(
        statistics,
        input={key: value.cpu() for key, value in statistics.input.items()},
        layer={key: value.cpu() for key, value in statistics.layer.items()},
        shared={},
    )


def _check_same_run(estimates: Estimates, report: RunReport) -> None:
    sums = estimates.statistics
    loss = sums.loss_sum / sums.samples
    counts = (sums.samples, sums.label_tokens), (report.samples, report.label_tokens)
    if counts[0] != counts[1] or abs(loss - report.loss) > _SAME_LOSS * abs(report.loss):
        raise DataError(
            f"these are not the statistics of the run: {counts[0][0]} samples with {counts[0][1]} labels and a loss of "
            f"{loss:.6g}, there {counts[1][0]}, {counts[1][1]} and {report.loss:.6g}; give its model and data."
        )
    missing = {layer.name for layer in report.layers} - {spec.name for spec in estimates.task.specs}
    if missing:
        raise DataError(f"the run has layers that these statistics lack, the first is {sorted(missing)[0]}.")
