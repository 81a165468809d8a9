"""Fine-tunes a model from LoRA-DA's start with a trainer-side plugin: an optimizer, a chain of adapters, or a penalty.

The plugin is made from the registry by its name and attached to the trainer before it trains; without --model and
--data, the demo model and data.

    python examples/train_with_plugin.py --plugin odelora|riemannion|rac_lora|laplace [--steps 12] [--samples 32]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from demo_model import demo_model
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

import lora_da_core
from lora_da_core import data, models

HERE = Path(__file__).parent
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
PLUGINS: dict[str, tuple[dict[str, Any], float]] = {
    "odelora": ({"method": "euler"}, 0.3),
    "riemannion": ({}, 0.03),
    "rac_lora": ({"every": 4, "sampled": "A"}, 1e-2),
    "laplace": ({"strength": 1e4}, 1e-3),
}
"""Options and learning rate."""


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, prints the losses and returns them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin", choices=sorted(PLUGINS), required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "word_problems.jsonl")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--output", default="runs/plugin")
    options = parser.parse_args(arguments)
    loaded = models.load_model(options.model or demo_model(), device="cpu")
    padding = loaded.tokenizer.pad_token_id
    samples = data.encode_text(data.load_rows(options.data), loaded.tokenizer).samples
    read = data.batches(samples[: options.samples], pad_token_id=padding)
    model = lora_da_core.get_lora_da_model(loaded.model, LoraConfig(**LORA), read)
    settings, rate = PLUGINS[options.plugin]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=4, learning_rate=rate,
            logging_steps=1, save_strategy="no", report_to=[], seed=0, disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=list(samples),
        data_collator=lambda rows: data.batches(rows, pad_token_id=padding, batch_size=len(rows))[0],
    )  # fmt: skip
    if options.plugin == "laplace":
        penalty = lora_da_core.penalty_of(model, ("laplace", settings), read)
        lora_da_core.regularize_training(trainer, penalty)
    else:
        lora_da_core.trainer_plugin((options.plugin, settings)).attach(trainer)
    with torch.random.fork_rng():
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{options.plugin}: first loss {float(losses[0]):.3f}, last {float(losses[-1]):.3f}")
    return losses


if __name__ == "__main__":
    main()
