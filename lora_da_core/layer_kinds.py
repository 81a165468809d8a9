"""The kinds of layers: how each module's inputs and outputs become the rows of y = Wx, and how it is watched.

One row is one token: a position of a text, a patch that a kernel sees, a place of an image. Rows are in the order of
the samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_da_core.operators import LinearMap
from lora_da_core.types import LayerSpec


@dataclass(frozen=True)
class Routed:
    """Which of a module's tokens reach a layer of it.

    Attributes:
        places: (k,), int64, their numbers among all tokens of the module, in the order of the layer's rows.
        total: How many tokens the module has.
    """

    places: Tensor
    total: int


@dataclass(frozen=True)
class Call:
    """One run of a layer.

    Attributes:
        layer: The layer's name.
        inputs: What its module was given.
        output: What it makes of it, not yet given on.
        routed: Which tokens these are; None where all tokens of the module reach the layer.
    """

    layer: str
    inputs: Tensor
    output: Tensor
    routed: Routed | None = None


Visit = Callable[[Call], Tensor]
"""Looks at a call; what it returns takes the output's place."""


class LayerKind(ABC):
    """How one kind of module computes y = Wx row by row, W (out, in)."""

    one_hot = False
    """Whether x has a single 1; its rows are then the places of these, (rows,), int64."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fault(self, module: nn.Module) -> str:
        """Why a module of this kind cannot be initialised, to stand after its name; empty where it can."""
        return ""

    def reading(self, module: nn.Module) -> Hashable:
        """What else than the input tensor decides the rows; layers share statistics only where it is equal."""
        return ()

    @abstractmethod
    def rows(self, module: nn.Module, inputs: Tensor, output_grads: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of a call.

        Args:
            module: The layer's module.
            inputs: What it was given.
            output_grads: Gradient of its output, or None.

        Returns:
            x (rows, in), of a one-hot kind (rows,), and g (rows, out) with Σ g xᵀ the gradient of W.
        """

    @abstractmethod
    def changed(self, module: nn.Module, output: Tensor, inputs: Tensor, change: LinearMap) -> Tensor:
        """The output as it were with weights W + change, (out, in), in the output's shape and dtype."""

    def watch(self, module: nn.Module, layers: Sequence[LayerSpec], visit: Visit) -> Callable[[], None]:
        """Has every run of a module's layers visited; returns what ends it."""
        (layer,) = layers

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return visit(Call(layer.name, args[0], output)) if args else output

        return module.register_forward_hook(hook).remove


