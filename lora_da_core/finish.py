"""The second half of a run: scale, factors and report, from solutions."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch

from lora_da_core.capture import Progress
from lora_da_core.components import Setup
from lora_da_core.config import LoraDAConfig
from lora_da_core.estimation import Estimates, Job
from lora_da_core.omega import WeightStep, fixed_factors, of_norm, stable_factors, unit_step
from lora_da_core.passes import Names
from lora_da_core.rounds import Keep, Record, Round, Rounds, keep_nothing, population
from lora_da_core.scale import SURE
from lora_da_core.sizing import Sizing
from lora_da_core.types import LayerReport, LayerSpec, LoraDAResult, LoraFactors, RunReport

logger = logging.getLogger(__name__)


class Finish:
    """Makes the result of one run.

    Args:
        setup: The pipeline's.
        job: What is estimated: all layers at the ranks and scalings that are wanted.
        on_progress: Told of each phase's progress.
        keep: Where the first round's estimates outlive the process.
    """

    def __init__(
        self,
        setup: Setup,
        job: Job,
        on_progress: Progress | None,
        keep: Keep = keep_nothing,
    ) -> None:
        self.setup, self.config, self.job, self.on_progress = setup, setup.config, job, on_progress
        self.record = Record([*job.notes])
        self.rounds = Rounds(setup, job.task.specs, self.record, on_progress, keep)

    def solved_again(self, estimates: Estimates) -> LoraDAResult:
        """All phases after the first round's estimation.

        Args:
            estimates: Of the first round.

        Returns:
            The factors and the report.
        """
        return self._result(self.rounds.first_of(replace(estimates, task=self.job.task)))

    def result(self, parts: Sequence[Names]) -> LoraDAResult:
        """All phases in order.

        Args:
            parts: The layers whose statistics are taken, solved and freed before those of the next are taken.

        Returns:
            The factors and the report.
        """
        return self._result(self.rounds.first(self.job, parts))

    def _result(self, first: Round) -> LoraDAResult:
        from lora_da_core import adapter

        job = replace(self.job, task=replace(self.job.task, specs=first.specs))
        dtypes = {spec.name: job.task.dtype_of(spec) for spec in first.specs}
        if self.config.automatic_scale:
            rounds, factors, scale = self._searched(job, first, dtypes)
        else:
            rounds = [first]
            factors, scale = self.record.timed("scale", lambda: self._scaled(job, first, dtypes))
        # Every process has computed the same from the same solutions; equal devices round alike, others may not.
        job.task.world.equalise("factors", [each for pair in factors.values() for each in (pair.A, pair.B)])
        if job.task.world.size > 1:
            self.record.notes.append(f"{job.task.world.size} processes shared the run")
        self.record.notes += _start_notes(self.config)
        reports = [_layer_report(spec, rounds[-1], factors[spec.name]) for spec in first.specs]
        for report in reports:
            for fault in self.setup.registry.layer_finished(report.name, report):
                logger.warning("%s", fault)
        stored = adapter.as_stored(self.job.task.specs, factors, self.config.seed)
        return LoraDAResult(stored, self._report(reports, rounds, scale))

    def _scaled(
        self, job: Job, solved: Round, dtypes: Mapping[str, torch.dtype]
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
            sizing = Sizing(job.task, job.batches, dtypes, self.record.note, self.on_progress)
            found = sizing.divided(steps, self.config.balance)
        foreign = self.config.pairing != "same" or not self.setup.components.gradient.follows_loss
        if self.config.offset == "none" and foreign and any(bool(pair.B.any()) for pair in found.values()):
            self.record.note(
                "the method starts at the base's function, which this adapter changes by scaling·B·A: "
                "offset='base' or 'frozen_adapter' takes that out"
            )
        known = {} if rule == "unit" else {"gamma": gamma}
        return found, known if rule == "fixed" else {"rule": rule, **known}

    def _searched(
        self, job: Job, first: Round, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[list[Round], dict[str, LoraFactors], dict[str, Any]]:
        """Round by round: estimate where the steps so far lead, solve, and go as far along the solution as pays."""
        rounds: list[Round] = []
        searches: list[dict[str, Any]] = []
        steps: dict[str, WeightStep] = {}
        unseen = any(bool((job.task.objective.label_counts(batch) > 0).any()) for batch in job.unseen)
        if not unseen:
            # How it was done rather than something to worry about: not logged.
            self.record.notes.append(
                "the step was sized on samples that it was estimated from: none are left beyond `samples`"
            )
        # What samples say of others by their standard error, they say only of a direction that is not theirs.
        margin = SURE if unseen else 0.0
        for number, part in enumerate([job.batches, *job.later]):
            sizing = Sizing(job.task, job.unseen if unseen else part, dtypes, self.record.note, self.on_progress)
            task = replace(job.task, changes=sizing.changes(steps))
            rounds.append(self.rounds.later(task, part, number) if number else first)
            solutions = rounds[-1].solutions
            direction = {n: unit_step(each.subspace, self.config.spectrum) for n, each in solutions.items()}
            search, steps = self.record.timed("scale", lambda s=sizing, d=direction, c=steps: s.search(c, d, margin))  # type: ignore[misc]
            searches.append(asdict(search))
        if not any(search["multiplier"] for search in searches):
            self.record.note("no step along the solution surely lowers the loss on the samples: B starts at zero")
        factors = self.record.timed("scale", lambda: sizing.divided(steps, self.config.balance))
        earlier = {"earlier": searches[:-1]} if len(searches) > 1 else {}
        return rounds, factors, {**searches[-1], **earlier}

    def _report(self, layers: Sequence[LayerReport], rounds: Sequence[Round], scale: Mapping[str, Any]) -> RunReport:
        from lora_da_core import adapter

        first = rounds[0]
        packages = ("lora-da-core", "torch", "transformers", "peft")
        return RunReport(
            layers=tuple(layers),
            components=self.setup.components.names(),
            options=self.setup.components.options(),
            config=asdict(replace(self.config, population=population(self.config, first.samples))),
            samples=sum(each.samples for each in rounds),
            label_tokens=sum(each.label_tokens for each in rounds),
            loss=first.loss_sum / first.samples,
            scale=dict(scale),
            seconds=dict(self.record.seconds),
            notes=tuple(self.record.notes),
            versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
            base=adapter.fingerprint(self.job.task.model),
            allocation=first.allocation,
        )


def _layer_report(spec: LayerSpec, last: Round, pair: LoraFactors) -> LayerReport:
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
