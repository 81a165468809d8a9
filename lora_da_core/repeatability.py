"""Whether a run would come out the same again: the first batch is asked for twice, and run twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_da_core.batches import first_labelled, take_rows, to_device
from lora_da_core.capture import CaptureTask
from lora_da_core.errors import ModelError
from lora_da_core.model_state import prepared
from lora_da_core.types import Batch

CHECKED_SAMPLES = 4
"""Samples of the first batch that are run twice."""
_ROUNDING = 1e-5
"""Relative difference of two losses that an accelerator's order of summation explains; a CPU has none."""


def order_notes(batches: Iterable[Batch], taken: Sequence[Batch]) -> list[str]:
    """Whether data that is read again begins with the same samples.

    Lists, data that can be read only once and loaders with worker processes, which would be started again, are not
    asked.

    Args:
        batches: As they were given.
        taken: What was read of them.

    Returns:
        One note, or none.
    """
    workers: int = getattr(batches, "num_workers", 0)
    if isinstance(batches, (list, tuple)) or not taken or workers:
        return []
    second = iter(batches)
    if second is batches:
        return []
    again, first = next(second, None), taken[0]
    if isinstance(again, Mapping) and isinstance(first, Mapping) and _begins_alike(first, again):
        return []
    return [
        "read a second time, the data began with other samples (a shuffling loader?): another run reads others too; "
        "give shuffle=False, or seed the generator that it draws from"
    ]


def model_notes(task: CaptureTask, batches: Sequence[Batch]) -> list[str]:
    """Whether the model gives the same losses twice, in evaluation mode.

    Args:
        task: Model and objective.
        batches: The batches; a few samples of the first with labels are run twice.

    Returns:
        One note, or none; also none where there are no finite losses, which the passes over the data tell better.

    Raises:
        PluginError: The objective raised.
        ModelError: The model's weights are on several devices, and nothing moves what passes between them.
    """
    objective = task.objective
    number, part = first_labelled(objective, batches)
    few = to_device(take_rows(part, torch.arange(min(CHECKED_SAMPLES, len(part["labels"])))), task.device)
    with (
        prepared(task.model),
        task.base_only(),
        torch.set_grad_enabled(task.needs_backward),
        task.blamed("objective", f" in batch {number}"),
        _scattered_weights_named(task.model),
    ):
        first, second = (_detached(objective.losses(task.model, few)) for _ in range(2))
    if first is None or second is None or first.shape != second.shape:
        return []
    allowed = 0.0 if task.device.type == "cpu" else _ROUNDING * float(first.abs().max())
    apart = float((first - second).abs().max())
    if apart <= allowed:
        return []
    return [
        f"two passes over the same {len(first)} samples gave losses that differ by up to {apart:.2g}: something in the "
        "model is random in evaluation mode too (dropout that ignores eval(), noise), so runs do not repeat"
    ]


@contextlib.contextmanager
def _scattered_weights_named(model: nn.Module) -> Iterator[None]:
    """Says which weights are where, in the place of torch's complaint of two devices in one operation.

    Asked only then: models may move what passes between their parts by hooks or by code of their own.
    """
    try:
        yield
    except RuntimeError as error:
        first = {parameter.device: name for name, parameter in reversed(list(model.named_parameters()))}
        if len(first) < 2 or "same device" not in str(error):
            raise
        places = ", ".join(f"{name} on {device}" for device, name in sorted(first.items(), key=lambda item: item[1]))
        raise ModelError(
            f"the model's weights are on several devices ({places}), and nothing moves what passes between them; move "
            f"it to one device with .to(), or load it with device_map, which adds what moves it. {error}"
        ) from error


def _begins_alike(first: Batch, again: Batch) -> bool:
    """Whether `again` begins with the samples of `first`, which may have been cut."""
    for name, value in first.items():
        other = again.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            rows = other[: len(value)] if value.ndim and other.ndim else other
            if rows.shape != value.shape or not torch.equal(rows, value):
                return False
    return True


def _detached(losses: object) -> Tensor | None:
    if not isinstance(losses, Tensor) or not losses.numel() or not bool(losses.isfinite().all()):
        return None
    return losses.detach().double().cpu()
