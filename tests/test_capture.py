"""What the taps collect: equal to autograd's own gradients, independent of batching, shared by tensor identity."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn
from torch.nn import functional

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, capture
from lora_da_core.adapter import resolve_targets
from lora_da_core.capture import CaptureTask, Statistics
from lora_da_core.capture.first_look import single_uses
from lora_da_core.config import ComponentChoice
from lora_da_core.model_state import prepared

Watch = Callable[[nn.Module], None]
KFAC_FULL: ComponentChoice = ("kfac", {"output": "full"})


def task_for(model: nn.Module, estimator: ComponentChoice = KFAC_FULL, token_mask: str = "labels") -> CaptureTask:
    parts = lora_da_core.build_pipeline(estimator=estimator).components
    targets = resolve_targets(model, LoraConfig(r=2, target_modules="all-linear"))
    return CaptureTask(
        model, targets.modules, targets.specs, parts.objective, parts.estimator, parts.gradient, token_mask
    )


def collect(model: nn.Module, batches: list[dict[str, Any]], **choices: Any) -> Statistics:
    return capture.collect(task_for(model, **choices), batches, generator=torch.Generator().manual_seed(0))


def sums(statistics: Statistics) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in statistics.layers.items():
        fisher = statistics.of_layer(name)
        gradient = layer.gradient.statistics() if layer.gradient else {}
        for part, tensors in {"input": fisher.input, "layer": fisher.layer, "gradient": gradient}.items():
            found.update({f"{name}/{part}/{key}": value for key, value in tensors.items()})
    return found


def test_gradient_equals_autograd(batches: list[dict[str, Any]]) -> None:
    model = make_tiny_llama(torch.float64)
    statistics = collect(model, batches)
    model.eval()
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:]
        losses = functional.cross_entropy(logits[:, :-1].mT, targets, reduction="none", ignore_index=-100)
        (losses.sum(1) / (targets != -100).sum(1)).sum().backward()
    for name, layer in statistics.layers.items():
        expected = model.get_submodule(name).weight.grad
        assert layer.gradient is not None
        torch.testing.assert_close(layer.gradient.statistics()["gradient"], expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=8, deadline=None)
@given(
    batch_size=st.integers(1, 12),
    order=st.permutations(range(12)),
    padding=st.integers(0, 5),
    mask=st.sampled_from(["labels", "attention"]),
)
def test_batching_order_and_padding_do_not_matter(batch_size: int, order: list[int], padding: int, mask: str) -> None:
    model, samples = make_tiny_llama(torch.float64), make_samples()
    expected = sums(collect(model, make_batches(samples), token_mask=mask))
    other = make_batches([samples[index] for index in order], batch_size, padding)
    for key, value in sums(collect(model, other, token_mask=mask)).items():
        assert float((value - expected[key]).norm() / expected[key].norm()) < 1e-10, key


def test_layers_that_read_one_tensor_share_its_statistics(batches: list[dict[str, Any]]) -> None:
    statistics = collect(make_tiny_llama(), batches)
    leaders = {name: layer.group.leader for name, layer in statistics.layers.items() if layer.group}
    block = "model.layers.1."
    assert {leaders[block + f"self_attn.{part}_proj"] for part in "qkv"} == {block + "self_attn.q_proj"}
    assert {leaders[block + f"mlp.{part}_proj"] for part in ("gate", "up")} == {block + "mlp.gate_proj"}
    assert leaders[block + "self_attn.o_proj"] == block + "self_attn.o_proj"
    assert len(set(leaders.values())) == 8


def test_prompt_and_padding_tokens_stay_out_of_the_fisher_but_not_out_of_the_gradient(
    batches: list[dict[str, Any]],
) -> None:
    model = make_tiny_llama(torch.float64)
    by_labels, by_attention = collect(model, batches), collect(model, batches, token_mask="attention")
    counted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    attended = sum(int(batch["attention_mask"].sum()) for batch in batches)
    name = "model.layers.0.self_attn.q_proj"
    assert by_labels.layers[name].tokens == counted < attended == by_attention.layers[name].tokens
    for key, value in sums(by_labels).items():
        if "/layer/" not in key:  # the last block's output gradients are zero on prompts, so those may agree
            assert torch.equal(value, sums(by_attention)[key]) == ("/gradient/" in key), key


class SharedWeights(nn.Module):
    """One linear layer used twice in a forward pass, as weight-shared models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        hidden = torch.tanh(self.block(self.embed(input_ids)))
        return (self.head(torch.tanh(self.block(hidden))),)


