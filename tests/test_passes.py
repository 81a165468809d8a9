"""Runs in several passes: the same factors as in one, and less memory; what happens where memory runs out."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional

import lora_da_core
from conftest import assert_same, make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, LoraDAError, LoraDAResult, OptionError, capture, rounds
from lora_da_core.batches import cut
from lora_da_core.budget import workload_of
from lora_da_core.passes import divided_layers, halved, input_groups

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
FIXED = LoraDAConfig(gamma=64.0)
Component = str | tuple[str, dict[str, Any]]


def run(layers_per_pass: Any = "auto", model: nn.Module | None = None, **parts: Any) -> LoraDAResult:
    config = dataclasses.replace(parts.pop("config", FIXED), layers_per_pass=layers_per_pass)
    pipeline = lora_da_core.build_pipeline(config=config, **parts)
    return pipeline.run(model or make_tiny_llama(), make_batches(make_samples()), LORA)


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [
        ("kfac", "full"),
        (("kfac", {"labels": "sampled"}), "full"),
        ("ekfac", "full"),
        ("diagonal", "full"),
        ("empirical", "full"),
        ("identity", "full"),
        ("sketched", "full"),
        ("kfac", "sketched"),
        ("kfac", "zeroth_order"),
    ],
)
def test_factors_are_those_of_one_pass(estimator: Component, gradient: Component) -> None:
    parts = {"estimator": estimator, "gradient": gradient}
    assert_same(run(5, **parts), run(**parts))


def test_several_rounds_with_a_line_search_come_out_the_same() -> None:
    assert_same(run(4, config=LoraDAConfig(rounds=2)), run(config=LoraDAConfig(rounds=2)))


@pytest.mark.parametrize("allocator", ["uniform", "greedy", "parameter_budget", "sublora"])
def test_an_allocator_shares_out_the_ranks_of_all_passes(allocator: Component) -> None:
    several, one = run(5, allocator=allocator), run(allocator=allocator)
    assert_same(several, one)
    assert several.report.allocation == one.report.allocation
    assert set(one.report.allocation["ranks"]) == set(one.factors)


def test_later_rounds_keep_the_ranks_of_an_allocator() -> None:
    config = LoraDAConfig(rounds=2)
    several, one = run(5, config=config, allocator="greedy"), run(config=config, allocator="greedy")
    assert_same(several, one)
    assert len(set(one.report.allocation["ranks"].values())) > 1


@pytest.mark.parametrize("pairing", ["right_first", "left_first"])
def test_pairs_of_directions_are_those_of_one_pass(pairing: Any) -> None:
    config = dataclasses.replace(FIXED, pairing=pairing)
    assert_same(run(5, config=config), run(config=config))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("config", [FIXED, LoraDAConfig(rounds=2)], ids=["fixed", "rounds"])
def test_experts_in_several_passes_are_those_of_one(config: LoraDAConfig, implementation: str) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])

    def found(layers_per_pass: Any) -> LoraDAResult:
        model = make_mixtral()
        model.set_experts_implementation(implementation)
        pipeline = lora_da_core.build_pipeline(config=dataclasses.replace(config, layers_per_pass=layers_per_pass))
        return pipeline.run(model, make_batches(make_samples()), lora)

    several, one = found(1), found("auto")
    assert_same(several, one)
    left = [[note for note in each.report.notes if note.startswith("left at")] for each in (several, one)]
    # No token is routed to expert 3 of either layer: there are passes in which no watched layer runs.
    assert len(left[0]) == 4 and left[0] == left[1]


def test_statistics_of_a_part_are_gone_before_the_next_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[capture.Statistics]] = []
    sizes: list[int] = []
    collect = capture.collect

    def watched(task: capture.CaptureTask, *args: Any, **settings: Any) -> capture.Statistics:
        gc.collect()
        assert not any(each() for each in alive)
        found = collect(task, *args, **settings)
        alive.append(weakref.ref(found))
        sizes.append(len(found.layers))
        return found

    monkeypatch.setattr(capture, "collect", watched)
    run(4)
    # q, k, v and gate, up share an input: no pass divides them.
    assert sizes == [4, 3, 4, 3]


def test_nothing_before_the_first_layer_of_a_pass_is_in_the_graph() -> None:
    model, seen = make_tiny_llama(), []
    early = model.get_submodule("model.layers.0.mlp.down_proj")
    handle = early.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    config = dataclasses.replace(FIXED, layers_per_pass=7)
    lora_da_core.build_pipeline(config=config).run(model, make_batches(make_samples()), LORA)
    handle.remove()
    half = len(seen) // 2
    assert any(seen[:half]) and not any(seen[-half + 1 :])


def make_mixtral() -> nn.Module:
    """A random mixture whose expert 3 never is among the two that a token is routed to."""
    config = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.weight.data[:3].abs_()
        layer.mlp.gate.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
    return model


class Shortage:
    """Raises where a part has more layers than there is memory for."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error = most, error
        self.sizes: list[int] = []
        self._estimate = rounds.estimate

    def __call__(self, task: capture.CaptureTask, *args: Any, **settings: Any) -> Any:
        self.sizes.append(len(task.specs))
        if len(task.specs) > self.most:
            raise self.error
        return self._estimate(task, *args, **settings)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_where_memory_runs_out_passes_are_halved_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    expected = run()
    shortage = Shortage(7, error)
    monkeypatch.setattr(rounds, "estimate", shortage)
    found = run()
    assert shortage.sizes == [14, 7, 7]
    assert_same(found, expected)
    (note,) = [note for note in found.report.notes if "memory ran out" in note]
    assert "14 layers in a pass; started again with at most 7" in note


