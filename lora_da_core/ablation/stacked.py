"""Trains many adapters of one frozen base together: one pass over all their batches, one batched product per layer.

Each adapter has its own data, rate and optimiser state, and no number of one enters another's, so a member's curve is
what it would be alone up to rounding. It pays where a single adapter leaves an accelerator idle.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.ablation.finetune import Curve, Recorder, TrainingData, rate_factor, seeded
from lora_da_core.ablation.settings import FinetuneSettings
from lora_da_core.batches import to_device
from lora_da_core.data import IGNORED, Sample, count_labels, padded
from lora_da_core.errors import OptionError
from lora_da_core.types import Batch, Frozen, LayerSpec, LoraFactors

STACKABLE = ("linear", "conv1d")
"""Kinds of layers whose adapters are products of the input's rows with A and B."""


@dataclass(frozen=True)
class Member:
    """One adapter to be trained.

    Attributes:
        factors: A (r, in) and B (out, r) of every layer at the start.
        data: What it reads.
        learning_rate: Peak rate.
        offset: Factors whose product the initialisation took out of the base weights; empty where it left them alone.
        scaling: PEFT's factor on B·A by layer, where it is another than the specification's.
        frozen: Whether A stays as it is.
    """

    factors: Mapping[str, LoraFactors]
    data: TrainingData
    learning_rate: float
    offset: Mapping[str, LoraFactors] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    frozen: Frozen = "none"


def check_stackable(specs: Sequence[LayerSpec]) -> None:
    """Refuses layers whose adapters cannot be trained together.

    Args:
        specs: The layers.

    Raises:
        OptionError: One is a convolution, an expert or an embedding.
    """
    other = next((spec for spec in specs if spec.kind not in STACKABLE), None)
    if other is not None:
        raise OptionError(
            f"layer {other.name} is of kind {other.kind!r}; only linear layers are trained together. Set together = 1, "
            "or leave it out of target_modules."
        )


def finetune_together(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    specs: Sequence[LayerSpec],
    members: Sequence[Member],
    settings: FinetuneSettings,
) -> list[Curve]:
    """Trains every member as `finetune` would train it alone; the model itself is left as it is.

    Args:
        model: The bare base model, a causal language model; nothing of it may be trainable.
        modules: The adapted modules by name.
        specs: Their sizes and scalings; the ranks are the members' own.
        members: At least one; all are judged by the same held-out batches.
        settings: Steps, batch size and evaluations.

    Returns:
        One curve per member, in their order; `seconds` is each one's share of the whole time.

    Raises:
        OptionError: The members' held-out batches differ, or a layer is not one whose input is multiplied by a matrix.
    """
    check_stackable(specs)
    shared = members[0].data
    if any(each.data.held_out is not shared.held_out or each.data.source is not shared.source for each in members):
        raise OptionError("adapters that are trained together must share their held-out batches.")
    start = time.perf_counter()
    stack = _Stack(model, modules, specs, members, settings)
    draws = zip(*(member.data.draws(settings.steps, settings.batch_size) for member in members), strict=True)
    recorder = Recorder(settings, shared, stack.losses)
    training = model.training
    try:
        with seeded(members[0].data.seed, stack.device), stack.attached():
            recorder.begin()
            for step, samples in enumerate(draws):
                model.train()
                recorder.step(step, stack.step(samples, rate_factor(step, settings.steps)))
    finally:
        model.train(training)
    seconds = (time.perf_counter() - start) / len(members)

    def of_member(place: int, losses: Sequence[Tensor]) -> tuple[float, ...]:
        return tuple(float(values[place]) for values in losses)

    return [
        Curve(
            member.learning_rate,
            settings.eval_steps,
            of_member(place, recorder.held_out),
            of_member(place, recorder.trained),
            seconds,
            of_member(place, recorder.source),
        )
        for place, member in enumerate(members)
    ]


