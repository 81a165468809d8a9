"""PEFT's options, row by row: what works through every entry point, and what is refused before any work."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, OptionError, TargetError, adapter
from lora_da_core.adapter.variants import REFUSED
from lora_da_core.cli_init_options import InitOptions
from lora_da_core.registry import Registry
from tiny_models import causal, continued

Batches = list[dict[str, Tensor]]
Model = Callable[[], nn.Module]

gpt2 = partial(causal, "GPT2")
double_llama = partial(make_tiny_llama, torch.float64)
tied_llama = partial(make_tiny_llama, torch.float64, tie_word_embeddings=True)


def lora(**values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **values})


@dataclass(frozen=True)
class Works:
    """A row of the table: a configuration, the model it is tried on, and what is said of it."""

    options: str
    config: dict[str, Any]
    note: str
    model: Model = double_llama
    adapted: int = 4
    """Layers that PEFT adapts."""
    merges: bool = True
    on_meta: bool = True
    """Whether PEFT gives everything values that was made with `low_cpu_mem_usage`."""


@dataclass(frozen=True)
class Refused:
    """A row of the table: a configuration, the reason, and how the error names it."""

    options: str
    config: dict[str, Any]
    note: str
    error: type[Exception]
    message: str
    make: Callable[..., Any] = lora
    of_layers: bool = False
    """Whether it is refused for the layers it finds, and not for what it says."""


GPT2 = {"target_modules": ["c_attn", "c_fc"]}
WORKS = [
    Works("`target_modules` list", {"target_modules": ["q_proj", "down_proj"]}, "by PEFT's own matching"),
    Works("`target_modules` regex", {"target_modules": r".*\.1\..*(q|k)_proj"}, "by PEFT's own matching", adapted=2),
    Works("`target_modules` left out", {"target_modules": None}, "PEFT's choice for the architecture"),
    Works('`target_modules="all-linear"`', {"target_modules": "all-linear"}, "without the output layer", adapted=14),
    Works(
        "`exclude_modules`",
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        "list or regex",
        adapted=8,
    ),
    Works(
        "`layers_to_transform`", {"layers_to_transform": [1]}, "no statistics are taken of the other blocks", adapted=2
    ),
    Works(
        "`layers_to_transform` with `layers_pattern`",
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        "as above",
        adapted=2,
    ),
    Works("`rank_pattern`", {"rank_pattern": {r".*\.0\..*q_proj": 3, "up_proj": 1}}, "each layer at its own rank"),
    Works("`alpha_pattern`", {"alpha_pattern": {"up_proj": 32}}, "the step does not depend on it"),
    Works("`lora_alpha`", {"lora_alpha": 0.5}, "the step does not depend on it"),
    Works("`use_rslora`", {"use_rslora": True, "r": 4}, "the step does not depend on it"),
    Works("`lora_dropout`", {"lora_dropout": 0.3}, "off while the statistics are taken"),
    Works("`bias`", {"bias": "all", **GPT2}, "the base's biases stay as they are until training", gpt2),
    Works("`bias`, LoRA's only", {"bias": "lora_only", **GPT2}, "as above", gpt2),
    Works("`init_lora_weights=False`", {"init_lora_weights": False}, "replaced"),
    Works('`init_lora_weights="gaussian"`', {"init_lora_weights": "gaussian"}, "replaced"),
    Works(
        "`modules_to_save`",
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        "the copies start as PEFT makes them, equal to the base",
    ),
    Works(
        "`use_dora`",
        {"use_dora": True},
        "the magnitudes are computed anew from W + scaling·B·A, so that the function starts there",
    ),
    Works(
        "`use_dora` with `use_rslora` and `rank_pattern`",
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 4}},
        "as above",
    ),
    Works("`use_dora` on `Conv1D`", {"use_dora": True, **GPT2}, "as above", gpt2),
    Works(
        "`lora_bias`",
        {"lora_bias": True, **GPT2},
        "the biases start at zero, also where PEFT would draw them",
        gpt2,
    ),
    Works(
        "`lora_bias` with `init_lora_weights=False`",
        {"lora_bias": True, "init_lora_weights": False, **GPT2},
        "as above",
        gpt2,
    ),
    Works("`fan_in_fan_out`", {"fan_in_fan_out": True, **GPT2}, "`Conv1D` stores W transposed", gpt2),
    Works("`fan_in_fan_out=False` on `Conv1D`", {"fan_in_fan_out": False, **GPT2}, "PEFT corrects it", gpt2),
    Works("tied embeddings", {"target_modules": "all-linear"}, "PEFT leaves the output layer out", tied_llama, 14),
    Works(
        "tied embeddings, `lm_head` adapted",
        {"target_modules": ["q_proj", "lm_head"]},
        "exact unmerged; PEFT's merging changes the embedding too, and warns",
        tied_llama,
        3,
        merges=False,
    ),
    Works("`trainable_token_indices`", {"trainable_token_indices": [1, 5]}, "the tokens start as they are"),
    Works("`trainable_token_indices`, tied", {"trainable_token_indices": [1, 5]}, "as above", tied_llama),
    Works(
        "`ensure_weight_tying`",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "for modules that are saved; not with `low_cpu_mem_usage`, where PEFT leaves the tied copy on meta",
        tied_llama,
        on_meta=False,
    ),
]

EMBEDDINGS = {"target_modules": ["q_proj", "embed_tokens"]}
WORKS += [
    Works(
        "embeddings",
        EMBEDDINGS,
        "with the estimators `kfac`, `diagonal` and `identity`; nothing of the squared vocabulary's size is made",
        adapted=3,
    ),
    Works("embeddings with `use_dora`", {"use_dora": True, **EMBEDDINGS}, "as above", adapted=3),
    Works(
        "tied embeddings, `embed_tokens` adapted",
        EMBEDDINGS,
        "the input side alone starts and trains; PEFT's merging changes the output layer too, and warns",
        tied_llama,
        3,
        merges=False,
    ),
]

METHODS = {
    **dict.fromkeys(("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica"), "changes the base"),
    "eva": "is another method; put our functions in the place of EVA's",
    "orthogonal": "is another method",
}
SET = {
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"hidden_size": 4},
    "alora_invocation_tokens": [3, 4],
    "arrow_config": peft.ArrowConfig() if hasattr(peft, "ArrowConfig") else object(),
}
"""A value for each field that is refused; True where the field is not here."""


def refused(option: str) -> Refused:
    value = SET.get(option, True)
    make = partial(set_afterwards, option)
    return Refused(f"`{option}`", {"value": value}, REFUSED[option], TargetError, f"{option} is not supported", make)


def set_afterwards(option: str, value: Any) -> LoraConfig:
    """A configuration that PEFT would check against other packages or settings when it is made."""
    made = lora()
    setattr(made, option, value)
    return made


REFUSALS = [
    *(refused(option) for option in REFUSED if option in {entry.name for entry in dataclasses.fields(LoraConfig)}),
    *(
        Refused(
            f'`init_lora_weights="{name}"`',
            {"value": name},
            reason,
            OptionError,
            f"init_lora_weights='{name}' is another initialisation",
            partial(set_afterwards, "init_lora_weights"),
        )
        for name, reason in METHODS.items()
    ),
    Refused(
        "`ensure_weight_tying` on adapted embeddings",
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        "the tied layers would share their factors",
        TargetError,
        "ensure_weight_tying is not supported where model.embed_tokens",
        of_layers=True,
    ),
    Refused(
        "a rank above min(in, out)",
        {"r": 33},
        'there are no more directions; `unsupported="default"` leaves such layers at PEFT\'s own initialisation',
        TargetError,
        r"rank 33 is above min\(in, out\) = 32",
        of_layers=True,
    ),
    Refused(
        "AdaLoRA",
        {"target_modules": ["q_proj"], "total_step": 10},
        "its factors are of a singular value decomposition that it prunes",
        OptionError,
        "peft_config is a AdaLoraConfig",
        peft.AdaLoraConfig,
    ),
    Refused(
        "LoHa, LoKr, IA³, OFT and all other tuners",
        {"target_modules": ["q_proj"]},
        "they have no factors A and B",
        OptionError,
        "peft_config is a LoHaConfig",
        peft.LoHaConfig,
    ),
    Refused(
        "X-LoRA",
        {"hidden_size": 32, "adapters": {}},
        "it mixes other adapters",
        OptionError,
        "peft_config is a XLoraConfig",
        peft.XLoraConfig,
    ),
]

SITUATIONS: dict[str, tuple[str, ...]] = {
    "`adapter_name` other than `default`": ("works", "all", "test_another_adapter_name"),
    "an adapter name that PEFT cannot load": ("refused", "empty, with a dot, or part of `lora_`", "test_adapter_names"),
    "a second adapter on one model": (
        "works",
        "started from the base, whatever the first one learned",
        "test_a_second_adapter_starts_from_the_base",
    ),
    "a PeftModel in bfloat16 without autocast": ("works", "keeps its dtype", "test_a_wrapped_models_dtype_is_kept"),
    "`low_cpu_mem_usage`": ("works", "no tensor is left on meta", "test_low_cpu_mem_usage_leaves_nothing_on_meta"),
    "PEFT's EVA example": (
        "works",
        "with the names and the state dict's keyword replaced",
        "test_the_eva_example_with_names_replaced",
    ),
    '`unsupported="default"`': (
        "works",
        "named in the report's notes with the reason; also on meta",
        "test_unsupported_layers_are_left_at_pefts_default_and_named",
    ),
    "`Conv2d`": (
        "works",
        "not with groups, dilation or another padding than zeros, which PEFT's adapter does not follow",
        "test_convolutions_are_initialised_or_left",
        "test_layer_kinds::test_convolutions_reload_and_merge",
    ),
    "`use_dora` on `Conv2d`": (
        "works",
        "as on linear layers",
        "test_layer_kinds::test_dora_on_a_convolution_starts_at_w_plus_its_step",
    ),
    "`target_parameters`": (
        "works",
        "fused experts of transformers, each with factors of its own; other bare parameters are refused",
        "test_layer_kinds::test_every_experts_factors_are_in_its_place",
        "test_layer_kinds::test_fused_experts_reload_and_merge",
        "test_bare_parameters_that_are_no_experts_are_refused",
    ),
    "a PeftModel whose adapter has changed the base (PiSSA)": (
        "refused",
        "also where a state dict is given",
        "test_an_adapter_that_changed_the_base_is_refused",
    ),
    "an adapter that is merged": ("refused", "unmerge it first", "test_merged_mixed_and_compiled_models"),
    "a PeftMixedModel, or `inject_adapter_in_model`": (
        "refused",
        "pass a PeftModel",
        "test_merged_mixed_and_compiled_models",
    ),
    "a model of `torch.compile`, or a part": (
        "refused",
        "pass the original; what `.compile()` compiled in place runs as it is written while statistics are taken",
        "test_merged_mixed_and_compiled_models",
    ),
}

"""Verdict, remark and the tests that show it; a test without a module is one of this one."""

NEUTRAL = {
    # Records of the adapter.
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    "inference_mode",
    # PEFT ignores these unless the initialisation, Megatron or QA-LoRA that they belong to is chosen.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    # Where DoRA computes on offloaded models.
    "runtime_config",
    "r",
}


def test_every_field_of_pefts_configuration_is_judged() -> None:
    options = [row.options for row in (*WORKS, *REFUSALS)] + list(SITUATIONS)
    judged = {name for option in options for name in re.findall(r"`(\w+)[=`]", option)}
    assert {entry.name for entry in dataclasses.fields(LoraConfig)} == (
        judged & {entry.name for entry in dataclasses.fields(LoraConfig)}
    ) | NEUTRAL


def logits_of(model: nn.Module) -> Tensor:
    model.eval()
    batch = continued()
    with torch.no_grad():
        found: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


def data() -> Batches:
    return make_batches(make_samples(vocab=37), 6)


def wrapped(model: nn.Module, config: Any, **rest: Any) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return get_peft_model(model, copy.deepcopy(config), **rest)


def with_steps(row: Works, factors: dict[str, lora_da_core.LoraFactors], scalings: dict[str, float]) -> nn.Module:
    """The base model with scaling·B·A added to its weights by hand."""
    model = row.model()
    for name, pair in factors.items():
        module = model.get_submodule(name)
        step = scalings[name] * pair.B @ pair.A
        weight = module.weight.detach() + (step if isinstance(module, nn.Linear) else step.T)
        module.weight = nn.Parameter(weight)  # a new one, so that what it was tied to stays
    return model


@pytest.mark.parametrize("row", WORKS, ids=lambda row: row.options)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_row_that_works(row: Works, tmp_path: Path) -> None:
    batches, config = data(), lora(**row.config)
    pipeline = lora_da_core.build_pipeline()
    base, digests = logits_of(row.model()), adapter.base_digests(row.model())
    result = pipeline.run(row.model(), batches, copy.deepcopy(config))
    assert len(result.factors) == row.adapted

    one_call = lora_da_core.get_lora_da_model(row.model(), copy.deepcopy(config), batches)
    state = lora_da_core.get_lora_da_state_dict(row.model(), batches, copy.deepcopy(config))
    pair = wrapped(row.model(), config)
    lora_da_core.initialize_lora_da_weights(pair, state_dict=state)
    applied = adapter.apply(row.model(), copy.deepcopy(config), result.factors)
    in_place = wrapped(row.model(), config, low_cpu_mem_usage=row.on_meta)
    lora_da_core.initialize_lora_da_weights(in_place, batches)
    if not row.on_meta:
        with pytest.raises(TargetError, match="without low_cpu_mem_usage"):
            lora_da_core.initialize_lora_da_weights(wrapped(row.model(), config, low_cpu_mem_usage=True), unread())

    expected = logits_of(one_call)
    assert torch.equal(logits_of(pair), expected) and torch.equal(logits_of(applied), expected)
    torch.testing.assert_close(logits_of(in_place), expected, rtol=1e-6, atol=1e-8)
    scalings = {name: layer.scaling["default"] for name, layer in layers_of(one_call).items()}
    intended = logits_of(with_steps(row, dict(result.factors), scalings))
    torch.testing.assert_close(expected, intended, rtol=1e-6, atol=1e-8)
    assert float((expected - base).abs().max()) > 1e-4

    for model in (one_call, pair, applied, in_place):
        assert adapter.base_digests(model) == digests
        assert adapter.fingerprint(model) == adapter.fingerprint(row.model()) == result.report.base
        assert not any(parameter.is_meta for parameter in model.parameters())
    with one_call.disable_adapter():
        assert torch.equal(logits_of(one_call), base)
    fresh = wrapped(row.model(), config)
    trainable = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    for model in (one_call, pair, applied, in_place):
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable

    one_call.save_pretrained(tmp_path, save_embedding_layers=False)
    reloaded = PeftModel.from_pretrained(row.model(), tmp_path)
    assert torch.equal(logits_of(reloaded), expected)
    if row.merges:
        torch.testing.assert_close(logits_of(reloaded.merge_and_unload()), expected, rtol=1e-6, atol=1e-8)


def layers_of(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}


def unread() -> Iterator[dict[str, Tensor]]:
    raise AssertionError("the data was read before the configuration was refused")
    yield


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.options)
def test_a_row_that_is_refused(row: Refused, model_unchanged: Callable[[nn.Module], None]) -> None:
    config = row.make(**row.config)
    model, carrier = make_tiny_llama(), wrapped(make_tiny_llama(), lora())
    model_unchanged(model)
    model_unchanged(carrier)
    entries: list[Callable[[], object]] = [
        lambda: adapter.apply(model, config, {}),
        lambda: lora_da_core.get_lora_da_model(model, config, unread()),
        lambda: lora_da_core.get_lora_da_state_dict(model, unread(), config),
        lambda: lora_da_core.build_pipeline().run(model, unread(), config),
        lambda: lora_da_core.get_lora_da_state_dict(carrier, unread(), config),
    ]
    for entry in entries[1:4] if row.of_layers else entries:
        with pytest.raises(row.error, match=row.message):
            entry()


def test_another_adapter_name(tmp_path: Path) -> None:
    batches, config = data(), lora(modules_to_save=["lm_head"])
    plain = lora_da_core.get_lora_da_model(double_llama(), config, batches)
    state = lora_da_core.get_lora_da_state_dict(double_llama(), batches, config, adapter_name="tuned")
    pair = wrapped(double_llama(), config, adapter_name="tuned")
    lora_da_core.initialize_lora_da_weights(pair, state_dict=state, adapter_name="tuned")
    one_call = lora_da_core.get_lora_da_model(double_llama(), config, batches, adapter_name="tuned")
    result = lora_da_core.build_pipeline().run(double_llama(), batches, config, adapter_name="tuned")
    applied = adapter.apply(double_llama(), config, result.factors, "tuned")
    for model in (pair, one_call, applied):
        assert model.active_adapter == "tuned"
        assert torch.equal(logits_of(model), logits_of(plain))
    one_call.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(double_llama(), tmp_path / "tuned", adapter_name="other")
    assert torch.equal(logits_of(reloaded), logits_of(plain))


@pytest.mark.parametrize("name", ["", "a.b", "lora", "_", None])
def test_adapter_names(name: Any, model_unchanged: Callable[[nn.Module], None]) -> None:
    model = make_tiny_llama()
    model_unchanged(model)
    with pytest.raises(OptionError, match="adapter_name is"):
        lora_da_core.get_lora_da_model(model, lora(), unread(), adapter_name=name)
    with pytest.raises(OptionError, match="adapter_name is"):
        adapter.apply(model, lora(), {}, name)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_a_second_adapter_starts_from_the_base(variant: dict[str, Any]) -> None:
    batches, config = data(), lora(target_modules=["q_proj"], **variant)
    alone = wrapped(double_llama(), config)
    lora_da_core.initialize_lora_da_weights(alone, batches)
    both = wrapped(double_llama(), lora(r=3, target_modules="all-linear"))
    for name, parameter in both.named_parameters():
        if "lora_B" in name:  # as if it had been trained
            parameter.data.fill_(0.1)
    both.add_adapter("second", copy.deepcopy(config))
    before = {key: value.clone() for key, value in get_peft_model_state_dict(both, adapter_name="default").items()}
    lora_da_core.initialize_lora_da_weights(both, batches, adapter_name="second")
    after = get_peft_model_state_dict(both, adapter_name="default")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    both.set_adapter("second")
    torch.testing.assert_close(logits_of(both), logits_of(alone), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wrapped_models_dtype_is_kept(dtype: torch.dtype) -> None:
    peft_model = wrapped(make_tiny_llama(dtype), lora(use_dora=True), autocast_adapter_dtype=False)
    identities = {name: id(parameter) for name, parameter in peft_model.named_parameters()}
    state = lora_da_core.get_lora_da_state_dict(peft_model, data())
    assert {value.dtype for value in state.values()} == {torch.float32}
    lora_da_core.initialize_lora_da_weights(peft_model, state_dict=state)
    written = get_peft_model_state_dict(peft_model)
    assert {value.dtype for value in written.values()} == {dtype}
    assert all(torch.equal(written[key], value.to(dtype)) for key, value in state.items())
    assert {name: id(parameter) for name, parameter in peft_model.named_parameters()} == identities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "variant", [{"use_dora": True}, {"lora_bias": True}, {"trainable_token_indices": [1]}], ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_low_cpu_mem_usage_leaves_nothing_on_meta(dtype: torch.dtype, variant: dict[str, Any]) -> None:
    config = lora(modules_to_save=["lm_head"], **variant)
    plain = wrapped(make_tiny_llama(dtype), config)
    state = lora_da_core.get_lora_da_state_dict(plain, data())
    lora_da_core.initialize_lora_da_weights(plain, state_dict=state)
    peft_model = wrapped(make_tiny_llama(dtype), config, low_cpu_mem_usage=True)
    assert any(parameter.is_meta for parameter in peft_model.parameters())
    lora_da_core.initialize_lora_da_weights(peft_model, state_dict=state)
    expected = dict(plain.named_parameters())
    for name, parameter in peft_model.named_parameters():
        assert parameter.dtype == expected[name].dtype and parameter.requires_grad == expected[name].requires_grad
        assert torch.equal(parameter, expected[name])
    # Training the adapter must not reach the state dict.
    kept = {key: value.clone() for key, value in state.items()}
    for parameter in peft_model.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(state[key], value) for key, value in kept.items())


def test_the_eva_example_with_names_replaced() -> None:
    samples = make_samples(16)
    rows = [{**sample, "input_ids": sample["input_ids"][:6], "labels": sample["labels"][:6]} for sample in samples]
    dataloader: DataLoader[Any] = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    # peft: peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    #       initialize_lora_eva_weights(peft_model, dataloader)
    peft_model = get_peft_model(make_tiny_llama(), config, low_cpu_mem_usage=True)
    lora_da_core.initialize_lora_da_weights(peft_model, dataloader)
    # peft: eva_state_dict = get_eva_state_dict(model, dataloader, config)
    #       initialize_lora_eva_weights(peft_model, eva_state_dict=eva_state_dict)
    state_dict = lora_da_core.get_lora_da_state_dict(make_tiny_llama(), dataloader, config)
    other = get_peft_model(make_tiny_llama(), config, low_cpu_mem_usage=True)
    lora_da_core.initialize_lora_da_weights(other, state_dict=state_dict)
    for name, parameter in peft_model.named_parameters():
        assert not parameter.is_meta
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert bool((peft_model.get_parameter(LORA_B) != 0).any())
    peft_model(**next(iter(dataloader))).loss.backward()
    assert {name for name, p in peft_model.named_parameters() if p.grad is not None} == {
        name for name, _ in peft_model.named_parameters() if ".lora_" in name
    }


LORA_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"


def test_unsupported_layers_are_left_at_pefts_default_and_named(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    batches = data()
    config = lora(target_modules=["q_proj", "up_proj", "embed_tokens"], rank_pattern={r".*\.1\.mlp.up_proj": 40})
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(unsupported="default"))

    def double_llama() -> nn.Module:
        model = make_tiny_llama(torch.float64)
        model.model.embed_tokens.scale_grad_by_freq = True
        return model

    result = pipeline.run(double_llama(), batches, config)
    assert len(result.factors) == 3
    notes = [note for note in result.report.notes if note.startswith("left at PEFT's own initialisation")]
    assert len(notes) == 2
    assert any("model.embed_tokens (is an Embedding with scale_grad_by_freq" in note for note in notes)
    assert any("layers.1.mlp.up_proj" in note and "rank 40 is above" in note for note in notes)
    assert all(note in caplog.text for note in notes)
    fresh = {key: value.clone() for key, value in get_peft_model_state_dict(wrapped(double_llama(), config)).items()}
    pair = wrapped(double_llama(), config)
    lora_da_core.initialize_lora_da_weights(pair, state_dict=adapter.state_dict(result.factors))
    written = get_peft_model_state_dict(pair)
    ours = adapter.state_dict(result.factors)
    assert all(torch.equal(value, ours.get(key, fresh[key])) for key, value in written.items())
    one_call = lora_da_core.get_lora_da_model(double_llama(), config, batches, pipeline=pipeline)
    hollow = wrapped(double_llama(), config, low_cpu_mem_usage=True)
    lora_da_core.initialize_lora_da_weights(hollow, batches, pipeline=pipeline)
    for model in (one_call, hollow):
        assert not any(parameter.is_meta for parameter in model.parameters())
        # PEFT's default is the zero function, so only what was initialised counts.
        torch.testing.assert_close(logits_of(model), logits_of(pair), rtol=1e-6, atol=1e-8)
    one_call.save_pretrained(tmp_path)
    inputs = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
    assert all(check.passed for check in adapter.verify(tmp_path, double_llama(), result.report, inputs))
    embedding = hollow.get_submodule("base_model.model.model.embed_tokens")
    assert bool((embedding.lora_embedding_A["default"] == 0).all())
    assert 0.5 < float(embedding.lora_embedding_B["default"].std()) < 1.5
    with pytest.raises(TargetError, match="embed_tokens is an Embedding with scale_grad_by_freq"):
        pipeline.run(double_llama(), unread(), lora(target_modules=["embed_tokens"]))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_left_at_the_default_keeps_its_function_on_meta_with_dora() -> None:
    config = lora(use_dora=True, rank_pattern={r".*\.1\.mlp.up_proj": 40})
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(unsupported="default"))
    made = [wrapped(double_llama(), config, low_cpu_mem_usage=hollow) for hollow in (False, True)]
    for model in made:
        lora_da_core.initialize_lora_da_weights(model, data(), pipeline=pipeline)
    for name, parameter in made[0].named_parameters():
        if "magnitude" in name:
            assert torch.equal(parameter, made[1].get_parameter(name))
    torch.testing.assert_close(logits_of(made[1]), logits_of(made[0]), rtol=1e-6, atol=1e-8)


def test_unsupported_is_an_option_of_init() -> None:
    options = partial(InitOptions, model="m", data="d", output=Path("o"))
    preset = Registry().resolve("preset", "robust")
    assert options().lora_da_config(preset).unsupported == "error"
    assert options(unsupported="default").lora_da_config(preset).unsupported == "default"
    with pytest.raises(OptionError, match="unsupported is 'skip'; choose one of error, default"):
        options(unsupported="skip").lora_da_config(preset)


class Small(nn.Module):
    """A convolution before a linear layer, as image models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, **rest: Any) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))  # type: ignore[no-any-return]


