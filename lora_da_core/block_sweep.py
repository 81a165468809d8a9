"""One sweep over the data in the place of many passes: blocks are run again, the last ones first.

The forward pass of a batch keeps the hidden states at which parts of blocks begin, and no graph but that of the last
part and of what follows the blocks. Then part after part is run again from there and differentiated, with the gradient
that the part above left. Every layer so sees what one pass over all layers would show it, batch by batch in the same
order, and the sums of a part are the only ones in memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_da_core.blocks import BlockCall, BlockFault, Blocks, find_blocks, followed, hidden_of
from lora_da_core.capture import CaptureTask, HiddenStates, Progress, Run, SweepSettings
from lora_da_core.layer_kinds import Call, watched
from lora_da_core.model_state import prepared
from lora_da_core.running_sums import Statistics
from lora_da_core.types import Batch

Names = Sequence[str]


class BlockSweep:
    """The statistics of parts of blocks, from the last to the first, in one sweep over the data.

    A part that is not asked for is passed over: the gradient goes through it, and nothing is taken.

    Args:
        task: What is run, with all layers.
        batches: The data.
        parts: The layers of each part, those of the last blocks and of what follows them first.

    Raises:
        BlockFault: The model has no blocks, or the parts are none of them.
    """

    def __init__(self, task: CaptureTask, batches: Sequence[Batch], parts: Sequence[Names]) -> None:
        blocks = blocks_of(task)
        starts = starts_of(task, blocks, parts)
        self._parts = [frozenset(part) for part in parts]
        if len(starts) > len(parts):
            self._parts.insert(0, frozenset())
        self._sweep = Sweep(task, batches, blocks, starts)

    def collect(self, task: CaptureTask, on_progress: Progress | None = None) -> Statistics:
        """The statistics of one part; the parts before it cannot be asked for any more.

        Args:
            task: What is run: the layers of one part, all others beside it.
            on_progress: Told of every batch.

        Returns:
            The accumulators and counts, those of one ordinary pass.

        Raises:
            BlockFault: The model does not run block by block on some batch; nothing is to be asked of the sweep then.
            ModelError: A loss or gradient is not finite; the model is restored first.
            TargetError: A layer never ran.
            PluginError: An accumulator raised.
        """
        wanted = self._parts.index(frozenset(spec.name for spec in task.specs))
        while self._sweep.done < wanted:
            self._sweep.advance(without_layers(task), None)
        return self._sweep.advance(task, on_progress)


def starts_of(task: CaptureTask, blocks: Blocks, parts: Sequence[Names]) -> list[int]:
    """The first block of each part; before them the number of blocks, where what follows these is a part of its own.

    Args:
        task: What is run, with how it is swept.
        blocks: Of its model.
        parts: The layers of each part.

    Returns:
        One number more than there are parts, or as many.

    Raises:
        BlockFault: The parts are not those of the last blocks, and so on to the first.
    """
    count = len(blocks.modules)
    places = [[blocks.numbers.get(name, count) for name in part] for part in parts]
    starts, ends = [min(place) for place in places], [count + 1]
    for place in places:
        if max(place) >= ends[-1]:
            raise BlockFault("its parts do not follow each other from the last block to the first")
        ends.append(min(place))
    alone = (task.sweep or SweepSettings()).head_alone and starts[0] < count
    return [count, *starts] if alone else starts


class Sweep:
    """The state of a sweep: what lies between the parts that are done and those that are not."""

    def __init__(
        self,
        task: CaptureTask,
        batches: Sequence[Batch],
        blocks: Blocks,
        starts: Sequence[int],
        *,
        to_the_inputs: bool = False,
    ) -> None:
        self.done = 0
        """How many parts."""
        self.flights: list[_Flight] = []
        self.counted = Statistics({})
        """Samples, labels and losses, no sums."""
        self._batches, self._blocks, self._starts = batches, blocks, starts
        self._shelf = _Shelf((task.sweep or SweepSettings()).hidden_states)
        self._to_the_inputs = to_the_inputs
        """Whether the gradient in what goes into the first part is asked for."""

    def advance(self, task: CaptureTask, on_progress: Progress | None) -> Statistics:
        """Runs the next part; what `task` names is taken of it."""
        run = Run(task, torch.Generator())
        with prepared(task.model), task.base_only():
            if self.done == 0:
                self._forward(run, task, on_progress)
                taken = run.statistics
                self.counted = Statistics({}, taken.samples, taken.label_tokens, taken.loss_sum)
            else:
                self._again(run, on_progress)
        self.done += 1
        counts = self.counted
        run.statistics = replace(
            run.statistics, samples=counts.samples, label_tokens=counts.label_tokens, loss_sum=counts.loss_sum
        )
        run.end_pass(0)
        return run.merged

    def _forward(self, run: Run, task: CaptureTask, on_progress: Progress | None) -> None:
        """All batches forward, and backward to where the first part begins."""
        recorder = _Recorder(self._blocks, self._starts, self._shelf)
        with recorder.recording(), watched(task.modules, (*task.specs, *task.beside), recorder.guarded(run.tap)):
            for number, batch in enumerate(self._batches):
                flight = recorder.begin(number, batch)
                run.batch(0, number, batch)
                if recorder.finish():
                    self.flights.append(flight)
                if on_progress is not None:
                    on_progress("statistics", number + 1, len(self._batches))

    def _again(self, run: Run, on_progress: Progress | None) -> None:
        """One part again on all batches."""
        first, end = self._starts[self.done], self._starts[self.done - 1]
        last = self.done + 1 == len(self._starts) and not self._to_the_inputs
        with run.taps():
            for count, flight in enumerate(self.flights, 1):
                differentiate = functools.partial(flight.back, self._blocks, first, end, last=last)
                run.again(flight.number, flight.batch, differentiate)
                if on_progress is not None:
                    on_progress("statistics", count, len(self.flights))


def blocks_of(task: CaptureTask) -> Blocks:
    """The blocks of a task's model.

    Args:
        task: What is run, with all layers.

    Returns:
        The blocks.

    Raises:
        BlockFault: There are none.
    """
    blocks = find_blocks(task.model, {spec.name: task.modules[spec.name] for spec in task.specs})
    if blocks is None:
        raise BlockFault("it has no list of blocks that holds the layers")
    return blocks


def without_layers(task: CaptureTask) -> CaptureTask:
    """The task with nothing to be taken; its layers run as they do where something is.

    Args:
        task: What is run.

    Returns:
        The task.
    """
    return replace(task, specs=(), beside=(*task.specs, *task.beside))


class _Shelf:
    """Where tensors lie until a part is run again."""

    def __init__(self, place: HiddenStates) -> None:
        self._on_host = place == "host"

    def put(self, tensor: Tensor, into: _Shelved | None = None) -> _Shelved:
        """Keeps a tensor; its memory on the device is free once nobody else holds it."""
        tensor = tensor.detach()
        if not self._on_host:
            return _Shelved(tensor, tensor.device)
        if into is None or into.kept.shape != tensor.shape or into.kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        else:
            kept = into.kept
        # What is read from it later is copied on the same stream, after this.
        kept.copy_(tensor, non_blocking=True)
        return _Shelved(kept, tensor.device)


@dataclass(frozen=True)
class _Shelved:
    """A tensor on the shelf, and the device that it came from."""

    kept: Tensor
    device: torch.device

    def taken(self) -> Tensor:
        """The tensor, on its device."""
        return self.kept.to(self.device, non_blocking=True)


@dataclass
class _Flight:
    """One batch on its way through the blocks.

    Attributes:
        number: The batch's number.
        batch: It itself.
        shelf: Where its tensors lie.
        calls: The arguments of the blocks that are run again, tensors shelved.
        inputs: By block, the hidden states that a part begins with.
        gradient: The gradient of the loss in the hidden states where the next part ends.
    """

    number: int
    batch: Batch
    shelf: _Shelf
    calls: dict[int, BlockCall] = field(default_factory=dict)
    inputs: dict[int, _Shelved] = field(default_factory=dict)
    gradient: _Shelved | None = None
    _known: dict[int, tuple[Tensor, _Shelved]] = field(default_factory=dict)

    def shelved(self, value: Any) -> Any:
        """An argument with its tensors on the shelf, each once however many blocks are given it."""

        def put(tensor: Tensor) -> _Shelved:
            if tensor.requires_grad:
                raise BlockFault("a block is given another tensor that gradients flow to than the hidden states")
            if id(tensor) not in self._known:
                self._known[id(tensor)] = (tensor, self.shelf.put(tensor))
            return self._known[id(tensor)][1]

        return _mapped(value, Tensor, put)

    def forget(self) -> None:
        """Lets go of the tensors themselves, once no more are put."""
        self._known.clear()

    def back(self, blocks: Blocks, first: int, end: int, *, last: bool) -> None:
        """Runs the blocks of a part again and differentiates them; for the `last` part not in its inputs."""
        assert self.gradient is not None
        shelved = self.inputs.pop(first)
        inputs = shelved.taken().detach()
        if not last:
            inputs.requires_grad_()
        fetched: dict[int, Tensor] = {}

        def take(each: _Shelved) -> Tensor:
            if id(each) not in fetched:
                fetched[id(each)] = each.taken()
            return fetched[id(each)]

        hidden: Tensor | None = inputs
        for number in range(first, end):
            call = self.calls.pop(number)
            call = BlockCall(_mapped(call.args, _Shelved, take), _mapped(call.kwargs, _Shelved, take), call.place)
            assert hidden is not None
            args, kwargs = call.given(hidden)
            hidden = hidden_of(blocks.modules[number](*args, **kwargs))
        gradient = self.gradient.taken()
        self.gradient = None
        if hidden is None or hidden.shape != gradient.shape:
            raise BlockFault("blocks that are run again return hidden states of another shape")
        if hidden.requires_grad:
            torch.autograd.backward(hidden, gradient)
        if not last:
            found = inputs.grad if inputs.grad is not None else torch.zeros_like(inputs)
            self.gradient = self.shelf.put(found, into=shelved)


class _Recorder:
    """Fills flights during forward passes."""

    def __init__(self, blocks: Blocks, starts: Sequence[int], shelf: _Shelf) -> None:
        self._blocks, self._starts, self._shelf = blocks, starts, shelf
        self._flight: _Flight | None = None
        self._leaf: Tensor | None = None
        self._running: int | None = None
        self._version: tuple[Tensor, int] | None = None
        self._start: Callable[[], None] = _nothing

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Follows the forward passes within."""
        with followed(self._blocks, self._enter, self._leave) as self._start:
            yield

    def begin(self, number: int, batch: Batch) -> _Flight:
        """To be called before every batch."""
        self._start()
        self._leaf = self._running = self._version = None
        self._flight = _Flight(number, batch, self._shelf)
        return self._flight

    def finish(self) -> bool:
        """To be called after every batch: keeps the gradient that has come; returns whether the blocks ran at all."""
        flight, leaf = self._flight, self._leaf
        self._flight = self._leaf = None
        assert flight is not None
        flight.forget()
        if leaf is None:
            if flight.calls:
                raise BlockFault("not all blocks ran")
            return False
        if leaf.grad is None:
            raise BlockFault("no gradient reaches the hidden states")
        flight.gradient = self._shelf.put(leaf.grad)
        return True

    def guarded(self, tap: Callable[[Call], Tensor]) -> Callable[[Call], Tensor]:
        """A tap that makes sure that layers run within their own blocks, and others after all blocks."""

        def guarded(call: Call) -> Tensor:
            if self._flight is not None and (torch.is_grad_enabled() or self._running is not None):
                home = self._blocks.numbers.get(call.layer)
                if home != self._running or (home is None and self._leaf is None):
                    raise BlockFault(f"layer {call.layer} runs elsewhere than in its block or after all of them")
            return tap(call)

        return guarded

    def _enter(self, number: int, hidden: Tensor, call: BlockCall) -> Tensor:
        flight, top = self._flight, self._starts[0]
        assert flight is not None
        self._running = number
        if number < top:
            if number >= self._starts[-1]:
                flight.calls[number] = BlockCall(flight.shelved(call.args), flight.shelved(call.kwargs), call.place)
            if number in self._starts:
                flight.inputs[number] = self._shelf.put(hidden)
            self._version = (hidden, hidden._version)
            torch.set_grad_enabled(False)
        elif number == top:
            hidden = self._leaf = hidden.detach().requires_grad_()
        return hidden

    def _leave(self, number: int, hidden: Tensor) -> Tensor:
        self._running = None
        if self._version is not None:
            torch.set_grad_enabled(True)
            before, version = self._version
            self._version = None
            if before._version != version:
                raise BlockFault(f"block {number} changes the hidden states that it is given")
        if number + 1 == len(self._blocks.modules) == self._starts[0]:
            hidden = self._leaf = hidden.detach().requires_grad_()
        return hidden


def _nothing() -> None:
    pass


def _mapped(value: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """`new` of everything of a kind in a value, in its tuples, lists and dicts too."""
    if isinstance(value, kind):
        return new(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(each, kind, new) for each in value)
    if type(value) is dict:
        return {key: _mapped(each, kind, new) for key, each in value.items()}
    return value
