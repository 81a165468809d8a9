"""Every architecture: stock PEFT reloads the very function that was in memory, and merging gives it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lora_da_core
from lora_da_core import adapter
from tiny_models import (
    CAUSAL,
    bart,
    bert,
    causal,
    classes,
    continued,
    images,
    llava,
    mamba,
    pictured,
    resnet,
    t5,
    tags,
    targets,
    texts,
    vit,
)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An architecture with its data and what its layers are called."""

    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    objective: str
    task_type: str | None
    layers: frozenset[str]
    targets: str | tuple[str, ...] = "all-linear"


ATTENTION = frozenset({"q_proj", "k_proj", "v_proj"})
LLAMA = ATTENTION | {"o_proj", "gate_proj", "up_proj", "down_proj"}
NAMES = {
    **dict.fromkeys(CAUSAL, LLAMA),
    "Phi": ATTENTION | {"dense", "fc1", "fc2"},
    "GPT2": frozenset({"c_attn", "c_proj", "c_fc"}),
}


def tagged() -> Batch:
    return {**texts(), "labels": tags(texts())}


CASES = {
    **{
        name: Case(lambda n=name: causal(n), continued, "causal_lm", "CAUSAL_LM", NAMES[name])  # type: ignore[misc]
        for name in CAUSAL
    },
    "Bert": Case(
        bert,
        lambda: {**texts(), "labels": classes()},
        "sequence_classification",
        "SEQ_CLS",
        frozenset({"query", "key", "value", "dense"}),
    ),
    "Bert, tokens": Case(
        lambda: bert("TokenClassification"),
        tagged,
        "token_classification",
        "TOKEN_CLS",
        frozenset({"query", "key", "value", "dense"}),
    ),
    "ViT": Case(
        vit,
        lambda: {**images(), "labels": classes()},
        "image_classification",
        None,
        frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}),
    ),
    "T5": Case(
        t5,
        lambda: {**texts(), "labels": targets()},
        "seq2seq",
        "SEQ_2_SEQ_LM",
        frozenset({"q", "k", "v", "o", "wi", "wo"}),
    ),
    "Bart": Case(
        bart,
        lambda: {**texts(), "labels": targets()},
        "seq2seq",
        "SEQ_2_SEQ_LM",
        ATTENTION | {"out_proj", "fc1", "fc2"},
    ),
    "ResNet": Case(
        resnet,
        lambda: {**images(), "labels": classes()},
        "image_classification",
        None,
        frozenset({"convolution"}),
        ("convolution",),
    ),
    # PEFT refuses the other two, which Mamba's fused kernel reads past their modules.
    "Mamba": Case(mamba, continued, "causal_lm", "CAUSAL_LM", frozenset({"in_proj", "x_proj"}), ("in_proj", "x_proj")),
    # Images are tokens of the text to the language model; of the rest no token mask is known.
    "Llava": Case(llava, pictured, "causal_lm", "CAUSAL_LM", LLAMA, r".*language_model.*_proj"),
}


def targets_of(case: Case) -> str | list[str]:
    return case.targets if isinstance(case.targets, str) else list(case.targets)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("name", CASES)
def test_memory_directory_and_merged_model_compute_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    batch = case.batch()
    model = case.model()
    base, digests = logits_of(model, batch), adapter.base_digests(model)
    # PEFT trains a new head whole for its classification types, and cannot adapt it besides.
    lora = LoraConfig(r=2, target_modules=targets_of(case), exclude_modules=["classifier"], task_type=case.task_type)
    pipeline = lora_da_core.build_pipeline(objective=case.objective)
    peft_model = lora_da_core.get_lora_da_model(model, lora, [batch], pipeline=pipeline)
    expected = logits_of(peft_model, batch)
    assert not torch.equal(expected, base)
    adapted = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key, _ in peft_model.named_parameters() if ".lora_" in key}
    assert adapted == case.layers
    with peft_model.disable_adapter():
        assert torch.equal(logits_of(peft_model, batch), base)
    assert adapter.base_digests(peft_model) == digests
    peft_model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(case.model(), tmp_path)
    assert torch.equal(logits_of(reloaded, batch), expected)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_lower_precisions_reload_exactly_too(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    batch = continued()
    peft_model = lora_da_core.get_lora_da_model(causal(family, dtype), lora, [batch])
    assert {p.dtype for name, p in peft_model.named_parameters() if ".lora_" in name} == {torch.float32}
    peft_model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(causal(family, dtype), tmp_path)
    assert torch.equal(logits_of(reloaded, batch), logits_of(peft_model, batch))
