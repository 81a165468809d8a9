"""How long the passes over the data take, in units of one that taps every layer and keeps all sums on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_da_core.memory.phases import Group, statistics_of
from lora_da_core.types import StatisticsDevice

_BYTES = 4
"""Of one element of a sum, as nearly all are kept."""

_BATCH_TOKENS = {"cpu": 256, "cuda": 2048}
"""What a batch costs beside its tokens, in tokens: sums are read and written once a batch, and layers hooked.

On an H200 a batch of 1,024 tokens of a 7B model took as long as one of 3,584: the host's part decides there.
"""

_PER_BYTE = {"cpu": {"host": 0.0, "disk": 80.0}, "cuda": {"host": 1e4, "disk": 2.5e5}}
"""Multiplications that a device makes while one byte comes from the host's memory or from disk.

Assumed of links: 25 GB/s from the host to an accelerator, 1 GB/s from disk. Measured of devices, as multiplications of
whole passes: 2.5e14 per second by an H200, 8e10 by two cores of a CPU.
"""


@dataclass(frozen=True)
class PassTime:
    """What one pass over the data costs, as far as it depends on how layers and batches are divided.

    Multiplications are counted, per token: every matrix once in the forward pass; in the backward pass those of the
    layers from the first tapped one on, where the graph begins; and one for every element of the sums that tokens are
    added to. Attention and what is done element by element are taken to go along with them. Bytes that come and go are
    counted as the multiplications that the device makes meanwhile.

    Attributes:
        beside: Elements of the matrices that are not adapted.
        backward: Whether losses are differentiated.
        tokens: That a pass reads.
        batch_tokens: Of one batch.
        offloaded_weights: Bytes of weights that every run of the model brings in.
        device: Type of the device that computes.
    """

    beside: int
    backward: bool
    tokens: int
    batch_tokens: int
    offloaded_weights: int
    device: str

    def relative(self, parts: Sequence[Sequence[Group]], place: StatisticsDevice) -> float:
        """What several passes take, each of which taps some layers, in units of one that taps all.

        Args:
            parts: Groups by pass, in the order in which the model runs them.
            place: Where their sums lie between updates.

        Returns:
            1 for one pass with its sums on the device, at most the number of passes there.
        """
        order = [layer for part in parts for group in part for layer in group]
        sizes = [layer.spec.in_features * layer.spec.out_features for layer in order]
        forward, runs = sum(sizes) + self.beside, 2 if self.backward else 1
        brought = runs * self.offloaded_weights * self._per_byte("host") / self.batch_tokens

        def work(first: int, groups: Sequence[Group]) -> float:
            sums = statistics_of(groups) / _BYTES
            return forward + (self.beside + sum(sizes[first:]) if self.backward else 0) + sums + brought

        first, total = 0, 0.0
        for part in parts:
            total += work(first, part) + self._moving(statistics_of(part), place)
            first += sum(map(len, part))
        return total / work(0, [group for part in parts for group in part])

    def swept(
        self, parts: Sequence[Sequence[Group]], place: StatisticsDevice, moved: int, *, head_alone: bool
    ) -> float:
        """What one sweep over blocks takes, in the same units.

        Args:
            parts: Groups by part, those of the last blocks first.
            place: Where their sums lie between updates.
            moved: Bytes of hidden states that go to the host's memory and come back, of all tokens.
            head_alone: Whether the blocks of the first part are run again like those of all others.

        Returns:
            1 where nothing is run again.
        """
        sizes = [
            sum(layer.spec.in_features * layer.spec.out_features for group in part for layer in group) for part in parts
        ]
        sums = sum(map(statistics_of, parts)) / _BYTES
        whole = 2 * (sum(sizes) + self.beside) + sums
        again = sum(sizes if head_alone else sizes[1:])
        moving = sum(self._moving(statistics_of(part), place) for part in parts)
        return 1 + (again + moving + 2 * moved * self._per_byte("host") / self.tokens) / whole

    def with_batches(self, relative: float) -> float:
        """The same with what batches cost beside their tokens, by which smaller batches are the slower ones."""
        return relative * (1 + _BATCH_TOKENS.get(self.device, _BATCH_TOKENS["cpu"]) / self.batch_tokens)

    def _moving(self, statistics: int, place: StatisticsDevice) -> float:
        """Multiplications per token: sums come and go for every batch, and once more when they are solved."""
        if place == "device":
            return 0.0
        moves = self.tokens / self.batch_tokens + 1
        return 2 * statistics * moves * self._per_byte(place) / self.tokens

    def _per_byte(self, place: StatisticsDevice) -> float:
        return _PER_BYTE.get(self.device, _PER_BYTE["cpu"])[place]
