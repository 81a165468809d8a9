"""The conformance kit: everything installed passes it, and each kind of broken plugin fails where it should."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_da_core.errors import OptionError, PluginError, UnknownNameError
from lora_da_core.interfaces import (
    Accumulator,
    FisherEstimator,
    GradientEstimator,
    LayerFisher,
    LossProbe,
    NoOptions,
)
from lora_da_core.operators import DenseMap, LinearMap, LowRankMap, Scaled, SymmetricOperator
from lora_da_core.registry import Registry
from lora_da_core.testing import (
    CHECKS_OF_KIND,
    check_plugin,
    estimator_checks,
    fault_of,
    fisher_from_tensors,
    gradient_checks,
    solve_matrix,
    solver_checks,
)
from lora_da_core.types import EigenResult, FisherStatistics, LayerSpec
from lora_da_estimators.diagonal import Diagonal, DiagonalFisher
from lora_da_estimators.kfac import Kfac, KfacFisher
from lora_da_estimators.sketched import FrequentDirections, Sketched
from lora_da_gradients.full import Full
from lora_da_solvers.eigh import Eigh

OPTION_SETS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("estimator", "diagonal"): [{"per": "sample"}, {"per": "token"}],
    ("estimator", "empirical"): [{"storage": "auto"}, {"storage": "rows"}, {"storage": "factored"}],
    ("estimator", "kfac"): [{"output": "diagonal"}, {"output": "full"}, {"output": "identity"}, {"labels": "sampled"}],
    ("estimator", "sketched"): [
        {"size": 3},
        {"size": 32, "compensate": False},
        {"method": "nystrom", "size": 4},
        {"method": "svd", "size": 3},
    ],
    ("gradient", "sketched"): [{}, {"size": 2}, {"size": 1}],
    ("gradient", "zeroth_order"): [{"steps": 4}, {"steps": 4, "difference": "forward", "rank": None}],
    ("solver", "lanczos"): [{}, {"tolerance": 1e-5}],
}
"""Options to try; components that are not named here are tried with their defaults."""

Checks = Iterable[tuple[str, Callable[[], None]]]


def installed() -> list[Any]:
    cases = []
    registry = Registry()
    for kind, checks in CHECKS_OF_KIND.items():
        for name, cls in registry.names(kind).items():
            for options in OPTION_SETS.get((kind, name), [{}]):
                label = "-".join([kind, name, *map(str, options.values())])
                cases += [pytest.param(run, id=f"{label}-{check}") for check, run in checks(cls, options=options)]
    return cases


@pytest.mark.parametrize("check", installed())
def test_everything_installed_fulfils_its_contract(check: Callable[[], None]) -> None:
    check()


def failures(checks: Checks) -> dict[str, str]:
    return {name: fault for name, run in checks if (fault := fault_of(run))}


# Mutants: each is a working component with one mistake.


class Mapped(LayerFisher):
    """Another Fisher with some answers replaced."""

    def __init__(self, inner: LayerFisher) -> None:
        self.inner = inner

    def solve(self, gradient: Tensor) -> Tensor:
        return self.inner.solve(gradient)

    def apply(self, weights: Tensor) -> Tensor:
        return self.inner.apply(weights)

    def inverse_input_trace(self) -> SymmetricOperator:
        return self.inner.inverse_input_trace()


class FullKfac(FisherEstimator[NoOptions]):
    """K-FAC with a full Y, whose answers a mutant may replace."""

    name = "mutant"
    api_version = 1
    wrapper: Callable[[LayerFisher], LayerFisher] = staticmethod(lambda fisher: fisher)

    def __init__(self, options: NoOptions) -> None:
        super().__init__(options)
        self.kfac = Kfac(Kfac.Options(output="full"))

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return self.kfac.input_accumulator(spec, device=device, dtype=dtype)

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return self.kfac.layer_accumulator(spec, device=device, dtype=dtype)

    def fisher(self, statistics: FisherStatistics, **settings: Any) -> LayerFisher:
        return type(self).wrapper(self.kfac.fisher(statistics, **settings))

    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        return self.kfac.statistics_bytes(spec, samples=samples, tokens=tokens, itemsize=itemsize)


class TransposedSolve(Mapped):
    """The two factors are applied without their transpose: J⁻¹ of a matrix that is not symmetric."""

    def solve(self, gradient: Tensor) -> Tensor:
        solved = self.inner.solve(gradient)
        return solved.flatten().view(solved.shape[1], solved.shape[0]).mT.contiguous()


class NegativeSolve(Mapped):
    """−J⁻¹ where J⁻¹ is asked for."""

    def solve(self, gradient: Tensor) -> Tensor:
        return -self.inner.solve(gradient)


class NotPartialTrace(Mapped):
    """A quarter of V."""

    def inverse_input_trace(self) -> SymmetricOperator:
        return Scaled(self.inner.inverse_input_trace(), 0.25)


class OnlyDiagonalOfVariance(Mapped):
    """V without its off-diagonal."""

    def inverse_input_trace(self) -> SymmetricOperator:
        from lora_da_core.operators import Diagonal as DiagonalOperator

        return DiagonalOperator(self.inner.inverse_input_trace().diagonal())


class WrongStep(Mapped):
    """The gradient's sign is kept."""

    def step(self, gradient: LinearMap) -> LinearMap:
        return DenseMap(self.inner.solve(gradient.to_dense()).mT)


