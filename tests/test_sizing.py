"""Rounds, the size of the step and its division between A and B, against plain torch on merged weights."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from scipy import stats
from torch import Tensor, nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import DataError, LoraDAConfig, OptionError, adapter
from lora_da_core.batches import divided, first_samples
from lora_da_core.omega import WeightStep
from lora_da_core.scale import SURE, line_search

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
SAMPLES = make_samples(40, vocab=8)  # few of the model's words, so that there is something to learn
FEW, UNSEEN = SAMPLES[:24], SAMPLES[24:]


def run(model: nn.Module | None = None, batch_size: int = 5, preset: str = "robust", **config: Any) -> Any:
    pipeline = lora_da_core.build_pipeline(preset=preset)
    pipeline.config = dataclasses.replace(pipeline.config, samples=len(FEW), **config)
    batches = [*make_batches(FEW, batch_size), *make_batches(UNSEEN, batch_size)]
    return pipeline.run(make_tiny_llama(torch.float64) if model is None else model, batches, LORA)


def mean_loss(model: nn.Module, samples: list[dict[str, Tensor]]) -> Tensor:
    """Mean over samples of each one's mean label loss; in float64, as transformers' own is not."""
    losses = [
        nn.functional.cross_entropy(model(input_ids=s["input_ids"][None]).logits[0, :-1], s["labels"][1:])
        for s in samples
    ]
    return torch.stack(losses).mean()


def reached(search: Any) -> float:
    """The loss where a search ended."""
    return float({0.0: search["base_loss"], **dict(search["tried"])}[search["multiplier"]])


def merged(factors: Any) -> nn.Module:
    return adapter.apply(make_tiny_llama(torch.float64), LORA, factors).merge_and_unload()


def merged_loss(factors: Any, samples: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return float(mean_loss(merged(factors), samples))


def test_the_search_reads_unseen_samples_where_there_are_any() -> None:
    result = run()
    with torch.no_grad():
        base = float(mean_loss(make_tiny_llama(torch.float64), UNSEEN))
    assert result.report.scale["base_loss"] == pytest.approx(base, abs=1e-9)
    best = min(loss for _, loss in result.report.scale["tried"])
    assert merged_loss(result.factors, UNSEEN) == pytest.approx(best, abs=1e-9)
    assert best < base
    assert result.report.samples == len(FEW)
    assert not any("sized on samples" in note for note in result.report.notes)


@given(
    slopes=st.lists(st.floats(-3, 3), min_size=2, max_size=16),
    curvature=st.floats(1e-2, 1e3),
    level=st.floats(0, 10),
)
def test_a_step_is_taken_only_where_it_surely_lowers_the_loss(
    slopes: list[float], curvature: float, level: float
) -> None:
    """Against scipy's standard error; of the multipliers tried that pass, it is the best."""
    slope = torch.tensor(slopes, dtype=torch.float64)

    def losses(t: float) -> Tensor:
        return level + slope * t + curvature * t * t

    found = line_search(losses)
    sure = {}
    for multiplier, loss in found.tried:
        change = (losses(multiplier) - losses(0.0)).numpy()
        if change.mean() < -SURE * stats.sem(change) - 1e-12:
            sure[multiplier] = loss
    assert found.base_loss == pytest.approx(level)
    if not found.multiplier:
        assert not sure
        return
    change = (losses(found.multiplier) - losses(0.0)).numpy()
    assert change.mean() < -SURE * stats.sem(change) + 1e-12
    assert float(losses(found.multiplier).mean()) <= min(sure.values(), default=level) + 1e-12


def test_a_direction_that_is_no_better_than_chance_is_seldom_taken() -> None:
    """Slopes of mean 0, so that every step raises the expected loss: the lowest mean alone takes half of them."""
    generator = torch.Generator().manual_seed(0)
    taken, lower = 0, 0
    for _ in range(200):
        slope = torch.randn(16, generator=generator, dtype=torch.float64)
        found = line_search(lambda t, slope=slope: 1 + slope * t + t * t)  # type: ignore[misc]
        taken += found.multiplier > 0
        lower += min(loss for _, loss in found.tried) < found.base_loss
    assert lower > 80
    assert taken < 12


