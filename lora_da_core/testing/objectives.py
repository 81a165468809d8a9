"""What every objective must fulfil, as checks on a model and a batch that suit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.interfaces import Objective
from lora_da_core.testing.data import Check, Subject, bitwise, close, declares_itself, require, undisturbed
from lora_da_core.types import Batch, LabelKind, LayerSpec

SAME = 1e-5
"""Relative error that rounding explains where samples are computed in other batches; float64 models stay far below."""


@dataclass(frozen=True)
class ObjectiveSubject(Subject):
    """An objective with one set of options, and what it is tried on.

    Attributes:
        model: A model that it suits, in evaluation mode.
        batch: At least two samples with labels; the first dimension of every tensor is the samples'.
        spec: A layer of the model.
        tokens: Tokens of each sample that this layer sees.
    """

    model: nn.Module
    batch: Batch
    spec: LayerSpec
    tokens: int

    @property
    def samples(self) -> int:
        """How many samples the batch has."""
        return len(next(iter(self.batch.values())))

    def losses(self, batch: Batch) -> Tensor:
        """Per-sample losses, after what only the model at its start can say was added."""
        made = self.make()
        with torch.no_grad():
            complete = made.complete(self.model, batch)
        found: Tensor = made.losses(self.model, complete)
        return found


def checks(
    cls: type[Objective[Any]],
    options: Mapping[str, Any],
    *,
    model: nn.Module,
    batch: Batch,
    spec: LayerSpec,
    tokens: int,
) -> Iterator[Check]:
    """All checks of an objective, as (name, callable).

    Args:
        cls: The objective.
        options: Its options.
        model: As `ObjectiveSubject` holds it.
        batch: Likewise.
        spec: Likewise.
        tokens: Likewise.

    Yields:
        (name, callable) one by one.
    """
    subject = ObjectiveSubject(cls, options, model, batch, spec, tokens)
    for check in CHECKS:
        yield check.__name__, partial(check, subject)


def losses_are_those_of_each_sample(subject: ObjectiveSubject) -> None:
    """One finite loss for each sample, the same whatever else is in the batch and in whatever order."""
    found = subject.losses(subject.batch)
    require(found.shape == (subject.samples,), f"losses have shape {tuple(found.shape)}, not ({subject.samples},)")
    require(bool(found.isfinite().all()), f"losses are {found.tolist()}")
    for rows in ([0], [subject.samples - 1], list(range(subject.samples))[::-1]):
        close(subject.losses(_rows(subject.batch, rows)), found[rows], f"losses of samples {rows} alone", SAME)


def losses_can_be_differentiated(subject: ObjectiveSubject) -> None:
    """A sample's loss reaches parameters, with finite gradients."""
    parameters = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(subject.losses(subject.batch).sum(), parameters, allow_unused=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    require(any(bool(gradient.any()) for gradient in reached), "no parameter has a gradient")
    require(all(bool(gradient.isfinite().all()) for gradient in reached), "a gradient is not finite")


def labels_are_counted(subject: ObjectiveSubject) -> None:
    """A whole number for each sample, above 0 as these have labels, and each sample's own."""
    made = subject.make()
    counts = made.label_counts(subject.batch)
    require(counts.shape == (subject.samples,), f"label_counts() has shape {tuple(counts.shape)}")
    require(not counts.is_floating_point(), f"label_counts() is {counts.dtype}; it must be whole numbers")
    require(bool((counts > 0).all()), f"counts are {counts.tolist()}, but every sample has a label")
    for row in range(subject.samples):
        alone = made.label_counts(_rows(subject.batch, [row])).tolist()
        require(alone == [int(counts[row])], f"sample {row} counts {alone} alone and {int(counts[row])} in the batch")


def tokens_are_masked_sample_by_sample(subject: ObjectiveSubject) -> None:
    """A truth value for each token of each sample; every sample has one that counts, whatever the kind of mask."""
    made = subject.make()
    for kind in ("labels", "attention"):
        mask = made.token_mask(subject.batch, subject.spec, kind, subject.tokens)
        expected = (subject.samples, subject.tokens)
        require(tuple(mask.shape) == expected, f"the {kind} mask has shape {tuple(mask.shape)}, not {expected}")
        require(mask.dtype == torch.bool, f"the {kind} mask is {mask.dtype}; it must be bool")
        require(bool(mask.any(1).all()), f"the {kind} mask leaves a sample without a token")
        alone = made.token_mask(_rows(subject.batch, [0]), subject.spec, kind, subject.tokens)
        require(bool((alone[0] == mask[0]).all()), f"the {kind} mask of a sample depends on the others")
        if not made.masks_by_layer:
            other = made.token_mask(subject.batch, replace(subject.spec, name="decoder.other"), kind, subject.tokens)
            require(bool((other == mask).all()), f"the {kind} mask depends on the layer, yet masks_by_layer is False")


def what_is_added_has_one_row_per_sample(subject: ObjectiveSubject) -> None:
    """`complete` keeps what the batch holds, adds rows of samples, and adds nothing to what is complete."""
    made = subject.make()
    with torch.no_grad():
        found = made.complete(subject.model, subject.batch)
        again = made.complete(subject.model, found)
        alone = made.complete(subject.model, _rows(subject.batch, [0]))
    kept = all(key in found and bitwise(found[key]) == bitwise(value) for key, value in subject.batch.items())
    require(kept, "complete() changed what the batch held")
    for key in found.keys() - subject.batch.keys():
        require(len(found[key]) == subject.samples, f"{key}, which complete() adds, has {len(found[key])} rows")
        close(alone[key], found[key][:1], f"{key} of a sample alone", SAME)
        require(bitwise(again[key]) == bitwise(found[key]), f"{key} was there already, and was replaced")


def nothing_else_is_touched(subject: ObjectiveSubject) -> None:
    """Model, batch and process stay as they are, and two calls give the same bytes."""
    before = {key: bitwise(value) for key, value in (*subject.model.state_dict().items(), *subject.batch.items())}
    modes = [module.training for module in subject.model.modules()]
    first = bitwise(subject.losses(subject.batch))
    undisturbed(lambda: subject.losses(subject.batch))
    require(bitwise(subject.losses(subject.batch)) == first, "two calls disagree")
    now = {key: bitwise(value) for key, value in (*subject.model.state_dict().items(), *subject.batch.items())}
    changed = [key for key, value in before.items() if now[key] != value]
    require(not changed, f"losses() wrote to {', '.join(changed)}")
    require([module.training for module in subject.model.modules()] == modes, "losses() changed the model's mode")
    require(all(value.grad is None for value in subject.model.parameters()), "losses() left gradients behind")


def drawn_labels_follow_the_generator(subject: ObjectiveSubject) -> None:
    """Where labels can be drawn from the model, the generator alone decides, and draws are losses per sample."""
    made = subject.make()
    if type(made).fisher_losses is Objective.fisher_losses:
        return
    kinds: tuple[LabelKind, ...] = ("sampled", "exact")
    for kind in kinds:
        first, second = (_draws(subject, made, kind, seed=3) for _ in range(2))
        require(len(first) > 0, f"no draws of {kind} labels")
        for one, two in zip(first, second, strict=True):
            require(one.shape == (subject.samples,), f"a draw of {kind} labels has shape {tuple(one.shape)}")
            require(bitwise(one) == bitwise(two), f"two draws of {kind} labels by one seed differ")


CHECKS: Sequence[Callable[[ObjectiveSubject], None]] = (
    declares_itself,
    losses_are_those_of_each_sample,
    losses_can_be_differentiated,
    labels_are_counted,
    tokens_are_masked_sample_by_sample,
    what_is_added_has_one_row_per_sample,
    nothing_else_is_touched,
    drawn_labels_follow_the_generator,
)


def _draws(subject: ObjectiveSubject, made: Objective[Any], kind: LabelKind, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [draw().detach() for draw in made.fisher_losses(subject.model, subject.batch, kind, generator=generator)]


def _rows(batch: Batch, rows: Sequence[int]) -> Batch:
    return {key: value[list(rows)] for key, value in batch.items()}
