"""Llamas of given shapes with random bf16 weights, and the options that give the shapes: Llama-2-7B's by default."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `random_llama` reads."""
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)


def random_llama(options: argparse.Namespace, device: torch.device | str) -> Any:
    """The model, made on its device with seed 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 128),
        vocab_size=options.vocabulary,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)
