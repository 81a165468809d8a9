"""Which layers an adapter adapts: PEFT is asked, and what cannot be initialised is named with the reason."""

from __future__ import annotations

import copy
import difflib
import itertools
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from lora_da_core.adapter.factors import base_name, fault, lora_layers, specs_of
from lora_da_core.adapter.variants import check_config
from lora_da_core.errors import OptionError, TargetError
from lora_da_core.layer_kinds import CLASSES
from lora_da_core.placement import copied_tree, in_parts
from lora_da_core.types import LayerSpec, Unsupported

SKELETON = "default"
"""The adapter's name on a skeleton, whatever the real one will be called."""

_REFUSALS = (TypeError, ValueError, re.error)
"""What PEFT raises of a configuration that does not fit the model."""


@dataclass(frozen=True)
class Targets:
    """The layers an adapter adapts: specifications, the base modules by name, and what stays at PEFT's own init."""

    specs: tuple[LayerSpec, ...]
    modules: Mapping[str, nn.Module]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Reason by name of the module."""
    unmatched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By `target_modules` and `exclude_modules`, what fits no module while layers are adapted: PEFT passes over it."""

    @property
    def notes(self) -> list[str]:
        """What is skipped, for the report."""
        skipped = [f"left at PEFT's own initialisation: {name} ({reason})" for name, reason in self.skipped.items()]
        unmatched = [f"no module has these names of {key}: {', '.join(names)}" for key, names in self.unmatched.items()]
        return [*unmatched, *skipped]


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT already."""
    return isinstance(model, PeftModel)


def base_of(model: nn.Module) -> nn.Module:
    """The model to run: a PeftModel's own base, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base function alone, whatever adapters the model carries."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


