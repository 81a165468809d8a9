"""Data sets to batches: rows, templates, labels, padding. It knows text and tokenizers, never a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_da_core.batches import TOKENS_PER_BATCH, filled
from lora_da_core.data_files import check_data
from lora_da_core.errors import DataError, OptionError
from lora_da_core.sources import asked_of_hub, is_kind, local_path, looks_like_path, missing, reason
from lora_da_core.templates import Passage, RowFormat, row_format

IGNORED = -100
"""The label of a token that no loss looks at."""

DEFAULT_MAX_LENGTH = 1024

Sample = dict[str, list[int]]
"""One encoded sample: `input_ids` and `labels`, of the same length."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

_NO_ROWS = "corresponds to no data"
"""What `datasets` says of a split that it knows and that has none."""

_OF_SPLIT = ("Unknown split", "Split name", "Unrecognized instruction")
"""How it begins to say that a split is wrong, not the data."""

_ROWS_NAMED, _COLUMNS_NAMED = 10, 4


class Rows(Protocol):
    """Rows by position, each a mapping from column names: a `datasets.Dataset`, or a list of dicts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class TextOptions:
    r"""How rows become samples.

    Attributes:
        prompt_template: A format string with column names in braces, the last of them the answer; a line break
            may be written `\n`. None recognises the columns.
        max_length: Tokens that are kept of a sample; None takes the smaller of 1024 and what the model takes.
        samples: Rows that are drawn, without replacement; None takes all, in their order.
        seed: Seed of the draw. A larger draw with the same seed begins with the smaller one.
        beyond: Rows that are drawn after these as `TextData.unseen`, as far as there are any.
    """

    prompt_template: str | None = None
    max_length: int | None = None
    samples: int | None = None
    seed: int = 0
    beyond: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_length", self.max_length, 2),
            ("samples", self.samples, 1),
            ("seed", self.seed, 0),
            ("beyond", self.beyond, 0),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise OptionError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


@dataclass(frozen=True)
class TextData:
    """Encoded samples and how they came about.

    Attributes:
        samples: The samples, each with at least one label.
        rows: Position in the data set of each sample's row, from 0.
        population: Rows in the whole data set.
        notes: What was assumed, cut and dropped, in plain sentences.
        unseen: Further samples, which were asked for with `beyond`.
    """

    samples: tuple[Sample, ...]
    rows: tuple[int, ...]
    population: int
    notes: tuple[str, ...]
    unseen: tuple[Sample, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample["input_ids"]) for sample in self.samples)

    @property
    def label_tokens(self) -> int:
        """Labels of all samples."""
        return sum(count_labels(sample["labels"]) for sample in self.samples)


# --- rows -----------------------------------------------------------------------------------------------------


def load_rows(source: str | Path, *, split: str = "train") -> Rows:
    """Reads a data set.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, a directory of such files, or a hub data set id, where
            `id:configuration` names a configuration.
        split: The split to read; a file is all `train`. Slices such as `train[:100]` work.

    Returns:
        The rows, at least one.

    Raises:
        DataError: There is no such file or data set, it cannot be read, or it is empty.
    """
    if not str(source):
        raise DataError("the data has no name; give a file, a directory of files, or the id of a data set on the hub.")
    path = local_path(source)
    if is_kind(path, "file"):
        arguments = _file_arguments(path)
        check_data(path)
    elif is_kind(path, "directory"):
        check_data(path)
        arguments = {"path": str(path.resolve())}  # '.' alone is no name to the library
    elif looks_like_path(str(source), _BUILDERS):
        raise DataError(missing("data file", source, _BUILDERS))
    else:
        name, _, configuration = str(source).partition(":")
        arguments = {"path": name, "name": configuration or None}
    rows = _load(str(source), arguments, split)
    if len(rows) == 0:
        raise DataError(f"data set '{source}' has no rows in split '{split}'.")
    return rows


def waits_for(source: str | Path) -> tuple[str, ...]:
    """What to say before a data set is looked for: what is waited for.

    Args:
        source: As `load_rows` takes it.

    Returns:
        A sentence; none of a path.
    """
    return asked_of_hub("data set", source, _BUILDERS)


def _load(source: str, arguments: Mapping[str, Any], split: str) -> Rows:
    import datasets

    try:
        with _quiet() if "data_files" in arguments else nullcontext():
            rows: Rows = datasets.load_dataset(**arguments, split=split)
    except Exception as error:  # whatever the library and its readers raise, the user needs the same answer
        if _NO_ROWS in str(error):
            return []
        why = _why(error)
        advice = "a .jsonl, .json, .csv or .parquet file, or the id of a data set on the hub"
        if why.startswith(_OF_SPLIT):
            advice = "another split, such as 'train' or 'train[:1000]'"
        raise DataError(f"data set '{source}' (split '{split}') cannot be read: {why} Give {advice}.") from error
    return rows


def _why(error: Exception) -> str:
    from datasets.table import CastError

    found = error.__cause__
    if not isinstance(found, CastError):
        return reason(error)
    odd = sorted({*found.table_column_names} ^ {*found.requested_column_names})[:_COLUMNS_NAMED]
    return f"not all of its rows have the same columns; some lack {', '.join(map(repr, odd))}."


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for a file that is read in no time, and no log of an error that is raised anyway."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    hidden, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    if not hidden:
        disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not hidden:
            enable_progress_bars()


def _file_arguments(path: Path) -> dict[str, Any]:
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DataError(f"data file '{path}' is of no known kind; {', '.join(_BUILDERS)} files are read.")
    if path.stat().st_size == 0:
        raise DataError(f"data file '{path}' is empty.")
    return {"path": builder, "data_files": str(path)}


# --- text to tokens -------------------------------------------------------------------------------------------


def encode_text(
    rows: Rows, tokenizer: Any, options: TextOptions | None = None, *, model_limit: int | None = None
) -> TextData:
    """Writes rows as text and encodes them; every token that reaches into the answer is a label.

    The end-of-text token is appended, and is a label, unless a chat template wrote the text. The first token is
    never a label: nothing predicts it. Samples are cut to `max_length` from the right.

    Args:
        rows: At least one row; all have the columns of the first.
        tokenizer: A fast tokenizer of transformers.
        options: Template, length and draw.
        model_limit: Positions that the model has; None where unknown.

    Returns:
        The samples that keep at least one label, in the order drawn.

    Raises:
        DataError: The columns are not recognised, a row does not fit them, or no sample keeps a label.
        OptionError: `max_length` is above the model's limit.
    """
    options = options or TextOptions()
    if len(rows) == 0:
        raise DataError("the data set has no rows.")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} cannot tell which characters a token covers, which placing the labels "
            "takes; load the model's fast tokenizer."
        )
    max_length = _max_length(options, tokenizer, model_limit)
    layout = row_format(rows[0], tokenizer, options.prompt_template)
    drawn = _draw(len(rows), options)
    notes = [layout.note]
    if not layout.writes_special_tokens and tokenizer.eos_token_id is None:
        notes.append("The tokenizer has no end-of-text token: none is appended.")
    if options.samples is not None and options.samples > len(rows):
        notes.append(f"{options.samples} samples asked for, but the data set has {len(rows)} rows: all are taken.")
    encoder, count = _Encoder(tokenizer, max_length), len(drawn) if options.samples is None else options.samples
    found = _encode_rows(rows, drawn[:count], layout, encoder, notes)
    passages = [layout.passage(rows[index], index) for index in drawn[count:]]
    ends = not layout.writes_special_tokens
    further = [encoder(passage, end_of_text=ends)[0] for passage in passages if passage is not None]
    return replace(found, unseen=tuple(sample for sample in further if count_labels(sample["labels"])))


def _encode_rows(rows: Rows, drawn: Sequence[int], layout: RowFormat, encoder: _Encoder, notes: list[str]) -> TextData:
    samples: list[Sample] = []
    kept: list[int] = []
    empty: list[int] = []
    beyond: list[int] = []
    cut = 0
    for index in drawn:
        passage = layout.passage(rows[index], index)
        if passage is None:
            empty.append(index)
            continue
        sample, truncated = encoder(passage, end_of_text=not layout.writes_special_tokens)
        if count_labels(sample["labels"]) == 0:
            (beyond if truncated else empty).append(index)
            continue
        cut += truncated
        samples.append(sample)
        kept.append(index)
    if cut:
        notes.append(f"{cut} of {len(drawn)} samples cut to {encoder.max_length} tokens.")
    if empty:
        notes.append(f"{_count(empty, 'sample')} dropped, with an empty column: {_name_rows(empty)}.")
    if beyond:
        notes.append(
            f"{_count(beyond, 'sample')} dropped, the answer begins after {encoder.max_length} tokens: "
            f"{_name_rows(beyond)}."
        )
    if not samples:
        advice = "Raise max_length." if beyond else "Check the columns and the template."
        raise DataError(f"none of {_count(drawn, 'sample')} keeps a label. {' '.join(notes)} {advice}")
    return TextData(tuple(samples), tuple(kept), len(rows), tuple(notes))


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Any
    max_length: int

    def __call__(self, passage: Passage, *, end_of_text: bool) -> tuple[Sample, bool]:
        """The sample, and whether it was cut."""
        # A chat template writes the special tokens itself.
        encoding = self.tokenizer(
            passage.text,
            add_special_tokens=end_of_text,
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )
        ids: list[int] = list(encoding["input_ids"])
        in_answer = [stop > passage.start and start < passage.end for start, stop in encoding["offset_mapping"]]
        eos = self.tokenizer.eos_token_id
        if end_of_text and eos is not None:
            if ids[-1:] != [eos]:
                ids.append(eos)
                in_answer.append(True)
            in_answer[-1] = True
        labels = [token if wanted else IGNORED for token, wanted in zip(ids, in_answer, strict=True)]
        labels[:1] = [IGNORED]
        sample = {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}
        return sample, len(ids) > self.max_length


def _max_length(options: TextOptions, tokenizer: Any, model_limit: int | None) -> int:
    limits = [limit for limit in (model_limit, getattr(tokenizer, "model_max_length", None)) if limit]
    limit = min(limits, default=None)
    if options.max_length is None:
        return int(min([DEFAULT_MAX_LENGTH, *limits]))
    if limit is not None and options.max_length > limit:
        raise OptionError(f"max_length is {options.max_length}, but the model takes {limit} tokens at most.")
    return options.max_length


def _draw(population: int, options: TextOptions) -> list[int]:
    if options.samples is None:
        return list(range(population))
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = torch.randperm(population, generator=generator)[: options.samples + options.beyond].tolist()
    return order


def count_labels(labels: Sequence[int]) -> int:
    """How many of the labels a loss is taken of."""
    return sum(label != IGNORED for label in labels)


def _count(items: Sequence[int], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _name_rows(rows: Sequence[int]) -> str:
    named = ", ".join(str(row) for row in sorted(rows)[:_ROWS_NAMED])
    more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
    return f"row{'' if len(rows) == 1 else 's'} {named}{more}, counted from 0"


# --- tokens to batches ----------------------------------------------------------------------------------------


def batches(
    samples: Sequence[Mapping[str, Sequence[int]]],
    *,
    pad_token_id: int,
    batch_size: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[dict[str, Tensor]]:
    """Pads samples of similar length together, the longest first so that a lack of memory shows at once.

    Args:
        samples: `input_ids` and `labels` of each.
        pad_token_id: What fills the right; the attention mask hides it and its label is -100.
        batch_size: Samples in a batch; None fills batches up to `tokens_per_batch`.
        tokens_per_batch: Tokens in a batch, padding counted; a longer sample is a batch of its own.

    Returns:
        Batches of `input_ids`, `attention_mask` and `labels`, int64 (samples, tokens).

    Raises:
        OptionError: `batch_size` or `tokens_per_batch` is below 1.
    """
    for name, value in (("batch_size", batch_size), ("tokens_per_batch", tokens_per_batch)):
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1.")
    parts = filled(samples, lambda sample: len(sample["input_ids"]), batch_size, tokens_per_batch)
    return [padded(part, pad_token_id) for part in parts]


def padded(samples: Sequence[Mapping[str, Sequence[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of the samples in their order, filled up on the right as `batches` does.

    Args:
        samples: `input_ids` and `labels` of each, at least one.
        pad_token_id: What fills the right.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 (samples, tokens).
    """
    shape = (len(samples), max(len(sample["input_ids"]) for sample in samples))
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        batch["input_ids"][row, :length] = torch.tensor(sample["input_ids"])
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = torch.tensor(sample["labels"])
    return batch
