"""The ways in which eigensolvers fail on Ω, one after the other, each with its cure or with what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lora_da_core
from lora_da_core import LoraDAConfig, LoraDAResult
from lora_da_core.errors import ConvergenceError
from lora_da_core.estimation import Estimates
from lora_da_core.interfaces import Solver
from lora_da_core.operators import Dense, DenseMap, SymmetricOperator
from lora_da_core.solving import LayerSolution, LayerSolver
from lora_da_core.types import EigenResult, FisherStatistics, LayerSpec
from lora_da_estimators.identity import Identity
from lora_da_solvers import _ritz, lanczos
from lora_da_solvers._expansion import Expansion
from lora_da_solvers._subspace import Subspace
from lora_da_solvers.arpack import Arpack
from lora_da_solvers.davidson import Davidson
from lora_da_solvers.eigh import Eigh
from lora_da_solvers.lanczos import Lanczos
from lora_da_solvers.lobpcg import LOBPCG
from lora_da_solvers.randomized_svd import RandomizedSVD
from spectra import SPECTRA, TopHeavy, symmetric_matrix

SOLVERS: dict[str, type[Solver[Any]]] = {
    solver.name: solver for solver in (Eigh, Lanczos, RandomizedSVD, Arpack, Davidson, LOBPCG)
}


def solve(name: str, operator: SymmetricOperator, rank: int, seed: int = 0, **options: Any) -> EigenResult:
    solver = SOLVERS[name]
    return solver(solver.Options(**options)).smallest(operator, rank, generator=torch.Generator().manual_seed(seed))


def eigenvalues(operator: SymmetricOperator) -> Tensor:
    return torch.linalg.eigvalsh(operator.to_dense().double())


def objective(operator: SymmetricOperator, vectors: Tensor) -> float:
    """tr(UᵀΩU), in float64."""
    vectors = vectors.double()
    return float((vectors * (operator.to_dense().double() @ vectors)).sum())


# 1. An eigenvalue with more copies than the block has columns.


def assert_all_copies_found(block_size: int | None) -> SymmetricOperator:
    """The operator, once it was solved from twenty random blocks."""
    operator = SPECTRA["hidden_copies"].build(torch.float64)
    least = float(eigenvalues(operator)[:8].sum())
    for seed in range(20):
        result = solve("lanczos", operator, 8, seed=seed, block_size=block_size)
        assert bool(result.converged)
        assert objective(operator, result.vectors) == pytest.approx(least, rel=1e-12)
    return operator


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_1_more_copies_than_the_block_holds_are_found(block_size: int) -> None:
    """Whatever the random block of the verification round: one of a single column misses a copy now and then."""
    assert_all_copies_found(block_size)


@pytest.mark.parametrize("block_size", [None, 12])
def test_1_a_block_that_can_miss_no_copy_is_verified_by_few_products(
    block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[int] = []
    verify = lanczos._Run._verify

    def counted(run: Any, candidate: Any, effort: int) -> Tensor:
        before = run.space.applies
        verified = verify(run, candidate, effort)
        spent.append(run.space.applies - before)
        return verified

    monkeypatch.setattr(lanczos._Run, "_verify", counted)
    operator = assert_all_copies_found(block_size)
    assert set(spent) == {lanczos._LEAST_STEPS}
    spent.clear()
    solve("lanczos", operator, 8, block_size=8)
    assert max(spent) > lanczos._LEAST_STEPS


def test_1_more_copies_than_the_block_holds_are_found_in_a_batch() -> None:
    matrix = SPECTRA["hidden_copies"].build(torch.float64).to_dense()
    result = solve("lanczos", Dense(torch.stack([matrix, 2 * matrix])), 8, block_size=2)
    assert result.converged.tolist() == [True, True]
    least = torch.linalg.eigvalsh(matrix)[:8]
    torch.testing.assert_close(result.values, torch.stack([least, 2 * least]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("budget", [3, 4, 5, 9])
def test_3_no_more_products_are_made_than_davidson_is_given(budget: int) -> None:
    found = solve("davidson", SPECTRA["top_heavy"].build(torch.float64), 8, max_applies=budget)
    assert not bool(found.converged) and found.applies <= budget


@pytest.mark.parametrize("block_size", [1, 2])
def test_1_without_verification_small_residuals_belong_to_a_wrong_set(
    monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    monkeypatch.setattr(lanczos._Run, "_verify", lambda run, candidate, effort: torch.tensor(True))
    operator = SPECTRA["hidden_copies"].build(torch.float64)
    result = solve("lanczos", operator, 8, block_size=block_size)
    assert bool(result.converged) and float(result.residuals.max()) < 1e-7
    least = float(eigenvalues(operator)[:8].sum())
    assert objective(operator, result.vectors) > 0.9 * least, "both are negative: a tenth of the objective is lost"


def test_1_verification_does_not_undo_convergence_for_ever() -> None:
    """Among close eigenvalues every random block of a verification spoils the residuals that it is to confirm."""
    operator = SPECTRA["power_law_positive"].build(torch.float64)
    runs = [solve("davidson", operator, 4, seed=seed) for seed in range(12)]
    least = float(eigenvalues(operator)[:4].sum())
    assert sum(bool(run.converged) for run in runs) >= 10
    for run in runs:
        if bool(run.converged):
            assert objective(operator, run.vectors) == pytest.approx(least, abs=4e-8)


# 2. A gap below the tolerance: vectors are arbitrary, so objectives are what can be compared.


@pytest.mark.parametrize("name", SOLVERS)
def test_2_a_gap_below_the_tolerance_leaves_the_objective_right(name: str) -> None:
    operator = nearly_equal(gap=1e-11)
    result = solve(name, operator, 6)
    assert bool(result.converged)
    least = float(eigenvalues(operator)[:6].sum())
    # A mixture of the two costs at most their gap; what lies outside them, at least 0.2 above, costs its square.
    allowed = 2e-11 + float(result.residuals.square().sum()) / 0.2
    assert objective(operator, result.vectors) == pytest.approx(least, abs=allowed)
    if name in ("eigh", "lanczos", "davidson"):
        assert float(result.next_value - result.values[-1]) < 1e-8, "the reported gap must warn of it"


def test_2_a_gap_below_the_tolerance_leaves_the_vectors_to_chance() -> None:
    # Rayleigh and Ritz mix vectors by the square of their residuals over their gap.
    operator = nearly_equal(gap=1e-13)
    runs = [solve("lanczos", operator, 6, seed=seed, tolerance=1e-4) for seed in range(4)]
    assert all(bool(run.converged) for run in runs)
    cosines = torch.stack([torch.linalg.svdvals(runs[0].vectors.mT @ run.vectors) for run in runs[1:]])
    assert float(cosines[:, :5].min()) > 1 - 1e-6, "the separated five are the same"
    assert float(cosines[:, 5].min()) < 0.9, "the sixth is not"
    objectives = [objective(operator, run.vectors) for run in runs]
    assert max(objectives) - min(objectives) < 1e-6


def nearly_equal(gap: float) -> SymmetricOperator:
    """λ_6 and λ_7 are `gap` of the norm apart, the others at least 0.2 from both."""
    values = torch.cat([-torch.linspace(1, 0.7, 5), torch.tensor([-0.5, -0.5]), torch.linspace(-0.3, 1, 293)]).double()
    values[6] += gap
    return Dense(symmetric_matrix(values))


# 3. Ω with a top far above what is wanted.


def test_3_lanczos_gives_up_on_a_heavy_top_and_says_so() -> None:
    operator = _top_heavy()
    result = solve("lanczos", operator, 8, block_size=8, max_applies=1000)
    assert 40 <= result.applies <= 400, "it gave up because of its rate, long before the budget was spent"
    assert not bool(result.converged)


def test_3_other_matrices_of_a_batch_do_not_wait_for_one_with_a_heavy_top() -> None:
    heavy = _top_heavy().to_dense()
    wanted = -torch.arange(8, 0, -1, dtype=torch.float64)
    easy = symmetric_matrix(torch.cat([wanted, torch.linspace(0, 1, len(heavy) - 8, dtype=torch.float64)]))
    operator = Dense(torch.stack([easy, heavy]))
    result = solve("lanczos", operator, 8, block_size=8)
    assert result.converged.tolist() == [True, False]
    assert result.applies < 150, "less than the budget for iteration"
    torch.testing.assert_close(result.values[0], wanted)


def test_3_davidson_converges_on_a_heavy_top() -> None:
    operator = _top_heavy()
    result = solve("davidson", operator, 8)
    least = float(eigenvalues(operator)[:8].sum())
    assert bool(result.converged)
    assert result.applies * 8 <= 448
    assert objective(operator, result.vectors) == pytest.approx(least, rel=1e-8)


def test_3_the_preconditioner_is_what_davidson_converges_by() -> None:
    assert not bool(solve("davidson", Dense(_top_heavy().matrix), 8, max_applies=50).converged)


@pytest.mark.parametrize(("dtype", "heaviness"), [(torch.float32, 1e2), (torch.float64, 1e5)], ids=str)
def test_3_stored_matrices_with_heavy_tops_are_inverted_below_their_spectrum(
    dtype: torch.dtype, heaviness: float
) -> None:
    """Next to one that a Krylov space solves; the wanted values are the end of a dense spectrum, as those of cV are."""
    draws = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 1600, 800, dtype=torch.float64, generator=draws)
    variance = torch.linalg.inv(inputs.mT @ inputs / 1600)
    bias = torch.randn(2, 800, 500, dtype=torch.float64, generator=draws)
    bias = bias @ bias.mT
    norm = torch.linalg.matrix_norm
    heavy = heaviness * variance / norm(variance, 2)[:, None, None] - bias / norm(bias, 2)[:, None, None]
    easy = symmetric_matrix(torch.cat([-torch.arange(8.0, 0, -1), torch.linspace(0, 1, 792)]).double())
    operator = Dense(torch.stack([heavy[0], easy, heavy[1]]).to(dtype))
    plain = solve("lanczos", operator, 8, shift_invert=False)
    result = solve("lanczos", operator, 8, shift_invert=True)
    assert result.converged.tolist() == [True, True, True]
    assert not bool(plain.converged.all()) or result.applies < 0.6 * plain.applies
    exact = torch.linalg.eigvalsh(operator.matrix.double())
    scale = exact.abs().amax(-1, keepdim=True)
    rounding = 1e-5 if dtype == torch.float32 else 1e-8
    vectors = result.vectors.double()
    residuals = operator.matrix.double() @ vectors - vectors * result.values.double().unsqueeze(-2)
    assert bool((residuals.norm(dim=-2) <= rounding * scale).all())
    assert bool(((result.values.double() - exact[:, :8]).abs() <= rounding * scale).all())


def test_3_an_inverse_misses_no_copy_of_an_eigenvalue() -> None:
    """Twelve copies of the lowest, more than a block of 8 holds, under a dense spectrum that reaches far up."""
    values = torch.cat([torch.zeros(12), torch.linspace(1e-3, 1e-2, 200), torch.linspace(1e-2, 1, 288)]).double()
    operator = Dense(symmetric_matrix(values))
    for seed in range(5):
        result = solve("lanczos", operator, 10, seed=seed, block_size=8, shift_invert=True)
        assert bool(result.converged)
        torch.testing.assert_close(result.values, values[:10], rtol=0, atol=1e-8)


def test_3_no_inverse_is_made_on_a_cpu_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> EigenResult:
        raise AssertionError("made one")

    monkeypatch.setattr(lanczos, "inverted", refuse)
    heavy = Dense(_top_heavy().to_dense())
    assert not bool(solve("lanczos", heavy, 8, block_size=8).converged)
    with pytest.raises(AssertionError, match="made one"):
        solve("lanczos", heavy, 8, block_size=8, shift_invert=True)


def test_3_an_inverse_is_made_on_an_accelerator_unless_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[int] = []
    inverted = lanczos.inverted

    def noted(operator: Dense, found: EigenResult, norm: Tensor, **settings: Any) -> EigenResult:
        before.append(found.applies)
        return inverted(operator, found, norm, **settings)

    monkeypatch.setattr(lanczos, "inverted", noted)
    monkeypatch.setattr(lanczos, "_is_patient", lambda device: True)
    heavy = Dense(_top_heavy().to_dense())
    assert not bool(solve("lanczos", heavy, 8, block_size=8, shift_invert=False).converged) and before == []
    found = solve("lanczos", heavy, 8, block_size=8)
    assert bool(found.converged) and [found.applies > krylov for krylov in before] == [True]
    exact = heavy.matrix @ found.vectors - found.vectors * found.values
    torch.testing.assert_close(
        found.residuals, exact.norm(dim=0), rtol=1e-3, atol=1e-12 * float(eigenvalues(heavy)[-1])
    )


def expanded(monkeypatch: pytest.MonkeyPatch, budget: int) -> tuple[EigenResult, int]:
    """What comes of exact eigenvectors of which the lowest is not one; and how often it was verified."""
    rounds: list[None] = []
    verify = Expansion._verify
    monkeypatch.setattr(Expansion, "_verify", lambda self: (rounds.append(None), verify(self))[1])
    values = torch.arange(200, dtype=torch.float64)
    operator, inverse = Dense(torch.diag(values)), Dense(torch.diag(1 / (values + 1)))
    space = Subspace(operator, 80, torch.Generator().manual_seed(0))
    wrong = torch.eye(200, dtype=torch.float64)[:, 1:9]
    space.seed(wrong, operator.matmat(wrong))
    space.norm = torch.tensor(199.0, dtype=torch.float64)
    space.applies = 1
    search = Expansion(space, 4, 8, tolerance=1e-8, budget=budget, inverse=lambda _: inverse.matmat)
    return search.result(), len(rounds)


def test_1_a_verification_that_finds_something_lower_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, rounds = expanded(monkeypatch, budget=1000)
    assert bool(found.converged) and rounds >= 2
    torch.testing.assert_close(found.values, torch.arange(4, dtype=torch.float64), rtol=0, atol=1e-8)


def test_1_what_is_not_verified_is_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    found, rounds = expanded(monkeypatch, budget=4)
    assert rounds == 0 and float(found.residuals.max()) == 0 and not bool(found.converged)


def _top_heavy() -> TopHeavy:
    operator = SPECTRA["top_heavy"].build(torch.float64)
    assert isinstance(operator, TopHeavy)
    values = eigenvalues(operator)
    assert float(values[0]) < 0 and float(values[-1] / -values[0]) > 1e4
    assert float(eigenvalues(Dense(operator.variance))[-1]) == pytest.approx(3e4)
    return operator


class LookedUp(nn.Module):
    """Logits Wx, W = 0, of inputs that are looked up by number."""

    def __init__(self, rows: Tensor, classes: int) -> None:
        super().__init__()
        self.inputs = nn.Embedding.from_pretrained(rows)
        self.linear = nn.Linear(rows.shape[1], classes, bias=False, dtype=rows.dtype)
        nn.init.zeros_(self.linear.weight)

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.linear(self.inputs(input_ids)),)


@pytest.fixture(scope="module")
def heavy_layer() -> Estimates:
    """A layer too large for the dense solver whose V spans six decades, and whose labels depend on Z's top.

    Z is exactly Q diag(z) Qᵀ with z from 1 down to 1e-6, so with little damping V = tr(Y⁻¹)Z⁻¹ has condition 1e6;
    the labels are the largest of twelve coordinates of x where z is largest: there Δ is more than noise.
    """
    size, classes, samples = 528, 12, 640
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(rows, size, dtype=torch.float64, generator=generator)).Q for rows in (samples, size)
    )
    rows = left * (samples * torch.logspace(0, -6, size, dtype=torch.float64)).sqrt() @ right.mT
    ids = torch.stack([torch.arange(samples), torch.zeros(samples, dtype=torch.long)], dim=1)
    labels = torch.stack([torch.full((samples,), -100), left[:, :classes].argmax(1)], dim=1)
    lora = LoraConfig(r=8, target_modules=["linear"])
    pipeline = lora_da_core.build_pipeline(config=HEAVY)
    return pipeline.estimate(LookedUp(rows, classes), [{"input_ids": ids, "labels": labels}], lora)


HEAVY = LoraDAConfig(scale="fixed", damping=1e-12, beta=1.0, population=18)
"""A small population: the variance term outweighs the bias term by ‖cV‖/|λ_1| of more than 3e4."""


def heaviness(estimates: Estimates) -> float:
    """‖cV‖/|λ_1| of the layer, from dense matrices, with λ_1 below zero."""
    (spec,) = estimates.task.specs
    fisher = estimates.task.estimator.fisher(
        estimates.statistics.of_layer("linear"),
        damping=HEAVY.damping,
        damping_kind=HEAVY.damping_kind,
        fisher_scale=HEAVY.fisher_scale,
    )
    step = fisher.step(estimates.gradient(spec)).to_dense()
    variance = fisher.inverse_input_trace().to_dense() * HEAVY.beta / float(HEAVY.population or 0)
    return float(torch.linalg.matrix_norm(variance, 2) / -torch.linalg.eigvalsh(variance - step @ step.mT)[0])


def solved(estimates: Estimates, solver: str, **config: Any) -> LoraDAResult:
    return lora_da_core.build_pipeline(solver=solver, config=replace(HEAVY, **config)).solve(estimates)


def test_3_a_heavy_top_goes_from_lanczos_to_davidson_and_converges(
    heavy_layer: Estimates, caplog: pytest.LogCaptureFixture
) -> None:
    (layer,) = solved(heavy_layer, "auto").report.layers
    assert heaviness(heavy_layer) > 3e4
    assert layer.converged and layer.solver == "davidson"
    assert layer.remedies == ("lanczos did not converge; solved with davidson",)
    assert "solver 'lanczos' did not converge on linear: residual" in caplog.text
    (exact,) = solved(heavy_layer, "eigh").report.layers
    assert sum(layer.ritz_values) == pytest.approx(sum(exact.ritz_values), rel=1e-6)
    assert layer.sigma == pytest.approx(exact.sigma, rel=1e-8)


@pytest.mark.parametrize("choice", ["warn", "error"])
def test_3_a_heavy_top_that_is_not_to_be_mended_is_reported(heavy_layer: Estimates, choice: str) -> None:
    if choice == "error":
        with pytest.raises(ConvergenceError, match="'lanczos' did not converge on linear"):
            solved(heavy_layer, "auto", unconverged=choice)
        return
    (layer,) = solved(heavy_layer, "auto", unconverged=choice).report.layers
    assert not layer.converged and layer.solver == "lanczos"
    assert layer.remedies == ("lanczos did not converge",)


# 4. float32, and what torch.lobpcg refuses.


@pytest.mark.parametrize("name", ["lanczos", "randomized_svd", "arpack", "davidson"])
def test_4_float32_is_not_asked_for_more_than_it_has(name: str) -> None:
    operator = SPECTRA["power_law"].build(torch.float32)
    result, least_asked = (solve(name, operator, 8, tolerance=tolerance) for tolerance in (1e-12, 5e-6))
    assert bool(result.converged)
    assert result.applies == least_asked.applies and torch.equal(result.vectors, least_asked.vectors)
    assert float(result.residuals.max()) <= 5e-6 * float(eigenvalues(operator).abs().max())


def test_4_float32_products_have_a_floor_of_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the floor Lanczos spends its whole budget below it and does not get there."""
    monkeypatch.setattr(_ritz, "FLOAT32_FLOOR", 0.0)
    operator = SPECTRA["no_gap"].build(torch.float32)
    result = solve("lanczos", operator, 5, tolerance=1e-12)
    assert not bool(result.converged)
    assert 1e-8 < float(result.residuals.max()) / float(eigenvalues(operator).abs().max()) < 5e-6


