"""Every estimator against numbers from dense formulas on two toy layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_da_core.interfaces import FisherEstimator
from lora_da_core.operators import DenseMap
from lora_da_estimators.diagonal import Diagonal
from lora_da_estimators.ekfac import Ekfac
from lora_da_estimators.empirical import Empirical
from lora_da_estimators.identity import Identity
from lora_da_estimators.kfac import Kfac
from lora_da_estimators.sketched import Sketched
from toy_oracle import CASES, PARAMETER_SETS, Case, Tokens, fisher_of, load, make


@dataclass(frozen=True)
class Variant:
    """How to get one column of the oracle."""

    key: str
    estimator: type[FisherEstimator[Any]]
    options: dict[str, Any]
    damping: float = 0.01
    damping_kind: str = "relative"
    fisher_scale: str = "token_mean"
    tokens: Callable[[Case], Tokens] = lambda case: case.tokens

    def __str__(self) -> str:
        return "-".join([self.key, *(str(value) for value in self.options.values())])


VARIANTS = (
    Variant("identity", Identity, {}, damping=0.5),
    Variant("diagonal_sample", Diagonal, {"per": "sample"}),
    Variant("diagonal_token", Diagonal, {"per": "token"}),
    Variant("empirical", Empirical, {"storage": "auto"}),
    Variant("empirical", Empirical, {"storage": "rows"}),
    Variant("empirical", Empirical, {"storage": "factored"}),
    Variant("kfac_diagY_authors_abs1e-6", Kfac, {"output": "diagonal"}, damping=1e-6, damping_kind="absolute"),
    Variant("kfac_diagY", Kfac, {"output": "diagonal"}),
    Variant("kfac_fullY", Kfac, {"output": "full"}),
    Variant("kfac_fullY_samplescale", Kfac, {"output": "full"}, fisher_scale="sample"),
    Variant(
        "kfac_fullY_true", Kfac, {"output": "full", "labels": "exact"}, tokens=lambda case: case.expected_label_tokens
    ),
    Variant("ekfac", Ekfac, {}),
    Variant("lowrank_svd4", Sketched, {"method": "svd", "size": 4}),
    Variant("lowrank_svd12", Sketched, {"method": "svd", "size": 12}),
    Variant("frequent_directions5", Sketched, {"method": "frequent_directions", "size": 5, "compensate": False}),
)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_every_column_of_the_oracle_has_a_variant(oracle: Path) -> None:
    assert set(load(oracle, "a").meta["estimators"]) == {variant.key for variant in VARIANTS}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_step_and_variance(oracle: Path, name: str, variant: Variant) -> None:
    case = load(oracle, name)
    fisher = fisher_of(
        make(variant.estimator, **variant.options),
        variant.tokens(case),
        damping=variant.damping,
        damping_kind=variant.damping_kind,
        fisher_scale=variant.fisher_scale,
    )
    step = fisher.step(DenseMap(case["G"]))
    variance = fisher.inverse_input_trace()
    expected_step, expected_variance = case[f"{variant.key}/Delta_raw"], case[f"{variant.key}/V"]
    assert step.dtype == variance.dtype == torch.float64
    close(step.to_dense(), expected_step)
    close(step.matmat(torch.eye(case.meta["out"], dtype=torch.float64)), expected_step)
    close(step.rmatmat(torch.eye(case.meta["inn"], dtype=torch.float64)), expected_step.T)
    close(-fisher.solve(case["G"]).T, expected_step)
    close(variance.to_dense(), expected_variance)
    close(variance.matmat(torch.eye(case.meta["inn"], dtype=torch.float64)), expected_variance)
    close(variance.diagonal(), expected_variance.diagonal())
    meta = case.meta["estimators"][variant.key]
    expected_damping = {"lambda": meta["lam"]} if "lam" in meta else {"Z": meta["damping_Z"], "Y": meta["damping_Y"]}
    assert dict(fisher.damping) == pytest.approx(expected_damping, rel=1e-10)
    assert fisher.remedies == ()
    for parameters in PARAMETER_SETS:
        check_update(case, f"{variant.key}/{parameters}", case.params[parameters], step.to_dense(), variance.to_dense())


def check_update(case: Case, key: str, params: dict[str, Any], step: Tensor, variance: Tensor) -> None:
    """Ω, its eigenvalues, the projector and the product of the factors, all from the estimator's two results."""
    sigma = torch.linalg.matrix_norm(step, 2) if params["normalize"] else torch.tensor(1.0, dtype=torch.float64)
    delta = step / sigma
    omega = -params["alpha"] * delta @ delta.T + params["beta"] / (params["N"] * sigma**2) * variance
    values, vectors = torch.linalg.eigh(omega)
    projector = vectors[:, : case.meta["r"]] @ vectors[:, : case.meta["r"]].T
    close(omega, case[f"{key}/Omega"])
    close(values, case[f"{key}/eig"])
    close(projector, case[f"{key}/proj"], 1e-7)
    close((projector @ delta).T / params["gamma"], case[f"{key}/update"], 1e-7)
