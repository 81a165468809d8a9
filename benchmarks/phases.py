"""Where the time of a run goes: calls of chosen functions, timed with the accelerator waited for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from lora_da_core import rounds, solving
from lora_da_core.operators import Dense, Stacked
from lora_da_estimators import _factors, kfac
from lora_da_solvers import _subspace, lanczos

SOLVE: Mapping[str, tuple[Any, str]] = {
    "prepare": (solving.LayerSolver, "prepare"),
    "prepare: factorise Z": (kfac, "damp_dense"),
    "prepare: Y": (kfac, "damp_diagonal"),
    "prepare: invert Z": (_factors, "inverse_from_cholesky"),
    "prepare: form Δ": (solving, "formed"),
    "solve: form Ω": (solving, "stored"),
    "solve: Ω, and σ where Ω does not tell it": (solving.LayerSolver, "_smallest"),
    "solve: σ": (solving.LayerSolver, "_norms"),
    "solve: of that, matrices that are inverted": (lanczos, "inverted"),
    "solve: products of stored matrices": (Dense, "matmat"),
    "solve: products of batches": (Stacked, "matmat"),
    "solve: orthonormalise": (_subspace.Subspace, "orthonormalise"),
    "solve: small eigenproblems": (_subspace.Subspace, "ritz"),
    "solve: residuals": (_subspace.Subspace, "residual_norms"),
    "solution: B and the report": (solving.LayerSolver, "_solution"),
    "solution: unconverged, other solvers": (solving.LayerSolver, "_unconverged"),
    "all": (rounds.Rounds, "_solutions"),
}
"""Label to owner and name; what stands behind a colon is inside of others, so the labels do not add up."""


def wait() -> None:
    """Until the accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def timed(functions: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, list[float]]]:
    """Within it every call of the functions is timed; waiting for each slows the whole down.

    Args:
        functions: By label, what owns the function, and its name there.

    Yields:
        Seconds and calls by label; filled as calls end.
    """
    spent: dict[str, list[float]] = {label: [0.0, 0] for label in functions}

    def watched(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            wait()
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                wait()
                spent[label][0] += time.perf_counter() - start
                spent[label][1] += 1

        return call

    originals = {label: getattr(owner, name) for label, (owner, name) in functions.items()}
    try:
        for label, (owner, name) in functions.items():
            setattr(owner, name, watched(label, originals[label]))
        yield spent
    finally:
        for label, (owner, name) in functions.items():
            setattr(owner, name, originals[label])
