"""Losses of a changed model, summed and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lora_da_core.errors import ModelError
from lora_da_core.interfaces import LossProbe
from lora_da_core.operators import LinearMap


def sum_of_losses(probe: LossProbe, changes: Mapping[str, LinearMap], *, estimator: str, option: str) -> float:
    """Σ_n ℓ_n of the model with changes.

    Args:
        probe: Evaluates the loss.
        changes: By layer.
        estimator: Who asks.
        option: Its option that says how large changes are.

    Returns:
        The sum.

    Raises:
        ModelError: It is not finite.
    """
    total = float(probe.losses(changes).double().sum())
    if not math.isfinite(total):
        where = (
            f"with its weights changed; give a smaller {option}" if changes else "before any change; look at the data"
        )
        raise ModelError(f"{estimator} gradient: the loss is not finite {where}.")
    return total
