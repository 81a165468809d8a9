"""Predicted against measured peak memory, and time of the passes, of runs on random Llama models.

The plan is made on the meta device, from the configuration alone, for batches as large as those of the run, which are
padded and of which every token is a label. What a run takes beyond the weights is measured as the growth of the
resident set on a CPU, of the allocations on a GPU; errors are of that growth, which is stricter than of the whole.

glibc keeps blocks of up to 32 MiB that were freed, which a resident set shows and a plan does not know. So it is told
to give them back; `--keep-freed` leaves it as it is, to see what that takes.

Time is predicted from the throughput of a pass over the first batch alone, all layers tapped, median of three; what is
measured is the phase over the data of the whole run, in as many passes as the case says.

    python -m benchmarks.plan_accuracy [--only NAME,…] [--device cpu] [--keep-freed] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import lora_da_core
from benchmarks.machine import machine, write_json
from lora_da_core.ablation.memory import PeakMemory
from lora_da_core.memory.workload import Workload

MIB = 2**20
_THROUGHPUT_RUNS = 3
_M_MMAP_THRESHOLD = -3
"""glibc's number of the size from which on a block is mapped by itself, and given back as soon as it is freed."""


@dataclass(frozen=True)
class Case:
    """One run: a model's shape, its data, and the components."""

    name: str
    hidden: int = 1024
    inner: int = 2816
    blocks: int = 4
    heads: int = 16
    kv_heads: int = 16
    vocabulary: int = 8000
    samples: int = 8
    length: int = 64
    batch: int = 4
    rank: int = 8
    estimator: Any = "kfac"
    gradient: Any = "full"
    solver: Any = "auto"
    scale: str = "fixed"
    dtype: str = "float32"
    layers_per_pass: int | str = "auto"


CASES = (
    Case("kfac"),
    Case("kfac, line search", scale="auto"),
    Case("kfac, two passes", layers_per_pass=14),
    Case("kfac, a pass per input", layers_per_pass=1, blocks=2),
    Case("kfac, more samples", hidden=512, inner=1408, heads=8, kv_heads=8, samples=48),
    Case("kfac, large batch", hidden=512, inner=1408, heads=8, kv_heads=8, blocks=8, samples=16, length=128, batch=16),
    Case("kfac, large vocabulary", hidden=512, inner=1408, heads=8, kv_heads=8, vocabulary=64000, batch=8),
    Case("kfac, rank 64", rank=64, blocks=3),
    Case("kfac, many small blocks", hidden=512, inner=1408, blocks=16, heads=8, kv_heads=8),
    Case("kfac, grouped queries", inner=3584, kv_heads=4, blocks=3),
    Case("kfac, bfloat16", dtype="bfloat16"),
    Case("kfac, full output", estimator=("kfac", {"output": "full"}), blocks=2),
    Case("kfac, eigh", hidden=768, inner=1536, heads=12, kv_heads=12, solver="eigh", blocks=6),
    Case("ekfac", hidden=768, inner=1536, heads=12, kv_heads=12, estimator="ekfac", rank=16),
    Case("diagonal", estimator="diagonal", blocks=6, rank=16),
    Case("identity", estimator="identity", blocks=8),
    Case("empirical", estimator="empirical", blocks=6, samples=12),
    Case("nystrom", estimator=("sketched", {"method": "nystrom", "size": 8}), blocks=2),
    Case("frequent directions", estimator=("sketched", {"size": 4}), blocks=2),
    Case("kfac, sketched gradient", gradient=("sketched", {"size": 32}), blocks=6),
)