def test_a_second_shortage_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "estimate", Shortage(3, MemoryError()))
    with pytest.raises(LoraDAError, match=r"memory ran out again.*7 layers.*smaller batches.*layers_per_pass"):
        run()


def test_a_pass_that_cannot_be_divided_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "estimate", Shortage(0, MemoryError()))
    with pytest.raises(LoraDAError, match="memory ran out while the statistics of 3 layers"):
        run(1)


def test_other_errors_are_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "estimate", Shortage(0, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run()


def test_a_shortage_within_a_pass_leaves_the_model_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_llama().train()
    before = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    failures = iter([MemoryError()])
    update = capture.Run._accumulate

    def failing(*args: Any) -> None:
        for error in failures:
            raise error
        update(*args)

    monkeypatch.setattr(capture.Run, "_accumulate", failing)
    found = run(model=model)
    assert any("memory ran out" in note for note in found.report.notes)
    assert [(module.training, len(module._forward_hooks)) for module in model.modules()] == before
    monkeypatch.undo()
    assert_same(found, run())


@pytest.mark.parametrize("value", [0, -1, 1.5, "all", None, True])
def test_a_senseless_number_of_layers_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="layers_per_pass is"):
        LoraDAConfig(layers_per_pass=value)


@pytest.mark.parametrize("gradient", ["full", ("zeroth_order", {"steps": 2, "probes": 1})], ids=str)
def test_an_interrupted_run_goes_on_from_its_completed_passes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, gradient: Component
) -> None:
    pipeline = lora_da_core.build_pipeline(
        gradient=gradient, config=dataclasses.replace(FIXED, layers_per_pass=5), estimator=("kfac", {"output": "full"})
    )
    estimate, made = rounds.estimate, []

    def counted(task: Any, *rest: Any) -> Any:
        made.append([spec.name for spec in task.specs])
        if len(made) == 3:
            raise KeyboardInterrupt
        return estimate(task, *rest)

    def run() -> LoraDAResult:
        return pipeline.run(make_tiny_llama(), make_batches(make_samples()), LORA, cache_dir=tmp_path)

    monkeypatch.setattr(rounds, "estimate", counted)
    with pytest.raises(KeyboardInterrupt):
        run()
    resumed = run()
    # The third part was begun twice, the two before it once.
    assert made[2] == made[3] and len({name for part in made for name in part}) == 14
    assert len(made) == len({tuple(part) for part in made}) + 1
    monkeypatch.undo()
    assert_same(resumed, pipeline.run(make_tiny_llama(), make_batches(make_samples()), LORA))


def test_a_float16_model_s_losses_are_scaled_alike_in_every_pass() -> None:
    several, one = (run(most, model=make_tiny_llama(torch.float16)) for most in (5, "auto"))
    assert_same(several, one)


