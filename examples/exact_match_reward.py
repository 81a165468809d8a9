"""Initialises an adapter from a reward that has no derivative: 1 where every answer token is right, 0 otherwise.

A small Llama has learnt to reverse three symbols, and a disturbance of rank one in its head makes it fail often. The
smoothed objective's gradient, by forward passes alone, gives the step; the reward on samples that nothing was estimated
from is printed before and after it.

The disturbance's size and the step's fixed norm were selected with seeds 0 to 2 on the same samples that are reported
here. With seeds 10 to 14, which were not looked at before, the reward rose from .539, .674, .423, .691 and .207 to
.644, .783, .447, .716 and .250.

    python examples/exact_match_reward.py [--probes 2000] [--smoothing 0.05] [--seed 0]
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig
from reversal_task import Batch, batches, disturbed
from torch import Tensor, nn

import lora_da_core
from lora_da_core import LoraDAConfig


def misses(model: nn.Module, batch: Batch) -> Tensor:
    """1 − the exact match of each sample, (samples,): the loss whose smoothed gradient is taken."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    right = (logits.argmax(-1) == labels) | (labels == -100)
    return 1.0 - right.all(1).float()


def reward(model: nn.Module, data: list[Batch]) -> float:
    """Share of samples that match."""
    model.eval()
    with torch.no_grad():
        return 1.0 - float(torch.cat([misses(model, batch) for batch in data]).mean())


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Prints and returns the reward on unseen samples, before and after the initialisation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=2000)
    parser.add_argument("--smoothing", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model, unseen = disturbed(options.seed), batches(2, options.seed + 300, 512)
    before = reward(model, unseen)
    pipeline = lora_da_core.build_pipeline(
        estimator="identity",
        gradient=("smoothed", {"probes": options.probes, "smoothing": options.smoothing}),
        objective=misses,
        # A line search reads too few samples for a reward of 0 or 1: the step's norm is given, half of 1.
        config=LoraDAConfig(beta=0.0, balance="norm", scale="product", gamma=2.0, seed=options.seed),
    )
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["lm_head"])
    wrapped = lora_da_core.get_lora_da_model(model, lora, batches(1, options.seed + 200, 256), pipeline=pipeline)
    after = reward(wrapped, unseen)
    count = sum(len(batch["labels"]) for batch in unseen)
    print(f"exact match on {count} unseen samples: {before:.3f} before, {after:.3f} after the initialisation")
    return before, after


if __name__ == "__main__":
    main()
