"""A first look at one batch, before statistics are taken: which layers are used once, and how large gradients are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_da_core.batches import first_labelled, take_rows, to_device
from lora_da_core.capture.task import CaptureTask
from lora_da_core.layer_kinds import Call, watched
from lora_da_core.loss_scale import find_loss_scale
from lora_da_core.placement import offloaded_weights_reloaded
from lora_da_core.taps import InputRecord, Tap, Use
from lora_da_core.types import Batch


def single_uses(task: CaptureTask, batches: Sequence[Batch]) -> frozenset[str]:
    """The layers that are used once in a forward pass, found by running one sample.

    Without a backward pass nothing says when a layer's last use is over, so inputs would have to wait for the batch's
    end; those of a layer that is used once need not.

    Args:
        task: What is run; its model computes the base function.
        batches: At least one with labels.

    Returns:
        Names of layers whose statistics are taken.
    """
    _, part = first_labelled(task.objective, batches)
    sample = to_device(take_rows(part, torch.zeros(1, dtype=torch.int64)), task.device)
    specs = {spec.name: spec for spec in (*task.specs, *task.beside)}
    uses: Counter[str] = Counter()

    def counted(call: Call) -> Tensor:
        uses[call.layer] += 1
        return task.output_of(call, specs[call.layer])

    with watched(task.modules, [*specs.values()], counted), torch.no_grad(), task.blamed("objective"):
        task.objective.losses(task.model, sample)
    return frozenset(spec.name for spec in task.specs if uses[spec.name] == 1)


def loss_scale(task: CaptureTask, batches: Sequence[Batch]) -> float:
    """What losses are to be multiplied by, from the gradients of the first batch: float16 would lose small ones.

    Args:
        task: What is run; its model computes the base function.
        batches: At least one with labels.

    Returns:
        A power of two. All layers are looked at, since all passes share it.
    """
    _, part = first_labelled(task.objective, batches)
    on_device = to_device(part, task.device)
    specs = {spec.name: spec for spec in (*task.specs, *task.beside)}

    def largest_gradient(scale: float) -> float:
        sizes: list[Tensor] = []

        def sized(use: Use, inputs: Tensor, output_grads: Tensor) -> None:
            if output_grads.numel():
                sizes.append(output_grads.abs().amax().float())

        def tapped(call: Call) -> Tensor:
            output = task.output_of(call, specs[call.layer])
            if not torch.is_grad_enabled():
                return output
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            use = Use(call.layer, InputRecord(call.layer, call.layer))
            found: Tensor = Tap.apply(output, call.inputs.detach(), use, sized)  # type: ignore[no-untyped-call]
            return found

        reloaded = offloaded_weights_reloaded(task.model)
        with watched(task.modules, [*specs.values()], tapped), torch.enable_grad(), reloaded:
            with task.blamed("objective"):
                losses = task.objective.losses(task.model, on_device)
            if not losses.requires_grad:
                return 0.0  # the first batch will tell why
            (losses.sum() * scale).backward()  # type: ignore[no-untyped-call]
        return float(torch.stack([size.to(task.device) for size in sizes] or [losses.new_zeros(())]).max())

    return find_loss_scale(largest_gradient)
