"""The conformance kit: small problems for a plugin's classes, and checks of all that the contracts ask of them.

Needs no test runner. Under pytest:

    @pytest.mark.parametrize("check", [pytest.param(run, id=name) for name, run in estimator_checks(MyEstimator)])
    def test_contract(check):
        check()

Each `…_checks` takes a class and its options, and yields (id, check) one by one; a check takes nothing, and raises
AssertionError, or what the class raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.errors import OptionError, PluginError, UnknownNameError
from lora_da_core.interfaces import (
    FisherEstimator,
    GradientEstimator,
    LayerFisher,
    Objective,
    RankAllocator,
    Regularizer,
    Solver,
)
from lora_da_core.operators import Dense, accumulation_dtype
from lora_da_core.registry import Registry
from lora_da_core.testing import allocators, estimators, gradients, objectives, regularizers, solvers
from lora_da_core.testing.data import Check, Tokens, collect, layer
from lora_da_core.types import Batch, DampingKind, EigenResult, FisherScale, LayerSpec

Options = Mapping[str, Any] | None
"""Options of a component by name; None takes the defaults."""


def fisher_from_tensors(
    estimator: str | type[FisherEstimator[Any]],
    inputs: Tensor,
    output_grads: Tensor | None,
    example: Tensor,
    *,
    options: Options = None,
    damping: float = 0.01,
    damping_kind: DampingKind = "relative",
    fisher_scale: FisherScale = "token_mean",
) -> LayerFisher:
    """The Fisher of one layer from its tokens, through all the estimator's passes, without a model.

    Args:
        estimator: A class, or the name of an installed one.
        inputs: x (tokens, in).
        output_grads: g (tokens, out), gradients of per-sample losses; None for an estimator that needs none, whose
            layer then has as many outputs as inputs.
        example: (tokens,), int64, the sample each token belongs to; n is the number of distinct ones.
        options: The estimator's options.
        damping: Damping ≥ 0.
        damping_kind: Relative to the Fisher's mean diagonal, or absolute.
        fisher_scale: Whether K-FAC's Y is the mean over tokens or the sum over a sample's tokens.

    Returns:
        The damped Fisher; sums are kept in the larger of float32 and the inputs' dtype.

    Raises:
        OptionError: An option is unknown, or the tensors do not go together.
    """
    made: FisherEstimator[Any] = _instance("estimator", estimator, options)
    if inputs.ndim != 2 or example.shape != inputs.shape[:1]:
        raise OptionError(
            f"inputs have shape {tuple(inputs.shape)} and example {tuple(example.shape)}; "
            "give (tokens, in) and (tokens,)."
        )
    if output_grads is None:
        if made.needs_output_grads:
            raise OptionError(f"estimator {made.name!r} needs output_grads.")
        output_grads = torch.zeros_like(inputs)
    if output_grads.ndim != 2 or len(output_grads) != len(inputs):
        raise OptionError(f"output_grads have shape {tuple(output_grads.shape)}; give ({len(inputs)}, out).")
    spec = layer(output_grads.shape[1], inputs.shape[1])
    tokens = Tokens(spec, inputs, output_grads, example, len(set(example.tolist())))
    statistics = collect(made, [[tokens]], dtype=accumulation_dtype(inputs.dtype))
    return made.fisher(statistics, damping=damping, damping_kind=damping_kind, fisher_scale=fisher_scale)


def solve_matrix(
    matrix: Tensor, rank: int, solver: str | type[Solver[Any]], *, options: Options = None, seed: int = 0
) -> EigenResult:
    """The `rank` smallest eigenpairs of a stored symmetric matrix.

    Args:
        matrix: (…, size, size), symmetric.
        rank: 1 ≤ rank ≤ size.
        solver: A class, or the name of an installed one.
        options: The solver's options.
        seed: Seed of its random numbers.

    Returns:
        What the solver found.

    Raises:
        OptionError: An option is unknown or out of range, or the matrix is not square.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise OptionError(f"the matrix has shape {tuple(matrix.shape)}; give a square one.")
    made: Solver[Any] = _instance("solver", solver, options)
    return made.smallest(Dense(matrix), rank, generator=torch.Generator(matrix.device).manual_seed(seed))


def estimator_checks(cls: type[FisherEstimator[Any]], *, options: Options = None) -> Iterator[Check]:
    """What a Fisher estimator must fulfil; a sketch must be large enough for the gradients of two samples."""
    return estimators.checks(cls, options or {})


def solver_checks(cls: type[Solver[Any]], *, options: Options = None) -> Iterator[Check]:
    """What a solver must fulfil; a `tolerance` among its options is read as a residual relative to ‖Ω‖."""
    return solvers.checks(cls, options or {})


def gradient_checks(cls: type[GradientEstimator[Any]], *, options: Options = None) -> Iterator[Check]:
    """What a gradient estimator must fulfil; one that approximates says so by `exact`, which is False."""
    return gradients.checks(cls, options or {})


def allocator_checks(cls: type[RankAllocator[Any]], *, options: Options = None) -> Iterator[Check]:
    """What a rank allocator must fulfil."""
    return allocators.checks(cls, options or {})


def regularizer_checks(cls: type[Regularizer[Any]], *, options: Options = None) -> Iterator[Check]:
    """What a regularizer must fulfil."""
    return regularizers.checks(cls, options or {})


def objective_checks(
    cls: type[Objective[Any]],
    *,
    model: nn.Module,
    batch: Batch,
    spec: LayerSpec,
    tokens: int,
    options: Options = None,
) -> Iterator[Check]:
    """What an objective must fulfil; it takes a model and data that suit it, so `check_plugin` knows none of it.

    Args:
        cls: The class.
        model: A small model, in evaluation mode, best in float64.
        batch: At least two samples of different lengths, each with a label.
        spec: A layer of the model.
        tokens: Tokens of each sample that this layer sees.
        options: Its options.
    """
    return objectives.checks(cls, options or {}, model=model, batch=batch, spec=spec, tokens=tokens)


CHECKS_OF_KIND: dict[str, Callable[..., Iterator[Check]]] = {
    "estimator": estimator_checks,
    "gradient": gradient_checks,
    "solver": solver_checks,
    "allocator": allocator_checks,
    "regularizer": regularizer_checks,
}
"""The kinds of component that the kit knows, and their checks."""


@dataclass(frozen=True)
class CheckResult:
    """One check of one component.

    Attributes:
        kind: Kind of component.
        check: The check's name.
        fault: What is wrong; empty where it passed.
    """

    kind: str
    check: str
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.check}: {self.fault or 'ok'}"


def check_plugin(name: str, *, options: Options = None) -> tuple[CheckResult, ...]:
    """Runs all checks on the installed components of a name.

    Args:
        name: A name such as `"kfac"`, or `"distribution:name"`; of every kind that has it.
        options: Options of the component; where several kinds have the name, each takes those it has.

    Returns:
        One result per check, all passed.

    Raises:
        OptionError: No component of that name has an option.
        UnknownNameError: No component of a kind that the kit knows has that name.
        PluginError: Checks failed; the message lists each with its fault.
    """
    registry = Registry()
    found = {kind: cls for kind in CHECKS_OF_KIND if (cls := _resolved(registry, kind, name)) is not None}
    if not found:
        known = {kind: ", ".join(sorted(registry.names(kind))) for kind in CHECKS_OF_KIND}
        listed = "; ".join(f"{kind}: {names or 'none'}" for kind, names in known.items())
        raise UnknownNameError(f"no component to check is called {name!r}. Installed: {listed}. Run 'lora-da plugins'.")
    known_options = {kind: {entry.name for entry in fields(cls.Options)} for kind, cls in found.items()}
    unknown = sorted(set(options or {}).difference(*known_options.values()))
    if unknown:
        raise OptionError(f"{' and '.join(found)} {name!r} has no option {unknown[0]!r}.")
    results = tuple(
        CheckResult(kind, check, fault_of(run))
        for kind, cls in found.items()
        for check, run in CHECKS_OF_KIND[kind](cls, options=_taken(options, known_options[kind]))
    )
    failed = [result for result in results if result.fault]
    if failed:
        origins = " and ".join(f"{kind} {name!r} ({registry.origin(kind, cls)})" for kind, cls in found.items())
        listed = "".join(f"\n- {result}" for result in failed)
        raise PluginError(f"{origins}: {len(failed)} of {len(results)} checks failed.{listed}")
    return results


def fault_of(check: Callable[[], None]) -> str:
    """Runs a check.

    Args:
        check: As the generators yield them.

    Returns:
        What is wrong; empty where it passed.
    """
    try:
        check()
    except AssertionError as error:
        return str(error) or "an assertion failed"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    return ""


def _taken(options: Options, known: set[str]) -> dict[str, Any]:
    return {key: value for key, value in (options or {}).items() if key in known}


def _resolved(registry: Registry, kind: str, name: str) -> Any:
    if name in registry.names(kind) or ":" in name:
        try:
            return registry.resolve(kind, name)
        except UnknownNameError:
            return None
    return None


def _instance(kind: str, component: str | type[Any], options: Options) -> Any:
    if isinstance(component, str):
        return Registry().create(kind, (component, dict(options or {})))
    try:
        return component(component.Options(**(options or {})))
    except (TypeError, ValueError) as error:
        raise OptionError(f"{kind} {component.name!r}: {error}") from error
