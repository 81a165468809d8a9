"""How a run keeps within a limit of memory: the plan of its own model and data decides how layers are divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor, nn

from lora_da_core.batches import cut
from lora_da_core.capture import SweepSettings
from lora_da_core.errors import OptionError
from lora_da_core.estimation import Job
from lora_da_core.memory import Plan, estimate_memory, plan_of
from lora_da_core.memory.division import Limits
from lora_da_core.memory.layers import PlannedModel
from lora_da_core.memory.workload import Workload, size_text
from lora_da_core.placement import is_partitioned, largest_module_bytes, resident_bytes
from lora_da_core.sums_storage import storage_at
from lora_da_core.types import Batch, StatisticsDevice
from lora_da_core.world import World

if TYPE_CHECKING:
    from peft import LoraConfig

    from lora_da_core.pipeline import Pipeline


def workload_of(batches: Sequence[Batch]) -> Workload:
    """What a plan has to know of data that are there.

    Args:
        batches: Mappings with `labels`, (samples, …); of preferences (pairs, 2, tokens).

    Returns:
        The workload, padding counted as tokens.
    """
    labels: list[Tensor] = [batch["labels"] for batch in batches]
    # Batches of shorter samples hold more of them: what counts is the batch of most tokens.
    largest = max(each.numel() for each in labels)
    # Whoever has one label per sample has no length that labels tell; a plan knows no shorter sample than 2 tokens.
    texts = max(each.shape[1] if each.ndim == 3 else 1 for each in labels)
    lengths = [max(2, each[0].numel() // texts) for each in labels if len(each)]
    return Workload(
        samples=sum(map(len, labels)),
        max_length=max(lengths),
        tokens=sum(each.numel() for each in labels),
        batch_size=min(max(map(len, labels)), -(-largest // (texts * max(lengths)))),
        texts=texts,
    )


def plan_within(
    pipeline: Pipeline,
    model: nn.Module,
    job: Job,
    max_memory: int,
    *,
    by_block: bool = True,
) -> Plan:
    """The plan that keeps a run within a limit and takes least time.

    Args:
        pipeline: What will run.
        model: As `Pipeline.run` takes it.
        job: What will run.
        max_memory: Bytes.
        by_block: Whether one process may run blocks again, part by part.

    Returns:
        The plan, the same on all processes.

    Raises:
        OptionError: Not even the layers of one input per pass keep within the limit; the message says what would do.
            Or ZeRO-3 shards the model.
    """
    from lora_da_core.adapter import Targets

    if is_partitioned(job.task.model):
        raise OptionError("max_memory cannot plan for a model that DeepSpeed's ZeRO-3 shards; give layers_per_pass.")
    task = job.task
    targets = Targets(tuple(task.specs), task.modules)
    limits = Limits(max_memory, None if task.device.type == "cpu" else host_memory(task.world))
    planned = PlannedModel(model, targets, pipeline, workload_of(job.batches), task.device)
    plan = plan_of(planned, limits, by_block=by_block and task.world.size == 1)
    if not plan.fits:
        raise OptionError(
            f"max_memory is {size_text(max_memory)}; the smallest that works for this model, data and pipeline is "
            f"{plan.peak_bytes} bytes ({size_text(plan.peak_bytes)}), in {plan.passes} passes. {plan.notes[-1]}"
        )
    return plan


def host_memory(world: World) -> int:
    """Bytes that each process of a run may take of the host's memory, the same on all, who are taken to share it."""
    return int(min(world.exchange("host memory", psutil.virtual_memory().available)) // world.size)


def with_sums(job: Job, place: StatisticsDevice, directory: Path | str | None, expected: int = 0) -> Job:
    """The job with its sums in a place.

    Args:
        job: What will run.
        place: Where sums lie between updates.
        directory: Where those on disk go.
        expected: Their bytes by plan; 0 where nothing is planned.

    Returns:
        The job.

    Raises:
        StorageError: The directory cannot be written, or too little of it is free.
    """
    return replace(job, task=replace(job.task, storage=storage_at(place, directory, expected)))


def resident_within(
    pipeline: Pipeline,
    shapes: nn.Module,
    peft_config: LoraConfig,
    batches: Sequence[Batch],
    device: torch.device,
    max_memory: int,
    *,
    by_block: bool = True,
) -> int | None:
    """How much of a model's weights may stay on the device, so that a run keeps within a limit.

    Every pass over the data reads the offloaded weights twice, so few passes come first: weights get what one pass
    over the data with all layers leaves of the limit, and none where more passes are needed.

    Args:
        pipeline: What will run.
        shapes: The model on the meta device.
        peft_config: The LoRA configuration.
        batches: Of one round.
        device: Where it will run.
        max_memory: Bytes.
        by_block: Whether one process may run blocks again, part by part.

    Returns:
        Bytes; None where the whole model may.
    """
    workload = workload_of(batches)
    plan = partial(
        estimate_memory, shapes, peft_config, pipeline=pipeline, workload=workload, device=device, by_block=by_block
    )
    if plan(max_memory=max_memory).fits:
        return None
    return max(0, max_memory - (plan().peak_bytes - resident_bytes(shapes)) - largest_module_bytes(shapes))


def within(plan: Plan, job: Job) -> Job:
    """The job in batches of the plan's size and in its order, with a note of what was planned."""
    sweep = None if plan.hidden_states == "none" else SweepSettings(plan.hidden_states, plan.head_alone)
    return replace(
        job,
        task=replace(job.task, sweep=sweep),
        waiting_bytes=plan.waiting_bytes,
        batches=cut(job.batches, plan.batch_size, plan.batch_tokens),
        later=[cut(batches, plan.batch_size, plan.batch_tokens) for batches in job.later],
        unseen=cut(job.unseen, plan.batch_size, plan.batch_tokens),
        notes=(*job.notes, plan_note(plan)),
    )


def plan_note(plan: Plan) -> str:
    """One sentence for the report: what was planned for the limit."""
    away = plan.offloaded_bytes
    elsewhere = f", and {size_text(away)} of statistics on the {plan.statistics_device}" if away else ""
    order = f"{plan.passes} passes over the data of a round"
    if plan.schedule == "blocks":
        kept = f"{size_text(plan.hidden_bytes)} of hidden states on the {plan.hidden_states}"
        order = f"one sweep over the data of a round in {len(plan.parts)} parts of blocks with {kept}"
    return (
        f"planned for a limit of {size_text(plan.max_memory or 0)}: at most {plan.layers_per_pass} of {plan.layers} "
        f"layers and {plan.batch_tokens} tokens at a time, {order}, a peak of {size_text(plan.peak_bytes)}{elsewhere}"
    )
