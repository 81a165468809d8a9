"""What a solve is made of, one by one: factorisations, skinny products, orthonormalisation, small eigenproblems.

python -m benchmarks.primitives [--sizes 4096,11008] [--batch 8] [--device cuda] [--output FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, write_json
from benchmarks.phases import wait
from lora_da_core.inverses import inverse_from_cholesky
from lora_da_core.wide_products import gram, product
from lora_da_solvers._subspace import cholesky_qr

_LARGEST_STACKED = 4096
"""Largest order of which several inverses are stored side by side."""


def main() -> None:
    """Measures and prints."""
    options = _options()
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        for dtype in (torch.float64, torch.float32):
            for name, work in primitives(size, options.batch, dtype, options.device):
                rows.append({"size": size, "dtype": str(dtype), "primitive": name, "seconds": seconds(work)})
                print(f"{size:>6} {dtype!s:<14} {name:<52} {1e3 * rows[-1]['seconds']:9.3f} ms", flush=True)
    print(machine())
    write_json(Path(options.output), {"batch": options.batch, "device": options.device, "rows": rows})


def primitives(size: int, batch: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The steps on matrices of one order.

    Args:
        size: Their order.
        batch: Matrices in a batch.
        dtype: Their dtype.
        device: Where they are.

    Yields:
        A name and a function to time.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(2 * size, size, dtype=dtype, device=device, generator=generator)
    matrix = tokens.mT @ tokens / len(tokens)
    del tokens
    root = torch.linalg.cholesky(matrix)
    inverse = torch.cholesky_inverse(root)
    blocks = torch.randn(batch, size, 8, dtype=dtype, device=device, generator=generator)
    small = torch.randn(batch, 104, 104, dtype=torch.float64, device=device, generator=generator)
    small = small + small.mT
    narrow = small.float()
    together = torch.stack([inverse] * min(batch, 4)) if size <= _LARGEST_STACKED else None
    yield "Cholesky", lambda: torch.linalg.cholesky_ex(matrix)
    yield "inverse from Cholesky", lambda: torch.cholesky_inverse(root)
    yield "inverse by large products", lambda: inverse_from_cholesky(root.clone())
    yield "inverse times a square matrix", lambda: inverse @ matrix
    yield "inverse times a square matrix in parts of bfloat16", lambda: product(inverse, matrix)
    yield "Gram matrix", lambda: inverse @ inverse.mT
    yield "Gram matrix in parts of bfloat16", lambda: gram(inverse)
    yield "solve with Cholesky, 8 columns", lambda: torch.cholesky_solve(blocks[0], root)
    yield "inverse times 8 columns", lambda: inverse @ blocks[0]
    yield "inverse times 32 columns", lambda: inverse @ blocks[0].repeat(1, 4)
    if together is not None:
        yield f"{len(together)} stacked inverses times 8 columns", lambda: together @ blocks[: len(together)]
    yield f"Householder QR, {batch} blocks of 8", lambda: torch.linalg.qr(blocks)
    yield f"Cholesky QR, {batch} blocks of 8", lambda: cholesky_qr(blocks)
    yield f"eigh of {batch} × 104², float64, device", lambda: torch.linalg.eigh(small)
    yield f"eigh of {batch} × 104², float32, device", lambda: torch.linalg.eigh(narrow)
    yield f"eigh of {batch} × 104², float64, host", lambda: torch.linalg.eigh(small.cpu())
    yield f"eigh of {batch} × 104², float64, host, one at a time", lambda: [torch.linalg.eigh(m) for m in small.cpu()]


def seconds(work: Callable[[], Any]) -> float:
    """Median of five calls after one that warms up."""
    work()
    found = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda t: [int(n) for n in t.split(",")], default=[4096, 11008])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="runs/benchmarks/primitives.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
