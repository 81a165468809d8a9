"""LoRA's factors as a trained model holds them, found by their names alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.errors import OptionError


@dataclass(frozen=True)
class Pair:
    """One adapted layer.

    Attributes:
        A: (r, in).
        B: (out, r).
        scaling: The factor on B·A.
        base: The module whose weight (out, in) the adapter adds to.
    """

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    base: nn.Module


def lora_pairs(model: nn.Module, adapter_name: str = "default") -> dict[str, Pair]:
    """The linear layers of an adapter, by module name.

    Args:
        model: A PeftModel.
        adapter_name: The adapter.

    Returns:
        At least one.

    Raises:
        OptionError: There is none, or one whose function is not W + scaling·B·A.
    """
    found: dict[str, Pair] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if adapter_name in getattr(layer, "lora_embedding_A", {}):
            raise OptionError(f"layer {name} is an embedding, not a linear LoRA layer; leave it out.")
        if not hasattr(module, "lora_A") or adapter_name not in layer.lora_A:
            continue
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if a.ndim != 2 or adapter_name in getattr(layer, "lora_magnitude_vector", {}):
            raise OptionError(f"layer {name} is no plain linear LoRA layer; leave it out, and DoRA off.")
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer
        found[name] = Pair(a, b, float(layer.scaling[adapter_name]), base)
    if not found:
        raise OptionError(f"the model has no LoRA layers of adapter {adapter_name!r}; wrap it with PEFT first.")
    return found


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product with equal Gram matrices, leftᵀ·left = right·rightᵀ (diagonal).

    Args:
        left: (out, r), full rank.
        right: (r, in), full rank.

    Returns:
        Both, in float64.

    Raises:
        OptionError: The product has a smaller rank.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().mT)
    u, values, vh = torch.linalg.svd(r_left @ r_right.mT)
    if not float(values[-1]) > 1e-10 * float(values[0]):
        raise OptionError(
            "B·A must have full rank where this optimizer starts, and B is zero or has dependent columns; start from a "
            "data-aware initialisation."
        )
    roots = values.sqrt()
    return (q_left @ u) * roots, (roots.unsqueeze(1) * vh) @ q_right.mT
