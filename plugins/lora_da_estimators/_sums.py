"""Accumulators of token sums that merge by addition."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_da_core.interfaces import Accumulator
from lora_da_core.operators import add_gram, mirror_lower

SECOND_MOMENT = "second_moment"
"""Key of Σ v vᵀ."""
COUNTS = "counts"
"""Key of how often each place of one-hot inputs was seen: the diagonal of Σ x xᵀ, which has nothing else."""
SQUARES = "squares"
"""Key of a sum of elementwise squares."""


class NoSums(Accumulator):
    """Keeps nothing: for an estimator that does not look at this side of the layer."""

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        """Ignore the tokens."""

    def statistics(self) -> dict[str, Tensor]:
        return {}


class SecondMoment(Accumulator):
    """Σ v vᵀ over tokens, (size, size)."""

    def __init__(self, size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.total = torch.zeros(size, size, device=device, dtype=dtype)
        self._mirrored = True

    def _add(self, rows: Tensor) -> None:
        add_gram(self.total, rows)
        self._mirrored = False

    def statistics(self) -> dict[str, Tensor]:
        if not self._mirrored:
            mirror_lower(self.total)
            self._mirrored = True
        return {SECOND_MOMENT: self.total}


class InputSecondMoment(SecondMoment):
    """Σ x xᵀ over tokens, (in, in)."""

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        self._add(inputs)


class InputCounts(Accumulator):
    """How often each place of one-hot inputs was seen, (in,)."""

    def __init__(self, size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.total = torch.zeros(size, device=device, dtype=dtype)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        self.total += torch.bincount(inputs, minlength=len(self.total))

    def statistics(self) -> dict[str, Tensor]:
        return {COUNTS: self.total}


class OutputSecondMoment(SecondMoment):
    """Σ g gᵀ over tokens, (out, out)."""

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        self._add(required(output_grads))


class OutputSquares(Accumulator):
    """Σ g∘g over tokens, (out,)."""

    def __init__(self, size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.total = torch.zeros(size, device=device, dtype=dtype)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        grads = required(output_grads)
        if grads.is_cuda:
            # One kernel: what is read is converted, squared and added up on the way.
            self.total += torch.linalg.vector_norm(grads, dim=0, dtype=self.total.dtype).square()
        else:
            self.total += grads.to(self.total).square().sum(0)

    def statistics(self) -> dict[str, Tensor]:
        return {SQUARES: self.total}


def required(output_grads: Tensor | None) -> Tensor:
    """The output gradients of an update.

    Args:
        output_grads: What the caller handed over.

    Returns:
        The same tensor.

    Raises:
        TypeError: It is None, though the estimator states that it needs output gradients.
    """
    if output_grads is None:
        raise TypeError("this accumulator needs output gradients, and its estimator says so; update() was given None")
    return output_grads
