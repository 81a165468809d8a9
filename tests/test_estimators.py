"""What holds for every Fisher estimator: inverses, traces, merging, precision, memory, errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_da_core.errors import DataError, ModelError, OptionError
from lora_da_core.interfaces import FisherEstimator
from lora_da_core.operators import DenseMap, LowRankMap
from lora_da_core.types import FisherStatistics
from lora_da_estimators import diagonal, ekfac, empirical, identity, kfac, sketched
from lora_da_estimators._factors import DenseFactor, FactorRequest, damp_dense, damp_diagonal
from lora_da_estimators._sums import SECOND_MOMENT, InputSecondMoment
from lora_da_estimators.diagonal import Diagonal
from lora_da_estimators.ekfac import Ekfac
from lora_da_estimators.empirical import Empirical
from lora_da_estimators.identity import Identity
from lora_da_estimators.kfac import Kfac
from lora_da_estimators.sketched import FrequentDirections, Sketched, SketchedOptions
from toy_oracle import CPU, Tokens, collect, dense, fisher_of, make, random_tokens

Choice = tuple[type[FisherEstimator[Any]], dict[str, Any]]
CHOICES: dict[str, Choice] = {
    "identity": (Identity, {}),
    "diagonal-sample": (Diagonal, {"per": "sample"}),
    "diagonal-token": (Diagonal, {"per": "token"}),
    "kfac-diagonal": (Kfac, {"output": "diagonal"}),
    "kfac-full": (Kfac, {"output": "full"}),
    "kfac-identity": (Kfac, {"output": "identity"}),
    "ekfac": (Ekfac, {}),
    "empirical-auto": (Empirical, {"storage": "auto"}),
    "empirical-rows": (Empirical, {"storage": "rows"}),
    "empirical-factored": (Empirical, {"storage": "factored"}),
    "frequent-directions": (Sketched, {"method": "frequent_directions", "size": 3}),
    "nystrom": (Sketched, {"method": "nystrom", "size": 4}),
    "svd": (Sketched, {"method": "svd", "size": 3}),
}
EXACT_MERGE = [name for name in CHOICES if name != "frequent-directions"]


def chosen(name: str) -> FisherEstimator[Any]:
    estimator, options = CHOICES[name]
    return make(estimator, **options)


def tokens_of(seed: int, **sizes: int) -> Tokens:
    sizes = {"out_features": 4, "in_features": 5, "samples": 9} | sizes
    return random_tokens(torch.Generator().manual_seed(seed), **sizes)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("sizes", [(4, 5), (6, 3)], ids=["wide", "tall"])
@pytest.mark.parametrize("damping", [(0.01, "relative"), (0.002, "absolute")], ids=["relative", "absolute"])
@pytest.mark.parametrize("name", CHOICES)
def test_solve_and_variance_are_those_of_the_dense_matrix(
    name: str, damping: tuple[float, str], sizes: tuple[int, int]
) -> None:
    out, size = sizes
    tokens = tokens_of(0, out_features=out, in_features=size)
    fisher = fisher_of(chosen(name), tokens, damping=damping[0], damping_kind=damping[1])
    matrix = dense(fisher, tokens.spec)
    assert relative(matrix, matrix.T) < 1e-12
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0
    inverse = torch.linalg.inv(matrix)
    gradient = tokens.gradients().mean(0)
    assert relative(fisher.solve(gradient).flatten(), inverse @ gradient.flatten()) < 1e-9
    assert relative(fisher.apply(fisher.solve(gradient)), gradient) < 1e-9
    expected = torch.einsum("oioj->ij", inverse.view(out, size, out, size))
    operator = fisher.inverse_input_trace()
    assert (operator.size, operator.dtype, operator.device) == (size, torch.float64, CPU)
    assert relative(operator.to_dense(), expected) < 1e-9
    block = torch.randn(size, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert relative(operator.matmat(block), expected @ block) < 1e-9
    assert relative(operator.diagonal(), expected.diagonal()) < 1e-9
    assert float(operator.trace()) == pytest.approx(float(expected.trace()), rel=1e-9)


@pytest.mark.parametrize("name", CHOICES)
def test_solve_is_symmetric_positive_definite(name: str) -> None:
    tokens = tokens_of(3)
    fisher = fisher_of(chosen(name), tokens, damping=0.01)
    units = torch.eye(20, dtype=torch.float64).view(20, 4, 5)
    inverse = torch.stack([fisher.solve(unit).flatten() for unit in units])
    assert relative(inverse, inverse.T) < 1e-11
    assert float(torch.linalg.eigvalsh(inverse)[0]) > 0


@pytest.mark.parametrize(
    "name", ["kfac-diagonal", "kfac-full", "kfac-identity", "ekfac", "identity", "diagonal-sample"]
)
def test_preconditioner_is_the_shifted_inverse(name: str) -> None:
    operator = fisher_of(chosen(name), tokens_of(1), damping=0.01).inverse_input_trace()
    block = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for shift in (1e-3, 1.0, 1e5):
        precondition = operator.preconditioner(shift)
        assert precondition is not None
        shifted = operator.to_dense() + shift * torch.eye(5, dtype=torch.float64)
        assert relative(precondition(block), torch.linalg.solve(shifted, block)) < 1e-10


@pytest.mark.parametrize("name", ["kfac-full", "ekfac"])
def test_no_preconditioner_where_the_shifted_operator_is_indefinite(name: str) -> None:
    operator = fisher_of(chosen(name), tokens_of(1), damping=0.01).inverse_input_trace()
    values = torch.linalg.eigvalsh(operator.to_dense())
    assert operator.preconditioner(-0.5 * float(values[0] + values[-1])) is None


@pytest.mark.parametrize("name", CHOICES)
def test_step_of_a_low_rank_float32_gradient(name: str) -> None:
    tokens = tokens_of(4)
    fisher = fisher_of(chosen(name), tokens, damping=0.01)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, 2, generator=generator), torch.randn(5, 2, generator=generator)
    expected = -fisher.solve(left.double() @ right.double().T).T
    for gradient in (LowRankMap(left, right), DenseMap(left.double() @ right.double().T)):
        step = fisher.step(gradient)
        block = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        other = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        assert step.shape == (5, 4)
        assert step.matmat(block).dtype == torch.float64
        assert relative(step.matmat(block), expected @ block) < 1e-6
        assert relative(step.rmatmat(other), expected.T @ other) < 1e-6


@st.composite
def splits(draw: st.DrawFn) -> list[list[int]]:
    """Nine samples in any order, cut into one to four shards."""
    order = draw(st.permutations(range(9)))
    cuts = sorted(draw(st.sets(st.integers(1, 8), max_size=3)))
    return [list(order[start:stop]) for start, stop in zip([0, *cuts], [*cuts, 9], strict=True)]


@pytest.mark.parametrize("name", EXACT_MERGE)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(parts=splits(), seed=st.integers(0, 3))
def test_any_split_merged_in_any_order_is_the_whole(name: str, parts: list[list[int]], seed: int) -> None:
    tokens = tokens_of(seed)
    whole = dense(fisher_of(chosen(name), tokens, damping=0.01), tokens.spec)
    for how in ("shards", "batches"):
        part = dense(fisher_of(chosen(name), tokens, damping=0.01, **{how: parts}), tokens.spec)
        assert relative(part, whole) < 1e-9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(parts=splits(), seed=st.integers(0, 3), size=st.integers(1, 6))
def test_frequent_directions_stay_within_their_bound(parts: list[list[int]], seed: int, size: int) -> None:
    tokens = tokens_of(seed)
    estimator = make(Sketched, size=size)
    rows = tokens.gradients().flatten(1)
    total = float(rows.square().sum())
    for how in ("shards", "batches"):
        found = collect(estimator, tokens, **{how: parts}).layer
        sketch, shift = found["rows"].flatten(1), float(found["shift"])
        values = torch.linalg.eigvalsh(rows.T @ rows - sketch.T @ sketch)
        assert float(values[0]) > -1e-12 * total
        assert float(values[-1]) < shift + 1e-12 * total
        assert shift <= total / (size + 1) * (1 + 1e-12)
        assert float(found["trace"]) == pytest.approx(total, rel=1e-12)


def test_frequent_directions_are_exact_where_the_size_suffices() -> None:
    tokens = tokens_of(0)
    sketch = fisher_of(make(Sketched, size=9), tokens, damping=0.01, shards=[[3, 1, 2], [0, 8, 7, 6], [4, 5]])
    exact = fisher_of(make(Empirical), tokens, damping=0.01)
    assert relative(dense(sketch, tokens.spec), dense(exact, tokens.spec)) < 1e-10


def test_directions_that_tie_with_what_is_lost_are_lost_too() -> None:
    """Two gradients of one energy, at right angles, and room for one: no direction is above what is cut off."""
    tokens = tokens_of(0)
    made = FrequentDirections(tokens.spec, 1, device=CPU, dtype=torch.float64)
    for unit in torch.eye(5, dtype=torch.float64)[:2]:
        made.update(unit[None], 3.0 * torch.ones(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.long))
    found = made.statistics()
    assert float(found["rows"].norm()) < 1e-7 and float(found["shift"]) == pytest.approx(36.0, rel=1e-12)


def test_the_second_pass_of_ekfac_leaves_the_inputs_alone() -> None:
    tokens = tokens_of(0)
    estimator = make(Ekfac)
    inputs = estimator.input_accumulator(tokens.spec, device=CPU, dtype=torch.float64)
    inputs.update(tokens.x, None, tokens.example)
    (moment,) = inputs.statistics().values()
    merged = FisherStatistics(tokens.spec, inputs.statistics(), {}, samples=tokens.samples, tokens=len(tokens.x))
    basis = torch.linalg.eigh(moment.clone()).eigenvectors
    inputs.end_pass(0, merged)
    for _ in range(2):
        (found,) = inputs.statistics().values()
        torch.testing.assert_close((found.mT @ basis).abs(), torch.eye(5, dtype=torch.float64))
        inputs.update(tokens.x, None, tokens.example)


def test_compensation_halves_the_worst_error() -> None:
    tokens = tokens_of(0)
    exact = dense(fisher_of(make(Empirical), tokens, damping=0.01), tokens.spec)
    for compensate, share in ((False, 1.0), (True, 0.5)):
        estimator = make(Sketched, size=2, compensate=compensate)
        statistics = collect(estimator, tokens)
        found = estimator.fisher(statistics, damping=0.01, damping_kind="relative", fisher_scale="token_mean")
        worst = float(torch.linalg.matrix_norm(dense(found, tokens.spec) - exact, 2))
        assert 0 < worst <= share * float(statistics.layer["shift"]) / statistics.samples * (1 + 1e-9)


def test_nystrom_is_exact_where_the_size_suffices_and_never_above_the_fisher() -> None:
    tokens = tokens_of(0)
    exact = dense(fisher_of(make(Empirical), tokens, damping=0.01), tokens.spec)
    for size, bound in ((9, 1e-8), (12, 1e-8)):
        found = fisher_of(make(Sketched, method="nystrom", size=size), tokens, damping=0.01)
        assert relative(dense(found, tokens.spec), exact) < bound
    small = dense(fisher_of(make(Sketched, method="nystrom", size=3), tokens, damping=0.01), tokens.spec)
    assert float(torch.linalg.eigvalsh(exact - small)[0]) > -1e-10
    assert relative(small, exact) > 1e-3


def test_nystrom_probes_depend_on_the_seed_and_the_layer_alone() -> None:
    tokens = tokens_of(0)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    products = [
        collect(make(Sketched, method="nystrom", size=3, seed=seed), tokens).layer["products"] for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(products[0], products[1])
    assert not torch.equal(products[0], products[2])


def test_svd_is_the_best_of_its_rank() -> None:
    tokens = tokens_of(0)
    exact = dense(fisher_of(make(Empirical), tokens, damping=0.01), tokens.spec)
    error = {}
    for method in ("svd", "nystrom", "frequent_directions"):
        sketch = fisher_of(make(Sketched, method=method, size=3, compensate=False), tokens, damping=0.01)
        error[method] = relative(dense(sketch, tokens.spec), exact)
    assert error["svd"] < min(error["nystrom"], error["frequent_directions"])
    values = torch.linalg.eigvalsh(exact)
    # What is cut is all but the strongest three of the nine directions above λ.
    expected = (values[:-3] - values[0]).norm() / values.norm()
    assert error["svd"] == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("name", CHOICES)
def test_tokens_of_a_sample_may_come_in_any_order(name: str) -> None:
    tokens = tokens_of(2)
    order = torch.randperm(len(tokens.x), generator=torch.Generator().manual_seed(0))
    shuffled = Tokens(tokens.x[order], tokens.g[order], tokens.example[order])
    found, expected = (dense(fisher_of(chosen(name), t, damping=0.01), t.spec) for t in (shuffled, tokens))
    assert relative(found, expected) < 1e-10


@pytest.mark.parametrize("name", CHOICES)
def test_a_batch_without_counted_tokens_changes_nothing(name: str) -> None:
    tokens = tokens_of(2)
    estimator = chosen(name)
    spec, dtype = tokens.spec, torch.float64
    for accumulator in (
        estimator.input_accumulator(spec, device=CPU, dtype=dtype),
        estimator.layer_accumulator(spec, device=CPU, dtype=dtype),
    ):
        accumulator.update(tokens.x, tokens.g, tokens.example)
        before = {key: value.clone() for key, value in accumulator.statistics().items()}
        accumulator.update(tokens.x[:0], tokens.g[:0], tokens.example[:0])
        after = accumulator.statistics()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", CHOICES)
def test_float32_sums_agree_with_float64(name: str) -> None:
    tokens = tokens_of(5)
    single = fisher_of(chosen(name), tokens.to(torch.float32), damping=0.1, dtype=torch.float32)
    double = fisher_of(chosen(name), tokens, damping=0.1)
    gradient = tokens.gradients().mean(0)
    found, expected = single.solve(gradient), double.solve(gradient)
    assert found.dtype == torch.float64
    assert relative(found, expected) < 1e-3
    assert relative(single.apply(found), gradient) < 1e-9
    variance = single.inverse_input_trace()
    assert variance.dtype == torch.float64
    assert relative(variance.to_dense(), double.inverse_input_trace().to_dense()) < 1e-3


@pytest.mark.parametrize("name", CHOICES)
def test_bfloat16_tokens_are_summed_in_the_accumulators_dtype(name: str) -> None:
    tokens = tokens_of(5).to(torch.bfloat16)
    found = fisher_of(chosen(name), tokens, damping=0.1, dtype=torch.float32)
    expected = fisher_of(chosen(name), tokens.to(torch.float64), damping=0.1)
    assert relative(dense(found, tokens.spec), dense(expected, tokens.spec)) < 1e-5


@pytest.mark.parametrize("name", CHOICES)
def test_same_tokens_give_the_same_bytes(name: str) -> None:
    first, second = (collect(chosen(name), tokens_of(6)) for _ in range(2))
    for side in ("input", "layer"):
        one, two = getattr(first, side), getattr(second, side)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", CHOICES)
def test_stored_statistics_suffice(name: str) -> None:
    tokens, estimator = tokens_of(6), chosen(name)
    live = collect(estimator, tokens)
    stored = FisherStatistics(
        live.spec, copied(live.input), copied(live.layer), samples=live.samples, tokens=live.tokens
    )
    how: dict[str, Any] = {"damping": 0.02, "damping_kind": "relative", "fisher_scale": "token_mean"}
    found, expected = estimator.fisher(stored, **how), estimator.fisher(live, **how)
    assert torch.equal(dense(found, tokens.spec), dense(expected, tokens.spec))


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in tensors.items()}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("length", [1, 40], ids=["short", "long"])
def test_statistics_bytes_are_those_of_the_tensors(name: str, length: int) -> None:
    estimator = chosen(name)
    example = torch.arange(9).repeat_interleave(length)
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens(
        torch.randn(9 * length, 5, generator=generator), torch.randn(9 * length, 4, generator=generator), example
    )
    statistics = collect(estimator, tokens, dtype=torch.float32)
    planned = estimator.statistics_bytes(tokens.spec, samples=9, tokens=9 * length, itemsize=4)
    held = [
        sum(value.untyped_storage().nbytes() for value in side.values())
        for side in (statistics.input, statistics.layer)
    ]
    if name == "nystrom":
        held[1] += 4 * 4 * (4 + 5)
    assert list(planned) == held


def test_automatic_storage_takes_the_smaller_form_sample_by_sample() -> None:
    # A matrix holds 20 numbers and a token 9: two tokens are smaller, three are not.
    example = torch.tensor([0, 0, 1, 1, 1, 2])
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens(
        torch.randn(6, 5, generator=generator, dtype=torch.float64),
        torch.randn(6, 4, generator=generator, dtype=torch.float64),
        example,
    )
    statistics = collect(make(Empirical), tokens)
    assert statistics.layer["rows"].shape == (1, 4, 5)
    assert statistics.layer["lengths"].tolist() == [2, 1]
    found, expected = (
        dense(fisher_of(make(Empirical, storage=storage), tokens, damping=0.1), tokens.spec)
        for storage in ("auto", "rows")
    )
    assert relative(found, expected) < 1e-12


def test_large_stored_matrices_are_widened_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(7)
    whole = fisher_of(make(Empirical, storage="rows"), tokens, damping=0.01)
    expected = dense(whole, tokens.spec), whole.inverse_input_trace().to_dense()
    monkeypatch.setattr("lora_da_estimators._directions._PIECE", 45)
    monkeypatch.setattr("lora_da_estimators._low_rank.LowRankInverseTrace._columns", 2)
    pieces = fisher_of(make(Empirical, storage="rows"), tokens, damping=0.01)
    assert relative(dense(pieces, tokens.spec), expected[0]) < 1e-12
    assert relative(pieces.inverse_input_trace().to_dense(), expected[1]) < 1e-12


@pytest.mark.parametrize("name", ["empirical-rows", "frequent-directions", "nystrom", "svd"])
def test_rounding_that_little_damping_would_amplify_is_noticed(name: str) -> None:
    tokens, estimator = tokens_of(0), chosen(name)
    low = fisher_of(estimator, tokens.to(torch.float32), damping=1e-6, damping_kind="absolute", dtype=torch.float32)
    lost = low.damping.get("shift", 0.0)
    assert bool(low.remedies) == (lost == 0)
    assert all("rounding of float32 gradients" in text for text in low.remedies)
    assert fisher_of(estimator, tokens, damping=1e-6, damping_kind="absolute").remedies == ()
    assert fisher_of(estimator, tokens.to(torch.float32), damping=0.1, dtype=torch.float32).remedies == ()


class TestKfac:
    def test_layers_with_one_input_share_its_inverse(self) -> None:
        tokens, shared = tokens_of(0), {}
        estimator = make(Kfac, output="full")
        first = collect(estimator, tokens)
        statistics = [
            FisherStatistics(first.spec, first.input, layer, first.samples, first.tokens, shared)
            for layer in (first.layer, copied(first.layer))
        ]
        one, two = (
            estimator.fisher(s, damping=0.01, damping_kind="relative", fisher_scale="token_mean") for s in statistics
        )
        assert one.inputs is two.inputs
        other = estimator.fisher(statistics[0], damping=0.02, damping_kind="relative", fisher_scale="token_mean")
        absolute = estimator.fisher(statistics[0], damping=0.01, damping_kind="absolute", fisher_scale="token_mean")
        assert other.inputs.damping != one.inputs.damping != absolute.inputs.damping

    def test_relative_damping_does_not_depend_on_units(self) -> None:
        tokens = tokens_of(0)
        scaled = Tokens(1e3 * tokens.x, 1e-4 * tokens.g, tokens.example)
        for output in ("diagonal", "full"):
            plain, other = (fisher_of(make(Kfac, output=output), t, damping=0.1) for t in (tokens, scaled))
            assert relative(dense(other, tokens.spec), 1e-2 * dense(plain, tokens.spec)) < 1e-12

    def test_the_sample_scale_multiplies_by_tokens_per_sample(self) -> None:
        tokens = tokens_of(0)
        token, sample = (
            dense(fisher_of(make(Kfac, output="full"), tokens, damping=0.1, fisher_scale=scale), tokens.spec)
            for scale in ("token_mean", "sample")
        )
        assert relative(sample, token * len(tokens.x) / tokens.samples) < 1e-12

    def test_identity_output_needs_no_gradients(self) -> None:
        estimator = make(Kfac, output="identity")
        assert not estimator.needs_output_grads
        tokens = tokens_of(0)
        accumulator = estimator.layer_accumulator(tokens.spec, device=CPU, dtype=torch.float64)
        accumulator.update(tokens.x, None, tokens.example)
        assert accumulator.statistics() == {}
        fisher = fisher_of(estimator, tokens, damping=0.01, fisher_scale="sample")
        second = tokens.x.T @ tokens.x / len(tokens.x)
        damped = second + 0.1 * second.diagonal().mean() * torch.eye(5, dtype=torch.float64)
        assert relative(dense(fisher, tokens.spec), torch.kron(torch.eye(4, dtype=torch.float64), damped)) < 1e-12

    def test_singular_factors_without_damping_are_mended_and_said_so(self) -> None:
        tokens = Tokens(torch.ones(2, 5).double(), torch.ones(2, 4).double(), torch.tensor([0, 1]))
        fisher = fisher_of(make(Kfac, output="full"), tokens, damping=0.0)
        assert len(fisher.remedies) == 4
        assert any("input factor Z" in text and "raised" in text for text in fisher.remedies)
        assert any("output factor Y" in text and "raised" in text for text in fisher.remedies)
        gradient = tokens.gradients().mean(0)
        assert relative(fisher.apply(fisher.solve(gradient)), gradient) < 0.05
        assert bool(fisher.inverse_input_trace().to_dense().isfinite().all())

    def test_a_diagonal_with_dead_outputs_is_mended_and_said_so(self) -> None:
        tokens = tokens_of(0)
        grads = tokens.g.clone()
        grads[:, 1] = 0
        fisher = fisher_of(make(Kfac), Tokens(tokens.x, grads, tokens.example), damping=0.0)
        assert "1 of 4 damped entries" in fisher.remedies[-1]
        assert bool(fisher.inverse_input_trace().to_dense().isfinite().all())

    def test_damping_below_the_precision_of_the_sums_is_noticed(self) -> None:
        tokens = tokens_of(0)
        estimator = make(Kfac)
        low = fisher_of(estimator, tokens.to(torch.float32), damping=1e-12, dtype=torch.float32)
        assert "below the 0.00012 that float32 sums resolve" in low.remedies[0]
        assert fisher_of(estimator, tokens, damping=1e-12).remedies == ()
        assert fisher_of(estimator, tokens.to(torch.float32), damping=1e-4, dtype=torch.float32).remedies == ()

    def test_options_are_checked(self) -> None:
        for wrong in ({"output": "blocks"}, {"labels": "guessed"}, {"output": "identity", "labels": "exact"}):
            with pytest.raises(ValueError, match=r"choose one of|has no effect"):
                make(Kfac, **wrong)
        assert make(Kfac, labels="sampled").labels == "sampled"


class TestFactors:
    request = FactorRequest("model.layer", "input factor Z", "inputs", 0.0, "absolute")

    def test_an_indefinite_sum_climbs_the_ladder(self) -> None:
        values = torch.tensor([1.0, 0.5, -3e-5], dtype=torch.float64)
        vectors = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
        indefinite = (vectors * values) @ vectors.T
        request = FactorRequest("model.layer", "input factor Z", "inputs", 1e-6, "absolute")
        factor = damp_dense(indefinite, 1, request)
        assert factor.damping == pytest.approx(1e-4)
        assert "not positive definite at damping 1e-06; raised to 0.0001" in factor.remedies[0]
        assert relative(factor.multiply(factor.solve(vectors)), vectors) < 1e-10

    def test_at_the_ladders_end_eigenvalues_are_clamped(self) -> None:
        values = torch.tensor([1.0, 0.5, -0.2], dtype=torch.float64)
        request = FactorRequest("model.layer", "input factor Z", "inputs", 1e-6, "absolute")
        factor = damp_dense(torch.diag(values), 1, request)
        assert "1 eigenvalues were clamped" in factor.remedies[-1]
        expected = torch.tensor([1.0 + 1e-6, 0.5 + 1e-6, 1e-3], dtype=torch.float64)
        torch.testing.assert_close(factor.matrix, torch.diag(expected), rtol=1e-10, atol=1e-12)
        assert relative(factor.inverse, torch.diag(1 / expected)) < 1e-10

    def test_a_positive_definite_sum_is_left_alone(self) -> None:
        factor = damp_dense(torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)), 2, self.request)
        assert isinstance(factor, DenseFactor)
        assert torch.equal(factor.matrix, torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64)))
        assert factor.damping == 0
        assert factor.remedies and "mean diagonal" in factor.remedies[0]

    def test_a_zero_diagonal_without_damping_is_refused(self) -> None:
        with pytest.raises(DataError, match=r"'model\.layer'.*inputs are zero"):
            damp_diagonal(torch.zeros(3), 1, self.request)


@pytest.mark.parametrize("name", [name for name in CHOICES if name not in ("identity", "kfac-identity")])
def test_zero_gradients_are_refused_by_name_or_damped(name: str) -> None:
    tokens = tokens_of(0)
    silent = Tokens(tokens.x, torch.zeros_like(tokens.g), tokens.example)
    statistics = collect(chosen(name), silent)
    with pytest.raises(DataError, match=r"'model\.layer'.*gradients are zero.*absolute damping"):
        chosen(name).fisher(statistics, damping=0.1, damping_kind="relative", fisher_scale="token_mean")
    fisher = chosen(name).fisher(statistics, damping=0.1, damping_kind="absolute", fisher_scale="token_mean")
    assert bool(fisher.solve(torch.ones(4, 5)).isfinite().all())
    assert float(torch.linalg.eigvalsh(fisher.inverse_input_trace().to_dense())[0]) > 0


@pytest.mark.parametrize("name", ["kfac-diagonal", "kfac-full", "kfac-identity", "ekfac", "empirical-auto", "nystrom"])
def test_zero_inputs_are_refused_by_name_or_damped(name: str) -> None:
    tokens = tokens_of(0)
    silent = Tokens(torch.zeros_like(tokens.x), tokens.g, tokens.example)
    statistics = collect(chosen(name), silent)
    with pytest.raises(DataError, match=r"'model\.layer'.*are zero"):
        chosen(name).fisher(statistics, damping=0.1, damping_kind="relative", fisher_scale="token_mean")
    fisher = chosen(name).fisher(statistics, damping=0.1, damping_kind="absolute", fisher_scale="token_mean")
    assert bool(fisher.solve(torch.ones(4, 5)).isfinite().all())
    assert bool(fisher.inverse_input_trace().to_dense().isfinite().all())


@pytest.mark.parametrize("name", [name for name in CHOICES if name not in ("identity", "kfac-identity")])
def test_gradients_that_are_not_finite_are_refused_by_name(name: str) -> None:
    tokens = tokens_of(0)
    broken = tokens.g.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(ModelError, match=r"'model\.layer'.*NaN or infinity"):
        fisher_of(chosen(name), Tokens(tokens.x, broken, tokens.example), damping=0.1)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "identity"])
def test_no_counted_token_is_refused_by_name(name: str) -> None:
    tokens = tokens_of(0)
    full = collect(chosen(name), tokens)
    empty = FisherStatistics(full.spec, full.input, full.layer, samples=full.samples, tokens=0)
    with pytest.raises(DataError, match=r"'model\.layer': no token"):
        chosen(name).fisher(empty, damping=0.1, damping_kind="relative", fisher_scale="token_mean")


@pytest.mark.parametrize("name", ["identity", "empirical-auto", "frequent-directions", "nystrom", "svd"])
def test_what_has_no_inverse_without_damping_says_so(name: str) -> None:
    with pytest.raises(OptionError, match="damping above 0"):
        fisher_of(chosen(name), tokens_of(0), damping=0.0)


@pytest.mark.parametrize("name", [name for name in CHOICES if chosen(name).needs_output_grads])
def test_an_update_without_gradients_is_refused(name: str) -> None:
    tokens = tokens_of(0)
    accumulator = chosen(name).layer_accumulator(tokens.spec, device=CPU, dtype=torch.float64)
    with pytest.raises(TypeError, match="needs output gradients"):
        accumulator.update(tokens.x, None, tokens.example)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (Diagonal, {"per": "batch"}),
        (Empirical, {"storage": "disk"}),
        (Sketched, {"method": "hash"}),
        (Sketched, {"size": 0}),
        (Sketched, {"seed": -1}),
    ],
)
def test_options_out_of_range(estimator: type[FisherEstimator[Any]], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make(estimator, **options)


def test_each_module_offers_its_estimator() -> None:
    modules = {
        identity: Identity,
        diagonal: Diagonal,
        kfac: Kfac,
        ekfac: Ekfac,
        empirical: Empirical,
        sketched: Sketched,
    }
    for module, estimator in modules.items():
        assert module.lora_da_fisher_estimators() == [estimator]
        assert estimator.api_version == 1
    assert {estimator.name for estimator in modules.values()} == {
        "identity",
        "diagonal",
        "kfac",
        "ekfac",
        "empirical",
        "sketched",
    }


def test_what_the_core_is_told() -> None:
    told = {name: (e.passes, e.needs_output_grads, e.additive) for name, e in ((n, chosen(n)) for n in CHOICES)}
    assert {name for name, (passes, _, _) in told.items() if passes == 2} == {"ekfac"}
    assert {name for name, (_, needs, _) in told.items() if not needs} == {"identity", "kfac-identity"}
    assert {name for name, (_, _, additive) in told.items() if not additive} == {
        "empirical-auto",
        "empirical-rows",
        "empirical-factored",
        "frequent-directions",
        "svd",
    }


def test_a_sketch_of_float32_gradients_keeps_its_bound() -> None:
    spec = tokens_of(0).spec
    accumulator = FrequentDirections(spec, SketchedOptions().size, device=CPU, dtype=torch.float32)
    tokens = tokens_of(0, samples=150)
    accumulator.update(tokens.x, tokens.g, tokens.example)
    found = accumulator.statistics()
    rows, sketch = tokens.gradients().flatten(1), found["rows"].double().flatten(1)
    values = torch.linalg.eigvalsh(rows.T @ rows - sketch.T @ sketch)
    assert float(values.abs().max()) < float(found["shift"]) + 1e-5 * float(found["trace"])


def test_moments_stay_whole_over_reading_merging_and_more_tokens() -> None:
    size, dtype, device = 1100, torch.float32, torch.device("cpu")
    rows = [torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    ours, theirs = (InputSecondMoment(size, device=device, dtype=dtype) for _ in range(2))
    example = torch.zeros(3, dtype=torch.int64)
    ours.update(rows[0], None, example)
    ours.statistics()
    ours.update(rows[1], None, example)
    theirs.update(rows[2], None, example)
    ours.merge(theirs.statistics())
    ours.update(rows[3], None, example)
    everything = torch.cat(rows)
    torch.testing.assert_close(ours.statistics()[SECOND_MOMENT], everything.mT @ everything)