@pytest.mark.parametrize("order", [3, 4, 8])
def test_4_orders_that_torch_lobpcg_refuses_are_solved(order: int) -> None:
    matrix = symmetric_matrix(torch.linspace(-1, 1, order, dtype=torch.float64))
    with pytest.raises(ValueError, match="smaller than 3 x"):
        torch.lobpcg(matrix, k=3, largest=False)
    result = solve("lobpcg", Dense(matrix), 3)
    assert bool(result.converged)
    torch.testing.assert_close(result.values, eigenvalues(Dense(matrix))[:3], rtol=0, atol=1e-12)


# 5. σ, the spectral norm of Δ_raw.


def flat_gradient() -> Tensor:
    """G, (out, in), whose singular values decay so slowly that a sketch of one column misses the first."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(300, 256, dtype=torch.float64, generator=generator)


def layer_solution(solver: Solver[Any], gradient: Tensor, **config: Any) -> LayerSolution:
    """The solution of a layer with J = I, so that Δ_raw = −Gᵀ."""
    out_features, in_features = gradient.shape
    spec = LayerSpec("layer", "linear", in_features, out_features, rank=4, scaling=1.0)
    statistics = FisherStatistics(spec, {}, {"place": torch.zeros(0)}, samples=10, tokens=10)
    registry = lora_da_core.build_pipeline().registry
    settings = LoraDAConfig(damping=1.0, **config)
    layers = LayerSolver(registry, Identity(Identity.Options()), solver, settings)
    return layers.solve([layers.prepare(statistics, DenseMap(gradient))], population=10)[0]


def test_5_a_randomised_sketch_of_one_column_underestimates_the_norm() -> None:
    gradient = flat_gradient()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sketched = float(torch.svd_lowrank(gradient, q=1)[1])
    assert sketched < 0.99 * float(torch.linalg.matrix_norm(gradient, 2))


@pytest.mark.parametrize("name", SOLVERS)
def test_5_sigma_is_the_spectral_norm(name: str) -> None:
    gradient = flat_gradient()
    expected = float(torch.linalg.matrix_norm(gradient, 2))
    solver = SOLVERS[name]
    assert layer_solution(solver(solver.Options()), gradient).sigma == pytest.approx(expected, rel=1e-7)


def test_5_sigma_that_did_not_converge_is_mended_to_the_norm() -> None:
    gradient = flat_gradient()
    hopeless = Lanczos(Lanczos.Options(max_applies=4))
    expected = float(torch.linalg.matrix_norm(gradient, 2))
    assert layer_solution(hopeless, gradient, unconverged="warn").sigma < 0.999 * expected
    mended = layer_solution(hopeless, gradient)
    assert mended.sigma == pytest.approx(expected, rel=1e-7)
    assert "lanczos did not converge on σ; solved with eigh" in mended.remedies
