"""Trains on preferences with TRL's DPOTrainer from LoRA-DA's start, whose objective is then the trainer's DPO loss.

The pairs are made from the demo data: an answer with its working is preferred to its last line, the bare result. Where
policy and reference agree, as at the default start, DPO's loss is log 2 = 0.693; a lower first loss is the start's.

    python examples/dpo_trl.py [--steps 10] [--samples 32] [--model DIR] [--data FILE] [--output runs/dpo_trl]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from demo_model import demo_model
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import lora_da_core
from lora_da_core import data, models

HERE = Path(__file__).parent
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, saves the adapter, and returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "word_problems.jsonl")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/dpo_trl"))
    options = parser.parse_args(arguments)
    loaded = models.load_model(options.model or demo_model(), device="cpu")
    rows = data.load_rows(str(options.data))
    pairs = [
        {"prompt": row["question"] + "\n", "chosen": row["answer"], "rejected": row["answer"].splitlines()[-1]}
        for row in rows
        if "\n" in row["answer"]
    ]
    trainer = DPOTrainer(
        loaded.model,
        args=DPOConfig(
            output_dir=str(options.output), max_steps=options.steps, per_device_train_batch_size=4, learning_rate=1e-4,
            max_length=256, logging_steps=1, save_strategy="no", report_to=[], seed=0, disable_tqdm=True, use_cpu=True,
            bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    lora_da_core.init_before_training(trainer, samples=options.samples)
    trainer.train()
    trainer.save_model()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(f"first loss {losses[0]:.3f}, last {losses[-1]:.3f}; adapter: {options.output}")
    return losses


if __name__ == "__main__":
    main()
