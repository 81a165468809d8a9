"""Whole runs with other objectives than a language model's: encoders, image models, encoder-decoders, functions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_da_core
import tiny_models as tiny
from lora_da_core import LoraDAConfig

Batch = dict[str, Tensor]
Watch = Callable[[nn.Module], None]
KFAC_FULL = ("kfac", {"output": "full"})


@dataclass(frozen=True)
class Case:
    """A model, a batch, and the LoRA configuration that a user would give."""

    objective: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    lora: dict[str, Any] = field(default_factory=dict)
    head: str | None = None

    def config(self, **more: Any) -> LoraConfig:
        return LoraConfig(**{"r": 2, "target_modules": "all-linear", **self.lora, **more})


def labelled(labels: Tensor, inputs: Batch) -> Batch:
    return {**inputs, "labels": labels}


CASES = {
    "bert": Case(
        "sequence_classification",
        tiny.bert,
        lambda: labelled(tiny.classes(), tiny.texts()),
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]},
        "classifier",
    ),
    "bert, several labels": Case(
        "sequence_classification",
        tiny.bert,
        lambda: labelled((tiny.generated(3) > 0).double(), tiny.texts()),
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]},
        "classifier",
    ),
    "bert, regression": Case(
        "sequence_classification",
        lambda: tiny.bert(num_labels=1),
        lambda: labelled(tiny.generated(1).squeeze(1), tiny.texts()),
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]},
        "classifier",
    ),
    "llama": Case(
        "sequence_classification",
        tiny.llama_classifier,
        lambda: labelled(tiny.classes(), tiny.texts()),
        {"task_type": "SEQ_CLS"},
        "score",
    ),
    "bert tokens": Case(
        "token_classification",
        lambda: tiny.bert("TokenClassification"),
        lambda: labelled(tiny.tags(tiny.texts()), tiny.texts()),
        {"task_type": "TOKEN_CLS", "target_modules": ["query", "value", "dense"]},
        "classifier",
    ),
    "vit": Case(
        "image_classification",
        tiny.vit,
        lambda: labelled(tiny.classes(), tiny.images()),
        {"modules_to_save": ["classifier"], "exclude_modules": ["classifier"]},
        "classifier",
    ),
    "vit, head adapted": Case(
        "image_classification", tiny.vit, lambda: labelled(tiny.classes(), tiny.images()), {}
    ),
    "t5": Case(
        "seq2seq", tiny.t5, lambda: labelled(tiny.targets(), tiny.texts()), {"task_type": "SEQ_2_SEQ_LM"}
    ),
    "bart": Case(
        "seq2seq", tiny.bart, lambda: labelled(tiny.targets(), tiny.texts()), {"task_type": "SEQ_2_SEQ_LM"}
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def pipeline(objective: Any, estimator: Any = KFAC_FULL, **settings: Any) -> lora_da_core.Pipeline:
    return lora_da_core.build_pipeline(
        estimator, solver="eigh", objective=objective, config=LoraDAConfig(damping=1.0, **settings)
    )


def halves(batch: Batch) -> list[Batch]:
    return [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 4), slice(4, None))]


def test_gradients_are_those_of_the_model_s_own_mean_loss(case: Case, model_unchanged: Watch) -> None:
    model, batch = case.model(), case.batch()
    reference, count = copy.deepcopy(model), len(tiny.LENGTHS)
    for row in range(count):
        (reference(**tiny.single(batch, row)).loss / count).backward()
    model_unchanged(model)
    estimates = pipeline(case.objective).estimate(model, halves(batch), case.config())
    named = dict(reference.named_modules())
    specs = estimates.task.specs
    for spec in specs:
        expected = named[spec.name].weight.grad
        # Llama's and T5's norms compute in float32, whatever the weights are.
        assert float((estimates.gradient(spec).to_dense() - expected).norm() / expected.norm()) < 1e-5, spec.name
    assert len(specs) >= 8
    assert estimates.statistics.samples == count


def test_what_counts_is_what_layers_see_of_samples_without_padding(case: Case) -> None:
    """Σ x xᵀ of every layer, against hooks on one sample at a time."""
    model, batch = case.model(), case.batch()
    # Of the tokens of a classified text, "labels" keeps some alone.
    mask = "attention" if case.objective == "token_classification" else "labels"
    estimates = pipeline(case.objective, token_mask=mask).estimate(model, halves(batch), case.config())
    expected: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(name: str) -> Callable[[nn.Module, Any], None]:
        def add(_module: nn.Module, args: Any) -> None:
            rows = args[0].flatten(0, -2)
            expected[name] = expected.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        for row in range(len(tiny.LENGTHS)):
            model(**tiny.single(batch, row))
    for spec in estimates.task.specs:
        found = estimates.statistics.of_layer(spec.name)
        assert found.tokens == counts[spec.name], spec.name
        torch.testing.assert_close(found.input["second_moment"], expected[spec.name], rtol=1e-8, atol=1e-9)


def test_poolers_and_heads_see_one_token_of_each_sample() -> None:
    case = CASES["bert"]
    estimates = pipeline(case.objective).estimate(case.model(), halves(case.batch()), case.config())
    tokens = {name: layer.tokens for name, layer in estimates.statistics.layers.items()}
    assert tokens["bert.pooler.dense"] == len(tiny.LENGTHS)
    assert tokens["bert.encoder.layer.0.output.dense"] == sum(tiny.LENGTHS)
    case = CASES["vit, head adapted"]
    estimates = pipeline(case.objective).estimate(case.model(), halves(case.batch()), case.config())
    tokens = {name: layer.tokens for name, layer in estimates.statistics.layers.items()}
    assert tokens.pop("classifier") == len(tiny.LENGTHS)
    assert set(tokens.values()) == {5 * len(tiny.LENGTHS)}


def test_only_labelled_tokens_count_where_tokens_are_classified() -> None:
    case = CASES["bert tokens"]
    batch = case.batch()
    estimates = pipeline(case.objective).estimate(case.model(), halves(batch), case.config())
    assert {layer.tokens for layer in estimates.statistics.layers.values()} == {int((batch["labels"] != -100).sum())}
    assert estimates.statistics.label_tokens == int((batch["labels"] != -100).sum())


def test_batches_and_padding_do_not_matter(case: Case) -> None:
    model, batch = case.model(), case.batch()
    ones = [tiny.single(batch, row) for row in range(len(tiny.LENGTHS))]
    whole, alone = [pipeline(case.objective).run(model, data, case.config()) for data in ([batch], ones)]
    assert alone.report.loss == pytest.approx(whole.report.loss, rel=1e-10)
    for name, pair in whole.factors.items():
        expected = pair.B @ pair.A
        found = alone.factors[name].B @ alone.factors[name].A
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert max(float(pair.B.abs().max()) for pair in whole.factors.values()) > 0


def test_the_one_call_gives_a_stock_adapter_that_reloads(case: Case, tmp_path: Path, model_unchanged: Watch) -> None:
    model, batch, config = case.model(), case.batch(), case.config()
    before = copy.deepcopy(config.to_dict())
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if case.objective == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    with torch.no_grad():
        base = model(**inputs).logits
    wrapped = lora_da_core.get_lora_da_model(model, config, halves(batch), pipeline=pipeline(case.objective)).eval()
    assert config.to_dict() == before
    with torch.no_grad():
        found = wrapped(**inputs).logits
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(**inputs).logits, base)
    assert float((found - base).abs().max()) > 1e-3
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    head = {name for name in trained if ".lora_" not in name}
    assert bool(head) == (case.head is not None)
    assert all(f".{case.head}.modules_to_save.default." in name for name in head)
    assert {name for name in trained if f"{case.head}." in name} == head, "the head is trained whole, not adapted"
    wrapped.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(case.model(), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, found)


def test_a_trained_head_stays_when_an_adapter_is_initialised() -> None:
    case = CASES["bert"]
    wrapped = get_peft_model(case.model(), case.config())
    head = wrapped.get_base_model().classifier
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    expected = {name: value.clone() for name, value in head.state_dict().items()}
    lora_da_core.initialize_lora_da_weights(wrapped, halves(case.batch()), pipeline=pipeline(case.objective))
    assert all(torch.equal(value, expected[name]) for name, value in head.state_dict().items())
    changed = [name for name, value in wrapped.named_parameters() if ".lora_B." in name and bool(value.any())]
    assert len(changed) == len([name for name, _ in wrapped.named_parameters() if ".lora_B." in name])


def test_a_head_that_peft_would_adapt_and_train_whole_is_refused_in_its_words(model_unchanged: Watch) -> None:
    case = CASES["bert tokens"]
    model = case.model()
    model_unchanged(model)
    with pytest.raises(lora_da_core.TargetError, match="PEFT says: modules_to_save cannot be applied"):
        pipeline(case.objective).run(model, [case.batch()], case.config(target_modules="all-linear"))


@pytest.mark.parametrize("labels", ["exact", "sampled"])
def test_the_model_s_own_labels_at_a_head(labels: str) -> None:
    """Σ g gᵀ of a softmax head over its own labels: Σ_n diag(p) − p pᵀ in expectation."""
    case = CASES["vit, head adapted"]
    model, batch = case.model(), case.batch()
    copies = 400 if labels == "sampled" else 1
    config = case.config(target_modules=["classifier"])
    many = {key: value.repeat_interleave(copies, 0) for key, value in batch.items()}
    estimates = pipeline(case.objective, ("kfac", {"output": "full", "labels": labels})).estimate(model, [many], config)
    with torch.no_grad():
        probabilities = torch.softmax(model(batch["pixel_values"]).logits, -1)
    expected = torch.diag(probabilities.sum(0)) - probabilities.T @ probabilities
    found = estimates.statistics.of_layer("classifier").layer["second_moment"] / copies
    tolerance = 1e-9 if labels == "exact" else 0.1 * float(expected.norm())
    assert float((found - expected).norm()) < tolerance
    truth = nn.functional.one_hot(batch["labels"], 3) - probabilities
    assert float((truth.T @ truth - expected).norm()) > 0.2 * float(expected.norm()), "the data's labels differ"


def test_a_masked_sample_is_left_out() -> None:
    case = CASES["vit, head adapted"]
    model, batch = case.model(), case.batch()
    masked = {**batch, "labels": batch["labels"].index_fill(0, torch.tensor([1]), -100)}
    kept = {key: value[[0, 2, 3, 4, 5]] for key, value in batch.items()}
    found, expected = [pipeline(case.objective).run(model, [data], case.config()) for data in (masked, kept)]
    assert found.report.samples == 5
    assert any("1 of 6 samples have no labels" in note for note in found.report.notes)
    for name, pair in expected.factors.items():
        torch.testing.assert_close(found.factors[name].B, pair.B)


def of_images(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["pixel_values"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


class TestFunction:
    """A plain function in place of an objective's name."""

    case = CASES["vit"]

    def run(self, objective: Any, model: nn.Module | None = None) -> lora_da_core.LoraDAResult:
        return pipeline(objective).run(model or self.case.model(), halves(self.case.batch()), self.case.config())

    def test_it_gives_the_factors_of_the_plugin_with_the_same_loss(self) -> None:
        found, expected = self.run(of_images), self.run("image_classification")
        for name, pair in expected.factors.items():
            assert torch.equal(found.factors[name].A, pair.A) and torch.equal(found.factors[name].B, pair.B)
        assert found.report.loss == expected.report.loss
        assert found.report.components["objective"] == "of_images"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda losses: losses.mean(), r"returned losses of shape \(\) for 4 samples in batch 0"),
            (lambda losses: losses.tolist(), r"returned losses of type <class 'list'> for 4 samples"),
            (lambda losses: losses.detach(), r"returned losses without a graph in batch 0"),
            (lambda losses: losses[7:8, 0], rf"\(a function of {__name__}\) raised in batch 0: IndexError"),
        ],
    )
    def test_what_is_no_loss_is_refused(
        self, change: Callable[[Tensor], Any], message: str, model_unchanged: Watch
    ) -> None:
        def loss(model: nn.Module, batch: Batch) -> Any:
            return change(of_images(model, batch))

        model = self.case.model()
        model_unchanged(model)
        with pytest.raises(lora_da_core.PluginError, match=message) as caught:
            self.run(loss, model)
        assert "<locals>.loss'" in str(caught.value)

    def test_a_loss_that_reaches_no_target_is_told_apart(self) -> None:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch["pixel_values"].mean((1, 2, 3))

        with pytest.raises(lora_da_core.TargetError, match="no targeted layer ran in batch 0"):
            self.run(loss)


class Reader(nn.Module):
    """A layer that runs on what the objective's mask does not know, or on inputs of two lengths."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.lengths = lengths
        self.embed = nn.Embedding(tiny.VOCABULARY, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        hidden = self.embed(input_ids)
        return (self.head(sum(self.layer(hidden[:, :length]).mean(1) for length in self.lengths)),)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((5,), r"layer layer saw 30 tokens where the token mask has \(6, 9\)"),
        ((9, 5), r"layer layer saw 30 tokens where the token mask has \(6, 9\)"),
    ],
)
def test_tokens_of_unknown_origin_are_refused(lengths: tuple[int, ...], message: str, model_unchanged: Watch) -> None:
    model = tiny.made(lambda: Reader(lengths))
    model_unchanged(model)
    batch = labelled(tiny.classes(), tiny.texts())
    with pytest.raises(lora_da_core.ModelError, match=message):
        pipeline("sequence_classification").run(model, [batch], LoraConfig(r=2, target_modules=["layer"]))
