"""Who does what: samples and layers divided among the processes of a run, each process by itself and all alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da_core.batches import take_rows
from lora_da_core.types import Batch, LayerSpec


@dataclass(frozen=True)
class Share:
    """One process's part of the data.

    Attributes:
        batches: Its batches, each with its number among all; one that a border runs through is cut.
        owners: Rank of every sample of the data, (samples,), ascending.
        rank: The process.
        drawn: Random numbers that each sample takes in a pass, (samples,); None where none are drawn.
        idle: Batches to run after its own that no result depends on, since other processes have more.
    """

    batches: Sequence[tuple[int, Batch]]
    owners: Tensor
    rank: int
    drawn: Tensor | None = None
    idle: Sequence[Batch] = ()

    @contextlib.contextmanager
    def draws(self, generator: torch.Generator) -> Iterator[None]:
        """Within it the generator gives this share's numbers; those of other shares are passed over."""
        self._skip(self.owners < self.rank, generator)
        yield
        self._skip(self.owners > self.rank, generator)

    def _skip(self, others: Tensor, generator: torch.Generator) -> None:
        if self.drawn is not None:
            torch.rand(int(self.drawn[others].sum()), generator=generator, dtype=torch.float64)


def share_of(batches: Sequence[Batch], rank: int, size: int) -> Share:
    """Neighbouring samples that are a process's part of the cost, so that order and most batches stay as they are.

    A sample costs as much as its batch is wide, padding included.

    Args:
        batches: All the data, with labels.
        rank: The process.
        size: How many processes there are.

    Returns:
        Its share; empty where there are fewer samples than processes.
    """
    sizes = [len(batch["labels"]) for batch in batches]
    costs = torch.tensor([_width(batch) for batch in batches], dtype=torch.int64)
    each = costs.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    # By its middle, in whole numbers: 2·(cost before) + own cost, of 2·(whole cost).
    middles, whole = 2 * each.cumsum(0) - each, 2 * each.sum().clamp(min=1)
    owners = middles * size // whole
    found, start = [], 0
    for number, (batch, count) in enumerate(zip(batches, sizes, strict=True)):
        rows = (owners[start : start + count] == rank).nonzero().flatten()
        if len(rows):
            found.append((number, batch if len(rows) == count else take_rows(batch, rows)))
        start += count
    return Share(found, owners, rank)


def even_share(batches: Sequence[Batch], rank: int, size: int) -> Share:
    """As `share_of`, but every process has as many batches to run.

    Args:
        batches: All the data, every sample with a label.
        rank: The process.
        size: How many processes there are.

    Returns:
        Its share, with its first sample of all as often as it takes to have as many batches as the busiest process.
    """
    shares = [share_of(batches, each, size) for each in range(size)]
    most = max(len(share.batches) for share in shares)
    stand_in = take_rows(batches[0], torch.zeros(1, dtype=torch.int64)) if batches else {}
    return replace(shares[rank], idle=[stand_in] * (most - len(shares[rank].batches)))


def _width(batch: Batch) -> int:
    samples = len(batch["labels"])
    tensors = (value for value in batch.values() if isinstance(value, Tensor) and value.ndim and len(value) == samples)
    return max(1, max(value.numel() for value in tensors) // max(1, samples))


def owners_of(specs: Sequence[LayerSpec], groups: Mapping[str, str], size: int) -> dict[str, int]:
    """Which process solves which layer: the dearest first, each to the process that has least to do so far.

    A factorisation costs in³ and is shared by the layers that read one input, so these stay together; so do the
    products of each of them, of in²·out at most.

    >>> layer = lambda name, size: LayerSpec(name, "linear", size, size, 1, 1.0)
    >>> owners_of([layer("a", 2), layer("b", 4), layer("c", 3)], {}, 2)
    {'b': 0, 'c': 1, 'a': 1}

    Args:
        specs: The layers.
        groups: The first reader of the input that a layer reads, by layer; a layer that is not in it stands alone.
        size: How many processes there are.

    Returns:
        A rank by layer.
    """
    together: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        together.setdefault(groups.get(spec.name, spec.name), []).append(spec)

    def cost(members: Sequence[LayerSpec]) -> int:
        products = sum(spec.in_features**2 * (spec.in_features + spec.out_features) for spec in members)
        return int(members[0].in_features ** 3 + products)

    loads, owners = [0] * size, {}
    for members in sorted(together.values(), key=cost, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += cost(members)
        owners.update({spec.name: rank for spec in members})
    return owners