class Forked(nn.Module):
    """Three convolutions that read one tensor, two of them alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(2, 6, 3, padding=1) for _ in range(2))
        self.c = nn.Conv2d(2, 6, 1)
        self.d = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        states = self.a(images) * self.b(images) + self.c(images)
        return self.d(states.relu().mean((2, 3)))


def forked_loss(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["images"]), batch["labels"], reduction="none")


def test_layers_share_a_pass_where_they_share_statistics() -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Forked()
    images, labels = torch.randn(8, 2, 5, 5, generator=draw), torch.randint(0, 4, (8,), generator=draw)
    batches, lora = [{"images": images, "labels": labels}], LoraConfig(r=1, target_modules=["a", "b", "c", "d"])
    one = lora_da_core.build_pipeline(objective=forked_loss, config=FIXED)
    estimates = one.estimate(model, batches, lora)
    leaders = {name: layer.group.leader for name, layer in estimates.statistics.layers.items() if layer.group}
    groups = input_groups(estimates.task, batches)
    assert groups == [["a", "b"], ["c"], ["d"]]
    assert all(leaders[name] == group[0] for group in groups for name in group)
    divided = lora_da_core.build_pipeline(objective=forked_loss, config=dataclasses.replace(FIXED, layers_per_pass=1))
    assert_same(divided.run(model, batches, lora), one.run(model, batches, lora))


def test_groups_stay_whole() -> None:
    groups = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert divided_layers(groups, 1) == groups
    assert divided_layers(groups, 4) == [["q", "k", "v", "o"], ["gate", "up", "down"]]
    assert halved([["q", "k", "v", "o"], ["gate", "up"]], groups) == [["q", "k", "v"], ["o"], ["gate", "up"]]


def test_batches_are_cut_by_tokens_and_keep_every_sample() -> None:
    batches = [
        {"labels": torch.arange(rows * length).view(rows, length), "flag": 7} for rows, length in ((5, 8), (9, 2))
    ]
    parts = cut(batches, 2, 16)
    assert [tuple(part["labels"].shape) for part in parts] == [(2, 8), (2, 8), (1, 8), (8, 2), (1, 2)]
    assert torch.equal(torch.cat([part["labels"] for part in parts[:3]]), batches[0]["labels"])
    assert all(part["flag"] == 7 for part in parts)
    classes = [{"labels": torch.arange(5)}]
    assert [len(part["labels"]) for part in cut(classes, 2, 16)] == [2, 2, 1]
    found = workload_of(batches)
    assert (found.samples, found.max_length, found.tokens, found.batch_size) == (14, 8, 58, 5)
    # Nine samples of two tokens are a batch of no more than three of eight.
    assert workload_of([batches[1], {"labels": torch.zeros(1, 8)}]).batch_size == 3


def test_a_limit_divides_the_run_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make_tiny_llama(), make_batches(make_samples())
    pipeline = lora_da_core.build_pipeline(config=FIXED)
    with pytest.raises(OptionError, match="smallest that works") as refused:
        pipeline.run(model, batches, LORA, max_memory=1000)
    found = re.search(r"(\d+) bytes", str(refused.value))
    assert found is not None
    least = int(found[1])
    with pytest.raises(OptionError, match="smallest that works"):
        pipeline.run(model, batches, LORA, max_memory=least - 1)
    sizes: list[int] = []
    samples: list[int] = []
    tokens: list[int] = []
    estimate = rounds.estimate

    def counted(task: capture.CaptureTask, batches: Any, *args: Any) -> Any:
        sizes.append(len(task.specs))
        samples.extend(len(batch["labels"]) for batch in batches)
        tokens.extend(batch["labels"].numel() for batch in batches)
        return estimate(task, batches, *args)

    monkeypatch.setattr(rounds, "estimate", counted)
    narrow = pipeline.run(model, batches, LORA, max_memory=least)
    assert sum(sizes) == 14 and len(sizes) > 4
    taken = f"at most {max(sizes)} of 14 layers and {max(tokens)} tokens at a time, {len(sizes)} passes"
    assert max(samples) < max(len(batch["labels"]) for batch in batches)
    wide = pipeline.run(model, batches, LORA, max_memory="1GiB")
    assert any("at most 14 of 14 layers" in note for note in wide.report.notes)
    (note,) = [note for note in narrow.report.notes if note.startswith("planned for")]
    assert taken in note
    # In smaller batches sums are added up in another order.
    for name, pair in wide.factors.items():
        found, expected = (each.B.double() @ each.A.double() for each in (narrow.factors[name], pair))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_limit_does_not_go_with_a_division_of_ones_own() -> None:
    model, batches = make_tiny_llama(), make_batches(make_samples())
    divided = lora_da_core.build_pipeline(config=dataclasses.replace(FIXED, layers_per_pass=2))
    with pytest.raises(OptionError, match="layers_per_pass='auto'"):
        divided.run(model, batches, LORA, max_memory="1GiB")
