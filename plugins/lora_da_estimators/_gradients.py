"""Per-sample gradients kept one by one, each in the form that takes less memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lora_da_core.interfaces import Accumulator
from lora_da_core.types import LayerSpec
from lora_da_estimators._directions import MixedDirections, RowDirections, TokenDirections, concatenated
from lora_da_estimators._samples import by_sample
from lora_da_estimators._sums import required

Storage = Literal["auto", "rows", "factored"]
STORED = ("rows", "inputs", "output_grads", "lengths")
"""Keys of the statistics."""


class SampleGradients(Accumulator):
    """Keeps G_n of every sample, as a matrix (`rows`) or as its tokens (`inputs`, `output_grads`, `lengths`).

    Merging appends, so shards are gathered, not added.
    """

    def __init__(self, spec: LayerSpec, storage: Storage, *, device: torch.device, dtype: torch.dtype) -> None:
        sizes = {"rows": (0, spec.out_features, spec.in_features), "inputs": (0, spec.in_features)}
        sizes["output_grads"] = (0, spec.out_features)
        self.storage = storage
        self._empty = {key: torch.zeros(size, device=device, dtype=dtype) for key, size in sizes.items()}
        self._empty["lengths"] = torch.zeros(0, device=device, dtype=torch.int64)
        self._kept: dict[str, list[Tensor]] = {key: [] for key in STORED}
        # A matrix holds out·in numbers, a token in + out.
        self._break_even = spec.out_features * spec.in_features / (spec.out_features + spec.in_features)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        x, g = inputs.to(self._empty["inputs"]), required(output_grads).to(self._empty["inputs"])
        for inputs_of_one, grads_of_one in by_sample(x, g, example):
            tokens = len(inputs_of_one)
            if self.storage == "rows" or (self.storage == "auto" and tokens >= self._break_even):
                self._kept["rows"].append((grads_of_one.mT @ inputs_of_one).unsqueeze(0))
            else:
                # Copies: slices would keep the whole batch alive.
                self._kept["inputs"].append(inputs_of_one.clone())
                self._kept["output_grads"].append(grads_of_one.clone())
                self._kept["lengths"].append(self._empty["lengths"].new_tensor([tokens]))

    def statistics(self) -> dict[str, Tensor]:
        for key, blocks in self._kept.items():
            # Replaced by their concatenation, so that nothing is kept twice.
            self._kept[key] = [concatenated(blocks, self._empty[key])]
        return {key: blocks[0] for key, blocks in self._kept.items()}

    def merge(self, other: Mapping[str, Tensor]) -> None:
        for key, blocks in self._kept.items():
            blocks.append(other[key].to(self._empty[key]))


def stored_directions(statistics: Mapping[str, Tensor]) -> MixedDirections:
    """The gradients G_n that `SampleGradients` kept."""
    rows, inputs, output_grads, lengths = (statistics[key] for key in STORED)
    return MixedDirections(RowDirections(rows), TokenDirections(inputs, output_grads, lengths))


def stored_bytes(spec: LayerSpec, storage: Storage, *, samples: int, tokens: int, itemsize: int) -> int:
    """Bytes of `samples` gradients from `tokens` tokens; for `"auto"` an upper bound, met at equal lengths."""
    rows = samples * spec.out_features * spec.in_features * itemsize
    factored = tokens * (spec.out_features + spec.in_features) * itemsize + 8 * samples
    return {"rows": rows, "factored": factored, "auto": min(rows, factored)}[storage]
