"""The plan of a run: bytes and passes, from shapes alone, before weights or data are touched."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lora_da_core.block_trial import PASSES_INSTEAD
from lora_da_core.display import html_table
from lora_da_core.errors import OptionError
from lora_da_core.memory.division import Division, Limits, best_division
from lora_da_core.memory.layers import PlannedModel
from lora_da_core.memory.phases import PlanRow, by_phase, statistics_of
from lora_da_core.memory.workload import Workload, limit_in_bytes, size_text
from lora_da_core.placement import model_device
from lora_da_core.types import StatisticsDevice

if TYPE_CHECKING:
    from peft import LoraConfig

    from lora_da_core.pipeline import Pipeline


@dataclass(frozen=True, repr=False)
class Plan:
    """What a run will take; the process itself, its libraries above all, comes on top.

    Attributes:
        peak_bytes: Most bytes at a time: of the phase that takes most.
        passes: How often the data is read.
        schedule: `passes` where each part of the layers takes a pass over the data; `blocks` where one sweep takes all,
            in which parts of the model's blocks are run again, the last ones first.
        seconds: Time of these passes at the throughput that was given; None where none was. A pass that taps some of
            the layers takes less than one that taps all.
        relative_time: What these passes take, in units of one over all layers with sums on the device; moving sums and
            offloaded weights is counted at assumed speeds of links.
        tokens: Tokens that each of them reads.
        weights: Bytes of the model.
        statistics_bytes: Statistics of all layers together.
        statistics_device: Where they lie while no layer adds to them or is solved: `device`, `host` or `disk`.
        offloaded_bytes: Most bytes of them at a time that are on the host or on disk; 0 where they are on the device.
        layers: How many layers are adapted.
        layers_per_pass: How many of them at most have their statistics taken at a time.
        parts: The names of the layers of each part.
        hidden_states: Where hidden states lie between the parts of a sweep: `device`, `host`, or `none` where there is
            no sweep.
        hidden_bytes: Most bytes of them at a time.
        head_alone: Whether what follows the blocks is run before the first part of a sweep, else together with it.
        waiting_bytes: Most bytes of operators of one shape that wait for a batched solve on an accelerator.
        batch_size: Samples of the greatest length in a batch: the workload's, or fewer where the limit asks for it.
        batch_tokens: The tokens of such a batch.
        max_memory: The limit that was given.
        fits: Whether the peak is within the limit, and what lies on the host within the memory it has.
        rows: What the peak of every phase is made of.
        notes: What was assumed, and what to change where it does not fit.
    """

    peak_bytes: int
    passes: int
    schedule: Literal["passes", "blocks"]
    seconds: float | None
    relative_time: float
    tokens: int
    weights: int
    statistics_bytes: int
    statistics_device: StatisticsDevice
    offloaded_bytes: int
    layers: int
    layers_per_pass: int
    parts: tuple[tuple[str, ...], ...]
    hidden_states: Literal["device", "host", "none"]
    hidden_bytes: int
    head_alone: bool
    waiting_bytes: int
    batch_size: int
    batch_tokens: int
    max_memory: int | None
    fits: bool
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        passes += f" in {len(self.parts)} parts" if self.schedule == "blocks" else ""
        limit = (
            "" if self.max_memory is None else f" of {size_text(self.max_memory)}{'' if self.fits else ', too much'}"
        )
        return f"<Plan: {size_text(self.peak_bytes)}{limit}, {passes}, {self.layers} layers>"

    def _repr_html_(self) -> str:
        totals = [(phase, "together", size_text(total)) for phase, total in self.phases().items()]
        rows = [(row.phase, row.what, size_text(row.bytes)) for row in self.rows]
        notes = [("note", sentence, "") for sentence in self.notes]
        fits = "" if self.max_memory is None else f"of {size_text(self.max_memory)}{'' if self.fits else ': too much'}"
        peak = [("peak", fits, size_text(self.peak_bytes)), ("passes", "over the data", str(self.passes))]
        if self.schedule == "blocks":
            peak.append(("parts of blocks", f"hidden states on the {self.hidden_states}", size_text(self.hidden_bytes)))
        away = [("elsewhere", f"statistics on the {self.statistics_device}", size_text(self.offloaded_bytes))]
        shown = [*rows, *totals, *peak, *(away if self.offloaded_bytes else []), *notes]
        return html_table(shown, ("phase", "what", "memory"))

    def phases(self) -> dict[str, int]:
        """Bytes by phase, in order."""
        return by_phase(self.rows)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def estimate_memory(
    model: nn.Module,
    peft_config: LoraConfig | None = None,
    *,
    pipeline: Pipeline,
    workload: Workload | None = None,
    device: str | torch.device | None = None,
    max_memory: int | str | None = None,
    host_memory: int | None = None,
    throughput: float | None = None,
    by_block: bool = True,
) -> Plan:
    """Plans a run from the model's shapes; neither its weights nor data are read, so it may be on the meta device.

    A batch runs forward and backward on fake tensors, which shows what it takes and which layers read one input, and
    the components run on small layers of random numbers, which shows what they take beside their statistics. Where
    the model cannot run on fake tensors, a rule takes the place of the former, and a note says so.

    Args:
        model: A base model, or a PeftModel that carries the adapter `default`.
        peft_config: The LoRA configuration; None takes the PeftModel's own.
        pipeline: The pipeline that will run.
        workload: The data; None takes 64 samples of 1024 tokens.
        device: Where it will run; None takes the model's device, for `meta` the CPU.
        max_memory: A limit in bytes, or a size such as `24GiB`; layers are then divided into parts of blocks that are
            run again in one sweep, or among passes over the data, batches cut into smaller ones, and sums kept on the
            host or on disk, as takes least time.
        host_memory: Bytes that the host has for statistics of an accelerator; None takes it to have enough.
        throughput: Tokens per second of a pass over all layers, as measured on that device.
        by_block: Whether blocks may be run again, part by part, in one sweep over the data; else every part of the
            layers takes a pass.

    Returns:
        The plan; with a limit that nothing meets, the smallest there is, with a note.

    Raises:
        OptionError: The limit or the throughput is no size or not above 0.
        TargetError: PEFT finds nothing to adapt.
        PluginError: A component raised on a small layer.
    """
    from lora_da_core import adapter

    limits = Limits(limit_in_bytes(max_memory), host_memory)
    lora = adapter.chosen_config(model, peft_config, "default")
    targets = adapter.resolve_targets(model, lora, unsupported=pipeline.config.unsupported)
    planned = PlannedModel(model, targets, pipeline, workload or Workload(), _device_of(model, device))
    return plan_of(planned, limits, throughput=throughput, by_block=by_block)


def plan_of(planned: PlannedModel, limits: Limits, *, throughput: float | None = None, by_block: bool = True) -> Plan:
    """The plan of a model whose layers are known.

    Args:
        planned: The model.
        limits: What the run keeps within.
        throughput: As `estimate_memory` takes it.
        by_block: As `estimate_memory` takes it.

    Returns:
        The plan.

    Raises:
        OptionError: The limit or the throughput is not above 0.
    """
    for name, value in (("max_memory", limits.device), ("throughput", throughput)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise OptionError(f"{name} is {value}; it must be above 0.")
    found = best_division(planned, limits, by_block=by_block)
    layers, parts, sweep = found.layers, found.parts, found.sweep
    each = planned.pipeline.components.estimator.passes
    units = each * found.relative_time
    return Plan(
        peak_bytes=found.peak,
        passes=each * found.passes,
        schedule="passes" if sweep is None else "blocks",
        seconds=None if throughput is None else units * layers.workload.total / throughput,
        relative_time=units,
        tokens=layers.workload.total,
        weights=planned.weights,
        statistics_bytes=statistics_of(layers.groups),
        statistics_device=found.place,
        offloaded_bytes=found.offloaded,
        layers=len(layers.specs),
        layers_per_pass=max(sum(map(len, part)) for part in parts),
        parts=tuple(tuple(layer.spec.name for group in part for layer in group) for part in parts),
        hidden_states="none" if sweep is None else sweep.hidden_states,
        hidden_bytes=found.hidden_bytes,
        head_alone=sweep is not None and sweep.head_alone,
        waiting_bytes=found.waiting,
        batch_size=layers.workload.batch.samples,
        batch_tokens=layers.workload.batch.samples * layers.workload.batch.tokens,
        max_memory=limits.device,
        fits=found.fits,
        rows=tuple(found.rows),
        notes=(*planned.notes, *_why_passes(found, by_block), *(() if found.fits else (_advice(found),))),
    )


def _why_passes(found: Division, by_block: bool) -> tuple[str, ...]:
    """Why a limit makes several passes over the data."""
    if found.limits.device is None or found.passes == 1 or not by_block:
        return ()
    planned = found.layers.planned
    reason = planned.obstacle or (
        "its layers are in no list of blocks that can be run by themselves"
        if found.layers.groups_by_block is None
        else "single blocks take more than the limit"
    )
    return (f"{PASSES_INSTEAD}: {reason}",)


def _device_of(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    found = model_device(model)
    return torch.device("cpu") if found.type == "meta" else found


def _advice(found: Division) -> str:
    """What to change about a division that takes too much."""
    rows, limit = found.rows, found.limits.device
    if limit is None or found.peak <= limit:
        return (
            f"the host has {size_text(found.limits.host or 0)} of memory for {size_text(found.offloaded)} of "
            "statistics: take statistics_device='disk'."
        )
    totals = by_phase(rows)
    phase = max(totals, key=lambda name: totals[name])
    largest = max((row for row in rows if row.phase == phase), key=lambda row: row.bytes)
    remedies = {
        "weights": "load the model in a smaller dtype, or take a larger device",
        "activations": "lower the batch size, the length of samples, or adapt fewer layers",
    }
    least = "the layers of one input per pass" if found.sweep is None else "single blocks in one sweep"
    remedy = next((text for word, text in remedies.items() if largest.what.startswith(word)), "")
    return (
        f"phase '{phase}' takes {size_text(totals[phase])} even with {least}, above the limit "
        f"of {size_text(limit)}; most of it, {size_text(largest.bytes)}, is {largest.what}: "
        f"{remedy or 'take an estimator with smaller statistics, or leave large layers out with exclude_modules'}."
    )
