"""Prepared layers on their way to the solver: those of one shape wait for each other and are solved together."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lora_da_core.solving import WAITING_BYTES, LayerSolution, PreparedLayer, batch_size

Solve = Callable[[Sequence[PreparedLayer]], list[LayerSolution]]
"""Solves layers of one input size, rank, dtype and device."""


PRIORITY = -1
"""Of the stream that solves: its many small steps must not queue behind the few large ones of preparing."""


def batches_beside(device: torch.device, waiting_bytes: int = WAITING_BYTES) -> int:
    """How many batches are solved while the next layers are prepared, each in a thread and on a stream of its own.

    A solver's many small steps wait for the host and for each other, preparing is a few large factorisations: together
    they take little more than the longest of them. A CPU has nothing to spare.

    Args:
        device: Where the layers are.
        waiting_bytes: Bytes of operators of one shape that may wait.

    Returns:
        The number; 0 where layers are prepared and solved in turn, one where memory is too scarce for full batches.
    """
    if device.type != "cuda":
        return 0
    return 1 if waiting_bytes < WAITING_BYTES else 2


@dataclass(frozen=True)
class _Batch:
    """Layers in the solver's hands."""

    layers: Sequence[PreparedLayer]
    solutions: Future[list[LayerSolution]]


class SolveQueue:
    """Solves layers in batches, a few batches at a time beside the caller's own work.

    Args:
        solve: The solver; called in several threads at once where several batches are solved beside each other.
        waiting_bytes: Bytes of operators of one shape that may wait; as many may be in each batch that is solved.
        on_solved: Told how many layers are solved.
    """

    def __init__(self, solve: Solve, waiting_bytes: int, on_solved: Callable[[int], None]) -> None:
        self._solve, self._waiting_bytes, self._on_solved = solve, waiting_bytes, on_solved
        self._waiting: dict[tuple[int, int, torch.dtype, torch.device], list[PreparedLayer]] = {}
        self._beside: deque[_Batch] = deque()
        self._streams: dict[torch.device, deque[torch.cuda.Stream]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._solutions: dict[str, LayerSolution] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Within it layers may be added; nothing is left running after it, however it ends."""
        with ThreadPoolExecutor() as self._pool:
            try:
                yield
            finally:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None
                self._beside.clear()
                self._waiting.clear()
                if self._streams:
                    # cuBLAS keeps 32 MiB for every thread and stream that it has served, and these are gone.
                    torch._C._cuda_clearCublasWorkspaces()

    def add(self, layer: PreparedLayer) -> None:
        """Takes a layer over; the caller should not keep it. Where enough of its shape wait, they are solved."""
        spec, device, dtype = layer.spec, layer.step.device, layer.step.dtype
        # An estimator chooses the dtype layer by layer.
        alike = self._waiting.setdefault((spec.in_features, spec.rank, dtype, device), [])
        alike.append(layer)
        if len(alike) >= batch_size(spec, device, self._waiting_bytes, dtype):
            self._start(alike)

    def finish(self) -> dict[str, LayerSolution]:
        """Solves what waits.

        Returns:
            The solutions of all layers.
        """
        for alike in self._waiting.values():
            if alike:
                self._start(alike)
        while self._beside:
            self._land()
        return self._solutions

    def _start(self, alike: list[PreparedLayer]) -> None:
        layers = list(alike)
        alike.clear()
        device = layers[0].step.device
        most = batches_beside(device, self._waiting_bytes)
        while self._beside and len(self._beside) >= most:
            self._land()
        if not most:
            self._take(layers, self._solve(layers))
            return
        assert self._pool is not None, "layers are added within open()"
        solutions = self._pool.submit(self._beside_on, device, layers, self._ready(device))
        self._beside.append(_Batch(layers, solutions))

    def _beside_on(
        self, device: torch.device, layers: Sequence[PreparedLayer], ready: torch.cuda.Event | None
    ) -> list[LayerSolution]:
        if ready is None:
            return self._solve(layers)
        # Of as many streams as there are batches the one that has been idle for longest.
        stream = self._streams[device].popleft()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            try:
                return self._solve(layers)
            finally:
                # Whatever is let go of from here on, this stream has done with.
                stream.synchronize()
                self._streams[device].append(stream)

    def _ready(self, device: torch.device) -> torch.cuda.Event | None:
        """What the other streams wait for: all that this one was given so far."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            count = batches_beside(device, self._waiting_bytes)
            made = (torch.cuda.Stream(device, priority=PRIORITY) for _ in range(count))  # type: ignore[no-untyped-call]
            self._streams[device] = deque(made)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def _land(self) -> None:
        """Waits for the oldest batch that is being solved."""
        batch = self._beside.popleft()
        self._take(batch.layers, batch.solutions.result())

    def _take(self, layers: Sequence[PreparedLayer], found: Sequence[LayerSolution]) -> None:
        self._solutions.update({layer.spec.name: solution for layer, solution in zip(layers, found, strict=True)})
        self._on_solved(len(self._solutions))
