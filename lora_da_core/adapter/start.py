"""How a written adapter starts: what is taken out again of the base's function, and what is not trained."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import cast

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from lora_da_core.adapter.factors import holders, lora_layers, materialise, saved_keys
from lora_da_core.errors import OptionError
from lora_da_core.placement import is_shared_out, offload_hook
from lora_da_core.types import Frozen, LoraFactors, Offset

OFFSET_ADAPTER = "lora_da_offset"
"""Name of the frozen adapter that takes the start out again."""


def check_start(model: nn.Module, modules: Mapping[str, nn.Module], peft_config: LoraConfig, offset: Offset) -> None:
    """Refuses an offset that cannot be had, before any work.

    Args:
        model: The base model, or a PeftModel.
        modules: The adapted base modules by name.
        peft_config: The LoRA configuration.
        offset: As in `LoraDAConfig`.

    Raises:
        OptionError: Weights are packed or shared, an offset is there already, or the adapter's function is not
            W + scaling·B·A of one adapter.
    """
    if offset == "none":
        return
    if peft_config.use_dora:
        raise OptionError(
            f"offset={offset!r} and DoRA do not go together: its magnitude depends on the base's weights."
        )
    if isinstance(model, PeftModel) and OFFSET_ADAPTER in model.peft_config:
        raise OptionError(f"the model has an adapter {OFFSET_ADAPTER!r} already; delete it first.")
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if weight is None:
            raise OptionError(f"offset={offset!r}: {name} is no single weight that could take it; exclude it.")
        if offset == "base" and not (isinstance(weight, Tensor) and weight.is_floating_point()):
            raise OptionError(f"offset='base': the weights of {name} are packed; use offset='frozen_adapter'.")
        if offset == "base" and (offload_hook(module) is not None or is_shared_out(weight)):
            raise OptionError(
                f"offset='base': the weights of {name} are offloaded or sharded, where a change would be lost; use "
                "offset='frozen_adapter'."
            )
        if offset == "base" and places[id(weight)] > 1:
            raise OptionError(
                f"offset='base': {name} shares its weights with another module, which would change with them; use "
                "offset='frozen_adapter'."
            )


def settle(
    model: PeftModel, factors: Mapping[str, LoraFactors], adapter_name: str, *, offset: Offset, frozen: Frozen
) -> None:
    """Takes scaling·B·A out again and freezes A, as asked.

    Args:
        model: A PeftModel whose adapter holds the factors.
        factors: By module name.
        adapter_name: The adapter.
        offset: `"base"` changes the base's weights in place; `"frozen_adapter"` adds an adapter of the factors A and
            −B, active beside the other and not trained.
        frozen: `"A"` freezes the adapter's A.
    """
    layers = {name: layer for name, layer in lora_layers(model.get_base_model()).items() if name in factors}
    if offset == "base":
        with torch.no_grad():
            for layer in layers.values():
                weight = cast(Tensor, layer.get_base_layer().weight)
                start = layer.get_delta_weight(adapter_name).to(weight.device)
                weight.copy_(weight.float() - start.float() if weight.dtype.itemsize < 4 else weight - start)
    if offset == "frozen_adapter":
        _add_offset(model, factors, adapter_name)
    if frozen == "A":
        for layer in layers.values():
            a, _ = holders(layer, adapter_name).values()
            a.requires_grad_(False)


def _add_offset(model: PeftModel, factors: Mapping[str, LoraFactors], adapter_name: str) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng(devices=[]):  # PEFT draws an A that is overwritten below
        model.add_adapter(OFFSET_ADAPTER, copy.deepcopy(model.peft_config[adapter_name]))
    state = {}
    for name, pair in factors.items():
        key_a, key_b = saved_keys(name, pair)
        state[key_a], state[key_b] = pair.A, -pair.B
    for layer in lora_layers(model.get_base_model()).values():
        materialise(layer, OFFSET_ADAPTER, True)
    set_peft_model_state_dict(model, state, adapter_name=OFFSET_ADAPTER)
    model.base_model.set_adapter([adapter_name, OFFSET_ADAPTER])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
