"""What the optimizers of LoRA's pairs share: their groups, a state in float64, and a step length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_da_trainers._pairs import Pair


class PairOptimizer(torch.optim.Optimizer):
    """One group for each pair: B, A and their scaling. Its state stays in its own dtype when it is loaded."""

    def __init__(self, pairs: Mapping[str, Pair], **defaults: Any) -> None:
        """Makes the groups.

        Args:
            pairs: The layers.
            **defaults: Settings of every group.
        """
        super().__init__(
            [{"params": [pair.B, pair.A], "scaling": pair.scaling} for pair in pairs.values()], dict(defaults)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state over; torch would cast its float64 to the parameters' dtype.

        Args:
            state_dict: As `state_dict` gives it.
        """
        kept = {key: dict(state) for key, state in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, parameter in enumerate(parameters):
            for name, value in kept.get(place, {}).items():
                moved = value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                self.state[parameter][name] = moved


def check_rate(lr: float | None) -> None:
    """Refuses a step length that is neither above 0 nor None.

    Args:
        lr: The option.

    Raises:
        ValueError: It is out of range.
    """
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(f"lr is {lr!r}; it must be above 0, or None")


def rate_of(trainer: Any, lr: float | None) -> float:
    """The step length: the option, or the trainer's learning rate where it is None."""
    rate: float = trainer.args.learning_rate if lr is None else lr
    return rate
