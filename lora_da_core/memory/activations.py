"""What one batch takes: forward and backward on fake tensors, with the taps of a real run and no arithmetic."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from lora_da_core.blocks import BlockCall, BlockFault, Blocks, followed, tensors_in
from lora_da_core.live_bytes import Allocations
from lora_da_core.operators import accumulation_dtype
from lora_da_core.placement import copied_tree
from lora_da_core.taps import Tap, TokenLedger, Use


@dataclass(frozen=True)
class BatchShape:
    """A batch: how many samples, how many tokens each text is padded to, and how many texts a sample has."""

    samples: int
    tokens: int
    texts: int = 1

    @property
    def rows(self) -> int:
        """Texts of all samples."""
        return self.samples * self.texts


@dataclass
class BlockBytes:
    """What a batch was found to take, followed from block to block; all bytes are beyond weights and statistics.

    Attributes:
        entries: Alive when each block starts, and when the last one is done.
        peaks: By block, most while it runs forward or backward.
        head: Most from the end of the last block until its output's gradient is there.
        hidden: The hidden states between two blocks.
        rest: What else the blocks are given, masks above all.
    """

    entries: list[int] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    head: int = 0
    hidden: int = 0
    rest: int = 0

    def raised(self, more: int) -> BlockBytes:
        """With so many bytes more whenever a batch takes most."""
        return replace(self, peaks=[peak + more for peak in self.peaks], head=self.head + more)

    def of_blocks(self, first: int, end: int) -> int:
        """Most that running some blocks again takes."""
        # Beside what they are given, what they returned and its gradient are held until the end.
        return max(self.peaks[first:end]) - self.entries[first] + 3 * self.hidden + self.rest

    def with_head(self, first: int) -> int:
        """Most that a forward pass takes which keeps a graph from one block on; the head's number is their count."""
        kept = max([self.head, *self.peaks[first:]]) - self.entries[first]
        passed = max((peak - entry for peak, entry in zip(self.peaks[:first], self.entries, strict=False)), default=0)
        return max(kept, passed) + self.entries[0] + (self.hidden if first else 0)


@dataclass
class Activations:
    """What a batch was found to take.

    Attributes:
        peak: Most bytes beyond weights and statistics.
        leaders: For every tapped layer that ran, the first layer that read the same input tensor.
        inputs: Bytes of the input that each of those first layers read; the tap keeps it for the backward pass.
        blocks: The same from block to block; None where the model does not run block by block.
    """

    peak: int = 0
    leaders: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    blocks: BlockBytes | None = None


def trace(
    model: nn.Module, batch: BatchShape, updates: Mapping[str, int], *, backward: bool, blocks: Blocks | None = None
) -> Activations:
    """Runs a model on one padded batch of which every token is a label.

    Fake tensors have shapes and no values, so this takes little time and no memory; the model is copied without its
    weights. Attention is fused where it is on a CPU, which takes as little memory as the fused ones elsewhere.

    Args:
        model: The base model, on any device, `meta` included.
        batch: The batch's shape.
        updates: By tapped layer, the bytes that accumulating its tokens takes for a moment.
        backward: Whether losses are differentiated.
        blocks: The model's blocks, if what they take is asked for.

    Returns:
        The peak, and which layers read one input. Whatever the model's code raises on fake tensors passes.
    """
    if blocks is None:
        return _traced(model, batch, updates, backward, None)
    if len(blocks.modules) > len(_FEW) and _alike(blocks.modules):
        # A model that does not run with few of its blocks may run with all of them.
        with contextlib.suppress(Exception):
            return _with_all(_traced(model, batch, updates, backward, blocks, _FEW), model, blocks)
    with contextlib.suppress(BlockFault):
        return _traced(model, batch, updates, backward, blocks)
    return _traced(model, batch, updates, backward, None)


_FEW = (0, 1, -1)
"""Of blocks that are alike, those that are run: the first and the last one are what others are not."""


def _traced(
    model: nn.Module,
    batch: BatchShape,
    updates: Mapping[str, int],
    backward: bool,
    blocks: Blocks | None,
    chosen: Sequence[int] | None = None,
) -> Activations:
    """`chosen` blocks of a list are run alone, all where it is None."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copied = _without_weights(model, fake)
    modules = dict(copied.named_modules())
    allocations = Allocations(itertools.chain(copied.parameters(), copied.buffers()), answers=True)
    twins, left_out = None, set[int]()
    if blocks is not None:
        names = _names(model, blocks)
        numbers = range(len(names)) if chosen is None else [range(len(names))[place] for place in chosen]
        left_out = set(range(len(names))) - set(numbers)
        twins = Blocks([modules[names[number]] for number in numbers], blocks.numbers)
        if left_out:
            parent, _, _ = names[0].rpartition(".")
            modules[parent]._modules = {str(place): block for place, block in enumerate(twins.modules)}
    follower = _Follower(twins, allocations)
    taps = _Taps(batch, updates, backward)
    for name in updates:
        home = None if blocks is None else blocks.numbers.get(name)
        # Experts are no modules of their own; how many tokens reach each is not to be known without data.
        if name not in modules or home in left_out:
            continue
        modules[name].register_forward_hook(taps.hook(name))
        if blocks is not None and home is None:
            modules[name].register_forward_pre_hook(follower.check_end)
    with fake, allocations, torch.set_grad_enabled(backward), follower.following():
        losses = _losses(copied, batch)
        if backward:
            losses.sum().backward()  # type: ignore[no-untyped-call]
    taps.found.peak = follower.finish()
    if twins is not None and len(follower.found.entries) == len(twins.modules) + 1:
        taps.found.blocks = follower.found
    return taps.found


def _names(model: nn.Module, blocks: Blocks) -> list[str]:
    """The names of blocks, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in blocks.modules]


