"""Fixtures shared by all tests: tiny models, tiny data, and the proof that a model is as it was."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from typer import rich_utils

# Small tensors gain nothing from threads, and equal bytes need equal thread counts; also in processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# typer decides once, when it first shows help, whether to force colours: not by the machine or the order of tests.
rich_utils.FORCE_TERMINAL = None

# Of the tests in `fuzzing`: thousands of fresh examples; asked for with --hypothesis-profile=nightly.
settings.register_profile("nightly", deadline=None)
# Of .ci/mutation.py: that some example fails is all it asks, and the same ones for every mutant.
settings.register_profile(
    "mutation", deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)


def pytest_collection_finish() -> None:
    """What imports and collection made, half a million objects, stays; each trainer collects garbage and walked it."""
    gc.freeze()


ORACLE = Path(__file__).resolve().parents[2] / "shared" / "oracle"


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The folder of expected numbers, beside the repository."""
    if not ORACLE.is_dir():
        pytest.skip(f"the oracle's numbers are not at {ORACLE}")
    return ORACLE


@pytest.fixture
def tiny_llama() -> nn.Module:
    return make_tiny_llama()


def assert_same(one: Any, other: Any) -> None:
    """Two results of runs are the same but for the seconds."""
    assert list(one.factors) == list(other.factors)
    for name, pair in one.factors.items():
        assert torch.equal(pair.A, other.factors[name].A) and torch.equal(pair.B, other.factors[name].B), name
    for mine, theirs in zip(one.report.layers, other.report.layers, strict=True):
        assert dataclasses.replace(mine, seconds=0.0) == dataclasses.replace(theirs, seconds=0.0)
    for entry in ("samples", "label_tokens", "loss"):
        assert getattr(one.report, entry) == getattr(other.report, entry)


def make_tiny_llama(dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """A random two-layer Llama; the seed is local, so the global generator is left alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)


def make_samples(count: int = 12, vocab: int = 61, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Samples of 6 to 15 tokens; the first third of each is a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(6, 16, (), generator=generator))
        ids = torch.randint(0, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def make_batches(
    samples: list[dict[str, torch.Tensor]], batch_size: int = 4, extra_padding: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches."""
    batches = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        width = max(len(sample["input_ids"]) for sample in chunk) + extra_padding
        batch = {
            "input_ids": torch.zeros(len(chunk), width, dtype=torch.long),
            "attention_mask": torch.zeros(len(chunk), width, dtype=torch.long),
            "labels": torch.full((len(chunk), width), -100),
        }
        for row, sample in enumerate(chunk):
            length = len(sample["input_ids"])
            batch["input_ids"][row, :length] = sample["input_ids"]
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = sample["labels"]
        batches.append(batch)
    return batches


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    return make_batches(make_samples())


@pytest.fixture
def model_unchanged() -> Iterator[Callable[[nn.Module], None]]:
    """Watches models: weights, modes, requires_grad, hooks, module tree and the global generator must stay."""
    watched: list[tuple[nn.Module, dict[str, Any]]] = []

    def watch(model: nn.Module) -> None:
        watched.append((model, _state(model)))

    generator = torch.random.get_rng_state()
    yield watch
    for model, before in watched:
        after = _state(model)
        for part, value in before.items():
            assert after[part] == value, f"{part} changed"
    if watched:
        assert torch.equal(torch.random.get_rng_state(), generator), "the global generator moved"


def _state(model: nn.Module) -> dict[str, Any]:
    named = list(model.named_parameters(remove_duplicate=False))
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "weights": [(name, id(p), _bytes(p)) for name, p in named],
        "buffers": [(name, _bytes(b)) for name, b in model.named_buffers()],
        "requires_grad": [(name, p.requires_grad, p.grad is None) for name, p in named],
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        ],
    }


def _bytes(tensor: torch.Tensor) -> bytes | None:
    """A tensor's values; None of one that has none."""
    values = tensor.detach()
    return None if values.is_meta or isinstance(values, FakeTensor) else values.clone().numpy().tobytes()


ROWS = 48
"""Rows of the data set in `world`."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model and data that it can learn something from."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("ablation")
    words = ["<unk>", "<s>", "</s>", "<pad>", "Q", "A", ":", *(f"w{place}" for place in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **specials).save_pretrained(root / "model")
    shape = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(root / "model")
    draw = torch.Generator().manual_seed(1)
    rows = [
        {"question": " ".join(f"w{i}" for i in text[:5]), "answer": " ".join(f"w{i % 8}" for i in text[5:])}
        for text in torch.randint(40, (ROWS, 12), generator=draw).tolist()
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
