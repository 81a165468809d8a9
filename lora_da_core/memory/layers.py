"""The layers of a model with the bytes of each, and the phases of a run that they go through."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_da_core.allocation import Allocation
from lora_da_core.memory.activations import Activations, BatchShape, guess, trace
from lora_da_core.memory.phases import Group, LayerBytes, Phases
from lora_da_core.memory.time import PassTime
from lora_da_core.memory.workload import Workload
from lora_da_core.memory.workspace import Tokens, WorkspaceProbe
from lora_da_core.operators import accumulation_dtype
from lora_da_core.placement import offloaded_bytes, resident_bytes
from lora_da_core.sources import reason
from lora_da_core.types import LayerSpec, StatisticsDevice

if TYPE_CHECKING:
    from peft import LoraConfig

    from lora_da_core.pipeline import Pipeline


class PlannedLayers:
    """A model's layers with the bytes of each, and what does not depend on how they are divided.

    Args:
        model: As `estimate_memory` takes it.
        pipeline: The pipeline that will run.
        workload: The data.
        device: Where it will run.
    """

    def __init__(self, model: nn.Module, pipeline: Pipeline, workload: Workload, device: torch.device) -> None:
        self.model, self.pipeline, self.workload, self.device = model, pipeline, workload, device
        self.specs: tuple[LayerSpec, ...] = ()
        self.groups: Sequence[Group] = []
        self.notes: list[str] = []

    def read(self, peft_config: LoraConfig | None) -> None:
        """Finds the layers, what each takes, and who reads one input.

        Args:
            peft_config: As `estimate_memory` takes it.
        """
        from lora_da_core import adapter

        lora = adapter.chosen_config(self.model, peft_config, "default")
        parts, config = self.pipeline.components, self.pipeline.config
        targets = adapter.resolve_targets(self.model, lora, unsupported=config.unsupported)
        self.specs = targets.specs
        parts.check_layers(self.specs)
        if parts.allocator is not None:
            # Layers are solved at the largest rank that they may get.
            tokens = {spec.name: self.workload.total for spec in targets.specs}
            self.specs = Allocation(self.pipeline.registry, parts.allocator, targets.specs).largest(tokens)
        self.notes += targets.notes
        probe = WorkspaceProbe(self.pipeline.registry, parts.estimator, parts.gradient, config, self.device)
        layers = {spec.name: self._layer(spec, targets.modules[spec.name], probe) for spec in self.specs}
        adapted = {id(module) for module in targets.modules.values()}
        beside = sum(
            math.prod(matrix.shape)
            for module in adapter.base_of(self.model).modules()
            if id(module) not in adapted and not isinstance(module, nn.Embedding)
            for matrix in module.parameters(recurse=False)
            if matrix.ndim > 1
        )
        base, batch = adapter.base_of(self.model), self.workload.batch
        self.time = PassTime(
            beside=beside,
            backward=self._backward,
            tokens=self.workload.total,
            batch_tokens=batch.samples * batch.tokens,
            offloaded_weights=offloaded_bytes(base),
            device=self.device.type,
        )
        self._on_device = self._phases(layers)
        grouped: dict[str, list[LayerBytes]] = {}
        for name, layer in layers.items():
            grouped.setdefault(self._on_device.all_tapped.leaders.get(name, name), []).append(layer)
        self.groups = list(grouped.values())

    def groups_at(self, place: StatisticsDevice) -> Sequence[Group]:
        """The groups with what each layer takes on the device.

        Args:
            place: Where sums lie between updates.

        Returns:
            In the order of `groups`.
        """
        if place == "device":
            return self.groups
        stays = self.pipeline.components.gradient.forward_only
        return [[layer.elsewhere(gradient_stays=stays) for layer in group] for group in self.groups]

    def phases_at(self, place: StatisticsDevice) -> Phases:
        """The phases of runs in one pass.

        Args:
            place: Where sums lie between updates.

        Returns:
            Their bytes on the device.
        """
        return self._raised(self._on_device, place)

    def divisible_phases_at(self, place: StatisticsDevice) -> Phases:
        """The phases of runs in several passes, likewise."""
        return self._raised(self._divisible, place)

    @functools.cached_property
    def _divisible(self) -> Phases:
        first = self.groups[0][0]
        tapped = {first.spec.name: first.workspace.update}
        return replace(self._on_device, one_tapped=self._traced(self.workload.batch, tapped, self._backward))

    def _raised(self, phases: Phases, place: StatisticsDevice) -> Phases:
        """With the sums that come for an update: they are taken to come while a batch takes most."""
        pairs = zip(self.groups, self.groups_at(place), strict=True)
        coming = max(b.workspace.update - a.workspace.update for pair in pairs for a, b in zip(*pair, strict=True))
        one = phases.one_tapped
        return replace(
            phases,
            all_tapped=replace(phases.all_tapped, peak=phases.all_tapped.peak + coming),
            one_tapped=None if one is None else replace(one, peak=one.peak + coming),
        )

    @property
    def _backward(self) -> bool:
        parts = self.pipeline.components
        return parts.estimator.needs_output_grads or not parts.gradient.forward_only

    def _layer(self, spec: LayerSpec, module: nn.Module, probe: WorkspaceProbe) -> LayerBytes:
        parts, registry, workload = self.pipeline.components, self.pipeline.registry, self.workload
        weight = getattr(module, spec.parameter, None)
        # The weights of a quantized layer are no floating numbers; its inputs are.
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.bfloat16
        itemsize = accumulation_dtype(dtype).itemsize
        batch = workload.batch

        def statistics(samples: int, tokens: int) -> tuple[int, int]:
            return parts.estimator.statistics_bytes(spec, samples=samples, tokens=tokens, itemsize=itemsize)

        shared, own = statistics(workload.samples, workload.total)
        last = batch.samples * workload.total // workload.samples
        _, earlier = statistics(workload.samples - batch.samples, workload.total - last)
        gradient = parts.gradient.statistics_bytes(spec, itemsize=itemsize)
        solver = parts.solver or registry.create(
            "solver", registry.choose_solver(spec.in_features, spec.rank, self.device.type)
        )
        tokens = Tokens(batch.rows * batch.tokens, workload.total, workload.samples)
        return LayerBytes(
            spec=spec,
            input=shared,
            layer=own + gradient,
            gradient=gradient,
            earlier=earlier + gradient,
            solution=8 * spec.rank * (spec.in_features + spec.out_features),
            workspace=probe.workspace(spec, tokens, solver, dtype),
        )

    def _phases(self, layers: Mapping[str, LayerBytes]) -> Phases:
        from lora_da_core.adapter import base_of

        config, batch, base = self.pipeline.config, self.workload.batch, base_of(self.model)
        updates = {name: layer.workspace.update for name, layer in layers.items()}
        forward_only = self.pipeline.components.gradient.forward_only
        return Phases(
            weights=resident_bytes(base),
            all_tapped=self._traced(batch, updates, self._backward),
            one_tapped=None,
            forward=self._traced(batch, {}, False) if forward_only else None,
            search=self._traced(self.workload.search, {}, False) if config.automatic_scale else None,
            rounds=config.rounds,
            device=self.device,
        )

    def _traced(self, batch: BatchShape, updates: Mapping[str, int], backward: bool) -> Activations:
        from lora_da_core import adapter

        base = adapter.base_of(self.model)
        try:
            with adapter.adapters_disabled(self.model):
                return trace(base, batch, updates, backward=backward)
        except Exception as error:  # the model's own code may raise anything where tensors have no values
            note = (
                "this model does not run on tensors without values "
                f"({type(error).__name__}: {reason(error).rstrip('.')}); activations are a rough guess from the sizes "
                "of its matrices, and no two layers are taken to share an input."
            )
            if note not in self.notes:
                self.notes.append(note)
            return guess(base, batch, updates, backward=backward)
