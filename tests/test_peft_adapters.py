"""What PEFT documents of adapters, with ones that we produced: saving, loading, switching, merging, training on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from test_layer_kinds import experts_config, mixture

BATCHES = make_batches(make_samples(12), 6)
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks": {"rank_pattern": {r".*\.0\..*q_proj": 5}, "alpha_pattern": {"down_proj": 9}},
    "a copy of the output layer": {"modules_to_save": ["lm_head"]},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    make_tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PeftModel, Path]]:
    """By variant, our adapter in memory and where it is saved; each is made once."""
    known: dict[str, tuple[PeftModel, Path]] = {}

    def variant(name: str) -> tuple[PeftModel, Path]:
        if name not in known:
            config = LoraConfig(**{**LORA, **VARIANTS[name]})
            model = lora_da_core.get_lora_da_model(model_of(base), config, BATCHES).eval()
            directory = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(directory, save_embedding_layers=False)
            known[name] = model, directory
        return known[name]

    return variant


def model_of(base: Path, **rest: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=rest.pop("dtype", torch.float32), **rest)


def logits(model: nn.Module, **rest: Any) -> Tensor:
    batch = BATCHES[0]
    with torch.no_grad():
        found: Tensor = model.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **rest
        ).logits
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_saved_files_are_stock(name: str, made: Any, base: Path) -> None:
    model, directory = made(name)
    assert {path.name for path in directory.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = PeftConfig.from_pretrained(directory)
    assert isinstance(config, LoraConfig) and config.init_lora_weights is True and config.inference_mode
    assert config.base_model_name_or_path == str(base)
    for key, value in VARIANTS[name].items():
        assert getattr(config, key) == (set(value) if key == "target_modules" else value)
    saved = load_file(directory / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert saved.keys() == own.keys() and all(torch.equal(saved[key], value) for key, value in own.items())
    stated = json.loads((directory / "adapter_config.json").read_text())
    assert "lora_da" not in json.dumps(stated)


@pytest.mark.parametrize("name", VARIANTS)
def test_loading_gives_the_same_function_in_every_way(name: str, made: Any, base: Path) -> None:
    model, directory = made(name)
    expected = logits(model)
    loaded = PeftModel.from_pretrained(model_of(base), directory)
    assert torch.equal(logits(loaded), expected) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    automatic = AutoPeftModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(automatic), expected)
    hollow = PeftModel.from_pretrained(model_of(base), directory, low_cpu_mem_usage=True)
    assert torch.equal(logits(hollow), expected) and not any(p.is_meta for p in hollow.parameters())
    fresh = get_peft_model(model_of(base), PeftConfig.from_pretrained(directory))
    found = set_peft_model_state_dict(fresh, load_file(directory / "adapter_model.safetensors"))
    assert not found.unexpected_keys and not [key for key in found.missing_keys if "lora_" in key]
    assert torch.equal(logits(fresh), expected)
    # transformers 5 loads no copies, and no magnitudes of any DoRA adapter, which it reports as missing.
    if name not in ("a copy of the output layer", "DoRA"):
        native = model_of(base)
        native.load_adapter(str(directory))  # transformers' own way
        assert torch.equal(logits(native), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_merging_unmerging_and_unloading(name: str, made: Any, base: Path, tmp_path: Path) -> None:
    model, directory = made(name)
    expected, plain = logits(model), logits(model_of(base))
    loaded = PeftModel.from_pretrained(model_of(base), directory)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), plain)
    loaded.merge_adapter(safe_merge=True)
    close(logits(loaded), expected)
    loaded.unmerge_adapter()
    close(logits(loaded), expected)
    merged = PeftModel.from_pretrained(model_of(base), directory).merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path)
    again = model_of(tmp_path)
    assert torch.equal(logits(again), logits(merged))
    close(logits(again), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(model_of(base), directory).unload()), plain)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_goes_on_from_a_saved_start_as_from_memory(name: str, made: Any, base: Path) -> None:
    model, directory = made(name)

    def losses(trained: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
        found = []
        for _ in range(2):
            for batch in BATCHES:
                loss = trained(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(float(loss.detach()))
        return found

    loaded = PeftModel.from_pretrained(model_of(base), directory, is_trainable=True)
    trainable = {key for key, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    found = losses(loaded)
    assert found == losses(copy.deepcopy(model)) and found[-1] < found[0]


def test_several_adapters_are_switched_combined_and_deleted(made: Any, base: Path) -> None:
    first, second = made("plain"), made("ranks")
    model = PeftModel.from_pretrained(model_of(base), first[1], adapter_name="first")
    model.load_adapter(str(second[1]), adapter_name="second")
    assert torch.equal(logits(model), logits(first[0]))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(second[0]))
    status = get_model_status(model)
    assert status.active_adapters == ["second"] and status.available_adapters == ["first", "second"]
    assert status.enabled is True and status.merged_adapters == [] and status.num_adapter_layers == 4
    # One adapter in two halves is that adapter.
    model.add_weighted_adapter(["first", "first"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    close(logits(model), logits(first[0]))
    model.add_weighted_adapter(["first"], [1.0], "decomposed", combination_type="svd", svd_rank=3)
    model.set_adapter("decomposed")
    close(logits(model), logits(first[0]))
    for name in ("both", "decomposed", "first"):
        model.delete_adapter(name)
    model.set_adapter("second")
    assert list(model.peft_config) == ["second"] and torch.equal(logits(model), logits(second[0]))


def test_one_batch_with_several_adapters(made: Any, base: Path) -> None:
    (first, directory), (second, other) = made("plain"), made("rsLoRA")
    model = PeftModel.from_pretrained(model_of(base), directory, adapter_name="first")
    model.load_adapter(str(other), adapter_name="second")
    names = ["first", "__base__", "second", "first", "second", "__base__"]
    alone = {"first": logits(first), "second": logits(second), "__base__": logits(model_of(base))}
    found = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        close(found[row], alone[name][row])


def test_saving_one_of_several_under_its_name(made: Any, base: Path, tmp_path: Path) -> None:
    expected, directory = made("plain")
    model = PeftModel.from_pretrained(model_of(base), directory)
    model.load_adapter(str(made("rsLoRA")[1]), adapter_name="other")
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = PeftModel.from_pretrained(model_of(base), tmp_path / "other")
    assert torch.equal(logits(loaded), logits(made("rsLoRA")[0]))
    assert torch.equal(logits(model), logits(expected))


def test_our_start_is_swapped_in_for_a_loaded_adapter(made: Any, base: Path, tmp_path: Path) -> None:
    expected, directory = made("plain")
    get_peft_model(model_of(base), LoraConfig(**LORA)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(model_of(base), tmp_path)
    assert torch.equal(logits(model), logits(model_of(base)))
    hotswap_adapter(model, str(directory), adapter_name="default")
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("autocast", [True, False])
def test_a_base_in_bfloat16_takes_the_start(made: Any, base: Path, autocast: bool) -> None:
    _, directory = made("plain")
    model = PeftModel.from_pretrained(model_of(base, dtype=torch.bfloat16), directory, autocast_adapter_dtype=autocast)
    saved = load_file(directory / "adapter_model.safetensors")
    wanted = torch.float32 if autocast else torch.bfloat16
    held = get_peft_model_state_dict(model)
    assert all(held[key].dtype == wanted and torch.equal(held[key], value.to(wanted)) for key, value in saved.items())
    assert not torch.equal(logits(model), logits(model_of(base, dtype=torch.bfloat16)))


def test_a_reloaded_start_generates_what_it_does_in_memory(made: Any, base: Path) -> None:
    model, directory = made("plain")
    loaded = PeftModel.from_pretrained(model_of(base), directory)
    batch = {key: BATCHES[0][key][:1] for key in ("input_ids", "attention_mask")}
    texts = [each.generate(**batch, max_new_tokens=6, do_sample=False) for each in (model, loaded)]
    assert torch.equal(*texts)


def test_an_adapter_of_fused_experts_is_loaded_switched_and_merged(tmp_path: Path) -> None:
    batches = [{key: value[:4] for key, value in BATCHES[0].items()}]
    batches = [{**batches[0], **{key: batches[0][key] % 37 for key in ("input_ids",)}}]
    batches[0]["labels"] = torch.where(batches[0]["labels"] < 0, -100, batches[0]["input_ids"])
    inputs = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
    model = lora_da_core.get_lora_da_model(mixture("Mixtral"), experts_config(), batches).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = PeftModel.from_pretrained(mixture("Mixtral"), tmp_path, adapter_name="ours").eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        loaded.load_adapter(str(tmp_path), adapter_name="again")
        loaded.set_adapter("again")
        assert torch.equal(loaded(**inputs).logits, expected)
        with loaded.disable_adapter():
            assert torch.equal(loaded(**inputs).logits, mixture("Mixtral")(**inputs).logits)
        loaded.delete_adapter("again")
        loaded.set_adapter("ours")
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-6, atol=1e-8)
