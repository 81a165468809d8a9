"""Prepared layers on their way to the solver: those of one shape wait for each other and are solved together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from lora_da_core.solving import LayerSolution, PreparedLayer, batch_size

Solve = Callable[[Sequence[PreparedLayer]], list[LayerSolution]]
"""Solves layers of one input size, rank, dtype and device."""


PRIORITY = -1
"""Of the stream that solves: its many small steps must not queue behind the few large ones of preparing."""


def solves_beside(device: torch.device) -> bool:
    """Whether a batch is solved while the next layers are prepared, on a stream of its own.

    A solver's many small steps wait for the host, preparing is a few large factorisations: together they take little
    more than the longer of the two. A CPU has nothing to spare.

    Args:
        device: Where the layers are.

    Returns:
        Whether it is.
    """
    return device.type == "cuda"


class SolveQueue:
    """Solves layers in batches, at most one batch at a time beside the caller's own work.

    Args:
        solve: The solver.
        waiting_bytes: Bytes of operators of one shape that may wait; as many may be in the solver's hands.
        on_solved: Told how many layers are solved.
    """

    def __init__(self, solve: Solve, waiting_bytes: int, on_solved: Callable[[int], None]) -> None:
        self._solve, self._waiting_bytes, self._on_solved = solve, waiting_bytes, on_solved
        self._waiting: dict[tuple[int, int, torch.dtype, torch.device], list[PreparedLayer]] = {}
        self._beside: tuple[list[PreparedLayer], Future[list[LayerSolution]]] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._solutions: dict[str, LayerSolution] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Within it layers may be added; nothing is left running after it, however it ends."""
        with ThreadPoolExecutor(1) as self._pool:
            try:
                yield
            finally:
                self._pool.shutdown(cancel_futures=True)
                self._pool = self._beside = None
                self._waiting.clear()

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
        self._land()
        return self._solutions

    def _start(self, alike: list[PreparedLayer]) -> None:
        self._land()
        batch = list(alike)
        alike.clear()
        device = batch[0].step.device
        if not solves_beside(device):
            self._take(batch, self._solve(batch))
            return
        assert self._pool is not None, "layers are added within open()"
        ready = self._ready(device)
        self._beside = batch, self._pool.submit(self._solved_beside, batch, device, ready)

    def _solved_beside(
        self, batch: list[PreparedLayer], device: torch.device, ready: torch.cuda.Event | None
    ) -> list[LayerSolution]:
        if ready is None:
            return self._solve(batch)
        stream = self._streams[device]
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            try:
                return self._solve(batch)
            finally:
                # Whatever is let go of from here on, this stream has done with.
                stream.synchronize()

    def _ready(self, device: torch.device) -> torch.cuda.Event | None:
        """What the other stream waits for: all that this one was given so far."""
        if device.type != "cuda":
            return None
        self._streams.setdefault(device, torch.cuda.Stream(device, priority=PRIORITY))  # type: ignore[no-untyped-call]
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def _land(self) -> None:
        """Waits for the batch that is being solved."""
        if self._beside is not None:
            batch, found = self._beside
            self._beside = None
            self._take(batch, found.result())

    def _take(self, batch: Sequence[PreparedLayer], found: Sequence[LayerSolution]) -> None:
        self._solutions.update({layer.spec.name: solution for layer, solution in zip(batch, found, strict=True)})
        self._on_solved(len(self._solutions))
