"""Whether a saved adapter is what was computed, on the base it was computed for: digests, fingerprints, reloading."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from lora_da_core.adapter.factors import held_factors, lora_layers, materialise
from lora_da_core.adapter.targets import base_of
from lora_da_core.errors import AdapterError
from lora_da_core.placement import is_offloaded, present_parameters, whole
from lora_da_core.types import RunReport

LONGEST_REASON = 400
"""Characters that are shown of why an adapter cannot be loaded."""

FINGERPRINT_ELEMENTS = 1024
"""Elements of each parameter that enter a fingerprint."""


@dataclass(frozen=True)
class Check:
    """One line of `lora-da verify`."""

    name: str
    passed: bool
    detail: str


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, whatever its device."""
    parts = _parts(tensor)
    if parts is not None:
        return hashlib.sha256("".join(map(digest, parts)).encode()).hexdigest()
    data = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the base parameters' names, shapes, dtypes and evenly spaced elements: cheap at any size."""
    total = hashlib.sha256()
    for _, entry in sorted(
        (name, _fingerprint(name, values, scales)) for name, values, scales in _base_parameters(model)
    ):
        total.update(entry.encode())
    return total.hexdigest()


def _fingerprint(name: str, parameter: Tensor, scales: Sequence[Tensor]) -> str:
    """What one parameter, and what else its values depend on, adds to a fingerprint."""
    entry = f"{name} {tuple(parameter.shape)} {parameter.dtype}"
    if parameter.is_meta:
        return entry
    flats = [part.detach().reshape(-1) for part in [*(_parts(parameter) or [parameter]), *scales]]
    return entry + "".join(digest(flat[:: max(1, len(flat) // FINGERPRINT_ELEMENTS)]) for flat in flats)


def _parts(tensor: Tensor) -> list[Tensor] | None:
    """The plain tensors of one that packs several, as torchao's codes and scales, by torch's subclass protocol."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return None
    inner = [getattr(tensor, name) for name in flatten()[0]]
    return [part for found in inner for part in (_parts(found) or [found])]


def _scales(module: nn.Module, parameter: nn.Parameter) -> list[Tensor]:
    """What bitsandbytes keeps beside a parameter's codes: of 8 bits the rows' scales, of 4 bits all of the state."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is not None:
        found = state.as_dict(packed=False)
        values = [found[name] for name in sorted(found)]
        return [torch.as_tensor(value) for value in values if isinstance(value, (Tensor, float))]
    # The first forward pass moves the scales from the parameter to the module.
    rows = getattr(parameter, "SCB", None)
    if rows is None and parameter is getattr(module, "weight", None):
        rows = getattr(getattr(module, "state", None), "SCB", None)
    return [] if rows is None else [rows]


def base_digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every base parameter, of a packed one its scales included, by its name in the unwrapped model."""
    found = {}
    for name, parameter, scales in _base_parameters(model):
        parts = [digest(part) for part in (parameter, *scales)]
        found[name] = parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()
    return found


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Every base parameter's name in the unwrapped model, the parameter, and what else its values depend on.

    The values of an offloaded one are there until the next is asked for.
    """
    base = base_of(model)
    for full_name, parameter in present_parameters(base):
        # PEFT keeps the base's own module beside the trainable copy of it that `modules_to_save` asks for.
        if not any(part in full_name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_")):
            scales = _scales(base.get_submodule(full_name.rpartition(".")[0]), parameter)
            name = full_name
            for wrapper in (".token_adapter.", ".base_layer.", ".original_module."):
                while wrapper in name:  # what wraps several parameters of one module is nested
                    name = name.replace(wrapper, ".")
            yield name, whole(parameter), scales


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
        loaded = _loaded(model, directory)
    except Exception as error:
        why = textwrap.shorten(str(error), LONGEST_REASON)  # torch names every tensor that does not fit
        raise AdapterError(f"PEFT cannot load {directory} onto this model: {why}") from error
    loaded.eval()
    held = held_factors(loaded.get_base_model(), "default")
    reported = {layer.name: (layer.digest_A, layer.digest_B) for layer in report.layers}
    found = {name: (digest(pair.A), digest(pair.B)) for name, (_, pair) in held.items()}
    wrong = [name for name, digests in reported.items() if found.get(name) != digests]
    # Of fused experts some may have seen no data.
    stored = {name: spec.name if spec.stored is None else spec.stored.name for name, (spec, _) in held.items()}
    default = sorted(set(stored.values()) - {stored[name] for name in reported if name in stored})
    after = base_digests(loaded)
    changed = [name for name, value in digests.items() if after.get(name) != value]
    with loaded.disable_adapter():
        disabled = _logits(loaded, batch)
    moved = float((_logits(loaded, batch) - before).abs().max())
    return [
        Check("every A and B equals what was computed", not wrong, _listed(wrong, len(reported), "layers")),
        Check(
            "no module that can be initialised is left at its default",
            not default,
            _listed(default, len(set(stored.values())), "modules"),
        ),
        Check("the base is the one the run saw", seen == report.base, "by fingerprint"),
        Check("base weights bitwise unchanged", not changed, _listed(changed, len(digests), "weights")),
        Check("disable_adapter gives the base logits exactly", torch.equal(before, disabled), "bitwise comparison"),
        _effect(moved, [pair.B for _, pair in held.values()]),
    ]


def _effect(moved: float, outputs: Sequence[Tensor]) -> Check:
    """A start of B = 0, of some presets and of a search that keeps no step, leaves the base's function as it is."""
    if any(bool(B.any()) for B in outputs):
        return Check("the adapter changes the logits", moved > 0, f"largest change {moved:.3g}")
    return Check(
        "the adapter starts at the base's logits, as every B is zero", moved == 0, f"largest change {moved:.3g}"
    )


def _loaded(model: nn.Module, directory: Path) -> PeftModel:
    """The model with a saved adapter, by stock PEFT, which keeps what accelerate offloads where it is."""
    if not is_offloaded(model):
        return PeftModel.from_pretrained(model, str(directory))
    # Left to itself PEFT would place the whole model anew, with its own choice of what is offloaded.
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        loaded = PeftModel.from_pretrained(model, str(directory), low_cpu_mem_usage=True)
    finally:
        if device_map is not None:
            model.hf_device_map = device_map
    # PEFT has moved the values to where the base's are, on meta, so they are gone; it reads them again.
    for layer in lora_layers(loaded.get_base_model()).values():
        materialise(layer, "default", True)
    set_peft_model_state_dict(loaded, load_peft_weights(str(directory), device="cpu"))
    return loaded


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
