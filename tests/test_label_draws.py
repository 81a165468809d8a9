"""Fishers of labels drawn from the model: exact expectations, samples of them, and what they leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, capture
from lora_da_core.adapter import resolve_targets
from lora_da_core.capture import CaptureTask, Statistics
from lora_da_core.interfaces import NoOptions
from lora_da_objectives._likelihood import ENUMERABLE
from lora_da_objectives.causal_lm import CausalLM
from tiny_models import bert, causal, classes, continued, t5, tags, targets, texts
from toy_oracle import CASES, PARAMETER_SETS, Case, load

TINY = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "vocab_size": 7}


class LinearSoftmax(nn.Module):
    """Logits Wx of inputs that are looked up by number: the toy oracle's model."""

    def __init__(self, weight: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.inputs = nn.Embedding.from_pretrained(rows)
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.linear.weight = nn.Parameter(weight.clone())

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.inputs(input_ids)))


def linear_softmax(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """The toy layer as a language model; labels stand one position after the input that predicts them."""
    samples, tokens, size = case["X"].shape
    ids = torch.zeros(samples, tokens + 1, dtype=torch.long)
    ids[:, :tokens] = torch.arange(samples * tokens).view(samples, tokens)
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = torch.where(case["mask"], case["targets"], -100)
    return LinearSoftmax(case["W"], case["X"].reshape(-1, size)), {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("batch_size", [5, 12])
@pytest.mark.parametrize("parameters", PARAMETER_SETS)
@pytest.mark.parametrize("name", CASES)
def test_exact_labels_give_the_dense_true_fisher(oracle: Path, name: str, parameters: str, batch_size: int) -> None:
    case = load(oracle, name)
    params = case.params[parameters]
    model, batch = linear_softmax(case)
    parts = [
        {key: value[start : start + batch_size] for key, value in batch.items()} for start in range(0, 12, batch_size)
    ]
    config = LoraDAConfig(
        alpha=params["alpha"],
        beta=params["beta"],
        population=params["N"],
        gamma=params["gamma"],
        normalize=params["normalize"],
        damping=0.01,
    )
    kfac = ("kfac", {"output": "full", "labels": "exact"})
    pipeline = lora_da_core.build_pipeline(kfac, solver="eigh", config=config)
    result = pipeline.run(model, parts, LoraConfig(r=case.meta["r"], target_modules=["linear"]))
    factors, report = result.factors["linear"], result.report.layers[0]
    expected = case[f"kfac_fullY_true/{parameters}/update"]
    assert float((factors.B @ factors.A - expected).norm() / expected.norm()) < 1e-8
    values = case[f"kfac_fullY_true/{parameters}/eig"][: case.meta["r"]].tolist()
    assert report.ritz_values == pytest.approx(values, rel=1e-8)
    assert report.tokens == case.meta["tokens"]


def statistics_with(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    labels: str,
    seed: int = 0,
    targets: str | list[str] = "all-linear",
) -> Statistics:
    parts = lora_da_core.build_pipeline(("kfac", {"output": "full", "labels": labels})).components
    found = resolve_targets(model, LoraConfig(r=2, target_modules=targets))
    task = CaptureTask(
        model, found.modules, found.specs, parts.objective, parts.estimator, parts.gradient, token_mask="labels"
    )
    return capture.collect(task, batches, generator=torch.Generator().manual_seed(seed))


def output_moment(model: nn.Module, batches: list[dict[str, Tensor]], labels: str, seed: int, name: str) -> Tensor:
    """Σ g gᵀ of one layer."""
    return statistics_with(model, batches, labels, seed).of_layer(name).layer["second_moment"]


def scores_by_label(model: nn.Module, batches: list[dict[str, Tensor]], weight: Tensor) -> Iterator[Tensor]:
    """√p·∂(−log p_c)/∂W for every label position and class, by autograd, one graph per sample."""
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0]
            places = (labels[1:] != -100).nonzero().flatten()
            for log_p in torch.log_softmax(logits[places], -1).flatten():
                (gradient,) = torch.autograd.grad(-log_p, weight, retain_graph=True)
                yield (0.5 * log_p.detach()).exp() * gradient / len(places)


def test_exact_labels_sum_to_the_expectation_on_a_transformer() -> None:
    """With one label per sample a class's output gradient is its weight gradient over the one input: G = g xᵀ."""
    model = make_tiny_llama(torch.float64, **TINY)
    samples = make_samples(3, vocab=7)
    for sample in samples:
        sample["labels"][:-1] = -100
    batches = make_batches(samples)
    name = "lm_head"
    found = statistics_with(model, batches, "exact", targets=["lm_head"])
    hidden = model.model(**{key: batches[0][key] for key in ("input_ids", "attention_mask")}).last_hidden_state
    lengths = batches[0]["attention_mask"].sum(1)
    inputs = hidden[torch.arange(3), lengths - 2]
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for gradient, row in zip(
        scores_by_label(model, batches, model.lm_head.weight), inputs.repeat_interleave(7, 0), strict=True
    ):
        output_grad = gradient @ row / row.square().sum()
        expected += torch.outer(output_grad, output_grad)
    torch.testing.assert_close(found.of_layer(name).layer["second_moment"], expected.detach(), rtol=1e-9, atol=1e-14)
    assert found.of_layer(name).tokens == 3


def test_sampled_labels_converge_to_the_exact_ones_with_the_root_of_their_number() -> None:
    model = make_tiny_llama(torch.float64, **TINY)
    batches = make_batches(make_samples(4, vocab=7))
    name = "model.layers.0.mlp.down_proj"
    exact = output_moment(model, batches, "exact", 0, name)
    sampled = torch.stack([output_moment(model, batches, "sampled", seed, name) for seed in range(64)])
    draws = torch.tensor([1, 4, 16, 64])
    errors = torch.stack(
        [
            (sampled.view(-1, int(n), *exact.shape).mean(1) - exact).norm(dim=(1, 2)).square().mean().sqrt()
            for n in draws
        ]
    )
    logs = torch.stack([draws.double().log(), errors.log()])
    centred = logs - logs.mean(1, keepdim=True)
    slope = float((centred[0] * centred[1]).sum() / centred[0].square().sum())
    assert -0.6 < slope < -0.4
    assert float(errors[-1] / exact.norm()) < 0.1
    empirical = output_moment(model, batches, "empirical", 0, name)
    assert float((empirical - exact).norm()) > 3 * float(errors[-1]), "the data's labels must tell the two apart"


def test_labels_are_drawn_with_the_model_s_probabilities() -> None:
    """Losses tell which label was drawn: with one label per sample a loss is −log p of that label."""
    logits = torch.tensor([3.0, 1.0, 0.0, -1.0, float("-inf")], dtype=torch.float64)
    count = 40000
    model = LinearSoftmax(logits[:, None], torch.ones(1, 1, dtype=torch.float64))
    batch = {"input_ids": torch.zeros(count, 2, dtype=torch.long), "labels": torch.tensor([[-100, 4]]).repeat(count, 1)}
    (draw,) = CausalLM(NoOptions()).fisher_losses(model, batch, "sampled", generator=torch.Generator().manual_seed(0))
    log_p = torch.log_softmax(logits, 0)
    drawn = (draw().detach()[:, None] + log_p[:4]).abs().argmin(1)
    expected = count * log_p[:4].exp()
    found = torch.bincount(drawn, minlength=4)
    # χ² with three degrees of freedom exceeds 16.3 once in a thousand.
    assert float(((found - expected).square() / expected).sum()) < 16.3


def test_labels_drawn_do_not_depend_on_the_batch_size() -> None:
    model, samples = make_tiny_llama(torch.float64, **TINY), make_samples(9, vocab=7)
    name = "model.layers.0.self_attn.q_proj"
    expected = output_moment(model, make_batches(samples, 9), "sampled", 5, name)
    for size in (1, 4):
        torch.testing.assert_close(output_moment(model, make_batches(samples, size), "sampled", 5, name), expected)
    assert not torch.allclose(
        output_moment(model, make_batches(samples, 9), "sampled", 6, name), expected, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("kind", ["text", "two texts", "tags", "one class", "several classes", "numbers"])
def test_a_draw_takes_as_many_numbers_as_it_says(kind: str) -> None:
    batch: dict[str, Any] = texts()
    labels: dict[str, Any] = {
        "text": (lambda: causal("Llama"), "causal_lm", continued()["labels"]),
        "two texts": (t5, "seq2seq", targets()),
        "tags": (lambda: bert("TokenClassification"), "token_classification", tags(batch)),
        "one class": (bert, "sequence_classification", classes()),
        "several classes": (bert, "sequence_classification", torch.rand(len(classes()), 3).round().double()),
        "numbers": (lambda: bert(problem_type="regression"), "sequence_classification", torch.rand(6, 3).double()),
    }
    create, name, batch["labels"] = labels[kind]
    objective = lora_da_core.build_pipeline(objective=name).components.objective
    model, used, counted = create(), *(torch.Generator().manual_seed(4) for _ in range(2))
    for draw in objective.fisher_losses(model, batch, "sampled", generator=used):
        assert draw().shape == (len(batch["labels"]),)
    counts = objective.draw_counts(batch)
    torch.rand(int(counts.sum()), generator=counted, dtype=torch.float64)
    assert counts.shape == (len(batch["labels"]),) and bool((counts > 0).all())
    assert torch.equal(used.get_state(), counted.get_state())


def test_labels_of_the_model_touch_the_output_side_alone() -> None:
    model, batches = make_tiny_llama(torch.float64, **TINY), make_batches(make_samples(4, vocab=7))
    found = {labels: statistics_with(model, batches, labels) for labels in ("empirical", "sampled", "exact")}
    for name, layer in found["empirical"].layers.items():
        assert layer.gradient is not None
        for labels in ("sampled", "exact"):
            other = found[labels].layers[name]
            assert other.gradient is not None
            assert torch.equal(other.gradient.statistics()["gradient"], layer.gradient.statistics()["gradient"])
            for part in ("samples", "tokens"):
                assert getattr(found[labels].of_layer(name), part) == getattr(found["empirical"].of_layer(name), part)
            moments = [found[key].of_layer(name) for key in (labels, "empirical")]
            assert torch.equal(moments[0].input["second_moment"], moments[1].input["second_moment"])
            assert not torch.allclose(
                moments[0].layer["second_moment"], moments[1].layer["second_moment"], rtol=1e-3, atol=0
            )
    assert found["sampled"].loss_sum == found["empirical"].loss_sum


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    output_moment(
        make_tiny_llama(**TINY), make_batches(make_samples(2, vocab=7)), "sampled", 0, "model.layers.0.mlp.up_proj"
    )
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_class_that_cannot_occur_gives_no_nan() -> None:
    weight = torch.tensor([[1.0], [2.0], [float("-inf")]], dtype=torch.float64)
    model = LinearSoftmax(weight, torch.ones(1, 1, dtype=torch.float64))
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "labels": torch.tensor([[-100, 1, 0], [-100, 0, -100]])}
    drawn = CausalLM(NoOptions()).fisher_losses(model, batch, "exact", generator=torch.Generator())
    losses = torch.stack([draw() for draw in drawn]).detach()
    assert losses.shape == (6, 2)
    assert bool(losses.isfinite().all())
    assert losses[:, 1].count_nonzero() == 2  # one position, two possible classes
    assert float(losses[2].abs().max()) == 0.0


def test_a_large_vocabulary_is_not_enumerated() -> None:
    model = make_tiny_llama(**(TINY | {"vocab_size": ENUMERABLE + 1}))
    with pytest.raises(lora_da_core.OptionError, match=r"each of 513 classes.*at most 512.*Use labels='sampled'"):
        statistics_with(model, make_batches(make_samples(2)), "exact")


def test_labels_of_another_kind_are_refused() -> None:
    draws = CausalLM(NoOptions()).fisher_losses(nn.Identity(), {}, "empirical", generator=torch.Generator())
    with pytest.raises(lora_da_core.OptionError, match="'sampled' or 'exact'"):
        next(draws)