def test_one_sample_and_losses_that_are_not_finite() -> None:
    one = line_search(lambda t: torch.tensor([(t - 0.25) ** 2]))
    assert one.multiplier == pytest.approx(0.25, rel=0.1)
    assert one.standard_error is None
    broken = line_search(lambda t: torch.tensor([1.0 - t, float("nan") if t > 0.1 else 1.0 - t]))
    assert 0 < broken.multiplier <= 0.1


def test_without_unseen_samples_the_report_says_so() -> None:
    result = lora_da_core.build_pipeline().run(make_tiny_llama(), make_batches(FEW), LORA)
    assert any("sized on samples that it was estimated from" in note for note in result.report.notes)


@pytest.mark.parametrize("balance", ["activation", "norm", "even"])
def test_a_balance_changes_the_factors_and_not_their_product(balance: Any) -> None:
    result, other = run(balance=balance), run(balance="norm")
    for name, pair in result.factors.items():
        expected = other.factors[name].B @ other.factors[name].A
        torch.testing.assert_close(pair.B @ pair.A, expected, rtol=1e-8, atol=1e-12)
    for pair in result.factors.values():
        rows = pair.A.norm(dim=1)
        if balance == "even":
            torch.testing.assert_close(pair.A @ pair.A.T, pair.B.T @ pair.B, rtol=1e-6, atol=1e-9)
        else:
            torch.testing.assert_close(rows, rows[:1].expand(4))
        if balance == "norm":
            torch.testing.assert_close(rows, torch.full_like(rows, 3**-0.5))


def test_activation_balance_makes_a_x_as_large_as_a_default_loras() -> None:
    """E‖A x‖² = r‖x‖²/(3·in) for PEFT's default A, here summed over the tokens that predict a label."""
    result = run(balance="activation")
    model, sums = make_tiny_llama(torch.float64), {}
    counted: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(module: nn.Module, args: Any) -> None:
            rows, a = args[0][0][counted["mask"]], result.factors[name].A
            found = torch.stack([(rows @ a.T).square().sum(), rows.square().sum() * len(a) / (3 * rows.shape[1])])
            sums[name] = sums.get(name, 0) + found

        return add

    for name in result.factors:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for sample in UNSEEN:
            counted["mask"] = torch.cat([sample["labels"][1:] != -100, torch.tensor([False])])
            model(input_ids=sample["input_ids"][None])
    for ours, default in sums.values():
        assert float(ours) == pytest.approx(float(default), rel=1e-6)


def test_a_change_is_what_merging_it_would_be() -> None:
    """The gradient at W + change, without touching W, is that of a model whose weights were changed."""
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(scale="fixed"))
    steps = {
        name: WeightStep(pair.B * 2.0, pair.A.T)
        for name, pair in pipeline.run(make_tiny_llama(torch.float64), make_batches(FEW), LORA).factors.items()
    }
    estimates = pipeline.estimate(make_tiny_llama(torch.float64), make_batches(FEW), LORA)
    from lora_da_core.estimation import estimate
    from lora_da_core.operators import LowRankMap

    changes = {name: LowRankMap(step.left, step.right) for name, step in steps.items()}
    task = dataclasses.replace(estimates.task, changes=changes)
    moved = estimate(task, make_batches(FEW), 0)
    model = make_tiny_llama(torch.float64)
    with torch.no_grad():
        for name, step in steps.items():
            model.get_submodule(name).weight += step.left @ step.right.T
    mean_loss(model, FEW).backward()
    for spec in estimates.task.specs:
        torch.testing.assert_close(moved.gradient(spec).to_dense(), model.get_submodule(spec.name).weight.grad)
    assert any(
        not torch.allclose(moved.gradient(spec).to_dense(), estimates.gradient(spec).to_dense())
        for spec in estimates.task.specs
    )