class WrongRmatmat(Mapped):
    """A low-rank step whose transposed product forgets the sign."""

    def step(self, gradient: LinearMap) -> LinearMap:
        dense = self.inner.step(gradient).to_dense()
        outer, values, inner = torch.linalg.svd(dense, full_matrices=False)

        class Step(LowRankMap):
            def rmatmat(self, block: Tensor) -> Tensor:
                return -super().rmatmat(block)

        return Step(outer * values, inner.mT)


class SinglePrecision(Mapped):
    """Results in float32, whatever comes in."""

    def solve(self, gradient: Tensor) -> Tensor:
        return self.inner.solve(gradient).float()


def wrapped(wrapper: Callable[[LayerFisher], LayerFisher]) -> type[FisherEstimator[Any]]:
    return type("Wrapped", (FullKfac,), {"wrapper": staticmethod(wrapper), "__doc__": "A mutant."})


@pytest.mark.parametrize(
    ("mutation", "check", "message"),
    [
        (TransposedSolve, "solve_is_the_inverse_of_apply", "not G"),
        (NegativeSolve, "fisher_is_symmetric_positive_definite", "not positive definite"),
        (NotPartialTrace, "variance_is_the_partial_trace", "V"),
        (OnlyDiagonalOfVariance, "variance_is_the_partial_trace", "V"),
        (WrongStep, "step_is_the_solved_gradient", "the step"),
        (WrongRmatmat, "step_is_the_solved_gradient", "rmatmat"),
        (SinglePrecision, "statistics_are_finite_and_keep_the_dtype", "float32"),
    ],
)
def test_a_fisher_with_a_wrong_answer_fails(
    mutation: Callable[[LayerFisher], LayerFisher], check: str, message: str
) -> None:
    assert message in failures(estimator_checks(wrapped(mutation)))[check]


def test_the_mutants_would_pass_without_their_mutation() -> None:
    assert failures(estimator_checks(wrapped(lambda fisher: fisher))) == {}


class WrongCounts(FullKfac):
    """Z divided by samples where it runs over tokens."""

    def fisher(self, statistics: FisherStatistics, **settings: Any) -> LayerFisher:
        factor = statistics.tokens / statistics.samples
        scaled = {key: value * factor for key, value in statistics.input.items()}
        return self.kfac.fisher(replace(statistics, input=scaled, shared={}), **settings)


class PerToken(Diagonal):
    """The diagonal per sample, divided by the number of tokens."""

    def fisher(self, statistics: FisherStatistics, **settings: Any) -> DiagonalFisher:
        return super().fisher(replace(statistics, samples=statistics.tokens), **settings)


class Undivided(FullKfac):
    """Sums that are never divided."""

    def fisher(self, statistics: FisherStatistics, **settings: Any) -> LayerFisher:
        return self.kfac.fisher(replace(statistics, samples=1, tokens=1, shared={}), **settings)


class CachesTooMuch(FullKfac):
    """What is shared between layers names no damping."""

    def fisher(self, statistics: FisherStatistics, **settings: Any) -> LayerFisher:
        if "fisher" not in statistics.shared:
            statistics.shared["fisher"] = self.kfac.fisher(statistics, **settings)
        cached: LayerFisher = statistics.shared["fisher"]
        return cached


class WritesToStatistics(FullKfac):
    """Damps the sums themselves."""

    def fisher(self, statistics: FisherStatistics, **settings: Any) -> LayerFisher:
        for value in statistics.input.values():
            value.diagonal().add_(0.1)
        return self.kfac.fisher(statistics, **settings)


class SmallPlan(FullKfac):
    """Plans for half of what it takes."""

    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        return super().statistics_bytes(spec, samples=samples, tokens=tokens, itemsize=itemsize // 2)


class KeepsAnInstanceState(FullKfac):
    """Counts samples in the estimator itself, so that stored statistics do not suffice."""

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        self.seen = 1.0
        return super().layer_accumulator(spec, device=device, dtype=dtype)

    def fisher(self, statistics: FisherStatistics, **settings: Any) -> LayerFisher:
        scaled = {key: value * self.seen for key, value in statistics.layer.items()}
        return self.kfac.fisher(replace(statistics, layer=scaled), **settings)


class GlobalNumbers(FullKfac):
    """Draws from the global generator."""

    def fisher(self, statistics: FisherStatistics, **settings: Any) -> LayerFisher:
        torch.randn(1)
        return self.kfac.fisher(statistics, **settings)


class Accumulating(FullKfac):
    """K-FAC whose input side is another accumulator."""

    side: type[Accumulator]

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return self.side(spec.in_features, device=device, dtype=dtype)  # type: ignore[call-arg]


def accumulating(side: type[Accumulator], **attributes: Any) -> type[FisherEstimator[Any]]:
    return type(side.__name__, (Accumulating,), {"side": side, "__doc__": "A mutant.", **attributes})


class Moment(Accumulator):
    """Σ x xᵀ."""

    def __init__(self, size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.total = torch.zeros(size, size, device=device, dtype=dtype)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        block = inputs.to(self.total)
        self.total += block.mT @ block

    def statistics(self) -> dict[str, Tensor]:
        return {"second_moment": self.total}


class AveragingMerge(Moment):
    def merge(self, other: Mapping[str, Tensor]) -> None:
        self.total = 0.5 * (self.total + other["second_moment"])


class ForgettingMerge(Moment):
    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Only the first shard counts."""


class HalfSums(Moment):
    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        self.total += (inputs.mT @ inputs).to(self.total)


class WritesToInputs(Moment):
    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        inputs.mul_(1.0 + 1e-12)
        super().update(inputs, output_grads, example)


class KeepsTheInputs(Moment):
    kept: Tensor | None = None

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        self.kept = inputs if self.kept is None else torch.cat([self.kept, inputs])

    def statistics(self) -> dict[str, Tensor]:
        return {"second_moment": self.total if self.kept is None else (self.kept.mT @ self.kept).to(self.total)}


class NoEmptyBatches(Moment):
    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        assert inputs.abs().max() > 0
        super().update(inputs, output_grads, example)


class OrderMatters(Moment):
    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        weights = torch.linspace(0.5, 1.5, len(inputs), dtype=inputs.dtype).unsqueeze(1)
        super().update(inputs * weights, output_grads, example)


class LastBatchOnly(Moment):
    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        self.total.zero_()
        super().update(inputs, output_grads, example)


class NeedsGradientsOfInputs(Moment):
    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        assert output_grads is not None
        super().update(inputs, output_grads, example)


class AveragingDirections(FrequentDirections):
    def merge(self, other: Mapping[str, Tensor]) -> None:
        super().merge({**other, "rows": other["rows"] * 0})


class AveragingSketch(Sketched):
    """A sketch that keeps its own shard's rows only."""

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return AveragingDirections(spec, self.options.size, device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("mutant", "check", "message"),
    [
        (WrongCounts, "sums_are_divided_by_the_right_count", "times larger"),
        (PerToken, "sums_are_divided_by_the_right_count", "times larger"),
        (Undivided, "data_read_twice_change_nothing", "read twice"),
        (CachesTooMuch, "shared_scratch_names_what_it_depends_on", "with a used `shared`"),
        (WritesToStatistics, "fisher_leaves_the_statistics_alone", "input statistics after fisher()"),
        (SmallPlan, "planned_bytes_cover_the_statistics", "the plan says"),
        (KeepsAnInstanceState, "statistics_suffice", "AttributeError"),
        (GlobalNumbers, "global_state_is_left_alone", "global generator"),
        (accumulating(AveragingMerge), "shards_merge_to_the_whole", "merged"),
        (accumulating(AveragingMerge, additive=False), "shards_merge_to_the_whole", "merged"),
        (accumulating(ForgettingMerge), "shards_merge_to_the_whole", "merged"),
        (accumulating(HalfSums), "float32_and_bfloat16_inputs_are_summed_in_the_asked_dtype", "bfloat16"),
        (accumulating(WritesToInputs), "inputs_are_not_modified", "wrote to a tensor"),
        (accumulating(KeepsTheInputs), "later_changes_of_the_inputs_do_not_matter", "reused its buffers"),
        (accumulating(NoEmptyBatches), "empty_batches_are_accepted", "raised"),
        (accumulating(OrderMatters), "token_order_does_not_matter", "shuffled"),
        (accumulating(LastBatchOnly), "batches_do_not_matter", "three batches"),
        (accumulating(NeedsGradientsOfInputs), "solve_is_the_inverse_of_apply", "None"),
        (AveragingSketch, "shards_merge_to_the_whole", "merged"),
    ],
)
def test_an_estimator_with_wrong_sums_fails(mutant: type[FisherEstimator[Any]], check: str, message: str) -> None:
    assert message in failures(estimator_checks(mutant))[check]


class CountsOnce(Kfac):
    """Every place of one-hot inputs is taken as seen once, however often it was."""

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        taken = super().input_accumulator(spec, device=device, dtype=dtype)
        if spec.one_hot:
            taken.update = lambda inputs, *rest: taken.total.index_fill_(0, inputs, 1.0)  # type: ignore[attr-defined, method-assign]
        return taken


class ClaimsPlaces(FullKfac):
    """Says that it takes places, and treats them as rows."""

    takes_one_hot = True

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return self.kfac.input_accumulator(replace(spec, one_hot=False), device=device, dtype=dtype)


@pytest.mark.parametrize(("mutant", "message"), [(CountsOnce, "apply of places"), (ClaimsPlaces, "Error")])
def test_an_estimator_that_mistakes_places_fails(mutant: type[FisherEstimator[Any]], message: str) -> None:
    found = failures(estimator_checks(mutant))
    assert set(found) == {"fisher_takes_places"} and message in found["fisher_takes_places"]


class UnstableOptions(FullKfac):
    """Options that change when they are stored."""

    @dataclass(frozen=True)
    class Options:
        """A set does not survive JSON as one."""

        names: tuple[str, ...] = ("a",)


class Undocumented(FullKfac):
    pass


Undocumented.__doc__ = None


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (UnstableOptions, "do not survive JSON"),
        (Undocumented, "no docstring"),
        (type("Future", (FullKfac,), {"api_version": 2, "__doc__": "x"}), "api_version is 2"),
        (type("Colon", (FullKfac,), {"name": "a:b", "__doc__": "x"}), "name is 'a:b'"),
    ],
)
def test_a_class_that_misdeclares_itself_fails(mutant: type[FisherEstimator[Any]], message: str) -> None:
    assert message in failures(estimator_checks(mutant))["declares_itself"]


