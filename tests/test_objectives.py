"""Objectives against transformers' own losses, the curvature of those losses, and what they refuse."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import lora_da_core
import tiny_models as tiny
from lora_da_core.function_objective import objective_of
from lora_da_core.interfaces import Objective
from lora_da_core.registry import Registry
from lora_da_core.types import LayerSpec
from lora_da_objectives.image_classification import ImageClassification
from lora_da_objectives.seq2seq import Seq2Seq
from lora_da_objectives.sequence_classification import SequenceClassification
from lora_da_objectives.token_classification import TokenClassification

Batch = dict[str, Tensor]


def objective(name: str) -> Objective[Any]:
    made: Objective[Any] = Registry().create("objective", name)
    return made


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=tiny.generator(), dtype=torch.float64)


def yes_or_no(*shape: int) -> Tensor:
    return (real(*shape) > 0).double()


def with_labels(labels: Tensor, inputs: Batch | None = None) -> Batch:
    return {**(tiny.texts() if inputs is None else inputs), "labels": labels}


@dataclass(frozen=True)
class Case:
    """A real model and a batch for it."""

    objective: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]


COUNT = len(tiny.LENGTHS)
CASES = {
    "bert one class": Case("sequence_classification", tiny.bert, lambda: with_labels(tiny.classes())),
    "bert several labels": Case("sequence_classification", tiny.bert, lambda: with_labels(yes_or_no(COUNT, 3))),
    "bert regression": Case(
        "sequence_classification", lambda: tiny.bert(num_labels=1), lambda: with_labels(real(COUNT))
    ),
    "bert regression, labels as a column": Case(
        "sequence_classification", lambda: tiny.bert(num_labels=1), lambda: with_labels(real(COUNT, 1))
    ),
    "bert regression of three": Case(
        "sequence_classification", lambda: tiny.bert(problem_type="regression"), lambda: with_labels(real(COUNT, 3))
    ),
    "bert one label of one, named": Case(
        "sequence_classification",
        lambda: tiny.bert(num_labels=1, problem_type="multi_label_classification"),
        lambda: with_labels(yes_or_no(COUNT, 1)),
    ),
    "llama one class": Case("sequence_classification", tiny.llama_classifier, lambda: with_labels(tiny.classes())),
    "llama several labels": Case(
        "sequence_classification", tiny.llama_classifier, lambda: with_labels(yes_or_no(COUNT, 3))
    ),
    "vit one class": Case("image_classification", tiny.vit, lambda: with_labels(tiny.classes(), tiny.images())),
    "vit several labels": Case(
        "image_classification", tiny.vit, lambda: with_labels(yes_or_no(COUNT, 3), tiny.images())
    ),
    "vit regression": Case(
        "image_classification", lambda: tiny.vit(num_labels=1), lambda: with_labels(real(COUNT), tiny.images())
    ),
    "bert tokens": Case(
        "token_classification",
        lambda: tiny.bert("TokenClassification"),
        lambda: with_labels(tiny.tags(tiny.texts())),
    ),
    "t5": Case("seq2seq", tiny.t5, lambda: with_labels(tiny.targets())),
    "bart": Case("seq2seq", tiny.bart, lambda: with_labels(tiny.targets())),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_losses_are_those_of_transformers_for_a_batch_of_one(case: Case) -> None:
    model, batch = case.model(), case.batch()
    named = model.config.problem_type
    with torch.no_grad():
        losses = objective(case.objective).losses(model, batch)
        assert model.config.problem_type == named, "transformers' guess must not be written to the configuration"
        for row in range(COUNT):
            sample = tiny.single(batch, row)
            expected = copy.deepcopy(model)(**sample).loss
            torch.testing.assert_close(losses[row], expected, rtol=1e-6, atol=0)
    assert float(losses.std()) > 1e-3 * float(losses.mean()), "the samples must differ, or the test compares nothing"


def test_a_float32_model_gets_float32_losses(case: Case) -> None:
    model, batch = case.model().float(), case.batch()
    inputs = {key: value.float() if key == "pixel_values" else value for key, value in batch.items()}
    expected = objective(case.objective).losses(case.model(), batch).detach()
    losses = objective(case.objective).losses(model, inputs).detach()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_bfloat16_model_gets_float32_losses(case: Case) -> None:
    model, batch = case.model().bfloat16(), case.batch()
    inputs = {key: value.bfloat16() if key == "pixel_values" else value for key, value in batch.items()}
    assert objective(case.objective).losses(model, inputs).dtype == torch.float32


def test_label_counts() -> None:
    ids = tiny.texts()
    one, some = SequenceClassification.name, TokenClassification.name
    assert objective(one).label_counts({"labels": torch.tensor([2, -100, 0])}).tolist() == [1, 0, 1]
    assert objective(one).label_counts({"labels": torch.tensor([[2], [-100]])}).tolist() == [1, 0]
    nan = math.nan
    assert objective(one).label_counts({"labels": torch.tensor([1.0, nan, -100.0])}).tolist() == [1, 0, 1]
    assert objective(one).label_counts({"labels": torch.tensor([[1.0, 0.0], [1.0, nan]])}).tolist() == [1, 0]
    labels = tiny.tags(ids)
    expected = [int((row != -100).sum()) for row in labels]
    assert objective(some).label_counts(with_labels(labels)).tolist() == expected
    assert objective("seq2seq").label_counts(with_labels(tiny.targets())).tolist() == [n - 1 for n in tiny.LENGTHS]


def spec(name: str = "layer") -> LayerSpec:
    return LayerSpec(name, "linear", 4, 4, rank=2, scaling=1.0)


@pytest.mark.parametrize("kind", ["labels", "attention"])
def test_all_attended_tokens_of_a_classified_sequence_count(kind: Any) -> None:
    made, batch = objective("sequence_classification"), with_labels(tiny.classes())
    width = batch["input_ids"].shape[1]
    assert torch.equal(made.token_mask(batch, spec(), kind, width), batch["attention_mask"].bool())
    assert made.token_mask(batch, spec(), kind, 1).tolist() == [[True]] * COUNT
    del batch["attention_mask"]
    assert bool(made.token_mask(batch, spec(), kind, width).all())
    assert made.token_mask(batch, spec(), kind, width).shape == (COUNT, width)


@pytest.mark.parametrize("tokens", [1, 5])
def test_all_that_a_layer_sees_of_an_image_counts(tokens: int) -> None:
    batch = with_labels(tiny.classes(), tiny.images())
    mask = objective("image_classification").token_mask(batch, spec(), "labels", tokens)
    assert mask.dtype == torch.bool and mask.shape == (COUNT, tokens) and bool(mask.all())


def test_tokens_with_labels_count_where_tokens_are_classified() -> None:
    batch = with_labels(tiny.tags(tiny.texts()))
    made, width = objective("token_classification"), batch["labels"].shape[1]
    assert torch.equal(made.token_mask(batch, spec(), "labels", width), batch["labels"] != -100)
    assert torch.equal(made.token_mask(batch, spec(), "attention", width), batch["attention_mask"].bool())


class TestTokensOfAnEncoderDecoder:
    """Sources are padded to 9 tokens, targets to 8."""

    source = tiny.texts()["attention_mask"].bool()
    labels = tiny.targets()
    target = labels != -100

    def mask(self, name: str, tokens: int, kind: Any = "labels", **more: Tensor) -> Tensor:
        return objective("seq2seq").token_mask({**with_labels(self.labels), **more}, spec(name), kind, tokens)

    @pytest.mark.parametrize("model", [tiny.t5, tiny.bart])
    def test_names_of_real_layers_say_which_tokens_they_read(self, model: Callable[[], nn.Module]) -> None:
        """Against the numbers of tokens that the layers of a running model see."""
        made, seen = model(), {}
        for name, module in made.named_modules():
            if isinstance(module, nn.Linear):

                def look(_module: nn.Module, args: Any, name: str = name) -> None:
                    seen[name] = args[0].shape[1]

                module.register_forward_pre_hook(look)
        made(**with_labels(self.labels))
        assert set(seen.values()) == {8, 9} and len(seen) > 15
        for name, tokens in seen.items():
            expected = self.source if tokens == 9 else self.target
            assert torch.equal(self.mask(name, tokens), expected), name
            # The name alone decides: where the number contradicts it, the mask does not fit and capture refuses it.
            assert self.mask(name, 17 - tokens).shape[1] == tokens, name

    def test_the_number_of_tokens_decides_where_the_name_does_not(self) -> None:
        assert torch.equal(self.mask("bridge", 9), self.source)
        assert torch.equal(self.mask("bridge", 8), self.target)

    def test_what_neither_tells_is_refused(self) -> None:
        batch = with_labels(nn.functional.pad(self.labels, (0, 1), value=-100))
        with pytest.raises(lora_da_core.DataError, match=r"layer bridge sees 9 tokens.*source's or the target's"):
            objective("seq2seq").token_mask(batch, spec("bridge"), "labels", 9)
        assert torch.equal(objective("seq2seq").token_mask(batch, spec("encoder.fc"), "labels", 9), self.source)

    def test_attention_takes_targets_up_to_the_last_label(self) -> None:
        labels = self.labels.clone()
        labels[:, 0] = -100
        assert torch.equal(self.mask("decoder.fc", 8, "attention", labels=labels), self.target)
        given = torch.ones(COUNT, 8)
        assert bool(self.mask("decoder.fc", 8, "attention", decoder_attention_mask=given).all())
        assert torch.equal(self.mask("encoder.fc", 9, "attention"), self.source)

    def test_an_encoder_of_images_has_no_mask(self) -> None:
        batch = with_labels(self.labels, tiny.images())
        mask = objective("seq2seq").token_mask(batch, spec("encoder.fc"), "labels", 5)
        assert mask.shape == (COUNT, 5) and bool(mask.all())


class Head(nn.Module):
    """Logits that are parameters, so that gradients with respect to them are at hand."""

    def __init__(self, logits: Tensor, problem_type: str | None = None) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.config = SimpleNamespace(problem_type=problem_type)

    def forward(self, rows: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[rows])


SAMPLES = 5
ROWS = torch.arange(SAMPLES)
TAGS = torch.tensor([[0, 1, -100], [2, -100, -100], [1, 1, 3], [-100, -100, 0], [3, 2, -100]])


@dataclass(frozen=True)
class Labelled:
    """Logits and labels, and how many labels a sample has."""

    objective: str
    logits: Tensor
    labels: Tensor
    counts: tuple[int, ...]
    problem_type: str | None = None

    def head(self) -> tuple[Head, Batch]:
        return Head(self.logits, self.problem_type), {"rows": ROWS, "labels": self.labels}


LIKELIHOODS = {
    "one class": Labelled("sequence_classification", real(SAMPLES, 4), ROWS % 4, (1,) * SAMPLES),
    "one class of images": Labelled("image_classification", real(SAMPLES, 4), ROWS % 4, (1,) * SAMPLES),
    "several labels": Labelled("sequence_classification", 2 * real(SAMPLES, 3), yes_or_no(SAMPLES, 3), (3,) * SAMPLES),
    "regression": Labelled("sequence_classification", real(SAMPLES, 2), real(SAMPLES, 2), (2,) * SAMPLES, "regression"),
    "tokens": Labelled(
        "token_classification", 2 * real(SAMPLES, 3, 4), TAGS, tuple(int(n) for n in (TAGS != -100).sum(1))
    ),
}


@pytest.fixture(params=LIKELIHOODS)
def labelled(request: pytest.FixtureRequest) -> Labelled:
    return LIKELIHOODS[request.param]


def test_exact_draws_sum_to_the_curvature_of_the_loss(labelled: Labelled) -> None:
    """In the natural parameters of these families the Fisher of the loss's terms is their Hessian.

    A loss that is the mean of c terms has the Hessian Σ H/c, and draws of g/c give Σ H/c².
    """
    made = objective(labelled.objective)
    for row in range(SAMPLES):
        logits = labelled.logits[row : row + 1]
        batch = {"rows": torch.zeros(1, dtype=torch.long), "labels": labelled.labels[row : row + 1]}
        head = Head(logits, labelled.problem_type)

        def loss(moved: Tensor, head: Head = head, batch: Batch = batch) -> Tensor:
            outcome: Any = torch.func.functional_call(_Loss(made, head, batch), {"head.logits": moved})
            return outcome.sum()

        hessian = torch.autograd.functional.hessian(loss, logits)
        size = logits.numel()
        found = torch.zeros(size, size, dtype=torch.float64)
        for draw in made.fisher_losses(head, batch, "exact", generator=torch.Generator()):
            (gradient,) = torch.autograd.grad(draw().sum(), head.logits)
            found += torch.outer(gradient.flatten(), gradient.flatten())
        expected = hessian.reshape(size, size) / labelled.counts[row]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert float(found.trace()) > 1e-3


class _Loss(nn.Module):
    """An objective's losses of a head as a module, for `functional_call`."""

    def __init__(self, made: Objective[Any], head: Head, batch: Batch) -> None:
        super().__init__()
        self.made, self.head, self.batch = made, head, batch

    def forward(self) -> Tensor:
        return self.made.losses(self.head, self.batch)


