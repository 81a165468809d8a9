"""What objectives need of models and batches: inputs without labels, the logits, the attended tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.types import Batch


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the model is called with: everything but the labels, and no cache.

    Without labels the model computes no loss of its own, and transformers guess no `problem_type` into its config.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def logits_in(output: Any) -> Tensor:
    """The logits of a model's output, whether it has names or is a tuple."""
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def attended(batch: Mapping[str, Any], tokens: int) -> Tensor:
    """The tokens that the attention mask keeps, bool (samples, tokens).

    All of them where there is no mask, or where a layer sees one token per sample, as poolers and heads do.
    """
    samples, mask = len(batch["labels"]), batch.get("attention_mask")
    if mask is None or (tokens == 1 and mask.shape[1:] != (1,)):
        return torch.ones(samples, tokens, dtype=torch.bool)
    kept: Tensor = mask.bool()
    return kept
