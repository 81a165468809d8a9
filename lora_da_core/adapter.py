"""LoraFactors to PEFT, all or nothing: the only room that imports peft."""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_da_core.errors import AdapterError, OptionError, TargetError
from lora_da_core.types import LayerSpec, LoraFactors, RunReport

PREFIX = "base_model.model."
KINDS = {"Linear": "linear", "Conv1D": "conv1d"}
"""Supported module classes: both compute y = Wx + b over the last dimension."""

FINGERPRINT_ELEMENTS = 1024
"""Elements of each parameter that enter a fingerprint."""

PLAIN_INITS = (True, False, "gaussian")
"""PEFT's own initialisations that leave the base weights alone, so that ours may replace what they wrote."""


@dataclass(frozen=True)
class Targets:
    """The layers an adapter adapts: specifications, and the base modules by name."""

    specs: tuple[LayerSpec, ...]
    modules: Mapping[str, nn.Module]


@dataclass(frozen=True)
class Check:
    """One line of `lora-da verify`."""

    name: str
    passed: bool
    detail: str


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
        raise OptionError(f"lora_alpha is {lora_alpha}; it must be a number above 0.")
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
        TargetError: The model is not a PeftModel, or has no such LoRA adapter.
    """
    if not isinstance(model, PeftModel):
        raise TargetError(f"a PeftModel is needed, this is a {type(model).__name__}; call get_peft_model first.")
    if adapter_name not in model.peft_config:
        names = ", ".join(model.peft_config)
        raise TargetError(f"the model has no adapter {adapter_name!r}; it has: {names}.")
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig):
        raise TargetError(f"adapter {adapter_name!r} is {config.peft_type}, not LoRA.")
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
        TargetError: The model is not a PeftModel and no configuration is given, or its base function is not to be had.
        OptionError: The adapter has another rank or scaling than the configuration that is given.
    """
    layers = _lora_layers(base_of(model))
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
        return own
    return peft_config