def test_all_uses_of_a_shared_module_are_counted() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = SharedWeights().double()
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    pipeline = lora_da_core.build_pipeline(estimator=KFAC_FULL).components
    targets = resolve_targets(model, LoraConfig(r=2, target_modules=["block"]))
    task = CaptureTask(
        model,
        targets.modules,
        targets.specs,
        pipeline.objective,
        pipeline.estimator,
        pipeline.gradient,
        "attention",
    )
    statistics = capture.collect(task, [batch], generator=torch.Generator())
    logits = model(ids)[0]
    functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1).sum().backward()
    layer = statistics.layers["block"]
    assert layer.tokens == 2 * ids.numel()
    assert layer.gradient is not None and layer.group is not None
    torch.testing.assert_close(layer.gradient.statistics()["gradient"], model.block.weight.grad)
    first = model.embed(ids).flatten(0, 1)
    second = torch.tanh(model.block(first))
    moment = next(iter(layer.group.accumulator.statistics().values()))
    torch.testing.assert_close(moment, first.T @ first + second.T @ second)


def test_samples_without_labels_are_left_out() -> None:
    model, samples = make_tiny_llama(torch.float64), make_samples(8)
    expected = sums(collect(model, make_batches(samples)))
    silent = {"input_ids": torch.arange(9), "labels": torch.full((9,), -100)}
    found = collect(model, make_batches([silent, *samples[:3], silent, *samples[3:]]))
    assert found.samples == 8
    for key, value in sums(found).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_found(
    tiny_llama: nn.Module, batches: list[dict[str, Any]], model_unchanged: Watch, training: bool
) -> None:
    tiny_llama.train(training)
    tiny_llama.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model_unchanged(tiny_llama)
    collect(tiny_llama, batches)


def test_a_loss_that_is_not_finite_names_batch_and_module(
    batches: list[dict[str, Any]], model_unchanged: Watch
) -> None:
    model = make_tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model_unchanged(model)
    with pytest.raises(lora_da_core.ModelError, match=r"loss is not finite in batch 0.*model\.layers\.1\.mlp\.up_proj"):
        collect(model, batches)


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * float("inf")


def test_a_gradient_that_is_not_finite_names_batch_and_layer(
    tiny_llama: nn.Module, batches: list[dict[str, Any]], model_unchanged: Watch
) -> None:
    calls = []

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return BadGradient.apply(output) if len(calls) == 2 else output

    handle = tiny_llama.model.layers[0].mlp.register_forward_hook(spoil)
    model_unchanged(tiny_llama)
    with pytest.raises(lora_da_core.ModelError, match=r"gradient is not finite in batch 1.*layers\.0\.mlp\.down_proj"):
        collect(tiny_llama, batches)
    handle_count = len(tiny_llama.model.layers[0].mlp._forward_hooks)
    assert handle_count == 1 and handle is not None


def test_a_layer_that_never_runs_is_named(batches: list[dict[str, Any]], model_unchanged: Watch) -> None:
    model = make_tiny_llama()
    with torch.random.fork_rng(devices=[]):
        model.add_module("spare", nn.Linear(4, 4))
    model_unchanged(model)
    with pytest.raises(lora_da_core.TargetError, match="never ran on this data, the first is spare"):
        collect(model, batches)


def test_watching_the_head_keeps_every_position(batches: list[dict[str, Any]]) -> None:
    model = make_tiny_llama(torch.float64)
    config = LoraDAConfig(scale="fixed")
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    result = lora_da_core.build_pipeline(config=config).run(model, batches, lora)
    assert {layer.tokens for layer in result.report.layers} == {
        sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    }


