"""One layer from its statistics to its subspace: Fisher, step, σ, Ω, eigenpairs, with every plugin's answer checked."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_da_core.blame import blamed
from lora_da_core.config import LoraDAConfig
from lora_da_core.eigen_results import broken_down, fault_of, in_dtype_of, is_broken, member, relative_residual
from lora_da_core.errors import ConvergenceError, OptionError, PluginError
from lora_da_core.interfaces import FisherEstimator, LayerFisher, Solver
from lora_da_core.omega import Omega, Subspace, curvature_of, formed, forms_omega, omega, stored, subspace
from lora_da_core.operators import Dense, LinearMap, NegatedGram, Stacked, SymmetricOperator
from lora_da_core.registry import Registry
from lora_da_core.step_norm import bracket
from lora_da_core.types import Curvature, EigenResult, FisherStatistics, LayerSpec

logger = logging.getLogger(__name__)

NORM_TOLERANCE = 1e-3
"""Relative error that σ² may have where a solver works to a tolerance at all.

σ only scales a layer's solution, and the vector that belongs to it is not used.
"""

WAITING_BYTES = 2**32
"""Bytes of operators of one shape that may wait for a batched solve on an accelerator."""


def batch_size(
    spec: LayerSpec, device: torch.device, waiting: int = WAITING_BYTES, dtype: torch.dtype = torch.float64
) -> int:
    """How many layers like this one are solved together.

    A CPU gains nothing from it; an accelerator is busy with one skinny product for less time than it takes to launch
    the solver's small steps, so those are shared.

    Args:
        spec: A layer.
        device: Where its operators are.
        waiting: Bytes of operators that may wait.
        dtype: Of the operators.

    Returns:
        At least 1.
    """
    if device.type == "cpu":
        return 1
    return int(max(1, waiting // (dtype.itemsize * spec.in_features * (2 * spec.in_features + spec.out_features))))


@dataclass(frozen=True)
class LayerSolution:
    """A layer's subspace and how it was found; eigenvalues and residuals are Ω's own, divided by `divisor`²."""

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
    divisor: float = 1.0
    curvature: Curvature | None = None

    def to(self, device: torch.device) -> LayerSolution:
        """The same solution on another device."""
        space = self.subspace
        moved = replace(space, basis=space.basis.to(device), projected=space.projected.to(device))
        return replace(self, subspace=moved)


@dataclass(frozen=True)
class PreparedLayer:
    """A layer's operators, ready to be solved.

    Attributes:
        spec: The layer.
        fisher: Its Fisher.
        step: Δ_raw, (in, out).
        variance: V, (in, in).
        seconds: What making them took.
        gradient: G, where curvature is asked for.
        stores_omega: Whether its Ω is to be stored.
    """

    spec: LayerSpec
    fisher: LayerFisher
    step: LinearMap
    variance: SymmetricOperator
    seconds: float
    gradient: LinearMap | None = None
    stores_omega: bool = False


class LayerSolver:
    """Solves layers with one estimator, one solver (or the automatic choice) and one configuration.

    Where `curvature` is asked for, every solution says what its directions do to the loss, to second order.
    """

    def __init__(
        self,
        registry: Registry,
        estimator: FisherEstimator[Any],
        solver: Solver[Any] | None,
        config: LoraDAConfig,
        *,
        curvature: bool = False,
    ) -> None:
        self.curvature = curvature
        self.registry = registry
        self.estimator = estimator
        self.solver = solver
        self.config = config

    def prepare(self, statistics: FisherStatistics, gradient: LinearMap) -> PreparedLayer:
        """Makes a layer's Fisher, step and V.

        Args:
            statistics: The layer's Fisher statistics.
            gradient: G, (out, in).

        Returns:
            The layer, ready for `solve`.

        Raises:
            PluginError: The estimator raised or broke its contract.
        """
        start, spec, config = time.perf_counter(), statistics.spec, self.config
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
        self._check_products(step, variance, spec)
        kept = gradient if self.curvature else None
        stores = forms_omega(*step.shape, step.device)
        return PreparedLayer(spec, fisher, step, variance, time.perf_counter() - start, kept, stores)

    def solve(self, layers: Sequence[PreparedLayer], population: int) -> list[LayerSolution]:
        """Solves layers of one input size, rank, dtype and device together.

        Args:
            layers: At least one.
            population: N.

        Returns:
            Their solutions; not converged ones are mended or reported as the configuration says.

        Raises:
            PluginError: A plugin raised or broke its contract.
            ConvergenceError: Not converged, and the configuration asks for an error.
        """
        start, first, config = time.perf_counter(), layers[0], self.config
        size, rank, device = first.spec.in_features, first.spec.rank, first.step.device
        solver = self._solver_for(size, rank, device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{config.seed}:{first.spec.name}".encode()))
        names = ", ".join(layer.spec.name for layer in layers)
        beta_over_n = config.beta / population
        terms = [omega(layer.step, layer.variance, alpha=config.alpha, beta_over_n=beta_over_n) for layer in layers]
        whole, operators = _together(terms, stores=all(layer.stores_omega for layer in layers))
        results = self._smallest(solver, whole, rank, generator, names)
        norms = self._norms(layers, results, solver, beta_over_n, generator)
        each = (time.perf_counter() - start) / len(layers)
        return [
            self._solution(layer, operator, norm, result, solver, generator, each)
            for layer, operator, norm, result in zip(layers, operators, norms, results, strict=True)
        ]

    def _norms(
        self,
        layers: Sequence[PreparedLayer],
        results: Sequence[EigenResult],
        solver: Solver[Any],
        beta_over_n: float,
        generator: torch.Generator,
    ) -> list[float | EigenResult]:
        """σ² of every layer where what was found of Ω tells it well enough, the solver's answer on −ΔΔᵀ elsewhere."""
        known: dict[int, float | EigenResult] = {}
        tolerant = _for_norms(solver)
        if tolerant is not None:
            for index, (layer, result) in enumerate(zip(layers, results, strict=True)):
                if bool(result.converged):
                    variance_norm = beta_over_n * layer.variance.norm_bound()
                    bounds = bracket(layer.step, result, self.config.alpha, variance_norm)
                    if bounds.within(NORM_TOLERANCE):
                        known[index] = bounds.least
        missing = [index for index in range(len(layers)) if index not in known]
        if missing:
            grams = [NegatedGram(layers[index].step) for index in missing]
            names = ", ".join(layers[index].spec.name for index in missing)
            whole = grams[0] if len(grams) == 1 else Stacked(grams)
            known.update(zip(missing, self._smallest(tolerant or solver, whole, 1, generator, names), strict=True))
        return [known[index] for index in range(len(layers))]

    def _solution(
        self,
        layer: PreparedLayer,
        operator: SymmetricOperator,
        norm: float | EigenResult,
        result: EigenResult,
        solver: Solver[Any],
        generator: torch.Generator,
        seconds: float,
    ) -> LayerSolution:
        start, spec, config = time.perf_counter(), layer.spec, self.config
        remedies = [*layer.fisher.remedies, *getattr(norm, "remedies", ()), *result.remedies]
        if isinstance(norm, EigenResult):
            if not bool(norm.converged):
                gram = NegatedGram(layer.step)
                _, norm = self._unconverged(solver, gram, norm, remedies, generator, spec.name, "σ")
            norm = max(0.0, -float(norm.values[0]))
        sigma = norm**0.5
        if sigma == 0.0:
            remedies.append("the gradient is zero: A comes from the variance term alone, B is zero")
        divisor = sigma if config.normalize and sigma > 0 else 1.0
        if not bool(result.converged):
            solver, result = self._unconverged(solver, operator, result, remedies, generator, spec.name)
        solution = subspace(result.vectors, layer.step, divisor, spec.scaling)
        if not bool(solution.projected.isfinite().all()):
            raise PluginError(f"{self._named('estimator', self.estimator)} gave a step with NaN or Inf on {spec.name}")
        values = result.values.double()
        for remedy in remedies:
            logger.info("layer %s: %s", spec.name, remedy)
        curvature = None
        if layer.gradient is not None:
            with self._blamed("estimator", self.estimator, spec.name):
                curvature = curvature_of(layer.fisher, layer.gradient, solution.basis, solution.projected * divisor)
        return LayerSolution(
            subspace=solution,
            values=tuple((values / divisor**2).tolist()),
            gap=float(result.next_value.double() - values[-1]) / divisor**2,
            residual=relative_residual(result),
            converged=bool(result.converged),
            sigma=sigma,
            solver=solver.name,
            applies=result.applies,
            damping=dict(layer.fisher.damping),
            remedies=tuple(remedies),
            seconds=layer.seconds + seconds + time.perf_counter() - start,
            divisor=divisor,
            curvature=curvature,
        )

    def _check_products(self, step: LinearMap, variance: SymmetricOperator, spec: LayerSpec) -> None:
        """One product each, so that a NaN or a wrong shape is the estimator's fault and not the solver's."""
        with self._blamed("estimator", self.estimator, spec.name):
            products = {
                "step": step.matmat(_ones(step, spec.out_features)),
                "V": variance.matmat(_ones(variance, spec.in_features)),
            }
        named = self._named("estimator", self.estimator)
        for label, product in products.items():
            if product.shape != (spec.in_features, 1):
                raise PluginError(
                    f"{named} gave a {label} on {spec.name} whose product with one column has shape "
                    f"{tuple(product.shape)}, not {(spec.in_features, 1)}"
                )
            if not bool(product.isfinite().all()):
                raise PluginError(f"{named} gave a {label} with NaN or Inf on {spec.name}")

    def _solver_for(self, size: int, rank: int, device: torch.device) -> Solver[Any]:
        if self.solver is not None:
            return self.solver
        chosen: Solver[Any] = self.registry.create("solver", self.registry.choose_solver(size, rank, device.type))
        return chosen

    def _smallest(
        self,
        solver: Solver[Any],
        whole: SymmetricOperator,
        rank: int,
        generator: torch.Generator,
        names: str,
    ) -> list[EigenResult]:
        """One result per matrix of an operator with one leading dimension or none; each alone if a batch fails."""
        try:
            with self._blamed("solver", solver, names):
                result = solver.smallest(whole, rank, generator=generator)
        except (ConvergenceError, PluginError) as error:
            reason = error if isinstance(error, ConvergenceError) else error.__cause__
            if not isinstance(reason, (ConvergenceError, torch.linalg.LinAlgError)):  # type: ignore[attr-defined]
                raise
            if not whole.batch_shape:
                return [broken_down(whole, rank, f"{solver.name} broke down: {reason}")]
            return [self._smallest(solver, each, rank, generator, names)[0] for each in _alone(whole)]
        fault = fault_of(result, whole, rank)
        if fault:
            raise PluginError(f"{self._named('solver', solver)} broke its contract on {names}: {fault}")
        return [member(result, index) for index in range(len(result.values))] if whole.batch_shape else [result]

    def _unconverged(
        self,
        solver: Solver[Any],
        operator: SymmetricOperator,
        result: EigenResult,
        remedies: list[str],
        generator: torch.Generator,
        layer: str,
        quantity: str = "",
    ) -> tuple[Solver[Any], EigenResult]:
        """The ladder: other solvers, then the matrix itself in float64 on the CPU."""
        rank = result.values.shape[-1]
        subject = f"{quantity} of {layer}" if quantity else layer
        failure = f"did not converge on {quantity}" if quantity else "did not converge"
        how = f"residual {relative_residual(result):.1e} of ‖Ω‖ after {result.applies} products"
        missed = f"solver {solver.name!r} did not converge on {subject}: {'; '.join(result.remedies) or how}"
        if self.config.unconverged == "error":
            raise ConvergenceError(f"{missed}. Choose another solver, or unconverged='fallback'.")
        logger.warning("%s", missed)
        failed = [solver.name]
        while self.config.unconverged == "fallback" and not bool(result.converged):
            try:
                name = self.registry.choose_solver(operator.size, rank, operator.device.type, failed)
            except OptionError:
                break
            solver = self.registry.create("solver", name)
            result = self._smallest(solver, operator, rank, generator, layer)[0]
            remedies.append(f"{failed[-1]} {failure}; solved with {name}")
            remedies.extend(result.remedies)
            failed.append(name)
        if self.config.unconverged == "fallback" and not bool(result.converged) and _can_widen(operator):
            solver = self.registry.create("solver", self.registry.choose_solver(1, 1, "cpu"))
            wide = Dense(operator.to_dense().to("cpu", torch.float64))
            on_cpu = self._smallest(solver, wide, rank, torch.Generator().manual_seed(self.config.seed), layer)[0]
            result = in_dtype_of(operator, on_cpu)
            remedies.append(f"{failed[-1]} {failure}; solved with {solver.name} in float64 on the CPU")
        if is_broken(result):
            raise ConvergenceError(
                f"no solver found {subject}: {'; '.join((*remedies, *result.remedies))}. Raise the damping, choose "
                "another solver or unconverged='fallback', or leave the layer out with exclude_modules."
            )
        if not bool(result.converged):
            remedies.append(f"{failed[-1]} {failure}")
        return solver, result

    def _named(self, kind: str, component: Any) -> str:
        return f"{kind} {component.name!r} ({self.registry.origin(kind, type(component))})"

    def _blamed(self, kind: str, component: Any, layer: str) -> AbstractContextManager[None]:
        return blamed(self._named(kind, component), f" on layer {layer}")