def test_every_round_begins_where_the_last_one_ended() -> None:
    model = make_tiny_llama(torch.float64)
    before = copy.deepcopy(model.state_dict())
    result = run(model, rounds=3)
    scale = result.report.scale
    searches = [*scale["earlier"], scale]
    assert len(searches) == 3
    for last, following in itertools.pairwise(searches):
        assert following["base_loss"] == pytest.approx(reached(last), abs=1e-9)
    assert merged_loss(result.factors, UNSEEN) == pytest.approx(reached(scale), abs=1e-9)
    assert reached(scale) < reached(searches[0])
    assert all(pair.A.shape[0] == pair.B.shape[1] == 4 for pair in result.factors.values())
    assert result.report.samples == len(FEW)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_rounds_do_not_depend_on_how_samples_are_batched() -> None:
    first, second = run(rounds=2, batch_size=1), run(rounds=2, batch_size=7)
    for name, pair in first.factors.items():
        other = second.factors[name]
        torch.testing.assert_close(pair.B @ pair.A, other.B @ other.A, rtol=1e-6, atol=1e-9)


def test_rounds_divide_the_samples() -> None:
    batches = make_batches(SAMPLES[:11], 4)
    parts = divided(batches, 3)
    seen = [[row.tolist() for batch in part for row in batch["input_ids"]] for part in parts]
    assert [len(part) for part in seen] == [4, 4, 3]
    every = [row.tolist() for batch in batches for row in batch["input_ids"]]
    assert sorted(row for part in seen for row in part) == sorted(every)


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_the_first_samples_and_those_that_follow(batch_size: int) -> None:
    batches = make_batches(SAMPLES[:11], batch_size)
    taken, beyond = first_samples(iter(batches), 5, 4)
    rows = [
        [
            int(row[mask.bool()].sum())
            for batch in part
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        for part in (taken, beyond)
    ]
    sums = [int(sample["input_ids"].sum()) for sample in SAMPLES]
    assert rows == [sums[:5], sums[5:9]]
    assert first_samples(batches, None, 4) == (batches, [])
    assert [len(part) for part in first_samples(batches, 99, 4)] == [len(batches), 0]


def test_what_rounds_cannot_do_is_refused() -> None:
    with pytest.raises(OptionError, match="rounds is 2 with a fixed scale"):
        LoraDAConfig(rounds=2, gamma=64.0)
    with pytest.raises(OptionError, match="rounds is 0"):
        LoraDAConfig(rounds=0)
    with pytest.raises(DataError, match="24 samples cannot be divided over rounds=25"):
        run(rounds=25)
    estimates = lora_da_core.build_pipeline().estimate(make_tiny_llama(), make_batches(FEW), LORA)
    with pytest.raises(OptionError, match="made for rounds=1, not 2"):
        lora_da_core.build_pipeline(config=LoraDAConfig(rounds=2)).solve(estimates)


@pytest.mark.parametrize("preset", ["lora_one", "spectral"])
def test_presets_of_the_gradient_alone_are_its_singular_vectors(preset: str) -> None:
    """Against autograd and torch's dense SVD: A = √S Vᵀ, B = −U √S, with S all alike for `spectral`."""
    result = run(preset=preset)
    model = make_tiny_llama(torch.float64)
    mean_loss(model, FEW).backward()
    multiplier = result.report.scale["multiplier"]
    assert multiplier > 0
    for layer in result.report.layers:
        u, values, vh = torch.linalg.svd(model.get_submodule(layer.name).weight.grad)
        sizes = torch.ones(4, dtype=torch.float64) if preset == "spectral" else values[:4] / values[0]
        sizes = sizes * multiplier / 2.0  # PEFT multiplies B·A by 8/4
        pair = result.factors[layer.name]
        torch.testing.assert_close(pair.B @ pair.A, -(u[:, :4] * sizes) @ vh[:4], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(pair.A @ pair.A.T, pair.B.T @ pair.B, rtol=1e-5, atol=1e-9)