def resolve_targets(model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default") -> Targets:
    """Asks PEFT itself which modules the configuration adapts, at what rank and scaling.

    Args:
        model: A base model, which is left as it is, or a PeftModel that has the adapter.
        peft_config: The LoRA configuration.
        adapter_name: The adapter's name.

    Returns:
        The layers in the model's order.

    Raises:
        TargetError: Nothing matches, or a match cannot be initialised; the message names it.
        OptionError: The configuration asks PEFT for an initialisation that would change the base.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TargetError("the model is compiled; pass the model that was given to torch.compile (model._orig_mod).")
    if peft_config.init_lora_weights not in PLAIN_INITS:
        raise OptionError(
            f"init_lora_weights={peft_config.init_lora_weights!r} is another initialisation; leave it at True."
        )
    if peft_config.target_parameters:
        raise TargetError("target_parameters is not supported yet; use target_modules.")
    base = base_of(model)
    layers = _lora_layers(base) if isinstance(model, PeftModel) else _lora_layers(_skeleton(base, peft_config))
    specs = [_spec(name, layer, adapter_name) for name, layer in layers.items() if adapter_name in layer.scaling]
    if not specs:
        raise TargetError(f"no layer carries the adapter {adapter_name!r}.")
    named = dict(base.named_modules())
    modules = {spec.name: _base_layer(named[spec.name]) for spec in specs}
    return Targets(tuple(specs), modules)


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _lora_layers(base: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def _skeleton(base: nn.Module, peft_config: LoraConfig) -> nn.Module:
    """A copy of the module tree that shares every weight, with PEFT's layers on the meta device injected."""
    tensors: Iterator[Tensor] = itertools.chain(base.parameters(), base.buffers())
    trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clone = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
            get_peft_model(clone, copy.deepcopy(peft_config), adapter_name="default", low_cpu_mem_usage=True)
        return clone
    except (ValueError, re.error) as error:
        raise TargetError(_no_match(base, peft_config, error)) from error
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _no_match(base: nn.Module, peft_config: LoraConfig, error: Exception) -> str:
    targets = peft_config.target_modules
    wanted = [targets] if isinstance(targets, str) else sorted(targets or [])
    endings = sorted(
        {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if type(module).__name__ in KINDS}
    )
    close = [match for name in wanted for match in difflib.get_close_matches(name, endings, n=2)]
    hint = f"Closest: {', '.join(close)}. " if close else ""
    return (
        f"target_modules {wanted} cannot be adapted. {hint}Linear layers here: {', '.join(endings)}. PEFT says: {error}"
    )


def _spec(name: str, layer: LoraLayer, adapter_name: str) -> LayerSpec:
    module = layer.get_base_layer()
    classes = [cls.__name__ for cls in type(module).__mro__]
    kind = next((KINDS[cls] for cls in classes if cls in KINDS), None)
    if kind is None or adapter_name not in layer.lora_A:
        raise TargetError(
            f"layer {name} is a {type(module).__name__}; supported are {', '.join(KINDS)}. "
            "Leave it out with exclude_modules."
        )
    if adapter_name in layer.lora_variant:
        variant = type(layer.lora_variant[adapter_name]).__name__
        raise TargetError(f"layer {name} uses the LoRA variant {variant}, which is not supported.")
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    rank, in_features, out_features = a.shape[0], a.shape[1], b.shape[0]
    if rank > min(in_features, out_features):
        raise TargetError(
            f"rank {rank} is above min(in, out) = {min(in_features, out_features)} of layer {name} "
            f"({out_features} × {in_features}). Choose a smaller rank, or set one for it in rank_pattern."
        )
    scaling = float(layer.scaling[adapter_name])
    if not (math.isfinite(scaling) and scaling > 0):
        raise TargetError(f"PEFT scales layer {name} by {scaling}; give a lora_alpha (and alpha_pattern) above 0.")
    return LayerSpec(name, kind, in_features, out_features, rank, scaling)


def state_dict(factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """The factors under the key names of a saved PEFT adapter.

    Args:
        factors: By module name.

    Returns:
        `base_model.model.<module>.lora_A.weight` and `…lora_B.weight`.
    """
    state = {}
    for name, pair in factors.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = pair.A
        state[f"{PREFIX}{name}.lora_B.weight"] = pair.B
    return state


def write(model: PeftModel, state: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Writes A and B into an adapter and reads them back; on any failure the adapter is as it was.

    Args:
        model: A PeftModel with that adapter.
        state: PEFT key names, as `state_dict` gives them.
        adapter_name: The adapter.

    Raises:
        AdapterError: The adapter holds something else afterwards.
    """
    config_of(model, adapter_name)
    parameters = _adapter_parameters(model, adapter_name)
    _same_keys(parameters, state, adapter_name)
    on_meta = any(parameter.is_meta for parameter in parameters.values())
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    complete = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    complete.update(state)
    try:
        set_peft_model_state_dict(model, complete, adapter_name=adapter_name, low_cpu_mem_usage=on_meta)
        _check_written(_adapter_parameters(model, adapter_name), state)
    except Exception as error:
        for key, parameter in _adapter_parameters(model, adapter_name).items():
            if not parameter.is_meta and not before[key].is_meta:
                parameter.data.copy_(before[key])
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"PEFT refused the factors of adapter {adapter_name!r}: {error}") from error


def _adapter_parameters(model: PeftModel, adapter_name: str) -> dict[str, nn.Parameter]:
    found = {}
    for name, layer in _lora_layers(model.get_base_model()).items():
        for part in ("lora_A", "lora_B"):
            factors = getattr(layer, part)
            if adapter_name in factors:
                found[f"{PREFIX}{name}.{part}.weight"] = factors[adapter_name].weight
    return found


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
        if not torch.equal(parameter.detach(), state[key].to(parameter.device, parameter.dtype)):
            raise AdapterError(f"{key} holds other values than were written.")


def apply(
    model: nn.Module, peft_config: LoraConfig, factors: Mapping[str, LoraFactors], adapter_name: str = "default"
) -> PeftModel:
    """Wraps a base model with PEFT and writes the factors; on failure the model is unwrapped again.

    Args:
        model: The base model.
        peft_config: The LoRA configuration.
        factors: By module name.
        adapter_name: Name of the new adapter.

    Returns:
        The PeftModel, as `peft.get_peft_model` returns it.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):  # PEFT draws an A that is overwritten below
        peft_model = get_peft_model(model, copy.deepcopy(peft_config), adapter_name=adapter_name)
    try:
        write(peft_model, state_dict(factors), adapter_name)
    except BaseException:
        peft_model.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    return peft_model


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, whatever its device."""
    data = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the base parameters' names, shapes, dtypes and evenly spaced elements: cheap at any size."""
    whole = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(model)):
        whole.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            whole.update(digest(flat[:: max(1, len(flat) // FINGERPRINT_ELEMENTS)]).encode())
    return whole.hexdigest()


def base_digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every base parameter, by its name in the unwrapped model."""
    return {name: digest(parameter) for name, parameter in _base_parameters(model)}


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in base_of(model).named_parameters(remove_duplicate=False):
        # PEFT keeps the base's own module beside the trainable copy of it that `modules_to_save` asks for.
        if ".lora_" not in name and ".modules_to_save." not in name:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def verify(directory: Path, model: nn.Module, report: RunReport, batch: Mapping[str, Tensor]) -> list[Check]:
    """Reloads a saved adapter with stock PEFT and compares it with the run's report.

    Args:
        directory: The adapter's directory.
        model: A fresh base model; it carries the adapter afterwards.
        report: The run's report.
        batch: An input of the model, without labels.

    Returns:
        One check each, passed or not.

    Raises:
        AdapterError: PEFT cannot load the adapter onto this model.
    """
    seen = fingerprint(model)
    digests = base_digests(model)
    before = _logits(model, batch)
    try:
        loaded = PeftModel.from_pretrained(model, str(directory))
    except Exception as error:
        raise AdapterError(f"PEFT cannot load {directory} onto this model: {error}") from error
    loaded.eval()
    parameters = _adapter_parameters(loaded, "default")
    expected = {f"{PREFIX}{layer.name}.lora_A.weight": layer.digest_A for layer in report.layers}
    expected.update({f"{PREFIX}{layer.name}.lora_B.weight": layer.digest_B for layer in report.layers})
    wrong = [key for key, value in expected.items() if key not in parameters or digest(parameters[key]) != value]
    default = sorted(set(parameters) - set(expected))
    after = base_digests(loaded)
    changed = [name for name, value in digests.items() if after.get(name) != value]
    with loaded.disable_adapter():
        disabled = _logits(loaded, batch)
    moved = float((_logits(loaded, batch) - before).abs().max())
    return [
        Check("every A and B equals what was computed", not wrong, _listed(wrong, len(expected), "tensors")),
        Check("no module left at its default", not default, _listed(default, len(parameters), "tensors")),
        Check("the base is the one the run saw", seen == report.base, "by fingerprint"),
        Check("base weights bitwise unchanged", not changed, _listed(changed, len(digests), "weights")),
        Check("disable_adapter gives the base logits exactly", torch.equal(before, disabled), "bitwise comparison"),
        Check("the adapter changes the logits", moved > 0, f"largest change {moved:.3g}"),
    ]


def _listed(faults: Sequence[str], total: int, noun: str) -> str:
    return f"{len(faults)} of {total} {noun} differ, the first is {faults[0]}" if faults else f"{total} {noun}"


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    mode = model.training
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    model.train(mode)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits
