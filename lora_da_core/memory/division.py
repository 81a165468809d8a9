"""How a run keeps within a limit: layers divided into parts, batches cut into smaller ones, sums kept elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_da_core.capture import HiddenStates, SweepSettings
from lora_da_core.memory.layers import PlannedLayers, PlannedModel
from lora_da_core.memory.phases import Group, PlanRow, Sweep, by_phase, divided, statistics_of
from lora_da_core.solving import WAITING_BYTES
from lora_da_core.types import StatisticsDevice

_HIDDEN_STATES_AT: Mapping[str, Sequence[HiddenStates]] = {"cpu": ["device"], "cuda": ["device", "host"]}
"""By type of device, where hidden states may lie, the quickest first."""


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
        parts: Groups by part, each layer with its statistics wherever they lie.
        rows: What the peak of every phase on the device is made of.
        limits: What the run may take.
        waiting: Bytes of operators of one shape, in float64, that may wait for a batched solve.
        sweep: How the parts are run in one sweep; None where each takes a pass.
        hidden_bytes: Of the hidden states that a sweep keeps.
    """

    layers: PlannedLayers
    place: StatisticsDevice
    parts: Sequence[Sequence[Group]]
    rows: Sequence[PlanRow]
    limits: Limits
    waiting: int = WAITING_BYTES
    sweep: SweepSettings | None = None
    hidden_bytes: int = 0

    @property
    def passes(self) -> int:
        """How often the data are read, by an estimator of one pass."""
        return len(self.parts) if self.sweep is None else 1

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
        on_host = self.offloaded if self.place == "host" else 0
        on_host += self._moved
        return _within(self.peak, self.limits.device) and _within(on_host, self.limits.host)

    @property
    def relative_time(self) -> float:
        """What its passes take together, in units of one pass over all layers with sums on the device."""
        if self.sweep is None:
            return self.layers.time.relative(self.parts, self.place)
        return self.layers.time.swept(self.parts, self.place, self._moved, head_alone=self.sweep.head_alone)

    @property
    def _moved(self) -> int:
        """Bytes of hidden states in the host's memory."""
        return self.hidden_bytes if self.sweep is not None and self.sweep.hidden_states == "host" else 0

    @property
    def rank(self) -> tuple[bool, float]:
        """What fits before what does not; of the former the one that takes least time, of the latter least memory."""
        if not self.fits:
            return True, self.peak
        return False, self.layers.time.with_batches(self.relative_time)


