"""Ranks shared out among solved layers: what an allocator is shown, its answer checked, and the solutions cut to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_da_core.blame import blamed
from lora_da_core.errors import OptionError, PluginError
from lora_da_core.interfaces import RankAllocator
from lora_da_core.registry import Registry
from lora_da_core.solving import LayerSolution
from lora_da_core.types import LayerSpec, LayerSpectrum


@dataclass(frozen=True)
class Allocated:
    """Layers at their ranks: specifications, the solutions cut to them, and what the report says."""

    specs: tuple[LayerSpec, ...]
    solutions: Mapping[str, LayerSolution]
    record: Mapping[str, Any]


class Allocation:
    """One allocator, asked for some layers.

    Args:
        registry: The installed plugins.
        allocator: The allocator.
        specs: The layers at their configured ranks; their scaling stays as it is, whatever the ranks become.

    Raises:
        OptionError: The smallest ranks alone exceed the budget, or a layer's sizes; experts, which share one rank.
        PluginError: The allocator raised.
    """

    def __init__(self, registry: Registry, allocator: RankAllocator[Any], specs: Sequence[LayerSpec]) -> None:
        self._registry, self._allocator, self._specs = registry, allocator, tuple(specs)
        experts = [spec.name for spec in specs if spec.expert is not None]
        if experts:
            raise OptionError(
                f"allocator {allocator.name!r}: {experts[0]} and the experts beside it have one rank in PEFT, so ranks "
                "cannot be shared out among them; leave target_parameters out, or the allocator."
            )
        with self._blamed():
            self._least = allocator.smallest_rank
            self._wanted = {spec.name: allocator.largest_rank(spec) for spec in specs}
            by_parameter = allocator.unit == "parameter"
            given = allocator.budget
        self.costs = {spec.name: spec.in_features + spec.out_features if by_parameter else 1 for spec in specs}
        configured = sum(self.costs[spec.name] * spec.rank for spec in specs)
        self.budget = configured if given is None else given
        needed = self._least * sum(self.costs.values())
        if needed > self.budget:
            raise OptionError(
                f"allocator {allocator.name!r}: rank {self._least} for each of {len(specs)} layers takes {needed} "
                f"{allocator.unit}s, above the budget of {self.budget}; raise the budget, lower the smallest rank, or "
                "adapt fewer layers."
            )
        small = [spec.name for spec in specs if min(spec.in_features, spec.out_features) < self._least]
        if small:
            raise OptionError(f"allocator {allocator.name!r}: layer {small[0]} is smaller than rank {self._least}.")

    def largest(self, tokens: Mapping[str, int]) -> tuple[LayerSpec, ...]:
        """The layers at the ranks they are solved at.

        Args:
            tokens: Tokens that layers' statistics hold; of some layers only where the others are solved apart.

        Returns:
            Their specifications: at least the smallest rank, at most what sizes, tokens and budget allow.
        """
        spare = self.budget - self._least * sum(self.costs.values())
        found = []
        for spec in self._specs:
            if spec.name not in tokens:
                continue
            affordable = self._least + spare // self.costs[spec.name]
            limit = min(spec.in_features, spec.out_features, tokens[spec.name], affordable)
            found.append(replace(spec, rank=max(self._least, min(self._wanted[spec.name], limit))))
        return tuple(found)

    def of(self, solutions: Mapping[str, LayerSolution]) -> Allocated:
        """Asks the allocator and cuts the solutions.

        Args:
            solutions: At the ranks of `largest`.

        Returns:
            The layers at their ranks.

        Raises:
            PluginError: The allocator raised, or its answer breaks the contract.
        """
        spectra = {spec.name: _spectrum(solutions[spec.name]) for spec in self._specs}
        with self._blamed():
            ranks = dict(self._allocator.allocate(spectra, self.costs, self.budget))
            orders = {name: [int(place) for place in self._allocator.order(s)] for name, s in spectra.items()}
        fault = self._fault(ranks, spectra, orders)
        if fault:
            raise PluginError(f"{self._named} broke its contract: {fault}")
        specs = tuple(replace(spec, rank=int(ranks[spec.name])) for spec in self._specs)
        record = {
            "unit": self._allocator.unit,
            "budget": self.budget,
            "spent": sum(self.costs[spec.name] * spec.rank for spec in specs),
            "ranks": {spec.name: spec.rank for spec in specs},
            "scaling": {spec.name: spec.scaling for spec in specs},
            "gain": _gain(spectra, specs),
            "configured_gain": _gain(spectra, self._specs),
        }
        cut = {spec.name: _cut(solutions[spec.name], orders[spec.name][: spec.rank]) for spec in specs}
        return Allocated(specs, cut, record)

    def _fault(
        self, ranks: Mapping[str, Any], spectra: Mapping[str, LayerSpectrum], orders: Mapping[str, Sequence[int]]
    ) -> str:
        if set(ranks) != set(spectra):
            return f"it gave ranks for {len(ranks)} layers that are not the {len(spectra)} it was shown"
        for name, spectrum in spectra.items():
            rank, most = ranks[name], len(spectrum.values)
            if isinstance(rank, bool) or not isinstance(rank, int) or not self._least <= rank <= most:
                return f"it gave layer {name} the rank {rank!r}, not one of {self._least} to {most}"
            if sorted(orders[name]) != list(range(most)):
                return f"its order of the {most} directions of layer {name} is no permutation"
        spent = sum(self.costs[name] * rank for name, rank in ranks.items())
        return f"its ranks take {spent} {self._allocator.unit}s of {self.budget}" if spent > self.budget else ""

    @property
    def _named(self) -> str:
        origin = self._registry.origin("allocator", type(self._allocator))
        return f"allocator {self._allocator.name!r} ({origin})"

    def _blamed(self) -> AbstractContextManager[None]:
        return blamed(self._named, "")


def _spectrum(solution: LayerSolution) -> LayerSpectrum:
    values = torch.tensor(solution.values, dtype=torch.float64)
    return LayerSpectrum(values, solution.divisor**2, solution.curvature)


def _gain(spectra: Mapping[str, LayerSpectrum], specs: Sequence[LayerSpec]) -> float:
    return float(sum(float(spectra[spec.name].gains[: spec.rank].sum()) for spec in specs))


def _cut(solution: LayerSolution, kept: Sequence[int]) -> LayerSolution:
    """The solution with some of its directions."""
    space, rank = solution.subspace, len(kept)
    values = tuple(solution.values[place] for place in sorted(kept))
    left_out = [value for place, value in enumerate(solution.values) if place not in set(kept)]
    columns = torch.tensor(kept, device=space.basis.device)
    return replace(
        solution,
        subspace=replace(space, basis=space.basis[:, columns], projected=space.projected[:, columns]),
        values=values,
        gap=min(left_out) - values[-1] if rank < len(solution.values) else solution.gap,
        curvature=None,
    )
