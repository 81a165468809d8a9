"""Preference data: from the layout of TRL's collator to one sample per pair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lora_da_core.errors import DataError
from lora_da_core.types import Batch

_IGNORED = -100
_BY_TEXT = ("input_ids", "attention_mask")
_BY_PAIR = ("ref_chosen_logps", "ref_rejected_logps")
_MASK = "completion_mask"


@dataclass(frozen=True)
class PreferenceBatches:
    """Batches of pairs, made anew each time they are read; `preference_batches` makes one."""

    source: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(self.source):
            yield _pairs(batch, index)


def preference_batches(batches: Iterable[Batch]) -> PreferenceBatches:
    """Batches for the objectives `dpo` and `rpo` from those of TRL's `DataCollatorForPreference`.

    Args:
        batches: Mappings with `input_ids`, `attention_mask` and `completion_mask` (2·pairs, tokens): all chosen texts,
            then all rejected ones. Log-probabilities of a reference model (pairs,) are kept.

    Returns:
        Batches with `input_ids`, `attention_mask` and `labels` (pairs, 2, tokens), as often as `batches` can be read.
        Reading them raises `DataError` where a batch has another layout.
    """
    return PreferenceBatches(batches)


def _pairs(batch: Batch, index: int) -> dict[str, Any]:
    known = (*_BY_TEXT, _MASK, *_BY_PAIR)
    missing = [key for key in (*_BY_TEXT, _MASK) if key not in batch]
    unknown = [key for key in batch if key not in known]
    if missing or unknown:
        raise DataError(
            f"preference batch {index} has {sorted(batch)}; give the input_ids, attention_mask and completion_mask "
            "that TRL's DataCollatorForPreference returns (text alone)."
        )
    rows = len(batch["input_ids"])
    if rows % 2:
        raise DataError(f"preference batch {index} has {rows} texts, an odd number: chosen and rejected make pairs.")
    texts = {key: torch.stack(batch[key].chunk(2), dim=1) for key in (*_BY_TEXT, _MASK)} if rows else {}
    if not texts:
        raise DataError(f"preference batch {index} is empty.")
    labels = texts["input_ids"].masked_fill(texts.pop(_MASK) == 0, _IGNORED)
    return {**texts, "labels": labels, **{key: batch[key] for key in _BY_PAIR if key in batch}}
