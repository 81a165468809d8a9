"""Rounds of estimation: statistics taken and solved, part by part, until every layer has its solution."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_da_core.allocation import Allocation
from lora_da_core.blame import is_out_of_memory, reason_of
from lora_da_core.block_sweep import BlockSweep
from lora_da_core.block_trial import PASSES_INSTEAD
from lora_da_core.blocks import BlockFault
from lora_da_core.capture import CaptureTask, Progress
from lora_da_core.components import Setup
from lora_da_core.config import LoraDAConfig
from lora_da_core.errors import DataError, LoraDAError
from lora_da_core.estimation import Estimates, Job, estimate, forward_gradients, with_enough_tokens
from lora_da_core.omega import paired
from lora_da_core.passes import Names, halved, input_groups
from lora_da_core.shares import owners_of
from lora_da_core.solve_queue import SolveQueue
from lora_da_core.solving import WAITING_BYTES, LayerSolution, LayerSolver, PreparedLayer
from lora_da_core.types import Batch, LayerSpec
from lora_da_core.wide_products import full_float32
from lora_da_core.world import World

logger = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")

Keep = Callable[[CaptureTask, Sequence[Batch], Callable[[], Estimates]], Estimates]
"""Gives the stored estimates of a task and batches, or has them made and stores them."""


def keep_nothing(task: CaptureTask, batches: Sequence[Batch], compute: Callable[[], Estimates]) -> Estimates:
    """Has the estimates made.

    Args:
        task: What is run.
        batches: What it reads.
        compute: Makes the estimates.

    Returns:
        They.
    """
    return compute()


@dataclass
class Record:
    """What a run has to say beside its results: notes, and wall time by phase."""

    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Notes and logs what is new."""
        if text not in self.notes:
            self.notes.append(text)
            logger.warning("%s", text)

    def count(self, seconds: Mapping[str, float]) -> None:
        """Adds times to those of the same phases."""
        for phase, more in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + more

    def timed(self, phase: str, work: Callable[[], Outcome]) -> Outcome:
        """Does some work and counts its time."""
        start = time.perf_counter()
        outcome = work()
        self.count({phase: time.perf_counter() - start})
        return outcome


@dataclass(frozen=True)
class Round:
    """What one round of estimation came to; the statistics themselves may be gone.

    Attributes:
        specs: The layers that have a solution, at their ranks.
        solutions: By layer.
        tokens: That count for the Fisher, by layer.
        gradient: What the gradient estimator says of its own error, by layer.
        samples: How many were read.
        label_tokens: Their labels.
        loss_sum: The sum of their losses.
        allocation: What the report says of a rank allocator; empty without one.
    """

    specs: tuple[LayerSpec, ...]
    solutions: Mapping[str, LayerSolution]
    tokens: Mapping[str, int]
    gradient: Mapping[str, Mapping[str, float]]
    samples: int
    label_tokens: int
    loss_sum: float
    allocation: Mapping[str, Any] = field(default_factory=dict)

    def in_order(self, names: Names) -> Round:
        """The same with its layers in the order of `names`, which may be more."""
        specs = {spec.name: spec for spec in self.specs}
        return replace(
            self,
            specs=tuple(specs[name] for name in names if name in specs),
            solutions={name: self.solutions[name] for name in names if name in self.solutions},
            tokens={name: self.tokens[name] for name in names if name in self.tokens},
            gradient={name: self.gradient[name] for name in names if name in self.gradient},
        )

    def with_layers_of(self, other: Round) -> Round:
        """The layers of both; they come from the same samples."""
        return replace(
            self,
            specs=(*self.specs, *other.specs),
            solutions={**self.solutions, **other.solutions},
            tokens={**self.tokens, **other.tokens},
            gradient={**self.gradient, **other.gradient},
        )


def population(config: LoraDAConfig, samples: int) -> int:
    """N of a run whose first round read so many samples."""
    return samples * config.rounds if config.population is None else config.population


