"""LoraFactors to PEFT, all or nothing; with its own rooms the only one that imports peft."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from lora_da_core.adapter.checks import Check, base_digests, digest, fingerprint, verify
from lora_da_core.adapter.factors import (
    PREFIX,
    as_stored,
    factor_parameters,
    fault,
    held_factors,
    lora_layers,
    materialise,
    own_parameters,
    saved_keys,
    update_magnitude,
)
from lora_da_core.adapter.start import check_start, settle
from lora_da_core.adapter.targets import (
    Targets,
    adapters_disabled,
    base_of,
    check_saved_modules,
    chosen_config,
    config_of,
    is_peft_model,
    resolve_targets,
)
from lora_da_core.adapter.variants import check_adapter_name, check_config
from lora_da_core.errors import AdapterError, OptionError
from lora_da_core.placement import whole
from lora_da_core.types import Frozen, LoraFactors, Offset

__all__ = [
    "Check",
    "Targets",
    "adapters_disabled",
    "allocated_config",
    "apply",
    "as_stored",
    "base_digests",
    "base_of",
    "check_adapter_name",
    "check_start",
    "chosen_config",
    "config_of",
    "digest",
    "factor_pairs",
    "fingerprint",
    "held_factors",
    "is_peft_model",
    "lora_config",
    "pair_in",
    "resolve_targets",
    "settle",
    "state_dict",
    "verify",
    "write",
]


A_KEY, B_KEY = ".lora_A.weight", ".lora_B.weight"
"""What PEFT puts behind a module's name in a saved adapter."""


def lora_config(
    *,
    rank: int,
    lora_alpha: float,
    use_rslora: bool,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    task_type: str | None,
    base_model_name: str | None = None,
) -> LoraConfig:
    """A stock `peft.LoraConfig`.

    Args:
        rank: r ≥ 1.
        lora_alpha: PEFT's α.
        use_rslora: Scale by α/√r instead of α/r.
        target_modules: `"all-linear"`, a regex, or a list of name endings.
        exclude_modules: A regex or a list of name endings, or None.
        task_type: PEFT's task type.
        base_model_name: What the saved adapter names as its base.

    Returns:
        The configuration, with `init_lora_weights=True`.

    Raises:
        OptionError: PEFT refuses the values.
    """
    if rank < 1:
        raise OptionError(f"rank is {rank}; it must be at least 1.")
    if not (math.isfinite(lora_alpha) and lora_alpha > 0):
        raise OptionError(f"lora_alpha is {lora_alpha}; it must be a finite number above 0.")
    if not target_modules:
        raise OptionError("target_modules is empty; give 'all-linear', endings of names, or a regular expression.")
    for option, value in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        if isinstance(value, str):
            _check_regex(option, value)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    excluded = exclude_modules if exclude_modules is None or isinstance(exclude_modules, str) else list(exclude_modules)
    try:
        return LoraConfig(
            r=rank,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            target_modules=targets,
            exclude_modules=excluded,
            task_type=task_type,
            base_model_name_or_path=base_model_name,
        )
    except (ValueError, TypeError) as error:
        raise OptionError(f"PEFT refuses this LoRA configuration: {error}") from error


