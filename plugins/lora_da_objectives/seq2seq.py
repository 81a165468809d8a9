"""The loss of an encoder-decoder language model, averaged over each sample's own labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

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

ENCODER: Final = "encoder"
DECODER: Final = "decoder"

_CROSS_ATTENTION: Final = re.compile(r"(cross|enc).*att", re.IGNORECASE)
_OF_KEYS: Final = re.compile(r"(k|v|key|value)(_proj|_lin)?")
_OF_QUERIES: Final = re.compile(r"(q|o|query|out|c|dense|output)(_proj|_lin|_attn)?|dense")


class Seq2Seq(Objective[NoOptions]):
    """ℓ_n = −(1/T_n) Σ_t log p(label_t | label_<t, x), T_n the labels of sample n.

    The batch holds what the encoder reads and `labels` (samples, target tokens). Without `decoder_input_ids` the
    model shifts the labels itself, as transformers' collator has it do.
    """

    name = "seq2seq"
    api_version = 1

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return _likelihood(model, batch).losses()

    def label_counts(self, batch: Batch) -> Tensor:
        counts: Tensor = (batch["labels"] != IGNORED).sum(1)
        return counts

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        """Source tokens for what reads the encoder's, target tokens for what reads the decoder's.

        Source tokens have no labels: all that the attention mask keeps count. Of the target's, `"labels"` takes
        those that predict a label, `"attention"` those of `decoder_attention_mask`, or all up to the last label.

        Raises:
            DataError: The layer's name does not say which tokens it reads, nor does their number.
        """
        masks = {ENCODER: _source_mask(batch, tokens), DECODER: _target_mask(batch, kind)}
        possible = [masks[side] for side in sides(spec.name)]
        fitting = [mask for mask in possible if mask.shape[1] == tokens]
        if len(fitting) > 1 and not torch.equal(fitting[0], fitting[1]):
            raise DataError(
                f"layer {spec.name} sees {tokens} tokens of each sample, which may be the source's or the target's: "
                "both have as many, and its name does not tell. Pad one of them further, or exclude the layer with "
                "exclude_modules."
            )
        return fitting[0] if fitting else possible[0]

    def fisher_losses(
        self, model: nn.Module, batch: Batch, labels: LabelKind, *, generator: torch.Generator
    ) -> Iterator[Callable[[], Tensor]]:
        """Draws of the Fisher of the model's own likelihood, the decoder's inputs as they are; see `draws`."""
        return draws(partial(_likelihood, model, batch), labels, generator)


def sides(name: str) -> tuple[str, ...]:
    """Whose tokens a layer may read, from its name: the encoder's, the decoder's, or either's.

    >>> sides("encoder.block.0.layer.0.SelfAttention.q"), sides("model.decoder.layers.1.fc1"), sides("lm_head")
    (('encoder',), ('decoder',), ('decoder',))
    >>> sides("decoder.block.0.layer.1.EncDecAttention.k"), sides("model.decoder.layers.1.encoder_attn.q_proj")
    (('encoder',), ('decoder',))
    >>> sides("decoder.layers.1.cross_attn.fused"), sides("bridge")
    (('encoder', 'decoder'), ('encoder', 'decoder'))
    """
    parts = name.split(".")
    stack = next((place for place, part in enumerate(parts) if part in (ENCODER, DECODER)), None)
    if stack is None:
        return (DECODER,) if parts[-1] == "lm_head" else (ENCODER, DECODER)
    if parts[stack] == ENCODER:
        return (ENCODER,)
    if not any(_CROSS_ATTENTION.search(part) for part in parts[stack + 1 :]):
        return (DECODER,)
    if _OF_KEYS.fullmatch(parts[-1]):
        return (ENCODER,)
    return (DECODER,) if _OF_QUERIES.fullmatch(parts[-1]) else (ENCODER, DECODER)


def _source_mask(batch: Batch, tokens: int) -> Tensor:
    if batch.get("attention_mask") is not None:
        mask: Tensor = batch["attention_mask"].bool()
        return mask
    ids = batch.get("input_ids")
    return attended(batch, tokens) if ids is None else torch.ones_like(ids, dtype=torch.bool)


def _target_mask(batch: Batch, kind: TokenMask) -> Tensor:
    counted: Tensor = batch["labels"] != IGNORED
    if kind == "labels":
        return counted
    mask = batch.get("decoder_attention_mask")
    if mask is not None:
        kept: Tensor = mask.bool()
        return kept
    # Tokens after the last label are padding: they reach no loss, and how many there are is the batch's choice.
    return counted.flip(1).cumsum(1).flip(1) > 0


def _likelihood(model: nn.Module, batch: Batch) -> Categorical:
    inputs, labels = inputs_of(model, batch), batch["labels"]
    if not {"decoder_input_ids", "decoder_inputs_embeds"} & {key for key, value in inputs.items() if value is not None}:
        inputs["decoder_input_ids"] = _shifted(model, labels)
    logits = logits_in(model(**inputs))
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise DataError(
            f"the model gave logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}; "
            "labels stand beside the decoder's inputs, −100 where there is none."
        )
    targets = class_labels(labels.to(logits.device), logits.shape[-1])
    counted = targets != IGNORED
    return Categorical(logits[counted].to(accumulation_dtype(logits.dtype)), targets[counted], counted)


def _shifted(model: nn.Module, labels: Tensor) -> Tensor:
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise DataError(
            f"a {type(model).__name__} makes no decoder inputs from labels; put decoder_input_ids into the batches."
        )
    shifted: Tensor = shift(labels=labels)
    return shifted


@hookimpl
def lora_da_objectives() -> list[type[Objective[Any]]]:
    """Offers `seq2seq`."""
    return [Seq2Seq]
