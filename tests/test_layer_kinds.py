"""Convolutions, fused experts, layers used several times: autograd's gradients, and stock PEFT reloads the function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import lora_da_core
from lora_da_core import LoraDAConfig, OptionError, TargetError, adapter, capture
from lora_da_core.capture import CaptureTask
from lora_da_core.running_sums import Statistics
from tiny_models import PAD, VOCABULARY, causal, continued, made

Batches = list[dict[str, Tensor]]


def statistics_of(model: nn.Module, lora: LoraConfig, batches: Batches, objective: Any = "causal_lm") -> Statistics:
    parts = lora_da_core.build_pipeline(estimator=("kfac", {"output": "full"}), objective=objective).components
    targets = adapter.resolve_targets(model, lora)
    task = CaptureTask(
        model, targets.modules, targets.specs, parts.objective, parts.estimator, parts.gradient, "attention"
    )
    return capture.collect(task, batches, generator=torch.Generator().manual_seed(0))


def summed_losses(model: nn.Module, batches: Batches, losses: Callable[[nn.Module, Any], Tensor]) -> None:
    """Leaves in `.grad` what autograd makes of the summed per-sample losses."""
    model.eval()
    for batch in batches:
        losses(model, batch).sum().backward()


GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": 2, "stride": 2},
    {"kernel_size": 1, "bias": False},
]


class Images(nn.Module):
    """A convolution, an activation in place, and a head."""

    def __init__(self, **geometry: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, **geometry)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


def image_losses(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def image_model(**geometry: Any) -> nn.Module:
    return made(lambda: Images(**geometry))


def image_batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(12) % 3
    # Brightness tells the classes apart, so that some step surely lowers the loss.
    x = torch.randn(12, 2, 8, 8, generator=generator, dtype=torch.float64) + (labels.double() - 1).view(12, 1, 1, 1)
    return [{"x": x[:7], "labels": labels[:7]}, {"x": x[7:], "labels": labels[7:]}]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_convolutions_gradient_is_autograds_and_its_z_that_of_the_patches(geometry: dict[str, Any]) -> None:
    model, batches = image_model(**geometry), image_batches()
    lora = LoraConfig(r=2, target_modules=["conv"])
    found = statistics_of(model, lora, batches, image_losses)
    summed_losses(model, batches, image_losses)
    layer = found.layers["conv"]
    assert layer.gradient is not None and layer.group is not None
    gradient = layer.gradient.statistics()["gradient"]
    torch.testing.assert_close(
        gradient.reshape(model.conv.weight.shape), model.conv.weight.grad, rtol=1e-12, atol=1e-14
    )
    # The patches by taking one filter per entry of the kernel, which copies what it sees.
    size = gradient.shape[1]
    copier = copy.deepcopy(model.conv)
    copier.weight = nn.Parameter(torch.eye(size, dtype=torch.float64).reshape(size, *copier.weight.shape[1:]))
    copier.bias = None
    rows = torch.cat([copier(batch["x"]).permute(0, 2, 3, 1).reshape(-1, size) for batch in batches]).detach()
    assert layer.tokens == len(rows)
    torch.testing.assert_close(layer.group.accumulator.statistics()["second_moment"], rows.T @ rows)


@pytest.mark.parametrize("geometry", GEOMETRIES[:4], ids=str)
def test_convolutions_reload_and_merge(geometry: dict[str, Any], tmp_path: Path) -> None:
    model, batches = image_model(**geometry), image_batches()
    lora = LoraConfig(r=2, target_modules=["conv", "head"])
    pipeline = lora_da_core.build_pipeline(objective=image_losses)
    base = model(batches[0]["x"])
    peft_model = lora_da_core.get_lora_da_model(model, lora, batches, pipeline=pipeline)
    conv = peft_model.base_model.model.conv
    assert conv.lora_A["default"].weight.shape == (2, *conv.base_layer.weight.shape[1:])
    assert bool((conv.lora_B["default"].weight != 0).any())
    expected = peft_model(batches[0]["x"])
    assert float((expected - base).abs().max()) > 1e-4
    before, after = (
        float(torch.cat([image_losses(m, b) for b in batches]).mean()) for m in (base_of(peft_model), peft_model)
    )
    assert after < before
    peft_model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(image_model(**geometry), tmp_path)
    assert torch.equal(reloaded(batches[0]["x"]), expected)
    torch.testing.assert_close(reloaded.merge_and_unload()(batches[0]["x"]), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("geometry", GEOMETRIES[1:4], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_dora_on_a_convolution_starts_at_w_plus_its_step(
    low_cpu_mem_usage: bool, geometry: dict[str, Any], tmp_path: Path
) -> None:
    batches, x = image_batches(), image_batches()[0]["x"]
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "head"], use_dora=True)
    pipeline = lora_da_core.build_pipeline(objective=image_losses)
    wrapped = get_peft_model(image_model(**geometry), lora, low_cpu_mem_usage=low_cpu_mem_usage)
    lora_da_core.initialize_lora_da_weights(wrapped, batches, pipeline=pipeline)
    stepped, layers = image_model(**geometry), wrapped.eval().base_model.model
    for name in ("conv", "head"):
        layer, weight = getattr(layers, name), getattr(stepped, name).weight
        a, b = (getattr(layer, part)["default"].weight.detach().flatten(1) for part in ("lora_A", "lora_B"))
        assert bool(b.any())
        weight.data += layer.scaling["default"] * (b @ a).reshape(weight.shape)
    expected = wrapped(x)
    torch.testing.assert_close(expected, stepped(x), rtol=1e-6, atol=1e-8)
    wrapped.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(image_model(**geometry), tmp_path).eval()
    assert torch.equal(reloaded(x), expected)
    torch.testing.assert_close(reloaded.merge_and_unload()(x), expected, rtol=1e-6, atol=1e-8)


def base_of(peft_model: PeftModel) -> nn.Module:
    model = copy.deepcopy(peft_model)
    return model.unload()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"groups": 2}, "layer conv is a Conv2d of 2 groups"),
        ({"dilation": 2}, "layer conv is a Conv2d with dilation"),
        ({"padding_mode": "circular"}, "layer conv is a Conv2d with padding_mode"),
    ],
)
def test_convolutions_that_peft_does_not_adapt_faithfully_are_refused(option: dict[str, Any], message: str) -> None:
    model = made(lambda: nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3, padding=1, **option)}))
    with pytest.raises(TargetError, match=message):
        adapter.resolve_targets(model, LoraConfig(r=2, target_modules=["conv"]))


MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
    },
    "Qwen3Moe": {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 12, "head_dim": 8},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
}


def mixture(family: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=PAD,
        **{**MIXTURES[family], **settings},
    )
    model = made(lambda: getattr(transformers, f"{family}ForCausalLM")(config))
    model.set_experts_implementation("eager")  # the only one that takes float64
    return model


def text_losses(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    losses = functional.cross_entropy(logits[:, :-1].mT, targets, reduction="none", ignore_index=-100)
    return losses.sum(1) / (targets != -100).sum(1)


def experts_config(**rest: Any) -> LoraConfig:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "target_parameters": parameters, **rest})


@pytest.mark.parametrize("family", MIXTURES)
def test_an_experts_gradient_is_autograds_and_the_model_is_left_as_found(family: str) -> None:
    model, batches = mixture(family), [continued()]
    found = statistics_of(model, experts_config(), batches)
    assert not any("forward" in module.__dict__ for module in model.modules())
    summed_losses(model, batches, text_losses)
    seen = 0
    for name, layer in found.layers.items():
        module, _, number = name.rpartition(".")
        if not number.isdigit():
            continue
        weight = model.get_parameter(module)
        expected = weight.grad[int(number)] if weight.grad is not None else torch.zeros_like(weight[0])
        if family == "GptOss":  # stored the other way round
            expected = expected.T
        if layer.group is None:
            assert not bool(expected.any())
            continue
        seen += 1
        assert layer.gradient is not None
        torch.testing.assert_close(layer.gradient.statistics()["gradient"], expected, rtol=1e-9, atol=1e-12)
    assert seen >= 8
    attended = int(batches[0]["attention_mask"].sum())
    top = MIXTURES[family]["num_experts_per_tok"]
    for parameter in ("gate_up_proj", "down_proj"):
        tokens = [layer.tokens for name, layer in found.layers.items() if f"layers.0.mlp.experts.{parameter}." in name]
        assert sum(tokens) == top * attended


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fused_experts_reload_and_merge(family: str, tmp_path: Path) -> None:
    model, batch = mixture(family), continued()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        base = model(**inputs).logits
        peft_model = lora_da_core.get_lora_da_model(model, experts_config(), [batch]).eval()
        expected = peft_model(**inputs).logits
        assert float((expected - base).abs().max()) > 1e-4
        assert float(text_losses(peft_model, batch).mean()) < float(text_losses(mixture(family), batch).mean())
        peft_model.save_pretrained(tmp_path)
        reloaded = PeftModel.from_pretrained(mixture(family), tmp_path).eval()
        assert torch.equal(reloaded(**inputs).logits, expected)
        torch.testing.assert_close(reloaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-6, atol=1e-8)


def test_every_experts_factors_are_in_its_place() -> None:
    model, batch = mixture("Mixtral"), continued()
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(scale="fixed"))
    result = pipeline.run(model, [batch], experts_config())
    peft_model = adapter.apply(model, experts_config(), result.factors)
    wrapper = peft_model.base_model.model.model.layers[0].mlp.experts
    while wrapper.parameter_name != "down_proj":
        wrapper = wrapper.base_layer
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    delta = wrapper.get_delta_weight("default")
    for expert in range(3):
        own = b[:, expert::3] @ a[2 * expert : 2 * expert + 2] * wrapper.scaling["default"]
        torch.testing.assert_close(delta[expert], own)
        rows = a[2 * expert : 2 * expert + 2]
        # Orthonormal rows over √γ, which PEFT's default has not.
        torch.testing.assert_close(rows @ rows.T * LoraDAConfig().fixed_gamma, torch.eye(2, dtype=rows.dtype))


def test_an_expert_that_saw_no_token_is_named_and_left_at_the_default(tmp_path: Path) -> None:
    model, batch = mixture("Mixtral", num_local_experts=4), continued()
    for layer in model.model.layers:  # expert 3 gets the least of every logit: it is never among the two largest
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.weight.data[:3].abs_()
    weights = copy.deepcopy(model.state_dict())
    original = {name: module for name, module in model.named_modules() if name.endswith("mlp.gate")}
    handles = [gate.register_forward_pre_hook(lambda m, args: (args[0].abs(),)) for gate in original.values()]
    result = lora_da_core.build_pipeline().run(model, [batch], experts_config())
    experts = [
        f"model.layers.{layer}.mlp.experts.{stack}.3" for layer in (0, 1) for stack in ("down_proj", "gate_up_proj")
    ]
    for name in experts:
        assert any(f"left at PEFT's own initialisation: {name} (0 tokens" in note for note in result.report.notes)
    assert not {layer.name for layer in result.report.layers} & set(experts)
    pair = result.factors["model.layers.1.mlp.experts.down_proj"]
    assert pair.A.shape == (8, 12) and pair.B.shape == (16, 8)
    assert not bool(pair.B[:, 3::4].any()) and bool(pair.B[:, 0::4].any())
    assert 0 < float(pair.A[6:].abs().max()) <= 12**-0.5
    for handle in handles:
        handle.remove()
    adapter.apply(model, experts_config(), result.factors).save_pretrained(tmp_path)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    clean = mixture("Mixtral", num_local_experts=4)
    clean.load_state_dict(weights)
    assert [check for check in adapter.verify(tmp_path, clean, result.report, inputs) if not check.passed] == []


def gradients(statistics: Statistics) -> dict[str, Tensor]:
    found = {name: layer.gradient for name, layer in statistics.layers.items() if layer.group is not None}
    return {name: taken.statistics()["gradient"] for name, taken in found.items() if taken is not None}


def test_statistics_do_not_depend_on_how_experts_are_implemented() -> None:
    eager, grouped = mixture("Mixtral").float(), mixture("Mixtral").float()
    grouped.set_experts_implementation("grouped_mm")
    expected = gradients(statistics_of(eager, experts_config(), [continued()]))
    found = gradients(statistics_of(grouped, experts_config(), [continued()]))
    assert grouped.config._experts_implementation == "grouped_mm"
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_other_bare_parameters_are_refused() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    with pytest.raises(TargetError, match="gate is a MixtralTopKRouter"):
        adapter.resolve_targets(mixture("Mixtral"), config)


class Ragged(nn.Module):
    """`twice` runs on all tokens and on every second one; `once` shares the first of its inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.once = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        first = self.embed(input_ids)
        second = torch.tanh(first[:, ::2])
        pooled = self.twice(second).mean(1, keepdim=True)
        return self.head(torch.tanh(self.twice(first) + self.once(first)) + pooled)  # type: ignore[no-any-return]


def ragged_losses(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["ids"]).mT, batch["labels"], reduction="none").mean(1)


def test_uses_of_different_lengths_and_inputs_shared_in_part_are_all_counted() -> None:
    model = made(Ragged)
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0))
    batches = [{"ids": ids[:3], "labels": ids[:3]}, {"ids": ids[3:], "labels": ids[3:]}]
    found = statistics_of(model, LoraConfig(r=2, target_modules=["twice", "once"]), batches, ragged_losses)
    summed_losses(model, batches, ragged_losses)
    for name in ("twice", "once"):
        layer = found.layers[name]
        assert layer.gradient is not None
        torch.testing.assert_close(
            layer.gradient.statistics()["gradient"], model.get_submodule(name).weight.grad, rtol=1e-11, atol=1e-13
        )
    first = model.embed(ids)
    second = torch.tanh(first[:, ::2]).flatten(0, 1)
    rows = first.flatten(0, 1)
    expected = {"once": rows.T @ rows, "twice": rows.T @ rows + second.T @ second}
    for name, moment in expected.items():
        torch.testing.assert_close(found.of_layer(name).input["second_moment"], moment.detach())
    assert found.layers["twice"].tokens == 4 * 9 and found.layers["once"].tokens == 4 * 6


# What else meets a convolution or fused experts


def untouched() -> Any:
    """Batches that fail a test where they are read."""
    pytest.fail("batches were read")
    yield


@pytest.mark.parametrize("allocator", ["greedy", "parameter_budget", "sublora", "uniform"])
def test_ranks_shared_out_among_convolutions_reload_bitwise(allocator: str, tmp_path: Path) -> None:
    batches, geometry = image_batches(), {"kernel_size": (3, 2)}
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["conv", "head"])
    pipeline = lora_da_core.build_pipeline(solver="eigh", objective=image_losses, allocator=allocator)
    peft_model = lora_da_core.get_lora_da_model(image_model(**geometry), lora, batches, pipeline=pipeline).eval()
    layers = {name: module for name, module in peft_model.named_modules() if hasattr(module, "lora_A")}
    ranks = {name.rpartition(".")[2]: len(module.lora_A["default"].weight) for name, module in layers.items()}
    assert sum(ranks.values()) <= 4 and (allocator == "uniform" or ranks["conv"] != ranks["head"])
    peft_model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {key.removeprefix("base_model.model."): tuple(value.shape) for key, value in saved.items()}
    assert shapes == {
        "conv.lora_A.weight": (ranks["conv"], 2, 3, 2),
        "conv.lora_B.weight": (5, ranks["conv"], 1, 1),
        "head.lora_A.weight": (ranks["head"], 5),
        "head.lora_B.weight": (3, ranks["head"]),
    }
    reloaded = PeftModel.from_pretrained(image_model(**geometry), tmp_path).eval()
    state = peft_model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in reloaded.state_dict().items())
    assert torch.equal(reloaded(batches[0]["x"]), peft_model(batches[0]["x"]))


def test_an_allocator_refuses_fused_experts_before_any_work() -> None:
    pipeline = lora_da_core.build_pipeline(allocator="greedy")
    with pytest.raises(OptionError, match=r"allocator 'greedy': .*experts\.down_proj\.0 and the experts beside it"):
        lora_da_core.get_lora_da_model(mixture("Mixtral"), experts_config(), untouched(), pipeline=pipeline)


@pytest.mark.parametrize("offset", ["base", "frozen_adapter"])
def test_a_convolution_with_an_offset_starts_at_the_bases_function(offset: Any, tmp_path: Path) -> None:
    batches, geometry = image_batches(), {"kernel_size": 3, "padding": 2, "stride": 2}
    lora = LoraConfig(r=2, target_modules=["conv", "head"])
    pipeline = lora_da_core.build_pipeline(objective=image_losses, config=LoraDAConfig(offset=offset))
    expected = image_model(**geometry)(batches[0]["x"])
    peft_model = lora_da_core.get_lora_da_model(image_model(**geometry), lora, batches, pipeline=pipeline).eval()
    conv = peft_model.base_model.model.conv
    assert bool(conv.lora_B["default"].weight.any())
    torch.testing.assert_close(peft_model(batches[0]["x"]), expected, rtol=1e-6, atol=1e-7)
    if offset == "base":
        return
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trained and all(".default." in name for name in trained)
    peft_model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(image_model(**geometry), tmp_path)
    reloaded.load_adapter(str(tmp_path / "lora_da_offset"), "lora_da_offset")
    reloaded.base_model.set_adapter(["default", "lora_da_offset"])
    state = peft_model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in reloaded.state_dict().items())
    assert torch.equal(reloaded.eval()(batches[0]["x"]), peft_model(batches[0]["x"]))