class RowWise(LayerKind):
    """y = Wx over the last dimension, every other dimension counting tokens: `nn.Linear`, transformers' `Conv1D`."""

    def rows(self, module: nn.Module, inputs: Tensor, output_grads: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return inputs.flatten(0, -2), None if output_grads is None else output_grads.flatten(0, -2)

    def changed(self, module: nn.Module, output: Tensor, inputs: Tensor, change: LinearMap) -> Tensor:
        rows = inputs.flatten(0, -2).to(change.device, change.dtype)
        return output + change.apply_to_rows(rows).reshape(output.shape).to(output)


class Convolution(LayerKind):
    """A 2-D convolution as y = Wx on the patches that its kernel sees, W (out, channels·height·width).

    Its tokens are the places of the output, all of which belong to the image's sample (Grosse & Martens, "A
    Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016, section 3).
    """

    def fault(self, module: nn.Module) -> str:
        if module.groups != 1:
            return f"is a Conv2d of {module.groups} groups, whose adapter PEFT cannot merge; one group is supported"
        for option, plain in (("dilation", (1, 1)), ("padding_mode", "zeros")):
            if getattr(module, option) != plain:
                return f"is a Conv2d with {option}={getattr(module, option)!r}, which PEFT leaves out of its adapter"
        return ""

    def reading(self, module: Any) -> Hashable:
        return (module.kernel_size, module.stride, tuple(module._reversed_padding_repeated_twice))

    def rows(self, module: nn.Module, inputs: Tensor, output_grads: Tensor | None) -> tuple[Tensor, Tensor | None]:
        grads = None if output_grads is None else output_grads.flatten(2).mT.flatten(0, 1)
        return self._patches(module, inputs), grads

    def changed(self, module: nn.Module, output: Tensor, inputs: Tensor, change: LinearMap) -> Tensor:
        rows = change.apply_to_rows(self._patches(module, inputs).to(change.device, change.dtype))
        images, channels, *size = output.shape
        return output + rows.reshape(images, -1, channels).mT.reshape(images, channels, *size).to(output)

    @staticmethod
    def _patches(module: Any, inputs: Tensor) -> Tensor:
        # Padded by hand, since "same" may pad one side more than the other.
        padded = functional.pad(inputs, module._reversed_padding_repeated_twice)
        return functional.unfold(padded, module.kernel_size, stride=module.stride).mT.flatten(0, 1)


class Embedding(LayerKind):
    """A table of vectors as y = Wx with x one-hot, W (dimension, vocabulary) the transpose of what is stored."""

    one_hot = True

    def fault(self, module: Any) -> str:
        if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return f"is a {type(module).__name__}, which does more than look its input up"
        if module.max_norm is not None:
            return "is an Embedding with max_norm, which changes the table while it is read"
        if module.scale_grad_by_freq:
            return "is an Embedding with scale_grad_by_freq, whose gradient depends on what else is in the batch"
        return ""

    def reading(self, module: Any) -> Hashable:
        entries: int = module.num_embeddings
        return entries

    def rows(self, module: Any, inputs: Tensor, output_grads: Tensor | None) -> tuple[Tensor, Tensor | None]:
        places = inputs.flatten()
        if output_grads is None:
            return places, None
        grads = output_grads.flatten(0, -2) * _embed_scale(module)
        if module.padding_idx is not None:
            # The padding's row has no gradient, neither in the table nor in PEFT's A.
            grads = grads.masked_fill((places == module.padding_idx).unsqueeze(1), 0.0)
        return places, grads

    def changed(self, module: nn.Module, output: Tensor, inputs: Tensor, change: LinearMap) -> Tensor:
        rows = change.apply_to_rows(inputs.flatten().to(change.device)) * _embed_scale(module)
        return output + rows.reshape(output.shape).to(output)


def _embed_scale(module: nn.Module) -> float:
    """What some of transformers' embeddings (Gemma 3) multiply their vectors by, as PEFT does its part too."""
    return float(getattr(module, "embed_scale", 1.0))


class Experts(LayerKind):
    """Fused experts: parameters (experts, out, in) that one module applies to the tokens routed to each expert.

    The module must be of the shape that transformers 5 gives its mixtures of experts. While it is watched, its
    forward pass is replaced by the loop over experts that transformers calls eager, whichever implementation is set.
    """

    def fault(self, module: nn.Module) -> str:
        first = self._first(module)
        stacks: list[Any] = [getattr(module, name, None) for name in (first, "down_proj")]
        if not all(isinstance(stack, nn.Parameter) and stack.ndim == 3 for stack in stacks) or not (
            hasattr(module, "act_fn") or hasattr(module, "_apply_gate")
        ):
            return f"is a {type(module).__name__}; of bare parameters only fused experts of transformers are supported"
        if getattr(module, "has_post_expert_norm", False):
            return "has a norm after each expert, which is not supported"
        if getattr(module, "_is_expert_parallel", False):
            return "is divided among devices, which is not supported"
        if hasattr(module, "_hf_hook"):
            return "holds experts that accelerate offloads or places, which is not supported"
        if not all(stack.is_floating_point() for stack in stacks):
            return "holds quantized experts, which are not supported"
        return ""

    def rows(self, module: nn.Module, inputs: Tensor, output_grads: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return inputs, output_grads

    def changed(self, module: nn.Module, output: Tensor, inputs: Tensor, change: LinearMap) -> Tensor:
        return output + change.apply_to_rows(inputs.to(change.dtype)).to(output.dtype)

    def watch(self, module: nn.Module, layers: Sequence[LayerSpec], visit: Visit) -> Callable[[], None]:
        names = {(layer.parameter, layer.expert): layer.name for layer in layers}
        before = module.__dict__.get("forward")

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return self._forward(module, names, visit, hidden_states, top_k_index, top_k_weights)

        module.forward = forward

        def end() -> None:
            del module.forward
            if before is not None:
                module.forward = before

        return end

    def _forward(
        self,
        module: Any,
        names: Mapping[tuple[str, int | None], str],
        visit: Visit,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        first = self._first(module)
        final = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= len(module.down_proj):  # a token that goes nowhere
                continue
            position, token = torch.where(top_k_index.mT == expert)
            routed = Routed(token, len(hidden_states))

            def apply(name: str, inputs: Tensor, expert: int = expert, routed: Routed = routed) -> Tensor:
                output = _stacked_linear(module, name, expert, inputs)
                layer = names.get((name, expert))
                return output if layer is None else visit(Call(layer, inputs, output, routed))

            states = apply("down_proj", self._activated(module, apply(first, hidden_states[token])))
            final.index_add_(0, token, (states * top_k_weights[token, position, None]).to(final.dtype))
        return final

    @staticmethod
    def _first(module: nn.Module) -> str:
        return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"

    @staticmethod
    def _activated(module: Any, states: Tensor) -> Tensor:
        if not getattr(module, "has_gate", True):
            activated: Tensor = module.act_fn(states)
        elif hasattr(module, "_apply_gate"):
            activated = module._apply_gate(states)
        else:
            gate, up = states.chunk(2, dim=-1)
            activated = module.act_fn(gate) * up
        return activated


def _stacked_linear(module: nn.Module, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    weight = weight.mT if getattr(module, "is_transposed", False) else weight
    biases = getattr(module, f"{name}_bias", None)
    return functional.linear(inputs, weight, None if biases is None else biases[expert])


EXPERTS = "experts"

KINDS: Mapping[str, LayerKind] = {
    kind.name: kind
    for kind in (
        RowWise("linear"),
        RowWise("conv1d"),
        Convolution("conv2d"),
        Embedding("embedding"),
        Experts(EXPERTS),
    )
}
"""All kinds by name."""

CLASSES: Mapping[str, str] = {"Linear": "linear", "Conv1D": "conv1d", "Conv2d": "conv2d", "Embedding": "embedding"}
"""Kind by name of the module's class, or of one that it is derived from."""


def kind_of_module(module: nn.Module) -> LayerKind | None:
    """The kind of a module with one weight, None where it is not supported."""
    return next((KINDS[CLASSES[cls.__name__]] for cls in type(module).__mro__ if cls.__name__ in CLASSES), None)


@contextmanager
def watched(modules: Mapping[str, nn.Module], layers: Sequence[LayerSpec], visit: Visit) -> Iterator[None]:
    """Has every run of the layers visited, and leaves the modules as they were whatever happens.

    Args:
        modules: The layers' modules by the layers' names; layers of one kind may be parts of one module.
        layers: What is watched.
        visit: Sees every run.
    """
    parts: dict[int, list[LayerSpec]] = {}
    for layer in layers:
        parts.setdefault(id(modules[layer.name]), []).append(layer)
    with ExitStack() as stack:
        for together in parts.values():
            first = together[0]
            stack.callback(KINDS[first.kind].watch(modules[first.name], together, visit))
        yield
