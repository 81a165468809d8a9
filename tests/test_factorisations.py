"""Factorisations and solvers that fail, one rung of the ladder after the other, against numpy, scipy and stock runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import ConvergenceError, LoraDAConfig, LoraDAResult, PluginError
from lora_da_core.factorisations import eigh, svd
from lora_da_core.interfaces import Solver
from lora_da_core.operators import NegatedGram
from lora_da_estimators._factors import FactorRequest, damp_dense
from lora_da_solvers.davidson import Davidson
from lora_da_solvers.eigh import Eigh
from lora_da_solvers.lanczos import Lanczos

LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])


def symmetric(size: int = 12, batch: tuple[int, ...] = ()) -> Tensor:
    draw = torch.randn(*batch, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return draw + draw.mT


def failing(error: Exception) -> Callable[..., Any]:
    """Stands in a function's place."""

    def replaced(*args: Any, **settings: Any) -> Any:
        raise error

    return replaced


GAVE_UP = torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_qr_iteration_takes_over_and_is_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, batch: tuple[int, ...]
) -> None:
    matrix = symmetric(batch=batch)
    expected = np.linalg.eigvalsh(matrix.numpy())
    monkeypatch.setattr(torch.linalg, "eigh", failing(GAVE_UP))
    found = eigh(matrix, "Z of layer 'q'")
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(found.vectors * found.values.unsqueeze(-2) @ found.vectors.mT, matrix)
    (remedy,) = found.remedies
    assert remedy.startswith("Z of layer 'q': the eigenvalues could not be found as it is (linalg.eigh: the algorithm")
    assert remedy.endswith("solved by QR iteration") and "by QR iteration" in caplog.text


def test_what_needs_no_ladder_climbs_none() -> None:
    assert eigh(symmetric(), "Z").remedies == ()


def test_singular_values_by_qr_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = symmetric()[:, :5]
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    monkeypatch.setattr(torch.linalg, "svd", failing(GAVE_UP))
    for full in (False, True):
        u, values, vh = svd(matrix, "a step", full_matrices=full)
        assert u.shape == ((12, 12) if full else (12, 5))
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-13)
        torch.testing.assert_close(u[:, :5] * values @ vh, matrix)


def test_nothing_is_made_of_nan_and_nothing_of_what_every_way_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    holed = symmetric()
    holed[3, 4] = torch.nan
    holed[4, 3] = torch.nan
    with pytest.raises(ConvergenceError, match="Z of layer 'q' holds NaN or infinity"):
        eigh(holed, "Z of layer 'q'")
    monkeypatch.setattr(torch.linalg, "eigh", failing(GAVE_UP))
    monkeypatch.setattr("scipy.linalg.eigh", failing(np.linalg.LinAlgError("no luck")))
    with pytest.raises(ConvergenceError, match=r"could not be found as it is .* by QR iteration \(no luck\).*Raise"):
        eigh(symmetric(), "Z of layer 'q'")
    monkeypatch.setattr(torch.linalg, "eigh", failing(MemoryError()))
    with pytest.raises(MemoryError):  # not a matter of numbers: whoever plans memory is told
        eigh(symmetric(), "Z")


# Factors


def request(damping: float = 0.0) -> FactorRequest:
    return FactorRequest("block.q", "input factor Z", "inputs", damping, "absolute")


def spectrum(values: Tensor) -> Tensor:
    basis = torch.linalg.qr(symmetric(len(values))).Q
    return (basis * values) @ basis.mT


@pytest.mark.parametrize(
    ("values", "dtype", "remedy"),
    [
        (torch.tensor([1.0, 0.5, 0, 0, 0, 0]), torch.float32, "not positive definite at damping 0; raised to"),
        (torch.tensor([1.0, 0.5, 0.1, 0, 0, -1e-5]), torch.float32, "not positive definite at damping 0; raised to"),
        (torch.tensor([1.0, 0.5, 0.1, 0, 0, -0.9]), torch.float64, "eigenvalues were clamped to it"),
    ],
    ids=["singular", "indefinite by rounding", "indefinite"],
)
def test_a_singular_factor_climbs_the_ladder(values: Tensor, dtype: torch.dtype, remedy: str) -> None:
    factor = damp_dense(spectrum(values.double()).to(dtype), 1, request())
    assert remedy in factor.remedies[-1] and all(line.startswith("input factor Z: ") for line in factor.remedies)
    assert float(torch.linalg.eigvalsh(factor.matrix).min()) > 0
    torch.testing.assert_close(factor.matrix @ factor.inverse, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)


def test_a_factor_that_is_clamped_by_qr_iteration_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = spectrum(torch.tensor([1.0, 0.5, 0.1, 0, 0, -0.9]).double())
    expected = damp_dense(sums, 1, request())
    monkeypatch.setattr(torch.linalg, "eigh", failing(GAVE_UP))
    found = damp_dense(sums, 1, request())
    assert "solved by QR iteration" in found.remedies[-2] and "clamped" in found.remedies[-1]
    torch.testing.assert_close(found.inverse, expected.inverse)


# Solvers


