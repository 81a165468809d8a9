"""How time grows with samples, layers, width and rank; and what a model too large to run here would take.

Random Llama models, K-FAC, `robust` with a fixed scale, Lanczos. One quantity is varied at a time, the others stay; of
each setting the median of `--repetitions` runs after one that warms up. The exponent is the slope of a straight line
through the logarithms. `passes` is the phase over the data, `solver` what the eigen-solver itself takes, `factors` what
factorising Z and forming Δ and Ω takes, whose arithmetic is cubic in the width, as that of any dense factor is.

A deep model: one and two blocks of its shape are run; each phase is a + b·blocks, and the line is continued to all its
blocks. Beside it stands the plan of the whole model from its configuration. Both are extrapolations and say so.

    python -m benchmarks.scaling [--device cuda] [--widths 512,1024,2048,4096] [--deep 13b,70b] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import lora_da_core
from benchmarks.machine import machine, write_json
from benchmarks.phases import timed, wait
from lora_da_core import solving
from lora_da_core.memory.workload import Workload

LIMITS = {
    ("samples", "passes"): 1.0,
    ("blocks", "passes"): 1.0,
    ("blocks", "solver"): 1.0,
    ("hidden", "passes"): 2.1,
    ("hidden", "solver"): 2.2,
    ("rank", "solver"): 1.1,
}
"""Largest exponents that are aimed at, by what is varied and what is measured."""

DEEP = {
    "13b": {"hidden": 5120, "inner": 13824, "heads": 40, "kv_heads": 40, "blocks": 40, "vocabulary": 32000},
    "70b": {"hidden": 8192, "inner": 28672, "heads": 64, "kv_heads": 8, "blocks": 80, "vocabulary": 32000},
    "tiny": {"hidden": 64, "inner": 160, "heads": 4, "kv_heads": 2, "blocks": 6, "vocabulary": 64},
}
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """A model's shape and its data."""

    hidden: int = 1024
    inner: int = 2816
    heads: int = 8
    kv_heads: int = 8
    blocks: int = 4
    vocabulary: int = 8000
    samples: int = 64
    length: int = 128
    batch: int = 16
    rank: int = 8


def main() -> None:
    """Measures and prints."""
    options = _options()
    base = replace(Setting(), hidden=options.hidden, inner=options.hidden * 11 // 4, length=options.length)
    varied: dict[str, Sequence[int]] = {
        "samples": options.samples,
        "blocks": options.blocks,
        "hidden": options.widths,
        "rank": options.ranks,
    }
    figures: dict[str, Any] = {"base": asdict(base), "curves": {}, "deep": {}}
    print(machine(), flush=True)
    for name, values in varied.items():
        rows = [{name: value, **_measured(_varied(base, name, value), options)} for value in values]
        figures["curves"][name] = {"rows": rows, "exponents": _exponents(name, rows)}
        _print_curve(name, rows, figures["curves"][name]["exponents"])
        write_json(Path(options.output), figures)
    for name in options.deep:
        figures["deep"][name] = _deep(name, options)
        print(f"{name}: {figures['deep'][name]}", flush=True)
        write_json(Path(options.output), figures)


def _options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=numbers, default=[64, 128, 256, 512])
    parser.add_argument("--blocks", type=numbers, default=[2, 4, 8, 16])
    parser.add_argument("--widths", type=numbers, default=[512, 1024, 2048, 4096])
    parser.add_argument("--ranks", type=numbers, default=[8, 16, 32, 64])
    parser.add_argument("--hidden", type=int, default=1024, help="width where it is not varied")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--deep", type=lambda text: [t for t in text.split(",") if t], default=["13b", "70b"])
    parser.add_argument("--deep-blocks", type=numbers, default=[1, 2], help="blocks of a deep model that are run")
    parser.add_argument("--deep-samples", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="runs/benchmarks/scaling.json")
    return parser.parse_args()


