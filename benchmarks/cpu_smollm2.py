"""Time of an initialisation over one plain forward and backward pass with weight gradients of the same batches.

Both run alternately in one process on the same model and batches; the ratio's median is reported, with the
statistics, solve and scale phases apart, the fixed scale apart from the automatic one. The peak of memory is
that of the run with a fixed scale; what the process held before it, but for the weights, is not counted.

    python -m benchmarks.cpu_smollm2 --model MODEL.gguf --data problems.jsonl [--samples 256] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_da_core
from benchmarks.machine import machine, write_json
from lora_da_core import adapter, data, models
from lora_da_core.ablation.memory import PeakMemory
from lora_da_core.batches import batch_tokens_on

MIB = 2**20


def main() -> None:
    """Measures and prints."""
    options = _options()
    loaded = models.load_model(options.model, device=options.device)
    text = data.encode_text(
        data.load_rows(options.data), loaded.tokenizer, data.TextOptions(samples=options.samples, seed=0)
    )
    batches = data.batches(
        text.samples,
        pad_token_id=loaded.tokenizer.pad_token_id,
        tokens_per_batch=batch_tokens_on(torch.device(options.device)),
    )
    lora = adapter.lora_config(
        rank=options.rank,
        lora_alpha=16,
        use_rslora=True,
        target_modules="all-linear",
        exclude_modules=None,
        task_type="CAUSAL_LM",
    )
    automatic = lora_da_core.build_pipeline(solver=options.solver)
    fixed = lora_da_core.build_pipeline(
        solver=options.solver, config=dataclasses.replace(automatic.config, scale="fixed")
    )
    rows: list[dict[str, Any]] = []
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    peak = 0
    for repetition in range(options.repetitions):
        plain, _ = _timed(_forward_backward, loaded.model, batches)
        total, result = _timed(automatic.run, loaded.model, batches, lora)
        with PeakMemory(torch.device(options.device)) as memory:
            fixed_total, _ = _timed(fixed.run, loaded.model, batches, lora)
        peak = max(peak, memory.peak)
        report = result.report
        rows.append({"plain": plain, "automatic": total, "fixed": fixed_total, "phases": dict(report.seconds)})
        print(
            f"{repetition}: plain {plain:.1f} s, automatic {total:.1f} s ({total / plain:.2f}×), "
            f"fixed {fixed_total:.1f} s ({fixed_total / plain:.2f}×), phases "
            + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
        )
    figures = {
        "samples": options.samples,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "rank": options.rank,
        "weights_mib": weights / MIB,
        "peak_mib": (peak + weights) / MIB,
        "seed": 0,
        "rows": rows,
        "ratio_automatic": statistics.median(row["automatic"] / row["plain"] for row in rows),
        "ratio_fixed": statistics.median(row["fixed"] / row["plain"] for row in rows),
        "worst_residual": max(layer.residual for layer in report.layers),
        "converged": sum(layer.converged for layer in report.layers),
        "layers": len(report.layers),
        "scale": dict(report.scale),
        "base_loss": report.loss,
    }
    print(machine())
    print(
        f"median ratio: automatic {figures['ratio_automatic']:.2f}, fixed {figures['ratio_fixed']:.2f}; "
        f"{figures['converged']} of {figures['layers']} layers converged, "
        f"worst residual {figures['worst_residual']:.1e} of ‖Ω‖"
    )
    print(f"weights {figures['weights_mib']:.0f} MiB, peak of weights and run {figures['peak_mib']:.0f} MiB")
    write_json(Path(options.output), figures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", default="runs/benchmarks/cpu_smollm2.json")
    return parser.parse_args()


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    outcome = work(*arguments)
    return time.perf_counter() - start, outcome


def _forward_backward(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """One pass with gradients of all targeted weights, by the model's own loss."""
    model.eval()
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
    for weight in weights:
        weight.grad = None
        weight.requires_grad_(False)


if __name__ == "__main__":
    main()
