"""What the fuzz tests draw and check: small problems of every kind, and the theorem densely in float64.

Budgets: a test runs a few examples, which are the same every time; `make nightly` draws thousands of fresh ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor, nn

import lora_da_core
from lora_da_core.interfaces import LayerFisher
from lora_da_core.types import LayerReport, LoraFactors

NIGHTLY = "nightly"
"""The hypothesis profile that `make nightly` asks for."""

IGNORED = -100
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fuzzed(few: int, many: int) -> Callable[[Any], Any]:
    """Budgets of a fuzz test: `few` examples always, the same ones; `many` fresh ones where the profile is nightly.

    A test that uses it is collected after the profile is chosen, by `--hypothesis-profile`.
    """
    nightly = settings.get_current_profile_name() == NIGHTLY
    return settings(
        max_examples=many if nightly else few,
        derandomize=not nightly,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.target, Phase.shrink],
    )


# Problems


@dataclass(frozen=True)
class Problem:
    """Data, a model of two layers, and how they are read.

    Attributes:
        sizes: Features of the input, between the layers, and of the output.
        samples: Samples.
        tokens: Tokens of each.
        splits: Sizes of batches, used in turn.
        data: What kind of inputs.
        input_power: Inputs are multiplied by ten to this power.
        loss_power: So is the loss.
        labels: Which labels are masked.
        attention: Which tokens count for the Fisher.
        dtype: Of model and inputs.
        seed: Of model and data.
    """

    sizes: tuple[int, int, int]
    samples: int
    tokens: int
    splits: tuple[int, ...]
    data: str
    input_power: int
    loss_power: int
    labels: str
    attention: str
    dtype: str
    seed: int

    def model(self) -> TwoLayers:
        """The model, from the seed."""
        return TwoLayers(self.sizes, self.seed).to(DTYPES[self.dtype])

    def batches(self) -> list[dict[str, Tensor]]:
        """All samples in batches of the sizes in `splits`."""
        whole = self._whole()
        found, at, turn = [], 0, 0
        while at < self.samples:
            size = self.splits[turn % len(self.splits)]
            found.append({key: value[at : at + size] for key, value in whole.items()})
            at, turn = at + size, turn + 1
        return found

    def _whole(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.samples, self.tokens)
        x = torch.randn(*shape, self.sizes[0], generator=generator, dtype=torch.float64)
        if self.data == "constant":
            x = torch.ones_like(x)
        elif self.data == "duplicated":
            x = x[:1].expand_as(x).clone()
        elif self.data == "zero":
            x = torch.zeros_like(x)
        elif self.data == "one_feature":
            x[..., 1:] = 0
        elif self.data == "wild":
            x = x * 10.0 ** torch.randint(-6, 7, (self.sizes[0],), generator=generator)
        target = torch.randn(*shape, self.sizes[2], generator=generator, dtype=torch.float64)
        labels = torch.zeros(shape, dtype=torch.int64)
        masked = (
            torch.rand(shape, generator=generator) < {"none": 0.0, "some": 0.5, "most": 0.9, "all": 1.0}[self.labels]
        )
        attention = torch.rand(shape, generator=generator) >= {"all": 0.0, "some": 0.5, "none": 1.1}[self.attention]
        return {
            "x": (x * 10.0**self.input_power).to(DTYPES[self.dtype]),
            "target": target.to(DTYPES[self.dtype]),
            "labels": labels.masked_fill(masked, IGNORED),
            "attention_mask": attention.long(),
            "weight": torch.full((self.samples,), 10.0**self.loss_power, dtype=torch.float64).to(DTYPES[self.dtype]),
        }

    @property
    def fits(self) -> bool:
        """Whether the target is the model's own output, so that every gradient is zero."""
        return self.data == "fitted"


