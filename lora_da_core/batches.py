"""Batches as mappings of tensors whose first dimension counts samples: counting, cutting, moving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

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


TOKENS_PER_BATCH = 2048
"""Tokens that batches are filled up to where no batch size is given: with fewer an accelerator waits for the host."""

TOKENS_PER_CPU_BATCH = 256
"""The same on a CPU, which gains nothing from more: passes over SmolLM2-135M took 53 to 58 s at 256 to 1,024 tokens, 72
at 2,048, and 1.8 MiB of memory a token."""


def batch_tokens_on(device: torch.device) -> int:
    """Tokens that batches are filled up to on a device where no batch size is given."""
    return TOKENS_PER_CPU_BATCH if device.type == "cpu" else TOKENS_PER_BATCH


ItemT = TypeVar("ItemT")


def filled(
    items: Iterable[ItemT],
    tokens_of: Callable[[ItemT], int],
    batch_size: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[list[ItemT]]:
    """Items of similar length together, the longest first so that a lack of memory shows at once.

    Args:
        items: What batches are made of.
        tokens_of: Tokens that an item takes in a batch where it is the longest.
        batch_size: Items in a batch; None fills batches up to `tokens_per_batch`.
        tokens_per_batch: Tokens in a batch, padding counted; a longer item is a batch of its own.

    Yields:
        The items of a batch.
    """
    ordered = sorted(items, key=lambda item: -tokens_of(item))
    at = 0
    while at < len(ordered):
        size = batch_size or max(1, tokens_per_batch // max(1, tokens_of(ordered[at])))
        yield ordered[at : at + size]
        at += size


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


def first_labelled(objective: Objective[Any], batches: Sequence[Batch]) -> tuple[int, Batch]:
    """The number of the first batch that has labels, of which there must be one, and its samples with labels."""
    parts = ((number, labelled_part(objective, batch)) for number, batch in enumerate(batches))
    return next((number, part) for number, part in parts if part is not None)


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """The samples `rows` (indices) of a batch."""
    samples = len(batch["labels"])
    return {
        key: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == samples else value
        for key, value in batch.items()
    }


def cut(batches: Iterable[Batch], samples: int, tokens: int) -> list[Batch]:
    """The same samples in batches of at most so many, or more where they are short enough to keep within the tokens."""
    parts: list[Batch] = []
    for batch in batches:
        count = len(batch["labels"])
        length = batch["labels"].numel() // max(1, count)
        # One label per sample does not tell how long samples are.
        most = max(samples, tokens // length) if length > 1 else samples
        if count <= most:
            parts.append(batch)
            continue
        parts += [take_rows(batch, torch.arange(start, min(start + most, count))) for start in range(0, count, most)]
    return parts


def first_samples(batches: Iterable[Batch], samples: int | None, beyond: int = 0) -> tuple[list[Batch], list[Batch]]:
    """The batches up to `samples` samples, and those of the samples that follow; batches are cut where needed.

    Args:
        batches: Any batches; what is no mapping of tensors is passed on as it is.
        samples: How many; None takes all, and nothing follows.
        beyond: How many more at most.

    Returns:
        Both parts, the second shorter or empty where there are no more samples.
    """
    if samples is None:
        return list(batches), []
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    wanted = [samples, beyond]
    for batch in batches:
        if not (isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor)):
            # Whoever counts the labels refuses it; until then it stands for one sample, so that a stream ends.
            place = 0 if wanted[0] else 1
            parts[place].append(batch)
            wanted[place] -= 1
        else:
            start, size = 0, len(batch["labels"])
            for place, part in enumerate(parts):
                count = min(wanted[place], size - start)
                if count:
                    part.append(batch if count == size else take_rows(batch, torch.arange(start, start + count)))
                    start, wanted[place] = start + count, wanted[place] - count
        # Before the next batch is asked for, which costs a loader its work.
        if not any(wanted):
            break
    return parts


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


_TEXT_PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}
"""What texts are lengthened with; tokens that neither the mask nor a label counts change no loss."""


def padded_together(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Neighbouring batches of texts as one, padded on the right: an accelerator reads 16 short texts as fast as one.

    Only batches of nothing but token ids, attention mask and a label for every token are taken together, since of
    others it is not known what padding means to the model.

    Args:
        batches: Any batches with labels.
        tokens: How many tokens, padding included, such a batch may have.

    Returns:
        The same samples in the same order.
    """
    found: list[Batch] = []
    for batch in batches:
        pair = [found[-1], batch] if found else []
        if pair and all(_is_text(text) for text in pair) and _padded_size(pair) <= tokens:
            found[-1] = _one_text_batch(pair)
        else:
            found.append(batch)
    return found


def _padded_size(texts: Sequence[Batch]) -> int:
    shapes = [text["labels"].shape for text in texts]
    return int(sum(samples for samples, _ in shapes) * max(length for _, length in shapes))


def _is_text(batch: Batch) -> bool:
    shape = batch["labels"].shape
    return set(batch) == set(_TEXT_PADDING) and all(
        isinstance(value, Tensor) and value.ndim == 2 and value.shape == shape for value in batch.values()
    )


def _one_text_batch(texts: Sequence[Batch]) -> Batch:
    longest = max(text["labels"].shape[1] for text in texts)

    def padded(text: Batch, key: str) -> Tensor:
        missing = longest - text[key].shape[1]
        return torch.nn.functional.pad(text[key], (0, missing), value=_TEXT_PADDING[key])

    return {key: torch.cat([padded(text, key) for text in texts]) for key in _TEXT_PADDING}


def divided(batches: Sequence[Batch], parts: int) -> list[list[Batch]]:
    """Every `parts`-th sample to the same part, so that each holds long and short ones, however they are batched.

    Args:
        batches: Batches with labels.
        parts: At least 1.

    Returns:
        The batches of each part.

    Raises:
        DataError: There are fewer samples than parts.
    """
    if parts == 1:
        return [list(batches)]
    total = sum(len(batch["labels"]) for batch in batches)
    if total < parts:
        raise DataError(f"{total} samples cannot be divided over rounds={parts}; give more samples or fewer rounds.")
    found: list[list[Batch]] = [[] for _ in range(parts)]
    start = 0
    for batch in batches:
        size = len(batch["labels"])
        for part, taken in enumerate(found):
            first = (part - start) % parts
            if first < size:
                taken.append(take_rows(batch, torch.arange(first, size, parts)))
        start += size
    return found