def _alike(blocks: Sequence[nn.Module]) -> bool:
    """Whether blocks have modules of the same classes and switches, and weights of the same shapes."""

    def shape(block: nn.Module) -> object:
        tensors = itertools.chain(block.named_parameters(), block.named_buffers())
        parts = [
            # By texts and truth values some blocks are told to attend to all tokens and others to near ones.
            (name, type(module), {key: value for key, value in vars(module).items() if isinstance(value, (str, bool))})
            for name, module in block.named_modules()
        ]
        return parts, [(name, each.shape, each.dtype) for name, each in tensors]

    first = shape(blocks[0])
    return all(shape(block) == first for block in blocks[1:])


def _with_all(found: Activations, model: nn.Module, blocks: Blocks) -> Activations:
    """What `_FEW` blocks took, with as many of the middle one as there are between the first and the last."""
    few, names = found.blocks, _names(model, blocks)
    assert few is not None, "few blocks are run one after the other"
    each, more = few.entries[2] - few.entries[1], len(names) - len(_FEW)
    middle, end = [each * number for number in range(more + 1)], each * more
    whole = replace(
        few,
        entries=[
            few.entries[0],
            *(few.entries[1] + size for size in middle),
            *(size + end for size in few.entries[2:]),
        ],
        peaks=[few.peaks[0], *(few.peaks[1] + size for size in middle), few.peaks[2] + end],
        head=few.head + end,
    )
    leaders, inputs = dict(found.leaders), dict(found.inputs)
    for name, number in blocks.numbers.items():
        twin = names[1] + name.removeprefix(names[number])
        if 1 < number < len(names) - 1 and twin in found.leaders:
            # What blocks share with the first one is read there by all of them.
            first = found.leaders[twin]
            leaders[name] = names[number] + first.removeprefix(names[1]) if first.startswith(names[1]) else first
            inputs[leaders[name]] = found.inputs[first]
    return Activations(max(found.peak, whole.head, *whole.peaks), leaders, inputs, whole)


class _Follower:
    """Notes what is alive where blocks begin and end, in both directions."""

    def __init__(self, blocks: Blocks | None, allocations: Allocations) -> None:
        self.found = BlockBytes()
        self._blocks, self._allocations = blocks, allocations
        self._count = 0 if blocks is None else len(blocks.modules)
        self.found.peaks = [0] * self._count
        self._highest = 0
        self._given: dict[int, int] = {}
        """Bytes of what blocks are given beside hidden states, by `id`."""
        self._running = self._count
        """The block whose bytes are being noted; their count stands for what follows them."""

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Follows the forward and the backward pass within."""
        if self._blocks is None:
            yield
            return
        with followed(self._blocks, self._enter, self._leave):
            yield

    def check_end(self, module: nn.Module, args: Any) -> None:
        """A hook on what may run after all blocks only."""
        if len(self.found.entries) <= self._count:
            raise BlockFault("a layer runs before the blocks")

    def finish(self) -> int:
        """The peak of all."""
        self._note(self._count)
        return self._highest

    def _enter(self, number: int, hidden: Tensor, call: BlockCall) -> Tensor:
        if number == 0:
            self._highest = self._allocations.peak
            self.found.hidden = hidden.nbytes
            self._allocations.restart()
        self._given.update((id(each), each.nbytes) for each in tensors_in((call.args, call.kwargs)))
        self.found.rest = sum(self._given.values())
        self.found.entries.append(self._allocations.live)
        self._running = number
        return self._marked(number - 1, hidden)

    def _leave(self, number: int, hidden: Tensor) -> Tensor:
        self._note(number + 1)
        if number + 1 == self._count:
            self.found.entries.append(self._allocations.live)
            return self._marked(number, hidden)
        return hidden

    def _marked(self, block: int, hidden: Tensor) -> Tensor:
        """The output of a block, which tells when the backward pass comes to it."""
        if hidden.requires_grad and block >= 0:
            hidden.register_hook(lambda gradient: self._note(block))  # type: ignore[no-untyped-call]
        return hidden

    def _note(self, following: int) -> None:
        """What was run until now took its peak; now follows another block, or, by their count, something else."""
        if self._running < self._count:
            self.found.peaks[self._running] = max(self.found.peaks[self._running], self._allocations.peak)
        else:
            self.found.head = max(self.found.head, self._allocations.peak)
        self._highest = max(self._highest, self._allocations.peak)
        self._allocations.restart()
        self._running = following


def guess(model: nn.Module, batch: BatchShape, updates: Mapping[str, int], *, backward: bool) -> Activations:
    """What `trace` finds, from the sizes of matrices alone: for models that do not run on fake tensors.

    Every matrix is taken to leave its input and its output behind, the one with the most rows, which makes the logits,
    three more copies in float32. Layers are taken to read inputs of their own.

    Args:
        model: As `trace` takes it.
        batch: As `trace` takes it.
        updates: As `trace` takes it.
        backward: As `trace` takes it.

    Returns:
        A rough guess.
    """
    matrices = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    sizes = [sides for module in matrices if (sides := _sides(module)) is not None]
    token = [itemsize * (rows + columns) for rows, columns, itemsize in sizes]
    logits = 3 * 4 * max((rows for rows, _, _ in sizes), default=0)
    each = (sum(token) if backward else max(token, default=0)) + logits
    peak = batch.rows * batch.tokens * each + max(updates.values(), default=0)
    return Activations(peak, {name: name for name in updates})


def _sides(module: nn.Module) -> tuple[int, int, int] | None:
    """Rows, columns and bytes of an activation's element, of a module that multiplies by a matrix."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    # The weights of a quantized layer are packed, so their shape tells nothing.
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    rows, columns = shape if None not in shape else (tuple(weight.shape) if weight.ndim == 2 else (None, None))
    return None if rows is None or columns is None else (rows, columns, max(2, weight.itemsize))


