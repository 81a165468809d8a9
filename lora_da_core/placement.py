"""Where a model's weights are while they are not in use, and how to see them: offloaded by accelerate, or sharded.

accelerate keeps an offloaded module's weights in host memory or on disk and brings them in while the module runs;
meanwhile its parameters are on the meta device. torch's FSDP2 leaves every process a part of each weight, a DTensor,
and gathers the whole while it is used; DeepSpeed's ZeRO-3 leaves an empty parameter. A hook, a mesh and an attribute
say which of them it is.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def offload_hook(module: nn.Module) -> Any | None:
    """The hook of accelerate that brings a module's weights in for its run; None where its weights stay."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((each for each in hooks if getattr(each, "offload", False)), None)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of a model off the devices."""
    return any(offload_hook(module) is not None for module in model.modules())


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes, whatever holds its weights meanwhile.

    Args:
        module: The module; its own weights are asked, not those of its parts.

    Returns:
        The device; None where the module has no weights, or what offloads them is a hook of a module around it.
    """
    hook = offload_hook(module)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    parameter = next(module.parameters(recurse=False), None)
    if parameter is None:
        return None
    return _mesh_device(parameter) or (None if parameter.is_meta else parameter.device)


def model_device(model: nn.Module) -> torch.device:
    """Where batches go: where the first module that has weights computes, `meta` where no module has any values."""
    found = (execution_device(module) for module in model.modules())
    return next((device for device in found if device is not None), torch.device("meta"))


@contextlib.contextmanager
def weights_present(module: nn.Module) -> Iterator[None]:
    """The module's own weights are there within, on the device it computes on; they are to be read, never written."""
    hook = offload_hook(module)
    if hook is None:
        with _gathered_by_deepspeed(module):
            yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


@contextlib.contextmanager
def _gathered_by_deepspeed(module: nn.Module) -> Iterator[None]:
    """ZeRO-3 leaves a parameter empty, and knows its parts by attributes of its own; all processes must ask alike."""
    parts = [parameter for parameter in module.parameters(recurse=False) if in_parts(parameter)]
    if not parts:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(parts):
        yield


