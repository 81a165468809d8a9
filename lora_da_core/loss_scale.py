"""How much to scale a loss by, so that float16 holds its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

TARGET = 2.0**8
"""Where the largest gradient is put: a factor 2⁸ below what float16 holds, since other batches may have larger ones."""

FIRST, STEP, TRIES = 2.0**10, 2.0**5, 12
"""The first scale tried, the factor to the next, and how many are."""

ROOM = 2.0**3
"""Factor left below a scale at which a gradient that is not measured, such as that of logits, overflows."""


def find_loss_scale(largest_gradient: Callable[[float], float]) -> float:
    """A power of two by which to multiply a loss.

    Args:
        largest_gradient: The largest |g| that arises with a scale; not finite where anything overflows, 0 where all
            vanish.

    Returns:
        The scale that puts the largest gradient between half of `TARGET` and `TARGET`, or a smaller one where that
        overflows; 1 where none is found.

    >>> find_loss_scale(lambda scale: scale * 2.0**-20) == 2.0**28
    True
    >>> find_loss_scale(lambda scale: math.inf if scale > 2.0**12 else scale * 2.0**-20) == 2.0**5
    True
    >>> find_loss_scale(lambda scale: 0.0)
    1.0
    """
    scale = FIRST
    for _ in range(TRIES):
        found = largest_gradient(scale)
        if math.isfinite(found) and found > 0:
            return _confirmed(largest_gradient, scale * 2.0 ** math.floor(math.log2(TARGET / found)))
        scale = scale * STEP if found == 0 else scale / STEP
    return 1.0


def _confirmed(largest_gradient: Callable[[float], float], scale: float) -> float:
    overflowed = False
    while scale > 1 and not math.isfinite(largest_gradient(scale)):
        scale, overflowed = scale / STEP, True
    return scale / ROOM if overflowed else scale
