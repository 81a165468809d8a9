"""A task with a right answer, for `exact_match_reward.py`: a small Llama that has learnt to reverse three symbols.

A disturbance of rank one in its head makes it fail often.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SYMBOLS, LENGTH = 12, 3
DISTURBANCE = 1.0
"""Norm of the change, relative to the head's."""
Batch = dict[str, Tensor]


def batches(count: int, seed: int, size: int = 32) -> list[Batch]:
    """Three symbols and the same reversed; the second half has labels."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        symbols = torch.randint(SYMBOLS, (size, LENGTH), generator=draw)
        ids = torch.cat([symbols, symbols.flip(1)], 1)
        labels = ids.clone()
        labels[:, :LENGTH] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def disturbed(seed: int) -> LlamaForCausalLM:
    """A small Llama that has learnt the task, with a random change of rank one in its head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = LlamaConfig(
            vocab_size=SYMBOLS, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(shape)
        change = torch.outer(torch.randn(SYMBOLS), torch.randn(24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches(400, seed + 100, 64):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    weight = model.lm_head.weight.data
    weight += DISTURBANCE * weight.norm() / change.norm() * change
    return model
