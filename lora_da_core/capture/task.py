"""What a run of the model is told: which layers, by which components, and where everything lies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_da_core.batches import labelled_part
from lora_da_core.blame import blamed
from lora_da_core.custody import Custody
from lora_da_core.interfaces import Accumulator, Component, FisherEstimator, GradientEstimator, Objective
from lora_da_core.layer_kinds import KINDS, Call
from lora_da_core.operators import LinearMap, accumulation_dtype
from lora_da_core.placement import execution_device, has_sharded_parts, model_device
from lora_da_core.shares import Share, even_share, share_of
from lora_da_core.sums_storage import SumsStorage
from lora_da_core.taps import TokenLedger
from lora_da_core.types import Batch, LayerSpec, TokenMask
from lora_da_core.world import ALONE, World

HiddenStates = Literal["device", "host"]
"""Where hidden states lie while parts of blocks are run again."""

ComponentKind = Literal["estimator", "gradient", "objective"]
"""The components that a run of the model calls."""


@dataclass(frozen=True)
class SweepSettings:
    """How parts of blocks are run in one sweep over the data, in the place of a pass for each.

    Attributes:
        hidden_states: Where hidden states lie meanwhile.
        head_alone: Whether what follows the blocks is run before the first part; else together with it.
    """

    hidden_states: HiddenStates = "device"
    head_alone: bool = False


@dataclass(frozen=True)
class CaptureTask:
    """What to run: the model, the layers' modules by name, and the components that define the statistics."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    specs: Sequence[LayerSpec]
    """The layers whose statistics are taken."""
    objective: Objective[Any]
    estimator: FisherEstimator[Any]
    gradient: GradientEstimator[Any]
    token_mask: TokenMask
    base_only: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """Within it the model computes the base function, whatever adapters it carries."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Distribution and version by kind of component, for error messages."""
    changes: Mapping[str, LinearMap] = field(default_factory=dict)
    """By layer, what is added to its weights (out, in) while the model runs; no weight is touched."""
    beside: Sequence[LayerSpec] = ()
    """Layers whose statistics other passes take; in this one they run as they do in those."""
    world: World = ALONE
    """The processes that share the run; each reads its share of the batches."""
    custody: Custody | None = None
    """Which process keeps the sums of which layer; None where every one gets all of them."""
    storage: SumsStorage | None = None
    """Where sums lie between updates; None where they stay on their layers' devices."""
    sweep: SweepSettings | None = None
    """How parts of the layers are run in one sweep; None where each takes a pass."""

    @property
    def device(self) -> torch.device:
        """Where batches go: where the first of the model's weights are used."""
        return model_device(self.model)

    def device_of(self, layer: str) -> torch.device:
        """Where a layer computes, and its sums lie."""
        return execution_device(self.modules[layer]) or self.device

    def dtype_of(self, spec: LayerSpec) -> torch.dtype:
        """The dtype of a layer's sums and factors: the larger of float32 and its weights'."""
        weight = getattr(self.modules[spec.name], spec.parameter, None)
        return accumulation_dtype(weight.dtype if isinstance(weight, Tensor) else torch.float32)

    def kept(self, sums: Accumulator) -> Accumulator:
        """Sums where they lie between updates."""
        return sums if self.storage is None else self.storage.keep(sums)

    def share(self, batches: Sequence[Batch]) -> Share:
        """This process's share of batches; processes that gather each other's weights run equally many."""
        if self.world.size == 1 or not has_sharded_parts(self.model):
            return share_of(batches, self.world.rank, self.world.size)
        parts = [labelled_part(self.objective, batch) for batch in batches]
        return even_share([part for part in parts if part is not None], self.world.rank, self.world.size)

    def ledger(self, part: Batch) -> TokenLedger:
        """For a forward pass that only looks: whose tokens are seen, and which count."""
        specs = {spec.name: spec for spec in self.specs}

        def mask_of(name: str, tokens: int) -> Tensor:
            return self.objective.token_mask(part, specs[name], self.token_mask, tokens)

        return TokenLedger(len(part["labels"]), mask_of, self.device)

    def output_of(self, call: Call, spec: LayerSpec) -> Tensor:
        """A layer's output, with what is added to its weights."""
        if spec.name not in self.changes:
            return call.output
        module = self.modules[spec.name]
        return KINDS[spec.kind].changed(module, call.output, call.inputs, self.changes[spec.name])

    def named(self, kind: ComponentKind) -> str:
        """A component for error messages: its kind, its name and where it comes from, as far as that is known."""
        component: Component[Any] = getattr(self, kind)
        origin = f" ({self.origins[kind]})" if kind in self.origins else ""
        return f"{kind} {component.name!r}{origin}"

    def blamed(self, kind: ComponentKind, place: str = "") -> AbstractContextManager[None]:
        """What a plugin's code raises becomes an error that names it.

        Args:
            kind: Whose code runs.
            place: Where, e.g. ` on layer x`.
        """
        return blamed(self.named(kind), place)

    @property
    def needs_backward(self) -> bool:
        """Whether anything needs output gradients."""
        return self.estimator.needs_output_grads or not self.gradient.forward_only