class Rounds:
    """Makes the rounds of one run.

    Args:
        setup: The pipeline's.
        specs: All layers at their configured ranks.
        record: Told of notes and times.
        on_progress: Told of each phase's progress.
        keep: Where the first round's estimates outlive the process.
    """

    def __init__(
        self,
        setup: Setup,
        specs: Sequence[LayerSpec],
        record: Record,
        on_progress: Progress | None,
        keep: Keep = keep_nothing,
    ) -> None:
        self._setup, self._config, self._keep = setup, setup.config, keep
        self._specs, self._record, self._on_progress = tuple(specs), record, on_progress
        allocator = setup.components.allocator
        self._allocation = None if allocator is None else Allocation(setup.registry, allocator, specs)
        self._parts: list[Names] = [[spec.name for spec in specs]]
        self._replanned = False
        self._sweep: BlockSweep | None = None
        self._waiting_bytes = WAITING_BYTES

    def first(self, job: Job, parts: Sequence[Names]) -> Round:
        """The first round; later ones take its layers and ranks over.

        Args:
            job: What is estimated.
            parts: The layers whose statistics are taken, solved and freed before those of the next are taken.

        Returns:
            The round, at the ranks that the allocator gives.

        Raises:
            LoraDAError: Memory ran out, and again with half as many layers at a time.
        """
        self._parts, self._waiting_bytes = list(parts), job.waiting_bytes or WAITING_BYTES
        return self._at_ranks(self._round(job.task, job.batches, 0))

    def first_of(self, estimates: Estimates) -> Round:
        """The first round from statistics that are there.

        Args:
            estimates: Of all layers; they stay as they are.

        Returns:
            The round, at the ranks that the allocator gives.
        """
        self._record.count(estimates.seconds)
        return self._at_ranks(self._solved(estimates, 0))

    def later(self, task: CaptureTask, batches: Sequence[Batch], number: int) -> Round:
        """A later round.

        Args:
            task: The first round's layers at their ranks, with the changes of the steps so far.
            batches: Of this round.
            number: Its number, the first round's being 0.

        Returns:
            The round.

        Raises:
            LoraDAError: As `first`.
        """
        return self._round(task, batches, number)

    def _round(self, task: CaptureTask, batches: Sequence[Batch], number: int) -> Round:
        """One round, part by part; where memory runs out, the first time, the parts that are left are halved."""
        seed, gradients = self._config.seed + number, None
        self._sweep = self._sweep_of(task, batches)
        found: list[Round] = []
        done: list[Names] = []
        left: Sequence[Names] = self._parts
        while left:
            if task.gradient.forward_only and gradients is None and len(done) + len(left) > 1:
                gradients = self._record.timed(
                    "gradient", lambda: forward_gradients(task, batches, seed, self._record.note)
                )
            try:
                found.append(self._part(task, batches, number, left[0], gradients))
                done, left = [*done, left[0]], left[1:]
                continue
            except Exception as error:
                # Processes that share a run cannot start a part again one by one: the others wait for its sums.
                if not is_out_of_memory(error) or task.world.size > 1:
                    raise
                reason = reason_of(error)
                self._sweep = None
            # Only here, where the error no longer holds what the attempt had in memory.
            left = self._halved(task, batches, left, reason)
        whole = functools.reduce(Round.with_layers_of, found)
        solved = ([name for name in part if name in whole.solutions] for part in done)
        self._parts, self._sweep = [part for part in solved if part], None
        return whole.in_order([spec.name for spec in task.specs])

    def _sweep_of(self, task: CaptureTask, batches: Sequence[Batch]) -> BlockSweep | None:
        # After memory ran out, what is left may be parts of blocks.
        if task.sweep is None or self._replanned:
            return None
        try:
            return BlockSweep(task, batches, self._parts)
        except BlockFault as fault:
            self._record.note(f"{PASSES_INSTEAD}: {fault}")
            return None

    def _part(
        self,
        task: CaptureTask,
        batches: Sequence[Batch],
        number: int,
        names: Names,
        gradients: Mapping[str, Mapping[str, Tensor]] | None,
    ) -> Round:
        wanted = set(names)
        part = replace(
            task,
            specs=[spec for spec in task.specs if spec.name in wanted],
            beside=[spec for spec in task.specs if spec.name not in wanted],
        )
        seed = self._config.seed + number
        # Of the parts of a run the first one tells whether the model repeats.
        look_twice = names == self._parts[0]

        def compute() -> Estimates:
            if self._sweep is not None:
                try:
                    return estimate(part, batches, seed, self._on_progress, gradients, look_twice, self._sweep)
                except BlockFault as fault:
                    reason, self._sweep = str(fault), None
                self._record.note(f"{PASSES_INSTEAD}: {reason}")
            return estimate(part, batches, seed, self._on_progress, gradients, look_twice)

        # What later rounds see depends on the steps of the earlier ones.
        estimates = compute() if number else self._keep(part, batches, compute)
        self._record.count(estimates.seconds)
        # What estimates note is logged already.
        self._record.notes += [note for note in estimates.notes if note not in self._record.notes]
        return self._solved(estimates, number)

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
        self._record.note(
            f"memory ran out with {largest} layers in a pass; started again with at most {max(map(len, parts))} "
            f"({reason.splitlines()[0]})"
        )
        return parts

    def _solved(self, estimates: Estimates, number: int) -> Round:
        """Solutions of the layers that saw enough tokens; in the first round at the ranks to choose from."""
        sums = estimates.statistics
        specs, left = with_enough_tokens(estimates.task.specs, sums)
        if left and number:
            raise DataError(f"in round {number + 1}: {left[0]}. Give more samples, or fewer rounds.")
        wide = (
            specs if number else self._to_choose_from(specs, {spec.name: sums.tokens_of(spec.name) for spec in specs})
        )
        with full_float32():
            solutions = self._record.timed("solve", lambda: self._solutions(estimates, wide))
        for note in left:
            self._record.note(note)
        return Round(
            specs=tuple(specs),
            solutions=solutions,
            tokens={spec.name: sums.layers[spec.name].tokens for spec in specs},
            gradient=_diagnostics(estimates, specs),
            samples=sums.samples,
            label_tokens=sums.label_tokens,
            loss_sum=sums.loss_sum,
        )

    def _to_choose_from(self, specs: Sequence[LayerSpec], tokens: Mapping[str, int]) -> Sequence[LayerSpec]:
        if self._config.pairing != "same":
            return [replace(spec, rank=2 * spec.rank) for spec in specs]
        return specs if self._allocation is None else self._allocation.largest(tokens)

    def _at_ranks(self, solved: Round) -> Round:
        """The first round with what its layers' solutions are cut to, now that all of them are there."""
        if not solved.specs:
            raise DataError(f"none of {len(self._specs)} experts saw as many tokens as its rank; give more samples.")
        if self._config.pairing != "same":
            found = {
                name: replace(each, subspace=paired(each.subspace, self._config.pairing))
                for name, each in solved.solutions.items()
            }
            return replace(solved, solutions=found)
        if self._allocation is None:
            return solved
        allocation = self._allocation
        cut = self._record.timed("solve", lambda: allocation.of(solved.solutions))
        return replace(solved, specs=cut.specs, solutions=cut.solutions, allocation=cut.record)

    def _solutions(self, estimates: Estimates, wanted: Sequence[LayerSpec]) -> dict[str, LayerSolution]:
        parts, statistics = self._setup.components, estimates.statistics
        curvature = parts.allocator is not None and parts.allocator.needs_curvature
        solver = LayerSolver(self._setup.registry, parts.estimator, parts.solver, self._config, curvature=curvature)
        world, leaders = estimates.task.world, statistics.leaders()
        custody = estimates.task.custody
        owners = owners_of(wanted, leaders, world.size) if custody is None else custody.owners
        specs = {spec.name: spec for spec in wanted if owners[spec.name] == world.rank}

        def on_solved(count: int) -> None:
            if self._on_progress is not None:
                self._on_progress("solve", count, len(specs))

        of_all = population(self._config, statistics.samples)
        queue = SolveQueue(lambda layers: solver.solve(layers, of_all), self._waiting_bytes, on_solved)
        # Layers of one input group follow each other, so that its factorisation can go when they are prepared.
        by_group: dict[str, list[str]] = {}
        for name in specs:
            by_group.setdefault(leaders[name], []).append(name)
        with queue.open():
            for names in by_group.values():
                for name in names:
                    queue.add(_prepared(solver, estimates, specs[name]))
                statistics.forget_shared(names[0])
            solutions = queue.finish()
        if world.size > 1:
            solutions = _of_all(world, solutions, estimates.task.device_of)
        return {spec.name: solutions[spec.name] for spec in wanted}


