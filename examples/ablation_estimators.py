"""Compares Fisher estimators on SmolLM2-135M: what each costs, and how close it comes to the empirical Fisher's answer.

    python examples/ablation_estimators.py [--samples 16] [--seeds 2] [--output runs/ablation_estimators]

The same as `lora-da ablate` with `grids/estimators.toml`, from Python, on fewer layers. Run again, it goes on where it
was.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo_model import demo_model

from lora_da_core.ablation import make_grid, plan, run_grid

HERE = Path(__file__).parent
ESTIMATORS = ["identity", "diagonal", "kfac", {"name": "kfac", "output": "full"}, "ekfac"]


def main(arguments: list[str] | None = None) -> None:
    """Runs the grid and prints a line for each cell as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "word_problems.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation_estimators"))
    options = parser.parse_args(arguments)
    grid = make_grid(
        {
            "run": {
                "model": str(options.model or demo_model()),
                "data": str(options.data),
                "samples": options.samples,
                "seeds": list(range(options.seeds)),
                "device": "cpu",
                "target_modules": [
                    f"layers.{layer}.self_attn.{name}" for layer in options.layers for name in ("q_proj", "v_proj")
                ],
                "reference": "empirical",
            },
            "grid": {
                "estimator": ESTIMATORS,
                "beta": [0.03, 1.0],
                "rank": [8],
                "scale": ["fixed"],
                "baseline": ["default", "lora_ga"],
            },
        }
    )
    todo = plan(grid, options.output)
    print(f"{todo.cells} cells in {len(grid.groups())} groups, {todo.finished} of them finished")
    run_grid(grid, options.output, on_record=show)
    print(f"report: {options.output / 'report.html'}")


def show(record: Mapping[str, Any], done: int, total: int) -> None:
    """Prints what a cell came to."""
    name = record["baseline"] or f"{record['estimator']} {record['estimator_options'] or ''} β={record['beta']}"
    found = (
        record["error"]
        if record["status"] == "failed"
        else f"{record['seconds']:.1f} s, {record['peak_bytes'] / 2**20:.0f} MiB, "
        f"{math.degrees(record['angle']):.1f}° from {record['reference']}"
    )
    print(f"{done}/{total} {name}, seed {record['seed']}: {found}", flush=True)


if __name__ == "__main__":
    main()
