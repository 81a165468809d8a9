"""How long the passes over the data take, at the throughput of one pass that taps every layer."""

from __future__ import annotations

from collections.abc import Sequence

from lora_da_core.memory_phases import Group

_BYTES = 4
"""Of one element of a sum, as nearly all are kept."""


def relative_time(parts: Sequence[Sequence[Group]], beside: int, *, backward: bool) -> float:
    """What several passes take, each of which taps some layers, in units of one that taps all.

    Multiplications are counted, per token: every matrix once in the forward pass; in the backward pass those of the
    layers from the first tapped one on, where the graph begins; and one for every element of the sums that tokens are
    added to. Attention and what is done element by element are taken to go along with them.

    Args:
        parts: Groups by pass, in the order in which the model runs them.
        beside: Elements of the matrices that are not adapted.
        backward: Whether losses are differentiated.

    Returns:
        1 for one pass, at most the number of passes.
    """
    order = [layer for part in parts for group in part for layer in group]
    sizes = [layer.spec.in_features * layer.spec.out_features for layer in order]
    forward = sum(sizes) + beside

    def work(first: int, groups: Sequence[Group]) -> float:
        sums = sum(group[0].input + sum(layer.layer for layer in group) for group in groups) / _BYTES
        return forward + (beside + sum(sizes[first:]) if backward else 0) + sums

    first, total = 0, 0.0
    for part in parts:
        total += work(first, part)
        first += sum(map(len, part))
    return total / work(0, [group for part in parts for group in part])
