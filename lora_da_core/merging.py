"""The sums of all processes from those of each: added where they add, else merged by the plugin's own code."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_da_core.blame import blamed
from lora_da_core.interfaces import Accumulator
from lora_da_core.running_sums import InputGroup, LayerStatistics, Statistics, StoredSums
from lora_da_core.sums_storage import SumsStorage
from lora_da_core.world import World


class Merger:
    """Makes the statistics of all processes after a pass.

    Args:
        world: The processes.
        adds: Whether the sums of the estimator and of the gradient estimator add.
        last: Whether this was the last pass: own sums are then overwritten, and need no second copy.
        storage: Where sums lie between updates; they are then added layer by layer instead of all together.
    """

    def __init__(
        self, world: World, *, adds: Mapping[str, bool], last: bool, storage: SumsStorage | None = None
    ) -> None:
        self._world, self._adds, self._last, self._storage = world, adds, last, storage
        self._adding: list[Tensor] = []

    def merged(self, own: Statistics) -> Statistics:
        """The statistics of all processes, the same on each.

        Args:
            own: This process's; every process knows of the same layers and inputs.

        Returns:
            The merged ones; `own` itself in a single process.

        Raises:
            PluginError: A plugin's `merge` raised.
        """
        if self._world.size == 1:
            return own
        counted, counts = own.counts_of_all(self._world)
        groups: dict[str, InputGroup] = {}
        layers: dict[str, LayerStatistics] = {}
        for name, layer in own.layers.items():
            tokens = counted[name]
            if layer.group is None:
                layers[name] = LayerStatistics(layer.spec, layer.fisher, layer.gradient, None, tokens)
                continue
            leader = layer.group.leader
            if leader not in groups:
                groups[leader] = InputGroup(leader, self._sums("estimator", leader, layer.group.accumulator))
            fisher = self._sums("estimator", name, layer.fisher)
            # The gradient's sums are complete after the last pass; none in between asks for them.
            wanted = layer.gradient is not None and self._last
            gradient = self._sums("gradient", name, layer.gradient) if wanted and layer.gradient else None
            layers[name] = LayerStatistics(layer.spec, fisher, gradient, groups[leader], tokens)
        self._world.add("sums", self._adding)
        return Statistics(layers, **counts)

    def _sums(self, kind: str, layer: str, accumulator: Accumulator) -> Accumulator:
        with blamed(kind, f" on layer {layer}"):
            own = accumulator.statistics()
        if not self._adds[kind]:
            sums = self._by_plugin(kind, layer, accumulator, own)
        else:
            sums = own if self._last else {key: value.clone() for key, value in own.items()}
            self._adding += sums.values()
        if self._storage is None:
            return StoredSums(sums)
        self._world.add("sums", self._adding)
        self._adding.clear()
        return self._storage.keep(StoredSums(sums))

    def _by_plugin(
        self, kind: str, layer: str, accumulator: Accumulator, own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rank 0 merges what the others send, in the order of their ranks, and sends the result."""
        world, phase = self._world, f"sums of {layer}"
        device = next((value.device for value in own.values() if value.device.type != "cpu"), torch.device("cpu"))
        whole = accumulator if self._last or world.rank else copy.deepcopy(accumulator)
        for source in range(1, world.size):
            theirs = world.broadcast(phase, own, source, device)
            if world.rank == 0:
                with blamed(kind, f" on layer {layer}, merging"):
                    whole.merge(theirs)
        return world.broadcast(phase, whole.statistics(), 0, device)