def _check_regex(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(f"{option} {pattern!r} is no regular expression: {error}.") from error


def allocated_config(peft_config: LoraConfig, allocation: Mapping[str, Any]) -> LoraConfig:
    """A configuration with ranks that were shared out, at the scaling that each layer had.

    Args:
        peft_config: The configuration of the run.
        allocation: `RunReport.allocation`; empty changes nothing.

    Returns:
        A copy: one entry of `rank_pattern` and `alpha_pattern` for each layer, before what was there.
    """
    config = copy.deepcopy(peft_config)
    if allocation:
        # PEFT reads the names as regular expressions that may match at any dot; the first that matches counts.
        names = {layer: f"^{re.escape(layer)}" for layer in allocation["ranks"]}
        ranks = {names[layer]: rank for layer, rank in allocation["ranks"].items()}
        units = {key: math.sqrt(rank) if config.use_rslora else rank for key, rank in ranks.items()}
        alphas = {names[layer]: scaling * units[names[layer]] for layer, scaling in allocation["scaling"].items()}
        config.rank_pattern = {**ranks, **(config.rank_pattern or {})}
        config.alpha_pattern = {**alphas, **(config.alpha_pattern or {})}
    return config


def state_dict(factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """The factors under the key names of a saved PEFT adapter.

    Args:
        factors: By module name.

    Returns:
        `base_model.model.<module>.lora_A.weight` and `…lora_B.weight`.
    """
    state = {}
    for name, pair in factors.items():
        key_a, key_b = saved_keys(name, pair)
        state[key_a], state[key_b] = pair.A, pair.B
    return state


def factor_pairs(model: nn.Module, adapter_name: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of every layer of an adapter, the parameters themselves.

    Args:
        model: A PeftModel with that adapter.
        adapter_name: The adapter.

    Returns:
        By module name.
    """
    config_of(model, adapter_name)
    assert isinstance(model, PeftModel)
    found = factor_parameters(model.get_base_model(), adapter_name)
    names = [key.removeprefix(PREFIX).removesuffix(A_KEY) for key in found if key.endswith(A_KEY)]
    return {name: (found[f"{PREFIX}{name}{A_KEY}"], found[f"{PREFIX}{name}{B_KEY}"]) for name in names}


def pair_in(state: Mapping[str, Tensor], name: str, *, like: tuple[Tensor, Tensor]) -> LoraFactors:
    """A copy of a layer's factors in a state dict.

    Args:
        state: PEFT key names.
        name: The layer.
        like: A and B whose devices and dtypes the copy takes.

    Returns:
        The factors.
    """
    keys = (f"{PREFIX}{name}{A_KEY}", f"{PREFIX}{name}{B_KEY}")
    a, b = (state[key].detach().to(part, copy=True) for key, part in zip(keys, like, strict=True))
    return LoraFactors(a, b)


def write(model: PeftModel, state: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Writes A and B into an adapter and reads them back; on any failure the adapter is as it was.

    The adapter then computes W + scaling·B·A: the biases of `lora_bias` are zero and DoRA's magnitudes are those of the
    sum. Layers that cannot be initialised keep what they hold, or get PEFT's initialisation where they are on meta.

    Args:
        model: A PeftModel with that adapter.
        state: PEFT key names, as `state_dict` gives them.
        adapter_name: The adapter.

    Raises:
        AdapterError: The factors do not fit, or the adapter holds something else afterwards.
    """
    check_config(config_of(model, adapter_name))
    check_saved_modules(model, adapter_name)
    _same_keys(factor_parameters(model.get_base_model(), adapter_name), state, adapter_name)
    layers = [layer for layer in lora_layers(model.get_base_model()).values() if adapter_name in layer.scaling]
    tokens = [module for module in model.modules() if _trains_tokens(module, adapter_name)]
    before = [saved for layer in (*layers, *tokens) for saved in _snapshot(layer, adapter_name)]
    try:
        for layer in layers:
            materialise(layer, adapter_name, model.peft_config[adapter_name].init_lora_weights)
        for module in tokens:
            _start_tokens(module, adapter_name)
        complete = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        complete.update(state)
        set_peft_model_state_dict(model, complete, adapter_name=adapter_name)
        _check_written(factor_parameters(model.get_base_model(), adapter_name), state)
        for layer in layers:
            if not fault(layer, adapter_name):
                _complete(layer, adapter_name)
        _check_real(model, adapter_name)
    except BaseException as error:
        for saved in before:
            saved.restore()
        if isinstance(error, AdapterError) or not isinstance(error, Exception):
            raise
        raise AdapterError(f"PEFT refused the factors of adapter {adapter_name!r}: {error}") from error


@dataclass(frozen=True)
class _Saved:
    """One parameter of an adapter as it was."""

    owner: nn.Module
    name: str
    parameter: nn.Parameter
    values: Tensor

    def restore(self) -> None:
        setattr(self.owner, self.name, self.parameter)
        if not self.parameter.is_meta:
            self.parameter.data.copy_(self.values)


def _trains_tokens(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, TrainableTokensLayer) and adapter_name in module.trainable_tokens_delta


def _snapshot(layer: LoraLayer | TrainableTokensLayer, adapter_name: str) -> list[_Saved]:
    return [_Saved(owner, name, p, p.detach().clone()) for owner, name, p in own_parameters(layer, adapter_name)]


def _start_tokens(module: TrainableTokensLayer, adapter_name: str) -> None:
    """Gives trainable tokens that are on the meta device the base's rows, as PEFT does elsewhere."""
    tokens = module.trainable_tokens_delta
    if tokens[adapter_name].is_meta:
        values = module.trainable_tokens_original[adapter_name].clone()
        tokens[adapter_name] = nn.Parameter(values, requires_grad=tokens[adapter_name].requires_grad)


def _complete(layer: LoraLayer, adapter_name: str) -> None:
    """What else the function W + scaling·B·A needs, once A and B are written."""
    if adapter_name in layer.lora_B and layer.lora_B[adapter_name].bias is not None:
        layer.lora_B[adapter_name].bias.data.zero_()
    update_magnitude(layer, adapter_name)


def _check_real(model: PeftModel, adapter_name: str) -> None:
    hollow = [name for name, value in model.named_parameters() if value.is_meta and adapter_name in name.split(".")]
    if hollow:
        raise AdapterError(f"{hollow[0]} is still on the meta device after writing: the adapter would be lost.")


def _same_keys(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], adapter_name: str) -> None:
    missing, foreign = sorted(set(parameters) - set(state)), sorted(set(state) - set(parameters))
    if missing or foreign:
        raise AdapterError(
            f"the factors do not fit adapter {adapter_name!r}: {len(missing)} of its tensors are not given "
            f"(first: {missing[:1]}), {len(foreign)} given ones are not in it (first: {foreign[:1]})."
        )
    for key, parameter in parameters.items():
        if parameter.shape != state[key].shape:
            raise AdapterError(f"{key} has shape {tuple(state[key].shape)}, the adapter {tuple(parameter.shape)}.")


def _check_written(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        if parameter.is_meta:
            raise AdapterError(f"{key} is still on the meta device after writing: the adapter would be lost.")
        written = whole(parameter.detach())
        if not torch.equal(written, state[key].to(written.device, written.dtype)):
            raise AdapterError(f"{key} holds other values than were written.")


def apply(
    model: nn.Module,
    peft_config: LoraConfig,
    factors: Mapping[str, LoraFactors],
    adapter_name: str = "default",
    *,
    offset: Offset = "none",
    frozen: Frozen = "none",
) -> PeftModel:
    """Wraps a base model with PEFT and writes the factors; on failure the model is unwrapped again.

    Args:
        model: The base model.
        peft_config: The LoRA configuration.
        factors: By module name.
        adapter_name: Name of the new adapter.
        offset: As `settle` takes it.
        frozen: As `settle` takes it.

    Returns:
        The PeftModel, as `peft.get_peft_model` returns it.
    """
    check_config(peft_config)
    check_adapter_name(adapter_name)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # PEFT draws an A that is overwritten below
        # A report's notes say it, with the names.
        warnings.filterwarnings("ignore", "You have passed exclude_modules")
        peft_model = get_peft_model(model, copy.deepcopy(peft_config), adapter_name=adapter_name)
    try:
        write(peft_model, state_dict(factors), adapter_name)
        settle(peft_model, factors, adapter_name, offset=offset, frozen=frozen)
    except BaseException:
        peft_model.unload()
        for parameter, value in before:
            parameter.requires_grad_(value)
        raise
    return peft_model
