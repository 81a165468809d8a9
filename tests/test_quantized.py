"""Quantized bases with the real libraries, on the CPU or, where `LORA_DA_TEST_DEVICE` says so, on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import adapter
from lora_da_core.adapter_checks import base_digests

DEVICE = os.environ.get("LORA_DA_TEST_DEVICE", "cpu")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
BATCHES = make_batches(make_samples(24), 6)


def torchao(bits: int) -> Any:
    """A torchao configuration; a machine may have bitsandbytes alone."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if bits == 8:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32)))


KINDS: dict[str, Callable[[], Any]] = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    ),
    "torchao int8": lambda: torchao(8),
    "torchao int4": lambda: torchao(4),
}
# The 8-bit layers of bitsandbytes round their inputs to 8 bits and their outputs to 16 as well, so they do not
# compute what de-quantized weights compute; the others do, up to the order of sums.
TOLERANCE = {"int8": 0.2, "nf4": 1e-3, "torchao int8": 1e-3, "torchao int4": 1e-3}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    make_tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def load(directory: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=KINDS[kind](), device_map=DEVICE, dtype=torch.float32
    )


def dequantized(module: nn.Module) -> Tensor | None:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        scale = weight.SCB if module.state.SCB is None else module.state.SCB
        return weight.data.float() * scale.float().unsqueeze(1) / 127
    if isinstance(module, nn.Linear) and type(weight).__module__.startswith("torchao"):
        return weight.dequantize().float()
    return None


def plain_copy(model: Any, directory: Path) -> tuple[Any, int]:
    """The unquantized model with the quantized one's weights, and how many were quantized."""
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map=DEVICE)
    replaced = 0
    for name, module in model.named_modules():
        weight = dequantized(module)
        if weight is not None:
            plain.get_submodule(name).weight.data.copy_(weight)
            replaced += 1
    return plain, replaced


def weights(model: Any) -> dict[str, Tensor]:
    """Every quantized matrix as codes and scales together make it."""
    found = {name: dequantized(module) for name, module in model.named_modules()}
    return {name: value for name, value in found.items() if value is not None}


def logits(model: Any) -> Tensor:
    batch = {key: value.to(DEVICE) for key, value in BATCHES[0].items() if key != "labels"}
    with torch.no_grad():
        found: Tensor = model.eval()(**batch).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_is_initialised_as_its_dequantized_weights(kind: str, directory: Path, tmp_path: Path) -> None:
    model = load(directory, kind)
    plain, replaced = plain_copy(model, directory)
    assert replaced == 14
    before, name, values = base_digests(model), adapter.fingerprint(model), weights(model)
    pipeline = lora_da_core.build_pipeline()
    result = pipeline.run(model, BATCHES, LORA)
    assert base_digests(model) == before and adapter.fingerprint(model) == name
    assert all(torch.equal(value, values[key]) for key, value in weights(model).items())
    expected = pipeline.run(plain, BATCHES, LORA)
    assert any("14 of 14 layers are quantized" in note for note in result.report.notes)
    assert not any("quantized" in note for note in expected.report.notes)
    sizes = {layer.name: (layer.out_features, layer.in_features) for layer in expected.report.layers}
    assert {layer.name: (layer.out_features, layer.in_features) for layer in result.report.layers} == sizes
    found, wanted = (
        torch.cat([(f.B.double() @ f.A.double()).flatten() for f in factors.values()])
        for factors in (result.factors, expected.factors)
    )
    assert float((found - wanted).norm() / wanted.norm()) < TOLERANCE[kind]

    start = logits(load(directory, kind))
    tuned = lora_da_core.get_lora_da_model(model, LORA, BATCHES, pipeline=pipeline)
    factors = [(n, p) for n, p in tuned.named_parameters() if "lora_" in n]
    assert len(factors) == 28
    assert all(p.dtype == torch.float32 and p.device.type == torch.device(DEVICE).type for _, p in factors)
    ours = logits(tuned)
    assert float((ours - start).abs().max()) > 1e-3
    tuned.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(directory, kind), tmp_path)
    assert torch.equal(logits(reloaded), ours)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_knows_the_weights(kind: str, directory: Path, tmp_path: Path) -> None:
    name = adapter.fingerprint(load(directory, kind))
    assert adapter.fingerprint(load(directory, kind)) == name
    changed = make_tiny_llama(hidden_size=64, intermediate_size=128)
    weight: Any = changed.get_submodule("model.layers.0.self_attn.q_proj").weight
    # The codes of a doubled matrix are the same, only its scales tell.
    weight.data.copy_(2 * weight)
    changed.save_pretrained(tmp_path)  # type: ignore[operator]
    doubled, base = load(tmp_path, kind), load(directory, kind)
    codes = "model.layers.0.self_attn.q_proj.weight"
    if not kind.startswith("torchao"):
        assert torch.equal(doubled.get_parameter(codes).data, base.get_parameter(codes).data)
    assert adapter.fingerprint(doubled) != name
    found, expected = base_digests(doubled), base_digests(base)
    assert {key for key, value in found.items() if value != expected[key]} == {codes}