def _together(terms: Sequence[Omega], *, stores: bool) -> tuple[SymmetricOperator, Sequence[SymmetricOperator]]:
    """What the solver is given, and the operators of the layers."""
    if stores:
        return stored(terms)
    return (terms[0] if len(terms) == 1 else Stacked(terms)), terms


def _for_norms(solver: Solver[Any]) -> Solver[Any] | None:
    """The solver as σ² needs it: asked for `NORM_TOLERANCE` at most; None where its options have no `tolerance`."""
    asked = getattr(solver.options, "tolerance", None)
    if not isinstance(asked, float):
        return None
    if asked >= NORM_TOLERANCE:
        return solver
    return type(solver)(replace(solver.options, tolerance=NORM_TOLERANCE))


def _can_widen(operator: SymmetricOperator) -> bool:
    """Whether float64 on the CPU is anything that was not tried yet."""
    return operator.dtype != torch.float64 or operator.device.type != "cpu"


def _alone(whole: SymmetricOperator) -> Sequence[SymmetricOperator]:
    """The matrices of a batch, each as an operator of its own."""
    return whole.operators if isinstance(whole, Stacked) else [Dense(each) for each in whole.to_dense()]


def _ones(like: LinearMap | SymmetricOperator, rows: int) -> Tensor:
    return torch.ones(rows, 1, dtype=like.dtype, device=like.device)
