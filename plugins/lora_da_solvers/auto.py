"""What `solver="auto"` takes for a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_da_core import hookimpl
from lora_da_core.interfaces import Solver

DENSE_SIZE = {"cpu": 512, "cuda": 3072}
"""Largest order that is always solved densely, by device type; other devices as the CPU."""
DENSE_RANKS = 24
"""Orders up to this many times the rank are solved densely too."""

LARGEST_DENSE = 30_000
"""Largest order that is ever formed, 6.7 GiB of float64: of an embedding the order is the size of the vocabulary."""

DENSE = ("eigh",)
LARGE = ("lanczos", "davidson", "eigh")
"""Preferences, best first."""


@hookimpl(trylast=True)
def lora_da_choose_solver(
    size: int, rank: int, device_type: str, available: Mapping[str, type[Solver[Any]]]
) -> str | None:
    """Dense `eigh` for small orders; above, the first available of `lanczos`, `davidson` and, up to 30,000, `eigh`.

    A solver that did not converge is no longer available, so a top-heavy Ω, on which Lanczos gives up, goes to
    Davidson, which has V's preconditioner, and at last to the dense solver.

    Dense up to order 512 on a CPU and 3072 on a CUDA device, and up to 24 times the rank. Measured in float64 on
    −ΔΔᵀ + cV of K-FAC with decaying spectra, milliseconds for `eigh` and `lanczos`. One CPU core, rank 8: order
    256: 5, 7; 512: 27, 18; 1024: 165, 50; 1536: 500 to 750, 200 to 230. Rank 32: order 512: 27, 40; 768: 68, 76 to
    109; 1536: 490 to 760, 305 to 494. Rank 64: order 1024: 215 to 249, 310 to 394; 1536: 488 to 716, 458 to 857.
    One H100, rank 8: order 512: 6, 35; 2048: 29, 60; 4096: 127, 104. Where both take about as long, the dense one is
    preferred, as it cannot fail to converge.

    Args:
        size: Order of Ω.
        rank: How many eigenpairs are wanted.
        device_type: Type of the device Ω lives on.
        available: Solvers by name.
    """
    dense_size = DENSE_SIZE.get(device_type, DENSE_SIZE["cpu"])
    small = size <= max(dense_size, DENSE_RANKS * rank)
    names = DENSE if small else LARGE if size <= LARGEST_DENSE else LARGE[:-1]
    return next((name for name in names if name in available), None)