def sampled(labelled: Labelled, size: int, seed: int = 0) -> Tensor:
    """Losses of drawn labels, in batches of `size`, one generator over all."""
    head, batch = labelled.head()
    source, found = torch.Generator().manual_seed(seed), []
    for start in range(0, len(batch["labels"]), size):
        part = {key: value[start : start + size] for key, value in batch.items()}
        (draw,) = objective(labelled.objective).fisher_losses(head, part, "sampled", generator=source)
        found.append(draw().detach())
    return torch.cat(found)


def test_drawn_labels_do_not_depend_on_the_batch_size(labelled: Labelled) -> None:
    whole = sampled(labelled, SAMPLES)
    for size in (1, 2):
        torch.testing.assert_close(sampled(labelled, size), whole, rtol=1e-9, atol=0)
    assert not torch.equal(sampled(labelled, SAMPLES, seed=1), whole)


DRAWN = 4000


def test_real_labels_are_drawn_from_the_normal_density_of_the_squared_error() -> None:
    """2·(score − label)² of N(score, 1/2) has the χ² distribution with one degree of freedom."""
    case = Labelled("sequence_classification", torch.full((1, 1), 3.0).double(), torch.zeros(DRAWN), ())
    head = Head(case.logits)
    batch = {"rows": torch.zeros(DRAWN, dtype=torch.long), "labels": case.labels}
    (draw,) = objective(case.objective).fisher_losses(head, batch, "sampled", generator=tiny.generator())
    assert scipy.stats.kstest(2 * draw().detach().numpy(), scipy.stats.chi2(1).cdf).pvalue > 0.01


