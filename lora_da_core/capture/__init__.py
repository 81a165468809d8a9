"""Runs the model over the batches and feeds the accumulators: the only room that touches modules, and it restores them.

Gradients come from taps on the layers' outputs, so no weight needs a `.grad` and quantized bases work.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lora_da_core.batches import labelled_part, to_device
from lora_da_core.capture.first_look import loss_scale, single_uses
from lora_da_core.capture.task import CaptureTask, ComponentKind, HiddenStates, SweepSettings
from lora_da_core.custody import KeptSums
from lora_da_core.errors import ModelError, PluginError, TargetError
from lora_da_core.interfaces import Accumulator
from lora_da_core.layer_kinds import KINDS, Call, watched
from lora_da_core.merging import Merger
from lora_da_core.model_state import first_non_finite_module, prepared, recomputing
from lora_da_core.placement import is_offloaded, offloaded_weights_reloaded
from lora_da_core.running_sums import InputGroup, LayerStatistics, Statistics
from lora_da_core.shares import Share, share_of
from lora_da_core.taps import InputRecord, Places, Tap, TokenLedger, Use
from lora_da_core.types import Batch, LayerSpec
from lora_da_core.world import Progress

__all__ = ["CaptureTask", "HiddenStates", "Progress", "Run", "SweepSettings", "collect"]


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
    with prepared(task.model), task.base_only(), checkpointing:
        run.look(batches)
        with run.taps():
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
        self._offloads = is_offloaded(task.model)
        self._pass = 0
        self._batch: TokenLedger | None = None
        self._takes_gradient = self._takes_fisher = self._takes_inputs = False
        self._single_uses: frozenset[str] = frozenset()
        self._scale = 1.0
        self._idle = False

    def look(self, batches: Sequence[Batch]) -> None:
        """Learns of the batches what has to be known before the first pass; no tap may be on the layers."""
        if not self.task.needs_backward:
            self._single_uses = single_uses(self.task, batches)
        elif any(parameter.dtype == torch.float16 for parameter in self.task.model.parameters()):
            self._scale = loss_scale(self.task, batches)

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
        name, ledger, spec = call.layer, self._batch, self.specs[call.layer]
        output = self.task.output_of(call, spec)
        if ledger is None or (self.task.needs_backward and not torch.is_grad_enabled()):
            return output
        if name not in self.statistics.layers:  # of another pass
            return output
        ledger.uses[name] = ledger.uses.get(name, 0) + 1
        reading = KINDS[spec.kind].reading(self.task.modules[name])
        use = Use(name, ledger.input_of(call.inputs, name, reading), call.routed)
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
        inputs = _concat([x for x, _ in rows])
        output_grads = _concat([g if self._scale == 1 else g.float() / self._scale for _, g in rows if g is not None])
        assert inputs is not None
        if output_grads is not None:
            ledger.finite[name] = output_grads.sum(dtype=torch.promote_types(torch.float32, output_grads.dtype))
        places = ledger.places_of_uses(uses, [len(x) for x, _ in rows])
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

    def _blamed(self, kind: ComponentKind, layer: str | None = None) -> AbstractContextManager[None]:
        """What a plugin's code raises becomes an error that names it, the layer and the batch."""
        place = "" if layer is None else f" on layer {layer}"
        batch = "" if self._number is None else f" in batch {self._number}"
        return self.task.blamed(kind, place + batch)

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


def _concat(blocks: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(blocks)) if len(blocks) > 1 else next(iter(blocks), None)
