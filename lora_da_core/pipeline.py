"""Assembles a pipeline from installed plugins and runs it: statistics, solutions, scale, factors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_da_core.blame import blamed, shortage_named
from lora_da_core.block_trial import PASSES_INSTEAD, fault
from lora_da_core.budget import plan_note, plan_within, with_sums, within
from lora_da_core.cache import StatisticsCache
from lora_da_core.cache_identity import Identity
from lora_da_core.capture import CaptureTask, Progress
from lora_da_core.components import Components, Setup
from lora_da_core.config import NO_ALLOCATOR, ComponentChoice, LoraDAConfig, Preset
from lora_da_core.display import html_table
from lora_da_core.distributed import joined
from lora_da_core.errors import OptionError
from lora_da_core.estimation import Estimates, Job, check_tokens, estimate
from lora_da_core.finish import Finish
from lora_da_core.function_objective import LossFunction, objective_of
from lora_da_core.interfaces import LayerFisher
from lora_da_core.memory.workload import limit_in_bytes
from lora_da_core.memory.workspace import Measured
from lora_da_core.model_state import random_states_kept
from lora_da_core.passes import Names, divided_layers, input_groups
from lora_da_core.placement import has_sharded_parts
from lora_da_core.preparation import check_ranks, job_of
from lora_da_core.registry import Registry
from lora_da_core.rounds import Keep, keep_nothing
from lora_da_core.types import Batch, LoraDAResult
from lora_da_core.world import ALONE, World

if TYPE_CHECKING:
    from peft import LoraConfig


logger = logging.getLogger(__name__)

DEFAULT_PRESET = "robust"

_SMALLER = "Give smaller batches, shorter samples, or an estimator with smaller statistics"
"""The start of what helps against a shortage of memory."""


def build_pipeline(
    estimator: ComponentChoice | None = None,
    solver: ComponentChoice | None = None,
    gradient: ComponentChoice | None = None,
    objective: ComponentChoice | LossFunction = "causal_lm",
    *,
    allocator: ComponentChoice | None = None,
    preset: str = DEFAULT_PRESET,
    config: LoraDAConfig | None = None,
) -> Pipeline:
    """Assembles a pipeline; every name and option is checked here, before any model is touched.

    Args:
        estimator: Fisher estimator, a name or (name, options); None takes the preset's.
        solver: Solver, likewise; `"auto"` chooses per layer.
        gradient: Gradient estimator, likewise.
        objective: The loss that is differentiated, likewise, or a function of model and batch (on the model's device)
            that returns per-sample losses (samples,).
        allocator: Shares the ranks out among the layers, likewise; `"none"` leaves every layer the rank that the LoRA
            configuration gives it.
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
    shared_out = base.allocator if allocator is None else allocator
    parts = Components(
        estimator=registry.create("estimator", base.estimator if estimator is None else estimator),
        gradient=registry.create("gradient", base.gradient if gradient is None else gradient),
        objective=objective_of(objective) if callable(objective) else registry.create("objective", objective),
        solver=None if chosen == "auto" else registry.create("solver", chosen),
        allocator=None if shared_out == NO_ALLOCATOR else registry.create("allocator", shared_out),
    )
    parts.check()
    if parts.solver is None:
        registry.choose_solver(1, 1, "cpu")
    return Pipeline(registry, parts, config or base.config)


class Pipeline:
    """A ready pipeline; it holds no state of a run, so it can be run any number of times."""

    def __init__(self, registry: Registry, components: Components, config: LoraDAConfig) -> None:
        self.registry = registry
        self.components = components
        self.config = config
        self.measured: dict[Any, Measured] = {}
        """What plans have found the components to take on small layers, which is the same for every model."""

    @property
    def _setup(self) -> Setup:
        return Setup(self.registry, self.components, self.config)

    def __repr__(self) -> str:
        names = ", ".join(f"{kind}={name!r}" for kind, name in self.components.names().items())
        return f"Pipeline({names}, config={self.config!r})"

    @random_states_kept()
    @shortage_named("the layers were initialised", f"{_SMALLER}; layers_per_pass and max_memory divide the layers.")
    def run(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        peft_config: LoraConfig | None = None,
        *,
        adapter_name: str = "default",
        on_progress: Progress | None = None,
        cache_dir: Path | str | None = None,
        max_memory: int | str | None = None,
        offload_dir: Path | str | None = None,
        world: World | None = None,
    ) -> LoraDAResult:
        """Estimates, solves and scales; the model is left exactly as found.

        In an initialised process group every process calls this alike, with the same model and data, and gets the same
        result; each does its share of the work.

        Args:
            model: A base model, or a PeftModel that carries the adapter.
            batches: Mappings of tensors whose first dimension counts samples, with `labels`.
            peft_config: The LoRA configuration; None takes the PeftModel's own.
            adapter_name: The adapter, where the model carries several.
            on_progress: Told of each phase's progress.
            cache_dir: A directory in which statistics outlive this process, so that a run on the same model and data
                that changes only solver, rank, α, β, N, damping or scale makes no pass for them. Where layers are
                divided, the statistics of each part are kept.
            max_memory: A limit in bytes, or a size such as `24GiB`, that weights, statistics and what is computed keep
                within by plan; layers are divided into parts of blocks that are run again, or among passes, batches
                into smaller ones, and sums kept on the host or on disk, as takes least time. Libraries come on top.
            offload_dir: Where sums go that are kept on disk: a file without a name, which is gone however the run
                ends. None takes the system's temporary directory.
            world: The processes that share the run, where the caller has brought them together; None does so here.

        Returns:
            The factors as the adapter stores them, before PEFT's scaling, and the report.

        Raises:
            OptionError: No division keeps within the limit, or a cache is given and the objective is a plain function.
            LoraDAError: Something is wrong with options, targets, data, model or a plugin; the message says what.
        """
        limit = limit_in_bytes(max_memory)
        with self._world(world) as shared:
            keep = self._keeper(cache_dir, shared)
            on_progress = shared.watched(on_progress)
            job = job_of(self._setup, model, batches, peft_config, adapter_name, shared)
            job, parts = self._divided(model, job, adapter_name, limit, offload_dir)
            return Finish(self._setup, job, on_progress, keep).result(parts)

    def _divided(
        self,
        model: nn.Module,
        job: Job,
        adapter_name: str,
        max_memory: int | None,
        offload_dir: Path | str | None,
    ) -> tuple[Job, Sequence[Names]]:
        """The layers of each part, and the job with the place of its sums and what is to be said of the plan."""
        most = self.config.layers_per_pass
        if max_memory is not None:
            if most != "auto" or adapter_name != "default":
                raise OptionError("max_memory plans for the adapter 'default' and layers_per_pass='auto' only.")
            plan = plan_within(self, model, job, max_memory)
            if plan.schedule == "blocks":
                # On the data as they come: what is tried does not depend on batches.
                wrong = fault(within(plan, job).task, job.batches, plan.parts)
                if wrong is not None:
                    job = replace(job, notes=(*job.notes, f"{PASSES_INSTEAD}: {wrong}"))
                    logger.warning("%s", job.notes[-1])
                    plan = plan_within(self, model, job, max_memory, by_block=False)
            logger.info("%s", plan_note(plan))
            return with_sums(within(plan, job), plan.statistics_device, offload_dir, plan.offloaded_bytes), plan.parts
        job = with_sums(job, self.config.statistics_device, offload_dir)
        if most == "auto" or most >= len(job.task.specs):
            return job, [[spec.name for spec in job.task.specs]]
        return job, divided_layers(input_groups(job.task, job.batches), most)

    @random_states_kept()
    @shortage_named(
        "the statistics of all layers were taken and kept",
        f"{_SMALLER}; without a cache, run divides the layers by layers_per_pass or max_memory.",
    )
    def estimate(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        peft_config: LoraConfig | None = None,
        *,
        adapter_name: str = "default",
        on_progress: Progress | None = None,
        cache_dir: Path | str | None = None,
        offload_dir: Path | str | None = None,
    ) -> Estimates:
        """The first half of `run`: the passes over the data, whose sums serve any solver, rank, α, β, damping, scale.

        The statistics of all layers are kept, whatever `layers_per_pass` says: `run` alone can free them part by part.

        Args:
            model: As `run` takes it.
            batches: As `run` takes them.
            peft_config: As `run` takes it.
            adapter_name: As `run` takes it.
            on_progress: As `run` takes it.
            cache_dir: As `run` takes it; of several rounds, the first one's statistics are kept.
            offload_dir: As `run` takes it.

        Returns:
            The estimates, to be given to `solve` of this pipeline or of one with the same estimators.

        Raises:
            OptionError: A cache is given and the objective is a plain function.
            StorageError: The cache cannot be written.
        """
        with self._world(None) as shared:
            keep = self._keeper(cache_dir, shared)
            on_progress = shared.watched(on_progress)
            job = job_of(self._setup, model, batches, peft_config, adapter_name, shared)
            job = with_sums(job, self.config.statistics_device, offload_dir)
            task, first = job.task, job.batches
            found = keep(task, first, partial(estimate, task, first, self.config.seed, on_progress))
        return replace(found, notes=(*job.notes, *found.notes), later=job.later, unseen=job.unseen)

    def _keeper(self, cache_dir: Path | str | None, world: World) -> Keep:
        """Where estimates outlive the process; a directory that cannot be written is refused at once."""
        if cache_dir is None:
            return keep_nothing
        cache = StatisticsCache(Path(cache_dir))
        if world.rank == 0:
            cache.check()

        def keep(task: CaptureTask, batches: Sequence[Batch], compute: Callable[[], Estimates]) -> Estimates:
            from lora_da_core import adapter

            if task.world.size > 1 and has_sharded_parts(task.model):
                raise OptionError("a sharded model's statistics are divided among its processes; leave out cache_dir.")
            identity = Identity.of(task, batches, seed=self.config.seed, base=adapter.fingerprint(task.model))
            return cache.estimates(identity, task, batches, compute)

        return keep

    def _world(self, world: World | None) -> AbstractContextManager[World]:
        """The processes that share a run."""
        if world is not None or self.config.distributed == "off":
            return contextlib.nullcontext(world or ALONE)
        return joined(self.config.process_timeout)

    @random_states_kept()
    @shortage_named(
        "estimates were solved", "Estimate fewer layers at a time, or let run divide them by layers_per_pass."
    )
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
            OptionError: The estimates were made with other estimators, another token mask, other layers or for another
                number of rounds.
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
        if len(estimates.later) + 1 != self.config.rounds:
            made_for = f"rounds={len(estimates.later) + 1}"
            raise OptionError(f"these estimates were made for {made_for}, not {self.config.rounds}; estimate again.")
        specs = tuple(made.specs)
        if peft_config is not None:
            specs = adapter.resolve_targets(made.model, peft_config, unsupported=self.config.unsupported).specs
        if {spec.name for spec in specs} != {spec.name for spec in made.specs}:
            raise OptionError("the LoRA configuration adapts other layers than were estimated; estimate again.")
        check_ranks(self._setup, made.model, specs)
        check_tokens(specs, estimates.statistics)
        with self._world(None) as shared:
            task, more = replace(made, specs=specs, world=shared), (estimates.later, estimates.unseen)
            job = Job(task, estimates.batches, estimates.notes, *more)
            finish = Finish(self._setup, job, shared.watched(on_progress))
            return finish.solved_again(estimates)

    def fishers(self, estimates: Estimates, *, damping: float | None = None) -> dict[str, LayerFisher]:
        """The Fisher of every layer, for what else a Fisher is good for.

        Args:
            estimates: From `estimate`, of a pipeline with the same estimator.
            damping: Replaces the configuration's, of the same kind.

        Returns:
            By layer.
        """
        if estimates.task.custody is not None:
            raise OptionError("a sharded model's statistics are divided among its processes: none has all Fishers.")
        config, estimator = self.config, self.components.estimator
        found = {}
        for spec in estimates.task.specs:
            with blamed(f"estimator {estimator.name!r}", f" on layer {spec.name}"):
                found[spec.name] = estimator.fisher(
                    estimates.statistics.of_layer(spec.name),
                    damping=config.damping if damping is None else damping,
                    damping_kind=config.damping_kind,
                    fisher_scale=config.fisher_scale,
                )
        return found

    def _repr_html_(self) -> str:
        options = self.components.options()
        rows = [
            (kind, name, ", ".join(f"{key}={value!r}" for key, value in options[kind].items()))
            for kind, name in self.components.names().items()
        ]
        changed = self.config.changed()
        settings = ((key, repr(value), "" if key in changed else "default") for key, value in vars(self.config).items())
        return html_table(rows, ("component", "name", "options")) + html_table([*settings], ("setting", "value", ""))
