"""Pairs of a chosen and a rejected text: their layout in a batch, their log-probabilities, their tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_da_core.errors import DataError
from lora_da_core.operators import accumulation_dtype
from lora_da_core.types import Batch, TokenMask
from lora_da_objectives._likelihood import IGNORED
from lora_da_objectives._model import inputs_of, logits_in

REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
"""Summed log-probabilities (pairs,) of the reference model, named as TRL names them."""


def completion_counts(batch: Batch) -> Tensor:
    """Completion tokens of every text, (pairs, 2).

    Args:
        batch: With `labels` (pairs, 2, tokens).

    Returns:
        int64 counts.

    Raises:
        DataError: The labels have another layout.
    """
    labels: Tensor = batch["labels"]
    if labels.ndim != 3 or labels.shape[1] != 2:
        raise DataError(
            f"preference data needs labels of shape (pairs, 2, tokens), chosen before rejected, not "
            f"{tuple(labels.shape)}; lora_da_core.preference_batches makes them of what TRL's collator returns."
        )
    counts: Tensor = (labels[..., 1:] != IGNORED).sum(-1)
    return counts


def pair_counts(batch: Batch) -> Tensor:
    """Completion tokens of every pair, (pairs,); 0 where either text has none, as nothing is compared then."""
    counts = completion_counts(batch)
    return torch.where((counts > 0).all(1), counts.sum(1), 0)


def pair_mask(batch: Batch, kind: TokenMask) -> Tensor:
    """Which tokens of a pair count, bool (pairs, 2·tokens): the chosen text's, then the rejected one's."""
    labels: Tensor = batch["labels"]
    if kind == "attention":
        mask = batch.get("attention_mask")
        return (torch.ones_like(labels) if mask is None else mask).bool().flatten(1)
    return functional.pad(labels[..., 1:] != IGNORED, (0, 1)).flatten(1)


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Summed log-probabilities of the completions, (pairs, 2)."""
    labels: Tensor = batch["labels"]
    pairs = {key: value for key, value in batch.items() if key not in REFERENCES}
    texts = {key: value.flatten(0, 1) for key, value in pairs.items() if key != "labels"}
    logits = logits_in(model(**inputs_of(model, texts)))
    targets = labels.flatten(0, 1)[:, 1:]
    counted = targets != IGNORED
    scores = logits[:, :-1][counted].to(accumulation_dtype(logits.dtype))
    token_losses = functional.cross_entropy(scores, targets[counted], reduction="none")
    placed = token_losses.new_zeros(counted.shape).masked_scatter(counted, token_losses)
    summed: Tensor = -placed.sum(1)
    return summed.view(-1, 2)


def with_references(model: nn.Module, batch: Batch) -> Batch:
    """The batch with the model's own log-probabilities as the reference's, where it has none."""
    if all(name in batch for name in REFERENCES):
        return batch
    found = log_probabilities(model, batch).detach()
    return {**batch, **dict(zip(REFERENCES, found.unbind(1), strict=True))}


def compared(model: nn.Module, batch: Batch, average: bool) -> tuple[Tensor, Tensor]:
    """The chosen texts' log π(y_w|x) (pairs,), and the margins of log π/π_ref, chosen less rejected (pairs,).

    Without references in the batch, the reference is the model as it is.

    Args:
        model: The policy.
        batch: The pairs.
        average: Divide log-probabilities by the completion's tokens.

    Returns:
        Both, with their graph.
    """
    policy = log_probabilities(model, batch)
    known = all(name in batch for name in REFERENCES)
    reference = torch.stack([batch[name] for name in REFERENCES], 1).to(policy.dtype) if known else policy.detach()
    if average:
        counts = completion_counts(batch)
        policy, reference = policy / counts, reference / counts
    ratio = policy - reference
    return policy[:, 0], ratio[:, 0] - ratio[:, 1]
