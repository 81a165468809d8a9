"""Initialises an adapter and trains it in a loop of one's own with accelerate, alone or on several processes.

All processes are given the same first samples and share the computing of the start, before the model is prepared;
accelerate then shards the batches. Without options, the demo model and data.

    python examples/accelerate_loop.py [--steps 10] [--samples 32] [--model DIR] [--data FILE] [--output DIR]
"""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from demo_model import demo_model
from peft import LoraConfig
from torch.utils.data import DataLoader

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
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate_loop"))
    options = parser.parse_args(arguments)
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    loaded = models.load_model(options.model or demo_model(), device="cpu")
    padding = loaded.tokenizer.pad_token_id
    samples = data.encode_text(data.load_rows(str(options.data)), loaded.tokenizer).samples
    read = data.batches(samples[: options.samples], pad_token_id=padding)
    model = lora_da_core.get_lora_da_model(loaded.model, LoraConfig(**LORA), read).train()
    loader = DataLoader(
        list(samples), batch_size=4, shuffle=True,
        collate_fn=lambda rows: data.batches(rows, pad_token_id=padding, batch_size=len(rows))[0],
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in islice(chain.from_iterable(repeat(loader)), options.steps):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output)
    accelerator.print(f"first loss {losses[0]:.3f}, last {losses[-1]:.3f}; adapter: {options.output}")
    return losses


if __name__ == "__main__":
    main()
