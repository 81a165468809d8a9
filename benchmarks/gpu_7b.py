"""LoRA-DA on Llama-2-7B shapes against PEFT's LoRA-GA, in one process on one GPU.

Random bf16 weights, 256 samples of about 194 tokens, r = 8, all 224 linear layers, batch 16. Every program is
warmed up on two batches, then timed `--repetitions` times; medians are reported. The check: sampled layers'
subspaces against a dense float64 eigen-decomposition.

    python -m benchmarks.gpu_7b [--layers 32] [--samples 256] [--repetitions 3] [--output runs/benchmarks/gpu_7b.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import LlamaConfig, LlamaForCausalLM

import lora_da_core
from benchmarks.machine import machine, write_json

GIB = 2**30
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Measures and prints."""
    options = _options()
    model = _model(options.layers)
    batches = _batches(options.samples, options.batch_size)
    warm_up = batches[-2:]
    # By name: PEFT's LoRA-GA does not know "all-linear".
    lora = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=list(LINEAR), task_type="CAUSAL_LM")
    rows = {}
    for name, program in _programs(model, lora).items():
        program(warm_up)
        runs = [_measured(program, batches) for _ in range(options.repetitions)]
        rows[name] = _summary(runs)
        print(f"{name}: {rows[name]}", flush=True)
    reference = rows["peft lora_ga"]["seconds"]
    figures = {
        "layers": options.layers,
        "samples": options.samples,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "repetitions": options.repetitions,
        "rows": rows,
        "ratio_to_lora_ga": {name: row["seconds"] / reference for name, row in rows.items()},
        "largest_angle": _check(model, batches[:4], lora),
    }
    print(machine())
    print({key: value for key, value in figures.items() if key != "rows"})
    write_json(Path(options.output), figures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", default="runs/benchmarks/gpu_7b.json")
    return parser.parse_args()


def _model(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(previous)


def _batches(samples: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Length-sorted random samples of 100 to 288 tokens; the first half of each is a prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 289, (samples,), generator=generator).sort().values.tolist()
    batches = []
    for start in range(0, samples, batch_size):
        chunk = lengths[start : start + batch_size]
        ids = torch.randint(0, 32000, (len(chunk), max(chunk)), generator=generator)
        mask = torch.arange(max(chunk))[None] < torch.tensor(chunk)[:, None]
        prompt = torch.arange(max(chunk))[None] < torch.tensor(chunk)[:, None] // 2
        labels = ids.masked_fill(~mask | prompt, -100)
        batches.append({"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels})
    return batches


def _programs(model: Any, lora: LoraConfig) -> dict[str, Callable[[Any], Any]]:
    paper = lora_da_core.build_pipeline(preset="paper")
    robust = lora_da_core.build_pipeline()
    fixed = lora_da_core.build_pipeline(config=dataclasses.replace(robust.config, scale="fixed"))

    def lora_ga(batches: Any) -> None:
        config = dataclasses.replace(lora, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

        def step() -> None:
            for batch in batches:
                on_device = {key: value.cuda() for key, value in batch.items()}
                model(**on_device, use_cache=False).loss.backward()

        preprocess_loraga(model, config, step)
        get_peft_model(model, config).unload()
        for module in model.modules():
            for name in [name for name in vars(module) if name.startswith("_peft_loraga")]:
                delattr(module, name)

    return {
        "peft lora_ga": lora_ga,
        "lora_da robust, fixed scale": lambda batches: fixed.run(model, batches, lora).report,
        "lora_da robust": lambda batches: robust.run(model, batches, lora).report,
        "lora_da paper": lambda batches: paper.run(model, batches, lora).report,
    }


def _measured(program: Callable[[Any], Any], batches: Any) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    report = program(batches)
    torch.cuda.synchronize()
    row = {"seconds": time.perf_counter() - start, "peak_gib": torch.cuda.max_memory_allocated() / GIB}
    if report is not None:
        row["phases"] = dict(report.seconds)
        row["converged"] = sum(layer.converged for layer in report.layers)
        row["residual"] = max(layer.residual for layer in report.layers)
    return row


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    return {**middle, "all_seconds": [run["seconds"] for run in runs], "spread": _spread(runs)}


def _spread(runs: list[dict[str, Any]]) -> float:
    seconds = [run["seconds"] for run in runs]
    return statistics.pstdev(seconds) / statistics.mean(seconds)


def _check(model: Any, batches: Any, lora: LoraConfig) -> dict[str, float]:
    """Largest sine between a solver's subspace and dense float64 eigh, on the first block's layers."""
    config = lora_da_core.LoraDAConfig(scale="fixed")
    some = dataclasses.replace(lora, target_modules=r".*layers\.0\..*(q|o|down)_proj")
    automatic = lora_da_core.build_pipeline(config=config)
    estimates = automatic.estimate(model, batches, some)
    exact = lora_da_core.build_pipeline(solver="eigh", config=config).solve(estimates)
    angles = {}
    for name, pair in automatic.solve(estimates).factors.items():
        ours, theirs = (torch.linalg.qr(p.A.double().mT)[0] for p in (pair, exact.factors[name]))
        angles[name] = float(torch.linalg.matrix_norm(ours - theirs @ (theirs.mT @ ours), 2))
    return angles


if __name__ == "__main__":
    main()
