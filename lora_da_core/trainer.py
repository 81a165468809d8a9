"""Initialises the adapter of a trainer that is about to train, from the trainer's own data and collator."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sized
from dataclasses import replace
from typing import Any

import torch

from lora_da_core.batches import first_samples, to_device
from lora_da_core.config import ComponentChoice
from lora_da_core.distributed import joined
from lora_da_core.errors import OptionError
from lora_da_core.interfaces import TrainerPlugin
from lora_da_core.model_state import random_states_kept
from lora_da_core.pipeline import Pipeline, build_pipeline
from lora_da_core.preferences import preference_batches
from lora_da_core.registry import Registry
from lora_da_core.sizing import SEARCH_SAMPLES
from lora_da_core.types import Batch, RunReport
from lora_da_core.world import ALONE, World

SAMPLES = 64
"""Samples that are read where neither the call nor the pipeline says how many."""


def init_before_training(
    trainer: Any, *, pipeline: Pipeline | None = None, samples: int | None = None, adapter_name: str = "default"
) -> RunReport:
    """Initialises a trainer's adapter in place, to be called between making the trainer and `trainer.train()`.

    Works with transformers' Trainer, TRL's SFTTrainer and DPOTrainer, and whatever has their `model`,
    `get_train_dataloader()` and `state`. The trainer then sees the same batches as without it: random
    states are put back. A data set that can be read only once loses the samples that are read here. Where several
    processes train, all call this, share the work and get the same start.

    Args:
        trainer: A trainer whose model is a PeftModel with a LoRA adapter.
        pipeline: None builds the default one, with the objective `dpo` and the trainer's β where the trainer collates
            preferences as TRL's DPOTrainer does. The objective of a given one must suit the trainer's loss.
        samples: Samples to read; None takes the pipeline's `samples`, or 64.
        adapter_name: The adapter.

    Returns:
        What was done.

    Raises:
        OptionError: Training has begun, or the trainer's preference loss is not the one that `dpo` is.
        TargetError: The model is no PeftModel.
        LoraDAError: As `Pipeline.run`.
    """
    from lora_da_core import adapter

    if trainer.state.global_step:
        raise OptionError(
            f"the trainer is at step {trainer.state.global_step}: initialise before train(), not when resuming."
        )
    accelerator = getattr(trainer, "accelerator", None)
    model = trainer.model if accelerator is None else accelerator.unwrap_model(trainer.model)
    preferences = _collates_preferences(trainer)
    chosen = pipeline or (_preference_pipeline(trainer) if preferences else build_pipeline())
    wanted = samples or chosen.config.samples or SAMPLES
    data = getattr(trainer, "train_dataset", None)
    population = chosen.config.population or (len(data) if isinstance(data, Sized) else None)
    config = replace(chosen.config, samples=wanted, population=population)
    adapter.config_of(model, adapter_name)
    shared = joined(config.process_timeout) if config.distributed == "auto" else contextlib.nullcontext(ALONE)
    with random_states_kept(), shared as world:
        loader = trainer.get_train_dataloader()
        # Read once: a trainer's order is its own seed's, and every further batch costs its collator.
        batches = iter(_of_all(world, preference_batches(loader) if preferences else loader, wanted))
        run = Pipeline(chosen.registry, chosen.components, config).run
        result = run(model, batches, adapter_name=adapter_name, world=world)
    adapter.write(model, adapter.state_dict(result.factors), adapter_name)
    adapter.settle(model, result.factors, adapter_name, offset=config.offset, frozen=config.frozen)
    return result.report


def _of_all(world: World, loader: Iterable[Batch], samples: int) -> Iterable[Batch]:
    """What the trainer would read first, all processes together: it hands its batches out in turns."""
    if world.size == 1:
        return loader
    mine, _ = first_samples(loader, -(-(samples + SEARCH_SAMPLES) // world.size))
    told = world.gather("the trainer's batches", [to_device(batch, torch.device("cpu")) for batch in mine])
    return [batch for turn in itertools.zip_longest(*told) for batch in turn if batch is not None]


def _collates_preferences(trainer: Any) -> bool:
    """Whether the trainer's batches are those of TRL's collator for preferences; TRL itself is not imported."""
    collator = type(getattr(trainer, "data_collator", None))
    return any(cls.__name__ == "DataCollatorForPreference" for cls in collator.__mro__)


def _preference_pipeline(trainer: Any) -> Pipeline:
    kinds = trainer.args.loss_type
    if kinds not in ("sigmoid", ["sigmoid"]):
        raise OptionError(
            f"the trainer's loss_type is {kinds}, the objective 'dpo' is the sigmoid loss alone; give a pipeline with "
            "the objective to start from, such as build_pipeline(objective='dpo') or 'rpo'."
        )
    return build_pipeline(objective=("dpo", {"beta": trainer.args.beta}))


def trainer_plugin(choice: ComponentChoice) -> TrainerPlugin[Any]:
    """A trainer plugin by name; its `attach(trainer)` is to be called between making the trainer and `trainer.train()`.

    Args:
        choice: A name such as `"riemannion"`, or (name, options).

    Returns:
        The plugin.
    """
    plugin: TrainerPlugin[Any] = Registry().create("trainer", choice)
    return plugin
