"""What all cells of a grid read: the model, loaded once and left as it is, and the data in its parts."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import nn

from lora_da_core.ablation.axes import Choice, choice_of
from lora_da_core.ablation.finetune import TrainingData
from lora_da_core.ablation.grid import Grid
from lora_da_core.ablation.pairs import (
    Pair,
    PairData,
    check_pairs,
    chosen_template,
    completed,
    encode_pairs,
    pair_batches,
)
from lora_da_core.ablation.results import data_fingerprint, versions
from lora_da_core.ablation.settings import RunSettings
from lora_da_core.ablation.stacked import check_stackable
from lora_da_core.batches import batch_tokens_on
from lora_da_core.cli_options import module_names
from lora_da_core.data import Rows, TextData, TextOptions, batches, encode_text, load_rows
from lora_da_core.errors import DataError
from lora_da_core.interfaces import Objective
from lora_da_core.models import load_model
from lora_da_core.registry import Registry
from lora_da_core.sizing import SEARCH_SAMPLES
from lora_da_core.types import Batch

if TYPE_CHECKING:
    from peft import LoraConfig

HELD_OUT_SEED: Final = 0
"""Seed of the draw of held-out rows, which every seed of the grid shares."""

Encoded = TypeVar("Encoded")


@dataclass(frozen=True)
class Part:
    """Some rows of a data set, by position."""

    rows: Rows
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self.rows[self.positions[index]]


@dataclass(frozen=True)
class Draw:
    """The samples of one seed, as an initialisation reads them; what follows them is for a line search alone."""

    batches: Sequence[Batch]
    samples: int
    tokens: int
    notes: tuple[str, ...]
    unseen: Sequence[Batch]


class Workspace:
    """The loaded model and data of a grid.

    Args:
        run: What to load.
        registry: The installed plugins.
    """

    def __init__(self, run: RunSettings, registry: Registry) -> None:
        self.run, self.registry = run, registry
        self.rows = load_rows(run.data, split=run.split)
        self.template = chosen_template(self.rows, run.prompt_template)
        self.objective: Objective[Any] | None = None
        if run.objective is not None:
            self.objective = registry.create("objective", choice_of(registry, "objective", run.objective))
            if self.objective.takes_pairs:
                check_pairs(self.rows, self.template)
        self.pool, self.kept_out = _parts(self.rows, 0 if run.finetune is None else run.finetune.held_out)
        if run.finetune is not None and run.finetune.validation:
            self.pool, self.kept_out = _parts(self.pool, run.finetune.validation)
        self.source_rows = None if run.source is None else load_rows(run.source.data, split=run.source.split)
        self.loaded = load_model(run.model, device=run.device, dtype=run.dtype, trust_remote_code=run.trust_remote_code)
        # Nothing but adapters is trained, here or in a copy.
        self.loaded.model.requires_grad_(False)
        if run.finetune is not None and run.finetune.together > 1:
            self._check_stackable()
        self._draws: dict[Any, Draw] = {}
        self._training: dict[int, TrainingData] = {}
        self._held_out: list[Batch] = []
        self._source_held_out: list[Batch] = []

    def _check_stackable(self) -> None:
        from lora_da_core import adapter

        check_stackable(adapter.resolve_targets(self.model, self.lora(1)).specs)

    @property
    def model(self) -> nn.Module:
        """The base model; whoever wraps it must unwrap it, whoever changes it must copy it."""
        return self.loaded.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def population(self) -> int:
        """N: rows that may be trained on."""
        return len(self.pool)

    def entry(self, grid: Grid) -> dict[str, Any]:
        """What `run.json` says.

        Args:
            grid: The grid.
        """
        from lora_da_core import adapter

        run = self.run
        plugins = {(record.distribution, record.version) for record in self.registry.records()}
        return {
            "versions": versions(),
            "plugins": [" ".join(plugin) for plugin in sorted(plugins)],
            "machine": {
                "platform": platform.platform(),
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
            },
            "model": {
                "source": run.model,
                "dtype": run.dtype,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                "fingerprint": adapter.fingerprint(self.model),
            },
            "data": {
                "source": run.data,
                "split": run.split,
                "rows": len(self.rows),
                "held_out": len(self.kept_out),
                "fingerprint": data_fingerprint(run.data, self.rows),
            },
            **self._source_entry(),
            "seeds": list(run.seeds),
            "run": asdict(run),
            "cells": [{"cell": cell.id, **cell.settings()} for cell in grid.cells],
        }

    def _source_entry(self) -> dict[str, Any]:
        source, rows = self.run.source, self.source_rows
        if source is None or rows is None:
            return {}
        found = {"source": source.data, "split": source.split, "rows": len(rows), "held_out": source.held_out}
        return {"source": {**found, "fingerprint": data_fingerprint(source.data, rows)}}

    def draw(self, samples: int, seed: int, objective: Choice | None = None) -> Draw:
        """The samples of one seed; the last draw is kept.

        Args:
            samples: How many rows.
            seed: Of the draw.
            objective: What they are for; None reads texts.

        Returns:
            The batches.
        """
        pairs = objective is not None and self.registry.create("objective", objective).takes_pairs
        key = (samples, seed, pairs)
        if key not in self._draws:
            encode: Callable[..., TextData | PairData] = encode_pairs if pairs else encode_text
            found = self._encoded(encode, self.pool, self.template, samples, seed, SEARCH_SAMPLES)
            made, unseen = (self._batched(part, self.run.batch_size) for part in (found.samples, found.unseen))
            notes = (*self.loaded.notes, *found.notes)
            self._draws = {key: Draw(made, len(found.samples), found.tokens, notes, unseen)}
        return self._draws[key]

    def training(self, seed: int) -> TrainingData:
        """Training samples in a seed's order, and the held-out batches; the last seed's are kept.

        Args:
            seed: Of the order.

        Returns:
            The data of a fine-tune.
        """
        tune = self.run.finetune
        assert tune is not None
        if not self._held_out:
            kept_out = self._to_train(self.kept_out, None, HELD_OUT_SEED)
            self._held_out = self._batched(kept_out, None)
            if self.run.source is not None:
                self._source_held_out = self._batched(self._of_source(held_out=True).samples, None)
        if seed not in self._training:
            samples = self._to_train(self.pool, min(len(self.pool), tune.steps * tune.batch_size), seed)
            padding = self.loaded.tokenizer.pad_token_id
            self._training = {
                seed: TrainingData(samples, self._held_out, padding, seed, self._source_held_out, self.objective)
            }
        return self._training[seed]

    def _to_train(self, rows: Rows, samples: int | None, seed: int) -> Sequence[Any]:
        """Texts, or pairs, each with what the objective asks of the base: to be asked while it carries no adapter."""
        if self.objective is None:
            return self._encoded(encode_text, rows, self.template, samples, seed).samples
        found = self._encoded(encode_pairs, rows, self.template, samples, seed)
        return completed(found.samples, self.objective, self.model, self.loaded.tokenizer.pad_token_id)

    def source(self, seed: int) -> Sequence[Batch]:
        """The source's samples that one seed's Fisher of a regularizer is estimated from.

        Args:
            seed: Of the draw.

        Returns:
            The batches; none of their rows is held out.
        """
        return self._batched(self._of_source(held_out=False, seed=seed).samples, self.run.batch_size)

    def _of_source(self, *, held_out: bool, seed: int = HELD_OUT_SEED) -> TextData:
        source = self.run.source
        assert source is not None and self.source_rows is not None
        pool, kept_out = _parts(self.source_rows, source.held_out)
        rows, samples = (kept_out, None) if held_out else (pool, source.samples)
        return self._encoded(encode_text, rows, source.prompt_template, samples, seed)

    def lora(self, rank: int) -> LoraConfig:
        """The LoRA configuration of a rank."""
        from lora_da_core import adapter

        run = self.run
        return adapter.lora_config(
            rank=rank,
            lora_alpha=run.lora_alpha,
            use_rslora=run.use_rslora,
            target_modules=_modules(run.target_modules),
            exclude_modules=None if run.exclude_modules is None else _modules(run.exclude_modules),
            task_type="CAUSAL_LM",
            base_model_name=run.model,
        )

    def _batched(self, samples: Sequence[Any], size: int | None) -> list[Batch]:
        """Batches of texts, or of pairs; without a size they are filled up."""
        padding, tokens = self.loaded.tokenizer.pad_token_id, batch_tokens_on(self.device)
        if samples and isinstance(samples[0], Pair):
            return [*pair_batches(samples, padding, size, tokens)]
        return [*batches(samples, pad_token_id=padding, batch_size=size, tokens_per_batch=tokens)]

    def _encoded(
        self,
        encode: Callable[..., Encoded],
        rows: Rows,
        template: str | None,
        samples: int | None,
        seed: int,
        beyond: int = 0,
    ) -> Encoded:
        options = TextOptions(template, self.run.max_length, samples, seed, beyond)
        return encode(rows, self.loaded.tokenizer, options, model_limit=self.loaded.max_positions)


def _modules(names: str | Sequence[str]) -> str | list[str]:
    return module_names(names) if isinstance(names, str) else list(names)


def _parts(rows: Rows, held_out: int) -> tuple[Rows, Rows]:
    if held_out >= len(rows):
        raise DataError(f"held_out is {held_out}, but the data set has {len(rows)} rows; keep fewer of them out.")
    if held_out == 0:
        return rows, Part(rows, ())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(HELD_OUT_SEED)).tolist()
    return Part(rows, sorted(order[held_out:])), Part(rows, sorted(order[:held_out]))