@pytest.mark.parametrize("offset", ["base", "frozen_adapter"])
def test_an_offset_refuses_fused_experts_before_any_work(offset: Any) -> None:
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(offset=offset))
    with pytest.raises(OptionError, match=rf"offset='{offset}': .*experts.* is no single weight"):
        lora_da_core.get_lora_da_model(mixture("Mixtral"), experts_config(), untouched(), pipeline=pipeline)


@pytest.mark.parametrize("kind", ["convolution", "experts", "embedding"])
def test_a_penalty_refuses_what_is_not_linear_before_any_work(kind: str) -> None:
    if kind == "convolution":
        model, lora, named = image_model(kernel_size=3), LoraConfig(r=2, target_modules=["head", "conv"]), "conv"
    elif kind == "embedding":
        model, lora, named = causal("Llama"), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]), "embed_tokens"
    else:
        model, lora, named = mixture("Mixtral"), experts_config(), r"experts\.down_proj\.0"
    with pytest.raises(OptionError, match=rf"a penalty covers linear layers; \S*{named} is none"):
        lora_da_core.penalty_of(get_peft_model(model, lora), "laplace", untouched())


# The whole of one layer against a dense Fisher


DENSE = LoraDAConfig(
    scale="fixed", gamma=4.0, beta=0.4, population=50, damping=0.05, damping_kind="absolute", token_mask="attention"
)


