"""Every solver on every spectrum, against scipy's dense eigh; known failures are in test_solver_failures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_da_core.errors import ConvergenceError, OptionError
from lora_da_core.interfaces import Solver
from lora_da_core.operators import Dense, Diagonal, LowRank, Scaled, Sum, SymmetricOperator
from lora_da_core.types import EigenResult
from lora_da_solvers import arpack, auto, davidson, eigh, lanczos, lobpcg, randomized_svd
from lora_da_solvers.arpack import Arpack
from lora_da_solvers.davidson import Davidson
from lora_da_solvers.eigh import Eigh
from lora_da_solvers.lanczos import Lanczos
from lora_da_solvers.lobpcg import LOBPCG
from lora_da_solvers.randomized_svd import RandomizedSVD
from spectra import SPECTRA, Spectrum, symmetric_matrix

SOLVERS: dict[str, type[Solver[Any]]] = {
    solver.name: solver for solver in (Eigh, Lanczos, RandomizedSVD, Arpack, Davidson, LOBPCG)
}
MODULES = (eigh, lanczos, randomized_svd, arpack, davidson, lobpcg)
PRECISION = {torch.float64: 1e-12, torch.float32: 5e-6}
"""Residual relative to ‖Ω‖ below which rounding rules."""

MAY_NOT_CONVERGE = {
    ("arpack", "top_heavy"): "a Krylov space of one vector at a time spends itself on the top of the spectrum",
    ("lobpcg", "top_heavy"): "no preconditioner is passed to torch.lobpcg",
    ("arpack", "power_law_positive"): "gaps of 1e-10 of the norm are too small for restarts of a short basis",
    ("lobpcg", "power_law_positive"): "the same, with a basis of three blocks",
}
"""Solver and spectrum for which `converged` may be false, and why; it must be honest all the same."""


def solve(name: str, operator: SymmetricOperator, rank: int, seed: int = 0, **options: Any) -> EigenResult:
    solver = SOLVERS[name]
    return solver(solver.Options(**options)).smallest(operator, rank, generator=torch.Generator().manual_seed(seed))


def truth(operator: SymmetricOperator) -> Tensor:
    """All eigenvalues, (…, n), float64, by scipy."""
    dense = operator.to_dense().double().reshape(-1, operator.size, operator.size)
    values = np.stack([scipy.linalg.eigh(matrix.numpy(), eigvals_only=True) for matrix in dense])
    return torch.from_numpy(values).reshape(*operator.batch_shape, operator.size)


def tolerance(name: str, dtype: torch.dtype) -> float:
    return max(PRECISION[dtype], getattr(SOLVERS[name].Options(), "tolerance", 0.0))


def assert_true_to_itself(result: EigenResult, operator: SymmetricOperator, rank: int) -> None:
    """What must hold whether or not it converged."""
    size, batch, dtype = operator.size, operator.batch_shape, operator.dtype
    assert result.values.shape == (*batch, rank)
    assert result.vectors.shape == (*batch, size, rank)
    assert result.residuals.shape == (*batch, rank)
    assert result.converged.shape == batch and result.converged.dtype == torch.bool
    assert result.next_value.shape == batch
    assert {part.dtype for part in (result.values, result.vectors, result.residuals, result.next_value)} == {dtype}
    assert result.applies >= 1
    assert bool((result.values.diff(dim=-1) >= 0).all())
    rounding = 50 * torch.finfo(dtype).eps
    gram = result.vectors.mT.double() @ result.vectors.double()
    assert float((gram - torch.eye(rank)).abs().max()) <= rounding
    largest = result.vectors.gather(-2, result.vectors.abs().argmax(-2, keepdim=True))
    assert bool((largest > 0).all())
    norm = truth(operator).abs().amax(-1, keepdim=True)
    vectors, values = result.vectors.double(), result.values.double()
    residuals = (operator.to_dense().double() @ vectors - vectors * values.unsqueeze(-2)).norm(dim=-2)
    assert bool(((residuals - result.residuals.double()).abs() <= rounding * norm + 1e-6 * residuals).all())
    known = ~result.next_value.isnan()
    assert bool((result.next_value >= result.values[..., -1])[known].all())


def assert_right(result: EigenResult, operator: SymmetricOperator, rank: int, allowed: float) -> None:
    """What must hold for every matrix that is said to have converged."""
    expected = truth(operator)
    norm = expected.abs().amax(-1, keepdim=True)
    good = result.converged
    bound = allowed * norm
    assert bool((result.residuals.double() <= 1.01 * bound)[good].all())
    assert bool(((result.values.double() - expected[..., :rank]).abs() <= bound)[good].all())
    vectors = result.vectors.double()
    objective = (vectors * (operator.to_dense().double() @ vectors)).sum((-2, -1))
    least = expected[..., :rank].sum(-1)
    assert bool(((objective - least).abs() <= rank * bound.squeeze(-1))[good].all())
    known = good & ~result.next_value.isnan()
    if rank < operator.size:
        # An upper bound of the next eigenvalue, up to what rounding does to it.
        slack = PRECISION[operator.dtype] * norm.squeeze(-1)
        assert bool((result.next_value.double() >= expected[..., rank] - slack)[known].all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("name", SOLVERS)
def test_solver_on_spectrum(name: str, spectrum: Spectrum, dtype: torch.dtype) -> None:
    operator = spectrum.build(dtype)
    result = solve(name, operator, spectrum.rank)
    assert_true_to_itself(result, operator, spectrum.rank)
    assert_right(result, operator, spectrum.rank, tolerance(name, dtype))
    if (name, spectrum.name) not in MAY_NOT_CONVERGE:
        assert bool(result.converged.all())


def test_exceptions_are_not_stale() -> None:
    """Each declared failure to converge does happen, in one precision at least."""
    for name, spectrum_name in MAY_NOT_CONVERGE:
        spectrum = SPECTRA[spectrum_name]
        assert not all(bool(solve(name, spectrum.build(dtype), spectrum.rank).converged) for dtype in PRECISION)


class Watched(SymmetricOperator):
    """Passes products through and counts them; refuses to be formed."""

    def __init__(self, operator: SymmetricOperator) -> None:
        self.operator = operator
        self.products = 0
        self.widest = 0

    @property
    def size(self) -> int:
        return self.operator.size

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        return self.operator.device

    @property
    def batch_shape(self) -> torch.Size:
        return self.operator.batch_shape

    def matmat(self, block: Tensor) -> Tensor:
        assert block.dtype == self.dtype and block.shape[:-1] == (*self.batch_shape, self.size)
        self.products += 1
        self.widest = max(self.widest, block.shape[-1])
        return self.operator.matmat(block)

    def to_dense(self) -> Tensor:
        raise AssertionError("the matrix was formed")


@pytest.mark.parametrize("name", ["lanczos", "randomized_svd", "arpack", "davidson"])
def test_is_matrix_free_and_counts_products(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(300, 6, dtype=torch.float64, generator=generator)).Q
    weights = -torch.linspace(3, 1, 6, dtype=torch.float64)
    ramp = torch.linspace(0.1, 0.2, 300, dtype=torch.float64)
    watched = Watched(Sum([LowRank(basis, weights), Scaled(Diagonal(ramp), 0.5)]))
    result = solve(name, watched, 4)
    assert result.applies == watched.products
    assert watched.widest <= 16
    plain = Sum([LowRank(basis, weights), Scaled(Diagonal(ramp), 0.5)])
    assert bool(result.converged)
    assert_true_to_itself(result, plain, 4)
    assert_right(result, plain, 4, tolerance(name, torch.float64))


@pytest.mark.parametrize("name", SOLVERS)
def test_same_seed_same_bytes_and_global_generator_untouched(name: str) -> None:
    for spectrum_name in ("power_law", "rank_deficient", "zero", "batch_of_scales"):
        spectrum = SPECTRA[spectrum_name]
        torch.manual_seed(11)
        np.random.seed(11)
        before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)
        first = solve(name, spectrum.build(torch.float64), spectrum.rank, seed=1)
        torch.rand(3)
        torch.set_rng_state(before)
        second = solve(name, spectrum.build(torch.float64), spectrum.rank, seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_equal(np.random.get_state(legacy=False), numpy_before)
        for part in ("values", "vectors", "residuals", "converged"):
            assert torch.equal(getattr(first, part), getattr(second, part)), (spectrum_name, part)
        assert first.applies == second.applies


def test_seed_is_used() -> None:
    spectrum = SPECTRA["no_gap"]
    operator = spectrum.build(torch.float64)
    assert not torch.equal(solve("lanczos", operator, 5, seed=0).vectors, solve("lanczos", operator, 5, seed=1).vectors)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lanczos", {"max_applies": 6}),
        ("lanczos", {"max_applies": 1, "block_size": 2}),
        ("randomized_svd", {"max_applies": 2}),
        ("arpack", {"max_restarts": 1, "tolerance": 1e-11}),
        ("davidson", {"max_applies": 5}),
        ("lobpcg", {"iterations": 2}),
    ],
    ids=str,
)
def test_spent_budget_is_said(name: str, options: dict[str, Any]) -> None:
    operator = SPECTRA["no_gap"].build(torch.float64)
    result = solve(name, operator, 5, **options)
    assert not bool(result.converged)
    assert_true_to_itself(result, operator, 5)


@pytest.mark.parametrize("name", ["lanczos", "davidson", "randomized_svd"])
def test_budget_is_kept(name: str) -> None:
    result = solve(name, SPECTRA["top_heavy"].build(torch.float32), 8, max_applies=9, tolerance=1e-7)
    assert result.applies <= 9


def test_small_residuals_are_not_taken_for_nothing() -> None:
    """In float32 the residual of a nearly converged vector is its only way on: it must survive restarts."""
    values = torch.cat([-torch.linspace(1, 0.8, 12).double(), torch.linspace(-0.79, 0.5, 288).double()])
    operator = Dense(symmetric_matrix(values).float())
    result = solve("randomized_svd", operator, 8, depth=3)
    assert bool(result.converged)
    assert result.applies <= 45


@pytest.mark.parametrize("name", SOLVERS)
def test_one_hard_matrix_does_not_spoil_the_batch(name: str) -> None:
    easy = symmetric_matrix(torch.cat([-torch.arange(8, 0, -1).double(), torch.zeros(112, dtype=torch.float64)]))
    hard = SPECTRA["power_law_positive"].build(torch.float64).to_dense()
    hard = torch.nn.functional.pad(hard, (0, 20, 0, 20)) + torch.diag((torch.arange(120) >= 100).double())
    operator = Dense(torch.stack([easy, hard]))
    result = solve(name, operator, 4)
    assert bool(result.converged[0])
    assert_true_to_itself(result, operator, 4)
    assert_right(result, operator, 4, tolerance(name, torch.float64))


@pytest.mark.parametrize("name", SOLVERS)
def test_batch_of_an_operator_that_is_not_stored(name: str) -> None:
    entries = torch.stack([torch.linspace(-2, 1, 70), torch.linspace(-1, 3, 70).flip(0)]).double()
    result = solve(name, Diagonal(entries), 3)
    assert bool(result.converged.all())
    assert_right(result, Diagonal(entries), 3, tolerance(name, torch.float64))


def test_arpack_and_lanczos_agree() -> None:
    operator = SPECTRA["power_law"].build(torch.float64)
    ours, theirs = solve("lanczos", operator, 8), solve("arpack", operator, 8)
    torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.vectors, theirs.vectors, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(size=st.integers(1, 64), rank_of=st.floats(0, 1), seed=st.integers(0, 10**6), exponent=st.integers(-12, 12))
@pytest.mark.parametrize("name", SOLVERS)
def test_random_symmetric_matrices(name: str, size: int, rank_of: float, seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator) * 10.0**exponent
    operator, rank = Dense(matrix + matrix.mT), max(1, round(rank_of * size))
    result = solve(name, operator, rank, seed=seed)
    assert bool(result.converged)
    assert_true_to_itself(result, operator, rank)
    assert_right(result, operator, rank, tolerance(name, torch.float64))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("rank", [0, -1, 61])
def test_impossible_rank_is_refused(name: str, rank: int) -> None:
    with pytest.raises(OptionError, match=r"rank is .* order 60; ask for 1 to 60"):
        solve(name, SPECTRA["zero"].build(torch.float64), rank)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (arpack.ArpackOptions, {"max_restarts": 1}),
        (davidson.DavidsonOptions, {"max_applies": 1}),
        (lanczos.LanczosOptions, {"max_applies": 1, "block_size": 1}),
        (lobpcg.LOBPCGOptions, {"iterations": 1}),
        (randomized_svd.RandomizedSVDOptions, {"oversampling": 1, "depth": 1, "max_applies": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_options_are_taken_up_to_their_bounds_and_no_further(options: Any, least: dict[str, int]) -> None:
    assert options(tolerance=1e-300, **least) and options(tolerance=0.999)
    for tolerance in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="give a number between 0 and 1"):
            options(tolerance=tolerance)
    for name in least:
        with pytest.raises(ValueError, match=f"{name} is 0; give a whole number of at least 1"):
            options(**{name: 0})


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [6, 80])
def test_non_finite_operator_is_refused(name: str, bad: float, size: int) -> None:
    matrix = torch.eye(size, dtype=torch.float64)
    matrix[2, 3] = matrix[3, 2] = bad
    with pytest.raises(ConvergenceError, match="NaN or infinity"):
        solve(name, Dense(matrix), 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lanczos", {"block_size": 0}),
        ("lanczos", {"tolerance": 0.0}),
        ("lanczos", {"max_applies": 0}),
        ("randomized_svd", {"oversampling": 0}),
        ("randomized_svd", {"depth": 0}),
        ("randomized_svd", {"max_applies": 0}),
        ("randomized_svd", {"tolerance": float("nan")}),
        ("arpack", {"tolerance": -1.0}),
        ("arpack", {"max_restarts": 0}),
        ("davidson", {"tolerance": 1.0}),
        ("davidson", {"max_applies": 0}),
        ("lobpcg", {"iterations": 0}),
        ("lobpcg", {"tolerance": 2.0}),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=f"{key} is .*; give "):
        SOLVERS[name].Options(**options)


def test_every_module_offers_its_solver() -> None:
    offered = [solver for module in MODULES for solver in module.lora_da_solvers()]
    assert {solver.name: solver for solver in offered} == SOLVERS
    assert {solver.api_version for solver in offered} == {1}


@pytest.mark.parametrize(
    ("device_type", "size", "rank", "choice"),
    [
        ("cpu", 8, 8, "eigh"),
        ("cpu", 512, 8, "eigh"),
        ("cpu", 513, 8, "lanczos"),
        ("cpu", 1024, 64, "eigh"),
        ("cpu", 1537, 64, "lanczos"),
        ("mps", 513, 8, "lanczos"),
        ("cuda", 3072, 8, "eigh"),
        ("cuda", 3073, 8, "lanczos"),
    ],
)
def test_auto_chooses_by_device_order_and_rank(device_type: str, size: int, rank: int, choice: str) -> None:
    assert auto.lora_da_choose_solver(size, rank, device_type, SOLVERS) == choice
    others = {name: solver for name, solver in SOLVERS.items() if name != choice}
    second = None if choice == "eigh" else "davidson"
    assert auto.lora_da_choose_solver(size, rank, device_type, others) == second
    assert auto.lora_da_choose_solver(size, rank, device_type, {}) is None
