"""The running sums of a run: of each layer, and of each input that layers share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_da_core.errors import TargetError
from lora_da_core.interfaces import Accumulator
from lora_da_core.types import FisherStatistics, LayerSpec
from lora_da_core.world import World


class StoredSums(Accumulator):
    """Sums that are complete: read back, or merged from several processes."""

    def __init__(self, sums: Mapping[str, Tensor]) -> None:
        self._sums = dict(sums)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        raise TypeError("stored sums take no more tokens")

    def merge(self, other: Mapping[str, Tensor]) -> None:
        raise TypeError("stored sums take no other shard")

    def statistics(self) -> dict[str, Tensor]:
        return dict(self._sums)


class SumsByLayer(Mapping[str, Mapping[str, Tensor]]):
    """The sums of accumulators by layer, each asked for when it is wanted: they may lie elsewhere until then."""

    def __init__(self, accumulators: Mapping[str, Accumulator]) -> None:
        self._accumulators = accumulators

    def __getitem__(self, layer: str) -> Mapping[str, Tensor]:
        return self._accumulators[layer].statistics()

    def __iter__(self) -> Iterator[str]:
        return iter(self._accumulators)

    def __len__(self) -> int:
        return len(self._accumulators)


@dataclass
class InputGroup:
    """The layers that read one input tensor, and the statistics they share."""

    leader: str
    accumulator: Accumulator
    shared: dict[Any, Any] = field(default_factory=dict)


@dataclass
class LayerStatistics:
    """The accumulators of one layer; `group` is known once the layer has run."""

    spec: LayerSpec
    fisher: Accumulator
    gradient: Accumulator | None
    group: InputGroup | None = None
    tokens: int = 0


@dataclass
class Statistics:
    """All sums of a run."""

    layers: dict[str, LayerStatistics]
    samples: int = 0
    label_tokens: int = 0
    loss_sum: float = 0.0

    @property
    def counts(self) -> dict[str, Any]:
        """What is counted of the samples, by the names of fields."""
        return {"samples": self.samples, "label_tokens": self.label_tokens, "loss_sum": self.loss_sum}

    def counts_of_all(self, world: World) -> tuple[dict[str, int], dict[str, Any]]:
        """Tokens by layer and `counts`, added over the processes, which all ask alike and know of the same layers."""
        told = world.exchange("counts", [{name: layer.tokens for name, layer in self.layers.items()}, self.counts])
        tokens = {name: sum(theirs[0][name] for theirs in told) for name in self.layers}
        return tokens, {name: sum(theirs[1][name] for theirs in told) for name in self.counts}

    def tokens_of(self, name: str) -> int:
        """How many tokens of a layer count for the Fisher; 0 where it never ran."""
        return self.layers[name].tokens if name in self.layers else 0

    def leaders(self) -> dict[str, str]:
        """The first reader of the input that a layer reads, by layer; the layer itself where it never ran."""
        return {name: layer.group.leader if layer.group else name for name, layer in self.layers.items()}

    def forget_shared(self, name: str) -> None:
        """Drops what layers that read the input of this one have made of it together."""
        group = self.layers[name].group
        if group is not None:
            group.shared.clear()

    def of_layer(self, name: str) -> FisherStatistics:
        """The Fisher statistics of one layer, its input's included."""
        layer = self.layers[name]
        if layer.group is None:
            raise TargetError(f"layer {name} never ran")
        return FisherStatistics(
            spec=layer.spec,
            input=layer.group.accumulator.statistics(),
            layer=layer.fisher.statistics(),
            samples=self.samples,
            tokens=layer.tokens,
            shared=layer.group.shared,
        )
