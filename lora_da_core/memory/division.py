"""How a run keeps within a limit: layers divided among passes, batches cut into smaller ones, sums kept elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_da_core.memory.layers import PlannedLayers
from lora_da_core.memory.phases import Group, PlanRow, by_phase, divided, statistics_of
from lora_da_core.memory.workload import Workload
from lora_da_core.types import StatisticsDevice

if TYPE_CHECKING:
    from peft import LoraConfig

    from lora_da_core.pipeline import Pipeline


@dataclass(frozen=True)
class Limits:
    """What a run may take; None stands for no limit.

    Attributes:
        device: Bytes on the device, weights included.
        host: Bytes of statistics in the host's memory, where that is another one.
    """

    device: int | None = None
    host: int | None = None


@dataclass(frozen=True)
class Division:
    """One way to divide a run, with the rows of its phases.

    Attributes:
        layers: The layers, with batches of one size.
        place: Where sums lie between updates.
        parts: Groups by pass, each layer with its statistics wherever they lie.
        rows: What the peak of every phase on the device is made of.
        limits: What the run may take.
    """

    layers: PlannedLayers
    place: StatisticsDevice
    parts: Sequence[Sequence[Group]]
    rows: Sequence[PlanRow]
    limits: Limits

    @property
    def peak(self) -> int:
        """Most bytes on the device at a time."""
        return max(by_phase(self.rows).values())

    @property
    def offloaded(self) -> int:
        """Most bytes of statistics elsewhere at a time."""
        if self.place == "device":
            return 0
        return self.layers.pipeline.config.rounds * max(map(statistics_of, self.parts))

    @property
    def fits(self) -> bool:
        """Whether it keeps within the limits."""
        host = self.limits.host if self.place == "host" else None
        return _within(self.peak, self.limits.device) and _within(self.offloaded, host)

    @property
    def relative_time(self) -> float:
        """What its passes take together, in units of one pass over all layers with sums on the device."""
        return self.layers.time.relative(self.parts, self.place)

    @property
    def rank(self) -> tuple[bool, float]:
        """What fits before what does not; of the former the one that takes least time, of the latter least memory."""
        if not self.fits:
            return True, self.peak
        return False, self.layers.time.with_batches(self.relative_time)


def best_division(
    model: nn.Module,
    peft_config: LoraConfig | None,
    pipeline: Pipeline,
    workload: Workload,
    device: torch.device,
    limits: Limits,
) -> Division:
    """The division that takes least time within the limits; without any, whole batches.

    Args:
        model: As `estimate_memory` takes it.
        peft_config: As `estimate_memory` takes it.
        pipeline: The pipeline that will run.
        workload: The data.
        device: Where it will run.
        limits: What it may take.

    Returns:
        The division; where nothing keeps within the limits, the one that takes least memory.
    """
    best: Division | None = None
    size = workload.batch.samples
    while True:
        layers = PlannedLayers(model, pipeline, replace(workload, batch_size=size), device)
        layers.read(peft_config)
        found = min(_divisions(layers, limits), key=lambda division: division.rank)
        better = best is None or found.rank < best.rank
        # Smaller batches pay as long as they make fewer passes; once they do not, still smaller ones will not either.
        if best is not None and best.fits and not better:
            return best
        best = found if better or best is None else best
        if size == 1 or (found.fits and len(found.parts) == 1 and found.place == _places(layers, limits)[0]):
            return best
        size = -(-size // 2)


def _places(layers: PlannedLayers, limits: Limits) -> Sequence[StatisticsDevice]:
    """Where sums may lie, the quickest first: a CPU's own memory is the host's."""
    asked, on_host = layers.pipeline.config.statistics_device, layers.device.type == "cpu"
    if asked == "auto" and limits.device is None:
        return ["device"]
    wanted: list[StatisticsDevice] = ["device", "host", "disk"] if asked == "auto" else [asked]
    return list(dict.fromkeys("device" if place == "host" and on_host else place for place in wanted))


def _divisions(layers: PlannedLayers, limits: Limits) -> Iterator[Division]:
    """With batches of one size, the best for each place; of slower places none where all sums stay on the device."""
    for place in _places(layers, limits):
        parts, rows = _passes(layers, place, limits.device)
        found = Division(layers, place, parts, rows, limits)
        yield found
        if found.fits and len(parts) == 1:
            return


def _passes(
    layers: PlannedLayers, place: StatisticsDevice, limit: int | None
) -> tuple[Sequence[Sequence[Group]], Sequence[PlanRow]]:
    """The passes of the configuration, or the fewest that stay within the limit, or the most; and their rows."""
    most, groups, phases = layers.pipeline.config.layers_per_pass, layers.groups_at(place), layers.phases_at(place)
    if limit is None and most != "auto" and most < len(layers.specs):
        parts = divided(groups, most)
        return _whole(layers, parts), layers.divisible_phases_at(place).rows(parts)
    rows = phases.rows([groups])
    if _within(max(by_phase(rows).values()), limit):
        return [layers.groups], rows
    phases, total = layers.divisible_phases_at(place), len(layers.specs)
    for count in range(2, len(groups) + 1):
        parts = divided(groups, math.ceil(total / count))
        rows = phases.rows(parts)
        if _within(max(by_phase(rows).values()), limit):
            return _whole(layers, parts), rows
    parts = divided(groups, 1)
    return _whole(layers, parts), phases.rows(parts)


def _whole(layers: PlannedLayers, parts: Sequence[Sequence[Group]]) -> Sequence[Sequence[Group]]:
    """The same parts with the statistics of their layers wherever they lie."""
    groups = iter(layers.groups)
    return [[next(groups) for _ in part] for part in parts]


def _within(size: int, limit: int | None) -> bool:
    return limit is None or size <= limit
