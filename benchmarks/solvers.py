"""Iterative solvers against dense `eigh` on batches of Ω, at equal verified residual.

Each Ω is −ΔΔᵀ/σ² + (β/N)V/σ² with V = tr(Y⁻¹)·Z⁻¹: Δ has a decaying spectrum of full rank, Z a stated condition. All
solvers get the same stored operator, float64; residuals ‖ΩU − UΛ‖/‖Ω‖ are computed again here, and the objective
(the sum of the wanted eigenvalues) is compared with eigh's. One warm-up, then the median of `--repetitions`.

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
from lora_da_core.testing import solve_matrix
from lora_da_core.types import EigenResult

SOLVERS = ("lanczos", "randomized_svd")
RESIDUAL = 1e-3
"""Relative residual that counts as solved."""


def main() -> None:
    """Measures and prints."""
    options = _options()
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        matrices = omegas(size, options.batch, options.condition, options.device)
        for rank in options.ranks:
            seconds, dense = _timed(partial(solve_matrix, matrices, rank, "eigh"), options)
            rows.append({"size": size, "rank": rank, "solver": "eigh", "seconds": seconds, "speed_up": 1.0})
            print(f"{size:>6} r={rank:<4} eigh {seconds:.3f} s", flush=True)
            for name, tolerance in itertools.product(SOLVERS, options.tolerance):
                row = compared(matrices, dense, name, tolerance, options)
                row |= {"size": size, "rank": rank, "speed_up": seconds / row["seconds"]}
                rows.append(row)
                print(
                    f"{'':>13}{name:<15} {tolerance:.0e}: {row['seconds']:.3f} s, {row['speed_up']:.1f}× eigh, "
                    f"residual {row['residual']:.1e}, gap {row['objective_gap']:.1e}, solved: {row['solved']}",
                    flush=True,
                )
        del matrices
    print(machine())
    write_json(Path(options.output), {"condition": options.condition, "batch": options.batch, "seed": 0, "rows": rows})


def compared(
    matrices: Tensor, dense: EigenResult, name: str, tolerance: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One solver's time, and how good its answer is beside eigh's."""
    rank, best = dense.values.shape[-1], dense.values.sum(-1)
    work = partial(solve_matrix, matrices, rank, name, options={"tolerance": tolerance})
    seconds, found = _timed(work, options)
    errors = matrices @ found.vectors - found.vectors * found.values.unsqueeze(-2)
    residual = float((torch.linalg.vector_norm(errors, dim=-2).amax(-1) / found.values.abs().amax(-1)).max())
    return {
        "solver": name,
        "tolerance": tolerance,
        "seconds": seconds,
        "residual": residual,
        "objective_gap": float(((found.values.sum(-1) - best) / best.abs()).max()),
        "solved": residual <= RESIDUAL and bool(found.converged.all()),
        "applies": found.applies,
    }


def omegas(size: int, batch: int, condition: float, device: str) -> Tensor:
    """Batch of Ω, (batch, size, size), float64."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device, generator=generator)

    found = []
    for _ in range(batch):
        basis = torch.linalg.qr(random(size, size))[0]
        values = torch.logspace(0, 1, size, dtype=torch.float64, device=device) ** -torch.log10(
            torch.tensor(condition, dtype=torch.float64, device=device)
        )
        inverse = (basis / values) @ basis.mT * values.min()
        step = random(size, size) * torch.arange(1, size + 1, dtype=torch.float64, device=device) ** -1.0
        gram = step @ step.mT
        found.append(1e-4 * inverse - gram / torch.linalg.eigvalsh(gram)[-1])
    stacked = torch.stack(found)
    return 0.5 * (stacked + stacked.mT)


def _timed(work: Callable[[], EigenResult], options: argparse.Namespace) -> tuple[float, EigenResult]:
    outcome, seconds = work(), []
    for _ in range(options.repetitions):
        _wait(options.device)
        start = time.perf_counter()
        outcome = work()
        _wait(options.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), outcome


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


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