def _varied(base: Setting, name: str, value: int) -> Setting:
    if name == "hidden":
        return replace(base, hidden=value, inner=value * 11 // 4)
    return replace(base, **{name: value})


def _measured(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by what is measured, medians; and whether every layer converged."""
    model = _model(setting, options.device)
    batches = _batches(setting)
    lora = LoraConfig(r=setting.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    config = lora_da_core.LoraDAConfig(scale="fixed")
    pipeline = lora_da_core.build_pipeline(solver="lanczos", config=config)
    runs = []
    for number in range(options.repetitions + 1):
        functions = {
            "factors": (solving.LayerSolver, "prepare"),
            "solver": (solving.LayerSolver, "_smallest"),
            "stored": (solving, "stored"),
        }
        with timed(functions) as spent:
            report = pipeline.run(model, batches, lora).report
            wait()
        if number:
            found = {label: seconds for label, (seconds, _) in spent.items()}
            runs.append(
                {
                    "passes": report.seconds["statistics"],
                    "solver": found["solver"],
                    "factors": found["factors"] + found["stored"],
                    "all": sum(report.seconds.values()),
                    "converged": all(layer.converged for layer in report.layers),
                }
            )
    row = {name: statistics.median(run[name] for run in runs) for name in ("passes", "solver", "factors", "all")}
    return row | {"converged": all(run["converged"] for run in runs)}


def _model(setting: Setting, device: str) -> Any:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(_config(setting)).eval()
    finally:
        torch.set_default_dtype(previous)


def _config(setting: Setting) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=setting.hidden,
        intermediate_size=setting.inner,
        num_hidden_layers=setting.blocks,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        vocab_size=setting.vocabulary,
    )


def _batches(setting: Setting) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, setting.vocabulary, (setting.samples, setting.length), generator=generator)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in ids.split(setting.batch)
    ]


def _exponents(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for what in ("passes", "solver", "factors", "all"):
        exponent = slope([row[name] for row in rows], [row[what] for row in rows])
        limit = LIMITS.get((name, what))
        found[what] = {"exponent": exponent, "limit": limit, "met": None if limit is None else exponent <= limit}
    return found


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent of the power law that fits best, by least squares of logarithms.

    >>> slope([1, 2, 4], [3, 12, 48])
    2.0

    Args:
        sizes: What was varied, at least two values.
        seconds: What it took.
    """
    across, up = [math.log(size) for size in sizes], [math.log(each) for each in seconds]
    return statistics.linear_regression(across, up).slope


def _deep(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One and two blocks as measured, all of them extrapolated, and the plan of the whole."""
    shape = DEEP[name]
    whole = Setting(**shape, samples=options.deep_samples, length=options.length)
    few = {blocks: _measured(replace(whole, blocks=blocks), options) for blocks in options.deep_blocks}
    lines = {
        what: statistics.linear_regression(list(few), [row[what] for row in few.values()])
        for what in ("passes", "solver", "factors")
    }
    extrapolated = {what: line.intercept + line.slope * whole.blocks for what, line in lines.items()}
    with torch.device("meta"):
        shapes = LlamaForCausalLM(_config(whole)).to(torch.bfloat16)
    plan = lora_da_core.estimate_memory(
        shapes,
        LoraConfig(r=whole.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        pipeline=lora_da_core.build_pipeline(config=lora_da_core.LoraDAConfig(scale="fixed")),
        workload=Workload(whole.samples, whole.length, batch_size=whole.batch),
        device=options.device,
    )
    return {
        "measured": few,
        "extrapolated, in one pass": {**extrapolated, "all": sum(extrapolated.values()), "blocks": whole.blocks},
        "planned, not run": {
            "peak_gib_in_one_pass": plan.peak_bytes / GIB,
            "statistics_gib": plan.statistics_bytes / GIB,
            "layers": plan.layers,
        },
    }


def _print_curve(name: str, rows: Sequence[Mapping[str, Any]], exponents: Mapping[str, Mapping[str, Any]]) -> None:
    for row in rows:
        times = ", ".join(f"{what} {row[what]:.3f} s" for what in ("passes", "solver", "factors", "all"))
        print(f"{name} {row[name]:>6}: {times}, converged: {row['converged']}", flush=True)
    for what, found in exponents.items():
        limit = "" if found["limit"] is None else f" (at most {found['limit']}: {'met' if found['met'] else 'missed'})"
        print(f"    {what:<8} grows as {name}^{found['exponent']:.2f}{limit}", flush=True)


if __name__ == "__main__":
    main()