class Doubled(nn.Module):
    """A layer used once, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.once = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        hidden = self.twice(torch.tanh(self.twice(torch.tanh(self.once(self.embed(input_ids))))))
        return (self.head(hidden),)


def test_forward_only_statistics_equal_those_of_a_backward_run_and_inputs_do_not_pile_up() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Doubled().double()
    ids = torch.randint(0, 11, (6, 7), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids[:2], "labels": ids[:2]}, {"input_ids": ids[2:], "labels": ids[2:]}]
    lora = LoraConfig(r=2, target_modules=["once", "twice"])
    estimator = ("kfac", {"output": "identity"})
    forward = lora_da_core.build_pipeline(estimator=estimator, gradient="zeroth_order").components
    backward = lora_da_core.build_pipeline(estimator=estimator).components
    targets = resolve_targets(model, lora)
    found = {}
    for label, parts in {"forward": forward, "backward": backward}.items():
        task = CaptureTask(
            model, targets.modules, targets.specs, parts.objective, parts.estimator, parts.gradient, "attention"
        )
        if label == "forward":
            assert not task.needs_backward and single_uses(task, batches) == {"once"}
        found[label] = capture.collect(task, batches, generator=torch.Generator())
    for name in ("once", "twice"):
        theirs = found["backward"].of_layer(name)
        ours = found["forward"].of_layer(name)
        assert ours.tokens == theirs.tokens == ids.numel() * (1 if name == "once" else 2)
        for key, value in theirs.input.items():
            torch.testing.assert_close(ours.input[key], value)


def test_small_gradients_survive_float16(batches: list[dict[str, Any]]) -> None:
    half = make_tiny_llama()
    with torch.no_grad():
        half.lm_head.weight.mul_(2.0**-14)  # gradients of the order of 1e-8, below what float16 holds
    half = half.to(torch.float16)
    found, expected = collect(half, batches), collect(copy.deepcopy(half).double(), batches)
    for name, layer in expected.layers.items():
        ours, theirs = found.layers[name].gradient, layer.gradient
        assert ours is not None and theirs is not None
        a, b = ours.statistics()["gradient"].double().flatten(), theirs.statistics()["gradient"].flatten()
        assert float((b / batches[0]["labels"].numel()).abs().max()) < 2.0**-14
        assert float(functional.cosine_similarity(a, b, dim=0)) > 0.995, name
        assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.05), name


def test_what_was_compiled_in_place_runs_as_written_and_is_compiled_again_afterwards(
    batches: list[dict[str, Any]],
) -> None:
    model = make_tiny_llama(torch.float64)
    expected = sums(collect(model, batches))
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend)
    code = [layer._compiled_call_impl for layer in model.model.layers]
    found = sums(collect(model, batches))
    assert not calls
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert [layer._compiled_call_impl for layer in model.model.layers] == code and all(code)


@pytest.fixture
def attention_kernels() -> Iterator[Any]:
    """torch.backends.cuda, whose choice of attention kernels is put back."""
    kernels = torch.backends.cuda
    before = kernels.cudnn_sdp_enabled(), kernels.mem_efficient_sdp_enabled()
    yield kernels
    kernels.enable_cudnn_sdp(before[0])
    kernels.enable_mem_efficient_sdp(before[1])


@pytest.mark.parametrize("fails", [False, True])
def test_cudnn_plans_no_attention_meanwhile(fails: bool, attention_kernels: Any) -> None:
    attention_kernels.enable_cudnn_sdp(True)
    seen = []
    with contextlib.suppress(KeyError), prepared(nn.Linear(2, 2)):
        seen.append(attention_kernels.cudnn_sdp_enabled())
        if fails:
            raise KeyError
    assert seen == [False] and attention_kernels.cudnn_sdp_enabled()


@pytest.mark.parametrize(("cudnn", "efficient"), [(True, False), (False, True)])
def test_a_choice_of_attention_kernels_stands(cudnn: bool, efficient: bool, attention_kernels: Any) -> None:
    attention_kernels.enable_cudnn_sdp(cudnn)
    attention_kernels.enable_mem_efficient_sdp(efficient)
    with prepared(nn.Linear(2, 2)):
        assert attention_kernels.cudnn_sdp_enabled() == cudnn
    assert attention_kernels.cudnn_sdp_enabled() == cudnn
    assert attention_kernels.mem_efficient_sdp_enabled() == efficient
