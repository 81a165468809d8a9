"""An adapter's figures against numpy and scipy; at conditions that float64 cannot hold, against arithmetic that can."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import DataError, LoraDAConfig, LoraFactors, OptionError
from lora_da_core.cli import app
from lora_da_core.interfaces import Solver
from lora_da_core.numerics import LIMIT, layer_numerics, recomputed
from lora_da_core.omega import omega
from lora_da_core.operators import DenseMap
from lora_da_core.types import FisherStatistics, LayerSpec
from lora_da_estimators.kfac import Kfac, KfacOptions
from lora_da_solvers.davidson import Davidson
from lora_da_solvers.eigh import Eigh
from lora_da_solvers.lanczos import Lanczos

CONFIG = LoraDAConfig(gamma=64.0, damping=0.01, damping_kind="absolute", beta=0.5)
LORA = LoraConfig(r=3, target_modules=["q_proj", "down_proj"])


def estimated(config: LoraDAConfig = CONFIG, **components: Any) -> tuple[Any, Any, Any]:
    pipeline = lora_da_core.build_pipeline(config=config, **components)
    estimates = pipeline.estimate(make_tiny_llama(), make_batches(make_samples()), LORA)
    return pipeline, estimates, pipeline.solve(estimates)


@pytest.mark.parametrize(
    ("config", "components"),
    [
        (CONFIG, {"solver": "lanczos"}),
        (CONFIG, {"estimator": "ekfac"}),
        (CONFIG, {"estimator": "empirical"}),
        (LoraDAConfig(), {"allocator": "greedy"}),
        (LoraDAConfig(balance="even"), {"gradient": "sketched"}),
    ],
    ids=str,
)
def test_what_a_run_gives_passes(config: LoraDAConfig, components: dict[str, Any]) -> None:
    pipeline, estimates, result = estimated(config, **components)
    found = recomputed(pipeline, estimates, result.factors, result.report)
    assert [layer.name for layer in found] == [layer.name for layer in result.report.layers]
    for layer, reported in zip(found, result.report.layers, strict=True):
        assert layer.orthogonality <= LIMIT and layer.residual < 1e-6
        assert abs(layer.excess) < 1e-9 and layer.inversion < 1e-9
        assert layer.remedies == reported.remedies


def test_figures_are_those_of_the_dense_formulas() -> None:
    pipeline, estimates, result = estimated()
    for layer in recomputed(pipeline, estimates, result.factors, result.report):
        sums = estimates.statistics.of_layer(layer.name)
        (z,), (y,) = (list(part.values()) for part in (sums.input, sums.layer))
        z_inverse = scipy.linalg.inv(z.double().numpy() / sums.tokens + 0.01 * np.eye(len(z)))
        y_inverse = 1 / (y.double().numpy() / sums.tokens + 0.01)
        gradient = estimates.gradient(sums.spec).to_dense().double().numpy()
        step = -z_inverse @ gradient.T * y_inverse
        matrix = 0.5 / 12 * y_inverse.sum() * z_inverse - step @ step.T
        basis = scipy.linalg.orth(result.factors[layer.name].A.double().numpy().T)
        assert layer.least == pytest.approx(scipy.linalg.eigvalsh(matrix)[:3].sum(), rel=1e-9)
        assert layer.objective == pytest.approx(np.trace(basis.T @ matrix @ basis), rel=1e-9)
        assert layer.condition == pytest.approx(np.linalg.cond(z_inverse), rel=1e-6)


def test_what_is_wrong_fails() -> None:
    pipeline, estimates, result = estimated()
    name = next(iter(result.factors))
    good = result.factors[name].A

    def figures(a: Tensor) -> Any:
        changed = {**result.factors, name: LoraFactors(a, result.factors[name].B)}
        return next(each for each in recomputed(pipeline, estimates, changed, result.report) if each.name == name)

    for scaled in (good, 7.0 * good):
        exact = figures(scaled)
        assert max(exact.orthogonality, exact.residual, abs(exact.excess), exact.inversion) <= LIMIT
    turned = good.clone()
    turned[0] += 0.05 * torch.randn(good[0].shape, generator=torch.Generator().manual_seed(0)) * good[0].abs().max()
    assert figures(turned).residual > LIMIT
    skewed = torch.stack([good[0], good[1], good[2] + 0.1 * good[1]])
    assert figures(skewed).orthogonality > LIMIT
    random = torch.randn(good.shape, generator=torch.Generator().manual_seed(1))
    assert figures(random).excess > 0.1


def test_what_cannot_be_judged_is_refused() -> None:
    pipeline, estimates, result = estimated()
    other = dataclasses.replace(result.report, loss=1.01 * result.report.loss)
    with pytest.raises(DataError, match="not the statistics of the run: 12 samples"):
        recomputed(pipeline, estimates, result.factors, other)
    twice = dataclasses.replace(LoraDAConfig(), rounds=2)
    with pytest.raises(OptionError, match="with rounds=2 the rows of A are not"):
        recomputed(lora_da_core.build_pipeline(config=twice), estimates, result.factors, result.report)


# Conditions up to 1e14

SIZE, OUT, RANK, BETA_OVER_N = 14, 9, 3, 1e-3


def synthetic(condition: float) -> tuple[FisherStatistics, Tensor]:
    """Sums with a Z of that condition in float64, a well-conditioned Y, and a gradient."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=draw)).Q
    z = (basis * torch.logspace(0, -float(np.log10(condition)), SIZE, dtype=torch.float64)) @ basis.mT
    y = torch.rand(OUT, dtype=torch.float64, generator=draw) + 0.5
    # What a gradient of data with these inputs looks like: small where the inputs are.
    gradient = torch.randn(OUT, SIZE, dtype=torch.float64, generator=draw) @ z
    spec = LayerSpec("block", "linear", SIZE, OUT, RANK, 1.0)
    made = Kfac(KfacOptions())
    keys = [
        next(iter(accumulator(spec, device=torch.device("cpu"), dtype=torch.float64).statistics()))
        for accumulator in (made.input_accumulator, made.layer_accumulator)
    ]
    return FisherStatistics(spec, {keys[0]: 0.5 * (z + z.mT)}, {keys[1]: y}, samples=1, tokens=1), gradient