class _Stack:
    """All members' factors in one buffer, (members, numbers), and views of it for every layer."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        specs: Sequence[LayerSpec],
        members: Sequence[Member],
        settings: FinetuneSettings,
    ) -> None:
        self.model, self.modules, self.members, self.settings = model, modules, members, settings
        self.device = next(model.parameters()).device
        count = len(members)
        ranks = {spec.name: max(member.factors[spec.name].A.shape[0] for member in members) for spec in specs}
        shapes = [
            (spec.name, shape)
            for spec in specs
            for shape in ((ranks[spec.name], spec.in_features), (spec.out_features, ranks[spec.name]))
        ]
        ends = [0]
        for _, shape in shapes:
            ends.append(ends[-1] + math.prod(shape))
        self.values = torch.zeros(count, ends[-1], device=self.device)
        self.gradients = torch.zeros_like(self.values)
        self.factors: dict[str, list[Tensor]] = {spec.name: [] for spec in specs}
        for (name, shape), (first, last) in zip(shapes, pairwise(ends), strict=True):
            leaf = self.values[:, first:last].view(count, *shape).detach().requires_grad_()
            leaf.grad = self.gradients[:, first:last].view(count, *shape)
            self.factors[name].append(leaf)
        self.scaling = {
            spec.name: torch.tensor([m.scaling.get(spec.name, spec.scaling) for m in members], device=self.device)
            for spec in specs
        }
        self.offsets = {spec.name: self._offset(spec) for spec in specs}
        # Ranks below the largest are filled up with zeros, which stay zero: each factor's gradient holds the other.
        with torch.no_grad():
            for name, (a, b) in self.factors.items():
                _place([member.factors[name] for member in members], a, b)
        places = [place for place, member in enumerate(members) if member.frozen == "A"]
        self.frozen = {
            place: [(a[place].detach(), a[place].detach().clone()) for a, _ in self.factors.values()]
            for place in places
        }
        rows = [torch.nn.Parameter(row) for row in self.values]
        for row, gradient in zip(rows, self.gradients, strict=True):
            row.grad = gradient
        groups = [{"params": [row], "lr": m.learning_rate} for row, m in zip(rows, members, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)

    def _offset(self, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
        held = [member.offset.get(spec.name) for member in self.members]
        rank = max((pair.A.shape[0] for pair in held if pair is not None), default=0)
        if rank == 0:
            return None
        a = torch.zeros(len(held), rank, spec.in_features, device=self.device)
        b = torch.zeros(len(held), spec.out_features, rank, device=self.device)
        _place(held, a, b)
        return a, b.neg_()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the base computes every member's function on its own part of the batch."""
        with contextlib.ExitStack() as stack:
            for name in self.factors:
                stack.callback(self.modules[name].register_forward_hook(self._hook(name)).remove)
            yield

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        a, b = self.factors[name]
        scaling, offset = self.scaling[name].view(-1, 1, 1), self.offsets[name]

        def add_products(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            inputs = args[0].reshape(len(self.members), -1, a.shape[-1])
            left, right = (a, b) if offset is None else (torch.cat([a, offset[0]], 1), torch.cat([b, offset[1]], 2))
            low = torch.bmm(inputs, (left * scaling).mT.to(inputs.dtype))
            # In place: a linear layer's backward pass does not read its output.
            output.view(len(self.members), -1, b.shape[1]).baddbmm_(low, right.mT.to(inputs.dtype))
            return output

        return add_products

    def step(self, samples: Sequence[Sequence[Sample]], factor: float) -> Tensor:
        """One optimiser step of every member; returns the training losses, (members,)."""
        ordered = [sorted(own, key=lambda sample: -len(sample["input_ids"])) for own in samples]
        counts = torch.tensor(
            [sum(count_labels(sample["labels"][1:]) for sample in own) for own in ordered], device=self.device
        )
        losses = torch.zeros(len(ordered), device=self.device)
        self.gradients.zero_()
        at = 0
        # Long samples go with long ones: less padding, and each pass holds what fits.
        while at < len(ordered[0]):
            longest = max(len(own[at]["input_ids"]) for own in ordered)
            size = max(1, self.settings.tokens_at_once // (len(ordered) * longest))
            batch = padded([s for own in ordered for s in own[at : at + size]], self.members[0].data.pad_token_id)
            part = self._sums(to_device(batch, self.device)) / counts
            part.sum().backward()  # type: ignore[no-untyped-call]
            losses += part.detach()
            at += size
        for place in self.frozen:
            for a, _ in self.factors.values():
                assert a.grad is not None
                a.grad[place].zero_()
        norms = torch.linalg.vector_norm(self.gradients, dim=1, keepdim=True)
        self.gradients.mul_((self.settings.max_grad_norm / (norms + 1e-6)).clamp(max=1.0))
        for group, member in zip(self.optimizer.param_groups, self.members, strict=True):
            group["lr"] = member.learning_rate * factor
        self.optimizer.step()
        for held in self.frozen.values():
            for value, start in held:  # weight decay does not ask for a gradient
                value.copy_(start)
        return losses

    def losses(self, batches: Sequence[Batch]) -> Tensor:
        """Mean loss over all label tokens of some batches, (members,), in nats."""
        self.model.eval()
        total = torch.zeros(len(self.members), dtype=torch.float64, device=self.device)
        labels = 0
        with torch.no_grad():
            for batch in batches:
                placed = to_device(batch, self.device)
                rows, tokens = batch["labels"].shape
                # A pass without gradients keeps no activations and can be larger.
                size = max(1, 2 * self.settings.tokens_at_once // (len(self.members) * tokens))
                for first in range(0, rows, size):
                    part = {key: value[first : first + size] for key, value in placed.items()}
                    total += self._sums({key: v.repeat(len(self.members), 1) for key, v in part.items()}).double()
                labels += int((placed["labels"][:, 1:] != IGNORED).sum())
        return (total / labels).cpu()

    def _sums(self, batch: Batch) -> Tensor:
        """Summed loss over every member's label tokens, (members,)."""
        targets = batch["labels"][:, 1:]
        counted = targets != IGNORED
        first = int(counted.any(0).int().argmax())
        targets, counted = targets[:, first:], counted[:, first:]
        logits = self._logits(batch, targets.shape[1] + 1)[:, :-1]
        token_losses = nn.functional.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
        placed = token_losses.new_zeros(counted.shape).masked_scatter(counted, token_losses)
        return placed.reshape(len(self.members), -1).sum(1)

    def _logits(self, batch: Batch, last: int) -> Tensor:
        """Logits of the last positions; only those are made where the model can be asked for that."""
        keep = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = self.model(**inputs, use_cache=False, **keep).logits
        return logits[:, -last:]


def _place(pairs: Sequence[LoraFactors | None], a: Tensor, b: Tensor) -> None:
    """Every member's factors into (members, rank, in) and (members, out, rank), the first of a larger rank."""
    for place, pair in enumerate(pairs):
        if pair is not None:
            a[place, : pair.A.shape[0]].copy_(pair.A)
            b[place, :, : pair.B.shape[1]].copy_(pair.B)
