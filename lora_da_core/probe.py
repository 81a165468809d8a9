"""Loss evaluations with low-rank changes on layers' outputs, forward passes only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.batches import labelled_part, to_device
from lora_da_core.capture import CaptureTask
from lora_da_core.errors import ModelError
from lora_da_core.interfaces import LossProbe
from lora_da_core.modes import prepared
from lora_da_core.operators import LinearMap, accumulation_dtype
from lora_da_core.taps import with_change
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

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        before = self._task.changes.get(name)

        def add_changes(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            for change in (before, self._changes.get(name)):
                if change is not None:
                    output = with_change(output, args[0], change)
            return output

        return add_changes

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

    def energies(self, bases: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """How much of the layers' inputs lies in a subspace, over the tokens that count for the Fisher.

        Args:
            bases: (in, r) by layer, orthonormal columns.

        Returns:
            Σ‖x‖² and Σ‖basisᵀx‖² by layer.
        """
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in bases}
        specs = {spec.name: spec for spec in self._task.specs}
        part: Batch = {}

        def meter(name: str) -> Callable[[nn.Module, Any], None]:
            def add(module: nn.Module, args: Any) -> None:
                samples = len(part["labels"])
                rows = args[0].detach().reshape(samples, -1, args[0].shape[-1])
                mask = self._task.objective.token_mask(part, specs[name], self._task.token_mask, rows.shape[1])
                counted = rows[mask.to(rows.device)].to(bases[name].dtype)
                found = torch.stack([counted.square().sum(), (counted @ bases[name]).square().sum()])
                sums[name] += found.double().cpu()

            return add

        with contextlib.ExitStack() as stack, torch.no_grad():
            for name in bases:
                stack.callback(self._task.modules[name].register_forward_pre_hook(meter(name)).remove)
            for batch in self._batches:
                labelled = labelled_part(self._task.objective, batch)
                if labelled is not None:
                    part = labelled
                    self._task.objective.losses(self._task.model, to_device(part, self._task.device))
        return {name: (float(found[0]), float(found[1])) for name, found in sums.items()}

    def weights(self, layer: str) -> Tensor:
        module, kind = self._task.modules[layer], {spec.name: spec.kind for spec in self._task.specs}[layer]
        if kind not in ("linear", "conv1d"):
            raise ModelError(f"layer {layer} is of kind {kind!r}; only the weights of linear layers can be read.")
        stored = getattr(module, "weight", None)
        if isinstance(stored, Tensor) and stored.is_floating_point() and stored.ndim == 2:
            return stored.detach() if kind == "linear" else stored.detach().mT
        # Packed weights are only known by what they do: W is the answer to the unit vectors.
        size = {spec.name: spec.in_features for spec in self._task.specs}[layer]
        device, _ = self.place(layer)
        unit = torch.eye(size, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            answers: Tensor = module(unit) - module(torch.zeros_like(unit[:1]))
        return answers.mT

    def place(self, layer: str) -> tuple[torch.device, torch.dtype]:
        weight = next(self._task.modules[layer].parameters(), None)
        if weight is None:
            return self._task.device, torch.float32
        return weight.device, accumulation_dtype(weight.dtype)
