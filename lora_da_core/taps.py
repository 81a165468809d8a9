"""How a layer's input and output gradient leave the graph, and whose tokens they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_core.errors import ModelError
from lora_da_core.operators import LinearMap


@dataclass
class InputRecord:
    """One input tensor of one forward pass; `leader` is the first layer that read it."""

    leader: str


@dataclass
class Use:
    """One run of one layer in one forward pass."""

    layer: str
    input: InputRecord


class Tap(torch.autograd.Function):
    """Passes a layer's output through, and hands (use, input, output gradient) to a sink in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, use: Use, sink: Callable[[Use, Tensor, Tensor], None]
    ) -> Tensor:
        # Saved, not closed over: only then does activation checkpointing keep its memory saving.
        ctx.save_for_backward(inputs)
        ctx.use, ctx.sink = use, sink
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.sink(ctx.use, inputs, grads[0])
        return grads[0], None, None, None


def with_change(output: Tensor, inputs: Tensor, change: LinearMap) -> Tensor:
    """A layer's output as it were with weights W + change.

    Args:
        output: (…, out), the layer's own.
        inputs: (…, in).
        change: (out, in).

    Returns:
        (…, out), in the output's dtype.
    """
    rows = inputs.flatten(0, -2).to(change.dtype)
    return output + change.apply_to_rows(rows).reshape(output.shape).to(output.dtype)


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
        self.group_inputs: dict[str, list[InputRecord]] = {}
        self._inputs: dict[int, tuple[weakref.ref[Tensor], InputRecord]] = {}
        self._places: list[tuple[Tensor, tuple[Tensor, Tensor | None]]] = []

    def input_of(self, inputs: Tensor, layer: str) -> InputRecord:
        """The record of this tensor; layers given the very same tensor get the same record."""
        known = self._inputs.get(id(inputs))
        if known is not None and known[0]() is inputs:
            return known[1]
        record = InputRecord(layer)
        self._inputs[id(inputs)] = (weakref.ref(inputs), record)
        return record

    def flat(self, uses: Sequence[Tensor], name: str) -> Tensor:
        """(samples, …, features) of each use of a layer to (tokens, features) of all, use by use."""
        flat = [use.detach().flatten(0, -2) for use in uses]
        counts = sorted({len(use) for use in flat})
        if len(counts) > 1:
            raise ModelError(
                f"layer {name} is used {len(uses)} times, on {counts} tokens of a batch; uses of different lengths are "
                "not supported. Exclude it with exclude_modules."
            )
        if counts[0] % self.samples:
            raise ModelError(
                f"layer {name} saw {counts[0]} tokens in a batch of {self.samples} samples, so they cannot be told "
                "apart by sample. Exclude it with exclude_modules."
            )
        return torch.cat(flat) if len(flat) > 1 else flat[0]

    def examples_and_mask(self, name: str, tokens: int, uses: int) -> tuple[Tensor, Tensor | None]:
        """Each token's sample (tokens·uses,) and the indices of those that count, None where all do."""
        mask = self.mask_of(name, tokens // self.samples)
        if tuple(mask.shape) != (self.samples, tokens // self.samples):
            raise ModelError(
                f"layer {name} saw {tokens} tokens where the token mask has {tuple(mask.shape)}; "
                "exclude it with exclude_modules."
            )
        key = mask.repeat(uses, 1) if uses > 1 else mask
        for seen, places in self._places:
            if seen is key or (seen.shape == key.shape and torch.equal(seen, key)):
                return places
        example = torch.arange(self.samples, device=self.device).repeat_interleave(tokens // self.samples).repeat(uses)
        counted = None if bool(key.all()) else key.flatten().nonzero().squeeze(1).to(self.device)
        self._places.append((key, (example, counted)))
        return example, counted
