"""Initialisation in one call: the functions that mirror PEFT's own for EVA, on top of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lora_da_core.blame import shortage_named
from lora_da_core.errors import AdapterError, OptionError
from lora_da_core.pipeline import Pipeline, build_pipeline
from lora_da_core.types import Batch, LoraDAResult

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


@shortage_named("the adapter was made", "Free memory, or give a smaller rank.")
def get_lora_da_model(
    model: nn.Module,
    peft_config: LoraConfig,
    batches: Iterable[Batch] | None = None,
    *,
    pipeline: Pipeline | None = None,
    result: LoraDAResult | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Wraps the model with an initialised adapter: runs the pipeline, or takes the result of a run.

    Args:
        model: A base model.
        peft_config: The LoRA configuration.
        batches: As `Pipeline.run` takes them; not with `result`.
        pipeline: None builds the default one; not with `result`, which has its pipeline's settings.
        result: What `Pipeline.run` or `Pipeline.solve` returned for this model and configuration.
        adapter_name: Name of the adapter.

    Returns:
        A stock PeftModel; with what the configuration's `offset` and `frozen` ask for.

    Raises:
        OptionError: Not exactly one of `batches` and `result` is given, a pipeline beside a result, or a PeftModel.
        AdapterError: The result is of another base, or of other layers than the configuration adapts.
    """
    from lora_da_core import adapter

    if (batches is None) == (result is None):
        raise OptionError("give either batches or result.")
    if result is not None and pipeline is not None:
        raise OptionError("a result has the settings of the pipeline that made it; leave out pipeline.")
    if adapter.is_peft_model(model):
        raise OptionError("the model is a PeftModel already; use initialize_lora_da_weights.")
    adapter.check_adapter_name(adapter_name)
    if result is None:
        assert batches is not None
        result = (pipeline or build_pipeline()).run(model, batches, peft_config)
    else:
        _check_base(model, result)
    fitted, start = get_lora_da_config(peft_config, result), result.report.config
    return adapter.apply(model, fitted, result.factors, adapter_name, offset=start["offset"], frozen=start["frozen"])


def _check_base(model: nn.Module, result: LoraDAResult) -> None:
    """Refuses a model whose weights are not those that the result was computed from."""
    from lora_da_core import adapter

    if adapter.fingerprint(model) == result.report.base:
        return
    here = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    foreign = [name for name in result.factors if name not in here]
    if foreign:
        reason = f"{len(foreign)} of its {len(result.factors)} layers are not in this model, the first is {foreign[0]}"
    else:
        reason = "its layers are in this model, but the base's weights differ in shape, dtype or value"
    raise AdapterError(
        f"the result was computed on another base: {reason}. Give the model that the run saw, as it was, or run on "
        "this one."
    )


def get_lora_da_config(peft_config: LoraConfig, result: LoraDAResult) -> LoraConfig:
    """The LoRA configuration that a result's factors fit: with the ranks that an allocator gave, as patterns.

    PEFT's factor on B·A stays what it was in every layer: α/r, or α/√r with rsLoRA, of the configured rank.

    Args:
        peft_config: The configuration of the run.
        result: The run's result.

    Returns:
        A copy; an equal one where no allocator was asked.
    """
    from lora_da_core import adapter

    return adapter.allocated_config(peft_config, result.report.allocation)


def get_lora_da_state_dict(
    model: nn.Module,
    batches: Iterable[Batch],
    peft_config: LoraConfig | None = None,
    *,
    pipeline: Pipeline | None = None,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """Runs the pipeline and returns the factors under PEFT's key names, to be given to `initialize_lora_da_weights`.

    Args:
        model: A base model, or a PeftModel that carries the adapter.
        batches: As `Pipeline.run` takes them.
        peft_config: The LoRA configuration; None takes the PeftModel's own.
        pipeline: None builds the default one.
        adapter_name: The adapter, where the model carries several.

    Returns:
        `base_model.model.<module>.lora_A.weight` and `…lora_B.weight`.

    Raises:
        OptionError: The pipeline has an allocator.
    """
    from lora_da_core import adapter

    chosen = pipeline or build_pipeline()
    if chosen.components.allocator is not None:
        raise OptionError(
            "a state dict does not hold the ranks' scaling that an allocator gives; use get_lora_da_model, or "
            "Pipeline.run and get_lora_da_config."
        )
    result = chosen.run(model, batches, peft_config, adapter_name=adapter_name)
    return adapter.state_dict(result.factors)


@shortage_named("the adapter was written", "Free memory, or give a smaller rank.")
def initialize_lora_da_weights(
    peft_model: PeftModel,
    batches: Iterable[Batch] | None = None,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    pipeline: Pipeline | None = None,
) -> None:
    """Initialises an adapter of a PeftModel in place, from data or from a state dict computed before.

    Args:
        peft_model: A PeftModel.
        batches: As `Pipeline.run` takes them; not with `state_dict`.
        state_dict: As `get_lora_da_state_dict` returns it.
        adapter_name: The adapter.
        pipeline: None builds the default one.

    Raises:
        OptionError: Not exactly one of `batches` and `state_dict` is given.
    """
    from lora_da_core import adapter

    if (batches is None) == (state_dict is None):
        raise OptionError("give either batches or state_dict.")
    if state_dict is not None or batches is None:
        adapter.write(peft_model, state_dict or {}, adapter_name)
        return
    chosen = pipeline or build_pipeline()
    result = chosen.run(peft_model, batches, adapter_name=adapter_name)
    adapter.write(peft_model, adapter.state_dict(result.factors), adapter_name)
    start = chosen.config
    adapter.settle(peft_model, result.factors, adapter_name, offset=start.offset, frozen=start.frozen)
