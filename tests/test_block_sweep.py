"""One sweep over blocks: the sums of one ordinary pass, and passes where a model does not run block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn

import lora_da_core
import tiny_models
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, capture
from lora_da_core.block_sweep import BlockSweep, fault
from lora_da_core.blocks import find_blocks
from lora_da_core.capture import CaptureTask

FIXED = LoraDAConfig(gamma=64.0)


def task_of(model: nn.Module, batches: Any, targets: Any = "all-linear", **parts: Any) -> CaptureTask:
    settings = {"r": 2, "target_modules": targets}
    settings.update(parts.pop("lora", {}))
    pipeline = lora_da_core.build_pipeline(config=FIXED, **parts)
    return pipeline.estimate(model, batches, LoraConfig(**settings)).task


def parts_of(task: CaptureTask, size: int = 1) -> list[list[str]]:
    """So many blocks in every part, the last first; what follows them goes with the last."""
    blocks = find_blocks(task.model, {spec.name: task.modules[spec.name] for spec in task.specs})
    assert blocks is not None
    count = len(blocks.modules)
    numbers = {spec.name: min(blocks.numbers.get(spec.name, count), count - 1) // size for spec in task.specs}
    return [[name for name in numbers if numbers[name] == each] for each in sorted(set(numbers.values()), reverse=True)]


def sums(statistics: Any) -> dict[str, dict[str, Tensor]]:
    return {
        name: {
            **{f"layer {key}": value for key, value in layer.fisher.statistics().items()},
            **{f"input {key}": value for key, value in layer.group.accumulator.statistics().items()},
            **{f"gradient {key}": value for key, value in layer.gradient.statistics().items()},
            "tokens": torch.tensor(layer.tokens),
        }
        for name, layer in statistics.layers.items()
        if layer.group is not None
    }


def swept(task: CaptureTask, batches: Any, parts: Sequence[Sequence[str]]) -> dict[str, dict[str, Tensor]]:
    sweep, found = BlockSweep(task, batches, parts), {}
    for part in parts:
        own = dataclasses.replace(
            task,
            specs=[spec for spec in task.specs if spec.name in part],
            beside=[spec for spec in task.specs if spec.name not in part],
        )
        statistics = sweep.collect(own)
        found.update(sums(statistics))
        assert statistics.samples and statistics.label_tokens and statistics.loss_sum
    return found


def assert_equal_sums(task: CaptureTask, batches: Any, parts: Sequence[Sequence[str]]) -> None:
    assert fault(task, batches) is None
    whole = capture.collect(task, batches, generator=torch.Generator())
    expected, found = sums(whole), swept(task, batches, parts)
    assert len(parts) > 1 and found.keys() == expected.keys()
    for name, each in expected.items():
        assert each.keys() == found[name].keys()
        for key, value in each.items():
            assert torch.equal(found[name][key], value), (name, key)


def small(config: Any, **settings: Any) -> Any:
    common = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return config(**{**common, **settings})


def causal(config: Any) -> nn.Module:
    return tiny_models.made(lambda: transformers.AutoModelForCausalLM.from_config(config), torch.float32)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: make_tiny_llama(num_hidden_layers=4),
    "gpt2": lambda: causal(transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
    "gemma": lambda: causal(small(transformers.Gemma2Config, head_dim=8, sliding_window=4)),
    "gemma3": lambda: causal(small(transformers.Gemma3TextConfig, head_dim=8, sliding_window=4)),
    "qwen2": lambda: causal(small(transformers.Qwen2Config)),
    "opt": lambda: causal(
        transformers.OPTConfig(
            vocab_size=61,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    ),
    "neox": lambda: causal(small(transformers.GPTNeoXConfig)),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_sums_are_those_of_one_pass(model: str, size: int) -> None:
    batches = make_batches(make_samples())
    task = task_of(MODELS[model](), batches)
    assert_equal_sums(task, batches, parts_of(task, size))
