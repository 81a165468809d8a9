"""Estimators against other programs (stored results of curvlinops, torch.func) and against theory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lora_da_core
from lora_da_core import capture
from lora_da_core.adapter import resolve_targets
from lora_da_core.capture import CaptureTask
from lora_da_estimators._factors import FactorRequest, damp_dense
from lora_da_estimators.ekfac import Ekfac
from lora_da_estimators.empirical import Empirical
from lora_da_estimators.kfac import Kfac, KfacFisher
from lora_da_estimators.sketched import Sketched
from toy_oracle import Tokens, collect, dense, fisher_of, make, random_tokens

LAYERS = ("flat_l1", "flat_l2", "tokens_l1", "tokens_l2")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def mean_diagonal(matrix: Tensor) -> float:
    return float(matrix.diagonal().mean())


class Stored:
    """One layer of the stored curvlinops results; g are gradients of the loss summed over samples and tokens."""

    def __init__(self, folder: Path, layer: str) -> None:
        with np.load(folder / "curvlinops_mlp.npz") as archive:
            self.arrays = {key: torch.from_numpy(archive[f"{layer}_{key}"]) for key in KEYS}
        self.samples, self.length = self.arrays["X"].shape[:2]
        example = torch.arange(self.samples).repeat_interleave(self.length)
        self.tokens = Tokens(self.arrays["X"].flatten(0, 1), self.arrays["g_sumloss"].flatten(0, 1), example)

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]


KEYS = ("X", "g_sumloss", "Z", "Y", "Vin", "kfac_inv_heur", "kfac_inv_tuple", "ekfac_inv")


@pytest.mark.parametrize("layer", LAYERS)
def test_kfac_of_stored_curvlinops_results(oracle: Path, layer: str) -> None:
    case, estimator = Stored(oracle, layer), make(Kfac, output="full")
    statistics = collect(estimator, case.tokens)
    assert relative(statistics.input["second_moment"] / len(case.tokens.x), case["Z"]) < 1e-12
    assert relative(statistics.layer["second_moment"] / len(case.tokens.x), case["Y"]) < 1e-12
    # Its heuristic divides an absolute λ = 1e-3 as relative damping does.
    rho = 1e-3 / (mean_diagonal(case["Z"]) * mean_diagonal(case["Y"]))
    fisher = estimator.fisher(statistics, damping=rho, damping_kind="relative", fisher_scale="token_mean")
    assert relative(fisher.solve(case["Vin"]), case["kfac_inv_heur"]) < 1e-10
    inputs, output = (
        damp_dense(case[key], 1, FactorRequest("layer", key, "tokens", amount, "absolute"))
        for key, amount in (("Z", 1e-2), ("Y", 2e-3))
    )
    assert relative(KfacFisher(output, inputs).solve(case["Vin"]), case["kfac_inv_tuple"]) < 1e-10


@pytest.mark.parametrize("layer", LAYERS)
def test_ekfac_of_stored_curvlinops_results(oracle: Path, layer: str) -> None:
    case = Stored(oracle, layer)
    # It divides squares by all tokens where the Fisher of per-sample losses divides by samples.
    scaled = Tokens(case.tokens.x, case.tokens.g / case.length**0.5, case.tokens.example)
    fisher = fisher_of(make(Ekfac), scaled, damping=1e-2, damping_kind="absolute")
    assert relative(fisher.solve(case["Vin"]), case["ekfac_inv"]) < 1e-10


class Mlp(nn.Module):
    """Two linear layers; each layer's input and output of the last forward pass are kept."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6, bias=False, dtype=torch.float64)
        self.last = nn.Linear(6, 3, bias=False, dtype=torch.float64)
        for layer in (self.first, self.last):
            with torch.no_grad():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = {"first": x, "last": torch.tanh(self.first(x))}
        return self.last(self.seen["last"])


def labelled(generator: torch.Generator, samples: int = 10) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def captured(model: Mlp, x: Tensor, labels: Tensor) -> dict[str, Tokens]:
    """Both layers' inputs and the output gradients of per-sample cross entropies, one token per sample."""
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: outputs.__setitem__(name, output))
        for name, layer in (("first", model.first), ("last", model.last))
    ]
    loss = nn.functional.cross_entropy(model(x), labels, reduction="sum")
    grads = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    for handle in handles:
        handle.remove()
    return {name: Tokens(model.seen[name].detach(), grads[name], torch.arange(len(x))) for name in outputs}


@pytest.fixture
def mlp() -> Iterator[tuple[Mlp, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    yield (Mlp(generator), *labelled(generator))


@pytest.mark.parametrize("storage", ["rows", "factored", "auto"])
def test_empirical_is_the_fisher_of_per_sample_gradients(mlp: tuple[Mlp, Tensor, Tensor], storage: str) -> None:
    model, x, labels = mlp
    weights = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, one[None]), label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, labels)
    for name, tokens in captured(model, x, labels).items():
        rows = per_sample[f"{name}.weight"].flatten(1)
        expected = rows.T @ rows / len(rows)
        expected = expected + 0.1 * mean_diagonal(expected) * torch.eye(len(expected), dtype=torch.float64)
        fisher = fisher_of(make(Empirical, storage=storage), tokens, damping=0.1)
        assert relative(dense(fisher, tokens.spec), expected) < 1e-12