# Solvers.


class MutantSolver(Eigh):
    """Changes eigh's answer."""

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        return self.change(super().smallest(operator, rank, generator=generator), operator)

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        raise NotImplementedError


class LiesAboutResiduals(MutantSolver):
    """Tilted vectors, residuals said to be zero."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        tilt = 1e-3 * torch.linspace(-1, 1, operator.size).to(result.vectors).unsqueeze(-1)
        vectors = torch.linalg.qr(result.vectors + tilt).Q
        vectors = vectors * vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
        return replace(result, vectors=vectors, residuals=torch.zeros_like(result.residuals))


class ChangesGlobalState(MutantSolver):
    """Starts from global random numbers."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        random.random()
        return result


class SeedsTheWorld(MutantSolver):
    """Seeds the global generator."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        torch.manual_seed(0)
        return result


class Negated(SymmetricOperator):
    def __init__(self, inner: SymmetricOperator) -> None:
        self.inner = inner

    size = property(lambda self: self.inner.size)  # type: ignore[assignment]
    dtype = property(lambda self: self.inner.dtype)  # type: ignore[assignment]
    device = property(lambda self: self.inner.device)  # type: ignore[assignment]
    batch_shape = property(lambda self: self.inner.batch_shape)  # type: ignore[assignment]

    def matmat(self, block: Tensor) -> Tensor:
        return -self.inner.matmat(block)


class Largest(Eigh):
    """The largest eigenpairs, in ascending order."""

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        found = super().smallest(Negated(operator), rank, generator=generator)
        return replace(
            found,
            values=-found.values.flip(-1),
            vectors=found.vectors.flip(-1),
            residuals=found.residuals.flip(-1),
            next_value=torch.full_like(found.next_value, torch.nan),
        )


class NotOrthonormal(MutantSolver):
    """Vectors of length two."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        return replace(result, vectors=2 * result.vectors, residuals=2 * result.residuals)


