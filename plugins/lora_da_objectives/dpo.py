"""Direct preference optimisation: the chosen text is to gain on the rejected one, as against a reference."""

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
class DPOOptions:
    """Options of `dpo`.

    Attributes:
        beta: Weight of the margin, β > 0; TRL's default.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise OptionError(f"beta is {self.beta}; it must be above 0.")


class DPO(Objective[DPOOptions]):
    """ℓ_n = −log σ(β·margin), log-probabilities summed (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    The batch holds `input_ids` and `labels` (pairs, 2, tokens), chosen before rejected, −100 where no completion is;
    usually `attention_mask`, and `ref_chosen_logps` and `ref_rejected_logps` (pairs,) if the reference is not the
    model at its start. There the margin is 0, and every pair pulls with weight β/2.

    This loss is no likelihood of the texts: its empirical Fisher is the second moment of the preference gradients, and
    no Fisher of the language model.
    """

    name = "dpo"
    api_version = 1
    masks_by_layer = False
    Options = DPOOptions

    @property
    def takes_pairs(self) -> bool:
        return True

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        _, margin = compared(model, batch, average=False)
        return -functional.logsigmoid(self.options.beta * margin)

    def complete(self, model: nn.Module, batch: Batch) -> Batch:
        return with_references(model, batch)

    def label_counts(self, batch: Batch) -> Tensor:
        return pair_counts(batch)

    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        return pair_mask(batch, kind)


@hookimpl
def lora_da_objectives() -> list[type[Objective[Any]]]:
    """Offers `dpo`."""
    return [DPO]