def main() -> None:
    """Measures and prints."""
    options = _options()
    device = torch.device(options.device)
    returned = not options.keep_freed and _return_freed_memory()
    wanted = set(options.only.split(",")) if options.only else {case.name for case in CASES}
    small = replace(CASES[0], hidden=64, inner=128, heads=4, kv_heads=4, vocabulary=100)
    _measured(small, _model(small, device), _batches(small))  # warm-up
    rows = []
    for case in CASES:
        if case.name in wanted:
            rows.append({**asdict(case), **_compared(case, device)})
            print(_line(rows[-1]), flush=True)
    errors = [abs(row["error"]) for row in rows]
    figures = {
        "rows": rows,
        "freed_memory_is_returned": returned,
        "within_15_percent": sum(error <= 0.15 for error in errors),
        "times_within_40_percent": sum(abs(row["error_of_time"]) <= 0.4 for row in rows),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
    }
    print(machine())
    print({key: value for key, value in figures.items() if key != "rows"})
    write_json(Path(options.output), figures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of cases, separated by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep-freed", action="store_true", help="leave glibc's malloc as it is")
    parser.add_argument("--output", default="runs/benchmarks/plan_accuracy.json")
    return parser.parse_args()


def _return_freed_memory() -> bool:
    """Whether the C library agreed to map every block of 128 KiB or more by itself."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, 2**17) == 1


def _compared(case: Case, device: torch.device) -> dict[str, Any]:
    with torch.device("meta"):
        shapes = LlamaForCausalLM(_config(case))
    start = time.perf_counter()
    plan = lora_da_core.estimate_memory(
        shapes.to(getattr(torch, case.dtype)),
        _lora(case),
        pipeline=_pipeline(case),
        workload=Workload(case.samples, case.length, batch_size=case.batch),
        device=device,
    )
    planned = time.perf_counter() - start
    model, batches = _model(case, device), _batches(case)
    seconds = plan.relative_time * plan.tokens / _throughput(case, model, batches)
    weights = next(row.bytes for row in plan.rows if row.what == "weights")
    predicted = plan.peak_bytes - weights
    start = time.perf_counter()
    measured, passes = _measured(case, model, batches)
    return {
        "weights": weights,
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "error_of_the_whole": (predicted + weights) / (measured + weights) - 1,
        "phases": {phase: size - weights for phase, size in plan.phases().items()},
        "predicted_seconds": seconds,
        "measured_seconds": passes,
        "error_of_time": seconds / passes - 1,
        "passes": plan.passes,
        "seconds_planning": planned,
        "seconds_run": time.perf_counter() - start,
    }


def _measured(case: Case, model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[int, float]:
    """Bytes that a run takes beyond the weights, and seconds of its passes."""
    pipeline, lora = _pipeline(case), _lora(case)
    with PeakMemory(model.device) as memory:
        report = pipeline.run(model, batches, lora).report
    return memory.peak, report.seconds["statistics"]


def _throughput(case: Case, model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Tokens per second of one pass over the first batch, every layer tapped."""
    pipeline, lora = _pipeline(case), _lora(case)
    found = []
    for _ in range(_THROUGHPUT_RUNS + 1):
        seconds = pipeline.estimate(model, batches[:1], lora).seconds["statistics"]
        found.append(pipeline.components.estimator.passes * batches[0]["input_ids"].numel() / seconds)
    return statistics.median(found[1:])


def _model(case: Case, device: torch.device) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(_config(case)).to(device, getattr(torch, case.dtype))


def _batches(case: Case) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, case.vocabulary, (case.samples, case.length), generator=torch.Generator().manual_seed(0))
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(case.batch)
    ]
    for batch in batches:
        batch["attention_mask"][0, -1] = 0  # padding, so that attention takes a mask
    return batches


def _config(case: Case) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.inner,
        num_hidden_layers=case.blocks,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        vocab_size=case.vocabulary,
    )


def _lora(case: Case) -> LoraConfig:
    return LoraConfig(r=case.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def _pipeline(case: Case) -> lora_da_core.Pipeline:
    config = lora_da_core.LoraDAConfig(
        scale=case.scale,  # type: ignore[arg-type]
        layers_per_pass=case.layers_per_pass,  # type: ignore[arg-type]
    )
    return lora_da_core.build_pipeline(case.estimator, case.solver, case.gradient, config=config)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:<26} predicted {row['predicted'] / MIB:7.0f} MiB, measured {row['measured'] / MIB:7.0f} MiB, "
        f"error {row['error']:+6.1%} (of the whole {row['error_of_the_whole']:+6.1%}); passes {row['passes']}, "
        f"predicted {row['predicted_seconds']:.1f} s, measured {row['measured_seconds']:.1f} s, error "
        f"{row['error_of_time']:+6.1%}; planned in {row['seconds_planning']:.1f} s, run in {row['seconds_run']:.1f} s"
    )


if __name__ == "__main__":
    main()
