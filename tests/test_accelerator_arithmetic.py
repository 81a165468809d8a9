"""What runs on accelerators alone, run on the CPU: Cholesky QR, products in float32, joined texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, inverses, solve_queue, solving, wide_products
from lora_da_core.batches import padded_together
from lora_da_core.errors import OptionError
from lora_da_core.interfaces import Solver
from lora_da_core.omega import Omega, StoredOmega, formed, forms_omega, forms_step, omega, stored
from lora_da_core.operators import Dense, DenseMap, NegatedGram, Stacked
from lora_da_core.solving import LayerSolution, LayerSolver, PreparedLayer
from lora_da_core.types import FisherStatistics, LayerSpec
from lora_da_core.wide_products import full_float32
from lora_da_estimators import _factors
from lora_da_estimators.kfac import Kfac, KfacOptions
from lora_da_objectives.causal_lm import CausalLM
from lora_da_solvers import _subspace, _tall, lanczos
from lora_da_solvers.davidson import Davidson
from lora_da_solvers.lanczos import Lanczos
from lora_da_solvers.randomized_svd import RandomizedSVD
from spectra import SPECTRA

SOLVERS: tuple[type[Solver[Any]], ...] = (Lanczos, RandomizedSVD, Davidson)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_subspace, "_by_cholesky", lambda device: True)
    monkeypatch.setattr(_tall, "_by_parts", lambda device: True)
    monkeypatch.setattr(_factors, "_narrows", lambda device: True)
    monkeypatch.setattr(inverses, "_by_products", lambda device: True)
    monkeypatch.setattr(lanczos, "_is_patient", lambda device: True)
    monkeypatch.setattr(solving, "forms_omega", lambda rows, columns, device: True)
    monkeypatch.setattr(wide_products, "_splits", _splits)


def _splits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == torch.float32 and left.dim() == right.dim() == 2 and min(*left.shape, right.shape[-1]) > 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sine(ours: Tensor, theirs: Tensor) -> float:
    """Sine of the largest angle between the spans of orthonormal columns."""
    ours, theirs = ours.double(), theirs.double()
    return float(torch.linalg.matrix_norm(ours - theirs @ (theirs.mT @ ours), 2))


@pytest.mark.parametrize(("dtype", "condition"), [(torch.float32, 1e2), (torch.float64, 1e3)], ids=str)
def test_cholesky_qr_spans_the_block_and_twice_is_orthonormal_to_rounding(dtype: torch.dtype, condition: float) -> None:
    left, right = (torch.linalg.qr(torch.randn(3, n, 8, generator=generator(), dtype=torch.float64)).Q for n in (90, 8))
    block = ((left * torch.logspace(0, -torch.log10(torch.tensor(condition)), 8)) @ right.mT).to(dtype)
    first = _subspace.cholesky_qr(block)
    assert first is not None
    basis, pivots = first
    expected = torch.linalg.qr(block.double()).R.diagonal(dim1=-2, dim2=-1).abs()
    torch.testing.assert_close(pivots.double(), expected, rtol=1e-3, atol=0)
    second = _subspace.cholesky_qr(basis)
    assert second is not None
    gram = second[0].mT.double() @ second[0].double()
    assert float((gram - torch.eye(8, dtype=torch.float64)).abs().max()) < 20 * torch.finfo(dtype).eps
    for ours, theirs in zip(second[0], left, strict=True):
        assert sine(ours, theirs) < 10 * condition * torch.finfo(dtype).eps


@pytest.mark.parametrize("spoil", ["repeated", "zero", "nan"])
def test_cholesky_qr_refuses_a_batch_with_a_deficient_block(spoil: str) -> None:
    block = torch.randn(2, 30, 4, generator=generator(), dtype=torch.float64)
    block[1, :, 2] = {"repeated": block[1, :, 0] * (1 + 1e-9), "zero": 0.0, "nan": torch.nan}[spoil]
    assert _subspace.cholesky_qr(block) is None


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(("rows", "parts"), [(4096, 32), (11008, 32), (1040, 16), (520, 8), (504, 1), (4099, 1)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_tall_blocks_are_multiplied_in_parts_of_their_rows(rows: int, parts: int, batch: tuple[int, ...]) -> None:
    """Of a view into a wider basis, as the solvers give it."""
    basis = torch.randn(*batch, rows, 30, generator=generator(), dtype=torch.float64)
    left, right = basis[..., :13], basis[..., 13:21]
    assert _tall._parts(rows) == parts
    torch.testing.assert_close(_tall.tall_product(left, right), left.mT @ right, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inside", [0.0, 1e2, 1e4, 1e12], ids=lambda size: f"inside{size:.0e}")
def test_a_block_is_made_orthonormal_to_the_basis_to_rounding_however_little_it_adds(
    inside: float, dtype: torch.dtype
) -> None:
    """Two rounds where they suffice, the longer way where most of the block lies in the basis already."""
    space = _subspace.Subspace(Dense(torch.eye(400, dtype=dtype).expand(2, 400, 400)), 60, generator())
    for _ in range(6):
        space.append(space.orthonormalise(space.random_block(8)))
    new = space.random_block(8)
    block = new + inside * (space.vectors @ torch.randn(2, 48, 8, dtype=dtype, generator=generator(1)))
    found = space.orthonormalise(block)
    space.append(found)
    gram = space.vectors.mT.double() @ space.vectors.double()
    assert float((gram - torch.eye(56, dtype=torch.float64)).abs().max()) < 40 * torch.finfo(dtype).eps
    if inside <= 1e2:
        for ours, added in zip(space.vectors, new, strict=True):
            assert sine(torch.linalg.qr(added.double()).Q, torch.linalg.qr(ours.double()).Q) < 1e-3


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "spectrum",
    ["power_law", "clustered", "rank_deficient", "batch_of_scales", "zero", "multiple", "hidden_copies", "no_gap"],
)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda cls: cls.name)
def test_solvers_find_the_objective_with_cholesky_qr(
    solver: type[Solver[Any]], spectrum: str, dtype: torch.dtype
) -> None:
    chosen = SPECTRA[spectrum]
    operator = chosen.build(dtype)
    result = solver(solver.Options()).smallest(operator, chosen.rank, generator=generator())
    values = torch.linalg.eigvalsh(operator.to_dense().double())
    norm = values.abs().amax(-1)
    tolerance = max(solver.Options().tolerance, 5e-6 if dtype == torch.float32 else 0.0)
    assert bool(result.converged.all())
    vectors = result.vectors.double()
    projected = (vectors.mT @ operator.to_dense().double() @ vectors).diagonal(dim1=-2, dim2=-1).sum(-1)
    excess = projected - values[..., : chosen.rank].sum(-1)
    assert bool((excess <= 2 * chosen.rank * tolerance * norm).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fewer_looks_at_the_ritz_values_cost_few_products_and_save_small_eigenproblems(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = -((1 + torch.arange(600, dtype=torch.float64)) ** -1.0)
    basis = torch.linalg.qr(torch.randn(600, 600, generator=generator(), dtype=torch.float64)).Q
    operator = Dense(((basis * values) @ basis.mT).to(dtype))
    made: list[int] = []
    pairs = _subspace.RitzPairs

    def counted(values: Tensor, coefficients: Tensor) -> _subspace.RitzPairs:
        made[-1] += 1
        return pairs(values, coefficients)

    monkeypatch.setattr(_subspace, "RitzPairs", counted)
    results = []
    for patient in (False, True):
        monkeypatch.setattr(lanczos, "_is_patient", lambda device, patient=patient: patient)
        made.append(0)
        results.append(Lanczos(Lanczos.Options()).smallest(operator, 8, generator=generator()))
    assert all(bool(result.converged) for result in results)
    assert made[1] < 0.7 * made[0]
    assert results[1].applies <= results[0].applies + 8
    assert sine(results[1].vectors, results[0].vectors) < (2e-3 if dtype == torch.float32 else 1e-5)


def test_an_accelerator_forms_larger_steps_than_a_cpu() -> None:
    wide = (11008, 4096)
    assert forms_step(*wide, torch.device("cuda")) and not forms_step(*wide, torch.device("cpu"))
    assert not forms_step(8192, 28672, torch.device("cuda"))


def test_an_accelerator_stores_omega_where_it_stores_the_step() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert forms_omega(11008, 4096, cuda) and forms_omega(4096, 11008, cuda)
    assert not forms_omega(11008, 4096, cpu) and not forms_omega(64, 64, cpu)
    assert not forms_omega(4096, 128256, cuda) and not forms_omega(16384, 64, cuda)


def kfac_omega(condition: float, output: str = "diagonal", size: int = 400) -> Omega:
    """Ω of a layer whose damped Z has about that condition."""
    source, out = generator(), 300
    inputs = torch.randn(4 * size, size, generator=source) * torch.logspace(0, -0.5 * condition, size)
    grads = torch.randn(4 * size, out, generator=source)
    sums = grads.mT @ grads if output == "full" else grads.square().sum(0)
    layer = {"second_moment" if output == "full" else "squares": sums}
    spec = LayerSpec("layer", "linear", size, out, 8, 1.0)
    statistics = FisherStatistics(spec, {"second_moment": inputs.mT @ inputs}, layer, 64, 4 * size)
    fisher = Kfac(KfacOptions(output=output)).fisher(  # type: ignore[arg-type]
        statistics, damping=1e-12, damping_kind="absolute", fisher_scale="token_mean"
    )
    gradient = DenseMap(grads.mT @ inputs / 64)
    return omega(fisher.step(gradient), fisher.inverse_input_trace(), alpha=1.0, beta_over_n=1e-4)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("output", ["diagonal", "full"])
def test_products_of_well_conditioned_factors_are_float32_and_give_the_float64_subspace(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = kfac_omega(1.0, output)
    assert narrow.dtype == torch.float32 and {term.dtype for term in narrow.terms} == {torch.float32}
    monkeypatch.setattr(_factors, "_narrows", lambda device: False)
    values, vectors = torch.linalg.eigh(kfac_omega(1.0, output).to_dense())
    found = Lanczos(Lanczos.Options()).smallest(narrow, 8, generator=generator())
    gap = float((values[8] - values[7]) / values.abs().max())
    assert bool(found.converged) and gap > 1e-4
    assert sine(found.vectors, vectors[:, :8]) < 2e-5 / gap


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("condition", [1.0, 2.5])
def test_a_step_formed_in_float32_has_the_products_of_the_factors(condition: float) -> None:
    bias, _ = kfac_omega(condition).terms
    assert isinstance(bias, NegatedGram) and bias.dtype == torch.float32
    block = torch.randn(400, 8, generator=generator())
    kept, made = (NegatedGram(step, bias.weight).matmat(block) for step in (bias.linear_map, formed(bias.linear_map)))
    assert isinstance(formed(bias.linear_map), DenseMap)
    torch.testing.assert_close(made, kept, rtol=1e-3, atol=1e-5 * float(kept.abs().max()))


@pytest.mark.usefixtures("accelerator")
def test_products_of_ill_conditioned_factors_stay_in_float64() -> None:
    wide = kfac_omega(6.0)
    assert wide.dtype == torch.float64 and {term.dtype for term in wide.terms} == {torch.float64}


@pytest.mark.usefixtures("accelerator")
def test_a_narrow_input_factor_beside_a_wide_output_factor_is_widened_by_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrowest = _factors.narrowest_dtype
    monkeypatch.setattr(_factors, "narrowest_dtype", lambda m, i: torch.float64 if len(m) == 300 else narrowest(m, i))
    mixed = kfac_omega(1.0, "full")
    assert {term.dtype for term in mixed.terms} == {torch.float64}
    block = torch.randn(400, 3, generator=generator(), dtype=torch.float64)
    dense = mixed.to_dense()
    assert dense.dtype == torch.float64
    torch.testing.assert_close(mixed.matmat(block), dense @ block, rtol=1e-4, atol=1e-6 * float(dense.norm()))


@pytest.mark.usefixtures("accelerator")
def test_an_accelerator_makes_a_factor_again_instead_of_keeping_it() -> None:
    sums = torch.randn(40, 40, generator=generator())
    request = _factors.FactorRequest("layer", "Z", "inputs", 0.5, "relative")
    factor = _factors.damp_dense(sums @ sums.mT, 7, request)
    assert not isinstance(factor._matrix, Tensor)
    expected = (sums @ sums.mT).double() / 7
    expected.diagonal().add_(0.5**0.5 * expected.diagonal().mean())
    torch.testing.assert_close(factor.matrix, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(factor.matrix @ factor.inverse.double(), torch.eye(40).double(), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("accelerator")
def test_a_preconditioner_of_a_narrow_factor_inverts_the_shifted_operator() -> None:
    variance = kfac_omega(1.0).variance
    assert variance is not None
    apply = variance.preconditioner(2.0)
    assert apply is not None
    block = torch.randn(400, 3, generator=generator())
    shifted = variance.to_dense().double() + 2.0 * torch.eye(400, dtype=torch.float64)
    assert apply(block).dtype == torch.float32
    torch.testing.assert_close(apply(block).double(), torch.linalg.solve(shifted, block.double()), rtol=1e-4, atol=1e-6)


def test_a_run_gives_the_same_subspaces_either_way(accelerator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(make_samples(12))
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    pipeline = lora_da_core.build_pipeline(solver="lanczos", config=LoraDAConfig(scale="fixed", damping=1.0))
    narrow = pipeline.run(make_tiny_llama(), batches, lora)
    monkeypatch.setattr(_factors, "_narrows", lambda device: False)
    monkeypatch.setattr(_subspace, "_by_cholesky", lambda device: False)
    wide = pipeline.run(make_tiny_llama(), batches, lora)
    clear = 0
    for report in wide.report.layers:
        scale = max(abs(value) for value in report.ritz_values)
        if report.gap < 1e-2 * scale:
            continue
        clear += 1
        bases = [torch.linalg.qr(run.factors[report.name].A.double().mT).Q for run in (narrow, wide)]
        assert sine(*bases) < 1e-3, report.name
    assert clear >= 4


@pytest.mark.usefixtures("accelerator")
def test_layers_that_narrow_and_layers_that_do_not_are_solved_in_batches_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together: list[list[tuple[str, torch.dtype]]] = []
    solve = LayerSolver.solve

    def watched(self: LayerSolver, layers: Sequence[PreparedLayer], population: int) -> list[LayerSolution]:
        together.append([(layer.spec.name, layer.step.dtype) for layer in layers])
        return solve(self, layers, population)

    made = 0

    def every_other(matrix: Tensor, inverse: Tensor) -> torch.dtype:
        nonlocal made
        made += 1
        return torch.float64 if made % 2 else torch.float32

    batches = make_batches(make_samples(12))
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    pipeline = lora_da_core.build_pipeline(solver="lanczos", config=LoraDAConfig(scale="fixed", damping=1.0))
    apart = pipeline.run(make_tiny_llama(), batches, lora)
    monkeypatch.setattr(LayerSolver, "solve", watched)
    monkeypatch.setattr(_factors, "narrowest_dtype", every_other)
    monkeypatch.setattr(solve_queue, "batch_size", lambda *about_the_layers: 8)
    mixed = pipeline.run(make_tiny_llama(), batches, lora)
    assert all(len({dtype for _, dtype in batch}) == 1 for batch in together)
    assert {dtype for batch in together for _, dtype in batch} == {torch.float32, torch.float64}
    assert max(len(batch) for batch in together) > 1
    assert sorted(name for batch in together for name, _ in batch) == sorted(mixed.factors)
    for ours, theirs in zip(mixed.report.layers, apart.report.layers, strict=True):
        assert ours.converged
        scale = max(abs(value) for value in theirs.ritz_values)
        assert ours.ritz_values == pytest.approx(theirs.ritz_values, rel=1e-4, abs=1e-5 * scale)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (torch.eye(5), "torch.float32 on cpu, order 5 in torch.float64 on cpu"),
        (torch.eye(5, dtype=torch.float64, device="meta"), "on cpu, order 5 in torch.float64 on meta"),
        (torch.eye(6, dtype=torch.float64), "order 5 in torch.float64 on cpu, order 6"),
    ],
    ids=["dtype", "device", "order"],
)
def test_operators_that_differ_are_not_stacked(other: Tensor, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Stacked([Dense(torch.eye(5, dtype=torch.float64)), Dense(other)])


def test_joined_texts_have_the_losses_they_had_apart() -> None:
    model, objective = make_tiny_llama(torch.float64), CausalLM(CausalLM.Options())
    samples = make_samples(12)
    apart = make_batches(samples, 1)
    together = padded_together(apart, tokens=40)
    assert 1 < len(together) < len(apart)
    assert max(batch["labels"].numel() for batch in together) <= 40
    with torch.no_grad():
        expected, found = (torch.cat([objective.losses(model, batch) for batch in b]) for b in (apart, together))
    torch.testing.assert_close(found, expected)


def test_batches_that_are_more_than_texts_are_not_joined() -> None:
    text = make_batches(make_samples(1), 1)[0]
    images = {"pixel_values": torch.zeros(1, 3, 8, 8), "labels": torch.zeros(1, dtype=torch.int64)}
    pooled = {**text, "labels": torch.zeros(1, dtype=torch.int64)}
    positioned = {**text, "position_ids": text["input_ids"]}
    for other in (images, pooled, positioned):
        assert [list(batch) for batch in padded_together([text, other, other, text], tokens=10**6)] == [
            list(text),
            list(other),
            list(other),
            list(text),
        ]


def test_tf32_is_off_for_solves_and_on_again_after_a_failure() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_products_in_parts_are_as_exact_as_float32(spread: float) -> None:
    left = torch.randn(90, 300, generator=generator()) * torch.logspace(0, -spread, 300)
    right = torch.randn(300, 70, generator=generator(1)) * torch.logspace(0, -spread, 70)
    exact, size = left.double() @ right.double(), left.abs().double() @ right.abs().double()
    errors = [
        float(((found - exact).abs() / size).max()) for found in (wide_products.product(left, right), left @ right)
    ]
    assert errors[0] < max(2 * errors[1], 5e-7)
    assert torch.equal(sum(part.float() for part in wide_products.parts(left)), left)
    gram = wide_products.gram(left)
    assert torch.equal(gram, gram.mT)
    scale = left.norm(dim=1).outer(left.norm(dim=1)).double()
    assert float(((gram - left.double() @ left.double().mT).abs() / scale).max()) < 2**-16


def test_three_parts_of_bfloat16_lose_nothing_and_two_do() -> None:
    matrix = torch.randn(40, 40, generator=generator())
    first, second, third = (part.float() for part in wide_products.parts(matrix))
    assert torch.equal(first + second + third, matrix)
    assert float(third.abs().max()) > 0


@pytest.mark.parametrize("size", [40, 512, 700, 1301])
def test_an_inverse_by_large_products_is_the_inverse(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randn(2 * size, size, generator=generator(), dtype=torch.float64)
    matrix = tokens.mT @ (tokens * torch.logspace(0, -4, 2 * size, dtype=torch.float64).unsqueeze(1))
    expected = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    monkeypatch.setattr(inverses, "_by_products", lambda device: True)
    monkeypatch.setattr(inverses, "_LEAF", 64)
    found = inverses.inverse_from_cholesky(torch.linalg.cholesky(matrix))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert found.shape == (size, size) and found.is_contiguous()


@pytest.mark.usefixtures("accelerator")
def test_a_stored_omega_has_the_products_the_preconditioner_and_the_answer_of_its_terms() -> None:
    terms = [kfac_omega(1.0), kfac_omega(1.0, "full")]
    whole, members = stored(terms)
    block = torch.randn(2, 400, 8, generator=generator())
    expected = Stacked(terms).matmat(block)
    torch.testing.assert_close(whole.matmat(block), expected, rtol=0, atol=2e-6 * float(expected.abs().max()) * 20)
    for index, (member, each) in enumerate(zip(members, terms, strict=True)):
        assert isinstance(member, StoredOmega) and member.matrix.data_ptr() == whole.matrix[index].data_ptr()
        ours, theirs = member.preconditioner(2.0), each.preconditioner(2.0)
        assert ours is not None and theirs is not None
        assert torch.equal(ours(block[0]), theirs(block[0]))
    result = Lanczos(Lanczos.Options()).smallest(whole, 8, generator=generator())
    values, vectors = torch.linalg.eigh(terms[0].to_dense().double())
    gap = float((values[8] - values[7]) / values.abs().max())
    assert bool(result.converged.all()) and sine(result.vectors[0], vectors[:, :8]) < 2e-5 / gap
