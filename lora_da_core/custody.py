"""Who keeps the sums of which layer, where the processes that run a sharded model divide them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lora_da_core.interfaces import Accumulator
from lora_da_core.running_sums import Statistics
from lora_da_core.shares import owners_of
from lora_da_core.types import FisherStatistics, LayerSpec
from lora_da_core.world import World


@dataclass(frozen=True)
class Custody:
    """Which process keeps a layer's sums, and solves it.

    Attributes:
        owners: Rank by layer; layers that read one input have the same.
        adds: Whether the processes read different samples and what they find in a batch is added at the keeper's;
            otherwise all read the same, and the keeper alone takes sums.
    """

    owners: Mapping[str, int]
    adds: bool

    @classmethod
    def of(cls, specs: Sequence[LayerSpec], groups: Sequence[Sequence[str]], size: int, *, adds: bool) -> Custody:
        """Divides layers by the cost of their solves.

        Args:
            specs: The layers.
            groups: Layers that read one input.
            size: How many processes there are.
            adds: As above.

        Returns:
            The division, the same on every process.
        """
        leaders = {name: group[0] for group in groups for name in group}
        return cls(owners_of(specs, leaders, size), adds)

    def kept(
        self, make: Callable[[], Accumulator], keep: Callable[[Accumulator], Accumulator], world: World, layer: str
    ) -> Accumulator:
        """An accumulator for tokens of a layer, or of the input that it is the first to read.

        Args:
            make: Makes a plain one.
            keep: Makes one whose sums lie elsewhere between updates of it, or leaves it.
            world: The processes.
            layer: The layer.

        Returns:
            One that takes tokens here and keeps sums at the layer's owner.
        """
        return KeptSums(make, keep, world, self.owners[layer], adds=self.adds)

    def counted(self, own: Statistics, world: World) -> Statistics:
        """The statistics with the counts of all processes; sums stay where they are kept.

        Args:
            own: This process's.
            world: The processes.

        Returns:
            The same where all processes have read the same samples.
        """
        if not self.adds:
            return own
        tokens, counts = own.counts_of_all(world)
        return Statistics({n: replace(layer, tokens=tokens[n]) for n, layer in own.layers.items()}, **counts)


class KeptSums(Accumulator):
    """Takes tokens on every process and keeps their sums on one.

    What a batch adds is summed up apart and goes to the owner at once, so that no other process holds more than one
    layer's sums at a time. All processes must take part in every update, with `rest` where they have no tokens.
    """

    def __init__(
        self,
        make: Callable[[], Accumulator],
        keep: Callable[[Accumulator], Accumulator],
        world: World,
        owner: int,
        *,
        adds: bool,
    ) -> None:
        self._make, self._world, self._owner, self._adds = make, world, owner, adds
        self._sums = keep(make()) if world.rank == owner else None

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        if self._adds:
            batch = self._make()
            batch.update(inputs, output_grads, example)
            self._send(batch)
        elif self._sums is not None:
            self._sums.update(inputs, output_grads, example)

    def rest(self) -> None:
        """Takes part in an update without any tokens."""
        if self._adds:
            self._send(self._make())

    def _send(self, batch: Accumulator) -> None:
        sums = batch.statistics()
        self._world.add_at("sums of a batch", list(sums.values()), self._owner)
        if self._sums is not None:
            self._sums.merge(sums)

    def statistics(self) -> dict[str, Tensor]:
        return {} if self._sums is None else self._sums.statistics()

    def end_pass(self, index: int, merged: FisherStatistics) -> None:
        if self._sums is not None:
            self._sums.end_pass(index, merged)
