"""The second half of a run: solutions, scale, factors and report, from estimates that stay as they are."""

from __future__ import annotations

import functools
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_da_core.blame import is_out_of_memory
from lora_da_core.capture import CaptureTask, Progress
from lora_da_core.components import Components
from lora_da_core.config import LoraDAConfig
from lora_da_core.errors import LoraDAError
from lora_da_core.estimation import Estimates, Job, estimate, forward_gradients
from lora_da_core.omega import WeightStep, fixed_factors, unit_step
from lora_da_core.operators import accumulation_dtype
from lora_da_core.passes import Names, halved, input_groups
from lora_da_core.registry import Registry
from lora_da_core.sizing import Sizing
from lora_da_core.solving import LayerSolution, LayerSolver, PreparedLayer, batch_size, full_float32
from lora_da_core.types import Batch, LayerReport, LayerSpec, LoraDAResult, LoraFactors, RunReport

logger = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class _Round:
    """What one round of estimation came to; the statistics themselves may be gone."""

    solutions: Mapping[str, LayerSolution]
    tokens: Mapping[str, int]
    gradient: Mapping[str, Mapping[str, float]]
    samples: int
    label_tokens: int
    loss_sum: float

    def with_layers_of(self, other: _Round) -> _Round:
        """The layers of both; they come from the same samples."""
        return replace(
            self,
            solutions={**self.solutions, **other.solutions},
            tokens={**self.tokens, **other.tokens},
            gradient={**self.gradient, **other.gradient},
        )


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
        self._parts: list[Names] = []
        self._replanned = False

    def solved_again(self, estimates: Estimates, specs: Sequence[LayerSpec]) -> LoraDAResult:
        """All phases after the first round's estimation.

        Args:
            estimates: Of the first round.
            specs: The layers at the ranks and scalings that are wanted.

        Returns:
            The factors and the report.
        """
        task = replace(estimates.task, specs=specs)
        job = Job(task, estimates.batches, estimates.notes, estimates.later, estimates.unseen)
        self._start(job, [[spec.name for spec in specs]])
        self._count(estimates.seconds)
        return self._result(job, self._solved(replace(estimates, task=task)))

    def result(self, job: Job, parts: Sequence[Names]) -> LoraDAResult:
        """All phases in order.

        Args:
            job: What is estimated.
            parts: The layers whose statistics are taken, solved and freed before those of the next are taken.

        Returns:
            The factors and the report.

        Raises:
            LoraDAError: Memory ran out, and again with half as many layers at a time.
        """
        self._start(job, parts)
        return self._result(job, self._round(job.task, job.batches, 0))

    def _start(self, job: Job, parts: Sequence[Names]) -> None:
        self.notes, self.seconds = [*job.notes], {}
        self._parts, self._replanned = list(parts), False

    def _result(self, job: Job, first: _Round) -> LoraDAResult:
        specs = job.task.specs
        dtypes = {spec.name: _factor_dtype(job.task.modules[spec.name]) for spec in specs}
        if self.config.automatic_scale:
            rounds, factors, scale = self._searched(job, first, dtypes)
        else:
            rounds, gamma = [first], self.config.fixed_gamma
            spaces = {name: solution.subspace for name, solution in rounds[0].solutions.items()}
            factors = self._timed("scale", lambda: {n: fixed_factors(s, gamma, dtypes[n]) for n, s in spaces.items()})
            scale = {"gamma": gamma}
        reports = [self._layer_report(spec, rounds[-1], factors[spec.name]) for spec in specs]
        for report in reports:
            for fault in self.registry.layer_finished(report.name, report):
                logger.warning("%s", fault)
        return LoraDAResult(factors, self._report(job, reports, rounds, scale))

    def _searched(
        self, job: Job, first: _Round, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[list[_Round], dict[str, LoraFactors], dict[str, Any]]:
        """Round by round: estimate where the steps so far lead, solve, and go as far along the solution as pays."""
        rounds: list[_Round] = []
        searches: list[dict[str, Any]] = []
        steps: dict[str, WeightStep] = {}
        unseen = any(bool((job.task.objective.label_counts(batch) > 0).any()) for batch in job.unseen)
        if not unseen:
            # How it was done rather than something to worry about: not logged.
            self.notes.append(
                "the step was sized on samples that it was estimated from: none are left beyond `samples`"
            )
        for number, part in enumerate([job.batches, *job.later]):
            sizing = Sizing(job.task, job.unseen if unseen else part, dtypes, self.on_progress)
            task = replace(job.task, changes=sizing.changes(steps))
            rounds.append(self._round(task, part, number) if number else first)
            solutions = rounds[-1].solutions
            direction = {n: unit_step(each.subspace, self.config.spectrum) for n, each in solutions.items()}
            search, steps = self._timed("scale", lambda s=sizing, d=direction, c=steps: s.search(c, d))  # type: ignore[misc]
            searches.append(asdict(search))
        if not any(search["multiplier"] for search in searches):
            self._note("no step along the solution lowers the loss on the samples: B starts at zero")
        factors = self._timed("scale", lambda: sizing.divided(steps, self.config.balance))
        earlier = {"earlier": searches[:-1]} if len(searches) > 1 else {}
        return rounds, factors, {**searches[-1], **earlier}

    def _round(self, task: CaptureTask, batches: Sequence[Batch], number: int) -> _Round:
        """One round, part by part; where memory runs out, the first time, the parts that are left are halved."""
        seed, gradients = self.config.seed + number, None
        if task.gradient.forward_only:
            gradients = self._timed("gradient", lambda: forward_gradients(task, batches, seed))
        found: list[_Round] = []
        done: list[Names] = []
        left: Sequence[Names] = self._parts
        while left:
            try:
                found.append(self._part(task, batches, seed, left[0], gradients))
                done, left = [*done, left[0]], left[1:]
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = f"{type(error).__name__}: {error}"
            # Only here, where the error no longer holds what the attempt had in memory.
            left = self._halved(task, batches, left, reason)
        self._parts = done
        return functools.reduce(_Round.with_layers_of, found)

    def _part(
        self,
        task: CaptureTask,
        batches: Sequence[Batch],
        seed: int,
        names: Names,
        gradients: Mapping[str, Mapping[str, Tensor]] | None,
    ) -> _Round:
        wanted = set(names)
        part = replace(task, specs=[spec for spec in task.specs if spec.name in wanted])
        estimates = estimate(part, batches, seed, self.on_progress, gradients)
        self._count(estimates.seconds)
        self.notes += [note for note in estimates.notes if note not in self.notes]
        return self._solved(estimates)

    def _halved(
        self, task: CaptureTask, batches: Sequence[Batch], left: Sequence[Names], reason: str
    ) -> Sequence[Names]:
        if task.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = max(map(len, left))
        parts = [] if self._replanned else halved(left, input_groups(task, batches))
        if len(parts) <= len(left):
            again = " again, with half as many layers at a time" if self._replanned else ""
            raise LoraDAError(
                f"memory ran out{again} while the statistics of {len(left[0])} layers were taken and solved. Give "
                "smaller batches, shorter samples, a smaller layers_per_pass, or an estimator with smaller "
                f"statistics. {reason}"
            )
        self._replanned = True
        self._note(
            f"memory ran out with {largest} layers in a pass; started again with at most {max(map(len, parts))} "
            f"({reason.splitlines()[0]})"
        )
        return parts

    def _count(self, seconds: Mapping[str, float]) -> None:
        for phase, more in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + more

    def _solved(self, estimates: Estimates) -> _Round:
        with full_float32():
            solutions = self._timed("solve", lambda: self._solutions(estimates))
        sums, specs = estimates.statistics, estimates.task.specs
        return _Round(
            solutions=solutions,
            tokens={spec.name: sums.layers[spec.name].tokens for spec in specs},
            gradient={spec.name: estimates.diagnostics(spec) for spec in specs},
            samples=sums.samples,
            label_tokens=sums.label_tokens,
            loss_sum=sums.loss_sum,
        )

    def _solutions(self, estimates: Estimates) -> dict[str, LayerSolution]:
        parts, statistics = self.components, estimates.statistics
        solver = LayerSolver(self.registry, parts.estimator, parts.solver, self.config)
        specs = {spec.name: spec for spec in estimates.task.specs}
        solutions: dict[str, LayerSolution] = {}
        waiting: dict[tuple[int, int, torch.device], list[PreparedLayer]] = {}

        def flush(alike: list[PreparedLayer]) -> None:
            found = solver.solve(alike, self._population(statistics.samples))
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
                prepared = solver.prepare(fisher, estimates.gradient(specs[name]))
                spec, device = prepared.spec, prepared.step.device
                alike = waiting.setdefault((spec.in_features, spec.rank, device), [])
                alike.append(prepared)
                del prepared  # or the layer would live on while the next one is prepared
                if len(alike) >= batch_size(spec, device):
                    flush(alike)
            fisher.shared.clear()
        for alike in waiting.values():
            if alike:
                flush(alike)
        return solutions

    def _population(self, samples: int) -> int:
        if self.config.population is not None:
            return self.config.population
        return samples * self.config.rounds

    def _layer_report(self, spec: LayerSpec, last: _Round, pair: LoraFactors) -> LayerReport:
        from lora_da_core.adapter import digest

        solution = last.solutions[spec.name]
        return LayerReport(
            name=spec.name,
            in_features=spec.in_features,
            out_features=spec.out_features,
            rank=spec.rank,
            tokens=last.tokens[spec.name],
            sigma=solution.sigma,
            ritz_values=solution.values,
            gap=solution.gap,
            residual=solution.residual,
            converged=solution.converged,
            solver=solution.solver,
            applies=solution.applies,
            damping=solution.damping,
            remedies=solution.remedies,
            gradient=last.gradient[spec.name],
            seconds=solution.seconds,
            digest_A=digest(pair.A),
            digest_B=digest(pair.B),
        )

    def _report(
        self, job: Job, layers: Sequence[LayerReport], rounds: Sequence[_Round], scale: Mapping[str, Any]
    ) -> RunReport:
        from lora_da_core import adapter

        packages = ("lora-da-core", "torch", "transformers", "peft")
        return RunReport(
            layers=tuple(layers),
            components=self.components.names(),
            options=self.components.options(),
            config=asdict(replace(self.config, population=self._population(rounds[0].samples))),
            samples=sum(each.samples for each in rounds),
            label_tokens=sum(each.label_tokens for each in rounds),
            loss=rounds[0].loss_sum / rounds[0].samples,
            scale=dict(scale),
            seconds=dict(self.seconds),
            notes=tuple(self.notes),
            versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
            base=adapter.fingerprint(job.task.model),
        )

    def _timed(self, phase: str, work: Callable[[], Outcome]) -> Outcome:
        start = time.perf_counter()
        outcome = work()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        return outcome

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.warning("%s", text)


def _factor_dtype(module: nn.Module) -> torch.dtype:
    weight = getattr(module, "weight", None)
    return accumulation_dtype(weight.dtype if isinstance(weight, Tensor) else torch.float32)