def test_yes_or_no_is_drawn_with_the_model_s_probability() -> None:
    head = Head(torch.full((1, 2), 0.8).double())
    batch = {"rows": torch.zeros(DRAWN, dtype=torch.long), "labels": torch.zeros(DRAWN, 2)}
    (draw,) = objective("sequence_classification").fisher_losses(head, batch, "sampled", generator=tiny.generator())
    probability = 1 / (1 + math.exp(-0.8))
    # The mean of two losses is that of the number of labels drawn as yes.
    yes, no = -math.log(probability), -math.log(1 - probability)
    drawn = torch.round((draw().detach() * 2 - 2 * no) / (yes - no)).long()
    expected = DRAWN * scipy.stats.binom(2, probability).pmf([0, 1, 2])
    assert scipy.stats.chisquare(torch.bincount(drawn, minlength=3).numpy(), expected).pvalue > 0.01


def refuse(name: str, logits: Tensor, labels: Tensor, problem_type: str | None = None) -> str:
    with pytest.raises(lora_da_core.DataError) as caught:
        objective(name).losses(Head(logits, problem_type), {"rows": torch.arange(len(logits)), "labels": labels})
    return str(caught.value)


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@pytest.mark.parametrize(
    ("outputs", "labels", "problem_type", "message"),
    [
        (3, torch.tensor([0, 3]), None, "range from 0 to 3, and the model has 3 classes"),
        (3, torch.tensor([-1, 2]), None, "range from -1 to 2"),
        (3, torch.tensor([0.0, 1.0]), SINGLE, "labels are torch.float32; classes are integers from 0 to 2"),
        (3, torch.tensor([[0, 1], [1, 2]]), None, r"shape \(2, 2\).*one class per sample, \(2,\)"),
        (3, torch.tensor([0.0, 1.0]), None, r"shape \(2,\); multi_label_classification with 3 outputs needs \(2, 3\)"),
        (3, torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), None, "range from 0 to 2; multi_label.* needs 0 to 1"),
        (3, torch.zeros(2, 3, dtype=torch.long), MULTI, "torch.int64; multi_label.* needs floating-point labels"),
        (1, torch.tensor([1, 2]), None, "torch.int64; regression needs floating-point labels"),
        (2, torch.zeros(2, 3), REGRESSION, r"shape \(2, 3\); regression with 2 outputs needs \(2, 2\)"),
        (2, torch.tensor([0, 1]), "ranking", "problem_type is 'ranking'; known are regression"),
    ],
)
@pytest.mark.parametrize("name", [SequenceClassification.name, ImageClassification.name])
def test_labels_that_do_not_fit_are_refused(
    name: str, outputs: int, labels: Tensor, problem_type: str | None, message: str
) -> None:
    assert re.search(message, refuse(name, real(2, outputs), labels, problem_type))


