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
from lora_da_core.block_trial import obstacle
from lora_da_core.blocks import find_blocks
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
    from lora_da_core.adapter import Targets
    from lora_da_core.pipeline import Pipeline


class PlannedModel:
    """A model's layers, and what depends neither on the size of batches nor on how layers are divided.

    Args:
        model: As `estimate_memory` takes it.
        targets: The layers that the adapter adapts.
        pipeline: The pipeline that will run.
        workload: The data.
        device: Where it will run.
    """

    def __init__(
        self, model: nn.Module, targets: Targets, pipeline: Pipeline, workload: Workload, device: torch.device
    ) -> None:
        from lora_da_core import adapter

        self.model, self.pipeline, self.workload, self.device = model, pipeline, workload.on(device), device
        parts, config = pipeline.components, pipeline.config
        self.base = adapter.base_of(model)
        self.specs: Sequence[LayerSpec] = targets.specs
        parts.check_layers(self.specs)
        if parts.allocator is not None:
            # Layers are solved at the largest rank that they may get.
            tokens = {spec.name: workload.total for spec in targets.specs}
            self.specs = Allocation(pipeline.registry, parts.allocator, targets.specs).largest(tokens)
        self.modules = targets.modules
        self.notes = [*targets.notes]
        self.probe = WorkspaceProbe(
            pipeline.registry, parts.estimator, parts.gradient, config, device, pipeline.measured
        )
        self.weights = resident_bytes(self.base)
        adapted = {id(module) for module in targets.modules.values()}
        self.beside = sum(
            math.prod(matrix.shape)
            for module in self.base.modules()
            if id(module) not in adapted and not isinstance(module, nn.Embedding)
            for matrix in module.parameters(recurse=False)
            if matrix.ndim > 1
        )
        self.obstacle = obstacle(self.base, parts.estimator, parts.gradient)
        self.blocks = find_blocks(self.base, self.modules) if self.obstacle is None else None

    @property
    def backward(self) -> bool:
        """Whether losses are differentiated."""
        parts = self.pipeline.components
        return parts.estimator.needs_output_grads or not parts.gradient.forward_only

    def traced(self, batch: BatchShape, updates: Mapping[str, int], backward: bool) -> Activations:
        """What a batch takes, from the model's code where it runs on tensors without values.

        Args:
            batch: As `trace` takes it.
            updates: As `trace` takes it.
            backward: As `trace` takes it.

        Returns:
            The peak, and which layers read one input.
        """
        from lora_da_core import adapter

        # Where all layers are tapped, parts of blocks may come of it.
        blocks = self.blocks if backward and len(updates) > 1 else None
        try:
            with adapter.adapters_disabled(self.model):
                return trace(self.base, batch, updates, backward=backward, blocks=blocks)
        except Exception as error:  # the model's own code may raise anything where tensors have no values
            note = (
                "this model does not run on tensors without values "
                f"({type(error).__name__}: {reason(error).rstrip('.')}); activations are a rough guess from the sizes "
                "of its matrices, and no two layers are taken to share an input."
            )
            if note not in self.notes:
                self.notes.append(note)
            return guess(self.base, batch, updates, backward=backward)


