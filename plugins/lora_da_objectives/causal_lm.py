"""The next-token loss of a causal language model, averaged over each sample's own labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_da_core import hookimpl
from lora_da_core.interfaces import NoOptions, Objective
from lora_da_core.operators import accumulation_dtype
from lora_da_core.types import Batch, LabelKind, LayerSpec, TokenMask
from lora_da_objectives._likelihood import IGNORED, Categorical, draws
from lora_da_objectives._model import inputs_of, logits_in


class CausalLM(Objective[NoOptions]):
    """ℓ_n = −(1/T_n) Σ_t log p(label_{t+1} | x_≤t), T_n the labels of sample n.

    The batch holds `input_ids` and `labels` (samples, tokens), usually `attention_mask`; whatever else it holds
    goes to the model.
    """

    name = "causal_lm"
    api_version = 1
    masks_by_layer = False

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return _likelihood(model, batch).losses()

    def label_counts(self, batch: Batch) -> Tensor:
        counts: Tensor = (batch["labels"][:, 1:] != IGNORED).sum(1)
        return counts

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        labels: Tensor = batch["labels"]
        if kind == "attention":
            mask = batch.get("attention_mask")
            return torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
        return functional.pad(labels[:, 1:] != IGNORED, (0, 1))

    def fisher_losses(
        self, model: nn.Module, batch: Batch, labels: LabelKind, *, generator: torch.Generator
    ) -> Iterator[Callable[[], Tensor]]:
        """Draws of the Fisher of the model's own likelihood, one label per position; see `draws`."""
        return draws(partial(_likelihood, model, batch), labels, generator)


def _likelihood(model: nn.Module, batch: Batch) -> Categorical:
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    first = int(counted.any(0).int().argmax())
    logits = _logits(model, inputs_of(model, batch), first)
    targets, counted = targets[:, first:], counted[:, first:]
    scores = logits[:, : targets.shape[1]][counted].to(accumulation_dtype(logits.dtype))
    return Categorical(scores, targets[counted], counted)


def _logits(model: nn.Module, inputs: dict[str, Any], first: int) -> Tensor:
    """Logits from position `first` on; all positions are computed only where the head is being watched."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    # A hooked head is a target itself: it must see every position, as the token mask counts them.
    if keeps and first > 0 and head is not None and not _is_hooked(head):
        length = inputs["input_ids"].shape[1]
        positions = torch.arange(first, length, device=inputs["input_ids"].device)
        return logits_in(model(**inputs, logits_to_keep=positions))
    return logits_in(model(**inputs))[:, first:]


def _is_hooked(head: nn.Module) -> bool:
    """Whether somebody watches the head, or what PEFT has wrapped in it."""
    return any(module._forward_hooks for module in head.modules())


@hookimpl
def lora_da_objectives() -> list[type[Objective[Any]]]:
    """Offers `causal_lm`."""
    return [CausalLM]
