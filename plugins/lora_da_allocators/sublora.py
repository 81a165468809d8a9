"""SubLoRA: directions chosen by their second-order effect on the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_allocators._marginal import greedy_ranks
from lora_da_allocators._options import AllocatorOptions, BudgetedAllocator
from lora_da_core import hookimpl
from lora_da_core.interfaces import RankAllocator
from lora_da_core.types import Curvature, LayerSpectrum


@dataclass(frozen=True)
class SubLoraOptions(AllocatorOptions):
    """Options of SubLoRA.

    Attributes:
        projected: Whether negative off-diagonal entries of the Hessian are set to 0, which makes the objective
            submodular; without, the greedy choice has no guarantee.
    """

    projected: bool = True


class SubLora(BudgetedAllocator[SubLoraOptions]):
    """Maximises F(S) = −Σ_{i∈S} ⟨G, d_i⟩ − ½ Σ_{i,j∈S} ⟨d_i, J d_j⟩ greedily (arXiv 2507.01841; formulas derived).

    The structure, a second-order loss change maximised greedily under one budget for all layers, is the paper's; the
    directions are those of Ω's eigenvectors and the Hessian is the damped Fisher of one layer, so that layers are
    independent. F is submodular exactly where every off-diagonal entry of the Hessian is ≥ 0, which the projection
    brings about. Guarantee, for the projected F with equal costs: marginals along each layer's order then do not
    increase, so the ranks are the best for these orders; and where F is monotone too (no marginal is negative within
    the budget), greedy reaches 1 − 1/e of the best set of that size (Nemhauser, Wolsey and Fisher 1978). Where F is not
    monotone it stops at the first loss, and nothing is claimed.
    """

    name = "sublora"
    api_version = 1
    Options = SubLoraOptions

    @property
    def needs_curvature(self) -> bool:
        return True

    def allocate(
        self, spectra: Mapping[str, LayerSpectrum], costs: Mapping[str, int], budget: int
    ) -> Mapping[str, int]:
        gains = {name: self._greedy(spectrum)[1] for name, spectrum in spectra.items()}
        return greedy_ranks(gains, costs, budget, self.options.minimum)

    def order(self, spectrum: LayerSpectrum) -> Sequence[int]:
        return self._greedy(spectrum)[0]

    def _greedy(self, spectrum: LayerSpectrum) -> tuple[list[int], list[float]]:
        """A layer's directions in greedy order, and what each gains when it is added."""
        if spectrum.curvature is None:
            raise ValueError("the spectrum comes without the curvature that sublora asks for")
        alone, pairs = self._objective(spectrum.curvature)
        order: list[int] = []
        marginals: list[float] = []
        marginal = alone.clone()
        for _ in range(len(alone)):
            place = int(marginal.argmax())
            order.append(place)
            marginals.append(float(marginal[place]))
            marginal = marginal - pairs[place]
            marginal[order] = -torch.inf
        return order, marginals

    def _objective(self, curvature: Curvature) -> tuple[Tensor, Tensor]:
        """What each direction gains alone, (R,), and what each pair loses, (R, R), zero on the diagonal."""
        diagonal = curvature.hessian.diagonal()
        pairs = curvature.hessian - torch.diag(diagonal)
        return -curvature.slopes - 0.5 * diagonal, pairs.clamp(min=0.0) if self.options.projected else pairs


@hookimpl
def lora_da_rank_allocators() -> list[type[RankAllocator[Any]]]:
    """Offers `sublora`."""
    return [SubLora]