def present_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters by name, tied ones under each of their names; an offloaded one's values are there for its turn.

    Args:
        model: The model.

    Yields:
        Name and parameter, sharded ones as they are.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        with weights_present(module):
            yield from module.named_parameters(prefix, recurse=False, remove_duplicate=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its elements: of one that processes share the parts are gathered, which all of them must ask.

    Args:
        tensor: Any tensor.

    Returns:
        A plain tensor; the given one itself where it is whole already.
    """
    device = _mesh_device(tensor)
    if device is None:
        return tensor
    # Parts that are kept in host memory travel by the devices' own network.
    gathered: Tensor = tensor.detach().to(device).full_tensor()  # type: ignore[attr-defined]
    return gathered


def is_shared_out(tensor: Tensor) -> bool:
    """Whether processes hold a part each."""
    return _mesh_device(tensor) is not None


def _mesh_device(tensor: Tensor) -> torch.device | None:
    """The device on which a process works with its part of a shared tensor; None where it is not shared."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return None
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


# Copies of the module tree


class _IdleHook:
    """Stands for accelerate's hook in a copy, which has no weights to bring in."""

    no_grad = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


def copied_tree(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A copy of a module tree that neither offloads nor shards.

    Args:
        model: The model.
        tensors: By `id` of each parameter and buffer, what takes its place; a tensor itself is shared.

    Returns:
        The copy.
    """
    memo: dict[int, Any] = dict(tensors)
    sharded = []
    for module in model.modules():
        if "_hf_hook" in module.__dict__:
            memo[id(module._hf_hook)] = _IdleHook()
        if is_sharded(module):
            # torch refuses to copy these; its class for one is derived from the module's own.
            sharded.append(module)
            memo[id(module)] = object.__new__(_unsharded_class(module))
    for module in sharded:
        kept = {key: value for key, value in module.__dict__.items() if not key.startswith("__composable_api_")}
        state = {**kept, **_own_hooks(module)}
        memo[id(module)].__dict__ = copy.deepcopy(state, memo)
    return copy.deepcopy(model, memo)


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module itself."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def has_sharded_parts(model: nn.Module) -> bool:
    """Whether processes must run the model together, since each holds a part of its weights."""
    return any(is_sharded(module) for module in model.modules()) or is_partitioned(model)


def _unsharded_class(module: nn.Module) -> type[nn.Module]:
    classes = type(module).__mro__
    place = next(number for number, cls in enumerate(classes) if cls.__name__ == "FSDPModule")
    return classes[place + 1]


def _own_hooks(module: nn.Module) -> dict[str, Any]:
    """The module's hooks without those by which `fully_shard` gathers and frees weights."""
    found = {}
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = module.__dict__[name]
        kept = type(hooks)()
        kept.update({key: hook for key, hook in hooks.items() if not _is_fsdp(hook)})
        found[name] = kept
    return found


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 still keeps gathered after a forward pass."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


# Offloaded weights in a graph


@dataclass(frozen=True)
class _Reference:
    """Stands in a graph for a view of an offloaded weight."""

    module: nn.Module
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextlib.contextmanager
def offloaded_weights_reloaded(model: nn.Module) -> Iterator[None]:
    """Keeps offloaded weights out of the graph: what saves one for the backward pass is given it again when needed.

    Autograd would hold every weight that a forward pass brought in, the whole model, until the backward pass is over.

    Args:
        model: The model; the forward and the backward pass are to run within.
    """
    offloaded = [module for module in model.modules() if offload_hook(module) is not None]
    if not offloaded:  # hooks on what is saved cost time
        yield
        return
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        # There is no hook on what comes out, by which an objective would take a head for one that is watched.
        running[:] = [each for each in running if not all(p.is_meta for _, p in _brought(each))]
        running.append(module)

    def pack(tensor: Tensor) -> Tensor | _Reference:
        for module in running:
            for name, parameter in _brought(module):
                if _same_storage(parameter, tensor):
                    return _Reference(module, name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def unpack(kept: Tensor | _Reference) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with weights_present(kept.module):
            parameter = kept.module.get_parameter(kept.name).detach()
        return parameter.as_strided(kept.size, kept.stride, kept.offset)

    with contextlib.ExitStack() as stack:
        for module in offloaded:
            stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        yield


def _brought(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that come in for an offloaded module's run: its own, or those of its parts too."""
    hook = offload_hook(module)
    return module.named_parameters(recurse=hook is not None and bool(hook.place_submodules))


def _same_storage(weight: Tensor, tensor: Tensor) -> bool:
    if weight.is_meta or weight.device != tensor.device or weight.dtype != tensor.dtype:
        return False
    return weight.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() != 0


# What is in memory


def resident_bytes(model: nn.Module) -> int:
    """Most bytes of weights that are on the devices at a time while a model runs.

    Args:
        model: The model; where all of it is on meta, it is taken to be loaded whole.

    Returns:
        What stays there, and what is brought in at most: the weights of one offloaded module; of a model that FSDP2
        shards, those of the root and of two other modules, since the next one is gathered ahead.
    """
    brought = [_own_bytes(module) for module in model.modules() if offload_hook(module) is not None]
    kept = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    if brought:
        return sum(tensor.nbytes for tensor in kept.values() if not tensor.is_meta) + max(brought)
    gathered = [_gathered_bytes(module) for module in model.modules() if is_sharded(module)]
    return sum(map(_part_bytes, kept.values())) + sum(gathered[:1]) + sum(sorted(gathered[1:])[-2:])


def offloaded_bytes(model: nn.Module) -> int:
    """Bytes of the weights that are brought in whenever a model runs."""
    return sum(_own_bytes(module) for module in model.modules() if offload_hook(module) is not None)


def largest_module_bytes(model: nn.Module) -> int:
    """Bytes of the weights of one module at most: what an offloaded model brings in at a time."""
    return max((_own_bytes(module) for module in model.modules()), default=0)


def _part_bytes(tensor: Tensor) -> int:
    """Bytes of the part of a tensor that one process holds, the same on all: some hold less."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    return tensor.nbytes if mesh is None else -(-tensor.nbytes // mesh.size())


def _gathered_bytes(module: nn.Module) -> int:
    """Bytes that are gathered while a sharded module runs: what its sharded parts gather by themselves not counted."""
    within = (_gathered_bytes(part) if not is_sharded(part) else 0 for part in module.children())
    return sum(parameter.nbytes for parameter in module.parameters(recurse=False)) + sum(within)


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps the weights, whose sizes only it knows."""
    return any(in_parts(parameter) for parameter in model.parameters())


def in_parts(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps a parameter; what is written into it is lost, even where it is not empty."""
    return hasattr(parameter, "ds_id")


def _own_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for _, parameter in _brought(module))
