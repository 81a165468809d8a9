"""The repeated blocks of a model, found by structure, and the hidden states that go from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_core.errors import LoraDAError


class BlockFault(LoraDAError):
    """Why a model cannot be run block by block; whoever asks for it then makes passes over the data."""


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model.

    Attributes:
        modules: The blocks in the order in which they run.
        numbers: By layer, the number of the block that it is part of; layers outside the blocks are not in it.
    """

    modules: Sequence[nn.Module]
    numbers: Mapping[str, int]


def find_blocks(model: nn.Module, layers: Mapping[str, nn.Module]) -> Blocks | None:
    """The list of modules that holds most layers, each of its elements a block.

    Args:
        model: The model.
        layers: The layers' modules by name.

    Returns:
        The blocks; None where there are fewer than two, or blocks have a part in common.
    """
    wanted: dict[int, list[str]] = {}
    for name, module in layers.items():
        wanted.setdefault(id(module), []).append(name)
    best: Blocks | None = None
    for candidate in model.modules():
        if isinstance(candidate, nn.ModuleList) and len(candidate) > 1:
            parts = [{id(part) for part in block.modules()} for block in candidate]
            numbers = {
                name: number
                for number, part in enumerate(parts)
                for key in part & wanted.keys()
                for name in wanted[key]
            }
            disjoint = sum(map(len, parts)) == len(set().union(*parts))
            if disjoint and len(numbers) > (0 if best is None else len(best.numbers)):
                best = Blocks(list(candidate), numbers)
    return best


@dataclass
class BlockCall:
    """How a block is run: its arguments, with None in the place of the hidden states and of a cache.

    Attributes:
        args: By position.
        kwargs: By name.
        place: Where the hidden states stand among them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    def given(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these hidden states."""
        if isinstance(self.place, str):
            return self.args, {**self.kwargs, self.place: hidden}
        return (*self.args[: self.place], hidden, *self.args[self.place + 1 :]), self.kwargs


Enter = Callable[[int, Tensor, BlockCall], Tensor]
"""Sees the hidden states that a block is given, by its number, and the rest of its call; returns what it is to take."""
Leave = Callable[[int, Tensor], Tensor]
"""Sees the hidden states that a block returns, by its number; returns what is given on."""


@contextmanager
def followed(blocks: Blocks, enter: Enter, leave: Leave) -> Iterator[Callable[[], None]]:
    """Follows the hidden states of forward passes with gradients, and leaves the blocks as they were.

    Args:
        blocks: The blocks.
        enter: Called when a block starts.
        leave: Called when it is done.

    Yields:
        What is to be called before every forward pass.

    Raises:
        BlockFault: From within a forward pass: blocks do not run once each in their order, or one is not given the
            very hidden states that the one before it returned.
    """
    last: list[tuple[int, Tensor | None]] = []
    """Number and output of the last block that is done; no output of the very last, which would live on here."""
    running: list[int] = []

    def start() -> None:
        last.clear()
        running.clear()

    def before(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not torch.is_grad_enabled():
                return None
            expected, hidden = (last[0][0] + 1, last[0][1]) if last else (0, None)
            if running or number != expected:
                raise BlockFault(f"block {number} ran where block {expected} was to follow")
            running.append(number)
            place = _place_of(args, kwargs, hidden)
            if place is None:
                raise BlockFault(f"block {number} is not given what block {number - 1} returned")
            hidden = args[place] if isinstance(place, int) else kwargs[place]
            rest = {name: None if name == place or _is_cache(value) else value for name, value in kwargs.items()}
            others = (None if at == place or _is_cache(value) else value for at, value in enumerate(args))
            call = BlockCall(tuple(others), rest, place)
            return call.given(enter(number, hidden, call))

        return hook

    def after(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if running != [number]:
                return None
            found = hidden_of(output)
            if found is None:
                raise BlockFault(f"block {number} returns no tensor of hidden states first")
            given = leave(number, found)
            last[:] = [(number, given if number + 1 < len(blocks.modules) else None)]
            running.clear()
            return given if isinstance(output, Tensor) else type(output)([given, *output[1:]])

        return hook

    with ExitStack() as stack:
        for number, module in enumerate(blocks.modules):
            # First of all hooks, and last of all: a block is then run again with all that others have hung on it.
            handles = (
                module.register_forward_pre_hook(before(number), prepend=True, with_kwargs=True),
                module.register_forward_hook(after(number)),
            )
            for handle in handles:
                stack.callback(handle.remove)
        yield start


def hidden_of(output: Any) -> Tensor | None:
    """The hidden states in what a block returns: a tensor, or the first of a tuple or list; None where none is."""
    first = output[0] if type(output) in (tuple, list) and output else output
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def _place_of(args: tuple[Any, ...], kwargs: dict[str, Any], last: Tensor | None) -> int | str | None:
    """Where the hidden states stand: the first floating-point tensor, which must be what the last block returned."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    found = [(place, value) for place, value in places if isinstance(value, Tensor) and torch.is_floating_point(value)]
    if not found or (last is not None and found[0][1] is not last):
        return None
    return found[0][0]


def _is_cache(value: Any) -> bool:
    """Whether an argument is one of transformers' caches; in it a block that is run again would find its own keys."""
    return hasattr(value, "get_seq_length")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in its tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list):
        for each in value:
            yield from tensors_in(each)
    elif type(value) is dict:
        yield from tensors_in(list(value.values()))
