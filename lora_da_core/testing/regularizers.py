"""What every regularizer must fulfil, as checks on two small layers with Fishers that are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_da_core.interfaces import LayerFisher, Regularizer
from lora_da_core.operators import Dense, SymmetricOperator
from lora_da_core.testing.data import Check, Subject, bitwise, checks_of, declares_itself, require, undisturbed
from lora_da_core.types import LoraFactors

SIZES = {"one": (5, 4), "two": (3, 6)}
"""(out, in) by layer."""
RANK = 2


class KnownFisher(LayerFisher):
    """J = Y ⊗ Z of random positive definite factors."""

    def __init__(self, out_features: int, in_features: int, generator: torch.Generator) -> None:
        self.y: Tensor = _positive(out_features, generator)
        self.z: Tensor = _positive(in_features, generator)

    def apply(self, weights: Tensor) -> Tensor:
        product: Tensor = self.y @ weights.double() @ self.z
        return product

    def solve(self, gradient: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(self.y, gradient.double()) @ torch.linalg.inv(self.z)
        return solved

    def inverse_input_trace(self) -> SymmetricOperator:
        return Dense(torch.linalg.inv(self.y).trace() * torch.linalg.inv(self.z))


def _positive(size: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    positive: Tensor = root @ root.mT / size + 0.1 * torch.eye(size, dtype=torch.float64)
    return positive


def checks(cls: type[Regularizer[Any]], options: Mapping[str, Any]) -> Iterator[Check]:
    """All checks of a regularizer, as (name, callable).

    Args:
        cls: The regularizer.
        options: Its options.

    Returns:
        (name, callable) one by one.
    """
    return checks_of(Subject(cls, options), _CHECKS)


Problem = tuple[dict[str, LoraFactors], dict[str, LoraFactors], dict[str, float], dict[str, LayerFisher]]


def _problem(distance: float = 1.0) -> Problem:
    """Factors as they are and as they were, scalings and Fishers."""
    draw = torch.Generator().manual_seed(5)
    start, now, fishers = {}, {}, {}
    for name, (out_features, in_features) in SIZES.items():
        shapes = ((RANK, in_features), (out_features, RANK))
        a, b, da, db = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in (*shapes, *shapes))
        start[name], now[name] = LoraFactors(a, b), LoraFactors(a + distance * da, b + distance * db)
        fishers[name] = KnownFisher(out_features, in_features, draw)
    return now, start, {"one": 1.0, "two": 2.0}, {**fishers}


def _penalty(subject: Subject, problem: Problem) -> Tensor:
    found = subject.make().penalty(*problem)
    require(isinstance(found, Tensor) and found.ndim == 0, "penalty() must return a tensor with one number")
    result: Tensor = found
    return result


def nothing_is_asked_at_the_start(subject: Subject) -> None:
    """The penalty is 0 and flat where nothing has changed, and not negative elsewhere."""
    require(float(_penalty(subject, _problem(0.0))) == 0.0, "the penalty of no change is not 0")
    for distance in (0.1, 1.0, 10.0):
        found = float(_penalty(subject, _problem(distance)))
        require(found >= 0.0, f"the penalty of a change is {found}")


def gradients_are_those_of_the_penalty(subject: Subject) -> None:
    """Automatic differentiation against finite differences, for every factor."""
    now, start, scaling, fishers = _problem()
    leaves = {name: LoraFactors(p.A.clone().requires_grad_(), p.B.clone().requires_grad_()) for name, p in now.items()}
    parts = [part for pair in leaves.values() for part in (pair.A, pair.B)]
    gradients = torch.autograd.grad(_penalty(subject, (leaves, start, scaling, fishers)), parts)
    draw, width = torch.Generator().manual_seed(6), 1e-5
    for part, gradient in zip(parts, gradients, strict=True):
        way = torch.randn(part.shape, generator=draw, dtype=torch.float64)
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                part += sign * width * way
                values.append(float(_penalty(subject, (leaves, start, scaling, fishers))))
                part -= sign * width * way
        slope, expected = (values[0] - values[1]) / (2 * width), float((gradient * way).sum())
        close = abs(slope - expected) <= 1e-5 * max(abs(slope), abs(expected), 1.0)
        require(close, f"the gradient says {expected:.6g} along a direction, the penalty changes by {slope:.6g}")


def nothing_else_is_touched(subject: Subject) -> None:
    """Factors stay as they are, two calls agree, and the process is left alone."""
    problem = _problem()
    before = [bitwise(part) for pairs in problem[:2] for pair in pairs.values() for part in (pair.A, pair.B)]
    first = float(_penalty(subject, problem))
    undisturbed(lambda: _penalty(subject, problem))
    after = [bitwise(part) for pairs in problem[:2] for pair in pairs.values() for part in (pair.A, pair.B)]
    require(before == after, "penalty() wrote to a factor")
    require(float(_penalty(subject, problem)) == first, "two calls disagree")
    doubts = subject.make().doubts(problem[1])
    require(all(isinstance(sentence, str) and sentence for sentence in doubts), f"doubts are {doubts!r}")


_CHECKS = (
    declares_itself,
    nothing_is_asked_at_the_start,
    gradients_are_those_of_the_penalty,
    nothing_else_is_touched,
)
