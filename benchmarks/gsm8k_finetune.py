"""Held-out loss of fine-tunes from several starts: SmolLM2-135M on GSM8K problems.

Rows 0 to 799 train, the rest is held out; the loss is on answer tokens, in nats.

Every method sees the same batches per seed; rates and seeds are crossed. Runs are dealt over `--shards` processes, so
that one GPU is kept busy: start one process per `--shard`, each appends to its own file.

    python -m benchmarks.gsm8k_finetune --model MODEL.gguf --data problems.jsonl --output DIR [--shard 0 --shards 4]
    python -m benchmarks.gsm8k_finetune --summarise DIR
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats

import lora_da_core
from benchmarks.machine import machine
from lora_da_core import LoraDAConfig, data, models
from lora_da_core.ablation.finetune import TrainingData, finetune, seeded
from lora_da_core.ablation.grid import FinetuneSettings

TRAIN_ROWS = 800
STEPS, BATCH, EVALUATIONS = 75, 32, (0, 5, 10, 20, 30, 45, 60, 75)
RATES = (5e-4, 1e-3, 2e-3, 3e-3)
SEEDS = (0, 1, 2)
METHODS: dict[str, tuple[Any, LoraDAConfig, int] | None] = {
    "default LoRA": None,
    "robust": (("kfac", {}), LoraDAConfig(), 256),
    "robust, 64 samples": (("kfac", {}), LoraDAConfig(), 64),
    "kfac, damping 1": (("kfac", {}), LoraDAConfig(damping=1.0), 256),
    "ekfac, damping 1": (("ekfac", {}), LoraDAConfig(damping=1.0), 256),
    "identity (gradient SVD)": (("identity", {}), LoraDAConfig(), 256),
}


def main() -> None:
    """Runs a shard, or summarises all of them."""
    options = _options()
    if options.summarise:
        _summarise(Path(options.summarise))
        return
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    Path(options.output).mkdir(parents=True, exist_ok=True)
    loaded = models.load_model(options.model, dtype="float32")
    rows = [json.loads(line) for line in Path(options.data).read_text().splitlines()]
    encoded = data.encode_text(rows, loaded.tokenizer).samples
    model, padding = loaded.model, loaded.tokenizer.pad_token_id
    held_out = data.batches(encoded[TRAIN_ROWS:], pad_token_id=padding, batch_size=50)
    settings = FinetuneSettings(steps=STEPS, learning_rates=RATES, eval_steps=EVALUATIONS, batch_size=BATCH)
    cells = list(itertools.product(SEEDS, METHODS))[options.shard :: options.shards]
    with (Path(options.output) / f"shard{options.shard}.jsonl").open("w") as file:
        for seed, method in cells:
            order = torch.randperm(TRAIN_ROWS, generator=torch.Generator().manual_seed(seed)).tolist()
            training = TrainingData([encoded[row] for row in order], held_out, padding, seed)
            start = time.perf_counter()
            peft_model = _start(method, model, training)
            init_seconds = time.perf_counter() - start
            first = {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}
            for rate in RATES:
                for name, parameter in peft_model.named_parameters():
                    if name in first:
                        parameter.data.copy_(first[name])
                curve = finetune(peft_model, training, settings, rate)
                record = {"method": method, "seed": seed, "rate": rate, "init_seconds": init_seconds}
                file.write(json.dumps({**record, "losses": curve.losses, "seconds": curve.seconds}) + "\n")
                file.flush()
                print(method, seed, rate, [round(loss, 4) for loss in curve.losses], round(curve.seconds), flush=True)
            model = peft_model.unload()


def _start(method: str, model: Any, training: TrainingData) -> Any:
    lora = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    chosen = METHODS[method]
    with seeded(training.seed, next(model.parameters()).device):
        if chosen is None:
            return get_peft_model(model, lora)
        estimator, config, samples = chosen
        batches = data.batches(training.samples[:samples], pad_token_id=training.pad_token_id, batch_size=32)
        pipeline = lora_da_core.build_pipeline(estimator=estimator, config=config)
        return lora_da_core.get_lora_da_model(model, lora, batches, pipeline=pipeline)


def _summarise(directory: Path) -> None:
    """Per method and rate the mean curve, and at its best rate the paired difference to default LoRA."""
    records = [json.loads(line) for path in directory.glob("shard*.jsonl") for line in path.read_text().splitlines()]
    curves = {(r["method"], r["rate"], r["seed"]): r["losses"] for r in records}
    found = {(method, rate): _stack(curves, method, rate) for method in METHODS for rate in RATES}
    found = {key: value for key, value in found.items() if len(value)}
    print(f"held-out loss at steps {EVALUATIONS}, mean over seeds {SEEDS}; {machine()}")
    for (method, rate), losses in found.items():
        shown = " ".join(f"{loss:.4f}" for loss in losses.mean(0))
        print(f"{method:26s} {rate:.0e}  {shown}  (sd {losses[:, -1].std(ddof=1):.4f})")
    best = {
        method: min((key for key in found if key[0] == method), key=lambda key: found[key][:, -1].mean())
        for method in METHODS
        if any(key[0] == method for key in found)
    }
    reference = found[best["default LoRA"]][:, -1]
    for method, key in best.items():
        difference = found[key][:, -1] - reference
        half = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
        print(f"{method:26s} best rate {key[1]:.0e}: final against default LoRA {difference.mean():+.4f} ± {half:.4f}")
    (directory / "results.json").write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")


def _stack(curves: dict[tuple[str, float, int], list[float]], method: str, rate: float) -> np.ndarray:
    return np.array([curves[method, rate, seed] for seed in SEEDS if (method, rate, seed) in curves])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--output", default="runs/benchmarks/gsm8k_finetune")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--summarise", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
