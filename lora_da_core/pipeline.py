"""Assembles a pipeline from installed plugins and runs it: statistics, solutions, scale, factors."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_da_core.batches import first_samples, label_counts, labelled_part, spread
from lora_da_core.capture import CaptureTask, Progress
from lora_da_core.config import ComponentChoice, LoraDAConfig, Preset
from lora_da_core.errors import OptionError
from lora_da_core.estimation import Estimates, check_tokens, estimate
from lora_da_core.interfaces import FisherEstimator, GradientEstimator, Objective, Solver
from lora_da_core.omega import balanced_factors, fixed_factors
from lora_da_core.operators import LowRankMap, accumulation_dtype
from lora_da_core.probe import LowRankProbe
from lora_da_core.registry import Registry
from lora_da_core.scale import LineSearch, line_search
from lora_da_core.solving import LayerSolution, LayerSolver, PreparedLayer, batch_size
from lora_da_core.types import Batch, LayerReport, LayerSpec, LoraDAResult, LoraFactors, RunReport

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


logger = logging.getLogger(__name__)

DEFAULT_PRESET = "robust"
SEARCH_SAMPLES = 16
"""Samples that the line search reads."""


def build_pipeline(
    estimator: ComponentChoice | None = None,
    solver: ComponentChoice | None = None,
    gradient: ComponentChoice | None = None,
    objective: ComponentChoice = "causal_lm",
    *,
    preset: str = DEFAULT_PRESET,
    config: LoraDAConfig | None = None,
) -> Pipeline:
    """Assembles a pipeline; every name and option is checked here, before any model is touched.

    Args:
        estimator: Fisher estimator, a name or (name, options); None takes the preset's.
        solver: Solver, likewise; `"auto"` chooses per layer.
        gradient: Gradient estimator, likewise.
        objective: The loss that is differentiated.
        preset: Setting that fills whatever is not given.
        config: Replaces the preset's configuration.

    Returns:
        The pipeline.

    Raises:
        UnknownNameError: A name is not installed; the message lists the alternatives.
        OptionError: An option is unknown or out of range, or the components do not go together.
    """
    registry = Registry()
    base: Preset = registry.resolve("preset", preset)
    if config is not None and not isinstance(config, LoraDAConfig):
        raise OptionError(f"config is a {type(config).__name__}; give a LoraDAConfig.")
    chosen = base.solver if solver is None else solver
    parts = Components(
        estimator=registry.create("estimator", base.estimator if estimator is None else estimator),
        gradient=registry.create("gradient", base.gradient if gradient is None else gradient),
        objective=registry.create("objective", objective),
        solver=None if chosen == "auto" else registry.create("solver", chosen),
    )
    parts.check()
    if parts.solver is None:
        registry.choose_solver(1, 1, "cpu")
    return Pipeline(registry, parts, config or base.config)


@dataclass(frozen=True)
class Components:
    """The instances a pipeline is made of; `solver` None chooses per layer."""

    estimator: FisherEstimator[Any]
    gradient: GradientEstimator[Any]
    objective: Objective[Any]
    solver: Solver[Any] | None

    def check(self) -> None:
        """Refuses components that do not go together.

        Raises:
            OptionError: The estimator draws labels and the objective cannot.
        """
        draws = type(self.objective).fisher_losses is not Objective.fisher_losses
        if self.estimator.labels != "empirical" and not draws:
            raise OptionError(
                f"estimator {self.estimator.name!r} asks for labels={self.estimator.labels!r}, which objective "
                f"{self.objective.name!r} cannot draw; use labels='empirical'."
            )

    def names(self) -> dict[str, str]:
        """Name by kind."""
        solver = "auto" if self.solver is None else self.solver.name
        named = {"estimator": self.estimator, "gradient": self.gradient, "objective": self.objective}
        return {**{kind: component.name for kind, component in named.items()}, "solver": solver}

    def origins(self, registry: Registry) -> dict[str, str]:
        """Distribution and version by kind."""
        parts = {"estimator": self.estimator, "gradient": self.gradient, "objective": self.objective}
        return {kind: registry.origin(kind, type(component)) for kind, component in parts.items()}

    def options(self) -> dict[str, dict[str, Any]]:
        """Options by kind."""
        parts = {"estimator": self.estimator, "gradient": self.gradient, "objective": self.objective}
        found = {kind: asdict(component.options) for kind, component in parts.items()}
        return {**found, "solver": {} if self.solver is None else asdict(self.solver.options)}


class Pipeline:
    """A ready pipeline; it holds no state of a run, so it can be run any number of times."""

    def __init__(self, registry: Registry, components: Components, config: LoraDAConfig) -> None:
        self.registry = registry
        self.components = components
        self.config = config

    def __repr__(self) -> str:
        names = ", ".join(f"{kind}={name!r}" for kind, name in self.components.names().items())
        return f"Pipeline({names}, config={self.config!r})"

    def run(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        peft_config: LoraConfig | None = None,
        *,
        adapter_name: str = "default",
        on_progress: Progress | None = None,
    ) -> LoraDAResult:
        """Estimates, solves and scales; the model is left exactly as found.

        Args:
            model: A base model, or a PeftModel that carries the adapter.
            batches: Mappings of tensors whose first dimension counts samples, with `labels`.
            peft_config: The LoRA configuration; None takes the PeftModel's own.
            adapter_name: The adapter, where the model carries several.
            on_progress: Told of each phase's progress.

        Returns:
            The factors as the adapter stores them, before PEFT's scaling, and the report.

        Raises:
            LoraDAError: Something is wrong with options, targets, data, model or a plugin; the message says what.
        """
        estimates = self.estimate(model, batches, peft_config, adapter_name=adapter_name, on_progress=on_progress)
        return self.solve(estimates, on_progress=on_progress)

    def estimate(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        peft_config: LoraConfig | None = None,
        *,
        adapter_name: str = "default",
        on_progress: Progress | None = None,
    ) -> Estimates:
        """The first half of `run`: the passes over the data, whose sums serve any solver, rank, α, β, damping, scale.

        Args:
            model: As `run` takes it.
            batches: As `run` takes them.
            peft_config: As `run` takes it.
            adapter_name: As `run` takes it.
            on_progress: As `run` takes it.

        Returns:
            The estimates, to be given to `solve` of this pipeline or of one with the same estimators.
        """
        from lora_da_core import adapter

        lora = adapter.chosen_config(model, peft_config, adapter_name)
        targets = adapter.resolve_targets(model, lora, adapter_name)
        taken = first_samples(batches, self.config.samples)
        counts = label_counts(self.components.objective, taken)
        task = CaptureTask(
            model=adapter.base_of(model),
            modules=targets.modules,
            specs=targets.specs,
            objective=self.components.objective,
            estimator=self.components.estimator,
            gradient=self.components.gradient,
            token_mask=self.config.token_mask,
            base_only=partial(adapter.adapters_disabled, model),
            origins=self.components.origins(self.registry),
        )
        return estimate(task, taken, counts, self.config, on_progress)

    def solve(
        self, estimates: Estimates, peft_config: LoraConfig | None = None, *, on_progress: Progress | None = None
    ) -> LoraDAResult:
        """The second half of `run`; the estimates stay as they are, so they can be solved again.

        Args:
            estimates: From `estimate`, by a pipeline with the same estimators and token mask.
            peft_config: Another LoRA configuration of the same layers, for another rank or scaling.
            on_progress: As `run` takes it.

        Returns:
            The factors and the report.

        Raises:
            OptionError: The estimates were made with other estimators, another token mask or other layers.
        """
        from lora_da_core import adapter

        made, ours = estimates.task, self.components
        for kind, theirs, mine in (
            ("estimator", made.estimator, ours.estimator),
            ("gradient", made.gradient, ours.gradient),
        ):
            if (theirs.name, theirs.options) != (mine.name, mine.options):
                made_with = f"{kind} {theirs.name!r} {theirs.options}"
                raise OptionError(f"these estimates were made with {made_with}; estimate again.")
        if made.token_mask != self.config.token_mask:
            raise OptionError(f"these estimates were made with token_mask={made.token_mask!r}; estimate again.")
        specs = tuple(made.specs)
        if peft_config is not None:
            specs = adapter.resolve_targets(made.model, peft_config).specs
        if {spec.name for spec in specs} != {spec.name for spec in made.specs}:
            raise OptionError("the LoRA configuration adapts other layers than were estimated; estimate again.")
        check_tokens(specs, estimates.statistics)
        return _Finish(self, estimates, specs, on_progress).result()


class _Finish:
    """The second half of a run: solutions, scale, factors and report, from estimates that stay as they are."""

    def __init__(
        self, pipeline: Pipeline, estimates: Estimates, specs: Sequence[LayerSpec], on_progress: Progress | None
    ) -> None:
        self.pipeline, self.config = pipeline, pipeline.config
        self.estimates, self.statistics = estimates, estimates.statistics
        self.specs, self.on_progress = specs, on_progress
        self.task = replace(estimates.task, specs=specs)
        self.notes = [*estimates.notes]
        self.seconds = dict(estimates.seconds)

    def result(self) -> LoraDAResult:
        """All phases in order."""
        solutions = self._timed("solve", self._solutions)
        factors, scale = self._timed("scale", lambda: self._scaled(solutions))
        reports = [self._layer_report(spec, solutions[spec.name], factors[spec.name]) for spec in self.specs]
        for report in reports:
            for fault in self.pipeline.registry.layer_finished(report.name, report):
                logger.warning("%s", fault)
        return LoraDAResult(factors, self._report(reports, scale))

    def _solutions(self) -> dict[str, LayerSolution]:
        parts, statistics = self.pipeline.components, self.statistics
        solver = LayerSolver(self.pipeline.registry, parts.estimator, parts.solver, self.config)
        specs = {spec.name: spec for spec in self.specs}
        solutions: dict[str, LayerSolution] = {}
        waiting: dict[tuple[int, int, torch.device], list[PreparedLayer]] = {}

        def flush(alike: list[PreparedLayer]) -> None:
            found = solver.solve(alike, self._population())
            solutions.update({layer.spec.name: solution for layer, solution in zip(alike, found, strict=True)})
            alike.clear()
            if self.on_progress is not None:
                self.on_progress("solve", len(solutions), len(specs))

        # Layers of one input group follow each other, so that its factorisation can go when they are prepared.
        by_group: dict[str, list[str]] = {}
        for name, layer in statistics.layers.items():
            by_group.setdefault(layer.group.leader if layer.group else name, []).append(name)
        for names in by_group.values():
            for name in names:
                fisher = replace(statistics.of_layer(name), spec=specs[name])
                prepared = solver.prepare(fisher, self.estimates.gradient(specs[name]))
                spec, device = prepared.spec, prepared.step.device
                alike = waiting.setdefault((spec.in_features, spec.rank, device), [])
                alike.append(prepared)
                if len(alike) >= batch_size(spec, device):
                    flush(alike)
            fisher.shared.clear()
        for alike in waiting.values():
            if alike:
                flush(alike)
        return solutions

    def _population(self) -> int:
        return self.statistics.samples if self.config.population is None else self.config.population

    def _scaled(self, solutions: Mapping[str, LayerSolution]) -> tuple[dict[str, LoraFactors], dict[str, Any]]:
        spaces = {name: solution.subspace for name, solution in solutions.items()}
        dtypes = {name: _factor_dtype(self.task.modules[name]) for name in spaces}
        if not self.config.automatic_scale:
            gamma = self.config.fixed_gamma
            return {n: fixed_factors(s, gamma, dtypes[n]) for n, s in spaces.items()}, {"gamma": gamma}
        search = self._search(solutions)
        if search.multiplier == 0.0:
            self._note("no step along the solution lowers the loss on the samples: B starts at zero")
        return {n: balanced_factors(s, search.multiplier, dtypes[n]) for n, s in spaces.items()}, asdict(search)

    def _search(self, solutions: Mapping[str, LayerSolution]) -> LineSearch:
        objective = self.task.objective
        parts = [labelled_part(objective, batch) for batch in self.estimates.batches]
        chosen = spread([part for part in parts if part is not None], SEARCH_SAMPLES)
        directions = {}
        for name, solution in solutions.items():
            space, dtype = solution.subspace, _factor_dtype(self.task.modules[name])
            directions[name] = (space.projected.to(dtype), space.basis.to(dtype))
        tries = 0
        with LowRankProbe(self.task, chosen) as probe:

            def loss(multiplier: float) -> float:
                nonlocal tries
                tries += 1
                changes = {n: LowRankMap(left * multiplier, right) for n, (left, right) in directions.items()}
                if self.on_progress is not None:
                    self.on_progress("scale", tries, 0)
                return float(probe.losses(changes if multiplier else {}).mean())

            return line_search(loss)

    def _layer_report(self, spec: LayerSpec, solution: LayerSolution, pair: LoraFactors) -> LayerReport:
        from lora_da_core.adapter import digest

        return LayerReport(
            name=spec.name,
            in_features=spec.in_features,
            out_features=spec.out_features,
            rank=spec.rank,
            tokens=self.statistics.layers[spec.name].tokens,
            sigma=solution.sigma,
            ritz_values=solution.values,
            gap=solution.gap,
            residual=solution.residual,
            converged=solution.converged,
            solver=solution.solver,
            applies=solution.applies,
            damping=solution.damping,
            remedies=solution.remedies,
            gradient=self.estimates.diagnostics(spec),
            seconds=solution.seconds,
            digest_A=digest(pair.A),
            digest_B=digest(pair.B),
        )

    def _report(self, layers: Sequence[LayerReport], scale: Mapping[str, Any]) -> RunReport:
        from lora_da_core import adapter

        parts = self.pipeline.components
        packages = ("lora-da-core", "torch", "transformers", "peft")
        return RunReport(
            layers=tuple(layers),
            components=parts.names(),
            options=parts.options(),
            config=asdict(replace(self.config, population=self._population())),
            samples=self.statistics.samples,
            label_tokens=self.statistics.label_tokens,
            loss=self.statistics.loss_sum / self.statistics.samples,
            scale=dict(scale),
            seconds=dict(self.seconds),
            notes=tuple(self.notes),
            versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
            base=adapter.fingerprint(self.task.model),
        )

    def _timed(self, phase: str, work: Any) -> Any:
        start = time.perf_counter()
        outcome = work()
        self.seconds[phase] = time.perf_counter() - start
        return outcome

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.warning("%s", text)


def get_lora_da_model(
    model: nn.Module,
    peft_config: LoraConfig,
    batches: Iterable[Batch],
    *,
    pipeline: Pipeline | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Runs the pipeline and wraps the model with the initialised adapter.

    Args:
        model: A base model.
        peft_config: The LoRA configuration.
        batches: As `Pipeline.run` takes them.
        pipeline: None builds the default one.
        adapter_name: Name of the adapter.

    Returns:
        A stock PeftModel.
    """
    from lora_da_core import adapter

    if adapter.is_peft_model(model):
        raise OptionError("the model is a PeftModel already; use initialize_lora_da_weights.")
    result = (pipeline or build_pipeline()).run(model, batches, peft_config)
    return adapter.apply(model, peft_config, result.factors, adapter_name)