class Descending(MutantSolver):
    """Largest first."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        return replace(result, values=result.values.flip(-1), vectors=result.vectors.flip(-1))


class WrongSigns(MutantSolver):
    """Signs as they come."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        return replace(result, vectors=-result.vectors)


class WrongNext(MutantSolver):
    """The last value again, said to be a bound of the next."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        return replace(result, next_value=result.values[..., -1])


class NeverConverges(MutantSolver):
    """Never sure."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        return replace(result, converged=torch.zeros_like(result.converged))


class DoublePrecisionOnly(MutantSolver):
    """Float64, whatever comes in."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        return replace(result, vectors=result.vectors.double())


class Unseeded(MutantSolver):
    """A generator of its own, seeded by chance."""

    def change(self, result: EigenResult, operator: SymmetricOperator) -> EigenResult:
        generator = torch.Generator()
        generator.seed()
        noise = torch.rand(result.values.shape, generator=generator, dtype=torch.float64).to(result.values)
        return replace(result, residuals=result.residuals + 1e-14 * noise)


class SkipsOne(Eigh):
    """Misses the smallest eigenvalue, as a residual-stopped iteration may."""

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        if rank == operator.size:
            return super().smallest(operator, rank, generator=generator)
        found = super().smallest(operator, rank + 1, generator=generator)
        return replace(
            found, values=found.values[..., 1:], vectors=found.vectors[..., 1:], residuals=found.residuals[..., 1:]
        )


class NeedsTheMatrix(Eigh):
    """Knows no operator but a stored matrix."""

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        assert operator.matrix is not None  # type: ignore[attr-defined]
        return super().smallest(operator, rank, generator=generator)


class KeepsTheOperator(Eigh):
    """Keeps what belongs to a call on itself."""

    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        self.operator = operator
        operator.matmat(torch.ones(*operator.batch_shape, operator.size, 1, dtype=operator.dtype))
        return super().smallest(self.operator, rank, generator=generator)


@pytest.mark.parametrize(
    ("mutant", "check", "message"),
    [
        (LiesAboutResiduals, "solves_separated_in_float64", "residuals are not true"),
        (ChangesGlobalState, "global_state_is_left_alone", "`random` changed"),
        (SeedsTheWorld, "global_state_is_left_alone", "torch's global generator changed"),
        (Largest, "solves_separated_in_float64", "not the least"),
        (NotOrthonormal, "solves_separated_in_float32", "not orthonormal"),
        (Descending, "solves_evenly_spread_in_float64", "do not ascend"),
        (WrongSigns, "solves_identity_in_float64", "signs are not canonical"),
        (WrongNext, "solves_separated_in_float64", "no upper bound"),
        (NeverConverges, "solves_separated_in_float64", "did not converge"),
        (DoublePrecisionOnly, "solves_separated_in_float32", "vectors is in torch.float64"),
        (Unseeded, "same_seed_gives_same_bytes", "residuals differ"),
        (SkipsOne, "solves_separated_in_float64", "not the least"),
        (NeedsTheMatrix, "solves_separated_in_float64", "AttributeError"),
        (KeepsTheOperator, "a_solver_serves_two_threads", "another thread"),
    ],
)
def test_a_solver_with_a_mistake_fails(mutant: type[Eigh], check: str, message: str) -> None:
    found = failures(solver_checks(mutant))
    assert message in found[check]


# Gradients.


class SumGradient(Full):
    """Σ g xᵀ, never divided."""

    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        return super().gradient(statistics, spec, samples=1)


class TransposedGradient(Full):
    """(in, out) where (out, in) is asked for."""

    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        return DenseMap(super().gradient(statistics, spec, samples=samples).to_dense().mT)


class PlansNothing(Full):
    """Says that it needs no memory."""

    def statistics_bytes(self, spec: LayerSpec, *, itemsize: int) -> int:
        return 0


class GuessesHalf(Full):
    """Half of G, declared as an approximation."""

    exact = False

    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        return super().gradient(statistics, spec, samples=2 * samples)


class OverwritesPlaces(Full):
    """Of a place that is seen twice only the last gradient stays."""

    def accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        taken = super().accumulator(spec, device=device, dtype=dtype)
        if spec.one_hot:
            taken.update = lambda inputs, grads, _: taken.total.index_copy_(1, inputs, grads.mT)  # type: ignore[attr-defined, method-assign, union-attr]
        return taken


@pytest.mark.parametrize(
    ("mutant", "check", "message"),
    [
        (OverwritesPlaces, "gradient_takes_places", "G of places"),
        (SumGradient, "gradient_is_the_mean_over_samples", "G is not (1/n)"),
        (TransposedGradient, "gradient_is_the_mean_over_samples", "the shape is (5, 4), not (4, 5)"),
        (PlansNothing, "statistics_are_finite_and_keep_the_dtype", "the plan says 0"),
        (GuessesHalf, "rank_one_gradients_are_exact", "G of a single token"),
    ],
)
def test_a_gradient_with_a_mistake_fails(mutant: type[Full], check: str, message: str) -> None:
    assert message in failures(gradient_checks(mutant))[check]


class RandomDirections(GradientEstimator[NoOptions]):
    """Central differences along Gaussian directions, one layer at a time."""

    name = "random_directions"
    api_version = 1
    factor = 1.0

    @property
    def forward_only(self) -> bool:
        return True

    def accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        raise TypeError("takes no tokens")

    def estimate(
        self, probe: LossProbe, specs: Sequence[LayerSpec], *, generator: torch.Generator
    ) -> dict[str, dict[str, Tensor]]:
        found = {}
        for spec in specs:
            shape, (device, dtype) = (spec.out_features, spec.in_features), probe.place(spec.name)
            direction = self.direction(shape, generator).to(device, dtype)
            ends = [probe.losses({spec.name: DenseMap(sign * 1e-4 * direction)}).sum() for sign in (1, -1)]
            found[spec.name] = {"gradient": self.factor * (ends[0] - ends[1]) / 2e-4 * direction}
        return found

    def direction(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        return DenseMap(statistics["gradient"] / samples)

    def statistics_bytes(self, spec: LayerSpec, *, itemsize: int) -> int:
        return spec.out_features * spec.in_features * itemsize


class Ascends(RandomDirections):
    """The sign is wrong."""

    factor = -1.0


class TwiceTooLarge(RandomDirections):
    """A factor of two is lost."""

    factor = 2.0


class GlobalDirections(RandomDirections):
    """Directions from the global generator."""

    def direction(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)


def test_a_forward_only_gradient_passes() -> None:
    assert failures(gradient_checks(RandomDirections)) == {}


@pytest.mark.parametrize(
    ("mutant", "check", "message"),
    [
        (Ascends, "forward_gradient_is_right_on_average", "is off by"),
        (TwiceTooLarge, "forward_gradient_is_right_on_average", "times the gradient"),
        (GlobalDirections, "forward_estimates_depend_on_the_generator_alone", "differs"),
    ],
)
def test_a_forward_only_gradient_with_a_mistake_fails(mutant: type[RandomDirections], check: str, message: str) -> None:
    with torch.random.fork_rng(devices=[]):
        assert message in failures(gradient_checks(mutant))[check]


# The helpers.


def tokens(count: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(count, 3, generator=generator, dtype=torch.float64), torch.arange(count) // 3


def test_fisher_from_tensors_is_the_definition() -> None:
    inputs, grads, example = tokens()
    fisher = fisher_from_tensors("diagonal", inputs, grads, example, damping=0.5, damping_kind="absolute")
    gradients = torch.stack([grads[example == n].T @ inputs[example == n] for n in range(3)])
    expected = gradients.square().mean(0) + 0.5
    assert torch.allclose(fisher.apply(torch.ones(3, 5, dtype=torch.float64)), expected, rtol=1e-12)
    assert torch.allclose(fisher.inverse_input_trace().diagonal(), expected.reciprocal().sum(0), rtol=1e-12)


@pytest.mark.parametrize("estimator", ["ekfac", "sketched", Kfac, Diagonal])
def test_fisher_from_tensors_takes_names_and_classes(estimator: Any) -> None:
    fisher = fisher_from_tensors(estimator, *tokens())
    gradient = torch.ones(3, 5, dtype=torch.float64)
    assert torch.allclose(fisher.apply(fisher.solve(gradient)), gradient, rtol=1e-8)


def test_fisher_from_tensors_without_output_gradients() -> None:
    inputs, _, example = tokens()
    assert fisher_from_tensors("kfac", inputs, None, example, options={"output": "identity"}).solve(
        torch.ones(5, 5)
    ).shape == (5, 5)
    with pytest.raises(OptionError, match="estimator 'kfac' needs output_grads"):
        fisher_from_tensors("kfac", inputs, None, example)


def test_wrong_use_of_the_helpers() -> None:
    inputs, grads, example = tokens()
    with pytest.raises(OptionError, match=r"inputs have shape \(9, 5\) and example \(8,\)"):
        fisher_from_tensors("kfac", inputs, grads, example[1:])
    with pytest.raises(OptionError, match=r"output_grads have shape \(8, 3\); give \(9, out\)"):
        fisher_from_tensors("kfac", inputs, grads[1:], example)
    with pytest.raises(OptionError, match=r"has no option 'ouput'\. Did you mean 'output'"):
        fisher_from_tensors("kfac", inputs, grads, example, options={"ouput": "full"})
    with pytest.raises(OptionError, match="output is 'half'"):
        fisher_from_tensors(Kfac, inputs, grads, example, options={"output": "half"})
    with pytest.raises(OptionError, match=r"the matrix has shape \(3, 4\)"):
        solve_matrix(torch.zeros(3, 4), 1, "eigh")


@pytest.mark.parametrize("solver", ["eigh", "lanczos", Eigh])
def test_solve_matrix(solver: Any) -> None:
    result = solve_matrix(torch.diag(torch.tensor([3.0, -1.0, 2.0, -4.0], dtype=torch.float64)), 2, solver)
    assert result.values.tolist() == pytest.approx([-4, -1], abs=1e-8)


def test_check_plugin_reports_what_it_ran() -> None:
    results = check_plugin("eigh")
    assert {result.kind for result in results} == {"solver"}
    assert len(results) == len(list(solver_checks(Eigh)))
    assert str(results[0]) == "solver declares_itself: ok"
    assert check_plugin("lora-da-core:eigh") == results


def test_check_plugin_gives_each_kind_its_own_options() -> None:
    results = check_plugin("sketched", options={"size": 3, "compensate": False})
    assert "estimator" in {result.kind for result in results}
    with pytest.raises(OptionError, match=r"estimator.* 'sketched' has no option 'sise'"):
        check_plugin("sketched", options={"sise": 3})


def test_check_plugin_of_an_unknown_name() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no component to check is called 'kfak'\. Installed: estimator: .*kfac"
    ):
        check_plugin("kfak")


def test_check_plugin_lists_every_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kfac, "inverse_input_trace", None, raising=False)
    monkeypatch.setattr(KfacFisher, "solve", NegativeSolve.solve, raising=True)
    monkeypatch.setattr(KfacFisher, "inner", property(lambda self: DiagonalFisher), raising=False)
    with pytest.raises(PluginError, match=r"estimator 'kfac' \(lora-da-core .*\): \d+ of 24 checks failed") as caught:
        check_plugin("kfac")
    assert "\n- estimator solve_is_the_inverse_of_apply: raised" in str(caught.value)


def test_the_kit_needs_no_test_runner() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from lora_da_core.testing import check_plugin\n"
        "assert len(check_plugin('identity')) > 20"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
