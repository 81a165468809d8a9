"""Batches as mappings of tensors whose first dimension counts samples: counting, cutting, moving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_da_core.errors import DataError, PluginError
from lora_da_core.interfaces import Objective
from lora_da_core.types import Batch


def label_counts(objective: Objective[Any], batches: Sequence[Batch]) -> Tensor:
    """Labels of every sample, (samples,), before any model runs.

    Args:
        objective: The objective.
        batches: The batches.

    Returns:
        int64 counts on the CPU.

    Raises:
        DataError: A batch has no labels, or no sample has a label that counts.
    """
    if not batches:
        raise DataError("the data set is empty: no batch was given.")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or batch.get("labels") is None:
            raise DataError(f"batch {index} has no 'labels'; give every batch as a mapping with 'labels' in it.")
        if not isinstance(batch["labels"], Tensor):
            kind = type(batch["labels"]).__name__
            raise DataError(
                f"the labels of batch {index} are a {kind}; give tensors whose first dimension counts samples."
            )
    counts = torch.cat([_counts_of(objective, batch, index) for index, batch in enumerate(batches)])
    if len(counts) == 0:
        raise DataError("the data set is empty: the batches hold no samples.")
    if int(counts.max()) == 0:
        raise DataError(
            f"all labels are masked in all {len(counts)} samples: there is nothing to learn from. "
            "Check the prompt template and the maximum length."
        )
    return counts


def _counts_of(objective: Objective[Any], batch: Batch, index: int) -> Tensor:
    shape = tuple(batch["labels"].shape)
    try:
        counts = objective.label_counts(batch).cpu()
    except Exception as error:
        raise DataError(
            f"objective {objective.name!r} cannot count the labels of batch {index}, of shape {shape}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if tuple(counts.shape) != shape[:1]:
        raise PluginError(
            f"objective {objective.name!r} counted labels of shape {tuple(counts.shape)} in batch {index}, "
            f"whose labels have shape {shape}; it must be one count per sample."
        )
    return counts


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def labelled_part(objective: Objective[Any], batch: Batch) -> Batch | None:
    """The samples of a batch that have labels; None where there are none."""
    counts = objective.label_counts(batch)
    if bool((counts > 0).all()):
        return batch
    rows = (counts > 0).nonzero().squeeze(1)
    return take_rows(batch, rows) if len(rows) else None


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """The samples `rows` (indices) of a batch."""
    samples = len(batch["labels"])
    return {
        key: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == samples else value
        for key, value in batch.items()
    }


def first_samples(batches: Iterable[Batch], samples: int | None) -> list[Batch]:
    """The batches up to `samples` samples; the last one is cut where needed."""
    taken: list[Batch] = []
    left = float("inf") if samples is None else samples
    for batch in batches:
        if left <= 0:
            break
        if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
            size = len(batch["labels"])
            taken.append(batch if size <= left else take_rows(batch, torch.arange(int(left))))
            left -= size
        else:
            taken.append(batch)
    return taken


def spread(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """`samples` evenly spaced samples (all where there are fewer), the same ones however they are batched.

    Evenly spaced, because samples may be sorted by length.
    """
    total = sum(len(batch["labels"]) for batch in batches)
    count = min(samples, total)
    wanted = (torch.arange(count) * total + total // 2) // max(1, count)
    taken: list[Batch] = []
    start = 0
    for batch in batches:
        stop = start + len(batch["labels"])
        rows = wanted[(wanted >= start) & (wanted < stop)] - start
        if len(rows):
            taken.append(batch if len(rows) == stop - start else take_rows(batch, rows))
        start = stop
    return taken
