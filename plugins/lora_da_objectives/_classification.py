"""One label, or one row of labels, per sample: what classifiers of sequences and of images have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from lora_da_core.errors import DataError
from lora_da_core.interfaces import NoOptions, Objective
from lora_da_core.operators import accumulation_dtype
from lora_da_core.types import Batch, LabelKind
from lora_da_objectives._likelihood import IGNORED, Bernoulli, Categorical, Gaussian, Likelihood, draws
from lora_da_objectives._model import inputs_of, logits_in

REGRESSION: Final = "regression"
SINGLE_LABEL: Final = "single_label_classification"
MULTI_LABEL: Final = "multi_label_classification"


class Classification(Objective[NoOptions]):
    """The loss that the `problem_type` of the model's configuration names, as transformers' heads have it.

    Cross-entropy of one class, the mean binary cross-entropy of several labels, or the mean squared error. Where
    the configuration names none, it is a regression with one output, one class with integer labels, and several
    labels with floating-point ones. A class of −100 or a NaN says that a sample has no label.
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return _likelihood(model, batch).losses()

    def label_counts(self, batch: Batch) -> Tensor:
        labels = batch["labels"].flatten(1) if batch["labels"].ndim > 1 else batch["labels"][:, None]
        known: Tensor = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
        return known.all(1).long()

    def draw_counts(self, batch: Batch) -> Tensor:
        labels = batch["labels"]
        return self.label_counts(batch) * (labels[0].numel() if len(labels) else 1)

    def fisher_losses(
        self, model: nn.Module, batch: Batch, labels: LabelKind, *, generator: torch.Generator
    ) -> Iterator[Callable[[], Tensor]]:
        """Draws of the Fisher of the model's own likelihood; see `draws`.

        A squared error is read as a Gaussian of variance 1/2, whose −log density it is.
        """
        return draws(partial(_likelihood, model, batch), labels, generator)


def problem_type(model: nn.Module, labels: Tensor, outputs: int) -> str:
    """The configuration's `problem_type`, or what transformers take it for; the configuration is left alone.

    Args:
        model: The model.
        labels: The batch's labels.
        outputs: Logits per sample.

    Returns:
        One of transformers' three names.
    """
    named = getattr(getattr(model, "config", None), "problem_type", None)
    if named is not None:
        return str(named)
    if outputs == 1:
        return REGRESSION
    return SINGLE_LABEL if labels.dtype in (torch.int64, torch.int32) else MULTI_LABEL


def class_labels(labels: Tensor, classes: int) -> Tensor:
    """Labels as cross-entropy takes them.

    Args:
        labels: Integers; −100 says that there is none.
        classes: Number of classes.

    Returns:
        The labels, int64.

    Raises:
        DataError: They are no integers, or out of range; on an accelerator the latter would end the process.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"the labels are {labels.dtype}; classes are integers from 0 to {classes - 1}.")
    known = labels[labels != IGNORED]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < classes:
        raise DataError(
            f"the labels range from {int(known.min())} to {int(known.max())}, and the model has {classes} classes; "
            "give 0 to num_labels − 1, or −100 where there is no label."
        )
    return labels.long()


def _likelihood(model: nn.Module, batch: Batch) -> Likelihood:
    logits = logits_in(model(**inputs_of(model, batch)))
    labels: Tensor = batch["labels"]
    if logits.ndim != 2 or len(logits) != len(labels):
        raise DataError(
            f"the model gave logits of shape {tuple(logits.shape)} for {len(labels)} samples; this objective needs "
            "(samples, outputs)."
        )
    outputs = logits.shape[1]
    scores, labels = logits.to(accumulation_dtype(logits.dtype)), labels.to(logits.device)
    kind = problem_type(model, labels, outputs)
    if kind == SINGLE_LABEL:
        return _one_class(scores, labels)
    if kind not in (MULTI_LABEL, REGRESSION):
        raise DataError(f"the model's problem_type is {kind!r}; known are {REGRESSION}, {SINGLE_LABEL}, {MULTI_LABEL}.")
    if not labels.is_floating_point():
        raise DataError(f"the labels are {labels.dtype}; {kind} needs floating-point labels.")
    if labels.numel() != logits.numel() or (outputs > 1 and labels.ndim != 2):
        raise DataError(
            f"the labels have shape {tuple(labels.shape)}; {kind} with {outputs} outputs needs "
            f"({len(labels)}, {outputs})."
        )
    targets = labels.reshape(logits.shape).to(scores.dtype)
    if kind == REGRESSION:
        return Gaussian(scores, targets)
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise DataError(
            f"the labels range from {float(targets.min()):g} to {float(targets.max()):g}; {kind} needs 0 to 1."
        )
    return Bernoulli(scores, targets)


def _one_class(scores: Tensor, labels: Tensor) -> Categorical:
    samples, classes = scores.shape
    if labels.numel() != samples:
        raise DataError(
            f"the labels have shape {tuple(labels.shape)}; {SINGLE_LABEL} needs one class per sample, ({samples},)."
        )
    targets = class_labels(labels, classes).reshape(samples, 1)
    counted = targets != IGNORED
    return Categorical(scores[counted.squeeze(1)], targets[counted], counted)