def solved(solver: str, unconverged: str = "fallback", model: Any = None) -> LoraDAResult:
    config = LoraDAConfig(gamma=64.0, damping=0.01, unconverged=unconverged)  # type: ignore[arg-type]
    pipeline = lora_da_core.build_pipeline(solver=solver, config=config)
    return pipeline.run(make_tiny_llama() if model is None else model, make_batches(make_samples()), LORA)


def breaking(
    monkeypatch: pytest.MonkeyPatch, *solvers: type[Solver[Any]], error: Exception = GAVE_UP
) -> pytest.MonkeyPatch:
    for solver in solvers:
        monkeypatch.setattr(solver, "smallest", failing(error))
    return monkeypatch


def test_a_solver_that_breaks_down_is_replaced_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = solved("eigh")
    breaking(monkeypatch, Lanczos)
    found = solved("lanczos")
    for ours, theirs in zip(found.report.layers, expected.report.layers, strict=True):
        assert ours.solver == "eigh" and ours.converged and ours.digest_A == theirs.digest_A
        assert ours.remedies[:2] == (f"lanczos broke down: {GAVE_UP}",) * 2  # on σ and on Ω
        assert ours.remedies[-1] == "lanczos did not converge; solved with eigh"
        assert f"solver 'lanczos' did not converge on {ours.name}: lanczos broke down" in caplog.text


@pytest.mark.parametrize("choice", ["error", "warn"])
def test_a_broken_solver_without_a_fallback_is_one_error(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    breaking(monkeypatch, Lanczos)
    with pytest.raises(ConvergenceError, match=r"model\.layers\.0\.self_attn\.q_proj.*broke down.*fallback"):
        solved("lanczos", choice)


def test_when_every_solver_breaks_down_the_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, Lanczos, Davidson, Eigh)
    with pytest.raises(ConvergenceError, match=r"no solver found σ of model\.layers\.0.*eigh broke down.*damping"):
        solved("lanczos")


def test_an_error_of_the_solver_s_code_is_no_breakdown(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, Lanczos, error=ValueError("a bug"))
    with pytest.raises(PluginError, match=r"solver 'lanczos' .* raised on layer .*: ValueError: a bug"):
        solved("lanczos")


def test_a_batch_that_breaks_down_is_solved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = solved("lanczos")
    honest = Lanczos.smallest

    def together(self: Any, operator: Any, rank: int, *, generator: torch.Generator) -> Any:
        if operator.batch_shape:
            raise GAVE_UP
        return honest(self, operator, rank, generator=generator)

    monkeypatch.setattr(Lanczos, "smallest", together)
    monkeypatch.setattr("lora_da_core.solve_queue.batch_size", lambda *about_the_layers: 2)
    found = solved("lanczos")
    for ours, theirs in zip(found.report.layers, expected.report.layers, strict=True):
        assert ours.solver == "lanczos" and ours.remedies == ()
        assert ours.ritz_values == pytest.approx(theirs.ritz_values, rel=1e-6)


def test_the_last_rung_is_float64_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator in float32, as accelerators have them, on which no solver reaches its tolerance."""
    from lora_da_estimators import _factors

    expected = solved("eigh")
    monkeypatch.setattr(_factors, "_narrows", lambda device: True)
    monkeypatch.setattr(_factors, "_NARROW_CONDITION", torch.inf)
    honest = Eigh.smallest

    def strict(self: Any, operator: Any, rank: int, *, generator: torch.Generator) -> Any:
        found = honest(self, operator, rank, generator=generator)
        narrow = operator.dtype == torch.float32 and not isinstance(operator, NegatedGram)
        return replace(found, converged=found.converged & (not narrow))

    monkeypatch.setattr(Eigh, "smallest", strict)
    found = solved("eigh")
    for ours, theirs in zip(found.report.layers, expected.report.layers, strict=True):
        assert ours.converged and ours.remedies[-1] == "eigh did not converge; solved with eigh in float64 on the CPU"
        assert ours.ritz_values == pytest.approx(theirs.ritz_values, rel=1e-4)


def test_remedies_are_in_the_log_by_layer(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, Lanczos)
    with caplog.at_level(logging.INFO, "lora_da_core.solving"):
        found = solved("lanczos")
    lines = {record.getMessage() for record in caplog.records}
    for layer in found.report.layers:
        assert {f"layer {layer.name}: {remedy}" for remedy in layer.remedies} <= lines


def test_matrices_of_a_batch_beside_each_other_have_the_bytes_of_one_after_the_other() -> None:
    batch = symmetric(40, (2, 3))
    expected = eigh(batch, "the matrices")
    with ThreadPoolExecutor(3) as workers:
        found = eigh(batch, "the matrices", workers)
        assert torch.equal(eigh(batch[0, 0], "one", workers).values, expected.values[0, 0])
        batch[1, 2, 0, 0] = torch.nan
        with pytest.raises(ConvergenceError, match="the matrices holds NaN"):
            eigh(batch, "the matrices", workers)
    assert torch.equal(found.values, expected.values) and torch.equal(found.vectors, expected.vectors)