class PlannedLayers:
    """The layers with the bytes of each, and what else a run takes with batches of one size.

    Args:
        planned: The model.
        batch_size: Samples in a batch.
    """

    def __init__(self, planned: PlannedModel, batch_size: int) -> None:
        self.planned, self.pipeline, self.device = planned, planned.pipeline, planned.device
        self.specs, self.notes = planned.specs, planned.notes
        self.workload = replace(planned.workload, batch_size=batch_size)
        batch = self.workload.batch
        layers = {spec.name: self._layer(spec, planned.modules[spec.name]) for spec in self.specs}
        self.time = PassTime(
            beside=planned.beside,
            backward=planned.backward,
            tokens=self.workload.total,
            batch_tokens=batch.samples * batch.tokens,
            offloaded_weights=offloaded_bytes(planned.base),
            device=self.device.type,
        )
        self._on_device = self._phases(layers)
        grouped: dict[str, list[LayerBytes]] = {}
        for name, layer in layers.items():
            grouped.setdefault(self._on_device.all_tapped.leaders.get(name, name), []).append(layer)
        self.groups: Sequence[Group] = list(grouped.values())

    @property
    def activations(self) -> Activations:
        """What a batch takes with all layers tapped."""
        return self._on_device.all_tapped

    @property
    def batches(self) -> float:
        """How many batches of this size hold all tokens."""
        work = self.workload
        # Where samples have one label each, labels do not tell of tokens.
        by_samples = work.samples / work.batch.samples
        return by_samples if work.total <= work.samples else work.total / (work.batch.rows * work.batch.tokens)

    @functools.cached_property
    def groups_by_block(self) -> Sequence[Sequence[int]] | None:
        """The numbers of the groups in each block, and after all blocks; None where no blocks can be run alone."""
        blocks = self.planned.blocks
        if blocks is None or self.activations.blocks is None:
            return None
        count = len(blocks.modules)
        found: list[list[int]] = [[] for _ in range(count + 1)]
        for number, group in enumerate(self.groups):
            homes = {blocks.numbers.get(layer.spec.name, count) for layer in group}
            if len(homes) > 1:
                return None
            found[homes.pop()].append(number)
        return found

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

    def phases_at(self, place: StatisticsDevice, waiting: int) -> Phases:
        """The phases of runs in one pass.

        Args:
            place: Where sums lie between updates.
            waiting: Bytes of operators of one shape, in float64, that may wait for a batched solve.

        Returns:
            Their bytes on the device.
        """
        return replace(self._raised(self._on_device, place), waiting=waiting)

    def divisible_phases_at(self, place: StatisticsDevice, waiting: int) -> Phases:
        """The phases of runs in several passes, likewise."""
        return replace(self._raised(self._divisible, place), waiting=waiting)

    @functools.cached_property
    def _divisible(self) -> Phases:
        first = self.groups[0][0]
        tapped = {first.spec.name: first.workspace.update}
        planned = self.planned
        return replace(
            self._on_device, one_tapped=planned.traced(self.workload.batch, tapped, backward=planned.backward)
        )

    def _raised(self, phases: Phases, place: StatisticsDevice) -> Phases:
        """With the sums that come for an update: they are taken to come while a batch takes most."""
        pairs = zip(self.groups, self.groups_at(place), strict=True)
        coming = max(b.workspace.update - a.workspace.update for pair in pairs for a, b in zip(*pair, strict=True))
        one, all_tapped = phases.one_tapped, phases.all_tapped
        blocks = None if all_tapped.blocks is None else all_tapped.blocks.raised(coming)
        return replace(
            phases,
            all_tapped=replace(all_tapped, peak=all_tapped.peak + coming, blocks=blocks),
            one_tapped=None if one is None else replace(one, peak=one.peak + coming),
        )

    def _layer(self, spec: LayerSpec, module: nn.Module) -> LayerBytes:
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
            workspace=self.planned.probe.workspace(spec, tokens, solver, dtype),
        )

    def _phases(self, layers: Mapping[str, LayerBytes]) -> Phases:
        config, batch, planned = self.pipeline.config, self.workload.batch, self.planned
        updates = {name: layer.workspace.update for name, layer in layers.items()}
        forward_only = self.pipeline.components.gradient.forward_only
        return Phases(
            weights=planned.weights,
            all_tapped=planned.traced(batch, updates, backward=planned.backward),
            one_tapped=None,
            forward=planned.traced(batch, {}, backward=False) if forward_only else None,
            search=planned.traced(self.workload.search, {}, backward=False) if config.automatic_scale else None,
            rounds=config.rounds,
            device=self.device,
        )
