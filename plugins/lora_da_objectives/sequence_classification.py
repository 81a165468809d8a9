"""The loss of a classifier of token sequences: one class, several labels, or a regression."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import Objective
from lora_da_core.types import Batch, LayerSpec, TokenMask
from lora_da_objectives._classification import Classification
from lora_da_objectives._model import attended


class SequenceClassification(Classification):
    """The loss of `problem_type`, sample by sample; `labels` are (samples,) or (samples, outputs).

    No token has a label of its own, so every attended token counts for the Fisher, whatever the token mask.
    """

    name = "sequence_classification"
    api_version = 1
    masks_by_layer = False

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        return attended(batch, tokens)


@hookimpl
def lora_da_objectives() -> list[type[Objective[Any]]]:
    """Offers `sequence_classification`."""
    return [SequenceClassification]
