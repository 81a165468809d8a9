"""Ω and the factors: the theorem, the oracle's numbers, and the laws of the algebra."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_da_core.omega import (
    DEFAULT_A_SCALE,
    StepLine,
    Subspace,
    WeightStep,
    activation_scale,
    balanced_factors,
    embedding_scale,
    evenly_divided_factors,
    fixed_factors,
    forms_step,
    of_norm,
    omega,
    paired,
    stable_factors,
    subspace,
    unit_step,
)
from lora_da_core.operators import Dense, DenseMap, Diagonal, LowRank, LowRankMap, NegatedGram, Scaled, Sum


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).double()


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("setting", ["authors", "strong_var", "paper"])
def test_oracle_omega_projector_and_update(oracle: Path, case: str, setting: str) -> None:
    numbers, meta = np.load(oracle / "toy_oracle.npz"), json.loads((oracle / "toy_oracle.json").read_text())
    parameters, rank = meta["params"][setting], meta["cases"][case]["r"]
    for name, info in meta["cases"][case]["estimators"].items():
        step = DenseMap(tensor(numbers[f"{case}/{name}/Delta_raw"]))
        sigma = float(torch.linalg.matrix_norm(step.matrix, 2)) if parameters["normalize"] else 1.0
        variance = Dense(tensor(numbers[f"{case}/{name}/V"]))
        operator = omega(step, variance, alpha=parameters["alpha"], beta_over_n=parameters["beta"] / parameters["N"])
        expected = tensor(numbers[f"{case}/{name}/{setting}/Omega"])
        torch.testing.assert_close(operator.to_dense() / sigma**2, expected, rtol=1e-8, atol=1e-12)
        vectors = torch.linalg.eigh(operator.to_dense())[1][:, :rank]
        pair = fixed_factors(subspace(vectors, step, sigma, 1.0), parameters["gamma"], torch.float64)
        tolerance = 1e-8 if info["gaps"][setting] > 1e-4 else 1e-4
        update = tensor(numbers[f"{case}/{name}/{setting}/update"])
        torch.testing.assert_close(pair.B @ pair.A, update, rtol=tolerance, atol=tolerance * float(update.abs().max()))
        projector = tensor(numbers[f"{case}/{name}/{setting}/proj"])
        torch.testing.assert_close(pair.A.T @ pair.A * parameters["gamma"], projector, rtol=1e-6, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(2, 9),
    out=st.integers(1, 9),
    beta=st.floats(0.01, 10.0),
    alpha=st.floats(0.0, 2.0),
    seed=st.integers(0, 99),
)
def test_bottom_eigenvectors_minimise_the_expected_error(
    size: int, out: int, beta: float, alpha: float, seed: int
) -> None:
    """The theorem: tr(AᵀΩA) over orthonormal A is least at the bottom eigenvectors, and is their eigenvalues' sum."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(size, out, generator=generator, dtype=torch.float64)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    operator = omega(DenseMap(delta), Dense(root @ root.T), alpha=alpha, beta_over_n=beta)
    dense = operator.to_dense()
    assert torch.equal(dense, dense.T)
    torch.testing.assert_close(operator.matmat(torch.eye(size, dtype=torch.float64)), dense)
    torch.testing.assert_close(operator.diagonal(), dense.diagonal())
    values, vectors = torch.linalg.eigh(dense)
    rank = max(1, size // 2)
    best = float(values[:rank].sum())
    solution = subspace(vectors[:, :rank], DenseMap(delta), 1.0, 1.0)
    assert abs(float(torch.trace(solution.basis.T @ dense @ solution.basis)) - best) < 1e-9 * (1 + abs(best))
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
        assert float(torch.trace(other.T @ dense @ other)) >= best - 1e-9 * (1 + abs(best))


def test_expected_error_formula_by_simulation() -> None:
    """E‖D − A Aᵀ(D + ε)‖² = ‖D‖² + tr(AᵀΩA) for noise of covariance J⁻¹/N."""
    generator = torch.Generator().manual_seed(0)
    size, out, rank, population = 4, 3, 2, 5.0
    delta = torch.randn(size, out, generator=generator, dtype=torch.float64)
    root = torch.randn(size * out, size * out, generator=generator, dtype=torch.float64)
    covariance = root @ root.T / population
    variance = torch.einsum("iojo->ij", covariance.reshape(size, out, size, out)) * population
    operator = omega(DenseMap(delta), Dense(variance), alpha=1.0, beta_over_n=1 / population).to_dense()
    basis = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
    draws = torch.randn(400_000, size * out, generator=generator, dtype=torch.float64) @ root.T / population**0.5
    noisy = delta + draws.reshape(-1, size, out)
    error = (delta - basis @ (basis.T @ noisy)).square().sum((1, 2)).mean()
    expected = delta.square().sum() + torch.trace(basis.T @ operator @ basis)
    assert abs(float(error / expected) - 1) < 0.01


def test_identity_fisher_gives_the_gradient_singular_subspace() -> None:
    gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = DenseMap(-gradient.T / 0.5)
    operator = omega(step, Diagonal(torch.full((5,), 14.0, dtype=torch.float64)), alpha=1.0, beta_over_n=1e-3)
    basis = torch.linalg.eigh(operator.to_dense())[1][:, :2]
    right = torch.linalg.svd(gradient)[2][:2]
    torch.testing.assert_close(basis @ basis.T, right.T @ right)


def random_step(seed: int, rank: int = 3) -> WeightStep:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(9, rank, generator=generator, dtype=torch.float64))[0]
    return unit_step(subspace(basis, DenseMap(delta), 1.0, 1.0), "kept")


