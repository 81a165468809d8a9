"""What it costs to keep sums elsewhere: one run with them on the device, on the host and on disk, and what was planned.

Each place is run once to warm up and then timed; memory is what the run takes beyond the weights, on the device and,
for a GPU, as growth of the resident set on the host. The sums of all places are compared bit by bit with those on the
device, the factors by B·A with those of the first warm-up: the first row says how far two runs alike are apart.

    python -m benchmarks.statistics_device [--layers 8] [--estimator kfac] [--places device,host,disk]
        [--max-memory SIZE,…] [--offload-dir DIR] [--device cuda] [--output FILE.json]

`--max-memory` adds runs within limits, whose place and number of passes the plan chooses.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

import lora_da_core
from benchmarks.llama_shapes import LINEAR, add_shape_options, random_llama
from benchmarks.machine import machine, write_json
from lora_da_core.ablation.memory import PeakMemory
from lora_da_core.budget import workload_of

MIB = 2**20


def main() -> None:
    """Measures and prints."""
    options = _options()
    device = torch.device(options.device)
    model, batches = random_llama(options, device), _batches(options)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    runs = [(place, None) for place in options.places] + [("auto", limit) for limit in options.max_memory]
    rows: list[dict[str, Any]] = []
    first: Any = None
    for place, limit in runs:
        row, warm_up, found = _measured(options, model, batches, lora, place, limit)
        first = first or warm_up
        row["largest_difference"] = _difference(first, found)
        if limit is None:
            row["same_sums"] = _same_sums(options, model, batches, lora, place)
        rows.append(row)
        print(_line(row), flush=True)
    print(machine())
    write_json(Path(options.output), {"rows": rows})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser)
    parser.set_defaults(layers=8)
    parser.add_argument("--estimator", default="kfac")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="samples in a batch")
    parser.add_argument("--places", type=lambda text: text.split(","), default=["device", "host", "disk"])
    parser.add_argument("--max-memory", type=lambda text: text.split(","), default=[])
    parser.add_argument("--offload-dir", default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="runs/benchmarks/statistics_device.json")
    return parser.parse_args()


def _measured(
    options: argparse.Namespace, model: Any, batches: Any, lora: LoraConfig, place: Any, limit: str | None
) -> tuple[dict[str, Any], Any, Any]:
    pipeline = _pipeline(options, place)
    plan = lora_da_core.estimate_memory(model, lora, pipeline=pipeline, workload=workload_of(batches), max_memory=limit)

    def run() -> Any:
        return pipeline.run(model, batches, lora, max_memory=limit, offload_dir=options.offload_dir)

    warm_up = run()
    start = time.perf_counter()
    with PeakMemory(model.device) as memory, PeakMemory(torch.device("cpu")) as host:
        result = run()
    return (
        {
            "place": place,
            "limit": limit,
            "planned_place": plan.statistics_device,
            "passes": plan.passes,
            "batch_tokens": plan.batch_tokens,
            "seconds": time.perf_counter() - start,
            "seconds_statistics": result.report.seconds["statistics"],
            "seconds_solve": result.report.seconds["solve"],
            "planned_relative_time": plan.relative_time,
            "peak": memory.peak,
            "planned_peak": plan.peak_bytes - plan.weights,
            "error": (plan.peak_bytes - plan.weights) / max(1, memory.peak) - 1,
            "host_growth": host.peak,
            "statistics": plan.statistics_bytes,
            "offloaded": plan.offloaded_bytes,
        },
        warm_up.factors,
        result.factors,
    )


def _pipeline(options: argparse.Namespace, place: Any) -> Any:
    base = lora_da_core.build_pipeline().config
    config = dataclasses.replace(base, scale="fixed", token_mask="attention", statistics_device=place)
    return lora_da_core.build_pipeline(options.estimator, config=config)


def _batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    shape = (options.samples, options.length)
    ids = torch.randint(0, options.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in ids.split(options.batch)
    ]
    for batch in batches:
        batch["attention_mask"][0, -1] = 0  # padding, so that attention takes a mask
    return batches


def _same_sums(options: argparse.Namespace, model: Any, batches: Any, lora: LoraConfig, place: Any) -> bool:
    """Whether the gradients and the Fisher's statistics of all layers are those of sums on the device, to the bit."""
    kept, moved = (
        _pipeline(options, each).estimate(model, batches, lora, offload_dir=options.offload_dir)
        for each in ("device", place)
    )

    def sums(estimates: Any, spec: Any) -> list[torch.Tensor]:
        of_layer = estimates.statistics.of_layer(spec.name)
        found = [estimates.gradient_sums[spec.name], of_layer.input, of_layer.layer]
        return [tensor for tensors in found for _, tensor in sorted(tensors.items())]

    return all(
        torch.equal(one, other)
        for spec in kept.task.specs
        for one, other in zip(sums(kept, spec), sums(moved, spec), strict=True)
    )


def _difference(one: Any, other: Any) -> float:
    """The largest ‖B·A − B′·A′‖ of a layer, relative to ‖B·A‖."""

    def of(name: str) -> float:
        product, another = (each[name].B.double() @ each[name].A.double() for each in (one, other))
        return float((product - another).norm() / product.norm())

    return max(of(name) for name in one)


def _line(row: dict[str, Any]) -> str:
    where = row["place"] if row["limit"] is None else f"within {row['limit']}: {row['planned_place']}"
    return (
        f"{where:<24} {row['seconds']:7.1f} s (statistics {row['seconds_statistics']:.1f}, solve "
        f"{row['seconds_solve']:.1f}), passes {row['passes']}, peak {row['peak'] / MIB:.0f} MiB for "
        f"{row['planned_peak'] / MIB:.0f} planned ({row['error']:+.1%}), host +{row['host_growth'] / MIB:.0f} MiB; "
        f"planned time {row['planned_relative_time']:.2f} passes; same sums {row.get('same_sums', 'not compared')}, "
        f"B·A differs by {row['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
