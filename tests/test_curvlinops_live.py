"""K-FAC and EKFAC, captured from whole models by the pipeline, against the curvlinops package run on those models.

curvlinops knows neither samples of several tokens nor token masks: it sees N·L loss terms, whose mean it
differentiates, and divides by N·L what it sums over all tokens that a layer reads. With g̃ the gradient of the summed
loss and S tokens read by every sample, its Y is Σ g̃g̃ᵀ/(N·L) and its eigenvalues Σ_n (U_YᵀG̃_nU_Z)²/(N·L); here g = g̃/L,
the output factor is the mean over N·S tokens and the eigenvalues the mean over N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import curvlinops
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional

import lora_da_core
from conftest import make_tiny_llama
from lora_da_core import capture
from lora_da_core.adapter import resolve_targets
from lora_da_core.capture import CaptureTask, Statistics
from lora_da_core.interfaces import FisherEstimator, LayerFisher
from lora_da_core.types import LayerSpec
from toy_oracle import dense

SAMPLES, VOCABULARY, HIDDEN, INNER = 8, 11, 8, 12
RHO = 0.01


class Mlp(nn.Module):
    """Two linear layers on looked-up inputs, every token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.first = nn.Linear(HIDDEN, INNER)
        self.last = nn.Linear(INNER, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.last(torch.tanh(self.first(self.embed(input_ids)))),)


class Block(nn.Module):
    """Causal attention with two heads and an MLP; q, k and v read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        seen = self.norms[0](hidden)
        heads = (layer(seen).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.o(mixed.transpose(1, 2).flatten(-2))
        return hidden + self.down(functional.gelu(self.up(self.norms[1](hidden))))


class Transformer(nn.Module):
    """Two blocks in float64 throughout, which no model of transformers is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(16, HIDDEN)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        places = torch.arange(input_ids.shape[1])
        return (self.head(self.blocks(self.embed(input_ids) + self.positions(places))),)


def make_model(name: str) -> nn.Module:
    if name == "llama":
        return make_tiny_llama(
            torch.float64,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
            initializer_range=0.4,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"mlp": Mlp, "transformer": Transformer}[name]().double()


TOLERANCE = 1e-9
"""Relative error allowed, Frobenius."""


@dataclass(frozen=True)
class Case:
    """A model and its data: the last `terms` tokens of every sample are labels."""

    name: str
    length: int
    terms: int
    whole: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one sample that count: all, or those that predict a label."""
        return self.length if self.whole else self.terms

    @property
    def ids(self) -> Tensor:
        return torch.randint(VOCABULARY, (SAMPLES, self.length), generator=torch.Generator().manual_seed(1))


CASES = (
    Case("mlp", length=2, terms=1),
    Case("mlp", length=9, terms=8),
    Case("mlp", length=9, terms=3, whole=True),
    Case("transformer", length=9, terms=8),
    Case("transformer", length=9, terms=3, whole=True),
    # Llama's norms round to float32; powers of two in every mean keep that rounding the same on both sides.
    Case("llama", length=9, terms=8),
)


class LabelScores(nn.Module):
    """The model as curvlinops takes it: one row of logits per label."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        super().__init__()
        self.model = model
        self.last = case.length - 1
        self.first = self.last - case.terms

    def forward(self, ids: Tensor) -> Tensor:
        output = self.model(input_ids=ids)
        logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
        return logits[:, self.first : self.last].flatten(0, 1)


@dataclass(frozen=True)
class Ours:
    """What the pipeline captured."""

    estimator: FisherEstimator[Any]
    specs: dict[str, LayerSpec]
    statistics: Statistics

    def fisher(self, name: str, damping: float, kind: str) -> LayerFisher:
        of_layer = self.statistics.of_layer(name)
        return self.estimator.fisher(of_layer, damping=damping, damping_kind=kind, fisher_scale="token_mean")


def captured(model: nn.Module, case: Case, estimator: str, **options: Any) -> Ours:
    parts = lora_da_core.build_pipeline((estimator, options)).components
    targets = resolve_targets(model, LoraConfig(r=1, target_modules="all-linear"))
    mask = "attention" if case.whole else "labels"
    task = CaptureTask(
        model, targets.modules, targets.specs, parts.objective, parts.estimator, parts.gradient, token_mask=mask
    )
    labels = case.ids.clone()
    labels[:, : -case.terms] = -100
    batches = [
        {"input_ids": ids, "labels": wanted} for ids, wanted in zip(case.ids.split(3), labels.split(3), strict=True)
    ]
    statistics = capture.collect(task, batches, generator=torch.Generator().manual_seed(0))
    return Ours(parts.estimator, {spec.name: spec for spec in targets.specs}, statistics)