def product(step: WeightStep) -> Tensor:
    return step.left @ step.right.T


@settings(max_examples=25, deadline=None)
@given(size=st.floats(1e-3, 10.0), scaling=st.floats(0.1, 10.0), seed=st.integers(0, 99))
def test_balanced_factors_keep_the_product_and_give_every_row_of_a_the_size_asked_for(
    size: float, scaling: float, seed: int
) -> None:
    step = random_step(seed)
    pair = balanced_factors(step, scaling, size, torch.float64)
    torch.testing.assert_close(scaling * pair.B @ pair.A, product(step))
    torch.testing.assert_close(pair.A.norm(dim=1), torch.full((3,), size, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(scaling=st.floats(0.1, 10.0), seed=st.integers(0, 99))
def test_evenly_divided_factors_keep_the_product_and_share_its_singular_values(scaling: float, seed: int) -> None:
    step = random_step(seed)
    pair = evenly_divided_factors(step, scaling, torch.float64)
    torch.testing.assert_close(scaling * pair.B @ pair.A, product(step))
    values = torch.linalg.svdvals(product(step) / scaling)[:3]
    torch.testing.assert_close(pair.A @ pair.A.T, torch.diag(values))
    torch.testing.assert_close(pair.B.T @ pair.B, torch.diag(values))


def test_an_even_division_leaves_no_row_of_a_dead() -> None:
    thin = WeightStep(torch.zeros(6, 3, dtype=torch.float64), random_step(0).right)
    torch.testing.assert_close(evenly_divided_factors(thin, 2.0, torch.float64).A.norm(dim=1).double(),
                               torch.full((3,), DEFAULT_A_SCALE, dtype=torch.float64))  # fmt: skip
    thin.left[0, 0] = 1.0
    pair = evenly_divided_factors(thin, 2.0, torch.float64)
    torch.testing.assert_close(2.0 * pair.B @ pair.A, product(thin))
    assert float(pair.A.norm(dim=1).min()) > 0
    narrow = WeightStep(torch.ones(2, 3, dtype=torch.float64), thin.right)
    pair = evenly_divided_factors(narrow, 2.0, torch.float64)
    torch.testing.assert_close(2.0 * pair.B @ pair.A, product(narrow))
    assert pair.A.shape == (3, 9)


@settings(max_examples=25, deadline=None)
@given(multiplier=st.floats(-3.0, 3.0), seed=st.integers(0, 99), out=st.sampled_from([2, 6]))
def test_a_line_of_steps_is_the_nearest_matrix_of_the_rank(multiplier: float, seed: int, out: int) -> None:
    first, second = random_step(seed), random_step(seed + 100)
    first, second = (WeightStep(step.left[:out], step.right) for step in (first, second))
    cut = StepLine(first, second).at(multiplier)
    total = product(first) + multiplier * product(second)
    u, values, vh = torch.linalg.svd(total, full_matrices=False)
    torch.testing.assert_close(product(cut), (u[:, :3] * values[:3]) @ vh[:3], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(cut.right.T @ cut.right, torch.eye(3, dtype=torch.float64))
    assert cut.left.shape == second.left.shape


def test_a_flat_spectrum_is_the_polar_factor_of_the_step() -> None:
    solution = subspace(random_step(3).right, DenseMap(torch.randn(9, 6, dtype=torch.float64)), 1.0, 1.0)
    flat = unit_step(solution, "flat")
    polar = torch.from_numpy(scipy.linalg.polar(solution.projected.numpy())[0])
    torch.testing.assert_close(flat.left, polar)
    empty = Subspace(solution.basis, torch.zeros(6, 3, dtype=torch.float64), 1.0)
    assert not unit_step(empty, "flat").left.any()


def test_the_activation_scale_is_what_a_default_lora_has_on_the_same_inputs() -> None:
    """Against PEFT's own default A, by simulation."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 12, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 12)
    basis = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64))[0]
    scale = activation_scale(float(inputs.square().sum()), float((inputs @ basis).square().sum()), 12, 4)
    defaults = []
    for seed in range(400):
        torch.manual_seed(seed)
        a = torch.empty(4, 12, dtype=torch.float64)
        torch.nn.init.kaiming_uniform_(a, a=5**0.5)
        defaults.append(float((inputs @ a.T).square().sum()))
    ours = float((inputs @ basis * scale).square().sum())
    assert abs(ours / (sum(defaults) / len(defaults)) - 1) < 0.1
    assert activation_scale(0.0, 0.0, 12, 4) == DEFAULT_A_SCALE
    assert activation_scale(1.0, 0.0, 12, 4) == pytest.approx(16 * DEFAULT_A_SCALE)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 8), seed=st.integers(0, 99), factor=st.floats(-3, 3))
def test_operators_agree_with_their_dense_matrices(size: int, seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = random(size, size)
    terms = [
        Dense(root + root.T),
        Diagonal(random(size)),
        LowRank(random(size, 2), random(2)),
        NegatedGram(LowRankMap(random(size, 2), random(5, 2)), 0.7),
    ]
    block = random(size, 3)
    for operator in [*terms, Sum(terms), Scaled(Sum(terms), factor)]:
        dense = operator.to_dense()
        torch.testing.assert_close(dense, dense.mT)
        torch.testing.assert_close(operator.matmat(block), dense @ block)
        torch.testing.assert_close(operator.diagonal(), dense.diagonal())
        torch.testing.assert_close(operator.trace(), dense.trace())
    shift = 20.0
    solve = Diagonal(random(size).abs()).preconditioner(shift)
    assert solve is not None
    for scaled in (0.5, 2.0):
        diagonal = Diagonal(random(size).abs())
        inverse = Scaled(diagonal, scaled).preconditioner(shift)
        assert inverse is not None
        shifted = Scaled(diagonal, scaled).to_dense() + shift * torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(shifted @ inverse(block), block)


def matrix_and_solution(rank: int) -> tuple[Tensor, Subspace]:
    """A Δᵀ (out, in) of known singular directions, and the solution that J = λI gives for it."""
    delta = torch.randn(7, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, _, right = scipy.linalg.svd(delta.numpy())
    basis = tensor(right[:rank].T)
    # Any basis of the subspace will do: the directions are found again.
    turn, _ = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    return delta, Subspace(basis @ turn, delta @ basis @ turn, scaling=2.0)


@pytest.mark.parametrize(("pairing", "of_a", "of_b"), [("right_first", 0, 2), ("left_first", 2, 0)])
def test_pairing_takes_two_blocks_of_singular_directions(pairing: str, of_a: int, of_b: int) -> None:
    delta, solution = matrix_and_solution(rank=4)
    left, _, right = scipy.linalg.svd(delta.numpy())
    found = paired(solution, pairing)  # type: ignore[arg-type]
    assert found.basis.shape == (6, 2) and found.projected.shape == (7, 2) and found.scaling == 2.0
    wanted = tensor(right[of_a : of_a + 2].T), tensor(left[:, of_b : of_b + 2])
    for columns, expected in zip((found.basis, found.projected), wanted, strict=True):
        overlap = columns.mT @ expected
        torch.testing.assert_close(overlap.abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_pairing_leaves_out_directions_that_are_not_there() -> None:
    delta, solution = matrix_and_solution(rank=4)
    one = torch.outer(delta[:, 0], solution.basis[:, 0])
    found = paired(Subspace(solution.basis, one @ solution.basis, 1.0), "right_first")
    assert bool((found.projected == 0).all()) and found.basis.shape == (6, 2)
    first = paired(Subspace(solution.basis, one @ solution.basis, 1.0), "left_first").projected
    torch.testing.assert_close(first.norm(dim=0), torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_a_step_of_a_norm_keeps_its_direction_and_zero_stays_zero() -> None:
    step = WeightStep(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double(), torch.eye(4, 2).double())
    found = of_norm(step, 0.25)
    torch.testing.assert_close(found.left.norm(), torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(found.left / 0.25, step.left / step.left.norm())
    assert torch.equal(found.right, step.right)
    small = of_norm(WeightStep(1e-8 * step.left, step.right), 0.25)
    torch.testing.assert_close(small.left, found.left)
    zero = WeightStep(torch.zeros_like(step.left), step.right)
    assert torch.equal(of_norm(zero, 0.25).left, zero.left)


def test_stable_factors_are_those_of_lora_ga() -> None:
    _, solution = matrix_and_solution(rank=2)
    pair = stable_factors(solution, 16.0, torch.float32)
    factor = 7**0.25 / 4
    assert pair.A.dtype == pair.B.dtype == torch.float32
    torch.testing.assert_close(pair.A.double(), factor * solution.basis.mT, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(pair.B.double(), factor * solution.projected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("device", "side"), [("cpu", 2**11), ("cuda", 2**13)])
def test_a_step_is_stored_up_to_its_devices_number_of_elements(device: str, side: int) -> None:
    place = torch.device(device)
    assert forms_step(side, side, place) and forms_step(side // 2, 2 * side, place)
    assert not forms_step(side, side + 1, place) and not forms_step(2 * side, side // 2 + 1, place)


def test_an_embeddings_b_is_as_large_as_a_standard_normal_one() -> None:
    draw = torch.Generator().manual_seed(0)
    right = torch.linalg.qr(torch.randn(5, 3, generator=draw, dtype=torch.float64)).Q
    step = WeightStep(4.0 * torch.randn(7, 3, generator=draw, dtype=torch.float64), right)
    pair = balanced_factors(step, 2.0, embedding_scale(step, 2.0), torch.float64)
    assert float(pair.B.square().sum()) == pytest.approx(7 * 3, rel=1e-12)
    torch.testing.assert_close(2.0 * pair.B @ pair.A, step.left @ right.mT)
    assert embedding_scale(WeightStep(torch.zeros(7, 3), right.float()), 2.0) == DEFAULT_A_SCALE
