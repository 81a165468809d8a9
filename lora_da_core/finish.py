"""The second half of a run: solutions, scale, factors and report, from estimates that stay as they are."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from lora_da_core.allocation import Allocation
from lora_da_core.capture import Progress
from lora_da_core.components import Components
from lora_da_core.config import LoraDAConfig
from lora_da_core.errors import DataError
from lora_da_core.estimation import Estimates, estimate, with_enough_tokens
from lora_da_core.omega import WeightStep, fixed_factors, of_norm, paired, stable_factors, unit_step
from lora_da_core.operators import LinearMap
from lora_da_core.registry import Registry
from lora_da_core.sizing import Sizing
from lora_da_core.solving import LayerSolution, LayerSolver, PreparedLayer, batch_size, full_float32
from lora_da_core.types import Batch, LayerReport, LayerSpec, LoraDAResult, LoraFactors, RunReport

logger = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class _Round:
    """One estimation and what was solved from it."""

    estimates: Estimates
    solutions: Mapping[str, LayerSolution]


class Finish:
    """Makes results; it holds what a run was asked for, and the notes and times of the one it is at.

    Args:
        registry: The installed plugins.
        components: The pipeline's.
        config: The pipeline's.
        on_progress: Told of each phase's progress.
    """

    def __init__(
        self, registry: Registry, components: Components, config: LoraDAConfig, on_progress: Progress | None
    ) -> None:
        self.registry, self.components, self.config = registry, components, config
        self.on_progress = on_progress
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self.allocation: Mapping[str, Any] = {}

    def result(self, estimates: Estimates, specs: Sequence[LayerSpec]) -> LoraDAResult:
        """All phases in order.

        Args:
            estimates: Of the first round.
            specs: The layers at the ranks and scalings that are wanted.

        Returns:
            The factors and the report.
        """
        from lora_da_core import adapter

        self.notes, self.seconds, self.allocation = [*estimates.notes], dict(estimates.seconds), {}
        everything = specs
        specs, left = with_enough_tokens(everything, estimates.statistics)
        for note in left:
            self._note(note)
        first = replace(estimates, task=replace(estimates.task, specs=specs))
        dtypes = {spec.name: first.task.dtype_of(spec) for spec in specs}
        if self.config.automatic_scale:
            rounds, factors, scale = self._searched(first, dtypes)
        else:
            rounds = [self._first_round(first)]
            factors, scale = self._timed("scale", lambda: self._scaled(rounds[0], dtypes))
        ranked = rounds[0].estimates.task.specs
        self.notes += _start_notes(self.config)
        reports = [self._layer_report(spec, rounds[-1], factors[spec.name]) for spec in ranked]
        for report in reports:
            for fault in self.registry.layer_finished(report.name, report):
                logger.warning("%s", fault)
        stored = adapter.as_stored(everything, factors, self.config.seed)
        return LoraDAResult(stored, self._report(reports, rounds, scale))

    def _scaled(
        self, solved: _Round, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[dict[str, LoraFactors], dict[str, Any]]:
        """Factors whose scale is not searched, and what the report says of it."""
        rule, gamma = self.config.rule, self.config.fixed_gamma
        spaces = {name: solution.subspace for name, solution in solved.solutions.items()}
        if rule in ("fixed", "stable"):
            made = fixed_factors if rule == "fixed" else stable_factors
            found = {name: made(space, gamma, dtypes[name]) for name, space in spaces.items()}
        else:
            steps = {name: unit_step(space, self.config.spectrum) for name, space in spaces.items()}
            if rule == "product":
                steps = {name: of_norm(step, 1 / gamma) for name, step in steps.items()}
            sizing = Sizing(solved.estimates.task, solved.estimates.batches, dtypes, self.on_progress)
            found = sizing.divided(steps, self.config.balance)
        foreign = self.config.pairing != "same" or not self.components.gradient.follows_loss
        if self.config.offset == "none" and foreign and any(bool(pair.B.any()) for pair in found.values()):
            self._note(
                "the method starts at the base's function, which this adapter changes by scaling·B·A: "
                "offset='base' or 'frozen_adapter' takes that out"
            )
        known = {} if rule == "unit" else {"gamma": gamma}
        return found, known if rule == "fixed" else {"rule": rule, **known}

    def _searched(
        self, estimates: Estimates, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[list[_Round], dict[str, LoraFactors], dict[str, Any]]:
        """Round by round: estimate where the steps so far lead, solve, and go as far along the solution as pays."""
        rounds: list[_Round] = []
        searches: list[dict[str, Any]] = []
        steps: dict[str, WeightStep] = {}
        unseen = any(bool((estimates.task.objective.label_counts(batch) > 0).any()) for batch in estimates.unseen)
        if not unseen:
            # How it was done rather than something to worry about: not logged.
            self.notes.append(
                "the step was sized on samples that it was estimated from: none are left beyond `samples`"
            )
        for number, part in enumerate([estimates.batches, *estimates.later]):
            sizing = Sizing(estimates.task, estimates.unseen if unseen else part, dtypes, self.on_progress)
            if number:
                rounds.append(self._solved(self._again(rounds[0].estimates, number, part, sizing.changes(steps))))
            else:
                rounds.append(self._first_round(estimates))
            solutions = rounds[-1].solutions
            direction = {n: unit_step(each.subspace, self.config.spectrum) for n, each in solutions.items()}
            search, steps = self._timed("scale", lambda s=sizing, d=direction, c=steps: s.search(c, d))  # type: ignore[misc]
            searches.append(asdict(search))
        if not any(search["multiplier"] for search in searches):
            self._note("no step along the solution lowers the loss on the samples: B starts at zero")
        factors = self._timed("scale", lambda: sizing.divided(steps, self.config.balance))
        earlier = {"earlier": searches[:-1]} if len(searches) > 1 else {}
        return rounds, factors, {**searches[-1], **earlier}

    def _again(
        self, first: Estimates, number: int, batches: Sequence[Batch], changes: Mapping[str, LinearMap]
    ) -> Estimates:
        task = replace(first.task, changes=changes)
        found = estimate(task, batches, self.config.seed + number, self.on_progress)
        _, left = with_enough_tokens(task.specs, found.statistics)
        if left:
            raise DataError(f"in round {number + 1}: {left[0]}. Give more samples, or fewer rounds.")
        for phase, seconds in found.seconds.items():
            self.seconds[phase] += seconds
        self.notes += [note for note in found.notes if note not in self.notes]
        return found

    def _first_round(self, estimates: Estimates) -> _Round:
        """The first round, at the ranks that the allocator gives its layers; later rounds take them over."""
        allocator = self.components.allocator
        if self.config.pairing != "same":
            return self._paired(estimates)
        if allocator is None:
            return self._solved(estimates)
        allocation = Allocation(self.registry, allocator, estimates.task.specs)
        largest = allocation.largest({name: layer.tokens for name, layer in estimates.statistics.layers.items()})
        solved = self._solved(replace(estimates, task=replace(estimates.task, specs=largest)))
        found = self._timed("solve", lambda: allocation.of(solved.solutions))
        self.allocation = found.record
        return _Round(replace(estimates, task=replace(estimates.task, specs=found.specs)), found.solutions)

    def _paired(self, estimates: Estimates) -> _Round:
        twice = [replace(spec, rank=2 * spec.rank) for spec in estimates.task.specs]
        solved = self._solved(replace(estimates, task=replace(estimates.task, specs=twice)))
        found = {
            name: replace(each, subspace=paired(each.subspace, self.config.pairing))
            for name, each in solved.solutions.items()
        }
        return _Round(estimates, found)

    def _solved(self, estimates: Estimates) -> _Round:
        with full_float32():
            return _Round(estimates, self._timed("solve", lambda: self._solutions(estimates)))

    def _solutions(self, estimates: Estimates) -> dict[str, LayerSolution]:
        parts, statistics = self.components, estimates.statistics
        curvature = parts.allocator is not None and parts.allocator.needs_curvature
        solver = LayerSolver(self.registry, parts.estimator, parts.solver, self.config, curvature=curvature)
        specs = {spec.name: spec for spec in estimates.task.specs}
        solutions: dict[str, LayerSolution] = {}
        waiting: dict[tuple[int, int, torch.dtype, torch.device], list[PreparedLayer]] = {}

        def flush(alike: list[PreparedLayer]) -> None:
            found = solver.solve(alike, self._population(estimates))
            solutions.update({layer.spec.name: solution for layer, solution in zip(alike, found, strict=True)})
            alike.clear()
            if self.on_progress is not None:
                self.on_progress("solve", len(solutions), len(specs))

        # Layers of one input group follow each other, so that its factorisation can go when they are prepared.
        by_group: dict[str, list[str]] = {}
        for name in specs:
            group = statistics.layers[name].group
            by_group.setdefault(group.leader if group else name, []).append(name)
        for names in by_group.values():
            for name in names:
                fisher = replace(statistics.of_layer(name), spec=specs[name])
                prepared = solver.prepare(fisher, estimates.gradient(specs[name]))
                spec, device = prepared.spec, prepared.step.device
                # An estimator chooses the dtype layer by layer.
                alike = waiting.setdefault((spec.in_features, spec.rank, prepared.step.dtype, device), [])
                alike.append(prepared)
                del prepared  # or the layer would live on while the next one is prepared
                if len(alike) >= batch_size(spec, device):
                    flush(alike)
            fisher.shared.clear()
        for alike in waiting.values():
            if alike:
                flush(alike)
        return solutions

    def _population(self, estimates: Estimates) -> int:
        if self.config.population is not None:
            return self.config.population
        return estimates.statistics.samples * self.config.rounds

    def _layer_report(self, spec: LayerSpec, last: _Round, pair: LoraFactors) -> LayerReport:
        from lora_da_core.adapter import digest

        solution = last.solutions[spec.name]
        return LayerReport(
            name=spec.name,
            in_features=spec.in_features,
            out_features=spec.out_features,
            rank=spec.rank,
            tokens=last.estimates.statistics.layers[spec.name].tokens,
            sigma=solution.sigma,
            ritz_values=solution.values,
            gap=solution.gap,
            residual=solution.residual,
            converged=solution.converged,
            solver=solution.solver,
            applies=solution.applies,
            damping=solution.damping,
            remedies=solution.remedies,
            gradient=last.estimates.diagnostics(spec),
            seconds=solution.seconds,
            digest_A=digest(pair.A),
            digest_B=digest(pair.B),
        )

    def _report(self, layers: Sequence[LayerReport], rounds: Sequence[_Round], scale: Mapping[str, Any]) -> RunReport:
        from lora_da_core import adapter

        statistics = [each.estimates.statistics for each in rounds]
        first = rounds[0].estimates
        packages = ("lora-da-core", "torch", "transformers", "peft")
        return RunReport(
            layers=tuple(layers),
            components=self.components.names(),
            options=self.components.options(),
            config=asdict(replace(self.config, population=self._population(first))),
            samples=sum(each.samples for each in statistics),
            label_tokens=sum(each.label_tokens for each in statistics),
            loss=statistics[0].loss_sum / statistics[0].samples,
            scale=dict(scale),
            seconds=dict(self.seconds),
            notes=tuple(self.notes),
            versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
            base=adapter.fingerprint(first.task.model),
            allocation=self.allocation,
        )

    def _timed(self, phase: str, work: Callable[[], Outcome]) -> Outcome:
        start = time.perf_counter()
        outcome = work()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        return outcome

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.warning("%s", text)


def _start_notes(config: LoraDAConfig) -> list[str]:
    """What becomes of the adapter beside A and B; not worries, so not logged."""
    places = {
        "base": "from the base's weights, which are then no longer the original's",
        "frozen_adapter": "by a second, frozen adapter",
    }
    notes = (
        []
        if config.offset == "none"
        else [f"offset={config.offset}: scaling·B·A is taken out again {places[config.offset]}"]
    )
    return notes if config.frozen == "none" else [*notes, "A is frozen in training; a saved adapter cannot say so"]
