"""One layer from its statistics to its subspace: Fisher, step, σ, Ω, eigenpairs, with every plugin's answer checked."""

from __future__ import annotations

import contextlib
import logging
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_core.config import LoraDAConfig
from lora_da_core.errors import ConvergenceError, LoraDAError, PluginError
from lora_da_core.interfaces import FisherEstimator, LayerFisher, Solver
from lora_da_core.omega import Subspace, formed, omega, subspace
from lora_da_core.operators import LinearMap, NegatedGram, SymmetricOperator
from lora_da_core.registry import Registry
from lora_da_core.types import EigenResult, FisherStatistics

logger = logging.getLogger(__name__)

ORTHONORMAL = 1e-3
"""Largest |UᵀU − I| that counts as orthonormal; solvers in float32 stay far below."""


@dataclass(frozen=True)
class LayerSolution:
    """A layer's subspace and how it was found; the eigenvalues and residuals are Ω's own, divided by σ²."""

    subspace: Subspace
    values: tuple[float, ...]
    gap: float
    residual: float
    converged: bool
    sigma: float
    solver: str
    applies: int
    damping: dict[str, float]
    remedies: tuple[str, ...]
    seconds: float


class LayerSolver:
    """Solves layers with one estimator, one solver (or the automatic choice) and one configuration."""

    def __init__(
        self, registry: Registry, estimator: FisherEstimator[Any], solver: Solver[Any] | None, config: LoraDAConfig
    ) -> None:
        self.registry = registry
        self.estimator = estimator
        self.solver = solver
        self.config = config

    def solve(self, statistics: FisherStatistics, gradient: LinearMap, population: int) -> LayerSolution:
        """Solves one layer.

        Args:
            statistics: The layer's Fisher statistics.
            gradient: G, (out, in).
            population: N.

        Returns:
            The solution; not converged ones are mended or reported as the configuration says.

        Raises:
            PluginError: A plugin raised or broke its contract.
            ConvergenceError: Not converged, and the configuration asks for an error.
        """
        start, spec, config = time.perf_counter(), statistics.spec, self.config
        fisher, step, variance = self._operators(statistics, gradient)
        generator = torch.Generator(step.device).manual_seed(zlib.crc32(f"{config.seed}:{spec.name}".encode()))
        solver = self._solver_for(spec.in_features, spec.rank, step.device)
        squared_norm = max(0.0, -float(self._smallest(solver, NegatedGram(step), 1, generator, spec.name).values[0]))
        sigma = squared_norm**0.5
        remedies = list(fisher.remedies)
        if sigma == 0.0:
            remedies.append("the gradient is zero: A comes from the variance term alone, B is zero")
        divisor = sigma if config.normalize and sigma > 0 else 1.0
        operator = omega(step, variance, alpha=config.alpha, beta_over_n=config.beta / population)
        result = self._smallest(solver, operator, spec.rank, generator, spec.name)
        if not bool(result.converged):
            solver, result = self._unconverged(solver, operator, result, remedies, generator, spec)
        solution = subspace(result.vectors, step, divisor, spec.scaling)
        if not bool(solution.projected.isfinite().all()):
            raise PluginError(f"{self._named('estimator', self.estimator)} gave a step with NaN or Inf on {spec.name}")
        values = result.values.double()
        return LayerSolution(
            subspace=solution,
            values=tuple((values / divisor**2).tolist()),
            gap=float(result.next_value.double() - values[-1]) / divisor**2,
            residual=_relative_residual(result),
            converged=bool(result.converged),
            sigma=sigma,
            solver=solver.name,
            applies=result.applies,
            damping=dict(fisher.damping),
            remedies=tuple(remedies),
            seconds=time.perf_counter() - start,
        )

    def _operators(
        self, statistics: FisherStatistics, gradient: LinearMap
    ) -> tuple[LayerFisher, LinearMap, SymmetricOperator]:
        spec, config = statistics.spec, self.config
        with self._blamed("estimator", self.estimator, spec.name):
            fisher = self.estimator.fisher(
                statistics,
                damping=config.damping,
                damping_kind=config.damping_kind,
                fisher_scale=config.fisher_scale,
            )
            step, variance = formed(fisher.step(gradient)), fisher.inverse_input_trace()
        named = self._named("estimator", self.estimator)
        if step.shape != (spec.in_features, spec.out_features):
            expected = (spec.in_features, spec.out_features)
            raise PluginError(f"{named} gave a step of shape {step.shape} on {spec.name}, not {expected}")
        if variance.size != spec.in_features:
            raise PluginError(f"{named} gave a V of order {variance.size} on {spec.name}, not {spec.in_features}")
        if (step.dtype, step.device) != (variance.dtype, variance.device):
            raise PluginError(
                f"{named} gave a step in {step.dtype} on {step.device} and a V in {variance.dtype} on "
                f"{variance.device} on {spec.name}; they must agree"
            )
        return fisher, step, variance

    def _solver_for(self, size: int, rank: int, device: torch.device) -> Solver[Any]:
        if self.solver is not None:
            return self.solver
        chosen: Solver[Any] = self.registry.create("solver", self.registry.choose_solver(size, rank, device.type))
        return chosen

    def _smallest(
        self, solver: Solver[Any], operator: SymmetricOperator, rank: int, generator: torch.Generator, layer: str
    ) -> EigenResult:
        with self._blamed("solver", solver, layer):
            result = solver.smallest(operator, rank, generator=generator)
        fault = _fault(result, operator, rank)
        if fault:
            raise PluginError(f"{self._named('solver', solver)} broke its contract on {layer}: {fault}")
        return result

    def _unconverged(
        self,
        solver: Solver[Any],
        operator: SymmetricOperator,
        result: EigenResult,
        remedies: list[str],
        generator: torch.Generator,
        spec: Any,
    ) -> tuple[Solver[Any], EigenResult]:
        missed = (
            f"solver {solver.name!r} did not converge on {spec.name}: residual "
            f"{_relative_residual(result):.1e} of ‖Ω‖ after {result.applies} products"
        )
        if self.config.unconverged == "error":
            raise ConvergenceError(f"{missed}. Choose another solver, or unconverged='fallback'.")
        if self.config.unconverged == "fallback" and solver.name != "eigh":
            logger.warning("%s; solving it with eigh instead", missed)
            remedies.append(f"{solver.name} did not converge; solved with eigh")
            dense: Solver[Any] = self.registry.create("solver", "eigh")
            return dense, self._smallest(dense, operator, spec.rank, generator, spec.name)
        logger.warning("%s", missed)
        remedies.append(f"{solver.name} did not converge")
        return solver, result

    def _named(self, kind: str, component: Any) -> str:
        return f"{kind} {component.name!r} ({self.registry.origin(kind, type(component))})"

    @contextlib.contextmanager
    def _blamed(self, kind: str, component: Any, layer: str) -> Iterator[None]:
        try:
            yield
        except LoraDAError:
            raise
        except Exception as error:
            raise PluginError(
                f"{self._named(kind, component)} raised on layer {layer}: {type(error).__name__}: {error}"
            ) from error


def _relative_residual(result: EigenResult) -> float:
    norm = float(result.values.abs().max())
    return float(result.residuals.max()) / norm if norm > 0 else float(result.residuals.max())


def _fault(result: EigenResult, operator: SymmetricOperator, rank: int) -> str:
    """What is wrong with a solver's answer; empty where nothing is."""
    if result.values.shape != (rank,) or result.vectors.shape != (operator.size, rank):
        return f"values {tuple(result.values.shape)} and vectors {tuple(result.vectors.shape)} for rank {rank}"
    if result.vectors.dtype != operator.dtype or result.vectors.device != operator.device:
        return f"vectors in {result.vectors.dtype} on {result.vectors.device}, the operator in {operator.dtype}"
    tensors: tuple[Tensor, ...] = (result.values, result.vectors, result.residuals)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        return "NaN or Inf in values, vectors or residuals"
    gram = result.vectors.mT @ result.vectors
    if float((gram - torch.eye(rank, dtype=gram.dtype, device=gram.device)).abs().max()) > ORTHONORMAL:
        return "vectors are not orthonormal"
    return ""
