"""Putting a model into a state for measuring, and looking at what it computes, without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen weights and no compiled code, put back as found whatever happens.

    What `module.compile()` has compiled runs as it is written meanwhile: compiled code would not see new hooks.
    """
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    modes = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for module, _ in compiled:
            module._compiled_call_impl = None
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, code in compiled:
            module._compiled_call_impl = code
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


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
