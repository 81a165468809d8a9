"""Iterative solvers against dense `eigh` on batches of Ω, at equal verified residual.

Each Ω is −ΔΔᵀ/σ² + (β/N)V/σ² with V = tr(Y⁻¹)·Z⁻¹: Δ has a decaying spectrum of full rank, Z a stated condition. All
get the same stored matrices, in float64 and rounded to float32; residuals ‖ΩU − UΛ‖/‖Ω‖ are computed here in float64
with the float64 matrices, and the objective (the sum of the wanted eigenvalues) is compared with that of `eigh` in
float64. Speed-ups are over torch's `eigh` of the same dtype. One warm-up, then the median of `--repetitions`.

    python -m benchmarks.solvers [--sizes 4096,11008] [--ranks 8,32,128] [--batch 4] [--tolerance 1e-3,1e-8]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine, write_json
from benchmarks.phases import wait
from lora_da_core.testing import solve_matrix
from lora_da_core.types import EigenResult

SOLVERS = ("lanczos", "randomized_svd")
DTYPES = (torch.float32, torch.float64)
RESIDUAL = 1e-3
"""Relative residual that counts as solved."""


def main() -> None:
    """Measures and prints."""
    options = _options()
    rows: list[dict[str, Any]] = []
    figures = {"condition": options.condition, "batch": options.batch, "seed": 0, "rows": rows}
    for size in options.sizes:
        matrices = omegas(size, options.batch, options.condition, options.device)
        # All eigenvalues come with one decomposition, whatever the rank.
        dense = {dtype: _timed(partial(torch.linalg.eigh, matrices.to(dtype)), 1)[0] for dtype in DTYPES}
        spectra = torch.linalg.eigvalsh(matrices)
        for dtype in DTYPES:
            rows.append({"size": size, "dtype": str(dtype), "solver": "eigh", "seconds": dense[dtype]})
            print(f"{size:>6} {dtype} eigh {dense[dtype]:.3f} s", flush=True)
        for rank, dtype, name, tolerance in itertools.product(options.ranks, DTYPES, SOLVERS, options.tolerance):
            row = compared(matrices, dtype, spectra[:, :rank].sum(-1), rank, name, tolerance, options.repetitions)
            row |= {"size": size, "rank": rank, "speed_up": dense[dtype] / row["seconds"]}
            rows.append(row)
            print(
                f"{size:>6} r={rank:<4} {dtype} {name:<15} {tolerance:.0e}: {row['seconds']:.3f} s, "
                f"{row['speed_up']:.1f}× eigh, residual {row['residual']:.1e}, gap {row['objective_gap']:.1e}, "
                f"{row['applies']} products, solved: {row['solved']}",
                flush=True,
            )
        del matrices
        write_json(Path(options.output), figures)
    print(machine())


def compared(
    matrices: Tensor, dtype: torch.dtype, best: Tensor, rank: int, name: str, tolerance: float, repetitions: int
) -> dict[str, Any]:
    """One solver's time, and how good its answer is.

    Args:
        matrices: (batch, size, size), float64.
        dtype: What the solver works in.
        best: (batch,), the least sum of eigenvalues.
        rank: Eigenpairs wanted.
        name: The solver's.
        tolerance: Its option.
        repetitions: Timed calls.

    Returns:
        Figures by name.
    """
    given = matrices.to(dtype)
    seconds, found = _timed(partial(solve_matrix, given, rank, name, options={"tolerance": tolerance}), repetitions)
    vectors, values = found.vectors.double(), found.values.double()
    errors = matrices @ vectors - vectors * values.unsqueeze(-2)
    residual = float((torch.linalg.vector_norm(errors, dim=-2).amax(-1) / values.abs().amax(-1)).max())
    return {
        "solver": name,
        "dtype": str(dtype),
        "tolerance": tolerance,
        "seconds": seconds,
        "residual": residual,
        "objective_gap": float(((values.sum(-1) - best) / best.abs()).max()),
        "solved": residual <= RESIDUAL and bool(found.converged.all()),
        "applies": found.applies,
    }


def omegas(size: int, batch: int, condition: float, device: str) -> Tensor:
    """Batch of Ω, (batch, size, size), float64."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device, generator=generator)

    spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64, device=device)
    found = []
    for _ in range(batch):
        inverse = torch.diag(spectrum.min() / spectrum)
        # Three reflections turn the axes into dense eigenvectors at no cost of a decomposition.
        for direction in torch.nn.functional.normalize(random(3, size), dim=1).unsqueeze(-1):
            inverse = inverse - 2 * direction @ (direction.mT @ inverse)
            inverse = inverse - 2 * (inverse @ direction) @ direction.mT
        step = random(size, size) * torch.arange(1, size + 1, dtype=torch.float64, device=device) ** -1.0
        gram = step @ step.mT
        found.append(1e-4 * inverse - gram / _largest(gram))
    stacked = torch.stack(found)
    return 0.5 * (stacked + stacked.mT)


def _largest(matrix: Tensor) -> Tensor:
    """The largest eigenvalue, near enough for a scale."""
    block = torch.ones(len(matrix), 1, dtype=matrix.dtype, device=matrix.device)
    for _ in range(30):
        block = torch.nn.functional.normalize(matrix @ block, dim=0)
    return (matrix @ block).norm()


def _timed(work: Callable[[], Any], repetitions: int) -> tuple[float, EigenResult]:
    outcome, seconds = work(), []
    for _ in range(repetitions):
        wait()
        start = time.perf_counter()
        outcome = work()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), outcome


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda t: [int(n) for n in t.split(",")], default=[4096, 11008])
    parser.add_argument("--ranks", type=lambda t: [int(n) for n in t.split(",")], default=[8, 32, 128])
    parser.add_argument("--tolerance", type=lambda t: [float(n) for n in t.split(",")], default=[1e-3, 1e-8])
    parser.add_argument("--condition", type=float, default=1e6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="runs/benchmarks/solvers.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
