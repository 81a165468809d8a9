"""Putting a model into a state for measuring, and looking at what it computes, without leaving a trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_da_core.errors import ModelError, OptionError
from lora_da_core.placement import reshard

_REPACKS = "support_avx512bf16_for_cpu"
"""By this attribute bitsandbytes decides whether a forward pass on a CPU re-packs 4-bit weights in place, with loss."""


_OF_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens_")
"""Parts of names of what an adapter adds to a model; PEFT may leave that on meta until it is written."""


def check_model(model: Any) -> None:
    """Refuses what cannot be run, before any work.

    Args:
        model: What was given as the model.

    Raises:
        OptionError: It is no module.
        ModelError: A weight holds no values, and nothing is there that would bring them.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"model is a {type(model).__name__}; give a torch.nn.Module, such as from_pretrained returns."
        )
    # accelerate keeps offloaded weights on meta and brings them by a hook on the module or one around it.
    brought = tuple(name for name, module in model.named_modules() if hasattr(module, "_hf_hook"))
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not any(part in name for part in _OF_ADAPTERS) and not name.startswith(brought):
            raise ModelError(
                f"{name} is on the meta device and holds no values; load the weights before (from_pretrained, or "
                "to_empty and load_state_dict)."
            )


@contextlib.contextmanager
def attention_without_plans() -> Iterator[None]:
    """Keeps PyTorch's attention from cuDNN, unless no other kernel that stores no score matrix is allowed.

    cuDNN compiles a plan for every shape that a process meets, forwards and backwards: over batches of many lengths,
    each met once, that took 13 s on an H200 where all passes took 5.5 s. With plans at hand it was no faster.
    """
    attention: Any = torch.backends.cuda
    if not (attention.cudnn_sdp_enabled() and attention.mem_efficient_sdp_enabled()):
        yield
        return
    attention.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        attention.enable_cudnn_sdp(True)


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen weights and no compiled code, put back as found whatever happens.

    What `module.compile()` has compiled runs as it is written meanwhile: compiled code would not see new hooks.
    Attention is that of `attention_without_plans`.
    """
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    repacking = [module for module in model.modules() if getattr(module, _REPACKS, False)]
    modes = [(module, module.training) for module in model.modules()]
    trainable = [
        (module, name, parameter, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    try:
        model.eval()
        for module, _ in compiled:
            module._compiled_call_impl = None
        for module in repacking:
            setattr(module, _REPACKS, False)
        for _, _, parameter, _ in trainable:
            parameter.requires_grad_(False)
        with attention_without_plans():
            yield
    finally:
        for module in repacking:
            setattr(module, _REPACKS, True)
        for module, mode in modes:
            module.training = mode
        for module, code in compiled:
            module._compiled_call_impl = code
        reshard(model)
        for module, name, parameter, flag in trainable:
            # accelerate puts a new parameter into the place of an offloaded one whenever it has run.
            for each in (parameter, module._parameters[name]):
                if each is not None:
                    each.requires_grad_(flag)


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Puts back what shuffling, collating, dropout and a model's own noise draw from: Python's, numpy's, torch's."""
    plain, arrays = random.getstate(), np.random.get_state()
    # Where CUDA has not started yet, nothing has been drawn there, and asking would start it.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


@contextlib.contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Lets gradient checkpointing that is switched on act in evaluation mode, as transformers' layers do not.

    Whether a layer checkpoints is decided in training mode only; what it computes, when it is run or run again, is
    computed in evaluation mode. The reentrant kind gives gradients to inputs that require them alone, so embeddings
    then do.
    """
    layers: list[Any] = [module for module in model.modules() if _checkpoints(module) and not module.training]
    settings = [getattr(layer._gradient_checkpointing_func, "keywords", {}) for layer in layers]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_checkpointed(layer))
        if any(setting.get("use_reentrant", False) for setting in settings):
            embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
            handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
            stack.callback(handle.remove)
        yield


def _checkpoints(module: nn.Module) -> bool:
    """Whether a module is one of transformers' checkpointing layers, switched on; others may drop out as they train."""
    ours = any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)
    return ours and bool(module.gradient_checkpointing) and hasattr(module, "_gradient_checkpointing_func")


@contextlib.contextmanager
def _checkpointed(layer: Any) -> Iterator[None]:
    checkpoint = layer._gradient_checkpointing_func

    def in_evaluation(run: Callable[..., Any], *args: Any, **rest: Any) -> Any:
        def evaluated(*inner: Any) -> Any:
            layer.training = False
            try:
                return run(*inner)
            finally:
                layer.training = True

        return checkpoint(evaluated, *args, **rest)

    layer._gradient_checkpointing_func, layer.training = in_evaluation, True
    try:
        yield
    finally:
        layer._gradient_checkpointing_func, layer.training = checkpoint, False


def first_non_finite_module(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The first module, in the order of the forward pass, whose output tensor is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
                found.append(name)

        return look

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            handle = module.register_forward_hook(watch(name))
            stack.callback(handle.remove)
        run()
    return found[0] if found else None


def quantization_notes(modules: Mapping[str, nn.Module]) -> list[str]:
    """Says so where layers' weights are quantized, which moves the gradient.

    Args:
        modules: The layers by name.

    Returns:
        One note, or none.
    """
    kinds = [
        f"{type(module).__name__} of {type(weight).__name__}"
        for module in modules.values()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and _is_quantized(weight)
    ]
    if not kinds:
        return []
    return [
        f"{len(kinds)} of {len(modules)} layers are quantized ({', '.join(sorted(set(kinds)))}): gradients and Fisher "
        "are those of the quantized weights, not of the ones before quantization"
    ]


def _is_quantized(weight: Tensor) -> bool:
    """Packed codes, or torchao's tensors, which name the dtype that they de-quantize to."""
    return not weight.is_floating_point() or type(weight).__module__.partition(".")[0] == "torchao"