def config_of(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The LoRA configuration of an adapter of a PeftModel.

    Args:
        model: A PeftModel.
        adapter_name: The adapter.

    Returns:
        Its configuration.

    Raises:
        TargetError: The model is not a PeftModel, has no such LoRA adapter, or DeepSpeed's ZeRO-3 shards it.
    """
    if not isinstance(model, PeftModel):
        raise TargetError(f"a PeftModel is needed, this is a {type(model).__name__}; call get_peft_model first.")
    if adapter_name not in model.peft_config:
        names = ", ".join(model.peft_config)
        raise TargetError(f"the model has no adapter {adapter_name!r}; it has: {names}.")
    config = model.peft_config[adapter_name]
    if config.peft_type is not PeftType.LORA:
        raise TargetError(f"adapter {adapter_name!r} is {config.peft_type.value}, not LoRA.")
    if any(in_parts(value) for name, value in model.named_parameters() if adapter_name in name.split(".")):
        raise TargetError(
            f"DeepSpeed's ZeRO-3 shards adapter {adapter_name!r}, so that nothing can be written into it. Take the "
            "factors of the base (get_lora_da_state_dict) and write them (initialize_lora_da_weights) before the model "
            "with the adapter is prepared."
        )
    return config


def chosen_config(model: nn.Module, peft_config: LoraConfig | None, adapter_name: str) -> LoraConfig:
    """The LoRA configuration of a run: the one that is given, or the PeftModel's own.

    Args:
        model: A base model, or a PeftModel that has the adapter.
        peft_config: The configuration, or None.
        adapter_name: The adapter.

    Returns:
        The configuration.

    Raises:
        TargetError: The model is not a PeftModel and no configuration is given, or its base function is not to be had,
            or the configuration asks for an unsupported variant of LoRA.
        OptionError: The adapter has another rank or scaling than the configuration that is given, or the configuration
            is another tuner's or another initialisation's.
    """
    if peft_config is not None:
        check_config(peft_config)
    layers = lora_layers(base_of(model))
    if layers and not isinstance(model, PeftModel):
        raise TargetError("the model holds LoRA layers, but is no PeftModel; pass the PeftModel, or remove them first.")
    if any(layer.merged for layer in layers.values()):
        raise TargetError("an adapter is merged into the model's weights; call unmerge_adapter() first.")
    if peft_config is None or isinstance(model, PeftModel):
        own = config_of(model, adapter_name)
        for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
            if peft_config is not None and getattr(own, name) != getattr(peft_config, name):
                raise OptionError(
                    f"adapter {adapter_name!r} of the PeftModel has {name}={getattr(own, name)!r}, the configuration "
                    f"{getattr(peft_config, name)!r}; leave the configuration out."
                )
        check_config(own)
        return own
    return peft_config


def resolve_targets(
    model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", unsupported: Unsupported = "error"
) -> Targets:
    """Asks PEFT itself which modules the configuration adapts, at what rank and scaling.

    Args:
        model: A base model, which is left as it is, or a PeftModel that has the adapter.
        peft_config: The LoRA configuration.
        adapter_name: The adapter's name, where the model carries it.
        unsupported: Whether a match that cannot be initialised is an error or is skipped.

    Returns:
        The layers in the model's order.

    Raises:
        TargetError: Nothing matches, or a match cannot be initialised; the message names it.
        OptionError: The configuration asks PEFT for an initialisation that would change the base.
    """
    compiled = next((n for n, m in model.named_modules() if isinstance(m, torch._dynamo.OptimizedModule)), None)
    if compiled is not None:
        raise TargetError(
            f"{f'its part {compiled}' if compiled else 'the model'} is compiled; pass the model with what was given to "
            "torch.compile (`._orig_mod`) in its place, or compile in place by `.compile()`."
        )
    check_config(peft_config)
    check_saved_modules(model, adapter_name)
    base = base_of(model)
    carried = adapter_name if isinstance(model, PeftModel) else SKELETON
    wrapped = base if isinstance(model, PeftModel) else _skeleton(base, peft_config)
    layers = {name: layer for name, layer in lora_layers(wrapped).items() if carried in layer.scaling}
    if not layers:
        raise TargetError(f"no layer carries the adapter {adapter_name!r}.")
    _check_tying(peft_config, layers, carried)
    skipped = {name: reason for name, layer in layers.items() if (reason := fault(layer, carried))}
    if skipped and (unsupported == "error" or len(skipped) == len(layers)):
        name, reason = next(iter(skipped.items()))
        raise TargetError(
            f"layer {name} {reason}. Leave it out with exclude_modules, or at PEFT's own initialisation with "
            "unsupported='default' while other layers are initialised."
        )
    named, specs, modules = dict(base.named_modules()), [], {}
    for name, layer in layers.items():
        if name not in skipped:
            found = specs_of(name, layer, carried)
            specs += found
            modules.update(dict.fromkeys((spec.name for spec in found), _base_layer(named[base_name(name)])))
    return Targets(tuple(specs), modules, skipped, _unmatched(peft_config, named))


def _unmatched(peft_config: LoraConfig, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Names that end no module's, and a regex of what is excluded that fits none; one of targets must fit some."""
    targets, excluded = peft_config.target_modules, peft_config.exclude_modules
    found = {"target_modules": () if isinstance(targets, str) else _in_no_name(targets or (), names)}
    if not isinstance(excluded, str):
        found["exclude_modules"] = _in_no_name(excluded or (), names)
    elif excluded and not any(re.fullmatch(excluded, name) for name in names):
        found["exclude_modules"] = (excluded,)
    return {key: each for key, each in found.items() if each}


def _in_no_name(endings: Iterable[str], names: Collection[str]) -> tuple[str, ...]:
    return tuple(each for each in sorted(endings) if not any(f".{name}".endswith(f".{each}") for name in names))


def check_saved_modules(model: nn.Module, adapter_name: str) -> None:
    """Refuses a PeftModel whose `modules_to_save` have no values, since PEFT made them on the meta device.

    Args:
        model: The model.
        adapter_name: The adapter.

    Raises:
        TargetError: One has none; the message names it.
    """
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or adapter_name not in module.modules_to_save:
            continue
        if any(parameter.is_meta for parameter in module.modules_to_save[adapter_name].parameters()):
            raise TargetError(
                f"the copy of {name} that modules_to_save asks for is on the meta device; make the adapter without "
                "low_cpu_mem_usage."
            )


@contextmanager
def keeping_requires_grad(model: nn.Module) -> Iterator[None]:
    """Gives every parameter its `requires_grad` back."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.requires_grad_(value)


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _check_tying(peft_config: LoraConfig, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """PEFT makes tied layers share their factors, but an embedding's are laid out the other way."""
    tied = [name for name, layer in layers.items() if adapter_name in layer.lora_embedding_A]
    if tied and getattr(peft_config, "ensure_weight_tying", False):
        raise TargetError(
            f"ensure_weight_tying is not supported where {tied[0]}, an embedding, is adapted; leave one out."
        )


def _skeleton(base: nn.Module, peft_config: LoraConfig) -> nn.Module:
    try:
        return _injected(base, peft_config)
    except _REFUSALS as error:
        raise TargetError(_no_match(base, peft_config, error)) from error


def _injected(base: nn.Module, peft_config: LoraConfig) -> nn.Module:
    """A copy of the module tree that shares every weight, with PEFT's layers on the meta device injected."""
    tensors: Iterable[Tensor] = itertools.chain(base.parameters(), base.buffers())
    with keeping_requires_grad(base), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clone = copied_tree(base, {id(tensor): tensor for tensor in tensors})
        get_peft_model(clone, copy.deepcopy(peft_config), adapter_name=SKELETON, low_cpu_mem_usage=True)
    return clone


def _no_match(base: nn.Module, peft_config: LoraConfig, error: Exception) -> str:
    wanted = _listed(peft_config.target_modules)
    if not isinstance(error, re.error) and _excludes_all(base, peft_config):
        return (
            f"exclude_modules {_listed(peft_config.exclude_modules)} leaves none of the layers that target_modules "
            f"{wanted} names; exclude fewer of them."
        )
    endings = sorted(
        {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if type(module).__name__ in CLASSES}
    )
    by_lower = {ending.lower(): ending for ending in endings}
    odd = [name.lower() for name in wanted if name not in endings]
    close = [by_lower[match] for name in odd for match in difflib.get_close_matches(name, by_lower, n=2)]
    hint = f"Closest: {', '.join(close)}. " if close else ""
    return f"target_modules {wanted} cannot be adapted. {hint}Layers here: {', '.join(endings)}. PEFT says: {error}"


def _excludes_all(base: nn.Module, peft_config: LoraConfig) -> bool:
    """Whether PEFT takes the configuration as soon as it excludes nothing."""
    if not peft_config.exclude_modules:
        return False
    including = copy.deepcopy(peft_config)
    including.exclude_modules = None
    try:
        _injected(base, including)
    except _REFUSALS:
        return False
    return True


def _listed(names: Iterable[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) else sorted(names or ())
