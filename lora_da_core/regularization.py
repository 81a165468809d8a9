"""A penalty in training from the Fisher of other data: its estimation, its gradient, and a trainer's callback."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.blame import blamed
from lora_da_core.config import ComponentChoice
from lora_da_core.errors import OptionError
from lora_da_core.interfaces import LayerFisher, Regularizer
from lora_da_core.pipeline import Pipeline, build_pipeline
from lora_da_core.registry import Registry
from lora_da_core.types import Batch, LoraFactors

logger = logging.getLogger(__name__)

FISHER_DAMPING = 1e-3
"""Damping of the penalty's Fisher: it is only multiplied with, so there is little to guard against."""


class Penalty:
    """A regularizer on one model's adapter.

    Attributes:
        doubts: What the start leaves open, in the regularizer's words.
    """

    def __init__(
        self,
        regularizer: Regularizer[Any],
        parameters: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
        start: Mapping[str, LoraFactors],
        scaling: Mapping[str, float],
        fishers: Mapping[str, LayerFisher],
    ) -> None:
        """Keeps what it is given.

        Args:
            regularizer: The regularizer.
            parameters: A and B in the model, by layer.
            start: A and B that changes are counted from.
            scaling: PEFT's factor on B·A.
            fishers: Of the weights, by layer.
        """
        self._regularizer, self._parameters, self._start = regularizer, parameters, start
        self._scaling, self._fishers = scaling, fishers
        self.doubts = tuple(regularizer.doubts(start))

    def __call__(self) -> Tensor:
        """The penalty now, to be added to a loss."""
        now = {name: LoraFactors(a, b) for name, (a, b) in self._parameters.items()}
        with blamed(f"regularizer {self._regularizer.name!r}"):
            return self._regularizer.penalty(now, self._start, self._scaling, self._fishers)

    def add_gradients(self) -> float:
        """Adds the penalty's gradient to the factors', for loops that have run their backward pass already.

        Returns:
            The penalty.
        """
        trained = [part for pair in self._parameters.values() for part in pair if part.requires_grad]
        with torch.enable_grad():
            value = self()
            gradients = torch.autograd.grad(value, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return float(value.detach())

    def start_state_dict(self) -> dict[str, Tensor]:
        """Where changes are counted from, under PEFT's key names: to be saved with a checkpoint and given back."""
        from lora_da_core import adapter

        return adapter.state_dict(self._start)


def penalty_of(
    model: nn.Module,
    regularizer: ComponentChoice,
    batches: Iterable[Batch],
    *,
    pipeline: Pipeline | None = None,
    damping: float = FISHER_DAMPING,
    start: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    cache_dir: Path | str | None = None,
) -> Penalty:
    """Estimates the Fisher of what must not be forgotten, and makes a penalty of it.

    Args:
        model: A PeftModel with a LoRA adapter, initialised.
        regularizer: Name, or (name, options).
        batches: The source data, as `Pipeline.run` takes them.
        pipeline: Its estimator gives the Fisher, of the base's weights; None builds the default one.
        damping: Of this Fisher, in place of the pipeline's, which suits an initialisation.
        start: Factors that changes are counted from, as `start_state_dict` gives them; None takes the present ones.
        adapter_name: The adapter.
        cache_dir: As `Pipeline.run` takes it: a Fisher that was stored is not estimated again.

    Returns:
        The penalty.

    Raises:
        OptionError: The start has other layers than the adapter, or a layer is not linear.
        LoraDAError: As `Pipeline.estimate`.
    """
    from lora_da_core import adapter

    made: Regularizer[Any] = Registry().create("regularizer", regularizer)
    chosen = pipeline or build_pipeline()
    lora = adapter.config_of(model, adapter_name)
    specs = adapter.resolve_targets(model, lora, adapter_name, chosen.config.unsupported).specs
    other = [spec.name for spec in specs if spec.kind not in ("linear", "conv1d")]
    if other:
        raise OptionError(
            f"a penalty covers linear layers; {other[0]} is none: leave it out (exclude_modules, target_parameters)."
        )
    estimates = chosen.estimate(model, batches, adapter_name=adapter_name, cache_dir=cache_dir)
    scaling = {spec.name: spec.scaling for spec in estimates.task.specs}
    fishers = chosen.fishers(estimates, damping=damping)
    return penalty_from(model, made, scaling, fishers, start=start, adapter_name=adapter_name)


def penalty_from(
    model: nn.Module,
    regularizer: Regularizer[Any],
    scaling: Mapping[str, float],
    fishers: Mapping[str, LayerFisher],
    *,
    start: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
) -> Penalty:
    """A penalty from Fishers that are there already; `penalty_of` estimates them.

    Args:
        model: A PeftModel with a LoRA adapter, initialised.
        regularizer: The regularizer.
        scaling: PEFT's factor on B·A, by layer.
        fishers: Of the base's weights, for the same layers.
        start: As `penalty_of` takes it.
        adapter_name: The adapter.

    Returns:
        The penalty.

    Raises:
        OptionError: The start has other layers than the adapter.
    """
    from lora_da_core import adapter

    parameters = adapter.factor_pairs(model, adapter_name)
    now = adapter.state_dict({name: LoraFactors(*parameters[name]) for name in scaling})
    if start is not None and set(start) != set(now):
        raise OptionError("start holds the factors of other layers than the adapter has; give start_state_dict()'s.")
    penalty = Penalty(
        regularizer,
        {name: parameters[name] for name in scaling},
        {name: adapter.pair_in(now if start is None else start, name, like=parameters[name]) for name in scaling},
        scaling,
        fishers,
    )
    for sentence in penalty.doubts:
        logger.warning("%s", sentence)
    return penalty


def regularize_training(trainer: Any, penalty: Penalty) -> None:
    """Has a trainer add a penalty's gradient before each step of its optimizer, after gradients were accumulated.

    The gradient of a step is then that of the mean loss plus the penalty's, whatever the accumulation; clipping, which
    comes before, concerns the loss alone. Losses that the trainer logs are without the penalty.

    Args:
        trainer: transformers' Trainer, TRL's, or another with its callbacks.
        penalty: From `penalty_of`, for the trainer's model.

    Raises:
        OptionError: The trainer scales losses for float16.
    """
    from transformers import TrainerCallback

    if getattr(trainer.args, "fp16", False):
        raise OptionError("fp16 scales gradients by a factor that a callback does not know; train in bf16 or float32.")

    class AddPenalty(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            penalty.add_gradients()

    trainer.add_callback(AddPenalty())
