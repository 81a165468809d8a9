"""Gradient checkpointing, attention implementations and mixed dtypes: the same statistics, counted once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, adapter
from lora_da_core.live_bytes import Allocations
from lora_da_core.running_sums import Statistics
from test_embeddings import losses_of
from test_layer_kinds import experts_config, gradients, mixture, statistics_of
from tiny_models import causal, continued, t5

ALL = LoraConfig(r=2, target_modules="all-linear")


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    return model


def sums(statistics: Statistics) -> dict[str, Tensor]:
    """Every sum of a run, the shared ones under the name of each layer that reads them."""
    found = gradients(statistics)
    for name in list(found):
        of_layer = statistics.of_layer(name)
        found |= {f"{name} {key}": value for side in (of_layer.input, of_layer.layer) for key, value in side.items()}
    return found


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "mode"), [("Llama", "training"), ("Llama", "evaluation"), ("GPT2", "training"), ("Mixtral", "training")]
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_are_run_again_and_counted_once(family: str, reentrant: bool, mode: str) -> None:
    create, lora = (mixture, experts_config()) if family == "Mixtral" else (causal, ALL)
    plain, model = create(family), checkpointed(create(family), reentrant)
    model.train(mode == "training")
    blocks = [m for m in model.modules() if isinstance(m, transformers.modeling_layers.GradientCheckpointingLayer)]
    runs: list[bool] = []
    for block in blocks:
        # Of the block's first part: at its last, the other kind stops as soon as it has what it saved.
        first = next(part for part in block.modules() if not list(part.children()))
        first.register_forward_hook(lambda module, args, output: runs.append(torch.is_grad_enabled()))
    before = {name: module.training for name, module in model.named_modules()}
    functions = [block._gradient_checkpointing_func for block in blocks]
    found, expected = (sums(statistics_of(each, lora, [continued()])) for each in (model, plain))
    assert len(runs) == 2 * len(blocks) and runs.count(False) == (len(blocks) if reentrant else 0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert {name: module.training for name, module in model.named_modules()} == before
    assert [block._gradient_checkpointing_func for block in blocks] == functions


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_checkpointing_saves_memory() -> None:
    ids = torch.randint(61, (4, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    peaks = []
    for reentrant in (None, True, False):
        model = make_tiny_llama(num_hidden_layers=8, hidden_size=64, intermediate_size=256)
        model = model if reentrant is None else checkpointed(model, reentrant)
        with Allocations(list(model.parameters())) as allocations:
            statistics_of(model, LoraConfig(r=2, target_modules=["q_proj"]), [batch])
        peaks.append(allocations.peak)
    assert max(peaks[1:]) < peaks[0] / 2, peaks


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_start_does_not_depend_on_checkpointing(reentrant: bool) -> None:
    batches = make_batches(make_samples(12), 6)
    pipeline = lora_da_core.build_pipeline(estimator="ekfac")
    expected = pipeline.run(make_tiny_llama(), batches, ALL)
    found = pipeline.run(checkpointed(make_tiny_llama(), reentrant), batches, ALL)
    for name, pair in expected.factors.items():
        assert torch.equal(found.factors[name].A, pair.A) and torch.equal(found.factors[name].B, pair.B)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_checkpointing_ends_with_an_error_as_it_began() -> None:
    model = checkpointed(causal("Llama"), True)
    functions = [m._gradient_checkpointing_func for m in model.model.layers]
    batch = continued()
    batch["labels"] = batch["labels"].clone()
    with pytest.raises(lora_da_core.LoraDAError):
        statistics_of(model, ALL, [batch], lambda model, batch: model(**batch).logits.sum((1, 2)) * float("nan"))
    assert [m._gradient_checkpointing_func for m in model.model.layers] == functions
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_attention_changes_nothing(family: str, attention: str) -> None:
    expected = gradients(statistics_of(causal(family), ALL, [continued()]))
    model = causal(family)
    model.set_attn_implementation(attention)
    found = gradients(statistics_of(model, ALL, [continued()]))
    assert model.config._attn_implementation == attention
    # Transformers' eager attention takes its softmax in float32, whatever the model's dtype.
    rtol, atol = (1e-3, 1e-6) if attention == "eager" else (1e-9, 1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)


# Mixed dtypes


def mixed_llama(body: torch.dtype) -> nn.Module:
    """A body in half precision below a last norm and a head in float32."""
    model = make_tiny_llama(torch.float32).to(body)
    model.model.norm.float()  # type: ignore[union-attr, operator]
    model.lm_head.float()  # type: ignore[union-attr, operator]
    return model


def mixed_t5(body: torch.dtype) -> nn.Module:
    """As transformers loads it in float16: `wo` stays in float32."""
    model = t5().to(body)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    return model


@pytest.mark.parametrize("body", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("create", [mixed_llama, mixed_t5])
def test_layers_of_several_dtypes_start_as_in_float32(create: Any, body: torch.dtype, tmp_path: Path) -> None:
    model, wide = create(body), create(body).float()
    assert {parameter.dtype for parameter in model.parameters()} == {body, torch.float32}
    decoder = model.config.is_encoder_decoder
    batch = continued() if decoder else make_batches(make_samples(12), 12)[0]
    batch = {**batch, "labels": batch["input_ids"].clamp(min=1)} if decoder else batch
    targets = ["q", "wo"] if decoder else ["q_proj", "down_proj", "lm_head"]
    lora = LoraConfig(r=2, target_modules=targets)
    pipeline = lora_da_core.build_pipeline(
        objective="seq2seq" if decoder else "causal_lm", config=LoraDAConfig(scale="fixed")
    )
    digests = adapter.base_digests(model)
    found, expected = pipeline.run(model, [batch], lora), pipeline.run(wide, [batch], lora)
    assert adapter.base_digests(model) == digests
    assert {pair.A.dtype for pair in found.factors.values()} == {torch.float32}
    errors = {}
    for name, pair in expected.factors.items():
        product, ours = pair.B @ pair.A, found.factors[name].B @ found.factors[name].A
        errors[name] = float((ours - product).norm() / product.norm())
    # Two directions of a layer may be nearly as good as each other, so single layers may turn; most may not.
    limit = {torch.bfloat16: 0.1, torch.float16: 0.05}[body]
    assert sorted(errors.values())[len(errors) // 2] < limit, errors
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    inputs |= {"decoder_input_ids": batch["labels"]} if decoder else {}
    peft_model = adapter.apply(model, copy.deepcopy(lora), found.factors).eval()
    with torch.no_grad():
        logits = peft_model(**inputs).logits
        peft_model.save_pretrained(tmp_path)
        reloaded = PeftModel.from_pretrained(create(body), tmp_path).eval()
        assert torch.equal(reloaded(**inputs).logits, logits)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("body", [torch.bfloat16, torch.float16], ids=str)
def test_a_mixed_model_lowers_its_loss_with_checkpointing(body: torch.dtype) -> None:
    batches = make_batches(make_samples(12), 6)
    peft_model = lora_da_core.get_lora_da_model(checkpointed(mixed_llama(body), True), ALL, batches).eval()
    with torch.no_grad():
        before, after = (
            float(torch.cat([losses_of(model, batch) for batch in batches]).mean())
            for model in (mixed_llama(body), peft_model)
        )
    assert after < before - 1e-2
