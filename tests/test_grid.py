"""Every installed estimator with every gradient and solver: it runs and answers well, or is refused with a reason."""

from __future__ import annotations

import functools
import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig
from lora_da_core.components import Components
from lora_da_core.config import ComponentChoice
from lora_da_core.interfaces import NoOptions, Objective
from lora_da_core.omega import A_SCALE_RANGE, DEFAULT_A_SCALE
from lora_da_core.registry import Registry
from lora_da_core.types import Batch, LayerSpec, LoraDAResult, TokenMask

REGISTRY = Registry()
ESTIMATORS = sorted(REGISTRY.names("estimator"))
GRADIENTS = sorted(n for n in REGISTRY.names("gradient") if REGISTRY.create("gradient", n).follows_loss)
SOLVERS = sorted({*REGISTRY.names("solver"), "auto"})
RANK = 2
FEW_PROBES = {"zeroth_order": {"steps": 4, "probes": 1}, "smoothed": {"probes": 4}}
"""Options of gradients whose defaults are meant for patience."""


@functools.cache
def model() -> nn.Module:
    # Order 64 is beyond what the iterative solvers hand to a dense one at rank 2.
    return make_tiny_llama(num_hidden_layers=1, hidden_size=64, intermediate_size=24, vocab_size=13)


def run(
    estimator: ComponentChoice, gradient: str, solver: ComponentChoice, config: LoraDAConfig | None = None
) -> LoraDAResult:
    pipeline = lora_da_core.build_pipeline(
        estimator, solver, (gradient, FEW_PROBES.get(gradient, {})), config=config or LoraDAConfig(damping=0.1)
    )
    batches = make_batches(make_samples(4, vocab=13), 2)
    return pipeline.run(model(), batches, LoraConfig(r=RANK, target_modules=["q_proj", "v_proj", "up_proj"]))


@functools.cache
def reference(estimator: str, gradient: str) -> LoraDAResult:
    return run(estimator, gradient, "eigh")


def check_answer(result: LoraDAResult) -> None:
    assert len(result.factors) == len(result.report.layers) == 3
    for layer in result.report.layers:
        pair = result.factors[layer.name]
        assert pair.A.shape == (RANK, layer.in_features) and pair.B.shape == (layer.out_features, RANK)
        assert bool(pair.A.isfinite().all()) and bool(pair.B.isfinite().all())
        gram = pair.A @ pair.A.mT
        size = float(gram[0, 0])
        assert abs(math.log(math.sqrt(size) / DEFAULT_A_SCALE)) <= math.log(A_SCALE_RANGE) + 1e-6
        torch.testing.assert_close(gram / size, torch.eye(RANK), rtol=0, atol=1e-4)
        assert layer.converged or any("did not converge" in remedy for remedy in layer.remedies)
        assert layer.sigma > 0 and math.isfinite(layer.sigma)
        assert list(layer.ritz_values) == sorted(layer.ritz_values)
        assert layer.tokens >= 10 * RANK and layer.residual >= 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_combination_answers_as_dense_eigenvalues_do(estimator: str, gradient: str, solver: str) -> None:
    result = run(estimator, gradient, solver)
    check_answer(result)
    assert (result.report.components["estimator"], result.report.components["gradient"]) == (estimator, gradient)
    for layer, expected in zip(result.report.layers, reference(estimator, gradient).report.layers, strict=True):
        assert layer.sigma == pytest.approx(expected.sigma, rel=1e-3)
        # The sum of the smallest eigenvalues is what A minimises; vectors may turn where the gap is small.
        scale = abs(expected.ritz_values[0])
        assert sum(layer.ritz_values) == pytest.approx(sum(expected.ritz_values), abs=1e-3 * scale)


VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("kfac", {"output": "full"}),
    ("kfac", {"output": "identity"}),
    ("kfac", {"labels": "sampled"}),
    ("kfac", {"labels": "exact", "output": "full"}),
    ("diagonal", {"per": "token"}),
    ("empirical", {"storage": "rows"}),
    ("empirical", {"storage": "factored"}),
    ("sketched", {"method": "nystrom", "size": 4}),
    ("sketched", {"method": "svd", "size": 4}),
    ("sketched", {"method": "frequent_directions", "size": 4, "compensate": False}),
)