def least_exactly(statistics: FisherStatistics, gradient: Tensor) -> float:
    """The sum of the smallest eigenvalues of Ω in arithmetic of 60 digits."""
    (z,), (y,) = (list(part.values()) for part in (statistics.input, statistics.layer))
    with mpmath.workdps(60):
        z_inverse = mpmath.matrix(z.tolist()) ** -1
        y_inverse = mpmath.diag([1 / mpmath.mpf(each) for each in y.tolist()])
        step = z_inverse * mpmath.matrix(gradient.tolist()).T * y_inverse
        trace = mpmath.fsum(y_inverse[i, i] for i in range(OUT))
        values = mpmath.eigsy(BETA_OVER_N * trace * z_inverse - step * step.T, eigvals_only=True)
        return float(mpmath.fsum(sorted(values)[:RANK]))


@pytest.mark.parametrize("condition", [1e2, 1e6, 4e9, 1e12, 1e14])
@pytest.mark.parametrize("solver", [Eigh, Lanczos, Davidson])
def test_figures_stay_honest_at_any_condition(condition: float, solver: type[Solver[Any]]) -> None:
    statistics, gradient = synthetic(condition)
    made = Kfac(KfacOptions())
    fisher = made.fisher(statistics, damping=0.0, damping_kind="absolute", fisher_scale="token_mean")
    matrix = omega(fisher.step(DenseMap(gradient)), fisher.inverse_input_trace(), alpha=1.0, beta_over_n=BETA_OVER_N)
    found = solver(solver.Options()).smallest(matrix, RANK, generator=torch.Generator().manual_seed(0))
    figures = layer_numerics("block", fisher, gradient, found.vectors.mT, alpha=1.0, beta_over_n=BETA_OVER_N)
    rounding = 1e2 * torch.finfo(torch.float64).eps * condition
    assert fisher.damping["Z"] == 0.0 or any("raised to" in remedy for remedy in figures.remedies)
    assert figures.orthogonality < 1e-10 and figures.residual < 1e-6
    # The condition is known only as well as the weakest eigenvalue is.
    assert figures.condition == pytest.approx(condition, rel=max(1e-6, rounding))
    assert figures.inversion < rounding
    if fisher.damping["Z"] == 0.0 and rounding < 1:
        exact = least_exactly(statistics, gradient)
        assert figures.least == pytest.approx(exact, rel=rounding)
        assert abs(figures.excess) < 1e-6


# The command


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("numerics")
    arguments = ["init", "--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--samples", "12"]
    more = ["--rank", "2", "--device", "cpu", "--damping", "1e-12", "--output", str(root / "run")]
    outcome = CliRunner().invoke(app, [*arguments, *more, "--cache-dir", str(root / "cache")])
    assert outcome.exit_code == 0, outcome.output
    return root / "run"


def verify(directory: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["verify", str(directory), "--numerics", "--device", "cpu", *more])


def test_the_command_recomputes_from_the_cache_or_from_the_data(finished: Path, world: Path) -> None:
    cached = verify(finished)
    assert cached.exit_code == 0, cached.output
    assert "✓ no others have a better objective (at worst" in cached.output
    assert "remedies in 7 of 7 layers:" in cached.output
    assert "  model.layers.0.self_attn.q_proj: input factor Z: damping" in cached.output
    fresh = verify(finished, "--cache-dir", str(finished.with_name("other")))
    assert fresh.exit_code == 2 and "does not exist; give where it is by --cache-dir" in fresh.output
    (finished.with_name("empty")).mkdir()
    computed = verify(finished, "--cache-dir", str(finished.with_name("empty")))
    assert computed.exit_code == 0, computed.output


def test_the_command_fails_on_an_a_that_was_turned(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    tensors = load_file(copy / "adapter_model.safetensors")
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    tensors[key] = tensors[key].flip(1)
    save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    outcome = verify(copy)
    assert outcome.exit_code == 1
    assert "✗ they are eigenvectors of Ω" in outcome.output and "✗ every A and B equals" in outcome.output