class TwoLayers(nn.Module):
    """second(tanh(first(x))), with weights from a seed of its own."""

    def __init__(self, sizes: tuple[int, int, int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = (nn.Linear(a, b) for a, b in pairwise(sizes))
        for parameter in self.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = values / math.sqrt(parameter.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(samples, tokens, in) to (samples, tokens, out)."""
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def squared_error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared error over a sample's labelled tokens, (samples,)."""
    wanted = (batch["labels"] != IGNORED).to(batch["target"].dtype)
    difference = model(batch["x"]) - batch["target"]
    each = difference.square().sum(-1) / 2
    return batch["weight"] * (each * wanted).sum(1) / wanted.sum(1).clamp(min=1)


def fitted_error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same against the model's own output: zero, with zero gradients."""
    own = model(batch["x"]).detach()
    return squared_error(model, {**batch, "target": own})


problems = st.builds(
    Problem,
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 5)),
    samples=st.integers(1, 9),
    tokens=st.integers(1, 4),
    splits=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    data=st.sampled_from(
        ["normal", "normal", "normal", "constant", "duplicated", "zero", "one_feature", "wild", "fitted"]
    ),
    input_power=st.sampled_from([0, 0, 0, 0, -3, 3, -20, 20]),
    loss_power=st.sampled_from([0, 0, 0, 0, -3, 3, -20, 20]),
    labels=st.sampled_from(["none", "none", "some", "most", "all"]),
    attention=st.sampled_from(["all", "all", "some", "none"]),
    dtype=st.sampled_from(["float64", "float64", "float64", "float32", "bfloat16", "float16"]),
    seed=st.integers(0, 2**16),
)


# Settings

estimators = st.one_of(
    st.sampled_from(["identity", "ekfac", "empirical", "diagonal", "kfac", "sketched"]),
    st.tuples(st.just("diagonal"), st.fixed_dictionaries({"per": st.sampled_from(["sample", "token"])})),
    st.tuples(st.just("kfac"), st.fixed_dictionaries({"output": st.sampled_from(["diagonal", "full", "identity"])})),
    st.tuples(
        st.just("sketched"),
        st.fixed_dictionaries(
            {"method": st.sampled_from(["frequent_directions", "nystrom", "svd"]), "size": st.integers(1, 12)}
        ),
    ),
)
solvers = st.sampled_from(["auto", "eigh", "lanczos", "davidson", "lobpcg", "arpack", "randomized_svd"])
dampings = st.sampled_from([0.0, 1e-30, 1e-12, 1e-8, 1e-6, 1e-3, 1e-2, 0.1, 1.0, 100.0, 1e10])

configs = st.fixed_dictionaries(
    {},
    optional={
        "alpha": st.sampled_from([0.0, 1e-6, 0.5, 1.0, 1e6]),
        "beta": st.sampled_from([0.0, 1e-6, 0.03, 1.0, 1e6]),
        "population": st.sampled_from([1, 7, 10**9, 2**62]),
        "normalize": st.booleans(),
        "damping": dampings,
        "damping_kind": st.sampled_from(["relative", "absolute"]),
        "fisher_scale": st.sampled_from(["token_mean", "sample"]),
        "scale": st.sampled_from(["auto", "fixed", "fixed", "unit", "product", "stable"]),
        "gamma": st.sampled_from([1e-6, 1.0, 1024.0, 1e9]),
        "balance": st.sampled_from(["activation", "norm", "even"]),
        "pairing": st.sampled_from(["same", "same", "right_first", "left_first"]),
        "spectrum": st.sampled_from(["kept", "flat"]),
        "rounds": st.sampled_from([1, 1, 2, 3]),
        "layers_per_pass": st.sampled_from(["auto", 1]),
        "samples": st.integers(1, 12),
        "seed": st.integers(0, 3),
        "unconverged": st.sampled_from(["fallback", "warn", "error"]),
        "unsupported": st.sampled_from(["error", "default"]),
    },
)


@dataclass(frozen=True)
class Outcome:
    """What a run of a problem gave.

    Attributes:
        result: The result.
        estimates: The statistics that it was made from.
        pipeline: The pipeline.
    """

    result: lora_da_core.LoraDAResult
    estimates: Any
    pipeline: lora_da_core.Pipeline

    @property
    def layers(self) -> dict[str, LayerReport]:
        """The report by layer."""
        return {layer.name: layer for layer in self.result.report.layers}


@dataclass(frozen=True)
class DenseLayer:
    """One layer's Ω and what it is made of, densely in float64.

    Attributes:
        fisher: J, (out·in, out·in), damping included.
        step: Δ_raw, (in, out).
        omega: σ²Ω = −αΔ_rawΔ_rawᵀ + (β/N)V, (in, in).
        error: How large an error relative to ‖Ω‖ the condition of J allows for.
    """

    fisher: Tensor
    step: Tensor
    omega: Tensor
    error: float = field(default=0.0)


def run(problem: Problem, lora: LoraConfig, pipeline: lora_da_core.Pipeline, model: nn.Module) -> Outcome:
    """Estimates and solves, by the front door."""
    estimates = pipeline.estimate(model, problem.batches(), lora)
    return Outcome(pipeline.solve(estimates), estimates, pipeline)


def dense_fisher(fisher: LayerFisher, out_features: int, in_features: int) -> Tensor:
    """J from products with unit matrices, symmetrised."""
    size = out_features * in_features
    units = torch.eye(size, dtype=torch.float64).view(size, out_features, in_features)
    matrix = torch.stack([fisher.apply(unit).double().flatten() for unit in units], dim=1)
    return (matrix + matrix.mT) / 2


def dense_layer(fisher: Tensor, gradient: Tensor, config: lora_da_core.LoraDAConfig, population: int) -> DenseLayer:
    """Ω by its definition: J is inverted as a whole, and V is the partial trace of the inverse over outputs."""
    out_features, in_features = gradient.shape
    values, vectors = torch.linalg.eigh(fisher)
    condition = float(values.abs().max() / values.abs().min()) if float(values.abs().min()) > 0 else math.inf
    inverse = (vectors / values) @ vectors.mT
    step = -(inverse @ gradient.double().flatten()).view(out_features, in_features).mT
    blocks = inverse.view(out_features, in_features, out_features, in_features)
    variance = torch.einsum("oioj->ij", blocks)
    omega = -config.alpha * step @ step.mT + config.beta / population * variance
    return DenseLayer(fisher, step, omega, 1e-13 * condition)


def basis_of(pair: LoraFactors) -> Tensor:
    """An orthonormal basis of A's rows, (in, r), in float64; A's rows are scaled first, so that none is lost."""
    rows = pair.A.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    basis, _ = torch.linalg.qr(rows.mT)
    return basis
