"""The first half of a run: statistics and gradients, which any number of solutions can be made from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da_core import capture
from lora_da_core.batches import to_device
from lora_da_core.block_sweep import BlockSweep
from lora_da_core.capture import CaptureTask, Progress
from lora_da_core.custody import Custody
from lora_da_core.errors import DataError, PluginError
from lora_da_core.interfaces import GradientEstimator, Objective
from lora_da_core.model_state import prepared
from lora_da_core.operators import LinearMap
from lora_da_core.passes import input_groups
from lora_da_core.placement import has_sharded_parts
from lora_da_core.probe import LowRankProbe
from lora_da_core.repeatability import model_notes
from lora_da_core.running_sums import Statistics, SumsByLayer
from lora_da_core.types import Batch, LayerSpec

logger = logging.getLogger(__name__)

FEW_SAMPLES, FEW_TOKENS_PER_RANK = 8, 10
"""Below these a warning says that the estimate is poor."""


@dataclass(frozen=True, repr=False)
class Estimates:
    """What the passes over the data left behind. Rank, α, β, N, damping, scale and solver enter only later.

    Attributes:
        task: Model, modules and components the statistics belong to.
        batches: The batches that were read.
        statistics: The sums of every layer.
        gradient_sums: The gradient estimator's statistics of every layer.
        notes: What was assumed or is doubtful.
        seconds: Wall time by phase.
        later: The batches of further rounds, round by round; nothing of them has been read yet.
        unseen: Batches that nothing is estimated from, for the line search; may be empty.
    """

    task: CaptureTask
    batches: Sequence[Batch]
    statistics: Statistics
    gradient_sums: Mapping[str, Mapping[str, Tensor]]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    later: Sequence[Sequence[Batch]] = ()
    unseen: Sequence[Batch] = ()

    def __repr__(self) -> str:
        made = f"{self.task.estimator.name} and {self.task.gradient.name}"
        return f"<Estimates: {len(self.task.specs)} layers, {self.statistics.samples:,} samples, by {made}>"

    def gradient(self, spec: LayerSpec) -> LinearMap:
        """G of a layer, (out, in), made when asked for: all of them at once would double the memory.

        Args:
            spec: The layer.

        Returns:
            The mean gradient.

        Raises:
            PluginError: The gradient estimator raised, or G has a wrong shape, NaN or Inf.
        """
        named = self.task.named("gradient")
        with self._blamed(spec):
            found = self.task.gradient.gradient(self.gradient_sums[spec.name], spec, samples=self.statistics.samples)
            shape = tuple(found.shape)
            if shape != (spec.out_features, spec.in_features):
                raise PluginError(
                    f"{named} gave G of shape {shape} on layer {spec.name}, not {(spec.out_features, spec.in_features)}"
                )
            product = found.matmat(torch.ones(spec.in_features, 1, dtype=found.dtype, device=found.device))
        if not bool(product.isfinite().all()):
            raise PluginError(f"{named} gave G with NaN or Inf on layer {spec.name}")
        return found

    def diagnostics(self, spec: LayerSpec) -> dict[str, float]:
        """What the gradient estimator says of its own error on a layer."""
        if type(self.task.gradient).diagnostics is GradientEstimator.diagnostics:
            return {}  # it has nothing to say, and its sums may lie far away
        with self._blamed(spec):
            return self.task.gradient.diagnostics(self.gradient_sums[spec.name], spec, samples=self.statistics.samples)

    def _blamed(self, spec: LayerSpec) -> AbstractContextManager[None]:
        return self.task.blamed("gradient", f" on layer {spec.name}")


@dataclass(frozen=True)
class Job:
    """What a run is to estimate; nothing of it has been read yet.

    Attributes:
        task: Model, modules, all layers and components.
        batches: The batches of the first round.
        notes: What was assumed or is doubtful.
        later: The batches of further rounds, round by round.
        unseen: Batches that nothing is estimated from, for the line search; may be empty.
        waiting_bytes: Of operators of one shape that may wait for a batched solve on an accelerator; None for as many
            as pay.
    """

    task: CaptureTask
    batches: Sequence[Batch]
    notes: tuple[str, ...]
    later: Sequence[Sequence[Batch]] = ()
    unseen: Sequence[Batch] = ()
    waiting_bytes: int | None = None


def estimate(
    task: CaptureTask,
    batches: Sequence[Batch],
    seed: int,
    on_progress: Progress | None = None,
    gradient_sums: Mapping[str, Mapping[str, Tensor]] | None = None,
    look_twice: bool = True,
    sweep: BlockSweep | None = None,
) -> Estimates:
    """Runs every pass over the data and makes the gradients.

    Args:
        task: Model, modules and components.
        batches: The batches.
        seed: Of labels and directions that are drawn.
        on_progress: Told of every batch.
        gradient_sums: What `forward_gradients` gave, for a gradient that comes from forward passes; None makes it here.
        look_twice: Whether a few samples are run twice first, to tell of a model that does not repeat.
        sweep: What the statistics come from instead of a pass of their own; the layers are one of its parts.

    Returns:
        The estimates; the model is left as found.

    Raises:
        BlockFault: The model does not run block by block, as the sweep runs it.
        DataError: A layer has fewer counted tokens than its rank.
    """
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    # Later rounds run the same model; only the changes on its outputs differ.
    doubts = model_notes(task, batches) if look_twice and not task.changes else []
    task = _in_custody(task, batches)
    if sweep is None:
        statistics = capture.collect(task, batches, generator=generator, on_progress=on_progress)
    else:
        statistics = sweep.collect(task, on_progress)
    middle = time.perf_counter()
    notes = [*doubts, *check_tokens(task.specs, statistics)]
    if task.gradient.forward_only:
        if gradient_sums is None:
            gradient_sums = forward_gradients(task, batches, seed, notes.append)
    else:
        taps = {name: layer.gradient for name, layer in statistics.layers.items() if layer.group is not None}
        gradient_sums = SumsByLayer({name: tap for name, tap in taps.items() if tap is not None})
    seconds = {"statistics": middle - start, "gradient": time.perf_counter() - middle}
    for note in notes:
        logger.warning("%s", note)
    return Estimates(task, batches, statistics, gradient_sums, tuple(notes), seconds)


def _in_custody(task: CaptureTask, batches: Sequence[Batch]) -> CaptureTask:
    """The task with its layers divided among the processes, where these must run a sharded model together."""
    if task.world.size == 1 or not has_sharded_parts(task.model):
        return task
    estimator, gradient = task.estimator, task.gradient
    # Sums that are added batch by batch must be of one pass, and found in the same order on all processes.
    adds = estimator.additive and estimator.passes == 1 and (gradient.forward_only or gradient.additive)
    alike = estimator.labels != "exact" and all(spec.expert is None for spec in task.specs)
    groups = input_groups(task, batches)
    return replace(task, custody=Custody.of(task.specs, groups, task.world.size, adds=adds and alike))


def forward_gradients(
    task: CaptureTask, batches: Sequence[Batch], seed: int, note: Callable[[str], None]
) -> dict[str, dict[str, Tensor]]:
    """What a gradient estimator that needs no backward pass finds; all layers at once, since it moves all together.

    Args:
        task: Model, modules and components.
        batches: The batches.
        seed: Of directions that are drawn.
        note: Told where memory ran out and batches were halved.

    Returns:
        The gradient's statistics by layer.

    Raises:
        PluginError: The estimator raised.
    """
    generator = torch.Generator().manual_seed(seed)
    with task.blamed("gradient"), LowRankProbe(task, batches, note) as probe:
        return task.gradient.estimate(probe, task.specs, generator=generator)


def complete(task: CaptureTask, batches: list[Batch]) -> list[Batch]:
    """What the objective asks of the unchanged model, added to the batches; processes that share the run share this.

    Args:
        task: Model and objective.
        batches: The batches.

    Returns:
        The batches themselves where the objective adds nothing, else completed ones, on the CPU, cut where the share of
        a process ends.

    Raises:
        PluginError: The objective raised.
    """
    objective = task.objective
    if type(objective).complete is Objective.complete:
        return batches
    # Processes that gather each other's weights run everything alike.
    shared = task.world.size > 1 and not has_sharded_parts(task.model)
    mine = [batch for _, batch in task.share(batches).batches] if shared else batches
    with prepared(task.model), task.base_only(), torch.no_grad(), task.blamed("objective"):
        found: list[Batch] = [
            to_device(objective.complete(task.model, to_device(batch, task.device)), torch.device("cpu"))
            for batch in mine
        ]
    if not shared:
        return found
    return [batch for theirs in task.world.gather("completed batches", found) for batch in theirs]


def check_tokens(specs: Sequence[LayerSpec], statistics: Statistics) -> list[str]:
    """Whether every layer saw enough tokens for its rank.

    Args:
        specs: The layers with their ranks.
        statistics: The counts.

    Returns:
        A note where tokens are few.

    Raises:
        DataError: A layer saw fewer tokens than its rank.
    """
    for spec in specs:
        tokens = statistics.tokens_of(spec.name)
        if tokens < spec.rank and spec.expert is None:
            raise DataError(
                f"layer {spec.name}: {tokens} tokens count for the Fisher, fewer than the rank {spec.rank}. "
                "Give more samples, a smaller rank, or token_mask='attention'."
            )
    used, _ = with_enough_tokens(specs, statistics)
    if not used:
        return []
    fewest = min(used, key=lambda spec: statistics.tokens_of(spec.name) / spec.rank)
    tokens, wanted = statistics.tokens_of(fewest.name), FEW_TOKENS_PER_RANK * fewest.rank
    if tokens >= wanted:
        return []
    return [f"layer {fewest.name}: only {tokens} tokens for rank {fewest.rank}; give at least {wanted}"]


def with_enough_tokens(specs: Sequence[LayerSpec], statistics: Statistics) -> tuple[list[LayerSpec], list[str]]:
    """The layers that can be initialised: of experts, those that tokens were routed to.

    Args:
        specs: The layers with their ranks.
        statistics: The counts.

    Returns:
        The layers that saw at least as many tokens as their rank, and what is to be said of the others.
    """
    kept = [spec for spec in specs if statistics.tokens_of(spec.name) >= spec.rank]
    left = [spec for spec in specs if statistics.tokens_of(spec.name) < spec.rank]
    return kept, [
        f"left at PEFT's own initialisation: {spec.name} ({statistics.tokens_of(spec.name)} tokens that count were "
        f"routed to this expert, fewer than the rank {spec.rank})"
        for spec in left
    ]


def sample_notes(counts: Tensor) -> list[str]:
    """What is doubtful about the samples.

    Args:
        counts: Labels of every sample, (samples,).

    Returns:
        Notes, none where nothing is.
    """
    notes = []
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        listed = ", ".join(map(str, empty[:8])) + (", …" if len(empty) > 8 else "")
        notes.append(f"{len(empty)} of {len(counts)} samples have no labels and are left out (samples {listed})")
    usable = len(counts) - len(empty)
    if usable < FEW_SAMPLES:
        notes.append(f"only {usable} samples: the estimate is poor; give at least {FEW_SAMPLES}, better 64")
    return notes