@pytest.mark.parametrize("bend", [False, True], ids=["linear", "tanh"])
def test_kfac_is_exact_for_deep_linear_networks(bend: bool) -> None:
    """With squared loss the model's Fisher of a linear network is a Kronecker product; a nonlinearity breaks that."""
    generator = torch.Generator().manual_seed(0)
    first, middle, last = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (6, 4), (3, 6))
    )
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)

    def network(weights: Tensor, one: Tensor) -> Tensor:
        hidden = weights @ (first @ one)
        return last @ (torch.tanh(hidden) if bend else hidden)

    jacobian = torch.func.vmap(torch.func.jacrev(network), in_dims=(None, 0))(middle, x)
    expected = torch.einsum("nki,nkj->ij", jacobian.flatten(2), jacobian.flatten(2)) / len(x)
    hidden = x @ first.T
    slope = 1 - torch.tanh(hidden @ middle.T) ** 2 if bend else torch.ones(40, 6, dtype=torch.float64)
    draws = tuple(row * slope for row in last)
    tokens = Tokens(hidden, draws[0], torch.arange(40), draws)
    fisher = fisher_of(make(Kfac, output="full", labels="exact"), tokens, damping=1e-14, damping_kind="absolute")
    error = relative(dense(fisher, tokens.spec), expected)
    assert error > 0.05 if bend else error < 1e-12


def test_ekfac_is_closer_to_the_empirical_fisher_than_kfac() -> None:
    errors = []
    for seed in range(10):
        tokens = random_tokens(torch.Generator().manual_seed(seed), out_features=4, in_features=5, samples=12)
        rows = tokens.gradients().flatten(1)
        exact = rows.T @ rows / len(rows)
        kfac = fisher_of(
            make(Kfac, output="full"), tokens, damping=1e-13, damping_kind="absolute", fisher_scale="sample"
        )
        ekfac = fisher_of(make(Ekfac), tokens, damping=1e-13, damping_kind="absolute")
        errors.append([relative(dense(fisher, tokens.spec), exact) for fisher in (kfac, ekfac)])
    by_kfac, by_ekfac = torch.tensor(errors).mean(0)
    assert by_ekfac < 0.98 * by_kfac
    # In K-FAC's eigenbasis no diagonal is closer, so it holds for every seed too.
    assert all(corrected <= plain for plain, corrected in errors)


class Repeated(nn.Module):
    """Logits Wx of one input x, whatever the token: K-FAC of it is exact."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.x = torch.randn(4, generator=generator, dtype=torch.float64)
        self.linear = nn.Linear(4, 5, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(5, 4, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.linear(self.x.expand(*input_ids.shape, 4)),)


def captured_fisher(model: Repeated, labels: str, samples: int, seed: int) -> Tensor:
    """J, (out·in, out·in), of samples with one label each, nearly undamped."""
    parts = lora_da_core.build_pipeline(("kfac", {"output": "full", "labels": labels})).components
    targets = resolve_targets(model, LoraConfig(r=1, target_modules=["linear"]))
    task = CaptureTask(
        model, targets.modules, targets.specs, parts.objective, parts.estimator, parts.gradient, token_mask="labels"
    )
    batch = {"input_ids": torch.zeros(samples, 2, dtype=torch.long), "labels": torch.tensor([[-100, 0]] * samples)}
    found = capture.collect(task, [batch], generator=torch.Generator().manual_seed(seed)).of_layer("linear")
    fisher = parts.estimator.fisher(found, damping=1e-24, damping_kind="relative", fisher_scale="token_mean")
    return dense(fisher, found.spec)


def test_sampled_labels_converge_to_the_dense_true_fisher_with_the_root_of_their_number() -> None:
    model = Repeated(torch.Generator().manual_seed(2))
    weight = model.linear.weight.detach()
    scores = torch.func.jacrev(lambda w: torch.log_softmax(w @ model.x, 0))(weight).flatten(1)
    expected = scores.T @ (torch.softmax(weight @ model.x, 0)[:, None] * scores)
    assert relative(captured_fisher(model, "exact", 3, 0), expected) < 1e-10
    draws = (16, 64, 256, 1024)
    errors = torch.tensor(
        [[relative(captured_fisher(model, "sampled", count, seed), expected) for seed in range(24)] for count in draws]
    )
    logs = errors.square().mean(1).sqrt().log()
    slopes = logs.diff() / torch.tensor(draws).log().diff()
    assert -0.6 < float(slopes.mean()) < -0.4
    assert float(slopes.max()) < -0.3
    assert float(logs[-1].exp()) < 0.1


def test_ekfac_of_one_token_per_sample_is_exact_on_the_diagonal_of_its_basis() -> None:
    tokens = random_tokens(torch.Generator().manual_seed(0), out_features=4, in_features=5, samples=12)
    fisher = fisher_of(make(Ekfac), tokens, damping=1e-13, damping_kind="absolute")
    rows = tokens.gradients().flatten(1)
    basis = torch.kron(fisher.output_basis, fisher.input_basis)
    expected = (rows @ basis).square().mean(0)
    assert relative(fisher.eigenvalues.flatten(), expected) < 1e-10


def test_sketches_approach_the_empirical_fisher_as_they_grow() -> None:
    tokens = random_tokens(torch.Generator().manual_seed(1), out_features=5, in_features=6, samples=14)
    exact = dense(fisher_of(make(Empirical), tokens, damping=0.01), tokens.spec)
    for method in ("frequent_directions", "nystrom", "svd"):
        errors = [
            relative(
                dense(fisher_of(make(Sketched, method=method, size=size), tokens, damping=0.01), tokens.spec), exact
            )
            for size in (2, 6, 14)
        ]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-8