def test_logits_that_do_not_fit_are_refused() -> None:
    assert "needs (samples, outputs)" in refuse(SequenceClassification.name, real(2, 3, 4), torch.tensor([0, 1]))
    for name in (TokenClassification.name, Seq2Seq.name):
        batch = {"rows": torch.arange(2), "labels": torch.zeros(2, 4, dtype=torch.long), "decoder_input_ids": None}
        head = Head(real(2, 3, 5))
        with pytest.raises(lora_da_core.DataError, match=r"logits of shape \(2, 3, 5\) for labels of shape \(2, 4\)"):
            objective(name).losses(_Seq2SeqHead(head) if name == Seq2Seq.name else _Plain(head), batch)


class _Plain(nn.Module):
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, rows: Tensor, decoder_input_ids: Tensor | None = None) -> Any:
        return self.head(rows)


class _Seq2SeqHead(_Plain):
    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return labels


def test_a_decoder_needs_inputs() -> None:
    batch = {"rows": torch.arange(2), "labels": torch.zeros(2, 3, dtype=torch.long)}
    model = _Plain(Head(real(2, 3, 5)))
    with pytest.raises(lora_da_core.DataError, match=r"_Plain makes no decoder inputs.*put decoder_input_ids into"):
        objective("seq2seq").losses(model, batch)
    given = objective("seq2seq").losses(model, {**batch, "decoder_input_ids": batch["labels"]})
    torch.testing.assert_close(given, objective("seq2seq").losses(_Seq2SeqHead(model.head), batch))


