"""An objective from a plain function: `objective=callable(model, batch) -> per-sample losses`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.errors import OptionError
from lora_da_core.interfaces import API_VERSION, NoOptions, Objective
from lora_da_core.types import Batch, LayerSpec, TokenMask

LossFunction = Callable[[nn.Module, Batch], Tensor]
"""From a model and a batch on its device to per-sample losses (samples,), each with its graph."""

_IGNORED = -100


class FunctionObjective(Objective[NoOptions]):
    """A function's losses; `objective_of` makes one.

    Labels are what the batch's `labels` hold besides −100 and NaN. Nothing is known of which token predicts which,
    so every token that `attention_mask` keeps counts for the Fisher, and all of a layer's whose tokens it does not fit.
    """

    module: str
    """Where the function is defined, for error messages."""
    _function: LossFunction

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._function(model, batch)

    def label_counts(self, batch: Batch) -> Tensor:
        labels = batch["labels"].reshape(len(batch["labels"]), -1)
        counts: Tensor = (~labels.isnan() if labels.is_floating_point() else labels != _IGNORED).sum(1)
        return counts

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        shape, mask = (len(batch["labels"]), tokens), batch.get("attention_mask")
        if isinstance(mask, Tensor) and tuple(mask.shape) == shape:
            return mask.bool()
        return torch.ones(shape, dtype=torch.bool)


def objective_of(function: LossFunction) -> FunctionObjective:
    """An objective that carries the function's qualified name into reports.

    Args:
        function: Takes the model and a batch, returns per-sample losses (samples,).

    Returns:
        The objective.

    Raises:
        OptionError: It is a class, or cannot be called with a model and a batch.
    """
    if isinstance(function, type):
        raise OptionError(
            f"objective is the class {function.__qualname__}; give a function of model and batch, or the name under "
            "which a plugin offers the class."
        )
    named: Any = function
    while isinstance(named, functools.partial):
        named = named.func
    # An object with __call__ has no name of its own.
    named = named if hasattr(named, "__qualname__") else type(named)
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"objective {named.__qualname__!r} cannot be called with a model and a batch: {error}."
        ) from error
    # `name` belongs to the class, so every function gets one.
    body = {"name": named.__qualname__, "api_version": API_VERSION, "module": named.__module__}
    cls = type("GivenObjective", (FunctionObjective,), {**body, "_function": staticmethod(function)})
    made: FunctionObjective = cls(NoOptions())
    return made
