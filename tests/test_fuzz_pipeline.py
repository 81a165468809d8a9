"""Anything that can be asked of a run, on data of any kind: a result of which the theorem holds, or one LoraDAError."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import event, given, target
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor, nn

import lora_da_core
from fuzzing import (
    DTYPES,
    IGNORED,
    Outcome,
    Problem,
    basis_of,
    configs,
    dense_fisher,
    dense_layer,
    estimators,
    fitted_error,
    fuzzed,
    problems,
    run,
    solvers,
    squared_error,
)

TARGETS = ["first", "second"]


def state_of(model: nn.Module) -> list[Any]:
    """Everything that a run must leave as it was."""
    return [
        [
            (name, id(p), p.detach().clone().view(torch.uint8).tolist(), p.requires_grad)
            for name, p in model.named_parameters()
        ],
        [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        torch.random.get_rng_state().tolist(),
    ]


def attempt(problem: Problem, rank: int, choice: dict[str, Any], settings: dict[str, Any]) -> Outcome | None:
    """The outcome of a run; None where it was refused. Whatever else is raised fails the test."""
    model = problem.model()
    before = state_of(model)
    lora = LoraConfig(r=rank, target_modules=TARGETS)
    objective = fitted_error if problem.fits else squared_error
    try:
        config = lora_da_core.LoraDAConfig(**settings)
        pipeline = lora_da_core.build_pipeline(objective=objective, config=config, **choice)
        return run(problem, lora, pipeline, model)
    except lora_da_core.LoraDAError as error:
        event(f"refused: {type(error).__name__}")
        assert str(error).strip() and "\n" not in str(error).strip()
        return None
    finally:
        assert state_of(model) == before, "the model is not as it was found"


@given(
    problem=problems,
    rank=st.integers(1, 7),
    estimator=estimators,
    gradient=st.sampled_from(["full", "full", "full", "sketched", "zeroth_order", "smoothed", "weights", "none"]),
    solver=solvers,
    settings=configs,
)
@fuzzed(60, 2000)
def test_a_run_gives_the_theorems_minimum_or_one_clear_error(
    problem: Problem, rank: int, estimator: Any, gradient: str, solver: str, settings: dict[str, Any]
) -> None:
    choice = {"estimator": estimator, "gradient": gradient, "solver": solver}
    outcome = attempt(problem, rank, choice, settings)
    if outcome is None:
        return
    event("solved")
    for name, pair in outcome.result.factors.items():
        layer, dtype = outcome.layers[name], DTYPES[problem.dtype]
        assert pair.A.shape == (layer.rank, layer.in_features) and pair.B.shape == (layer.out_features, layer.rank)
        assert pair.A.dtype == pair.B.dtype == torch.promote_types(dtype, torch.float32)
        assert bool(pair.A.isfinite().all()) and bool(pair.B.isfinite().all()), (
            f"{name} has factors that are not finite"
        )
        assert layer.converged or outcome.pipeline.config.unconverged != "error"
    if outcome.pipeline.config.rounds == 1 and outcome.pipeline.config.pairing == "same":
        target(check_theorem(outcome), label="how far above the minimum")


def check_theorem(outcome: Outcome) -> float:
    """tr(AᵀΩA) is the sum of the r smallest eigenvalues of a dense Ω, where that can be told; the largest excess."""
    config = outcome.pipeline.config
    fishers = outcome.pipeline.fishers(outcome.estimates)
    population = config.population or outcome.estimates.statistics.samples
    worst = 0.0
    for spec in outcome.estimates.task.specs:
        layer, pair = outcome.layers[spec.name], outcome.result.factors[spec.name]
        gradient = outcome.estimates.gradient(spec).to_dense().double()
        fisher = dense_fisher(fishers[spec.name], spec.out_features, spec.in_features)
        dense = dense_layer(fisher, gradient, config, population)
        if not math.isfinite(dense.error) or dense.error > 1e-4 or not bool(dense.omega.isfinite().all()):
            event("theorem: J is too ill-conditioned to say")
            continue
        values = torch.linalg.eigvalsh(dense.omega)
        size = float(values.abs().max())
        if size == 0 or not layer.converged or any("may be" in each for each in layer.remedies):
            event("theorem: Ω is zero, or the report says that the solver or the precision did not do")
            continue
        event("theorem: checked")
        basis = basis_of(pair)
        found = float(torch.einsum("ir,ij,jr->", basis, dense.omega, basis))
        least = float(values[: layer.rank].sum())
        tolerance = dense.error + 1e-5 + 8 * torch.finfo(pair.A.dtype).eps
        worst = max(worst, (found - least) / size)
        assert found - least <= tolerance * layer.rank * size, f"{spec.name}: {found} instead of {least}, ‖Ω‖ = {size}"
        if layer.sigma > 0:
            sigma = float(torch.linalg.matrix_norm(dense.step, 2))
            assert abs(layer.sigma - sigma) <= (dense.error + 1e-3) * sigma
        if config.rule == "fixed":
            check_projection(
                pair, dense.step, layer.sigma if config.normalize else 1.0, config.fixed_gamma, dense.error
            )
    return worst


def check_projection(pair: Any, step: Tensor, sigma: float, gamma: float, error: float) -> None:
    """A = A0ᵀ/√γ and B = (A0ᵀΔ)ᵀ/√γ."""
    a, b = pair.A.double() * gamma**0.5, pair.B.double() * gamma**0.5
    delta = step / (sigma or 1.0)
    eps = float(torch.finfo(pair.A.dtype).eps)
    torch.testing.assert_close(a @ a.mT, torch.eye(len(a), dtype=a.dtype), rtol=0, atol=1e-5 + 8 * eps)
    size = float(delta.norm())
    torch.testing.assert_close(b, delta.mT @ a.mT, rtol=0, atol=(1e-5 + 8 * eps + error) * size + 1e-300)


# Statistics against plain loops


def tokens_of(problem: Problem, model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """Of every layer, per labelled sample: x (tokens, in), g (tokens, out), and which tokens count."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in TARGETS}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = given[0], output

        return hook

    handles = [getattr(model, name).register_forward_hook(keep(name)) for name in TARGETS]
    for batch in problem.batches():
        for row in range(len(batch["labels"])):
            sample = {key: value[row : row + 1] for key, value in batch.items()}
            if not bool((sample["labels"] != IGNORED).any()):
                continue
            squared_error(model, sample).sum().backward()
            for name, (x, y) in seen.items():
                assert y.grad is not None
                found[name].append((x[0].detach(), y.grad[0], sample["attention_mask"][0].bool()))
            model.zero_grad()
    for handle in handles:
        handle.remove()
    return found