def of_nothing(model: nn.Module, batch: Batch) -> Tensor:
    return torch.zeros(len(batch["labels"]))


class Configured:
    """A loss with a setting of its own."""

    def __call__(self, model: nn.Module, batch: Batch, weight: float = 1.0) -> Tensor:
        return weight * of_nothing(model, batch)


class TestFunction:
    """`objective=callable`."""

    @pytest.mark.parametrize(
        ("function", "name"),
        [
            (of_nothing, "of_nothing"),
            (functools.partial(of_nothing), "of_nothing"),
            (Configured(), "Configured"),
            (Configured().__call__, "Configured.__call__"),
            (functools.partial(functools.partial(Configured(), weight=2.0)), "Configured"),
        ],
    )
    def test_it_is_named_by_its_qualified_name(self, function: Any, name: str) -> None:
        pipeline = lora_da_core.build_pipeline(objective=function)
        assert pipeline.components.names()["objective"] == name
        assert pipeline.components.origins(pipeline.registry)["objective"] == f"a function of {__name__}"
        assert pipeline.components.options()["objective"] == {}

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda model: None, r"<lambda>' cannot be called with a model and a batch: too many positional"),
            (lambda model, batch, weight: None, "missing a required argument: 'weight'"),
            (SequenceClassification, "objective is the class SequenceClassification; give a function"),
            (3, "objective is 3; give a name"),
        ],
    )
    def test_what_cannot_be_a_loss_is_refused(self, function: Any, message: str) -> None:
        with pytest.raises(lora_da_core.OptionError, match=message):
            lora_da_core.build_pipeline(objective=function)

    def test_labels_cannot_be_drawn_from_it(self) -> None:
        with pytest.raises(lora_da_core.OptionError, match="objective 'of_nothing' cannot draw"):
            lora_da_core.build_pipeline(("kfac", {"labels": "sampled"}), objective=of_nothing)

    def test_counts_and_masks(self) -> None:
        made = objective_of(of_nothing)
        batch = with_labels(tiny.tags(tiny.texts()))
        width = batch["labels"].shape[1]
        assert torch.equal(made.label_counts(batch), (batch["labels"] != -100).sum(1))
        assert made.label_counts({"labels": torch.tensor([math.nan, 1.0])}).tolist() == [0, 1]
        assert torch.equal(made.token_mask(batch, spec(), "labels", width), batch["attention_mask"].bool())
        for tokens in (1, 5, width + 1):
            mask = made.token_mask(batch, spec(), "labels", tokens)
            assert mask.shape == (COUNT, tokens) and bool(mask.all())
