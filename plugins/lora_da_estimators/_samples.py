"""Per-sample gradients from tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def by_sample(inputs: Tensor, output_grads: Tensor, example: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of each sample in turn, samples ascending, tokens in the order given.

    Args:
        inputs: (tokens, in).
        output_grads: (tokens, out).
        example: (tokens,), int64.

    Yields:
        x (T, in) and g (T, out) of one sample; its gradient is gᵀx.
    """
    if not bool((example[1:] >= example[:-1]).all()):
        order = torch.argsort(example, stable=True)
        inputs, output_grads, example = inputs[order], output_grads[order], example[order]
    _, lengths = torch.unique_consecutive(example, return_counts=True)
    start = 0
    for length in lengths.tolist():
        yield inputs[start : start + length], output_grads[start : start + length]
        start += length
