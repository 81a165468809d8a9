r"""Runs grids of fine-tunes on one accelerator: a process per seed, the seeds side by side, one directory of results.

    python -m benchmarks.evidence benchmarks/grids/gsm8k.toml --output runs/gsm8k \
        --model "$(python examples/demo_model.py)" --data problems.jsonl [--processes 3]

Every process trains the adapters of its seed together and uses torch's fused kernels for Llama's norms, rotations and
activations; results of all seeds are then joined, and the usual report is written. A process that ends early loses what
it had not finished, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers.models.llama import modeling_llama

from lora_da_core.ablation import read_grid, run_grid
from lora_da_core.ablation.results import RESULTS, Results, read_run, write_run


def main() -> None:
    """Runs, joins and reports."""
    options = _options()
    changes = {name: getattr(options, name) for name in ("model", "data", "device") if getattr(options, name)}
    seeds = options.seeds or list(read_grid(options.grid, **changes).run.seeds)
    start = time.perf_counter()
    results = run_seeds(options.grid, options.output, changes, seeds, options.processes, options.fused)
    if options.report:
        run_grid(read_grid(options.grid, **changes, seeds=seeds), options.output)
    print(f"{RESULTS}: {len(results.read())} cells, {time.perf_counter() - start:.0f} s")


def run_seeds(
    grid: str, output: str, changes: dict[str, Any], seeds: Sequence[int], processes: int, fused: bool
) -> Results:
    """Runs a grid's seeds side by side and joins what they leave.

    Args:
        grid: The grid file.
        output: Directory of the joined results; those of each seed lie in a hidden one within.
        changes: Fields of [run] that win over the file's.
        seeds: The seeds.
        processes: Seeds at once.
        fused: Whether Llama's kernels are fused where there is an accelerator.

    Returns:
        The joined results.
    """
    share_threads(processes)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(seeds)), mp_context=spawn, max_tasks_per_child=1) as pool:
        for _ in pool.map(partial(_one_seed, grid, output, changes, fused), seeds):
            pass
    joined = Path(output)
    results = Results(joined)
    known = {record["cell"] for record in results.read()}
    for seed in seeds:
        part = joined / f".seed{seed}"
        _join_run(part, joined)
        for record in Results(part).read():
            if record["cell"] not in known:
                results.append(record)
    return results


def _join_run(part: Path, joined: Path) -> None:
    """Adds what made a seed's cells to what made the joined ones: a report shows the cells that it finds there."""
    entries, known = (_entries(read_run(directory)) for directory in (part, joined))
    for entry in reversed(entries):
        if entry not in known:
            write_run(joined, entry)


def _entries(run: dict[str, Any] | None) -> list[dict[str, Any]]:
    if run is None:
        return []
    return [{name: value for name, value in run.items() if name != "earlier"}, *run["earlier"]]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--output", required=True)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--device")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--no-fused", dest="fused", action="store_false", help="leave transformers' own kernels")
    parser.add_argument("--no-report", dest="report", action="store_false", help="join the results, nothing more")
    return parser.parse_args()


def share_threads(processes: int) -> None:
    """Gives each process its part of the cores: more threads than cores once cost a run of small kernels all its time.

    Args:
        processes: How many will be started; they inherit what is set here.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def _one_seed(grid: str, output: str, changes: dict[str, Any], fused: bool, seed: int) -> None:
    if fused and torch.cuda.is_available():
        use_fused_kernels()
    # A cell is recorded when it is fine-tuned; how its initialisation fares is worth a line before that.
    logging.basicConfig(format=f"seed {seed}: %(message)s")
    logging.getLogger("lora_da_core.ablation.cells").setLevel(logging.INFO)
    start = time.perf_counter()

    def tell(record: dict[str, Any], done: int, total: int) -> None:
        name = record["baseline"] or f"{record['preset']} {record['estimator']}"
        if record["regularizer"] != "none":
            name += f" + {record['regularizer']} {record['regularizer_options']} of {record['source_fisher']}"
        tried = [round(curve["losses"][-1], 4) for curve in record["curves"] if curve["losses"][-1] is not None]
        said = record["error"] or f"{record['seconds']:.1f} s, {record['spent']:.1f} s in all, losses {tried}"
        print(f"[{time.perf_counter() - start:5.0f}] seed {seed} {done}/{total} {name}: {said}", flush=True)

    part = Path(output) / f".seed{seed}"
    part.parent.mkdir(parents=True, exist_ok=True)
    run_grid(read_grid(grid, **changes, seeds=[seed]), part, on_record=tell)


def use_fused_kernels() -> None:
    """Replaces Llama's norm, rotation and activation in this process by single kernels that compute the same."""

    def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)

    activate: Callable[..., torch.Tensor] = torch.compile(_swiglu, dynamic=True)

    def mlp(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.down_proj(activate(self.gate_proj(hidden), self.up_proj(hidden)))
        return product

    modeling_llama.LlamaRMSNorm.forward = norm
    modeling_llama.LlamaMLP.forward = mlp
    modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb, dynamic=True)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


if __name__ == "__main__":
    main()
