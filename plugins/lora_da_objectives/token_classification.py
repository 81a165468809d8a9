"""The loss of a classifier of tokens, averaged over each sample's own labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core import hookimpl
from lora_da_core.errors import DataError
from lora_da_core.interfaces import NoOptions, Objective
from lora_da_core.operators import accumulation_dtype
from lora_da_core.types import Batch, LabelKind, LayerSpec, TokenMask
from lora_da_objectives._classification import class_labels
from lora_da_objectives._likelihood import IGNORED, Categorical, draws
from lora_da_objectives._model import attended, inputs_of, logits_in


class TokenClassification(Objective[NoOptions]):
    """ℓ_n = −(1/T_n) Σ_t log p(label_t | x), T_n the labels of sample n; `labels` are (samples, tokens)."""

    name = "token_classification"
    api_version = 1
    masks_by_layer = False

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return _likelihood(model, batch).losses()

    def label_counts(self, batch: Batch) -> Tensor:
        counts: Tensor = (batch["labels"] != IGNORED).sum(1)
        return counts

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        if kind == "attention":
            return attended(batch, tokens)
        counted: Tensor = batch["labels"] != IGNORED
        return counted

    def fisher_losses(
        self, model: nn.Module, batch: Batch, labels: LabelKind, *, generator: torch.Generator
    ) -> Iterator[Callable[[], Tensor]]:
        """Draws of the Fisher of the model's own likelihood; see `draws`."""
        return draws(partial(_likelihood, model, batch), labels, generator)


def _likelihood(model: nn.Module, batch: Batch) -> Categorical:
    logits = logits_in(model(**inputs_of(model, batch)))
    labels: Tensor = batch["labels"]
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise DataError(
            f"the model gave logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}; "
            "each token needs a label, −100 where there is none."
        )
    targets = class_labels(labels.to(logits.device), logits.shape[-1])
    counted = targets != IGNORED
    return Categorical(logits[counted].to(accumulation_dtype(logits.dtype)), targets[counted], counted)


@hookimpl
def lora_da_objectives() -> list[type[Objective[Any]]]:
    """Offers `token_classification`."""
    return [TokenClassification]
