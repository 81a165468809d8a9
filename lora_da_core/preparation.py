"""What a run is to estimate, from model, data and settings: all that is looked up and checked before work starts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from lora_da_core.agreement import agree
from lora_da_core.allocation import Allocation
from lora_da_core.batches import divided, first_samples, label_counts
from lora_da_core.capture import CaptureTask
from lora_da_core.components import Setup
from lora_da_core.errors import DataError, OptionError
from lora_da_core.estimation import Job, complete, sample_notes
from lora_da_core.model_state import check_model, quantization_notes
from lora_da_core.repeatability import order_notes
from lora_da_core.sizing import SEARCH_SAMPLES
from lora_da_core.types import Batch, LayerSpec
from lora_da_core.world import World

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)


def job_of(
    setup: Setup,
    model: nn.Module,
    batches: Iterable[Batch],
    peft_config: LoraConfig | None,
    adapter_name: str,
    world: World,
) -> Job:
    """What a run is to estimate, checked: every fault that shows before work is told here.

    Args:
        setup: The pipeline's.
        model: As `Pipeline.run` takes it.
        batches: As `Pipeline.run` takes them.
        peft_config: As `Pipeline.run` takes it.
        adapter_name: As `Pipeline.run` takes it.
        world: The processes that share the run.

    Returns:
        The job; nothing of its data has been read by the model, but for what its objective completes.

    Raises:
        DataError: The data are no batches, or none with labels.
    """
    from lora_da_core import adapter

    config, components = setup.config, setup.components
    check_model(model)
    if not isinstance(batches, Iterable):
        raise DataError(f"the data is a {type(batches).__name__}; give an iterable of batches, such as a DataLoader.")
    lora = adapter.chosen_config(model, peft_config, adapter_name)
    targets = adapter.resolve_targets(model, lora, adapter_name, config.unsupported)
    components.check_layers(targets.specs)
    check_ranks(setup, model, targets.specs)
    adapter.check_start(model, targets.modules, lora, config.offset)
    taken, unseen = first_samples(batches, config.samples, SEARCH_SAMPLES)
    counts = label_counts(components.objective, taken)
    task = CaptureTask(
        model=adapter.base_of(model),
        modules=targets.modules,
        specs=targets.specs,
        objective=components.objective,
        estimator=components.estimator,
        gradient=components.gradient,
        token_mask=config.token_mask,
        base_only=partial(adapter.adapters_disabled, model),
        origins=components.origins(setup.registry),
        world=world,
    )
    if world.size > 1:
        agree(task, [*taken, *unseen], components, config)
    taken, unseen = complete(task, taken), complete(task, unseen)
    first, *later = divided(taken, config.rounds)
    notes = (
        *targets.notes,
        *quantization_notes(targets.modules),
        *sample_notes(counts),
        *order_notes(batches, taken),
    )
    for note in notes:
        logger.warning("%s", note)
    return Job(task, first, notes, later, unseen)


def check_ranks(setup: Setup, model: nn.Module, specs: Sequence[LayerSpec]) -> None:
    """Refuses what no allocation can serve, before any work.

    Args:
        setup: The pipeline's.
        model: As `Pipeline.run` takes it.
        specs: The layers at their ranks.

    Raises:
        OptionError: An allocator or a pairing does not go with the ranks or the model.
    """
    from lora_da_core import adapter

    config, allocator = setup.config, setup.components.allocator
    if config.pairing != "same":
        if allocator is not None:
            raise OptionError(f"allocator {allocator.name!r} and pairing={config.pairing!r} do not go together.")
        for spec in specs:
            if 2 * spec.rank > min(spec.in_features, spec.out_features):
                raise OptionError(
                    f"layer {spec.name} is {spec.out_features} × {spec.in_features}: pairing="
                    f"{config.pairing!r} takes 2·{spec.rank} of its directions; choose a smaller rank."
                )
    if allocator is None:
        return
    if adapter.is_peft_model(model):
        raise OptionError(
            f"allocator {allocator.name!r} changes ranks, which an adapter that is there already has fixed; give "
            "the base model to get_lora_da_model."
        )
    Allocation(setup.registry, allocator, specs)
