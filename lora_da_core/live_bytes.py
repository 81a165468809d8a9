"""Counts the bytes of the tensors that are alive while a block of code runs, real ones and fake ones alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ANSWERS = {torch.bool: True, torch.float64: 1.0, torch.float32: 1.0, torch.float16: 1.0, torch.bfloat16: 1.0}
_EIGH = torch.ops.aten._linalg_eigh.default
_EIGH_WORKSPACE = 2
"""Matrices that LAPACK's divide and conquer (`syevd`) works in beside its answer."""
_READ = torch.ops.aten._local_scalar_dense.default


def _of_one(matrices: Tensor) -> int:
    """Bytes of one matrix of a batch: they are decomposed one after the other."""
    return matrices.shape[-2] * matrices.shape[-1] * matrices.itemsize


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operators within the block have made and that still live.

    What an operator takes for itself and gives back before it returns is not seen, but for the workspace of `eigh`,
    which is larger than its answer. Where `answers` is set, code that
    asks a tensor for its value gets one (True, 1): a fake tensor has none.

    Attributes:
        live: Bytes now.
        peak: Most bytes so far.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, answers: bool = False) -> None:
        """Starts at zero; `known` tensors, the weights above all, do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._answers = answers
        self._sizes: dict[int, int] = {}
        self._outside = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._answers and func is _READ:
            return _ANSWERS.get(args[0].dtype, 1)
        outcome = func(*args, **(kwargs or {}))
        # Operators return a tensor, or some in a sequence.
        for made in outcome if isinstance(outcome, (tuple, list)) else (outcome,):
            if isinstance(made, Tensor):
                self._count(made)
        workspace = _EIGH_WORKSPACE * _of_one(args[0]) if func is _EIGH else 0
        self.peak = max(self.peak, self.live + workspace)
        return outcome

    def restart(self) -> None:
        """Forgets the peak, not what is alive."""
        self.peak = self.live

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._outside or tensor.device.type == "meta":
            return
        self._sizes[key] = size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
