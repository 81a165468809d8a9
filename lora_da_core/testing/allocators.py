"""What every rank allocator must fulfil, as checks on made-up spectra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lora_da_core.interfaces import RankAllocator
from lora_da_core.testing.data import Check, Subject, bitwise, checks_of, declares_itself, require, undisturbed
from lora_da_core.types import Curvature, LayerSpec, LayerSpectrum

SIZES = {"small": (6, 5), "wide": (24, 12), "tall": (10, 40), "idle": (16, 16)}
"""(in, out) by layer; the gradient of the last is zero."""


def checks(cls: type[RankAllocator[Any]], options: Mapping[str, Any]) -> Iterator[Check]:
    """All checks of an allocator, as (name, callable).

    Args:
        cls: The allocator.
        options: Its options.

    Returns:
        (name, callable) one by one.
    """
    return checks_of(Subject(cls, options), _CHECKS)


def _specs() -> list[LayerSpec]:
    return [LayerSpec(name, "linear", *sizes, rank=2, scaling=1.0) for name, sizes in SIZES.items()]


def _problem(allocator: RankAllocator[Any], scale: float = 1.0) -> tuple[dict[str, LayerSpectrum], dict[str, int]]:
    """Spectra that mix gains and losses, and costs in the allocator's unit; `scale` multiplies all squared weights."""
    draw = torch.Generator().manual_seed(0)
    spectra, costs = {}, {}
    for place, spec in enumerate(_specs()):
        most = max(allocator.smallest_rank, min(spec.in_features, spec.out_features, allocator.largest_rank(spec)))
        values = torch.rand(most, generator=draw, dtype=torch.float64).sort().values - 0.8
        vectors = torch.randn(most, most + 2, generator=draw, dtype=torch.float64)
        curvature = Curvature(-3 * torch.rand(most, generator=draw, dtype=torch.float64), vectors @ vectors.mT / most)
        if spec.name == "idle":
            values, curvature = values.abs().sort().values, Curvature(0 * curvature.slopes, curvature.hessian)
        spectra[spec.name] = LayerSpectrum(values, scale * (1.0 + place), curvature)
        costs[spec.name] = spec.in_features + spec.out_features if allocator.unit == "parameter" else 1
    return spectra, costs


def _budgets(allocator: RankAllocator[Any], costs: Mapping[str, int]) -> tuple[int, ...]:
    least = allocator.smallest_rank * sum(costs.values())
    return least, least + min(costs.values()), 2 * least + 1, 10 * least


def ranks_stay_within_bounds_and_budget(subject: Subject) -> None:
    """Every layer gets a rank, none above its spectrum, and the budget is kept."""
    allocator = subject.make()
    spectra, costs = _problem(allocator)
    for budget in _budgets(allocator, costs):
        ranks = allocator.allocate(spectra, costs, budget)
        require(set(ranks) == set(spectra), f"ranks are given for {sorted(ranks)}, not for {sorted(spectra)}")
        for name, rank in ranks.items():
            most = len(spectra[name].values)
            whole = isinstance(rank, int) and not isinstance(rank, bool)
            require(whole and allocator.smallest_rank <= rank <= most, f"{name} gets rank {rank!r} of {most}")
        spent = sum(costs[name] * rank for name, rank in ranks.items())
        require(spent <= budget, f"{spent} of {budget} units are spent")


def orders_are_permutations(subject: Subject) -> None:
    """Every direction of a layer has one place in its order."""
    allocator = subject.make()
    for name, spectrum in _problem(allocator)[0].items():
        order = list(allocator.order(spectrum))
        require(sorted(order) == list(range(len(spectrum.values))), f"{name}: {order} is no permutation")


def largest_ranks_reach_the_smallest(subject: Subject) -> None:
    """What a layer is solved at suffices for what it gets at least."""
    allocator = subject.make()
    require(allocator.unit in ("rank", "parameter"), f"unit is {allocator.unit!r}")
    for spec in _specs():
        least, most = allocator.smallest_rank, allocator.largest_rank(spec)
        require(1 <= least <= most, f"the smallest rank is {least}, the largest {most}")


def a_common_unit_of_weights_does_not_matter(subject: Subject) -> None:
    """Layers are compared with each other: weights in other units give the same ranks."""
    allocator = subject.make()
    (one, costs), (two, _) = _problem(allocator), _problem(allocator, scale=4.0)
    for budget in _budgets(allocator, costs):
        found = [dict(allocator.allocate(spectra, costs, budget)) for spectra in (one, two)]
        require(found[0] == found[1], f"a unit of weights changes {found[0]} to {found[1]}")


def equal_problems_give_equal_ranks_and_nothing_is_changed(subject: Subject) -> None:
    """No chance, no state, and neither the spectra nor the process are touched."""
    allocator = subject.make()
    spectra, costs = _problem(allocator)
    before = {name: bitwise(spectrum.values) for name, spectrum in spectra.items()}
    budget = _budgets(allocator, costs)[2]
    first = dict(allocator.allocate(spectra, costs, budget))
    undisturbed(lambda: allocator.allocate(spectra, costs, 2 * budget))
    require(dict(allocator.allocate(spectra, costs, budget)) == first, "an earlier problem changed the answer")
    require(dict(subject.make().allocate(spectra, costs, budget)) == first, "two instances disagree")
    changed = [name for name, spectrum in spectra.items() if bitwise(spectrum.values) != before[name]]
    require(not changed, f"the spectrum of {changed[:1]} was modified")


_CHECKS = (
    declares_itself,
    ranks_stay_within_bounds_and_budget,
    orders_are_permutations,
    largest_ranks_reach_the_smallest,
    a_common_unit_of_weights_does_not_matter,
    equal_problems_give_equal_ranks_and_nothing_is_changed,
)