def small_losses(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def test_convolutions_are_initialised_or_left() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, grouped = Small(), Small()
        grouped.conv = nn.Conv2d(1, 4, 3, padding_mode="reflect", padding=1)
        batches = [{"x": torch.randn(12, 1, 8, 8), "labels": torch.arange(12) % 3}]
    config = LoraConfig(r=2, target_modules=["conv", "head"])
    with pytest.raises(TargetError, match=r"layer conv is a Conv2d with padding_mode.*unsupported='default'"):
        lora_da_core.build_pipeline(objective=small_losses).run(grouped, unread(), config)
    left = lora_da_core.build_pipeline(
        objective=small_losses, config=LoraDAConfig(unsupported="default", scale="fixed")
    )
    for low_cpu_mem_usage in (False, True):
        for made, initialised in ((model, True), (grouped, False)):
            peft_model = wrapped(copy.deepcopy(made), config, low_cpu_mem_usage=low_cpu_mem_usage)
            lora_da_core.initialize_lora_da_weights(peft_model, batches, pipeline=left)
            layers = layers_of(peft_model)
            assert bool((layers["conv"].lora_B["default"].weight != 0).any()) == initialised
            assert bool((layers["conv"].lora_A["default"].weight != 0).any())
            assert bool((layers["head"].lora_B["default"].weight != 0).any())


def test_bare_parameters_that_are_no_experts_are_refused() -> None:
    config = lora(target_modules=["k_proj"], target_parameters=["q_proj.weight"])
    with pytest.raises(TargetError, match="q_proj is a Linear"):
        lora_da_core.build_pipeline().run(double_llama(), unread(), config)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_an_adapter_that_changed_the_base_is_refused(init: str, model_unchanged: Callable[[nn.Module], None]) -> None:
    state = lora_da_core.get_lora_da_state_dict(make_tiny_llama(), data(), lora())
    peft_model = wrapped(make_tiny_llama(), lora(init_lora_weights=init))
    model_unchanged(peft_model)
    for entry in (
        lambda: lora_da_core.initialize_lora_da_weights(peft_model, unread()),
        lambda: lora_da_core.initialize_lora_da_weights(peft_model, state_dict=state),
        lambda: lora_da_core.build_pipeline().run(peft_model, unread()),
    ):
        with pytest.raises(OptionError, match=f"init_lora_weights='{init}' is another initialisation"):
            entry()


@pytest.mark.parametrize("kind", ["wrapped", "merged", "mixed", "injected", "compiled", "partly compiled"])
def test_merged_mixed_and_compiled_models(kind: str) -> None:
    model, given = make_tiny_llama(), lora()
    if kind in ("wrapped", "merged"):
        model = wrapped(model, given)
    if kind == "merged":
        model.merge_adapter()
    elif kind == "mixed":
        model = peft.PeftMixedModel(model, given)
    elif kind == "injected":
        peft.inject_adapter_in_model(given, model)
    elif kind == "compiled":
        model = torch.compile(model)  # type: ignore[assignment]
    elif kind == "partly compiled":
        model.model.layers[1] = torch.compile(model.model.layers[1])  # type: ignore[assignment]
    messages = {
        "partly compiled": r"its part model\.layers\.1 is compiled",
        "wrapped": "PeftModel already; use initialize_lora_da_weights",
        "merged": "unmerge_adapter",
        "compiled": "the model is compiled",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises((TargetError, OptionError), match=messages.get(kind, "is no PeftModel")))
        if kind == "merged":
            lora_da_core.initialize_lora_da_weights(model, unread())
        else:
            lora_da_core.get_lora_da_model(model, given, unread())


def test_a_failed_write_gives_everything_back(model_unchanged: Callable[[nn.Module], None]) -> None:
    batches: Iterable[Any] = data()
    config = lora(use_dora=True)
    peft_model = wrapped(make_tiny_llama(), config)
    model_unchanged(peft_model)
    state = lora_da_core.get_lora_da_state_dict(peft_model, batches)
    key = sorted(state)[-1]
    with pytest.raises(lora_da_core.AdapterError, match="other values"):
        lora_da_core.initialize_lora_da_weights(peft_model, state_dict={**state, key: state[key] * float("nan")})
    hollow = wrapped(make_tiny_llama(), config, low_cpu_mem_usage=True)
    before = {name: (id(p), p.is_meta) for name, p in hollow.named_parameters()}
    with pytest.raises(lora_da_core.AdapterError, match="other values"):
        lora_da_core.initialize_lora_da_weights(hollow, state_dict={**state, key: state[key] * float("nan")})
    assert {name: (id(p), p.is_meta) for name, p in hollow.named_parameters()} == before


def test_what_peft_sets_trainable_is_undone(model_unchanged: Callable[[nn.Module], None]) -> None:
    model = gpt2()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model_unchanged(model)
    config = lora(bias="all", **GPT2)
    lora_da_core.build_pipeline().run(model, data(), config)
    with pytest.raises(lora_da_core.AdapterError):
        adapter.apply(model, config, {})
