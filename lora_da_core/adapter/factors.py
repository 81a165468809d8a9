"""Where PEFT's layers keep A and B, and whose they are: PEFT's modules to our layers and back."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraConv2dVariant, DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from lora_da_core.errors import TargetError
from lora_da_core.layer_kinds import CLASSES, EXPERTS, KINDS, LayerKind, kind_of_module
from lora_da_core.placement import execution_device, weights_present
from lora_da_core.types import LayerSpec, LoraFactors, StoredFactors

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""

_WRAPPED = ".base_layer"
"""What PEFT puts after a module's name where it wraps what is wrapped already."""


def lora_layers(base: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's LoRA layers by their names; of two that wrap one module, the inner one has `.base_layer` appended."""
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def fault(layer: LoraLayer, adapter_name: str) -> str:
    """Why the adapter of a layer cannot be initialised.

    Args:
        layer: PEFT's layer, which carries the adapter.
        adapter_name: The adapter.

    Returns:
        The reason, to stand after the layer's name; empty where it can.
    """
    module, kind = layer.get_base_layer(), _kind(layer)
    if kind is None or not holders(layer, adapter_name):
        return f"is a {type(module).__name__}; supported are {', '.join(CLASSES)}"
    reason = kind.fault(module)
    if reason:
        return reason
    variant = layer.lora_variant.get(adapter_name)
    if variant is not None and not isinstance(variant, (DoraConv2dVariant, DoraLinearVariant)):
        return f"uses the LoRA variant {type(variant).__name__}, which is not supported"
    rank, in_features, out_features = _sizes(layer, adapter_name)
    if rank > min(in_features, out_features):
        return (
            f"is {out_features} × {in_features}: rank {rank} is above min(in, out) = {min(in_features, out_features)}; "
            "choose a smaller rank, or set one for it in rank_pattern"
        )
    return ""


def holders(layer: LoraLayer, adapter_name: str) -> dict[str, nn.Parameter]:
    """A and B of one of PEFT's layers.

    Args:
        layer: The layer.
        adapter_name: The adapter.

    Returns:
        By what their names in a saved adapter end in; empty where the layer keeps none of these.
    """
    if adapter_name in layer.lora_embedding_A:
        return {part: getattr(layer, part)[adapter_name] for part in ("lora_embedding_A", "lora_embedding_B")}
    if adapter_name not in layer.lora_A:
        return {}
    return {
        "lora_A.weight": layer.lora_A[adapter_name].weight,
        "lora_B.weight": layer.lora_B[adapter_name].weight,
    }


def factor_parameters(base: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """A and B of every layer that can be initialised.

    Args:
        base: A PeftModel's base model.
        adapter_name: The adapter.

    Returns:
        By the names of a saved adapter.
    """
    found = {}
    for name, layer in lora_layers(base).items():
        if adapter_name in layer.scaling and not fault(layer, adapter_name):
            for key, parameter in holders(layer, adapter_name).items():
                found[f"{PREFIX}{name}.{key}"] = parameter
    return found


def held_factors(base: nn.Module, adapter_name: str) -> dict[str, tuple[LayerSpec, LoraFactors]]:
    """What an adapter holds of every layer that can be initialised.

    Args:
        base: A PeftModel's base model.
        adapter_name: The adapter.

    Returns:
        By layer, its specification, and its own A (r, in) and B (out, r).
    """
    found = {}
    for name, layer in lora_layers(base).items():
        if adapter_name in layer.scaling and not fault(layer, adapter_name):
            a, b = holders(layer, adapter_name).values()
            for spec in specs_of(name, layer, adapter_name):
                found[spec.name] = (spec, taken_apart(spec, a, b))
    return found


def specs_of(name: str, layer: LoraLayer, adapter_name: str) -> list[LayerSpec]:
    """The layers that one of PEFT's adapts: one, or one for every expert.

    Args:
        name: Its name.
        layer: PEFT's layer, in which nothing is at fault.
        adapter_name: The adapter.

    Returns:
        The specifications.

    Raises:
        TargetError: PEFT scales the adapter by nothing.
    """
    rank, in_features, out_features = _sizes(layer, adapter_name)
    scaling = float(layer.scaling[adapter_name])
    if not (math.isfinite(scaling) and scaling > 0):
        raise TargetError(f"PEFT scales layer {name} by {scaling}; give a lora_alpha (and alpha_pattern) above 0.")
    kind, parts = _kind(layer), holders(layer, adapter_name)
    assert kind is not None
    (key_a, a), (key_b, b) = parts.items()
    keys, shapes = (f"{name}.{key_a}", f"{name}.{key_b}"), (tuple(a.shape), tuple(b.shape))
    sizes = (in_features, out_features, rank, scaling)
    if not isinstance(layer, ParamWrapper):
        stored = StoredFactors(name, keys, shapes)
        return [LayerSpec(name, kind.name, *sizes, stored=stored, one_hot=kind.one_hot)]
    parameter = f"{base_name(name)}.{layer.parameter_name}"
    stored = StoredFactors(parameter, keys, shapes)
    return [
        LayerSpec(f"{parameter}.{n}", EXPERTS, *sizes, parameter=layer.parameter_name, expert=n, stored=stored)
        for n in range(layer.num_experts)
    ]


def base_name(name: str) -> str:
    """A module's name in the unwrapped model."""
    while name.endswith(_WRAPPED):
        name = name.removesuffix(_WRAPPED)
    return name


def own_parameters(
    layer: LoraLayer | TrainableTokensLayer, adapter_name: str
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter of a layer's adapter.

    Args:
        layer: PEFT's layer.
        adapter_name: The adapter.

    Yields:
        The module that holds it, its name there and the parameter.
    """
    for part in layer.adapter_layer_names:
        holder = getattr(layer, part)
        if adapter_name not in holder:
            continue
        if isinstance(holder, nn.ParameterDict):
            yield holder, adapter_name, holder[adapter_name]
        else:
            for name, parameter in holder[adapter_name].named_parameters(recurse=False):
                yield holder[adapter_name], name, parameter


def materialise(layer: LoraLayer, adapter_name: str, init: bool | str) -> None:
    """Gives what is on the meta device values, at PEFT's own initialisation, where the base layer computes.

    Args:
        layer: PEFT's layer; one whose base has no values, and nothing that brings them, stays as it is.
        adapter_name: The adapter.
        init: PEFT's `init_lora_weights`.
    """
    hollow = [entry for entry in own_parameters(layer, adapter_name) if entry[2].is_meta]
    base = next(layer.get_base_layer().parameters(), torch.empty(0))
    device = execution_device(layer.get_base_layer())
    if not hollow or device is None:
        return
    for owner, name, parameter in hollow:
        # On meta PEFT leaves out its cast to the base's dtype, by which a float64 model gets a float64 adapter.
        dtype = torch.promote_types(parameter.dtype, base.dtype) if base.is_floating_point() else parameter.dtype
        made = torch.zeros_like(parameter, device=device, dtype=dtype)
        setattr(owner, name, nn.Parameter(made, requires_grad=parameter.requires_grad))
    if fault(layer, adapter_name):
        # `False` keeps what torch drew when the layer was made, which on meta is nothing.
        layer.reset_lora_parameters(adapter_name, init or True)
        update_magnitude(layer, adapter_name)


def update_magnitude(layer: LoraLayer, adapter_name: str) -> None:
    """Gives DoRA, where it is used, the magnitudes of W + scaling·B·A.

    Args:
        layer: PEFT's layer.
        adapter_name: The adapter.
    """
    if adapter_name not in layer.lora_magnitude_vector:
        return
    dora, (a, b) = layer.lora_magnitude_vector[adapter_name], holders(layer, adapter_name).values()
    magnitude, scaling = dora.weight, layer.scaling[adapter_name]
    with torch.no_grad(), weights_present(layer.get_base_layer()):
        dora.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=scaling)
        magnitude.copy_(dora.weight)
    # PEFT makes a new parameter, which an optimiser would not know.
    dora.weight = magnitude


def as_stored(specs: Sequence[LayerSpec], factors: Mapping[str, LoraFactors], seed: int) -> dict[str, LoraFactors]:
    """Factors of layers as the adapter stores them.

    An expert without factors gets PEFT's default: B zero, and A uniform between ±1/√in.

    Args:
        specs: All layers of the adapter.
        factors: A (r, in) and B (out, r) by layer; of all layers that are not experts.
        seed: Of the A that are drawn.

    Returns:
        By the names they are stored under.
    """
    together: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        together.setdefault(spec.name if spec.stored is None else spec.stored.name, []).append(spec)
    found = {}
    for name, layers in together.items():
        first, stored = layers[0], layers[0].stored
        pair = factors[first.name] if first.expert is None else _stacked(layers, factors, seed)
        if stored is not None:
            # An allocator may have given it another rank than the configuration has.
            a, b = pair.A.reshape(-1, *stored.shapes[0][1:]), pair.B.reshape(len(pair.B), -1, *stored.shapes[1][2:])
            pair = LoraFactors(a, b, stored.keys)
        found[name] = pair
    return found


def saved_keys(name: str, pair: LoraFactors) -> tuple[str, str]:
    """What A and B are called in a saved adapter.

    Args:
        name: The layer, as `as_stored` names it.
        pair: Its factors.

    Returns:
        The two keys.
    """
    key_a, key_b = pair.keys or (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    return PREFIX + key_a, PREFIX + key_b


def taken_apart(spec: LayerSpec, a: Tensor, b: Tensor) -> LoraFactors:
    """A layer's A (r, in) and B (out, r) from what the adapter stores.

    Args:
        spec: The layer.
        a: A as stored.
        b: B as stored.

    Returns:
        The layer's own.
    """
    a, b = a.flatten(1), b.flatten(1)
    if spec.expert is None:
        return LoraFactors(a, b)
    count = len(a) // spec.rank
    return LoraFactors(a[spec.expert * spec.rank : (spec.expert + 1) * spec.rank], b[:, spec.expert :: count])


def _stacked(layers: Sequence[LayerSpec], factors: Mapping[str, LoraFactors], seed: int) -> LoraFactors:
    known = next((factors[layer.name] for layer in layers if layer.name in factors), None)
    first = layers[0]
    like = torch.empty(0) if known is None else known.A
    a = like.new_empty(len(layers), first.rank, first.in_features)
    b = like.new_zeros(first.out_features, first.rank, len(layers))
    for number, layer in enumerate(layers):
        if layer.name in factors:
            a[number], b[:, :, number] = factors[layer.name].A, factors[layer.name].B
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{layer.name}".encode()))
            drawn = torch.rand(first.rank, first.in_features, generator=generator, dtype=torch.float64)
            a[number] = (2 * drawn - 1) / math.sqrt(first.in_features)
    return LoraFactors(a, b)


def _kind(layer: LoraLayer) -> LayerKind | None:
    if isinstance(layer, ParamWrapper):
        module = layer.get_base_layer()
        return KINDS[EXPERTS] if layer.parameter_name in _expert_parameters(module) else None
    return kind_of_module(layer.get_base_layer())


def _expert_parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, value in module.named_parameters(recurse=False) if value.ndim == 3)


def _sizes(layer: LoraLayer, adapter_name: str) -> tuple[int, int, int]:
    a, b = holders(layer, adapter_name).values()
    parts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    return len(a) // parts, a[0].numel(), len(b)
