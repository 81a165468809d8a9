"""PEFT's own initialisations, as its documentation has them called: what a grid compares LoRA-DA to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from torch import Tensor, nn

from lora_da_core.adapter.factors import holders, lora_layers
from lora_da_core.batches import to_device
from lora_da_core.errors import AdapterError, OptionError
from lora_da_core.types import Batch, LoraFactors

PASSES: Final[Mapping[str, int]] = {"default": 0, "eva": 1, "lora_ga": 1, "pissa": 0, "olora": 0, "corda": 1}
"""How often each reads the data."""


def initialise(
    name: str, model: nn.Module, names: Sequence[str], batches: Sequence[Batch], settings: Mapping[str, Any]
) -> PeftModel:
    """Wraps a model with one of PEFT's initialisations, at PEFT's own settings.

    EVA keeps every layer at the same rank (`rho=1`), so that all cells train equally many parameters.

    Args:
        name: One of `PASSES`.
        model: A model that may be changed: some of these move part of a weight into the adapter.
        names: The layers' full names.
        batches: What the data-driven ones read.
        settings: `r` and what else the LoRA configurations share.

    Returns:
        The PeftModel.

    Raises:
        OptionError: The installed PEFT does not offer it.
        AdapterError: A layer came out with another rank.
    """
    makers: dict[str, Callable[[nn.Module, Sequence[Batch], dict[str, Any]], PeftModel]] = {
        "default": _plain(True),
        "pissa": _plain("pissa"),
        "olora": _plain("olora"),
        "eva": _eva,
        "lora_ga": _lora_ga,
        "corda": _corda,
    }
    common = {**settings, "target_modules": list(names)}
    with warnings.catch_warnings():
        # They announce that the base changes, which is why it is a copy.
        warnings.simplefilter("ignore", UserWarning)
        wrapped = makers[name](model, batches, common)
    for layer, pair in factors_of(wrapped).items():
        rank = pair.A.shape[0]
        if rank != settings["r"]:
            raise AdapterError(f"PEFT's {name} gave layer {layer} rank {rank} instead of {settings['r']}.")
    return wrapped


def factors_of(model: PeftModel) -> dict[str, LoraFactors]:
    """A (r, in) and B (out, r) of every adapted layer, by its name in the base model; copies."""
    found = {}
    for name, layer in lora_layers(model.get_base_model()).items():
        a, b = holders(layer, "default").values()
        found[name] = LoraFactors(a.detach().clone(), b.detach().clone())
    return found


def offset_of(wrapped: PeftModel, base: nn.Module, start: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """What an initialisation took out of the base weights, as factors.

    Args:
        wrapped: The initialised model.
        base: The model as it was before.
        start: The factors of `wrapped`.

    Returns:
        The starting factors of the layers whose weight is now W − scaling·B·A; nothing of layers left alone.

    Raises:
        AdapterError: A weight has become something else.
    """
    found, layers = {}, lora_layers(wrapped.get_base_model())
    for name, pair in start.items():
        layer = layers[name]
        before = cast(Tensor, base.get_submodule(name).weight).detach()
        taken = before.float() - layer.get_base_layer().weight.detach().to(before.device).float()
        if not bool(taken.any()):
            continue
        expected = layer.get_delta_weight("default").detach().to(before.device).float()
        # The weights are kept in their own dtype, so they differ by its rounding.
        allowed = 4 * torch.finfo(before.dtype).eps * float(before.abs().max() + expected.abs().max())
        if float((taken - expected).abs().max()) > allowed:
            raise AdapterError(f"the initialisation changed {name} by something else than its own starting product.")
        found[name] = pair
    return found


def _plain(kind: Any) -> Callable[[nn.Module, Sequence[Batch], dict[str, Any]], PeftModel]:
    def make(model: nn.Module, batches: Sequence[Batch], common: dict[str, Any]) -> PeftModel:
        return get_peft_model(model, LoraConfig(init_lora_weights=kind, **common))

    return make


def _eva(model: nn.Module, batches: Sequence[Batch], common: dict[str, Any]) -> PeftModel:
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **common)
    wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    placed = [to_device(batch, device) for batch in batches]
    initialize_lora_eva_weights(wrapped, placed, show_progress_bar=False)
    return wrapped


def _lora_ga(model: nn.Module, batches: Sequence[Batch], common: dict[str, Any]) -> PeftModel:
    try:
        from peft import LoraGAConfig
        from peft.tuners.lora import preprocess_loraga
    except ImportError as error:
        raise OptionError("the installed PEFT has no LoRA-GA; update peft, or leave 'lora_ga' out.") from error
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **common)
    device = next(model.parameters()).device

    def train_step() -> None:
        for batch in batches:
            model(**to_device(batch, device)).loss.backward()

    preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def _corda(model: nn.Module, batches: Sequence[Batch], common: dict[str, Any]) -> PeftModel:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(), **common)
    device = next(model.parameters()).device

    def run_model() -> None:
        with torch.no_grad():
            for sample in _one_by_one(batches):
                model(**to_device(sample, device))

    preprocess_corda(model, config, run_model)
    return get_peft_model(model, config)


def _one_by_one(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Single samples without padding: CorDA's covariance takes every token, and one sample at a time."""
    found = []
    for batch in batches:
        for row, mask in enumerate(batch["attention_mask"].bool()):
            length = int(mask.sum())
            found.append({key: batch[key][row : row + 1, :length] for key in ("input_ids", "attention_mask")})
    return found
