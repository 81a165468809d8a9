"""The bytes of a run's phases, and how layers are divided among passes so that they stay below a limit."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lora_da_core import solve_queue
from lora_da_core.memory.activations import Activations, BlockBytes
from lora_da_core.memory.workspace import Workspace
from lora_da_core.solving import WAITING_BYTES, batch_size
from lora_da_core.types import LayerSpec


@dataclass(frozen=True)
class PlanRow:
    """One entry of a plan.

    Attributes:
        phase: `statistics`, `between passes`, `gradient`, `solve` or `scale`.
        what: What takes the memory.
        bytes: How much; a phase takes the sum of its rows.
    """

    phase: str
    what: str
    bytes: int


@dataclass(frozen=True)
class LayerBytes:
    """One layer's part in a plan.

    Attributes:
        spec: The layer.
        input: Statistics of its input, which all layers of its group share.
        layer: Its own statistics, the gradient's among them.
        gradient: The gradient's.
        earlier: What of these is there before the last batch; less only where tokens are kept.
        solution: Its subspace.
        workspace: What it takes for a moment.
    """

    spec: LayerSpec
    input: int
    layer: int
    gradient: int
    earlier: int
    solution: int
    workspace: Workspace

    def elsewhere(self, *, gradient_stays: bool) -> LayerBytes:
        """The layer with sums that lie elsewhere between updates: what of them comes at a time is workspace.

        Args:
            gradient_stays: Whether the gradient's do not move.

        Returns:
            What it takes on the device.
        """
        moved = 0 if gradient_stays else self.gradient
        own, stays, taken = self.layer - self.gradient, self.gradient - moved, self.workspace
        coming = self.input + own + moved
        workspace = replace(
            taken,
            update=taken.update + max(self.input, own, moved),
            # An accumulator sees the merged sums beside its own.
            end_pass=taken.end_pass and taken.end_pass + self.input + own + max(self.input, own),
            prepare=taken.prepare + coming,
            shared=taken.shared + self.input,
            kept=taken.kept + own + moved,
        )
        return replace(self, input=0, layer=stays, earlier=stays, workspace=workspace)


_OWN = 2
"""Which row of a phase is what the phase itself takes, beside weights and statistics."""

Group = Sequence[LayerBytes]
"""Layers that read one input; they stay together, so that their statistics are shared."""


def statistics_of(groups: Sequence[Group]) -> int:
    """Bytes of the statistics of whole groups."""
    return sum(group[0].input + sum(layer.layer for layer in group) for group in groups)


def divided(groups: Sequence[Group], layers_per_pass: int) -> list[Sequence[Group]]:
    """Whole groups in order, each part of at most that many layers, but of one group at least.

    Args:
        groups: All groups.
        layers_per_pass: At least 1.

    Returns:
        The parts.
    """
    parts: list[list[Group]] = []
    size = 0
    for group in groups:
        if not parts or size + len(group) > layers_per_pass:
            parts.append([])
            size = 0
        parts[-1].append(group)
        size += len(group)
    return list(parts)


@dataclass(frozen=True)
class Sweep:
    """Parts of blocks that are run again, from the last to the first.

    Attributes:
        blocks: What a batch takes from block to block.
        starts: The first block of each part; of one that holds layers after the blocks alone, their count.
        hidden: By part, bytes of hidden states of all batches that lie on the device.
        head_alone: Whether the blocks of the first part are run again too, after what follows them.
    """

    blocks: BlockBytes
    starts: Sequence[int]
    hidden: Sequence[int]
    head_alone: bool = False

    def activations(self, part: int) -> int:
        """Most that a batch takes while a part is run."""
        if part == 0 and not self.head_alone:
            return self.blocks.with_head(self.starts[0])
        return self.blocks.of_blocks(self.starts[part], self.starts[part - 1] if part else len(self.blocks.peaks))

    def head(self) -> int:
        """Most that a batch takes in the forward pass and in what follows the blocks."""
        return self.blocks.with_head(len(self.blocks.peaks))


@dataclass(frozen=True)
class Phases:
    """A run, as far as its bytes are concerned.

    Attributes:
        weights: The model.
        all_tapped: A batch with taps on all layers.
        one_tapped: A batch with a tap on the first layer alone: the same graph, but no inputs kept; None where all
            layers are taken in one pass.
        forward: A batch without gradients, for a gradient that comes from forward passes; None where none does.
        search: A batch of the line search; None where the scale is fixed.
        rounds: How often everything is estimated; the statistics of earlier rounds stay.
        device: Where layers are solved.
        waiting: Bytes of operators of one shape, in float64, that may wait for a batched solve.
    """

    weights: int
    all_tapped: Activations
    one_tapped: Activations | None
    forward: Activations | None
    search: Activations | None
    rounds: int
    device: torch.device
    waiting: int = WAITING_BYTES

    def rows(self, parts: Sequence[Sequence[Group]], sweep: Sweep | None = None) -> list[PlanRow]:
        """The rows of a run in that many parts: of each phase those of the part that takes most.

        Args:
            parts: Groups by part.
            sweep: How the parts are run again in one sweep; None where each takes a pass.

        Returns:
            Rows in the order of the phases.
        """
        solutions = sum(layer.solution for part in parts for group in part for layer in group)
        if sweep is None:
            passes = [[*self._pass(part, solutions, self._activations(part), 0)] for part in parts]
        else:
            passes = [
                [*self._pass(part, solutions, sweep.activations(number), sweep.hidden[number])]
                for number, part in enumerate(parts)
            ]
            if sweep.head_alone:
                alone = (self.weights, 0, sweep.head(), sweep.hidden[0])
                passes.append([_phase("statistics", "statistics of no layer", "activations of a batch", alone)])
        heaviest = [max(alternatives, key=_total) for alternatives in itertools.zip_longest(*passes, fillvalue=())]
        if self.search is not None:
            kept = self.rounds * statistics_of(parts[0]) if len(parts) == 1 else 0
            heaviest.append(self._scale(kept, solutions))
        # A phase that takes nothing of its own has nothing to tell.
        return [row for rows in heaviest for row in rows if row.bytes and rows[_OWN].bytes]

    def peak_of_part(self, part: Sequence[Group], solutions: int, activations: int, hidden: int) -> int:
        """Most bytes of a part that is run again.

        Args:
            part: Its groups.
            solutions: Bytes of all layers' subspaces.
            activations: What a batch takes.
            hidden: Bytes of hidden states that lie on the device.

        Returns:
            Bytes, weights included.
        """
        return max(_total(rows) for rows in self._pass(part, solutions, activations, hidden))

    def _pass(self, part: Sequence[Group], solutions: int, activations: int, hidden: int) -> Iterator[list[PlanRow]]:
        layers = [layer for group in part for layer in group]
        statistics = self.rounds * statistics_of(part)
        of_layers = f"statistics of {len(layers)} {'layer' if len(layers) == 1 else 'layers'}"
        of_rounds = f", {self.rounds} rounds" if self.rounds > 1 else ""
        solved = PlanRow("solve", "subspaces of all layers", solutions)

        def phase(name: str, what: str, size: int, *, missing: int = 0) -> list[PlanRow]:
            return _phase(name, of_layers + of_rounds, what, (self.weights, statistics - missing, size, hidden))

        last = sum(layer.layer - layer.earlier for layer in layers)
        yield phase("statistics", "activations of a batch", activations, missing=last)
        yield phase("between passes", "closing a layer's pass", max(layer.workspace.end_pass for layer in layers))
        if self.forward is not None:
            yield phase("gradient", "activations of a batch", self.forward.peak)
        yield [*phase("solve", "Fishers, steps and the solver", self._solving(part)), solved]

    def _activations(self, part: Sequence[Group]) -> int:
        if self.one_tapped is None:
            return self.all_tapped.peak
        leaders = {self.all_tapped.leaders.get(layer.spec.name) for group in part for layer in group}
        kept = sum(size for leader, size in self.all_tapped.inputs.items() if leader in leaders)
        return min(self.all_tapped.peak, self.one_tapped.peak + kept)

    def _scale(self, statistics: int, solutions: int) -> list[PlanRow]:
        assert self.search is not None
        return [
            PlanRow("scale", "weights", self.weights),
            PlanRow("scale", "statistics of all layers", statistics),
            PlanRow("scale", "activations of a batch of the line search", self.search.peak),
            PlanRow("scale", "subspaces of all layers, in two precisions", 2 * solutions),
        ]

    def _solving(self, part: Sequence[Group]) -> int:
        """The most that preparing and solving takes: layers of one shape wait for each other on an accelerator."""
        queue = _Queue(self.device, self.waiting)
        for number, group in enumerate(part):
            for layer in group:
                queue.prepare(number, layer)
            queue.close(number)
        queue.solve_the_rest()
        return queue.peak


def _phase(name: str, statistics: str, what: str, sizes: tuple[int, int, int, int]) -> list[PlanRow]:
    """The rows of a phase: weights, statistics, what the phase itself takes, hidden states."""
    told = ("weights", statistics, what, "hidden states where parts of blocks begin")
    return [PlanRow(name, text, size) for text, size in zip(told, sizes, strict=True)]


class _Queue:
    """What lives while layers are prepared and solved, in the order of a run."""

    def __init__(self, device: torch.device, waiting: int) -> None:
        self.peak = 0
        self._device, self._waiting_bytes = device, waiting
        self._live = 0
        self._shared: dict[int, int] = {}
        """By group, the bytes that its prepared layers share; they go when none of them waits any more."""
        self._open: int | None = None
        self._waiting: dict[tuple[int, int], list[tuple[int, LayerBytes]]] = {}
        self._solving: deque[list[tuple[int, LayerBytes]]] = deque()

    def prepare(self, group: int, layer: LayerBytes) -> None:
        """One layer's Fisher; where enough layers of its shape wait, they are solved."""
        taken, spec = layer.workspace, layer.spec
        # Only the first layer of a group makes what they share.
        first = group not in self._shared
        self._reach(taken.prepare if first else max(taken.prepare - taken.shared, taken.kept))
        if first:
            self._shared[group] = taken.shared
            self._live += taken.shared
        self._open = group
        self._live += taken.kept
        alike = self._waiting.setdefault((spec.in_features, spec.rank), [])
        alike.append((group, layer))
        if len(alike) >= batch_size(spec, self._device, self._waiting_bytes):
            self._solve(alike)

    def close(self, group: int) -> None:
        """All layers of the group are prepared."""
        self._open = None
        self._release(group)

    def solve_the_rest(self) -> None:
        """Solves what still waits."""
        for alike in self._waiting.values():
            if alike:
                self._solve(alike)
        while self._solving:
            self._land()

    def _solve(self, alike: list[tuple[int, LayerBytes]]) -> None:
        """Solves layers; on some devices they are there until further ones are to be solved."""
        batch = list(alike)
        alike.clear()
        most = solve_queue.batches_beside(self._device, self._waiting_bytes)
        while self._solving and len(self._solving) >= most:
            self._land()
        self._solving.append(batch)
        self._live += sum(layer.workspace.solve for _, layer in batch)
        self._reach(0)
        if not most:
            self._land()

    def _land(self) -> None:
        """Lets go of the oldest batch that is being solved."""
        solved = self._solving.popleft()
        self._live -= sum(layer.workspace.kept + layer.workspace.solve for _, layer in solved)
        for group in {group for group, _ in solved}:
            self._release(group)

    def _release(self, group: int) -> None:
        held = (*self._solving, *self._waiting.values())
        if group != self._open and not any(group == owner for alike in held for owner, _ in alike):
            self._live -= self._shared.pop(group, 0)

    def _reach(self, more: int) -> None:
        self.peak = max(self.peak, self._live + more)


def by_phase(rows: Sequence[PlanRow]) -> dict[str, int]:
    """Bytes by phase, in the order of the rows."""
    totals: dict[str, int] = {}
    for row in rows:
        totals[row.phase] = totals.get(row.phase, 0) + row.bytes
    return totals


def _total(rows: Sequence[PlanRow]) -> int:
    return sum(row.bytes for row in rows)
