"""The next-token loss of a causal language model, averaged over each sample's own labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_da_core import hookimpl
from lora_da_core.errors import OptionError
from lora_da_core.interfaces import NoOptions, Objective
from lora_da_core.operators import accumulation_dtype
from lora_da_core.types import Batch, LabelKind, LayerSpec, TokenMask

IGNORED = -100
"""The label that no loss is taken of, as in transformers."""

ENUMERABLE = 512
"""Largest vocabulary whose labels are enumerated: each label position costs one backward pass per class."""

_SAMPLED_ROWS = 256
"""Label positions whose float64 probabilities are held at once while labels are drawn."""


@dataclass(frozen=True)
class _Scored:
    """A batch's logits where labels are: (labels, vocabulary), and where those are, (samples, positions)."""

    scores: Tensor
    targets: Tensor
    counted: Tensor

    def mean_by_sample(self, token_losses: Tensor) -> Tensor:
        """(labels,) to (samples,)."""
        placed = token_losses.new_zeros(self.counted.shape).masked_scatter(self.counted, token_losses)
        return placed.sum(1) / self.counted.sum(1)

    def losses(self, labels: Tensor) -> Tensor:
        """Per-sample cross-entropy of `labels` (labels,)."""
        return self.mean_by_sample(functional.cross_entropy(self.scores, labels, reduction="none"))

    def losses_of_class(self, position: int, label: int) -> Tensor:
        """√p·(−log p) of one class at each sample's label number `position`, over the number of its labels."""
        log_p = functional.log_softmax(self.scores, dim=-1)[:, label]
        weight = (0.5 * log_p.detach()).exp()
        place = (self.counted.cumsum(1) - 1)[self.counted]
        # A class of probability 0 has an infinite −log p and no part in the expectation.
        wanted = (place == position) & (weight > 0)
        return self.mean_by_sample(torch.where(wanted, -weight * log_p, 0.0))


class CausalLM(Objective[NoOptions]):
    """ℓ_n = −(1/T_n) Σ_t log p(label_{t+1} | x_≤t), T_n the labels of sample n.

    The batch holds `input_ids` and `labels` (samples, tokens), usually `attention_mask`; whatever else it holds
    goes to the model.
    """

    name = "causal_lm"
    api_version = 1

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        scored = _scored(model, batch)
        return scored.losses(scored.targets)

    def label_counts(self, batch: Batch) -> Tensor:
        counts: Tensor = (batch["labels"][:, 1:] != IGNORED).sum(1)
        return counts

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask) -> Tensor:
        labels: Tensor = batch["labels"]
        if kind == "attention":
            mask = batch.get("attention_mask")
            return torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
        return functional.pad(labels[:, 1:] != IGNORED, (0, 1))

    def fisher_losses(
        self, model: nn.Module, batch: Batch, labels: LabelKind, *, generator: torch.Generator
    ) -> Iterator[Callable[[], Tensor]]:
        """Draws of the Fisher of the model's own likelihood (Kunstner et al. 2019, arXiv 1905.12558, section 2).

        `"sampled"` is one draw: every label is replaced by one drawn from the model's softmax at its position, by
        inversion, one uniform number per label in the order of the samples, so that the batch size does not matter.
        `"exact"` is one draw per position and class: the labels of different positions are independent given the
        inputs and the score has mean zero, so products between positions vanish in the expectation, and the sum
        over draws of g gᵀ is E[g gᵀ].

        Args:
            model: The model.
            batch: A batch on the model's device, every sample with a label.
            labels: `"sampled"` or `"exact"`.
            generator: Source of the labels, on the CPU.

        Yields:
            Functions that give per-sample losses (samples,), each with a graph of its own.

        Raises:
            OptionError: `"exact"` for a vocabulary that is too large to enumerate, or labels of another kind.
        """
        if labels == "sampled":
            yield partial(_sampled_losses, model, batch, generator)
            return
        if labels != "exact":
            raise OptionError(f"labels is {labels!r}; labels drawn from the model are 'sampled' or 'exact'.")
        with torch.no_grad():
            classes = _scored(model, batch).scores.shape[-1]
        if classes > ENUMERABLE:
            raise OptionError(
                f"labels='exact' needs a backward pass for each of {classes} classes at every label position; "
                f"at most {ENUMERABLE} classes are enumerated. Use labels='sampled'."
            )
        for position in range(int(self.label_counts(batch).max())):
            for label in range(classes):
                yield partial(_class_losses, model, batch, position, label)


def _scored(model: nn.Module, batch: Batch) -> _Scored:
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    first = int(counted.any(0).int().argmax())
    logits = _logits(model, {key: value for key, value in batch.items() if key != "labels"}, first)
    targets, counted = targets[:, first:], counted[:, first:]
    scores = logits[:, : targets.shape[1]][counted].to(accumulation_dtype(logits.dtype))
    return _Scored(scores, targets[counted], counted)


def _sampled_losses(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    scored = _scored(model, batch)
    return scored.losses(_sampled(scored.scores.detach(), generator))


def _class_losses(model: nn.Module, batch: Batch, position: int, label: int) -> Tensor:
    return _scored(model, batch).losses_of_class(position, label)


def _sampled(scores: Tensor, generator: torch.Generator) -> Tensor:
    """One class per row of `scores` (labels, vocabulary), drawn from its softmax."""
    uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64).to(scores.device)
    drawn = []
    for rows, level in zip(torch.split(scores, _SAMPLED_ROWS), torch.split(uniform, _SAMPLED_ROWS), strict=True):
        cumulative = torch.softmax(rows.double(), dim=-1).cumsum(-1)
        place = (level * cumulative[:, -1]).unsqueeze(-1)
        drawn.append(torch.searchsorted(cumulative, place, right=True).squeeze(-1))
    return torch.cat(drawn).clamp(max=scores.shape[-1] - 1)


def _logits(model: nn.Module, inputs: dict[str, Any], first: int) -> Tensor:
    """Logits from position `first` on; all positions are computed only where the head is being watched."""
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = False
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    # A hooked head is a target itself: it must see every position, as the token mask counts them.
    if "logits_to_keep" in known and first > 0 and head is not None and not _is_hooked(head):
        length = inputs["input_ids"].shape[1]
        positions = torch.arange(first, length, device=inputs["input_ids"].device)
        return _first_output(model(**inputs, logits_to_keep=positions))
    return _first_output(model(**inputs))[:, first:]


def _is_hooked(head: nn.Module) -> bool:
    """Whether somebody watches the head, or what PEFT has wrapped in it."""
    return any(module._forward_hooks for module in head.modules())


def _first_output(output: Any) -> Tensor:
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


@hookimpl
def lora_da_objectives() -> list[type[Objective[Any]]]:
    """Offers `causal_lm`."""
    return [CausalLM]
