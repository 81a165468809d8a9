"""One process against the processes of a launcher, on Llama-2-7B shapes: seconds, peak memory, equal sums and factors.

Random bf16 weights and texts. In turns rank 0 runs alone while the others wait, and all run together, each with the
whole model. The sums of both are compared layer by layer, and the factors. Then FSDP2 shards the model, and all run
again.

    torchrun --nproc-per-node 2 -m benchmarks.distributed [--layers 32] [--samples 256] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_da_core
from benchmarks.llama_shapes import LINEAR, add_shape_options, random_llama
from benchmarks.machine import machine, write_json
from benchmarks.phases import wait
from lora_da_core.distributed import launched

GIB = 2**30
TIMEOUT = 900.0
"""Seconds that a process waits for the others, rank 0's lone run included."""


def main() -> None:
    """Measures; rank 0 prints and writes."""
    options = _options()
    with launched(TIMEOUT) as device:
        figures = _figures(options, torch.device(options.device if device is None else device))
        if dist.get_rank() == 0:
            write_json(Path(options.output), figures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=224, help="of the longest sample")
    parser.add_argument("--batch", type=int, default=16, help="samples of a batch")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="runs/benchmarks/distributed.json")
    return parser.parse_args()


def _figures(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    size = dist.get_world_size()
    model, batches = random_llama(options, device), _batches(options)
    lora = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=LINEAR, task_type="CAUSAL_LM")
    together = lora_da_core.build_pipeline()
    together.config = replace(together.config, process_timeout=TIMEOUT)
    alone = lora_da_core.build_pipeline(config=replace(together.config, distributed="off"))
    figures: dict[str, Any] = {
        "processes": size,
        "layers": options.layers,
        "samples": options.samples,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "rows": {},
    }
    if dist.get_rank() == 0:
        print(machine(), flush=True)
    runs: dict[str, list[dict[str, Any]]] = {"one": [], "all": []}
    results: dict[str, Any] = {}
    # The first turn warms up, on two batches per process.
    for number in range(options.repetitions + 1):
        data = batches if number else batches[-2 * size :]
        for name, pipeline in (("one", alone), ("all", together)):
            dist.barrier()
            row, results[name] = _measured(pipeline, model, data, lora, takes_part=name == "all" or _first())
            if number:
                runs[name].append(row)
    for name, rows in runs.items():
        figures["rows"][name] = _middle(rows)
        if _first():
            print(f"{name}: {figures['rows'][name]}", flush=True)
    figures["speed_up"] = figures["rows"]["one"]["seconds"] / figures["rows"]["all"]["seconds"]
    figures["sums"] = _sum_differences(alone, together, model, batches, lora)
    sharded = _sharded(model, device)
    runs["sharded"] = []
    for number in range(options.repetitions + 1):
        row, results["sharded"] = _measured(together, sharded, batches if number else batches[-2 * size :], lora)
        runs["sharded"] += [row] if number else []
    figures["rows"]["sharded"] = _middle(runs["sharded"])
    if _first():
        print(f"sharded: {figures['rows']['sharded']}", flush=True)
        figures["factors"] = {name: _factor_differences(results["one"], results[name]) for name in ("all", "sharded")}
    return figures


def _middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    middle = sorted(rows, key=lambda row: row["seconds"])[len(rows) // 2]
    return {**middle, "all_seconds": [row["seconds"] for row in rows]}


def _first() -> bool:
    return dist.get_rank() == 0


def _sharded(model: Any, device: torch.device) -> Any:
    """The model, each block of which FSDP2 shards by itself."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _batches(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Random texts of half to all of `--tokens`; the first half of each is a prompt without labels."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for start in range(0, options.samples, options.batch):
        shape = (min(options.batch, options.samples - start), options.tokens)
        ids = torch.randint(0, options.vocabulary, shape, generator=generator)
        lengths = torch.randint(options.tokens // 2, options.tokens + 1, shape[:1], generator=generator)[:, None]
        places = torch.arange(options.tokens)[None]
        labels = ids.masked_fill((places < lengths // 2) | (places >= lengths), -100)
        batches.append({"input_ids": ids, "attention_mask": (places < lengths).long(), "labels": labels})
    return batches


def _measured(
    pipeline: Any, model: Any, batches: list[dict[str, Tensor]], lora: LoraConfig, *, takes_part: bool = True
) -> tuple[dict[str, Any], Any]:
    """Seconds until the last process is done, phases of rank 0, and the peak of every process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wait()
    dist.barrier()
    start = time.perf_counter()
    result = pipeline.run(model, batches, lora) if takes_part else None
    wait()
    dist.barrier()
    seconds = time.perf_counter() - start
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None)
    return {"seconds": seconds, "phases": dict(result.report.seconds) if result else {}, "peak_gib": peaks}, result


def _sum_differences(
    alone: Any, together: Any, model: Any, batches: list[dict[str, Tensor]], lora: LoraConfig
) -> dict[str, Any]:
    """How far sums of all processes lie from one's, relative to the largest of each tensor; on rank 0."""
    expected = {}
    if _first():
        expected = {name: value.cpu() for name, value in _sums(alone.estimate(model, batches, lora)).items()}
    gc.collect()
    dist.barrier()
    found = _sums(together.estimate(model, batches, lora))
    differences = {}
    for name, value in expected.items():
        mine = value.to(found[name].device)
        differences[name] = float((found[name] - mine).abs().max() / mine.abs().max())
    return _summary(differences)


def _sums(estimates: Any) -> dict[str, Tensor]:
    """Every sum, where it lies."""
    found = {}
    for name, layer in estimates.statistics.layers.items():
        parts = {"layer": layer.fisher.statistics(), "input": layer.group.accumulator.statistics()}
        for role, values in {**parts, "gradient": estimates.gradient_sums[name]}.items():
            if role != "input" or layer.group.leader == name:
                found.update({f"{name} {role} {key}": value for key, value in values.items()})
    return found


def _factor_differences(one: Any, all_: Any) -> dict[str, Any]:
    """How far B·A of all processes lies from one's, relative to its norm."""
    differences = {}
    for name, pair in one.factors.items():
        other = all_.factors[name]
        expected, found = (each.B.cpu().double() @ each.A.cpu().double() for each in (pair, other))
        differences[name] = float((found - expected).norm() / expected.norm())
    return _summary(differences)


def _summary(differences: dict[str, float]) -> dict[str, Any]:
    if not differences:
        return {}
    worst = max(differences, key=lambda name: differences[name])
    middle = statistics.median(differences.values())
    return {"compared": len(differences), "median": middle, "largest": differences[worst], "largest_in": worst}


if __name__ == "__main__":
    logging.getLogger("lora_da_core").setLevel(logging.ERROR)
    main()