def _prepared(solver: LayerSolver, estimates: Estimates, spec: LayerSpec) -> PreparedLayer:
    """A layer ready to be solved; of sums that lie elsewhere, nothing stays here that the operators do not hold."""
    statistics = replace(estimates.statistics.of_layer(spec.name), spec=spec)
    return solver.prepare(statistics, estimates.gradient(spec))


def _diagnostics(estimates: Estimates, specs: Sequence[LayerSpec]) -> dict[str, dict[str, float]]:
    """What the gradient estimator says of its own error, by layer, from whoever has a layer's sums."""
    world, custody = estimates.task.world, estimates.task.custody
    if custody is None:
        return {spec.name: estimates.diagnostics(spec) for spec in specs}
    own = {spec.name: estimates.diagnostics(spec) for spec in specs if custody.owners[spec.name] == world.rank}
    told = world.exchange("errors of gradients", own)
    return {spec.name: told[custody.owners[spec.name]][spec.name] for spec in specs}


def _of_all(
    world: World, own: Mapping[str, LayerSolution], device_of: Callable[[str], torch.device]
) -> dict[str, LayerSolution]:
    """The solutions of all processes, on the devices of their layers."""
    host = torch.device("cpu")
    told = world.gather("solutions", {name: solution.to(host) for name, solution in own.items()})
    return {name: solution.to(device_of(name)) for theirs in told for name, solution in theirs.items()}
