"""Loss evaluations with low-rank changes on layers' outputs, forward passes only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lora_da_core.batches import labelled_part, to_device
from lora_da_core.capture import CaptureTask
from lora_da_core.errors import ModelError
from lora_da_core.interfaces import LossProbe
from lora_da_core.layer_kinds import KINDS, Call, watched
from lora_da_core.modes import prepared
from lora_da_core.operators import LinearMap
from lora_da_core.taps import TokenLedger, Use
from lora_da_core.types import Batch


class LowRankProbe(LossProbe):
    """Evaluates the loss with changes added to layers' outputs; used inside `with probe:`."""

    def __init__(self, task: CaptureTask, batches: Sequence[Batch]) -> None:
        self._task = task
        self._batches = batches
        self._changes: Mapping[str, LinearMap] = {}
        self._specs = {spec.name: spec for spec in task.specs}
        self._look: Callable[[Call], None] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> LowRankProbe:
        with contextlib.ExitStack() as stack:
            stack.enter_context(prepared(self._task.model))
            stack.enter_context(self._task.base_only())
            stack.enter_context(watched(self._task.modules, self._task.specs, self._changed))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _changed(self, call: Call) -> Tensor:
        output, name = call.output, call.layer
        if self._look is not None:
            self._look(call)
        for change in (self._task.changes.get(name), self._changes.get(name)):
            if change is not None:
                kind = KINDS[self._specs[name].kind]
                output = kind.changed(self._task.modules[name], output, call.inputs, change)
        return output

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
        for batch in self._batches:
            part = labelled_part(self._task.objective, batch)
            if part is not None:
                self._look = partial(self._measure, self._task.ledger(part), bases, sums)
                try:
                    with torch.no_grad():
                        self._task.objective.losses(self._task.model, to_device(part, self._task.device))
                finally:
                    self._look = None
        return {name: (float(found[0]), float(found[1])) for name, found in sums.items()}

    def weights(self, layer: str) -> Tensor:
        module, kind = self._task.modules[layer], self._specs[layer].kind
        if kind not in ("linear", "conv1d", "embedding"):
            raise ModelError(
                f"layer {layer} is of kind {kind!r}; only the weights of linear layers and embeddings can be read."
            )
        stored = getattr(module, "weight", None)
        if isinstance(stored, Tensor) and stored.is_floating_point() and stored.ndim == 2:
            return stored.detach() if kind == "linear" else stored.detach().mT
        # Packed weights are only known by what they do: W is the answer to the unit vectors.
        device, _ = self.place(layer)
        unit = torch.eye(self._specs[layer].in_features, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            answers: Tensor = module(unit) - module(torch.zeros_like(unit[:1]))
        return answers.mT

    def _measure(
        self, ledger: TokenLedger, bases: Mapping[str, Tensor], sums: Mapping[str, Tensor], call: Call
    ) -> None:
        name = call.layer
        if name not in bases:
            return
        module, kind, basis = self._task.modules[name], KINDS[self._specs[name].kind], bases[name]
        rows, _ = kind.rows(module, call.inputs.detach(), None)
        use = Use(name, ledger.input_of(call.inputs, name, kind.reading(module)), call.routed)
        counted = ledger.places(use, len(rows)).counted
        rows = rows if counted is None else rows[counted.to(rows.device)]
        rows = rows.to(basis.dtype)
        found = torch.stack([rows.square().sum(), (rows @ basis).square().sum()])
        sums[name] += found.double().cpu()

    def place(self, layer: str) -> tuple[torch.device, torch.dtype]:
        return self._task.device_of(layer), self._task.dtype_of(self._specs[layer])
