"""Preference data as a grid reads them: rows with a chosen and a rejected answer, encoded and padded two by two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_da_core.batches import filled, to_device
from lora_da_core.data import Rows, Sample, TextOptions, encode_text, padded
from lora_da_core.errors import DataError, OptionError
from lora_da_core.interfaces import Objective
from lora_da_core.types import Batch

CHOSEN: Final = "chosen"
REJECTED: Final = "rejected"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        chosen: The better one, with its prompt.
        rejected: The other.
        added: What an objective asked of the base model for this pair, as `Objective.complete` named it.
    """

    chosen: Sample
    rejected: Sample
    added: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the longer text."""
        return max(len(text["input_ids"]) for text in (self.chosen, self.rejected))


@dataclass(frozen=True)
class PairData:
    """Encoded pairs; what follows them is for a line search alone."""

    samples: tuple[Pair, ...]
    unseen: tuple[Pair, ...]
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(text["input_ids"]) for pair in self.samples for text in (pair.chosen, pair.rejected))


def chosen_template(rows: Rows, template: str | None) -> str | None:
    """How a row's chosen text is written: as asked for, or the prompt and then the answer where there are pairs.

    Args:
        rows: The data.
        template: The run's own.

    Returns:
        A format string; None where the rows hold no pairs and none is asked for.
    """
    if template is not None or not {CHOSEN, REJECTED} <= set(rows[0]):
        return template
    return f"{{prompt}}{{{CHOSEN}}}" if "prompt" in rows[0] else f"{{{CHOSEN}}}"


def check_pairs(rows: Rows, template: str | None) -> str:
    """The chosen texts' template, where rows and template are of pairs.

    Args:
        rows: The data.
        template: As `chosen_template` gives it.

    Returns:
        The template.

    Raises:
        DataError: The rows hold no pairs.
        OptionError: The template does not write the chosen text.
    """
    if not {CHOSEN, REJECTED} <= set(rows[0]):
        raise DataError(
            f"an objective of pairs reads columns '{CHOSEN}' and '{REJECTED}'; the data has {sorted(rows[0])}."
        )
    if template is None or f"{{{CHOSEN}}}" not in template:
        raise OptionError(f"prompt_template is {template!r}; for an objective of pairs it must hold {{{CHOSEN}}}.")
    return template


def encode_pairs(rows: Rows, tokenizer: Any, options: TextOptions, *, model_limit: int | None) -> PairData:
    """Encodes both texts of every row that is drawn, each as `encode_text` does.

    Args:
        rows: With columns `chosen` and `rejected`.
        tokenizer: A fast tokenizer.
        options: The chosen texts' template, length and draw.
        model_limit: Positions that the model has.

    Returns:
        The pairs whose texts both keep a label.

    Raises:
        DataError: The rows hold no pairs, or no pair keeps its labels.
        OptionError: The template does not end with the chosen text.
    """
    template = check_pairs(rows, options.prompt_template)
    others = template.replace(f"{{{CHOSEN}}}", f"{{{REJECTED}}}")

    def encoded(count: int | None) -> tuple[dict[int, Pair], tuple[str, ...]]:
        asked = replace(options, samples=count, beyond=0)
        one, two = (
            encode_text(rows, tokenizer, replace(asked, prompt_template=written), model_limit=model_limit)
            for written in (template, others)
        )
        rejected = dict(zip(two.rows, two.samples, strict=True))
        pairs = zip(one.rows, one.samples, strict=True)
        return {row: Pair(sample, rejected[row]) for row, sample in pairs if row in rejected}, one.notes

    found, notes = encoded(options.samples)
    if not found:
        raise DataError("no pair keeps labels in both of its texts; check the columns and the template.")
    further: dict[int, Pair] = {}
    if options.samples is not None and options.beyond:
        # A larger draw with the same seed begins with the smaller one.
        further, _ = encoded(options.samples + options.beyond)
    unseen = tuple(pair for row, pair in further.items() if row not in found)
    return PairData(tuple(found.values()), unseen, notes)


def pair_batch(pairs: Sequence[Pair], pad_token_id: int) -> dict[str, Tensor]:
    """One batch as objectives of pairs take it.

    Args:
        pairs: At least one.
        pad_token_id: What fills the right.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 (pairs, 2, tokens), and what was added to the pairs.
    """
    texts = padded([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)], pad_token_id)
    batch = {name: torch.stack(value.chunk(2), dim=1) for name, value in texts.items()}
    return {**batch, **{name: torch.stack([pair.added[name] for pair in pairs]) for name in pairs[0].added}}


def pair_batches(
    pairs: Sequence[Pair], pad_token_id: int, batch_size: int | None, tokens_per_batch: int
) -> list[dict[str, Tensor]]:
    """Batches of pairs of similar length, the longest first.

    Args:
        pairs: At least one.
        pad_token_id: What fills the right.
        batch_size: Pairs in a batch; None fills batches up to `tokens_per_batch`.
        tokens_per_batch: Tokens in a batch, padding counted.

    Returns:
        As `pair_batch` makes them.
    """
    parts = filled(pairs, lambda pair: 2 * pair.length, batch_size, tokens_per_batch)
    return [pair_batch(part, pad_token_id) for part in parts]


def completed(pairs: Sequence[Pair], objective: Objective[Any], model: nn.Module, pad_token_id: int) -> list[Pair]:
    """The pairs with what the objective asks of the base model, so that a trained one need not be taken apart.

    Args:
        pairs: The pairs.
        objective: What is trained.
        model: The base without an adapter; it is left in evaluation mode.
        pad_token_id: What fills the right.

    Returns:
        One for each, in their order.
    """
    device = next(model.parameters()).device
    model.eval()
    found = []
    with torch.no_grad():
        for pair in pairs:
            batch: Batch = to_device(pair_batch([pair], pad_token_id), device)
            whole = objective.complete(model, batch)
            added = {name: value[0].cpu() for name, value in whole.items() if name not in batch}
            found.append(replace(pair, added=added))
    return found
