"""Several real processes that form a process group, for tests; the store lies with the test, as with a launcher."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

ON_GPUS = os.environ.get("LORA_DA_TEST_DEVICE") == "cuda"
"""Whether every process has a GPU of its own, and tensors there travel by NCCL."""

PATIENCE = 100 if ON_GPUS else 600
"""Seconds in which everything that a test starts must have ended, on a machine that is busy with other things."""


def own_device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", dist.get_rank()) if ON_GPUS else torch.device("cpu")


@dataclass(frozen=True)
class Ending:
    """How one process ended: what its function returned or raised, its exit code, and when."""

    value: Any
    error: str
    exitcode: int | None
    seconds: float


def context() -> Any:
    """Starts processes that have imported what is slow to import already; with GPUs, which no fork survives, anew."""
    if ON_GPUS:
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["lora_da_core.adapter", "transformers", "process_worlds", "conftest"])
    return found


class Worlds:
    """Starts groups of processes; several may run at once.

    >>> worlds = Worlds()
    """

    def __init__(self) -> None:
        self._started: list[tuple[Any, list[Any], Any]] = []

    def start(self, size: int, work: Callable[..., Any], *arguments: Any, kept_by_rank_0: bool = False) -> int:
        """Starts `work(*arguments)` in each of `size` processes of one group; gives the group's number."""
        store: Any = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        port = store.port
        if kept_by_rank_0:
            store = None
        processes, queue = context(), context().SimpleQueue()
        group = [
            processes.Process(
                target=_member, args=(rank, size, port, kept_by_rank_0 and not rank, queue, work, arguments)
            )
            for rank in range(size)
        ]
        for process in group:
            process.start()
        self._started.append((store, group, queue))
        return len(self._started) - 1

    def endings(self, number: int) -> list[Ending]:
        """How the processes of a group ended, by rank; none may still run."""
        store, group, queue = self._started[number]
        told: dict[int, tuple[Any, str, float]] = {}
        until = time.monotonic() + PATIENCE
        while any(process.is_alive() for process in group) or not queue.empty():
            while not queue.empty():
                rank, *found = queue.get()
                told[rank] = tuple(found)
            if time.monotonic() > until:
                raise AssertionError(
                    f"ranks {[r for r, p in enumerate(group) if p.is_alive()]} did not end; of the others: {told}"
                )
            time.sleep(0.01)
        del store
        return [Ending(*told.get(rank, (None, ""))[:2], process.exitcode, told.get(rank, (0, 0, 0.0))[2])
                for rank, process in enumerate(group)]  # fmt: skip

    def run(self, size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns in each process, by rank; none may raise."""
        return self.values(self.start(size, work, *arguments))

    def values(self, number: int) -> list[Any]:
        """What the function returned in each process of a group, by rank; none may have raised."""
        endings = self.endings(number)
        assert not [ending.error for ending in endings if ending.error], [ending.error for ending in endings]
        assert all(ending.exitcode == 0 for ending in endings)
        return [ending.value for ending in endings]

    def kill(self) -> None:
        """Ends whatever still runs."""
        for _, group, _ in self._started:
            for process in group:
                if process.is_alive():
                    process.kill()


def _member(
    rank: int, size: int, port: int, keeper: bool, queue: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    backend = "gloo"
    if ON_GPUS:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # as `launched` has it
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    store = dist.TCPStore("127.0.0.1", port, None, is_master=keeper, wait_for_workers=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
    begun = time.monotonic()
    try:
        found = work(*arguments)
    except Exception as error:
        queue.put((rank, None, f"{type(error).__name__}: {error}", time.monotonic() - begun))
        if ON_GPUS and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()  # others may be gone, and NCCL would wait for them
    else:
        queue.put((rank, found, "", time.monotonic() - begun))
    if dist.is_initialized():
        dist.destroy_process_group()
