"""The next-token loss of a causal language model, averaged over each sample's own labels."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_da_core import hookimpl
from lora_da_core.interfaces import NoOptions, Objective
from lora_da_core.operators import accumulation_dtype
from lora_da_core.types import Batch, LayerSpec, TokenMask

IGNORED = -100
"""The label that no loss is taken of, as in transformers."""


class CausalLM(Objective[NoOptions]):
    """ℓ_n = −(1/T_n) Σ_t log p(label_{t+1} | x_≤t), T_n the labels of sample n.

    The batch holds `input_ids` and `labels` (samples, tokens), usually `attention_mask`; whatever else it holds
    goes to the model.
    """

    name = "causal_lm"
    api_version = 1

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        targets = batch["labels"][:, 1:]
        counted = targets != IGNORED
        first = int(counted.any(0).int().argmax())
        logits = _logits(model, {key: value for key, value in batch.items() if key != "labels"}, first)
        targets, counted = targets[:, first:], counted[:, first:]
        scores = logits[:, : targets.shape[1]][counted].to(accumulation_dtype(logits.dtype))
        token_losses = functional.cross_entropy(scores, targets[counted], reduction="none")
        placed = token_losses.new_zeros(counted.shape).masked_scatter(counted, token_losses)
        return placed.sum(1) / counted.sum(1)

    def label_counts(self, batch: Batch) -> Tensor:
        counts: Tensor = (batch["labels"][:, 1:] != IGNORED).sum(1)
        return counts

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask) -> Tensor:
        labels: Tensor = batch["labels"]
        if kind == "attention":
            mask = batch.get("attention_mask")
            return torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
        return functional.pad(labels[:, 1:] != IGNORED, (0, 1))


def _logits(model: nn.Module, inputs: dict[str, Any], first: int) -> Tensor:
    """Logits from position `first` on; all positions are computed only where the head is being watched."""
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = False
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A hooked head is a target itself: it must see every position, as the token mask counts them.
    if "logits_to_keep" in known and first > 0 and head is not None and not head._forward_hooks:
        length = inputs["input_ids"].shape[1]
        positions = torch.arange(first, length, device=inputs["input_ids"].device)
        return _first_output(model(**inputs, logits_to_keep=positions))
    return _first_output(model(**inputs))[:, first:]


def _first_output(output: Any) -> Tensor:
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


@hookimpl
def lora_da_objectives() -> list[type[Objective[Any]]]:
    """Offers `causal_lm`."""
    return [CausalLM]
