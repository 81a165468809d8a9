"""σ² from the eigenvectors of Ω: the bounds hold against a dense decomposition, and only good ones are believed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, solving
from lora_da_core.omega import omega
from lora_da_core.operators import Dense, DenseMap, Diagonal, LowRank, Scaled, SymmetricOperator
from lora_da_core.step_norm import bracket
from lora_da_core.types import EigenResult

SIZE, OUT, RANK = 24, 18, 4


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bottom(operator: SymmetricOperator, rank: int) -> EigenResult:
    values, vectors = torch.linalg.eigh(operator.to_dense())
    return EigenResult(
        values=values[:rank],
        vectors=vectors[:, :rank],
        residuals=torch.zeros(rank, dtype=values.dtype),
        converged=torch.tensor(True),
        applies=0,
        next_value=values[rank],
    )


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    weight=st.floats(-6, 3).map(lambda exponent: 10.0**exponent),
    alpha=st.floats(0.1, 4),
    decay=st.floats(0, 2),
)
def test_the_bounds_hold_whatever_the_variance_term_weighs(
    seed: int, weight: float, alpha: float, decay: float
) -> None:
    step = random(seed, SIZE, OUT) * torch.arange(1, OUT + 1, dtype=torch.float64) ** -decay
    root = random(seed + 1, SIZE, SIZE)
    variance = Dense(root @ root.mT / SIZE)
    found = bottom(omega(DenseMap(step), variance, alpha=alpha, beta_over_n=weight), RANK)
    bounds = bracket(DenseMap(step), found, alpha, weight * variance.norm_bound())
    exact = float(torch.linalg.matrix_norm(step, 2)) ** 2
    assert bounds.least <= exact * (1 + 1e-10)
    assert exact <= (bounds.least + bounds.excess) * (1 + 1e-10)


def test_a_small_variance_term_gives_the_norm_to_the_square_of_its_weight() -> None:
    step, variance = DenseMap(random(0, SIZE, OUT)), Dense(torch.eye(SIZE, dtype=torch.float64))
    variance.matrix[0, 0] = 3.0
    exact, excesses = float(torch.linalg.matrix_norm(step.matrix, 2)) ** 2, []
    for weight in (1e-3, 1e-2):
        found = bottom(omega(step, variance, alpha=1.0, beta_over_n=weight), RANK)
        bounds = bracket(step, found, 1.0, weight * variance.norm_bound())
        assert bounds.within(1e-4) and bounds.least == pytest.approx(exact, rel=1e-4)
        excesses.append(bounds.excess)
    assert excesses[1] == pytest.approx(100 * excesses[0], rel=0.1)


@pytest.mark.parametrize(
    ("rank", "alpha", "weight"),
    [(1, 1.0, 1e-3), (RANK, 0.0, 1.0), (RANK, 1.0, 1e3)],
    ids=["rank 1", "no bias", "top-heavy"],
)
def test_nothing_is_believed_where_the_top_could_lie_elsewhere(rank: int, alpha: float, weight: float) -> None:
    step, root = DenseMap(random(0, SIZE, OUT)), random(1, SIZE, SIZE)
    variance = Dense(root @ root.mT)
    found = bottom(omega(step, variance, alpha=alpha, beta_over_n=weight), rank)
    assert not bracket(step, found, alpha, weight * variance.norm_bound()).within(1e-4)


def test_bounds_of_norms_bound_them() -> None:
    root = random(0, SIZE, SIZE)
    dense = Dense(root + root.mT)
    diagonal = Diagonal(random(1, SIZE))
    for operator in (dense, diagonal, Scaled(dense, -2.5), Scaled(diagonal, 0.5)):
        exact = float(torch.linalg.matrix_norm(operator.to_dense(), 2))
        assert exact * (1 - 1e-12) <= operator.norm_bound() <= SIZE**0.5 * exact * (1 + 1e-12)
    assert LowRank(root[:, :2], random(2, 2)).norm_bound() == float("inf")


def test_a_run_takes_the_norm_from_omega_and_gets_what_the_solver_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    smallest = solving.LayerSolver._smallest

    def watched(self: Any, solver: Any, whole: SymmetricOperator, rank: int, *rest: Any) -> list[EigenResult]:
        solved.append(rank)
        return smallest(self, solver, whole, rank, *rest)

    monkeypatch.setattr(solving.LayerSolver, "_smallest", watched)
    batches = make_batches(make_samples(12))
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    pipeline = lora_da_core.build_pipeline(solver="lanczos", config=LoraDAConfig(scale="fixed", population=1000))
    ours = pipeline.run(make_tiny_llama(), batches, lora)
    spared = solved.count(3) - solved.count(1)
    assert spared > solved.count(3) / 2
    monkeypatch.setattr(solving, "NORM_TOLERANCE", 1e-12)
    theirs = pipeline.run(make_tiny_llama(), batches, lora)
    for one, other in zip(ours.report.layers, theirs.report.layers, strict=True):
        assert one.sigma == pytest.approx(other.sigma, rel=1e-4)
