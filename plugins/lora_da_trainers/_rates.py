"""The step length of an optimiser that may follow its trainer's."""

from __future__ import annotations

from typing import Any


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
