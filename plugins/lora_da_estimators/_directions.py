"""Sets of matrices D_1 … D_k, each (out, in), behind float64 products.

Stored tensors keep the dtype they were summed in; pieces of them are widened as they are used, so that cancellation
against λ happens in float64 without a float64 copy of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_PIECE = 1 << 23
"""Elements that are widened at a time: 64 MiB of float64."""


class Directions(ABC):
    """k matrices (out, in)."""

    @property
    @abstractmethod
    def count(self) -> int:
        """The number k."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where products are."""

    @abstractmethod
    def inner(self, matrix: Tensor) -> Tensor:
        """⟨D_j, matrix⟩ for all j, (k,)."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """Σ_j weights_j D_j, (out, in)."""

    @abstractmethod
    def times(self, block: Tensor) -> Tensor:
        """D_j·block for all j, (in, c) to (k, out, c)."""

    @abstractmethod
    def transposed_times(self, blocks: Tensor) -> Tensor:
        """Σ_j D_jᵀ·blocks_j, (k, out, c) to (in, c)."""

    @abstractmethod
    def gram(self) -> Tensor:
        """⟨D_i, D_j⟩, (k, k)."""


class RowDirections(Directions):
    """Matrices stored as they are, (k, out, in)."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        k, out_features, in_features = self.rows.shape
        step = max(1, _PIECE // max(1, out_features * in_features))
        for start in range(0, k, step):
            yield slice(start, min(start + step, k)), self.rows[start : start + step].double()

    def inner(self, matrix: Tensor) -> Tensor:
        found = [piece.flatten(1) @ matrix.flatten() for _, piece in self._pieces()]
        return torch.cat(found) if found else matrix.new_zeros(0)

    def combine(self, weights: Tensor) -> Tensor:
        total = weights.new_zeros(self.rows.shape[1:])
        for where, piece in self._pieces():
            total += torch.einsum("k,koi->oi", weights[where], piece)
        return total

    def times(self, block: Tensor) -> Tensor:
        found = [piece @ block for _, piece in self._pieces()]
        return torch.cat(found) if found else block.new_zeros(0, self.rows.shape[1], block.shape[1])

    def transposed_times(self, blocks: Tensor) -> Tensor:
        total = blocks.new_zeros(self.rows.shape[2], blocks.shape[2])
        for where, piece in self._pieces():
            total += piece.flatten(0, 1).mT @ blocks[where].flatten(0, 1)
        return total

    def gram(self) -> Tensor:
        flat = self.rows.flatten(1)
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=self.device)
        step = max(1, _PIECE // max(1, self.count))
        for start in range(0, flat.shape[1], step):
            piece = flat[:, start : start + step].double()
            total += piece @ piece.mT
        return total


class TokenDirections(Directions):
    """Matrices D_j = g_jᵀ x_j stored as their tokens: x (ΣT, in), g (ΣT, out), lengths (k,)."""

    def __init__(self, inputs: Tensor, output_grads: Tensor, lengths: Tensor) -> None:
        self.x = torch.split(inputs, lengths.tolist())
        self.g = torch.split(output_grads, lengths.tolist())
        self.shape = (output_grads.shape[1], inputs.shape[1])
        self._device = inputs.device
        self._all = (inputs, output_grads)
        self._owner = torch.arange(len(lengths), device=inputs.device).repeat_interleave(lengths.to(inputs.device))

    @property
    def count(self) -> int:
        return len(self.x)

    @property
    def device(self) -> torch.device:
        return self._device

    def _tokens(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, g in zip(self.x, self.g, strict=True):
            yield x.double(), g.double()

    def elements(self) -> Iterator[Tensor]:
        """D_1 … D_k in turn, each (out, in)."""
        for x, g in self._tokens():
            yield g.mT @ x

    def inner(self, matrix: Tensor) -> Tensor:
        found = [((g @ matrix) * x).sum() for x, g in self._tokens()]
        return torch.stack(found) if found else matrix.new_zeros(0)

    def combine(self, weights: Tensor) -> Tensor:
        total = weights.new_zeros(self.shape)
        for weight, (x, g) in zip(weights, self._tokens(), strict=True):
            total.addmm_(weight * g.mT, x)
        return total

    def times(self, block: Tensor) -> Tensor:
        found = [g.mT @ (x @ block) for x, g in self._tokens()]
        return torch.stack(found) if found else block.new_zeros(0, self.shape[0], block.shape[1])

    def transposed_times(self, blocks: Tensor) -> Tensor:
        total = blocks.new_zeros(self.shape[1], blocks.shape[2])
        for block, (x, g) in zip(blocks, self._tokens(), strict=True):
            total.addmm_(x.mT, g @ block)
        return total

    def gram(self) -> Tensor:
        # ⟨g_iᵀx_i, g_jᵀx_j⟩ is the sum over pairs of tokens of (g·g')(x·x').
        all_x, all_g = (tensor.double() for tensor in self._all)
        total = all_x.new_zeros(self.count, self.count)
        for row, (x, g) in enumerate(self._tokens()):
            pairs = ((x @ all_x.mT) * (g @ all_g.mT)).sum(0)
            total[row].index_add_(0, self._owner, pairs)
        return total


class MixedDirections(Directions):
    """Stored matrices first, then matrices stored as tokens."""

    def __init__(self, rows: RowDirections, tokens: TokenDirections) -> None:
        self.rows = rows
        self.tokens = tokens

    @property
    def count(self) -> int:
        return self.rows.count + self.tokens.count

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def inner(self, matrix: Tensor) -> Tensor:
        return torch.cat([self.rows.inner(matrix), self.tokens.inner(matrix)])

    def combine(self, weights: Tensor) -> Tensor:
        first = self.rows.count
        return self.rows.combine(weights[:first]) + self.tokens.combine(weights[first:])

    def times(self, block: Tensor) -> Tensor:
        return torch.cat([self.rows.times(block), self.tokens.times(block)])

    def transposed_times(self, blocks: Tensor) -> Tensor:
        first = self.rows.count
        return self.rows.transposed_times(blocks[:first]) + self.tokens.transposed_times(blocks[first:])

    def gram(self) -> Tensor:
        rows, tokens = self.rows.gram(), self.tokens.gram()
        if not (self.rows.count and self.tokens.count):
            return rows if self.rows.count else tokens
        cross = torch.stack([self.rows.inner(element) for element in self.tokens.elements()])
        return torch.cat([torch.cat([rows, cross.mT], 1), torch.cat([cross, tokens], 1)])


def concatenated(blocks: Sequence[Tensor], empty: Tensor) -> Tensor:
    """The blocks one after the other, or `empty` where there is none."""
    return torch.cat(list(blocks)) if blocks else empty
