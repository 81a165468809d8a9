"""The smoothed objective's gradient: exact on quadratics, known for a step function, and a reward that is 0 or 1."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_da_core import OptionError
from lora_da_core.interfaces import LossProbe
from lora_da_core.operators import LinearMap
from lora_da_core.registry import Registry
from lora_da_core.testing import gradient_checks
from lora_da_core.types import LayerSpec
from lora_da_gradients.smoothed import Smoothed

SPEC = LayerSpec("layer", "linear", 4, 3, 2, 1.0)


@pytest.fixture(autouse=True)
def examples_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example imports its task from beside it."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "examples")


class Function(LossProbe):
    """A loss of one layer's change alone, twice for two samples."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def losses(self, changes: Mapping[str, LinearMap]) -> Tensor:
        change = changes["layer"].to_dense() if changes else torch.zeros(3, 4, dtype=torch.float64)
        return torch.stack([self.function(change)] * 2)

    def place(self, layer: str) -> tuple[torch.device, torch.dtype]:
        return torch.device("cpu"), torch.float64


def estimated(function: Any, seed: int = 0, **options: Any) -> tuple[Tensor, dict[str, float]]:
    made = Smoothed(Smoothed.Options(**options))
    found = made.estimate(Function(function), [SPEC], generator=torch.Generator().manual_seed(seed))["layer"]
    return made.gradient(found, SPEC, samples=2).to_dense(), made.diagnostics(found, SPEC, samples=2)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("smoothing", [1e-3, 1.0])
def test_a_quadratic_s_gradient_is_its_own_whatever_the_smoothing(smoothing: float, rank: int | None) -> None:
    draw = torch.Generator().manual_seed(1)
    slope = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    root = torch.randn(12, 12, generator=draw, dtype=torch.float64) / 12

    def quadratic(x: Tensor) -> Tensor:
        return (slope * x).sum() + 0.5 * (root @ x.flatten()).square().sum()

    found, report = estimated(quadratic, probes=6000, smoothing=smoothing, rank=rank)
    error = float((found - slope).norm())
    expected = report["variance"] ** 0.5
    # E of the squared error is the variance; a bias as large as the smoothed curvature would be seen.
    assert error < 2 * expected < 0.3 * float(slope.norm())
    assert report["relative_error"] == pytest.approx(expected / float(found.norm()))


@pytest.mark.parametrize("smoothing", [0.5, 2.0])
def test_a_step_function_s_gradient_is_that_of_its_smoothed_form(smoothing: float) -> None:
    """f(x) = 1[⟨U, x⟩ > c] smoothes to Φ(−c/λ), whose gradient at 0 is φ(c/λ)/λ·U; its own is zero."""
    u = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, c = u / u.norm(), 0.3
    found, report = estimated(lambda x: ((u * x).sum() > c).double(), probes=8000, smoothing=smoothing)
    expected = math.exp(-0.5 * (c / smoothing) ** 2) / math.sqrt(2 * math.pi) / smoothing * u
    assert float((found - expected).norm()) < 2 * report["variance"] ** 0.5
    assert float((found * u).sum()) == pytest.approx(float((expected * u).sum()), rel=0.1)


def test_the_stated_variance_is_the_scatter_over_seeds() -> None:
    runs = [estimated(lambda x: x.sin().sum() + x.square().sum(), seed=s, probes=40, smoothing=0.2) for s in range(150)]
    draws = torch.stack([found for found, _ in runs])
    told = sum(report["variance"] for _, report in runs) / len(runs)
    assert told == pytest.approx(float(draws.var(0).sum()), rel=0.2)


@pytest.mark.parametrize(
    "check", [pytest.param(run, id=name) for name, run in gradient_checks(Smoothed, options={"probes": 64})]
)
def test_contract(check: Any) -> None:
    check()


@pytest.mark.parametrize("options", [{"probes": 1}, {"smoothing": 0.0}, {"rank": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Registry().create("gradient", ("smoothed", options))


@pytest.mark.parametrize("name", ["none", "weights"])
def test_targets_in_the_gradient_s_place_keep_their_contract(name: str) -> None:
    for _, check in gradient_checks(Registry().resolve("gradient", name)):
        check()


def example() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "examples" / "exact_match_reward.py"
    spec = importlib.util.spec_from_file_location("exact_match_reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_starts_from_a_reward_of_0_or_1() -> None:
    """That the mechanism works, not how large the gain is; nothing was selected on seed 10."""
    before, after = example().main(["--seed", "10", "--probes", "1000"])
    assert after > before + 0.02
