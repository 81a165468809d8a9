"""How a layer's input and output gradient leave the graph, and whose tokens they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_da_core.errors import ModelError
from lora_da_core.layer_kinds import Routed


@dataclass(eq=False)
class InputRecord:
    """One input tensor of one forward pass.

    Attributes:
        leader: The first layer that read it.
        name: What it is called in every pass: the leader and the number of its use.
        readers: The layers that read it.
    """

    leader: str
    name: str
    readers: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Use:
    """One run of one layer in one forward pass; `routed` says which tokens of its module it was on, if not all."""

    layer: str
    input: InputRecord
    routed: Routed | None = None


class Tap(torch.autograd.Function):
    """Passes a layer's output through, and hands (use, input, output gradient) to a sink in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, use: Use, sink: Callable[[Use, Tensor, Tensor], None]
    ) -> Tensor:
        # Saved, not closed over: only then does activation checkpointing keep its memory saving.
        ctx.save_for_backward(inputs)
        ctx.use, ctx.sink = use, sink
        # Detached: an output that is the input itself may not be changed in place, as activations sometimes do.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.sink(ctx.use, inputs, grads[0])
        return grads[0], None, None, None


@dataclass(frozen=True)
class Places:
    """Whose tokens are whose, and which count.

    Attributes:
        example: (tokens,), int64, each token's sample.
        counted: The numbers of those that count for the Fisher, int64; None where all do.
    """

    example: Tensor
    counted: Tensor | None


@dataclass(frozen=True)
class _Mask:
    """A token mask as it came, and as what is needed of it."""

    given: Tensor
    places: Places
    flags: Tensor


class TokenLedger:
    """Which tokens the current forward pass has, whose they are, and which count.

    `mask_of` gives the token mask of a layer, by its name and how many tokens of each sample it sees.
    """

    def __init__(self, samples: int, mask_of: Callable[[str, int], Tensor], device: torch.device) -> None:
        self.samples = samples
        self.mask_of = mask_of
        self.device = device
        self.uses: dict[str, int] = {}
        self.waiting: dict[str, list[tuple[Use, Tensor, Tensor | None]]] = {}
        self.finite: dict[str, Tensor] = {}
        self.taken: set[tuple[str, ...]] = set()
        """Keys of the inputs whose shared statistics have this pass's tokens."""
        self._read: dict[str, list[InputRecord]] = {}
        self._inputs: dict[tuple[int, Hashable], tuple[weakref.ref[Tensor], InputRecord]] = {}
        self._masks: list[_Mask] = []
        self._selected: tuple[list[InputRecord], Tensor, Tensor, Tensor] | None = None

    def input_of(self, inputs: Tensor, layer: str, reading: Hashable = ()) -> InputRecord:
        """The record of this tensor; layers given the very same one, which they read alike, get the same record."""
        known = self._inputs.get((id(inputs), reading))
        if known is not None and known[0]() is inputs:
            record = known[1]
        else:
            record = InputRecord(layer, f"{layer}:{len(self._read.get(layer, []))}")
            self._inputs[id(inputs), reading] = (weakref.ref(inputs), record)
        record.readers.add(layer)
        self._read.setdefault(layer, []).append(record)
        return record

    def key_of(self, layer: str, records: Sequence[InputRecord]) -> tuple[str, ...]:
        """What layers that read the same inputs, and no others, have in common, also from one pass to the next."""
        if all(record.readers == {layer} for record in records):
            return (f"{layer}:0",)  # nobody to share with, however often it ran
        return tuple(sorted(record.name for record in records))

    def leader_of(self, layer: str, key: tuple[str, ...], first: str) -> str:
        """Who names what a layer shares: the first reader of its inputs if it shares all of them, else the layer."""
        read = self._read.get(first, [])
        return first if read and self.key_of(first, read) == key else layer

    def places(self, use: Use, rows: int) -> Places:
        """Whose the tokens of one use are, and which of them count.

        Args:
            use: The use.
            rows: How many tokens it is on.

        Returns:
            Their samples, and which count.

        Raises:
            ModelError: The tokens cannot be told apart by sample, or are not those of the token mask.
        """
        total = rows if use.routed is None else use.routed.total
        if total % self.samples:
            raise ModelError(
                f"layer {use.layer} saw {total} tokens in a batch of {self.samples} samples, so they cannot be told "
                "apart by sample. Exclude it with exclude_modules."
            )
        mask = self._mask(use.layer, total)
        if use.routed is None:
            return mask.places
        taken = use.routed.places
        flags = mask.flags[taken.to(self.device)]
        counted = None if mask.places.counted is None else flags.nonzero().squeeze(1)
        return Places(mask.places.example[taken.to(self.device)], counted)

    def places_of_uses(self, uses: Sequence[Use], rows: Sequence[int]) -> Places:
        """`places` of several uses, one after the other, each on the number of tokens in `rows`."""
        parts = [self.places(use, count) for use, count in zip(uses, rows, strict=True)]
        if len(parts) == 1:
            return parts[0]
        counted: list[Tensor] = []
        start = 0
        for part, count in zip(parts, rows, strict=True):
            own = torch.arange(count, device=self.device) if part.counted is None else part.counted
            counted.append(own + start)
            start += count
        example = torch.cat([part.example for part in parts])
        return Places(example, None if all(part.counted is None for part in parts) else torch.cat(counted))

    def selected(
        self, records: list[InputRecord], counted: Tensor, inputs: Tensor, example: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`inputs[counted]` and `example[counted]`, made once for layers of one input that follow each other.

        Args:
            records: What the rows of `inputs` were read from.
            counted: (k,), int64, on their device.
            inputs: x (rows, in), or the places of one-hot rows, (rows,).
            example: (rows,), int64.

        Returns:
            (k, in) or (k,), and (k,).
        """
        last = self._selected
        # Records compare by identity; the same ones in the same order are the same rows.
        if last is None or last[0] != records or last[1] is not counted:
            last = self._selected = (records, counted, inputs[counted], example[counted])
        return last[2], last[3]

    def _mask(self, layer: str, total: int) -> _Mask:
        given = self.mask_of(layer, total // self.samples)
        if tuple(given.shape) != (self.samples, total // self.samples):
            raise ModelError(
                f"layer {layer} saw {total} tokens where the token mask has {tuple(given.shape)}; "
                "exclude it with exclude_modules."
            )
        for mask in self._masks:
            if mask.given is given or (mask.given.shape == given.shape and torch.equal(mask.given, given)):
                return mask
        example = torch.arange(self.samples, device=self.device).repeat_interleave(total // self.samples)
        counted = None if bool(given.all()) else given.flatten().nonzero().squeeze(1).to(self.device)
        made = _Mask(given, Places(example, counted), given.flatten().to(self.device))
        self._masks.append(made)
        return made