def best_division(planned: PlannedModel, limits: Limits, *, by_block: bool = True) -> Division:
    """The division that takes least time within the limits; without any, whole batches.

    Args:
        planned: The model and the data.
        limits: What a run may take.
        by_block: Whether blocks may be run again, part by part, in one sweep.

    Returns:
        The division; where nothing keeps within the limits, the one that takes least memory.
    """
    best: Division | None = None
    size = planned.workload.batch.samples
    while True:
        layers = PlannedLayers(planned, size)
        found = min(_divisions(layers, limits, by_block), key=lambda division: division.rank)
        better = best is None or found.rank < best.rank
        # Smaller batches pay as long as they make fewer passes; once they do not, still smaller ones will not either.
        if best is not None and best.fits and not better:
            return best
        best = found if better or best is None else best
        undivided = found.fits and len(found.parts) == 1 and found.place == _places(layers, limits)[0]
        if size == 1 or undivided:
            return best
        size = -(-size // 2)


def _places(layers: PlannedLayers, limits: Limits) -> Sequence[StatisticsDevice]:
    """Where sums may lie, the quickest first: a CPU's own memory is the host's."""
    asked, on_host = layers.pipeline.config.statistics_device, layers.device.type == "cpu"
    if asked == "auto" and limits.device is None:
        return ["device"]
    wanted: list[StatisticsDevice] = ["device", "host", "disk"] if asked == "auto" else [asked]
    return list(dict.fromkeys("device" if place == "host" and on_host else place for place in wanted))


def _divisions(layers: PlannedLayers, limits: Limits, by_block: bool) -> Iterator[Division]:
    """With batches of one size, the best for each place; of slower places none where all sums stay on the device."""
    waiting = _waiting(layers, limits.device)
    for place in _places(layers, limits):
        for most in dict.fromkeys((WAITING_BYTES, waiting)):
            whole = _whole_run(layers, place, limits, most)
            if whole.fits or limits.device is None:
                yield whole
                return
        # Where nothing else fits, every layer is solved by itself.
        for divide, most in itertools.product((_swept, _passes) if by_block else (_passes,), (waiting, 1)):
            found = divide(layers, place, limits, most)
            if found is None:
                continue
            yield found
            if found.fits:
                if found.sweep is not None:
                    return
                break


def _waiting(layers: PlannedLayers, limit: int | None) -> int:
    """Bytes that may wait for a batched solve: an eighth of what the weights leave of a limit, and no more than pay."""
    if limit is None:
        return WAITING_BYTES
    return max(1, min(WAITING_BYTES, (limit - layers.planned.weights) // 8))


def _whole_run(layers: PlannedLayers, place: StatisticsDevice, limits: Limits, waiting: int) -> Division:
    """All layers at once, or as the configuration divides them."""
    most, groups = layers.pipeline.config.layers_per_pass, layers.groups_at(place)
    if limits.device is None and most != "auto" and most < len(layers.specs):
        parts = divided(groups, most)
        rows = layers.divisible_phases_at(place, waiting).rows(parts)
        return Division(layers, place, _whole(layers, parts), rows, limits, waiting)
    rows = layers.phases_at(place, waiting).rows([groups])
    return Division(layers, place, [layers.groups], rows, limits, waiting)


def _passes(layers: PlannedLayers, place: StatisticsDevice, limits: Limits, waiting: int) -> Division:
    """The fewest passes that stay within the limit, or the most."""
    groups, phases, total = layers.groups_at(place), layers.divisible_phases_at(place, waiting), len(layers.specs)
    for count in range(2, len(groups) + 1):
        parts = divided(groups, math.ceil(total / count))
        rows = phases.rows(parts)
        if _within(max(by_phase(rows).values()), limits.device):
            break
    else:
        parts = divided(groups, 1)
        rows = phases.rows(parts)
    return Division(layers, place, _whole(layers, parts), rows, limits, waiting)


def _swept(layers: PlannedLayers, place: StatisticsDevice, limits: Limits, waiting: int) -> Division | None:
    """Parts of as many blocks as stay within the limit, in one sweep; None where there are no blocks."""
    if layers.groups_by_block is None:
        return None
    found: Division | None = None
    for states in _HIDDEN_STATES_AT.get(layers.device.type, _HIDDEN_STATES_AT["cuda"]):
        found = _Cut(layers, place, limits, waiting, states).division()
        if found.fits:
            return found
    return found


class _Cut:
    """Blocks cut into parts, from the last on, each of as many as stay within the limit."""

    def __init__(
        self, layers: PlannedLayers, place: StatisticsDevice, limits: Limits, waiting: int, states: HiddenStates
    ) -> None:
        assert layers.groups_by_block is not None
        self._layers, self._place, self._limits, self._waiting, self._states = layers, place, limits, waiting, states
        self._groups, self._phases = layers.groups_at(place), layers.phases_at(place, waiting)
        assert self._phases.all_tapped.blocks is not None
        self._by_block, self._blocks = layers.groups_by_block, self._phases.all_tapped.blocks
        self._solutions = sum(layer.solution for group in self._groups for layer in group)
        self._one_set = math.ceil(self._blocks.hidden * layers.batches)
        self._rest = math.ceil(self._blocks.rest * layers.batches)
        last = max(block for block, groups in enumerate(self._by_block) if groups)
        self._head_alone = False
        self._head_alone = not self._by_block[-1] and not self._fits(last, len(self._by_block), 0, 2)

    def division(self) -> Division:
        """The cut; it may not fit."""
        count, starts = 0, self._starts(2)
        while len(starts) > count:
            # The more parts there are, the more hidden states lie beside them.
            count = len(starts)
            starts = self._starts(count)
        ends = [len(self._by_block), *starts]
        numbers = [
            [number for block in range(start, end) for number in self._by_block[block]]
            for start, end in zip(starts, ends, strict=False)
        ]
        hidden = [self._hidden(part, len(starts)) for part in range(len(starts))]
        sweep = Sweep(self._blocks, starts, hidden, self._head_alone)
        return Division(
            self._layers,
            self._place,
            [[self._layers.groups[number] for number in part] for part in numbers],
            self._phases.rows([[self._groups[number] for number in part] for part in numbers], sweep),
            self._limits,
            self._waiting,
            SweepSettings(self._states, self._head_alone),
            (len(starts) + self._head_alone) * self._one_set + self._rest,
        )

    def _starts(self, parts: int) -> list[int]:
        """The first block of every part, if hidden states of so many parts are kept."""
        ahead = [block for block, groups in enumerate(self._by_block) if groups]
        starts: list[int] = []
        end = len(self._by_block)
        while ahead:
            start = ahead.pop()
            while ahead and self._fits(ahead[-1], end, len(starts), parts):
                start = ahead.pop()
            starts.append(start)
            end = start
        return starts

    def _fits(self, start: int, end: int, part: int, parts: int) -> bool:
        groups = [self._groups[number] for block in range(start, end) for number in self._by_block[block]]
        sweep = Sweep(self._blocks, [end, start] if part else [start], [], self._head_alone)
        hidden = self._hidden(part, parts)
        peak = self._phases.peak_of_part(groups, self._solutions, sweep.activations(min(part, 1)), hidden)
        return _within(peak, self._limits.device)

    def _hidden(self, part: int, parts: int) -> int:
        """Bytes of hidden states on the device: inputs of the parts that are left, and one gradient."""
        if self._states == "host":
            return 0
        return (parts - part + (part > 0 or self._head_alone)) * self._one_set + self._rest


def _whole(layers: PlannedLayers, parts: Sequence[Sequence[Group]]) -> Sequence[Sequence[Group]]:
    """The same parts with the statistics of their layers wherever they lie."""
    groups = iter(layers.groups)
    return [[next(groups) for _ in part] for part in parts]


def _within(size: int, limit: int | None) -> bool:
    return limit is None or size <= limit
