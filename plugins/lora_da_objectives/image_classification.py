"""The loss of a classifier of images: one class, several labels, or a regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import Objective
from lora_da_core.types import Batch, LayerSpec, TokenMask
from lora_da_objectives._classification import Classification


class ImageClassification(Classification):
    """The loss of `problem_type`, sample by sample; `labels` are (samples,) or (samples, outputs).

    All that a layer sees counts for the Fisher: patches, class tokens, windows, or one pooled vector.
    """

    name = "image_classification"
    api_version = 1
    masks_by_layer = False

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        return torch.ones(len(batch["labels"]), tokens, dtype=torch.bool)


@hookimpl
def lora_da_objectives() -> list[type[Objective[Any]]]:
    """Offers `image_classification`."""
    return [ImageClassification]
