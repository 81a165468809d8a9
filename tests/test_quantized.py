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
from lora_da_core.adapter.checks import base_digests

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


# GGUF, which transformers unpacks as it loads it

BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""A Llama's modules within a block, and what GGUF calls them."""


def write_gguf(path: Path) -> None:
    """A tiny Llama with matrices in Q8_0: blocks of 32 weights in 8 bits with a scale."""
    import gguf

    model: Any = make_tiny_llama(hidden_size=64, intermediate_size=128)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    named = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for number in range(config.num_hidden_layers):
        named |= {f"model.layers.{number}.{ours}": f"blk.{number}.{theirs}" for ours, theirs in BLOCK.items()}
    for ours, theirs in named.items():
        weight = model.get_submodule(ours).weight.detach().numpy()
        if weight.ndim == 1:
            writer.add_tensor(f"{theirs}.weight", weight)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{theirs}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_base_is_initialised_as_the_plain_model_it_becomes_and_reloads_on_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")

    def unpacked() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).to(DEVICE)

    model = unpacked()
    plain: Any = make_tiny_llama(hidden_size=64, intermediate_size=128).to(DEVICE)
    rounded = model.state_dict()
    assert any(not torch.equal(value, rounded[key]) for key, value in plain.state_dict().items())
    plain.load_state_dict(rounded)
    pipeline = lora_da_core.build_pipeline()
    digests = base_digests(model)
    expected = pipeline.run(plain, BATCHES, LORA)
    tuned = lora_da_core.get_lora_da_model(model, LORA, BATCHES, pipeline=pipeline)
    assert base_digests(tuned) == digests
    for name, pair in expected.factors.items():
        layer = tuned.get_submodule(f"base_model.model.{name}")
        assert torch.equal(layer.lora_A["default"].weight, pair.A)
        assert torch.equal(layer.lora_B["default"].weight, pair.B) and bool(pair.B.any())
    assert len(expected.factors) == 14
    ours = logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(unpacked(), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), ours)
    torch.testing.assert_close(logits(reloaded.merge_and_unload()), ours, rtol=1e-4, atol=1e-5)
