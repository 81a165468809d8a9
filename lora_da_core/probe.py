"""Loss evaluations with low-rank changes on layers' outputs, forward passes only.

Where memory runs out, the batch that was too large is halved, once and for all: losses are per sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lora_da_core.batches import labelled_part, take_rows, to_device
from lora_da_core.blame import is_out_of_memory, reason_of
from lora_da_core.capture import CaptureTask
from lora_da_core.errors import ModelError
from lora_da_core.interfaces import LossProbe
from lora_da_core.layer_kinds import KINDS, Call, watched
from lora_da_core.model_state import prepared
from lora_da_core.operators import LinearMap
from lora_da_core.placement import weights_present, whole
from lora_da_core.taps import TokenLedger, Use
from lora_da_core.types import Batch

Found = TypeVar("Found")


class LowRankProbe(LossProbe):
    """Evaluates the loss with changes added to layers' outputs; used inside `with probe:`.

    The processes of a world share the batches, and each is given the losses of all.

    Args:
        task: What is run.
        batches: The data; samples without labels are left out.
        note: Told of batches that had to be halved.
    """

    def __init__(self, task: CaptureTask, batches: Sequence[Batch], note: Callable[[str], None]) -> None:
        self._task, self._note = task, note
        share = task.share(batches)
        parts = [labelled_part(task.objective, batch) for _, batch in share.batches]
        self._batches, self._idle = [part for part in parts if part is not None], share.idle
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
        if self._look is not None:
            self._look(call)
        name = call.layer
        output, change = self._task.output_of(call, self._specs[name]), self._changes.get(name)
        if change is None:
            return output
        return KINDS[self._specs[name].kind].changed(self._task.modules[name], output, call.inputs, change)

    def losses(self, changes: Mapping[str, LinearMap]) -> Tensor:
        self._changes = changes
        try:
            found = list(self._over_batches(self._losses_of))
            self._run_idle()
        finally:
            self._changes = {}
        # As lists, so that the sum that follows is taken in the same order on every process.
        own = [value for losses in found for value in losses.double().tolist()]
        everyones = self._task.world.exchange("losses", own)
        return torch.tensor([value for theirs in everyones for value in theirs], dtype=torch.float64)

    def energies(self, bases: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """How much of the layers' inputs lies in a subspace, over the tokens that count for the Fisher.

        Args:
            bases: (in, r) by layer, orthonormal columns.

        Returns:
            Σ‖x‖² and Σ‖basisᵀx‖² by layer.
        """
        total = {name: torch.zeros(2, dtype=torch.float64) for name in bases}
        for sums in self._over_batches(partial(self._energies_of, bases)):
            for name, found in sums.items():
                total[name] += found
        self._run_idle()
        told = self._task.world.exchange("energies", {name: found.tolist() for name, found in total.items()})
        return {name: (sum(each[name][0] for each in told), sum(each[name][1] for each in told)) for name in total}

    def _losses_of(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self._task.blamed("objective", " in a forward pass of the loss probe"):
            return self._task.objective.losses(self._task.model, to_device(batch, self._task.device))

    def _energies_of(self, bases: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in bases}
        self._look = partial(self._measure, self._task.ledger(batch), bases, sums)
        try:
            self._losses_of(batch)
        finally:
            self._look = None
        return sums

    def _over_batches(self, run: Callable[[Batch], Found]) -> Iterator[Found]:
        """What `run` gives for every batch, in order; a batch for which memory runs out is replaced by its halves."""
        place = 0
        while place < len(self._batches):
            batch = self._batches[place]
            samples = len(batch["labels"])
            try:
                found = run(batch)
            except Exception as error:
                # Processes that share a run may need each other for a forward pass.
                if samples < 2 or self._task.world.size > 1 or not is_out_of_memory(error):
                    raise
                reason = reason_of(error).splitlines()[0]
            else:
                yield found
                place += 1
                continue
            # Only here, where the error no longer holds what the attempt had in memory.
            if self._task.device.type == "cuda":
                torch.cuda.empty_cache()
            rows = torch.arange(samples).tensor_split(2)
            self._batches[place : place + 1] = [take_rows(batch, part) for part in rows]
            self._note(f"memory ran out in a forward pass over {samples} samples; halved that batch ({reason})")

    def _run_idle(self) -> None:
        """Runs what other processes need this one to run, to gather weights with it."""
        for batch in self._idle:
            self._losses_of(batch)

    def weights(self, layer: str) -> Tensor:
        module, kind = self._task.modules[layer], self._specs[layer].kind
        if kind not in ("linear", "conv1d", "embedding"):
            raise ModelError(
                f"layer {layer} is of kind {kind!r}; only the weights of linear layers and embeddings can be read."
            )
        with weights_present(module):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2:
                found = whole(weight.detach())
                return found if kind == "linear" else found.mT
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
        rows = rows.to(basis.device, basis.dtype)
        found = torch.stack([rows.square().sum(), (rows @ basis).square().sum()])
        sums[name] += found.double().cpu()

    def place(self, layer: str) -> tuple[torch.device, torch.dtype]:
        return self._task.device_of(layer), self._task.dtype_of(self._specs[layer])