class Theirs:
    """curvlinops on the same layers and labels, in batches of its own."""

    def __init__(self, model: nn.Module, case: Case, operator: type[Any], fisher_type: str, layers: list[str]) -> None:
        inputs = case.ids if case.whole else case.ids[:, :-1]
        labels = case.ids[:, -case.terms :]
        weights = [model.get_submodule(name).weight for name in layers]
        self.shapes = {name: weight.shape for name, weight in zip(layers, weights, strict=True)}
        self.operator = operator(
            LabelScores(model, case),
            nn.CrossEntropyLoss(reduction="mean"),
            weights,
            [(x, y.flatten()) for x, y in zip(inputs.split(4), labels.split(4), strict=True)],
            fisher_type=fisher_type,
            check_deterministic=False,
        )

    def factor(self, key: str, layer: str) -> Tensor:
        return self.operator.state_dict()[key][f"model.{layer}"]

    def block(self, layer: str, operator: Any = None) -> Tensor:
        """The layer's block of the operator as a matrix, (out·in, out·in)."""
        size = self.shapes[layer].numel()
        units = [
            torch.eye(size, dtype=torch.float64).view(*shape, size)
            if name == layer
            else torch.zeros(*shape, size, dtype=torch.float64)
            for name, shape in self.shapes.items()
        ]
        products = (self.operator if operator is None else operator) @ units
        return products[list(self.shapes).index(layer)].reshape(size, size)

    def inverse(self, layer: str, damping: Any, **options: Any) -> Tensor:
        damped = curvlinops.KFACInverseLinearOperator(self.operator, damping=damping, min_damping=0.0, **options)
        return self.block(layer, damped)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def dense_inverse(fisher: LayerFisher, spec: LayerSpec) -> Tensor:
    size = spec.out_features * spec.in_features
    units = torch.eye(size, dtype=torch.float64).view(size, spec.out_features, spec.in_features)
    return torch.stack([fisher.solve(unit).flatten() for unit in units], dim=1)


def partial_trace(matrix: Tensor, spec: LayerSpec) -> Tensor:
    """V from J⁻¹: the sum of its diagonal blocks, (in, in)."""
    shape = (spec.out_features, spec.in_features)
    return torch.einsum("oioj->ij", matrix.view(*shape, *shape))


def assert_inverse(fisher: LayerFisher, spec: LayerSpec, expected: Tensor) -> None:
    assert relative(dense_inverse(fisher, spec), expected) < TOLERANCE
    assert relative(fisher.inverse_input_trace().to_dense(), partial_trace(expected, spec)) < TOLERANCE


def mean_diagonal(matrix: Tensor) -> float:
    return float(matrix.diagonal().mean())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kfac_equals_curvlinops(case: Case) -> None:
    model = make_model(case.name)
    ours = captured(model, case, "kfac", output="full")
    theirs = Theirs(model, case, curvlinops.KFACLinearOperator, "empirical", list(ours.specs))
    ratio = case.terms * case.tokens
    for name, spec in ours.specs.items():
        plain = theirs.block(name)
        z, y = (theirs.factor(f"{side}_covariances", name) for side in ("input", "gradient"))
        sums, tokens = ours.statistics.of_layer(name), SAMPLES * case.tokens
        assert sums.tokens == tokens
        assert relative(sums.input["second_moment"] / tokens, z) < TOLERANCE
        assert relative(sums.layer["second_moment"] / tokens * ratio, y) < TOLERANCE
        # √ρ = 1e-12 of each factor is far below what is allowed, and lets a softmax output's Y be factorised.
        assert relative(dense(ours.fisher(name, 1e-24, "relative"), spec) * ratio, plain) < TOLERANCE
        inverse = theirs.inverse(name, RHO * mean_diagonal(plain), use_heuristic_damping=True)
        assert_inverse(ours.fisher(name, RHO, "relative"), spec, inverse * ratio)
        damping = RHO * mean_diagonal(y) / ratio
        inverse = theirs.inverse(name, (damping, damping * ratio))
        assert_inverse(ours.fisher(name, damping, "absolute"), spec, inverse * ratio)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ekfac_equals_curvlinops(case: Case) -> None:
    model = make_model(case.name)
    ours = captured(model, case, "ekfac")
    theirs = Theirs(model, case, curvlinops.EKFACLinearOperator, "empirical", list(ours.specs))
    ratio = case.terms
    for name, spec in ours.specs.items():
        plain = theirs.block(name)
        assert relative(dense(ours.fisher(name, 1e-12, "relative"), spec) * ratio, plain) < TOLERANCE
        damping = RHO * mean_diagonal(plain)
        inverse = theirs.inverse(name, damping, use_exact_damping=True)
        assert_inverse(ours.fisher(name, RHO, "relative"), spec, inverse * ratio)
        assert_inverse(ours.fisher(name, damping / ratio, "absolute"), spec, inverse * ratio)


@pytest.mark.parametrize(
    "case",
    [Case("mlp", length=5, terms=4), Case("transformer", length=6, terms=1, whole=True)],
    ids=str,
)
def test_exact_labels_equal_curvlinops_type_2(case: Case) -> None:
    """Its columns of a Hessian's root are shared by a sample's labels, so labels must be few or not interact."""
    model = make_model(case.name)
    ours = captured(model, case, "kfac", output="full", labels="exact")
    theirs = Theirs(model, case, curvlinops.KFACLinearOperator, "type-2", list(ours.specs))
    ratio = case.terms * case.tokens
    for name, spec in ours.specs.items():
        plain = theirs.block(name)
        assert relative(dense(ours.fisher(name, 1e-24, "relative"), spec) * ratio, plain) < TOLERANCE


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_identity_output_equals_curvlinops_forward_only(case: Case) -> None:
    model = make_model(case.name)
    ours = captured(model, case, "kfac", output="identity")
    theirs = Theirs(model, case, curvlinops.KFACLinearOperator, "forward-only", list(ours.specs))
    for name, spec in ours.specs.items():
        assert_inverse(ours.fisher(name, RHO, "absolute"), spec, theirs.inverse(name, (RHO, 0.0)))
