"""What identifies the statistics of a run: hashes and names of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_da_core.capture import CaptureTask
from lora_da_core.errors import DataError, OptionError
from lora_da_core.function_objective import FunctionObjective
from lora_da_core.types import Batch

FORMAT = 1
"""Version of this list, and of the layout of the files that are named by it."""
MISSING = object()
"""Stands for a field that is not there."""


@dataclass(frozen=True)
class Identity:
    """What determines the statistics, as JSON values by field. Solver, rank, α, β, N, damping and scale are not in it.

    Attributes:
        fields: The values.
    """

    fields: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Name of the entry: SHA-256 of the fields."""
        return digest_of(self.fields)

    @classmethod
    def of(cls, task: CaptureTask, batches: Sequence[Batch], *, seed: int, base: str) -> Identity:
        """The identity of the statistics that a task makes from batches.

        Args:
            task: What would be run.
            batches: What it would read.
            seed: Of labels and directions; it counts only where something is drawn.
            base: Fingerprint of the base weights.

        Returns:
            The identity; it holds hashes and names, nothing of the data.

        Raises:
            OptionError: The objective is a plain function, of whose code nothing is known.
        """
        if isinstance(task.objective, FunctionObjective):
            raise OptionError(
                f"objective {task.objective.name!r} is a function, whose code a cache cannot identify; offer it as a "
                "plugin's objective, or give no cache_dir."
            )
        return cls(described(task, batches, seed=seed, base=base))


def described(task: CaptureTask, batches: Sequence[Batch], *, seed: int, base: str) -> dict[str, Any]:
    """What a task would make statistics from, as JSON values by field; of a function as objective its name alone.

    Args:
        task: What would be run.
        batches: What it would read.
        seed: Of labels and directions; it counts only where something is drawn.
        base: Fingerprint of the base weights.

    Returns:
        Hashes and names, nothing of the data.

    Raises:
        DataError: A batch holds something that cannot be identified.
    """
    parts = {"estimator": task.estimator, "gradient": task.gradient, "objective": task.objective}
    packages = ("lora-da-core", "torch", "transformers")
    drawn = task.estimator.labels != "empirical" or task.gradient.forward_only
    fields = {
        "format": FORMAT,
        "weights": base,
        "model": _model_digest(task.model),
        "tokens": _data_digest(batches),
        "samples": sum(len(batch["labels"]) for batch in batches),
        "layers": [[spec.name, spec.kind, spec.in_features, spec.out_features] for spec in task.specs],
        **{kind: {"name": part.name, "options": asdict(part.options)} for kind, part in parts.items()},
        "token_mask": task.token_mask,
        "seed": seed if drawn else None,
        "devices": sorted({task.device_of(spec.name).type for spec in task.specs}),
        "versions": {**{name: version(name) for name in packages}, **task.origins},
    }
    # As a manifest gives them back, so that the two compare equal.
    found: dict[str, Any] = json.loads(_canonical(fields))
    return found


def flattened(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of inner mappings beside the others, with names after a dot.

    >>> flattened({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found.update(flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return found


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the fields that differ, those of inner mappings after a dot.

    >>> differing({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"c": 1, "d": 3}})
    ['a', 'b.d']
    """
    names: list[str] = []
    for name in sorted({*ours, *theirs}):
        mine, other = ours.get(name, MISSING), theirs.get(name, MISSING)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            names += differing(mine, other, f"{prefix}{name}.")
        elif mine != other:
            names.append(prefix + name)
    return names


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _model_digest(model: nn.Module) -> str:
    """What the model computes besides its parameters: its class, its configuration and its buffers."""
    whole = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        settings = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
        # Neither where it was loaded from nor by what.
        settings.pop("transformers_version", None)
        whole.update(json.dumps(settings, default=str, skipkeys=True).encode())
    for name, buffer in sorted(model.named_buffers()):
        if not buffer.is_meta:
            _add_tensor(whole, name, buffer)
    return whole.hexdigest()


def _data_digest(batches: Sequence[Batch]) -> str:
    """SHA-256 of everything in the batches."""
    whole = hashlib.sha256()
    for number, batch in enumerate(batches):
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, Tensor):
                _add_tensor(whole, f"{number} {name}", value)
                continue
            try:
                whole.update(f"{number} {name} {json.dumps(value)}".encode())
            except (TypeError, ValueError):
                _refuse(number, name, value)
    return whole.hexdigest()


def _refuse(number: int, name: str, value: Any) -> NoReturn:
    raise DataError(
        f"batch {number} holds {name!r} of type {type(value).__name__}, which a cache cannot identify; give tensors "
        "and plain values, or no cache_dir."
    )


def _add_tensor(whole: hashlib._Hash, name: str, tensor: Tensor) -> None:
    whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
    # The bytes of an empty tensor have no view of their own.
    if tensor.numel():
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