def get_lora_da_state_dict(
    model: nn.Module,
    batches: Iterable[Batch],
    peft_config: LoraConfig | None = None,
    *,
    pipeline: Pipeline | None = None,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """Runs the pipeline and returns the factors under PEFT's key names, to be given to `initialize_lora_da_weights`.

    Args:
        model: A base model, or a PeftModel that carries the adapter.
        batches: As `Pipeline.run` takes them.
        peft_config: The LoRA configuration; None takes the PeftModel's own.
        pipeline: None builds the default one.
        adapter_name: The adapter, where the model carries several.

    Returns:
        `base_model.model.<module>.lora_A.weight` and `…lora_B.weight`.
    """
    from lora_da_core import adapter

    result = (pipeline or build_pipeline()).run(model, batches, peft_config, adapter_name=adapter_name)
    return adapter.state_dict(result.factors)


def initialize_lora_da_weights(
    peft_model: PeftModel,
    batches: Iterable[Batch] | None = None,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    pipeline: Pipeline | None = None,
) -> None:
    """Initialises an adapter of a PeftModel in place, from data or from a state dict computed before.

    Args:
        peft_model: A PeftModel.
        batches: As `Pipeline.run` takes them; not with `state_dict`.
        state_dict: As `get_lora_da_state_dict` returns it.
        adapter_name: The adapter.
        pipeline: None builds the default one.

    Raises:
        OptionError: Not exactly one of `batches` and `state_dict` is given.
    """
    from lora_da_core import adapter

    if (batches is None) == (state_dict is None):
        raise OptionError("give either batches or state_dict.")
    if state_dict is None and batches is not None:
        state_dict = get_lora_da_state_dict(peft_model, batches, pipeline=pipeline, adapter_name=adapter_name)
    adapter.write(peft_model, state_dict or {}, adapter_name)


def _factor_dtype(module: nn.Module) -> torch.dtype:
    weight = getattr(module, "weight", None)
    return accumulation_dtype(weight.dtype if isinstance(weight, Tensor) else torch.float32)
