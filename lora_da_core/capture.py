"""Runs the model over the batches and feeds the accumulators: the only room that touches modules, and it restores them.

Gradients come from taps on the layers' outputs, so no weight needs a `.grad` and quantized bases work.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_da_core.batches import labelled_part, take_rows, to_device
from lora_da_core.blame import blamed
from lora_da_core.custody import Custody, KeptSums
from lora_da_core.errors import ModelError, PluginError, TargetError
from lora_da_core.interfaces import Accumulator, Component, FisherEstimator, GradientEstimator, Objective
from lora_da_core.layer_kinds import KINDS, Call, watched
from lora_da_core.loss_scale import find_loss_scale
from lora_da_core.merging import Merger
from lora_da_core.model_state import first_non_finite_module, prepared, recomputing
from lora_da_core.operators import LinearMap, accumulation_dtype
from lora_da_core.placement import (
    execution_device,
    has_sharded_parts,
    model_device,
    offload_hook,
    offloaded_weights_reloaded,
)
from lora_da_core.running_sums import InputGroup, LayerStatistics, Statistics
from lora_da_core.shares import Share, even_share, share_of
from lora_da_core.sums_storage import SumsStorage
from lora_da_core.taps import InputRecord, Places, Tap, TokenLedger, Use
from lora_da_core.types import Batch, LayerSpec, TokenMask
from lora_da_core.world import ALONE, World

HiddenStates = Literal["device", "host"]
"""Where hidden states lie while parts of blocks are run again."""

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, what is done and what there is to do."""


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

    @property
    def needs_backward(self) -> bool:
        """Whether anything needs output gradients."""
        return self.estimator.needs_output_grads or not self.gradient.forward_only


def collect(
    task: CaptureTask, batches: Sequence[Batch], *, generator: torch.Generator, on_progress: Progress | None = None
) -> Statistics:
    """Runs every pass of the estimator over the batches.

    Samples without labels are left out. The result does not depend on how samples are batched, ordered or padded.

    Args:
        task: What to run.
        batches: Mappings of tensors whose first dimension counts samples.
        generator: Source of labels drawn from the model, on the CPU.
        on_progress: Told of every batch.

    Returns:
        The accumulators and counts.

    Raises:
        ModelError: A loss or gradient is not finite; the model is restored first.
        TargetError: A layer never ran.
        PluginError: An accumulator raised.
    """
    run = Run(task, generator)
    share = _share(task, batches)
    done, total = 0, task.estimator.passes * (len(share.batches) + len(share.idle))
    checkpointing = recomputing(task.model) if task.needs_backward else contextlib.nullcontext()
    with prepared(task.model), task.base_only(), checkpointing, run.taps():
        if not task.needs_backward:
            run.find_single_uses(batches)
        elif any(parameter.dtype == torch.float16 for parameter in task.model.parameters()):
            run.find_scale(batches)
        for index in range(task.estimator.passes):
            with share.draws(generator):
                for number, batch in [*share.batches, *((None, batch) for batch in share.idle)]:
                    run.batch(index, number, batch)
                    done += 1
                    if on_progress is not None:
                        on_progress("statistics", done, total)
            run.end_pass(index)
    return run.merged


def _share(task: CaptureTask, batches: Sequence[Batch]) -> Share:
    if task.custody is not None and not task.custody.adds:
        return share_of(batches, 0, 1)
    share = task.share(batches)
    if task.world.size == 1 or task.estimator.labels != "sampled":
        return share
    return replace(share, drawn=torch.cat([task.objective.draw_counts(batch).cpu() for batch in batches]))