class _Taps:
    """The hooks that `capture` would set, with what feeding the accumulators takes in their place."""

    def __init__(self, batch: BatchShape, updates: Mapping[str, int], backward: bool) -> None:
        self.found = Activations()
        self._ledger = TokenLedger(batch.samples, _no_mask, torch.device("cpu"))
        self._updates = updates
        self._backward = backward

    def hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def tap(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            inputs: Tensor = args[0]
            use = Use(name, self._ledger.input_of(inputs, name))
            self.found.leaders.setdefault(name, use.input.leader)
            self.found.inputs.setdefault(use.input.leader, inputs.nbytes)
            if not self._backward:
                self._sink(use, inputs.detach(), None)
                return None
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            tapped: Tensor = Tap.apply(output, inputs.detach(), use, self._sink)  # type: ignore[no-untyped-call]
            return tapped

        return tap

    def _sink(self, use: Use, inputs: Tensor, output_grads: Tensor | None) -> None:
        blocks = [block for block in (inputs, output_grads) if block is not None]
        tokens = [block.flatten(0, -2) if block.is_floating_point() else block.flatten() for block in blocks]
        # The token mask leaves some out, so those that count are copied.
        counted = [block[torch.arange(len(block))] for block in tokens]
        scratch = torch.empty(self._updates[use.layer], dtype=torch.uint8)
        del counted, scratch


def _no_mask(name: str, tokens: int) -> Tensor:
    raise AssertionError("no token is masked here")


def _without_weights(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy of the module tree, frozen and in evaluation mode, that holds fake tensors on the CPU."""
    twins: dict[int, Any] = {}
    with fake:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            twins[id(tensor)] = nn.Parameter(twin, requires_grad=False) if is_parameter else twin
    return copied_tree(model, twins).eval()


def _losses(model: nn.Module, batch: BatchShape) -> Tensor:
    """One loss per token, by the steps of the language modelling objective."""
    scores = _scores(model, batch)
    targets = torch.zeros(len(scores), dtype=torch.int64)
    return functional.cross_entropy(scores, targets, reduction="none")


def _scores(model: nn.Module, batch: BatchShape) -> Tensor:
    output = model(**_inputs(model, batch))
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    if logits.ndim == 3:
        # A label is predicted by the token before it; picking them copies.
        places = torch.zeros(batch.rows * (batch.tokens - 1), dtype=torch.int64)
        logits = logits[:, :-1][places, places]
    return logits.to(accumulation_dtype(logits.dtype))


def _inputs(model: nn.Module, batch: BatchShape) -> dict[str, Any]:
    """Text with an attention mask, for both sides of an encoder-decoder, or images where the model takes those."""
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", "") == "pixel_values":
        sides = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        return {"pixel_values": torch.ones(batch.rows, config.num_channels, *sides)}
    names = ["input_ids", "attention_mask"]
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    inputs: dict[str, Any] = {name: torch.ones(batch.rows, batch.tokens, dtype=torch.int64) for name in names}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs
