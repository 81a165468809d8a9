"""What components take beside their statistics: measured on small layers, continued to a layer's own size.

Plugins state the bytes of their statistics and nothing else, so their code itself is asked: it runs on random tokens
of a layer of the same proportions, once of a size and once of half that size. That tells matrices, which grow with the
square of the size, from skinny blocks, which grow with the size.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_da_core.blame import blamed
from lora_da_core.config import LoraDAConfig
from lora_da_core.interfaces import Component, FisherEstimator, GradientEstimator, Solver
from lora_da_core.live_bytes import Allocations
from lora_da_core.omega import forms_omega, forms_step
from lora_da_core.operators import DenseMap, LinearMap, accumulation_dtype
from lora_da_core.registry import Registry
from lora_da_core.solving import LayerSolver, PreparedLayer
from lora_da_core.types import FisherStatistics, LayerSpec

INPUTS, OUTPUTS = 384, 1024
"""Largest sides of the small layer: enough inputs for solvers to behave as on a large one."""
RANK = 8
"""Largest rank of the small layer; with more, solvers would fill it. Their blocks grow with the rank."""
SAMPLES = 80
"""Most samples of random tokens: more than a sketch of the usual size buffers."""


@dataclass(frozen=True)
class Workspace:
    """Bytes that a layer takes beside its statistics, by step.

    Attributes:
        update: While its accumulators take in a batch.
        end_pass: While they close a pass.
        prepare: While its Fisher, step and V are made.
        shared: What of that stays while layers of the same input are prepared and solved.
        kept: What of that stays until the layer is solved.
        solve: While it is solved.
    """

    update: int
    end_pass: int
    prepare: int
    shared: int
    kept: int
    solve: int


@dataclass(frozen=True)
class Tokens:
    """How much data there is: tokens of a batch, tokens and samples in all."""

    batch: int
    total: int
    samples: int


@dataclass(frozen=True)
class _Data:
    """Random data of a small layer: samples of one length."""

    samples: int
    length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length


@dataclass(frozen=True)
class Measured:
    """Bytes by step of small layers, once of a size and once of half that size.

    Attributes:
        scale: Of the larger one, to the layer.
        samples: How many.
        length: Tokens of each where the number of tokens does not matter.
        plain: With so many samples.
        more: With twice as many, where their number matters.
        keeps_data: Whether it does.
    """

    scale: float
    samples: int
    length: int
    plain: Sequence[Mapping[str, int]]
    more: Sequence[Mapping[str, int]]
    keeps_data: bool


class WorkspaceProbe:
    """Measures the workspaces of one pipeline's components.

    Args:
        registry: The installed plugins.
        estimator: The Fisher estimator.
        gradient: The gradient estimator.
        config: The pipeline's.
        device: Where the run is to be: it decides what is formed; what is measured here is measured on the CPU.
        known: What was measured before of the same components, which more is added to; None starts anew.
    """

    def __init__(
        self,
        registry: Registry,
        estimator: FisherEstimator[Any],
        gradient: GradientEstimator[Any],
        config: LoraDAConfig,
        device: torch.device,
        known: dict[Any, Measured] | None = None,
    ) -> None:
        self.registry = registry
        self.estimator = estimator
        self.gradient = gradient
        self.device = device
        self.config = replace(config, unconverged="warn")
        self._known = {} if known is None else known

    def workspace(self, spec: LayerSpec, tokens: Tokens, solver: Solver[Any], dtype: torch.dtype) -> Workspace:
        """The workspace of a layer; equal shapes are measured once.

        Args:
            spec: The layer.
            tokens: How much data there is.
            solver: The solver that the layer will be given to.
            dtype: Dtype of its inputs and output gradients.

        Returns:
            Bytes by step.

        Raises:
            PluginError: A component raised on the small layer.
        """
        data = (tokens.total, tokens.samples)
        shape = (spec.in_features, spec.out_features, spec.rank, spec.one_hot)
        key = (*shape, solver.name, data, dtype, self.device.type)
        if key not in self._known:
            self._known[key] = self._measured(spec, tokens, solver, dtype)
        return self._continued(self._known[key], spec, tokens)

    def _measured(self, spec: LayerSpec, tokens: Tokens, solver: Solver[Any], dtype: torch.dtype) -> Measured:
        scale = min(1.0, INPUTS / spec.in_features, OUTPUTS / spec.out_features)
        samples, keeps_data = min(SAMPLES, tokens.samples), self._keeps_data(spec, tokens)
        # Kept tokens shrink with the layer, so that what is made of them grows like its matrices. Others need only be
        # enough for a second moment of full rank.
        full_length = tokens.total / tokens.samples
        length = math.ceil(2 * min(INPUTS, spec.in_features) / samples)

        def pair(samples: int) -> list[dict[str, int]]:
            found = []
            for part in (scale, scale / 2):
                data = _Data(samples, max(1, round(full_length * part)) if keeps_data else length)
                found.append(asdict(_Trial(self, spec, part, data, dtype).workspace(solver)))
            return found

        plain = pair(samples)
        return Measured(scale, samples, length, plain, pair(2 * samples) if keeps_data else plain, keeps_data)

    def _continued(self, measured: Measured, spec: LayerSpec, tokens: Tokens) -> Workspace:
        scale, samples = measured.scale, measured.samples
        growth = {"solve": max(1.0, spec.rank / RANK)}
        if not measured.keeps_data:
            growth["update"] = tokens.batch / (samples * measured.length)
        found = {}
        for name in measured.plain[0]:
            pairs = [*zip(measured.plain, measured.more, strict=True)]
            by_sample = [(twice[name] - once[name]) / samples for once, twice in pairs]
            constant = [once[name] - samples * each for (once, _), each in zip(pairs, by_sample, strict=True)]
            count = tokens.batch * tokens.samples / tokens.total if name == "update" else tokens.samples
            size = _at_full_size(constant, scale, growth.get(name, 1.0)) + count * _at_full_size(by_sample, scale)
            found[name] = max(0, round(size))
        return Workspace(**found)

    def _keeps_data(self, spec: LayerSpec, tokens: Tokens) -> bool:
        sizes = {
            self.estimator.statistics_bytes(spec, samples=samples, tokens=count, itemsize=4)
            for samples, count in ((tokens.samples, tokens.total), (2 * tokens.samples, 2 * tokens.total))
        }
        return len(sizes) > 1


def _shrunk(spec: LayerSpec, scale: float) -> LayerSpec:
    inputs, outputs = (max(1, round(size * scale)) for size in (spec.in_features, spec.out_features))
    return replace(spec, in_features=inputs, out_features=outputs, rank=min(spec.rank, RANK, inputs, outputs))


def _at_full_size(sizes: Sequence[float], scale: float, linear_growth: float = 1.0) -> float:
    """A·s² + B·s at s = 1 from its values at `scale` and half of it, the linear part times `linear_growth`.

    >>> _at_full_size([300 / 4 + 500 / 2, 300 / 16 + 500 / 4], 0.5)
    800.0
    """
    whole, half = sizes
    square = min(max(2.0 * (whole - 2.0 * half), 0.0), max(whole, 0.0))
    return square / scale**2 + (whole - square) / scale * linear_growth


class _Trial:
    """A small layer, from random tokens to its solution, with the peak of every step."""

    def __init__(self, probe: WorkspaceProbe, full: LayerSpec, scale: float, data: _Data, dtype: torch.dtype) -> None:
        self.probe, self.spec, self.samples = probe, _shrunk(full, scale), data.samples
        self.forms_step = forms_step(full.in_features, full.out_features, probe.device)
        self.stores_omega = forms_omega(full.in_features, full.out_features, probe.device)
        spec = self.spec
        generator = torch.Generator().manual_seed(0)
        sides = (spec.in_features, spec.out_features)
        self.tokens = [torch.randn(data.tokens, side, generator=generator).to(dtype) for side in sides]
        if spec.one_hot:
            self.tokens[0] = torch.randint(spec.in_features, (data.tokens,), generator=generator)
        self.example = torch.arange(data.samples).repeat_interleave(data.length)
        self.direction = torch.randn(spec.out_features, spec.in_features, generator=generator)
        self.place: dict[str, Any] = {"device": torch.device("cpu"), "dtype": accumulation_dtype(dtype)}
        self.allocations = Allocations([*self.tokens, self.example, self.direction])
        self.taken = {"update": 0, "end_pass": 0, "prepare": 0, "solve": 0}

    def workspace(self, solver: Solver[Any]) -> Workspace:
        probe = self.probe
        layers = LayerSolver(probe.registry, probe.estimator, solver, probe.config)
        with self.allocations, _quiet():
            statistics, sums = self._accumulated()
            before = self.allocations.live
            with self._step("prepare"):
                first = self._prepared(statistics, sums)
            stays = self.allocations.live - before
            # A second layer of the same input adds what is not shared.
            second = self._prepared(statistics, sums)
            kept = self.allocations.live - before - stays
            del second
            with self._step("solve"):
                layers.solve([first], self.samples)
        return Workspace(**self.taken, shared=stays - kept, kept=kept)

    def _accumulated(self) -> tuple[FisherStatistics, Mapping[str, Tensor]]:
        """The Fisher's statistics and the gradient's sums, after all passes."""
        spec, estimator, gradient = self.spec, self.probe.estimator, self.probe.gradient
        with self._blamed("estimator", estimator):
            taking = [make(spec, **self.place) for make in (estimator.input_accumulator, estimator.layer_accumulator)]
        if not gradient.forward_only:
            with self._blamed("gradient", gradient):
                taking.append(gradient.accumulator(spec, **self.place))
        x, g = self.tokens
        shared: dict[Any, Any] = {}

        def statistics() -> FisherStatistics:
            inputs, layer = (accumulator.statistics() for accumulator in taking[:2])
            return FisherStatistics(spec, inputs, layer, self.samples, len(x), shared)

        for index in range(estimator.passes):
            for accumulator in taking if index == 0 else taking[:2]:
                with self._step("update", stays=True), self._blamed("estimator", estimator):
                    accumulator.update(x, g, self.example)
            for accumulator in taking[:2]:
                with self._step("end_pass", stays=True), self._blamed("estimator", estimator):
                    accumulator.end_pass(index, statistics())
        return statistics(), {} if gradient.forward_only else taking[2].statistics()

    def _prepared(self, statistics: FisherStatistics, sums: Mapping[str, Tensor]) -> PreparedLayer:
        """As `LayerSolver.prepare`, but Δ_raw is formed where it is for the full layer."""
        config, estimator = self.probe.config, self.probe.estimator
        gradient = self._gradient(sums)
        with self._blamed("estimator", estimator):
            fisher = estimator.fisher(
                statistics,
                damping=config.damping,
                damping_kind=config.damping_kind,
                fisher_scale=config.fisher_scale,
            )
            step, variance = fisher.step(gradient), fisher.inverse_input_trace()
            if self.forms_step:
                step = DenseMap(step.to_dense())
        return PreparedLayer(self.spec, fisher, step, variance, 0.0, stores_omega=self.stores_omega)

    def _gradient(self, sums: Mapping[str, Tensor]) -> LinearMap:
        gradient = self.probe.gradient
        if gradient.forward_only:
            return DenseMap(self.direction / self.samples)
        with self._blamed("gradient", gradient):
            return gradient.gradient(sums, self.spec, samples=self.samples)

    @contextlib.contextmanager
    def _step(self, name: str, *, stays: bool = False) -> Iterator[None]:
        """Notes the peak of a step above what was there before; what `stays` is counted as statistics."""
        self.allocations.restart()
        before = self.allocations.live
        yield
        floor = max(before, self.allocations.live) if stays else before
        self.taken[name] = max(self.taken[name], self.allocations.peak - floor)

    def _blamed(self, kind: str, component: Component[Any]) -> AbstractContextManager[None]:
        origin = self.probe.registry.origin(kind, type(component))
        return blamed(
            f"{kind} {component.name!r} ({origin})",
            f" on a layer of {self.spec.out_features} × {self.spec.in_features} random numbers",
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what solvers say of random numbers to themselves."""
    logger = logging.getLogger(LayerSolver.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
