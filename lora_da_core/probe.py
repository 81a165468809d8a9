"""Loss evaluations with low-rank changes on layers' outputs, forward passes only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.batches import labelled_part, to_device
from lora_da_core.capture import CaptureTask
from lora_da_core.interfaces import LossProbe
from lora_da_core.modes import prepared
from lora_da_core.operators import LinearMap, accumulation_dtype
from lora_da_core.types import Batch


class LowRankProbe(LossProbe):
    """Evaluates the loss with changes added to layers' outputs; used inside `with probe:`."""

    def __init__(self, task: CaptureTask, batches: Sequence[Batch]) -> None:
        self._task = task
        self._batches = batches
        self._changes: Mapping[str, LinearMap] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> LowRankProbe:
        with contextlib.ExitStack() as stack:
            stack.enter_context(prepared(self._task.model))
            stack.enter_context(self._task.base_only())
            for name, module in self._task.modules.items():
                handle = module.register_forward_hook(self._hook(name))
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def add_change(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            change = self._changes.get(name)
            if change is None:
                return None
            inputs = args[0].flatten(0, -2).to(change.dtype)
            return output + change.apply_to_rows(inputs).reshape(output.shape).to(output.dtype)

        return add_change

    def losses(self, changes: Mapping[str, LinearMap]) -> Tensor:
        self._changes = changes
        try:
            with torch.no_grad():
                found = [
                    self._task.objective.losses(self._task.model, to_device(batch, self._task.device))
                    for batch in (labelled_part(self._task.objective, batch) for batch in self._batches)
                    if batch is not None
                ]
            return torch.cat(found).double().cpu()
        finally:
            self._changes = {}

    def place(self, layer: str) -> tuple[torch.device, torch.dtype]:
        weight = next(self._task.modules[layer].parameters(), None)
        if weight is None:
            return self._task.device, torch.float32
        return weight.device, accumulation_dtype(weight.dtype)
