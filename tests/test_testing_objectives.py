"""The conformance kit of objectives: all of ours pass it on real models, and mutants fail."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models as tiny
from lora_da_core.interfaces import Objective
from lora_da_core.registry import Registry
from lora_da_core.testing import objective_checks
from lora_da_core.testing.objectives import CHECKS
from lora_da_core.types import Batch, LayerSpec
from test_objectives import CASES
from test_preferences import pairs

REGISTRY = Registry()
SPEC = LayerSpec("layer", "linear", 8, 8, 2, 1.0)


@functools.cache
def subject(name: str) -> dict[str, Any]:
    """A model, a batch, a layer and what the layer sees."""
    if name in ("dpo", "rpo"):
        batch = pairs()
        return {"model": tiny.causal("Llama"), "batch": batch, "spec": SPEC, "tokens": batch["labels"][0].numel()}
    if name == "causal_lm":
        batch = tiny.continued()
        return {"model": tiny.causal("Llama"), "batch": batch, "spec": SPEC, "tokens": batch["input_ids"].shape[1]}
    case = next(each for each in CASES.values() if each.objective == name)
    batch = case.batch()
    if name == "seq2seq":
        spec = LayerSpec("decoder.layer", "linear", 8, 8, 2, 1.0)
        return {"model": case.model(), "batch": batch, "spec": spec, "tokens": batch["labels"].shape[1]}
    tokens = batch["input_ids"].shape[1] if "input_ids" in batch else 5
    return {"model": case.model(), "batch": batch, "spec": SPEC, "tokens": tokens}


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("name", sorted(REGISTRY.names("objective")))
def test_contract(name: str, check: str) -> None:
    dict(objective_checks(REGISTRY.resolve("objective", name), **subject(name)))[check]()


CAUSAL: Any = REGISTRY.resolve("objective", "causal_lm")


class Mean(CAUSAL):  # type: ignore[misc]
    """Losses that hold the whole batch's mean."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = super().losses(model, batch)
        return found + found.mean()


class Cut(CAUSAL):  # type: ignore[misc]
    """Losses without a graph to the parameters."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = super().losses(model, batch)
        return found.detach().requires_grad_() * 1.0


class Total(CAUSAL):  # type: ignore[misc]
    """Counts of the batch in the place of the samples'."""

    def label_counts(self, batch: Batch) -> Tensor:
        found: Tensor = super().label_counts(batch)
        return torch.full_like(found, int(found.sum()))


class Wide(CAUSAL):  # type: ignore[misc]
    """A mask with one token too many."""

    def token_mask(self, *arguments: Any) -> Tensor:
        return torch.nn.functional.pad(super().token_mask(*arguments), (0, 1))


class Sided(CAUSAL):  # type: ignore[misc]
    """A mask that differs between layers, which it does not say."""

    def token_mask(self, batch: Batch, spec: LayerSpec, *arguments: Any) -> Tensor:
        found: Tensor = super().token_mask(batch, spec, *arguments)
        return torch.ones_like(found) if spec.name.startswith("decoder") else found


class Adding(CAUSAL):  # type: ignore[misc]
    """What is missing, as one number for the batch."""

    def complete(self, model: nn.Module, batch: Batch) -> Batch:
        return {**batch, "base": torch.zeros(1)}


class Training(CAUSAL):  # type: ignore[misc]
    """Losses that leave the model in training mode."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        model.train()
        found: Tensor = super().losses(model, batch)
        return found


class Unseeded(CAUSAL):  # type: ignore[misc]
    """Draws that follow the process's generator."""

    def fisher_losses(self, model: nn.Module, batch: Batch, labels: Any, *, generator: torch.Generator) -> Any:
        return super().fisher_losses(model, batch, labels, generator=torch.Generator().manual_seed(torch.seed()))


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (Mean, "losses_are_those_of_each_sample"),
        (Cut, "losses_can_be_differentiated"),
        (Total, "labels_are_counted"),
        (Wide, "tokens_are_masked_sample_by_sample"),
        (Sided, "tokens_are_masked_sample_by_sample"),
        (Adding, "what_is_added_has_one_row_per_sample"),
        (Training, "nothing_else_is_touched"),
        (Unseeded, "drawn_labels_follow_the_generator"),
    ],
)
def test_the_kit_rejects_a_mutant(mutant: type[Objective[Any]], check: str) -> None:
    with torch.random.fork_rng(devices=[]), pytest.raises((AssertionError, RuntimeError)):
        dict(objective_checks(mutant, **subject.__wrapped__("causal_lm")))[check]()