class Run:
    """The statistics of some layers while they are taken: taps, the current batch, and where its tokens go."""

    def __init__(self, task: CaptureTask, generator: torch.Generator) -> None:
        self.task = task
        self.generator = generator
        self._number: int | None = None
        self.groups: dict[tuple[str, ...], InputGroup] = {}
        self.statistics = Statistics({spec.name: self._layer(spec) for spec in task.specs})
        self.merged = self.statistics
        self.specs = {spec.name: spec for spec in (*task.specs, *task.beside)}
        self._device = task.device
        self._offloads = any(offload_hook(module) is not None for module in task.model.modules())
        self._pass = 0
        self._batch: TokenLedger | None = None
        self._takes_gradient = self._takes_fisher = self._takes_inputs = False
        self._counting = False
        self._single_uses: frozenset[str] = frozenset()
        self._scale = 1.0
        self._largest: list[Tensor] | None = None
        self._idle = False

    def find_single_uses(self, batches: Sequence[Batch]) -> None:
        """Runs one sample forward to see which layers are used once.

        Without a backward pass nothing says when a layer's last use is over, so inputs would have to wait for the
        batch's end; those of a layer that is used once need not.
        """
        part = next(part for part in (labelled_part(self.task.objective, batch) for batch in batches) if part)
        sample = to_device(take_rows(part, torch.zeros(1, dtype=torch.int64)), self._device)
        self._batch, self._counting = TokenLedger(1, self._mask_of(sample), self._device), True
        try:
            with torch.no_grad(), self._blamed("objective"):
                self.task.objective.losses(self.task.model, sample)
            self._single_uses = frozenset(name for name, uses in self._batch.uses.items() if uses == 1)
        finally:
            self._batch, self._counting = None, False

    def find_scale(self, batches: Sequence[Batch]) -> None:
        """Chooses what losses are multiplied by, from the first batch: float16 would lose small gradients."""
        part = next(part for part in (labelled_part(self.task.objective, batch) for batch in batches) if part)
        on_device, samples = to_device(part, self._device), len(part["labels"])

        def largest_gradient(scale: float) -> float:
            self._batch, self._largest = TokenLedger(samples, self._mask_of(part), self._device), []
            try:
                with torch.enable_grad(), self._weights_reloaded():
                    with self._blamed("objective"):
                        losses = self.task.objective.losses(self.task.model, on_device)
                    if not losses.requires_grad:
                        return 0.0  # the first batch will tell why
                    (losses.sum() * scale).backward()  # type: ignore[no-untyped-call]
                found = torch.stack([each.to(self._device) for each in self._largest] or [losses.new_zeros(())])
                return float(found.max())
            finally:
                self._batch, self._largest = None, None

        self._scale = find_loss_scale(largest_gradient)

    def _layer(self, spec: LayerSpec) -> LayerStatistics:
        device, dtype = self.task.device_of(spec.name), self.task.dtype_of(spec)
        make = partial(self.task.estimator.layer_accumulator, spec, device=device, dtype=dtype)
        with self._blamed("estimator", spec.name):
            fisher = self._kept(make, spec.name)
        if self.task.gradient.forward_only:
            return LayerStatistics(spec, fisher, None)
        with self._blamed("gradient", spec.name):
            make = partial(self.task.gradient.accumulator, spec, device=device, dtype=dtype)
            return LayerStatistics(spec, fisher, self._kept(make, spec.name))

    def _kept(self, make: Callable[[], Accumulator], layer: str) -> Accumulator:
        task = self.task
        if task.custody is None:
            return task.kept(make())
        return task.custody.kept(make, task.kept, task.world, layer)

    def taps(self) -> AbstractContextManager[None]:
        """Taps on every layer, removed whatever happens."""
        return watched(self.task.modules, (*self.task.specs, *self.task.beside), self.tap)

    def tap(self, call: Call) -> Tensor:
        """Gives a layer's output on, tapped where its statistics are taken."""
        name, output, ledger = call.layer, call.output, self._batch
        kind, module = KINDS[self.specs[name].kind], self.task.modules[name]
        if name in self.task.changes:
            output = kind.changed(module, output, call.inputs, self.task.changes[name])
        if ledger is None or (self.task.needs_backward and not torch.is_grad_enabled()):
            return output
        if name not in self.statistics.layers and self._largest is None:
            # Of another pass; only the scale of losses, which all passes share, is found from all layers.
            return output
        ledger.uses[name] = ledger.uses.get(name, 0) + 1
        if self._counting:
            return output
        use = Use(name, ledger.input_of(call.inputs, name, kind.reading(module)), call.routed)
        if not self.task.needs_backward:
            self._sink(use, call.inputs.detach(), None)
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        tapped: Tensor = Tap.apply(output, call.inputs.detach(), use, self._sink)  # type: ignore[no-untyped-call]
        return tapped

    def batch(self, index: int, number: int | None, batch: Batch) -> None:
        """One batch of one pass: forward, backward, and the draws of a model-label Fisher.

        One without a number is run for other processes' sake, which gather weights with this one.
        """
        task, part = self.task, labelled_part(self.task.objective, batch)
        if part is None:
            return
        samples = len(part["labels"])
        self._pass, self._number, self._idle = index, number, number is None
        mask_of = self._mask_of(part)
        first, drawn = index == 0, task.estimator.labels != "empirical"
        if first and not self._idle:
            self.statistics.samples += samples
            self.statistics.label_tokens += int(task.objective.label_counts(part).sum())
        on_device = to_device(part, self._device)
        self._takes_gradient = first and not task.gradient.forward_only
        self._takes_inputs, self._takes_fisher = True, not drawn
        losses = self._differentiate(lambda: task.objective.losses(task.model, on_device), samples, mask_of)
        if first and not self._idle:
            self.statistics.loss_sum += float(losses.detach().double().sum())
        if drawn and task.estimator.needs_output_grads:
            self._takes_gradient = self._takes_inputs = False
            self._takes_fisher = True
            # What is drawn for the others' sake takes no numbers of this process's samples.
            generator = torch.Generator().manual_seed(0) if self._idle else self.generator
            draws = task.objective.fisher_losses(task.model, on_device, task.estimator.labels, generator=generator)
            for draw in draws:
                self._differentiate(draw, samples, mask_of)

    def again(self, number: int, batch: Batch, differentiate: Callable[[], None]) -> None:
        """Takes statistics from a part of the model that is run again, and differentiated, on a batch.

        Args:
            number: The batch's number.
            batch: A batch with labels, as `batch` was given it.
            differentiate: Runs the part forward and backward.
        """
        part = labelled_part(self.task.objective, batch)
        assert part is not None, "whose forward pass was run had labels"
        self._pass, self._number, self._idle = 0, number, False
        self._takes_gradient = not self.task.gradient.forward_only
        self._takes_inputs = self._takes_fisher = True
        with self._taking(len(part["labels"]), self._mask_of(part)), torch.enable_grad():
            differentiate()

    @contextlib.contextmanager
    def _taking(self, samples: int, mask_of: Callable[[str, int], Tensor]) -> Iterator[None]:
        """Within it, tokens of one batch are taken."""
        self._batch = TokenLedger(samples, mask_of, self._device)
        try:
            yield
            for name in list(self._batch.waiting):
                self._flush(name)
            self._check_gradients()
        finally:
            self._batch = None

    def _mask_of(self, part: Batch) -> Callable[[str, int], Tensor]:
        """The token masks of a batch; the objective is asked once for each number of tokens, or for each layer."""
        known: dict[tuple[str, int], Tensor] = {}
        objective = self.task.objective

        def mask_of(name: str, tokens: int) -> Tensor:
            key = (name if objective.masks_by_layer else "", tokens)
            if key not in known:
                with self._blamed("objective", name):
                    known[key] = objective.token_mask(part, self.specs[name], self.task.token_mask, tokens)
            return known[key]

        return mask_of

    def _differentiate(
        self, losses_of: Callable[[], Tensor], samples: int, mask_of: Callable[[str, int], Tensor]
    ) -> Tensor:
        with (
            self._taking(samples, mask_of),
            torch.set_grad_enabled(self.task.needs_backward),
            self._weights_reloaded(),
        ):
            with self._blamed("objective"):
                losses = losses_of()
            if not isinstance(losses, Tensor) or losses.shape != (samples,):
                returned = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"type {type(losses)}"
                raise PluginError(
                    f"objective {self.task.objective.name!r} returned losses of {returned} "
                    f"for {samples} samples in batch {self._number}; it must be one loss per sample."
                )
            if not bool(losses.isfinite().all()):
                raise self._not_finite(losses_of, losses)
            if self.task.needs_backward and self._has_graph(losses):
                (losses.sum() * self._scale).backward()  # type: ignore[no-untyped-call]
        return losses

    def _weights_reloaded(self) -> AbstractContextManager[None]:
        return offloaded_weights_reloaded(self.task.model) if self._offloads else contextlib.nullcontext()

    def _has_graph(self, losses: Tensor) -> bool:
        assert self._batch is not None
        if losses.requires_grad:
            return True
        if not self._batch.uses and self.task.beside:
            # The layers of other passes may have run: experts do not see every batch.
            return False
        if not self._batch.uses:
            raise TargetError(f"no targeted layer ran in batch {self._number}; give data that reaches them.")
        raise PluginError(
            f"objective {self.task.objective.name!r} returned losses without a graph in batch {self._number}, "
            "so they cannot be differentiated; it must not detach what the model computed."
        )

    def _not_finite(self, losses_of: Callable[[], Tensor], losses: Tensor) -> ModelError:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        self._batch = None
        layer = first_non_finite_module(self.task.model, losses_of)
        where = (
            f"the first module whose output is not finite is {layer}" if layer else "every module's output is finite"
        )
        return ModelError(
            f"the loss is not finite in batch {self._number} (samples {bad[:8]} of it); {where}. "
            "Try float32 (dtype) and look at that batch's data."
        )

    def _check_gradients(self) -> None:
        assert self._batch is not None
        if not self._batch.finite:
            return
        names = list(self._batch.finite)
        # One synchronisation per batch, whatever the number of layers.
        flags = torch.stack([flag.to(self._device) for flag in self._batch.finite.values()])
        if not bool(flags.isfinite().all()):
            first = names[int((~flags.isfinite()).int().argmax())]
            raise ModelError(
                f"the gradient is not finite in batch {self._number}; going back from the loss, layer {first} is the "
                "first that receives one. Try float32 (dtype) and look at that batch's data."
            )

    def _sink(self, use: Use, inputs: Tensor, output_grads: Tensor | None) -> None:
        tokens = self._batch
        if tokens is None:
            return
        if self._largest is not None:
            if output_grads is not None and output_grads.numel():
                self._largest.append(output_grads.abs().amax().float())
            return
        waiting = tokens.waiting.setdefault(use.layer, [])
        waiting.append((use, inputs, output_grads))
        uses = tokens.uses[use.layer]
        if use.layer in self._single_uses and uses > 1:
            raise ModelError(
                f"layer {use.layer} was used once in a first look and {uses} times in batch {self._number}; exclude it "
                "with exclude_modules."
            )
        # All uses of an example go to the accumulators in one call.
        if len(waiting) == uses and (self.task.needs_backward or use.layer in self._single_uses):
            self._flush(use.layer)

    def _flush(self, name: str) -> None:
        """Gives all uses of a layer in this batch to its accumulators, one after the other in one call."""
        assert self._batch is not None
        ledger, kind, module = self._batch, KINDS[self.specs[name].kind], self.task.modules[name]
        uses, blocks, gradients = zip(*ledger.waiting.pop(name), strict=True)
        rows = [kind.rows(module, x.detach(), g) for x, g in zip(blocks, gradients, strict=True)]
        # Where hooks move what a layer is given, its inputs are still on the device that they come from.
        place = self.task.device_of(name)
        rows = [(x.to(place), None if g is None else g.to(place)) for x, g in rows]
        inputs = _joined([x for x, _ in rows])
        output_grads = _joined([g if self._scale == 1 else g.float() / self._scale for _, g in rows if g is not None])
        assert inputs is not None
        if output_grads is not None:
            ledger.finite[name] = output_grads.sum(dtype=torch.promote_types(torch.float32, output_grads.dtype))
        places = ledger.joined(uses, [len(x) for x, _ in rows])
        self._accumulate(name, [use.input for use in uses], places, inputs, output_grads)

    def _accumulate(
        self, name: str, records: list[InputRecord], places: Places, inputs: Tensor, output_grads: Tensor | None
    ) -> None:
        assert self._batch is not None
        layer, ledger = self.statistics.layers[name], self._batch
        key = ledger.key_of(name, records)
        leader = ledger.leader_of(name, key, records[0].leader)
        if self.task.device_of(leader) != self.task.device_of(name):
            # What layers share lies on one device; those on another share among themselves.
            key, leader = (*key, f"on {inputs.device}"), name
        group = self._group(layer, key, leader)
        example = places.example.to(inputs.device)
        if self._takes_gradient and layer.gradient is not None:
            with self._blamed("gradient", name):
                self._take(layer.gradient, inputs, output_grads, example)
        if places.counted is not None:
            counted = places.counted.to(inputs.device)
            inputs, example = ledger.selected(records, counted, inputs, example)
            output_grads = None if output_grads is None else output_grads[counted]
        if self._takes_inputs:
            layer.tokens += len(inputs) if self._pass == 0 and not self._idle else 0
            if key not in ledger.taken:
                ledger.taken.add(key)
                with self._blamed("estimator", name):
                    self._take(group.accumulator, inputs, output_grads, example)
        if self._takes_fisher:
            with self._blamed("estimator", name):
                self._take(layer.fisher, inputs, output_grads, example)

    def _take(self, sums: Accumulator, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        if self._idle and isinstance(sums, KeptSums):
            sums.rest()
        else:
            sums.update(inputs, output_grads, example)

    def _group(self, layer: LayerStatistics, key: tuple[str, ...], leader: str) -> InputGroup:
        if key not in self.groups:
            spec = self.specs[leader]
            device, dtype = self.task.device_of(leader), self.task.dtype_of(spec)
            make = partial(self.task.estimator.input_accumulator, spec, device=device, dtype=dtype)
            with self._blamed("estimator", leader):
                self.groups[key] = InputGroup(leader, self._kept(make, leader))
        if layer.group is None:
            layer.group = self.groups[key]
        if layer.group is not self.groups[key]:
            raise ModelError(
                f"layer {layer.spec.name} shared its input with other layers in one batch than in another; layers "
                "whose inputs are shared only sometimes are not supported. Exclude it with exclude_modules."
            )
        return layer.group

    def _blamed(
        self, kind: Literal["estimator", "gradient", "objective"], layer: str | None = None
    ) -> AbstractContextManager[None]:
        """What a plugin's code raises becomes an error that names it, the layer and the batch."""
        component: Component[Any] = getattr(self.task, kind)
        origin = f" ({self.task.origins[kind]})" if kind in self.task.origins else ""
        place = "" if layer is None else f" on layer {layer}"
        batch = "" if self._number is None else f" in batch {self._number}"
        return blamed(f"{kind} {component.name!r}{origin}", place + batch)

    def end_pass(self, index: int) -> None:
        """Closes a pass: every layer must have run, and accumulators see the sums of all processes."""
        self._number = None
        self._meet()
        # Whoever reads the statistics is told which experts no token was routed to.
        ran = {name: layer for name, layer in self.statistics.layers.items() if layer.group is not None}
        unused = [spec.name for spec in self.task.specs if spec.name not in ran and spec.expert is None]
        if unused:
            raise TargetError(
                f"{len(unused)} targeted layers never ran on this data, the first is {unused[0]}. "
                "Leave them out with exclude_modules, or give data that reaches them."
            )
        task = self.task
        if task.custody is None:
            adds = {"estimator": task.estimator.additive, "gradient": task.gradient.additive}
            last = index + 1 == task.estimator.passes
            self.merged = Merger(task.world, adds=adds, last=last, storage=task.storage).merged(self.statistics)
        else:
            self.merged = task.custody.counted(self.statistics, task.world)
        readers: dict[int, list[str]] = {}
        for name, layer in ran.items():
            readers.setdefault(id(layer.group), []).append(name)
        for group in self.groups.values():
            with self._blamed("estimator", group.leader):
                group.accumulator.end_pass(index, self.merged.of_layer(group.leader))
            for name in readers[id(group)]:
                with self._blamed("estimator", name):
                    self.statistics.layers[name].fisher.end_pass(index, self.merged.of_layer(name))
            # It would lie on the device until the next pass ends.
            self.merged.forget_shared(group.leader)

    def _meet(self) -> None:
        """Every process learns which layers ran elsewhere, and on which inputs."""
        if self.task.world.size == 1:
            return
        keys = {id(group): key for key, group in self.groups.items()}
        ran = [(name, layer.group) for name, layer in self.statistics.layers.items() if layer.group is not None]
        found = [[name, keys[id(group)], group.leader] for name, group in ran]
        for name, key, leader in itertools.chain(*self.task.world.exchange("layers", found)):
            self._group(self.statistics.layers[name], tuple(key), leader)


def _joined(blocks: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(blocks)) if len(blocks) > 1 else next(iter(blocks), None)
