"""Counts the bytes of the tensors that are alive while a block of code runs, real ones and fake ones alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ANSWERS = {torch.bool: True, torch.float64: 1.0, torch.float32: 1.0, torch.float16: 1.0, torch.bfloat16: 1.0}
_READ = torch.ops.aten._local_scalar_dense.default


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operators within the block have made and that still live.

    What an operator takes for itself and gives back before it returns is not seen. Where `answers` is set, code that
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
        self.peak = max(self.peak, self.live)
        return outcome

    def restart(self) -> None:
        """Forgets the peak, not what is alive."""
        self.peak = self.live

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._outside:
            return
        self._sizes[key] = size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
