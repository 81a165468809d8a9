"""LaLoRA: a Laplace penalty that keeps LoRA's factors from where other data would notice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import LayerFisher, Regularizer
from lora_da_core.types import LoraFactors


@dataclass(frozen=True)
class LaplaceOptions:
    """Options of the Laplace penalty.

    Attributes:
        strength: λ ≥ 0.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength is {self.strength!r}; it must be at least 0")


class Laplace(Regularizer[LaplaceOptions]):
    """(λ/2)(θ − θ0)ᵀF(θ − θ0) on A and B, F the source data's Fisher (arXiv 2512.17720).

    The Fisher of a factor follows from that of the weights by the chain rule, dW = s(B0·dA + dB·A0) at the start
    (derived): F_A = s²B0ᵀJB0 and F_B = s²A0JA0ᵀ, where J is whatever the estimator gives, diagonal, K-FAC or another.
    As in the paper the two factors are penalised apart. Where B0 is zero F_A is zero, and A is free to move to where a
    trained B makes it matter; start from a data-aware initialisation.
    """

    name = "laplace"
    api_version = 1
    Options = LaplaceOptions

    def penalty(
        self,
        factors: Mapping[str, LoraFactors],
        start: Mapping[str, LoraFactors],
        scaling: Mapping[str, float],
        fishers: Mapping[str, LayerFisher],
    ) -> Tensor:
        terms = []
        for name, now in factors.items():
            before, size = start[name], scaling[name]
            for change in (before.B @ (now.A - before.A), (now.B - before.B) @ before.A):
                terms.append(_HalfSquare.apply(size * change, fishers[name]))  # type: ignore[no-untyped-call]
        total: Tensor = self.options.strength * torch.stack([term.to(terms[0].device) for term in terms]).sum()
        return total

    def doubts(self, start: Mapping[str, LoraFactors]) -> Sequence[str]:
        unprotected = [name for name, pair in start.items() if not bool(pair.B.any())]
        if not unprotected:
            return ()
        return [
            f"laplace: B starts at zero in {len(unprotected)} layers (the first is {unprotected[0]}), so their A is "
            "not protected; estimate after a data-aware initialisation, whose B is not zero."
        ]


class _HalfSquare(torch.autograd.Function):
    """½⟨D, J D⟩, whose gradient is J D: a Fisher's product need not be differentiable."""

    @staticmethod
    def forward(context: Any, change: Tensor, fisher: LayerFisher) -> Tensor:
        product = fisher.apply(change.detach())
        context.save_for_backward(product)
        context.dtype = change.dtype
        return 0.5 * (product * change.to(product)).sum()

    @staticmethod
    def backward(context: Any, *incoming: Tensor) -> tuple[Tensor, None]:
        (product,) = context.saved_tensors
        return (incoming[0] * product).to(context.dtype), None


@hookimpl
def lora_da_regularizers() -> list[type[Regularizer[Any]]]:
    """Offers `laplace`."""
    return [Laplace]