@pytest.mark.parametrize("gradient", ["full", "zeroth_order"])
@pytest.mark.parametrize("estimator", VARIANTS, ids=lambda choice: "-".join(map(str, (choice[0], *choice[1].values()))))
def test_every_kind_of_estimator_answers(estimator: ComponentChoice, gradient: str) -> None:
    check_answer(run(estimator, gradient, "auto"))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_variants_name_every_choice_of_every_option(name: str) -> None:
    """An option that takes one of some words has each of them run above, or as its default."""
    component = REGISTRY.names("estimator")[name]
    tried = [options for variant, options in VARIANTS if variant == name]
    for key, hint in get_type_hints(component.Options).items():
        words = {word for word in get_args(hint) if isinstance(word, str)}
        assert words <= {options[key] for options in tried if key in options} | {getattr(component.Options(), key)}


class NoLikelihood(Objective[NoOptions]):
    """A loss that is no likelihood: no label can be drawn from it."""

    name = "no_likelihood"
    api_version = 1

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.zeros(1)

    def label_counts(self, batch: Batch) -> Tensor:
        return torch.ones(1)

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        return torch.ones(1, 1, dtype=torch.bool)


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"estimator": ("kfac", {"output": "identity", "labels": "sampled"})}, r"takes no gradients; leave it out"),
    ({"estimator": ("kfac", {"output": "identity", "labels": "exact"})}, r"takes no gradients; leave it out"),
    ({"estimator": ("kfac", {"output": "none"})}, r"choose one of diagonal, full, identity"),
    ({"estimator": ("kfac", {"labels": "true"})}, r"choose one of empirical, sampled, exact"),
    ({"estimator": ("diagonal", {"labels": "sampled"})}, r"no option 'labels'.*Options: per"),
    ({"estimator": ("diagonal", {"per": "batch"})}, r"choose one of sample, token"),
    ({"estimator": ("sketched", {"method": "qr"})}, r"choose one of frequent_directions, nystrom, svd"),
    ({"estimator": "zeroth_order"}, r"unknown estimator 'zeroth_order'.*Available: .*kfac"),
    ({"gradient": "kfac"}, r"unknown gradient 'kfac'.*Available: full, none, sketched, .*zeroth_order"),
    ({"gradient": ("zeroth_order", {"layers": "all"})}, r"choose one of together, in_turn"),
    ({"gradient": ("full", {"size": 4})}, r"no option 'size'.*Options: none"),
    ({"solver": ("auto", {"tolerance": 1e-6})}, r"unknown solver 'auto'.*Available: arpack"),
    ({"solver": ("eigh", {"tolerance": 1e-6})}, r"no option 'tolerance'.*Options: none"),
)


@pytest.mark.parametrize(("choices", "reason"), REFUSED)
def test_what_does_not_go_together_is_refused_before_a_model_is_touched(choices: dict[str, Any], reason: str) -> None:
    with pytest.raises(lora_da_core.OptionError, match=reason):
        lora_da_core.build_pipeline(**choices)


@pytest.mark.parametrize("labels", ["sampled", "exact"])
def test_labels_of_the_model_need_an_objective_that_draws_them(labels: str) -> None:
    parts = lora_da_core.build_pipeline(("kfac", {"labels": labels})).components
    refused = Components(parts.estimator, parts.gradient, NoLikelihood(NoOptions()), parts.solver)
    with pytest.raises(
        lora_da_core.OptionError, match=r"objective 'no_likelihood' cannot draw; use labels='empirical'"
    ):
        refused.check()


def test_an_identity_without_damping_is_refused() -> None:
    with pytest.raises(lora_da_core.OptionError, match=r"damping is 0.*give damping above 0"):
        run("identity", "full", "eigh", LoraDAConfig(damping=0.0))