def expected_fisher(
    estimator: str,
    options: dict[str, Any],
    tokens: list[tuple[Tensor, Tensor, Tensor]],
    config: lora_da_core.LoraDAConfig,
) -> Tensor:
    """J by its definition, (out·in, out·in)."""
    x = torch.cat([x[counts] for x, _, counts in tokens])
    g = torch.cat([g[counts] for _, g, counts in tokens])
    samples = len(tokens)
    relative, damping = config.damping_kind == "relative", config.damping
    if estimator == "kfac":
        root = damping**0.5
        z = x.mT @ x / len(x)
        y = (g.mT @ g) / (len(x) if config.fisher_scale == "token_mean" else samples)
        y = y if options["output"] == "full" else torch.diag(y.diagonal())
        z = z + (root * z.diagonal().mean() if relative else damping) * torch.eye(len(z), dtype=z.dtype)
        y = y + (root * y.diagonal().mean() if relative else damping) * torch.eye(len(y), dtype=y.dtype)
        return torch.kron(y, z)
    each = torch.stack([(g[counts].mT @ x[counts]).flatten() for x, g, counts in tokens])
    if estimator == "identity":
        size = each.shape[1]
        return damping * torch.eye(size, dtype=torch.float64)
    if estimator == "diagonal":
        if options["per"] == "token":
            each = torch.einsum("to,ti->toi", g, x).flatten(1)
        matrix = torch.diag(each.square().sum(0) / samples)
    else:
        matrix = each.mT @ each / samples
    return matrix + (damping * matrix.diagonal().mean() if relative else damping) * torch.eye(len(matrix)).double()


@given(
    problem=problems,
    chosen=st.sampled_from(
        [
            ("identity", {}),
            ("empirical", {}),
            ("diagonal", {"per": "sample"}),
            ("diagonal", {"per": "token"}),
            ("kfac", {"output": "diagonal"}),
            ("kfac", {"output": "full"}),
        ]
    ),
    damping=st.sampled_from([1e-2, 1.0, 100.0]),
    kind=st.sampled_from(["relative", "absolute"]),
    scale=st.sampled_from(["token_mean", "sample"]),
)
@fuzzed(40, 800)
def test_fishers_and_gradients_are_those_of_plain_loops_however_samples_are_batched(
    problem: Problem, chosen: tuple[str, dict[str, Any]], damping: float, kind: str, scale: str
) -> None:
    problem = Problem(**{**problem.__dict__, "dtype": "float64", "data": "normal" if problem.fits else problem.data})
    settings = {"damping": damping, "damping_kind": kind, "fisher_scale": scale, "scale": "fixed"}
    outcome = attempt(problem, 1, {"estimator": chosen}, settings)
    if outcome is None:
        return
    tokens = tokens_of(problem, problem.model())
    fishers = outcome.pipeline.fishers(outcome.estimates)
    for spec in outcome.estimates.task.specs:
        expected = torch.stack([g.mT @ x for x, g, _ in tokens[spec.name]]).mean(0)
        found = outcome.estimates.gradient(spec).to_dense()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))
        if any("damping" in remedy or "damped" in remedy for remedy in outcome.layers[spec.name].remedies):
            event("fisher: changed by a remedy, which the report names")
            continue
        fisher = expected_fisher(chosen[0], chosen[1], tokens[spec.name], outcome.pipeline.config)
        found = dense_fisher(fishers[spec.name], spec.out_features, spec.in_features)
        torch.testing.assert_close(found, fisher, rtol=1e-9, atol=1e-10 * float(fisher.abs().max()))
        event(f"fisher: {chosen[0]} checked")


@pytest.mark.parametrize(
    "preset", ["robust", "paper", "lora_one", "lora_ga", "spectral", "loi", "eva", "pissa", "lora_fa"]
)
@given(problem=problems, rank=st.integers(1, 4))
@fuzzed(3, 60)
def test_presets_give_finite_factors_or_one_clear_error(preset: str, problem: Problem, rank: int) -> None:
    model = problem.model()
    before = state_of(model)
    pipeline = lora_da_core.build_pipeline(objective=fitted_error if problem.fits else squared_error, preset=preset)
    try:
        found = pipeline.run(model, problem.batches(), LoraConfig(r=rank, target_modules=TARGETS))
    except lora_da_core.LoraDAError:
        return
    finally:
        assert state_of(model) == before
    assert all(bool(pair.A.isfinite().all() and pair.B.isfinite().all()) for pair in found.factors.values())
