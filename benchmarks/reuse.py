"""Time of an initialisation from stored statistics over the time of one that makes them.

A repetition starts with an empty cache: the first run makes and stores the statistics, the second changes rank,
damping and γ and reads them. Both are at a fixed scale, in one process, on a model and batches that are loaded already.
At the end the second run is repeated without a cache: its factors must have the same bytes.

    python -m benchmarks.reuse --model MODEL --data problems.jsonl [--samples 256] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_da_core
from benchmarks.machine import machine, write_json
from lora_da_core import adapter, data, models


def main() -> None:
    """Measures and prints."""
    options = _options()
    loaded = models.load_model(options.model, device=options.device)
    text = data.encode_text(
        data.load_rows(options.data), loaded.tokenizer, data.TextOptions(samples=options.samples, seed=0)
    )
    batches = data.batches(text.samples, pad_token_id=loaded.tokenizer.pad_token_id)
    base = lora_da_core.build_pipeline(preset=options.preset)
    first = lora_da_core.build_pipeline(
        preset=options.preset, config=dataclasses.replace(base.config, scale="fixed", gamma=1024.0)
    )
    second = lora_da_core.build_pipeline(
        preset=options.preset, config=dataclasses.replace(first.config, gamma=256.0, damping=base.config.damping * 2)
    )

    def run(pipeline: lora_da_core.Pipeline, rank: int, cache_dir: str | None) -> lora_da_core.LoraDAResult:
        return pipeline.run(loaded.model, batches, _lora(rank), cache_dir=cache_dir)

    rows: list[dict[str, Any]] = []
    for repetition in range(options.repetitions):
        with tempfile.TemporaryDirectory(dir=options.cache_parent) as cache_dir:
            made, _ = _timed(run, first, options.rank, cache_dir)
            with _counted(loaded.model) as forwards:
                reused, result = _timed(run, second, options.second_rank, cache_dir)
            stored = sum(path.stat().st_size for path in Path(cache_dir).rglob("*") if path.is_file())
        row = {"first": made, "second": reused, "forwards": len(forwards), "stored_bytes": stored}
        rows.append({**row, "phases": dict(result.report.seconds)})
        print(
            f"{repetition}: first {made:.1f} s, second {reused:.1f} s ({reused / made:.3f}×), "
            f"{len(forwards)} forward passes, {stored / 2**20:.0f} MiB stored"
        )
    plain, expected = _timed(run, second, options.second_rank, None)
    figures = {
        "samples": options.samples,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "ranks": [options.rank, options.second_rank],
        "preset": options.preset,
        "seed": 0,
        "rows": rows,
        "without_cache": plain,
        "ratio": statistics.median(row["second"] / row["first"] for row in rows),
        "ratio_without_cache": statistics.median(row["second"] for row in rows) / plain,
        "equal_bytes": _digests(result) == _digests(expected),
        "layers": len(expected.report.layers),
    }
    print(machine())
    print(
        f"median ratio {figures['ratio']:.3f}; {figures['ratio_without_cache']:.3f} of the same run without a cache; "
        f"{'equal' if figures['equal_bytes'] else 'DIFFERENT'} bytes in {figures['layers']} layers"
    )
    write_json(Path(options.output), figures)
    if not figures["equal_bytes"] or any(row["forwards"] for row in rows):
        raise SystemExit("the second run is not the same as one without a cache")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--second-rank", type=int, default=16)
    parser.add_argument("--preset", default="robust")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cache-parent", help="where the caches are made and removed; default: the temporary files'")
    parser.add_argument("--output", default="runs/benchmarks/reuse.json")
    return parser.parse_args()


def _lora(rank: int) -> Any:
    return adapter.lora_config(
        rank=rank,
        lora_alpha=16,
        use_rslora=True,
        target_modules="all-linear",
        exclude_modules=None,
        task_type="CAUSAL_LM",
    )


def _timed(work: Callable[..., lora_da_core.LoraDAResult], *arguments: Any) -> tuple[float, lora_da_core.LoraDAResult]:
    start = time.perf_counter()
    outcome = work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, outcome


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[None]]:
    """One entry per forward pass of the model."""
    forwards: list[None] = []
    handle = model.register_forward_hook(lambda *_: forwards.append(None))
    try:
        yield forwards
    finally:
        handle.remove()


def _digests(result: lora_da_core.LoraDAResult) -> list[tuple[str, str]]:
    return [(layer.digest_A, layer.digest_B) for layer in result.report.layers]


if __name__ == "__main__":
    main()
