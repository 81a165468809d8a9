"""Regularised preference optimisation: the preference loss and the likelihood of the chosen text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lora_da_core import hookimpl
from lora_da_core.errors import OptionError
from lora_da_core.interfaces import Objective
from lora_da_core.types import Batch, LayerSpec, TokenMask
from lora_da_objectives._preference import compared, pair_counts, pair_mask, with_references


@dataclass(frozen=True)
class RPOOptions:
    """Options of `rpo`.

    Attributes:
        average: Divide log-probabilities by the completion's tokens, in the margin and in the likelihood.
        beta: Weight of the margin, β > 0; None is 0.5 where averaged, 0.01 where summed.
        eta: Weight of the likelihood, η ≥ 0; None is 0.2 where averaged, 0.005 where summed.
    """

    average: bool = False
    beta: float | None = None
    eta: float | None = None

    def __post_init__(self) -> None:
        if self.beta is not None and not self.beta > 0:
            raise OptionError(f"beta is {self.beta}; it must be above 0.")
        if self.eta is not None and not self.eta >= 0:
            raise OptionError(f"eta is {self.eta}; it must be 0 or more.")


class RPO(Objective[RPOOptions]):
    """ℓ_n = −log σ(β·margin) − η·log π(y_w|x) (Liu et al. 2024, arXiv 2405.16436; the defaults are its own).

    Batches are those of `dpo`. ∂ℓ/∂log π(y_w|x) = −βσ(−β·margin) − η, at the start −β/2 − η. That `average` divides
    the margin's log-probabilities too is our reading.

    This loss is no likelihood of the texts: its empirical Fisher is the second moment of these gradients, and no Fisher
    of the language model.
    """

    name = "rpo"
    api_version = 1
    masks_by_layer = False
    Options = RPOOptions

    @property
    def takes_pairs(self) -> bool:
        return True

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        average = self.options.average
        beta = (0.5 if average else 0.01) if self.options.beta is None else self.options.beta
        eta = (0.2 if average else 0.005) if self.options.eta is None else self.options.eta
        chosen, margin = compared(model, batch, average)
        return -functional.logsigmoid(beta * margin) - eta * chosen

    def complete(self, model: nn.Module, batch: Batch) -> Batch:
        return with_references(model, batch)

    def label_counts(self, batch: Batch) -> Tensor:
        return pair_counts(batch)

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        return pair_mask(batch, kind)


@hookimpl
def lora_da_objectives() -> list[type[Objective[Any]]]:
    """Offers `rpo`."""
    return [RPO]