def dense_solution(x: Tensor, g: Tensor, samples: int, rank: int) -> tuple[Tensor, Tensor]:
    """A's row space as a projector (in, in), and B·A, with J written out: K-FAC's definition and nothing else."""
    tokens, inputs, outputs = len(x), x.shape[1], g.shape[1]
    z, y = (rows.T @ rows / tokens + DENSE.damping * torch.eye(rows.shape[1]).double() for rows in (x, g))
    inverse = torch.linalg.inv(torch.kron(y, z))
    step = -(inverse @ (g.T @ x / samples).flatten()).reshape(outputs, inputs).T
    variance = torch.einsum("oioj->ij", inverse.reshape(outputs, inputs, outputs, inputs))
    sigma = torch.linalg.matrix_norm(step, 2)
    delta = step / sigma
    omega = -delta @ delta.T + DENSE.beta * variance / (DENSE.population * sigma**2)
    basis = torch.linalg.eigh(omega).eigenvectors[:, :rank]
    return basis @ basis.T, (basis @ (basis.T @ delta)).T / DENSE.fixed_gamma


@pytest.mark.parametrize("geometry", GEOMETRIES[:4], ids=str)
def test_a_convolutions_start_is_that_of_the_dense_fisher_of_its_patches(geometry: dict[str, Any]) -> None:
    model, batches, rank = image_model(**geometry), image_batches(), 2
    pipeline = lora_da_core.build_pipeline(
        estimator=("kfac", {"output": "full"}), solver="eigh", objective=image_losses, config=DENSE
    )
    pair = pipeline.run(model, batches, LoraConfig(r=rank, target_modules=["conv"])).factors["conv"]
    images, labels = (torch.cat([batch[key] for batch in batches]) for key in ("x", "labels"))
    output = model.conv(images).detach().requires_grad_()
    losses = functional.cross_entropy(model.head(model.act(output.clone()).mean((2, 3))), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(losses, output)
    size = pair.A[0].numel()
    copier = copy.deepcopy(model.conv)
    copier.weight = nn.Parameter(torch.eye(size, dtype=torch.float64).reshape(size, *pair.A.shape[1:]))
    copier.bias = None
    x, g = (found.detach().permute(0, 2, 3, 1).flatten(0, 2) for found in (copier(images), gradient))
    projector, product = dense_solution(x, g, len(images), rank)
    a, b = pair.A.flatten(1), pair.B.flatten(1)
    torch.testing.assert_close(a.T @ a * DENSE.fixed_gamma, projector, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(b @ a, product, rtol=1e-8, atol=1e-9)


def test_an_embeddings_start_is_that_of_the_dense_fisher_of_one_hot_rows() -> None:
    model, rank = made(Ragged), 2
    ids = torch.randint(0, 8, (6, 4), generator=torch.Generator().manual_seed(0))  # three entries are never seen
    batches = [{"ids": ids[:4], "labels": ids[:4]}, {"ids": ids[4:], "labels": ids[4:]}]
    pipeline = lora_da_core.build_pipeline(
        estimator=("kfac", {"output": "full"}), solver="eigh", objective=ragged_losses, config=DENSE
    )
    pair = pipeline.run(model, batches, LoraConfig(r=rank, target_modules=["embed"])).factors["embed"]
    found: list[Tensor] = []
    handle = model.embed.register_forward_hook(
        lambda m, args, out: found.append(out.detach().requires_grad_()) or found[-1]
    )
    losses = ragged_losses(model, {"ids": ids, "labels": ids}).sum()
    handle.remove()
    (g,) = torch.autograd.grad(losses, found[0])
    x = functional.one_hot(ids.flatten(), 11).double()
    projector, product = dense_solution(x, g.flatten(0, 1), len(ids), rank)
    torch.testing.assert_close(pair.A.T @ pair.A * DENSE.fixed_gamma, projector, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(pair.B @ pair.A, product, rtol=1e-6, atol=1e-7)
