"""Compares eigen-solvers on the same statistics of SmolLM2-135M: one estimation, then every solver at two ranks.

    python examples/ablation_solvers.py [--samples 16] [--output runs/ablation_solvers]

The reference takes the same Fisher estimator, so the angle is the solver's own error.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo_model import demo_model

from lora_da_core.ablation import run_grid

HERE = Path(__file__).parent
SOLVERS = ["eigh", "lanczos", "davidson", "lobpcg", "arpack", "randomized_svd"]


def main(arguments: list[str] | None = None) -> None:
    """Runs the grid and prints a line for each cell as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "word_problems.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation_solvers"))
    options = parser.parse_args(arguments)
    grid = {
        "run": {
            "model": str(options.model or demo_model()),
            "data": str(options.data),
            "samples": options.samples,
            "device": "cpu",
            "target_modules": [
                f"layers.{layer}.mlp.{name}" for layer in options.layers for name in ("up_proj", "down_proj")
            ],
            "reference": "kfac",
        },
        # A solver that misses its tolerance is shown as it is, not replaced by a dense one; the scale is not searched.
        "grid": {
            "estimator": ["kfac"],
            "solver": SOLVERS,
            "rank": options.ranks,
            "unconverged": ["warn"],
            "scale": ["fixed"],
        },
    }
    run_grid(grid, options.output, on_record=show)
    print(f"report: {options.output / 'report.html'}")


def show(record: Mapping[str, Any], done: int, total: int) -> None:
    """Prints what a cell came to."""
    found = (
        record["error"]
        if record["status"] == "failed"
        else f"solve {record['phases']['solve']:6.2f} s, {record['applies']:4} products, "
        f"largest angle {record['angle_max']:.1e}, objective gap {record['objective_gap_max']:+.1e}, "
        f"{record['not_converged']} not converged{', statistics reused' if record['reused'] else ''}"
    )
    print(f"{done:2}/{total} {record['solver']:>14} r={record['rank']:<3} {found}", flush=True)


if __name__ == "__main__":
    main()
