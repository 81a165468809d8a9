"""Whether a model may be run block by block: what is known before, and a trial on one sample."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_da_core.batches import first_labelled, take_rows, to_device
from lora_da_core.block_sweep import Names, Sweep, blocks_of, starts_of, without_layers
from lora_da_core.blocks import BlockCall, BlockFault, Blocks, followed
from lora_da_core.capture import CaptureTask
from lora_da_core.interfaces import FisherEstimator, GradientEstimator
from lora_da_core.layer_kinds import watched
from lora_da_core.model_state import prepared
from lora_da_core.placement import has_sharded_parts
from lora_da_core.types import Batch

PASSES_INSTEAD = "every part of the layers takes a pass over the data, since this model is not run block by block"
"""The start of a note that says why."""

_ROUNDING, _COARSE_ROUNDING = 1e-3, 2e-2
"""Relative differences of gradients that rounding explains: of float32 and better, and of half precision."""


def obstacle(model: nn.Module, estimator: FisherEstimator[Any], gradient: GradientEstimator[Any]) -> str | None:
    """What keeps a run from one sweep over blocks, as far as model and components tell.

    Args:
        model: The base model.
        estimator: The Fisher estimator.
        gradient: The gradient estimator.

    Returns:
        Half a sentence; None where nothing does.
    """
    if not estimator.needs_output_grads and gradient.forward_only:
        return "nothing is differentiated"
    if estimator.passes > 1:
        return f"estimator {estimator.name!r} makes {estimator.passes} passes over the data"
    if estimator.labels != "empirical":
        return f"estimator {estimator.name!r} draws labels from the model"
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return "losses are scaled for its float16 weights"
    if has_sharded_parts(model):
        return "processes hold a part of its weights each"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate brings its weights or moves what passes between them"
    return None


def fault(task: CaptureTask, batches: Sequence[Batch], parts: Sequence[Names]) -> str | None:
    """Whether the model gives part by part what it gives as a whole, tried on one sample before work.

    Compared are the sample's loss, and the gradients in the hidden states that every part is given, with those of
    ordinary differentiation of the whole model.

    Args:
        task: What is to be run, with all layers.
        batches: The data; the first sample with labels is read.
        parts: The layers of each part of blocks.

    Returns:
        What is wrong, as half a sentence; None where nothing is.
    """
    _, part = first_labelled(task.objective, batches)
    sample = take_rows(part, torch.zeros(1, dtype=torch.int64))
    try:
        return _difference(task, sample, parts)
    except BlockFault as error:
        return str(error)
    except Exception as error:  # the model's own code may raise anything where it is run in an unusual way
        return f"its blocks raised {type(error).__name__} when they were run by themselves"


def _difference(task: CaptureTask, sample: Batch, parts: Sequence[Names]) -> str | None:
    """What differs between a sweep over the parts and ordinary differentiation; None where nothing does."""
    blocks = blocks_of(task)
    starts = starts_of(task, blocks, parts)
    loss, gradients = _ordinary(task, blocks, to_device(sample, task.device))
    sweep = Sweep(task, [sample], blocks, starts, to_the_inputs=True)
    for number in starts:
        sweep.advance(without_layers(task), None)
        if number == starts[0] and not _near(torch.tensor(sweep.counted.loss_sum), loss):
            return "its loss is another one when its blocks are run by themselves"
        kept = [flight.gradient for flight in sweep.flights]
        if len(kept) != 1 or kept[0] is None:
            return "its blocks do not run"
        found, wanted = kept[0].taken(), gradients.get(number)
        if not _near(found, torch.zeros_like(found) if wanted is None else wanted):
            return f"another gradient reaches what goes into block {number} than the blocks from there on give"
    return None


def _ordinary(task: CaptureTask, blocks: Blocks, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss without a graph, and gradients in the hidden states by the number of the block that is given them."""
    found: dict[int, Tensor] = {}

    def note(number: int, hidden: Tensor) -> Tensor:
        if number == 0:
            hidden = hidden.detach().requires_grad_()
        if hidden.requires_grad:
            hidden.register_hook(functools.partial(found.__setitem__, number))  # type: ignore[no-untyped-call]
        return hidden

    def enter(number: int, hidden: Tensor, call: BlockCall) -> Tensor:
        return note(number, hidden)

    def leave(number: int, hidden: Tensor) -> Tensor:
        return note(number + 1, hidden) if number + 1 == len(blocks.modules) else hidden

    with prepared(task.model), task.base_only(), contextlib.ExitStack() as stack:
        stack.enter_context(watched(task.modules, task.specs, lambda call: call.output))
        with torch.no_grad():
            loss = task.objective.losses(task.model, batch).double().sum().cpu()
        start = stack.enter_context(followed(blocks, enter, leave))
        for block in blocks.modules:
            stack.enter_context(_checkpointed(block))
        start()
        with torch.enable_grad():
            task.objective.losses(task.model, batch).sum().backward()  # type: ignore[no-untyped-call]
    return loss, found


@contextlib.contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    """Has a block keep its arguments alone for the backward pass, so that trying a model takes no more than a run."""
    forward, before = block.forward, block.__dict__.get("forward")
    block.forward = functools.partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


def _near(found: Tensor, wanted: Tensor) -> bool:
    allowed = _COARSE_ROUNDING if found.dtype in (torch.bfloat16, torch.float16) else _ROUNDING
    apart, size = (found.double() - wanted.double()).norm(), wanted.double().norm()
    return bool(apart <= allowed * size)
