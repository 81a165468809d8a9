"""What the first run in a process takes: each program of `benchmarks.gpu_7b` alone in new processes, not warmed up.

A script that initialises an adapter does so once, so what a process pays once (kernels that are loaded, plans that are
compiled for every length of batch) is a part of what its user waits for. Medians are reported; loading Python, torch
and the weights is not counted.

    python -m benchmarks.first_run [--programs lora_ga,fixed,robust] [--repetitions 3] [--layers 32] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_7b import PROGRAMS
from benchmarks.machine import machine, write_json


def main() -> None:
    """Measures and prints."""
    options, shape = _options()
    seconds: dict[str, list[float]] = {key: [] for key in options.programs}
    for _ in range(options.repetitions):
        for key, found in seconds.items():
            row = first_run(key, shape)
            found.append(row["seconds"])
            print(f"{PROGRAMS[key]}: {row}", flush=True)
    medians = {key: statistics.median(found) for key, found in seconds.items()}
    print(machine())
    for key, median in medians.items():
        ratio = f", {median / medians['lora_ga']:.2f} of LoRA-GA's" if "lora_ga" in medians else ""
        print(f"{PROGRAMS[key]}: median {median:.1f} s{ratio}")
    write_json(Path(options.output), {"seconds": seconds, "medians": medians, "shape": shape})


def first_run(program: str, shape: list[str]) -> dict[str, Any]:
    """One run in a new process.

    Args:
        program: As `benchmarks.gpu_7b` names it.
        shape: Further arguments for that command.

    Returns:
        Its row.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        once = ["--cold", "--repetitions", "1", "--checks", "", "--programs", program, "--output", str(output)]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_7b", *once, *shape], check=True, stdout=subprocess.DEVNULL
        )
        row: dict[str, Any] = json.loads(output.read_text())["rows"][PROGRAMS[program]]
    return row


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=lambda text: text.split(","), default=["lora_ga", "fixed", "robust"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", default="runs/benchmarks/first_run.json")
    # What is not known here is for `benchmarks.gpu_7b`: shape, samples and device.
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
