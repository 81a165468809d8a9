"""The conformance kit of trainer plugins: a tiny model, transformers' Trainer, and checks of all that is asked of them.

Needs no test runner. Under pytest:

    @pytest.mark.parametrize("check", [pytest.param(run, id=name) for name, run in trainer_checks(MyPlugin)])
    def test_contract(check):
        check()
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from lora_da_core.interfaces import TrainerPlugin
from lora_da_core.testing.data import Check, Subject, bitwise, declares_itself, require, undisturbed

STEPS = 8
BROKEN_AT = 5
"""Step whose checkpoint a run is resumed from; no divisor of usual intervals, so it lies amid whatever recurs."""
VOCABULARY = 24
SAME = 1e-5
"""Difference of logits that rounding explains: a product may be split otherwise, a weight be merged."""
STANDARD_DEVIATION = 0.3
"""Of a start's factors: B·A has full rank and matters."""


@dataclass(frozen=True)
class Trained:
    """A model after its training.

    Attributes:
        model: The PeftModel.
        losses: On the training data before and after.
    """

    model: nn.Module
    losses: tuple[float, float]


@dataclass(frozen=True)
class TrainerSubject(Subject):
    """A trainer plugin with one set of options, and the learning rate that it is tried at."""

    learning_rate: float


def trainer_checks(
    cls: type[TrainerPlugin[Any]], *, options: Mapping[str, Any] | None = None, learning_rate: float = 0.05
) -> Iterator[Check]:
    """What a trainer plugin must fulfil.

    Args:
        cls: The class.
        options: Its options; what recurs should recur within `STEPS` steps.
        learning_rate: The trainer's, at which the plugin learns.

    Yields:
        (id, check) one by one; a check takes nothing and raises AssertionError, or what the class raised.
    """
    subject = TrainerSubject(cls, options or {}, learning_rate)
    for check in CHECKS:
        yield check.__name__, partial(check, subject)


def attaching_changes_nothing_yet(subject: TrainerSubject) -> None:
    """The function, the base's weights and the process are as they were; that comes with training."""
    with tempfile.TemporaryDirectory() as directory:
        model = start()
        before, weights = logits(model), base_weights(model)
        trainer = _trainer(subject, model, Path(directory), {})
        undisturbed(lambda: subject.make().attach(trainer))
    _close(logits(model), before, "attach() changed what the model computes")
    _same(base_weights(model), weights, "attach() changed the base's weights")


def training_learns(subject: TrainerSubject) -> None:
    """After a few steps the loss is finite and lower, and factors have changed."""
    found, before = _run(subject), _factors(start())
    require(all(map(math.isfinite, found.losses)), f"losses are {found.losses}")
    require(found.losses[1] < found.losses[0], f"the loss went from {found.losses[0]:.6g} to {found.losses[1]:.6g}")
    after = _factors(found.model)
    moved = any(bitwise(value) != bitwise(before[name]) for name, value in after.items())
    require(moved, "no factor of the adapter has changed")


def the_base_changes_only_where_that_is_said(subject: TrainerSubject) -> None:
    """Without `changes_base` the base's weights stay; with it nothing but adapted layers' weights may change."""
    before, after = base_weights(start()), base_weights(_run(subject).model)
    changed = {name for name, value in before.items() if bitwise(value) != bitwise(after[name])}
    allowed = {name for name in before if ".base_layer." in name} if subject.make().changes_base else set()
    require(changed <= allowed, f"these weights of the base changed: {', '.join(sorted(changed - allowed))}")


def nothing_else_is_trained(subject: TrainerSubject) -> None:
    """Whatever asks for a gradient in the end is a factor of the adapter."""
    model = _run(subject).model
    others = [name for name, value in model.named_parameters() if value.requires_grad and "lora_" not in name]
    require(not others, f"these are no factors and ask for gradients: {', '.join(others)}")


def two_runs_agree(subject: TrainerSubject) -> None:
    """Same data and seed, same bytes on the CPU."""
    first, second = (_factors(_run(subject).model) for _ in range(2))
    _same(second, first, "two runs differ")


def a_resumed_run_ends_where_an_unbroken_one_does(subject: TrainerSubject) -> None:
    """All that a run needs is in its checkpoint: a fresh model and a fresh plugin go on from there."""
    unbroken = _run(subject)
    with tempfile.TemporaryDirectory() as directory:
        saving = {"save_strategy": "steps", "save_steps": BROKEN_AT}
        _run(subject, Path(directory), settings=saving)
        resumed = _run(subject, Path(directory), checkpoint=Path(directory) / f"checkpoint-{BROKEN_AT}")
    _close(logits(resumed.model), logits(unbroken.model), "a resumed run ends elsewhere", 1e-4)


CHECKS: Sequence[Callable[[TrainerSubject], None]] = (
    declares_itself,
    attaching_changes_nothing_yet,
    training_learns,
    the_base_changes_only_where_that_is_said,
    nothing_else_is_trained,
    two_runs_agree,
    a_resumed_run_ends_where_an_unbroken_one_does,
)


# The small problem


def start() -> nn.Module:
    """A random two-layer Llama with an adapter of rank 2 whose B·A has full rank; the same each time."""
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape)
        wrapped: nn.Module = get_peft_model(
            model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
        )
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=STANDARD_DEVIATION)
    return wrapped.eval()


def samples() -> list[dict[str, Tensor]]:
    """Texts that count up in steps of 1 to 4; all tokens are labels."""
    rows = [torch.arange(8) * step + first for first in range(8) for step in range(1, 5)]
    return [{"input_ids": row % VOCABULARY, "labels": row % VOCABULARY} for row in rows]


def logits(model: nn.Module) -> Tensor:
    """What a model says to some of the samples, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=_batch(samples()[::3])["input_ids"]).logits
    return found


def base_weights(model: Any) -> dict[str, Tensor]:
    """Copies of all that is no factor."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" not in name}


def _factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def _loss(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(model(**_batch(samples())).loss)


def _batch(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}


def _trainer(subject: TrainerSubject, model: nn.Module, directory: Path, settings: Mapping[str, Any]) -> Any:
    chosen: dict[str, Any] = {
        "output_dir": str(directory), "max_steps": STEPS, "per_device_train_batch_size": 8, "seed": 0, "use_cpu": True,
        "learning_rate": subject.learning_rate, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True, **settings,
    }  # fmt: skip
    trainer = Trainer(model, TrainingArguments(**chosen), train_dataset=samples(), data_collator=_batch)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _run(
    subject: TrainerSubject,
    directory: Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
) -> Trained:
    with tempfile.TemporaryDirectory() as temporary, torch.random.fork_rng(devices=[]):
        model = start()
        trainer = _trainer(subject, model, directory or Path(temporary), settings or {})
        subject.make().attach(trainer)
        before = _loss(model)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return Trained(model, (before, _loss(model)))


def _close(found: Tensor, expected: Tensor, what: str, tolerance: float = SAME) -> None:
    error = float((found - expected).abs().max())
    require(error <= tolerance * max(1.0, float(expected.abs().max())), f"{what}: logits differ by up to {error:.3g}")


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    changed = [name for name, value in expected.items() if bitwise(value) != bitwise(found[name])]
    require(not changed, f"{what}: {', '.join(changed)}")
