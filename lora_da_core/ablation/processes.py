"""Workers as processes of this machine: the default where several jobs are asked for."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from lora_da_core.ablation.dispatch import GroupServer, Message, Pool, Worker
from lora_da_core.ablation.grid import Grid, Group

PATIENCE: Final = 5.0
"""Seconds that an idle worker has to end by itself."""


class ProcessPool(Pool):
    """Spawns a process per worker.

    Args:
        grid: The grid.
        threads: Threads of each.
    """

    def __init__(self, grid: Grid, threads: int) -> None:
        self._grid, self._threads = grid, threads

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *exc: object) -> None:
        pass  # nothing outlives the workers

    def start(self) -> Worker:
        return _Process(self._grid, self._threads)

    def ready(self, workers: Sequence[Worker]) -> Iterable[Worker]:
        heard = wait([worker.channel for worker in workers])
        return [worker for worker in workers if worker.channel in heard]


class _Process(Worker):
    """A process at the other end of a pipe."""

    def __init__(self, grid: Grid, threads: int) -> None:
        super().__init__()
        spawn = multiprocessing.get_context("spawn")
        self.channel, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(GroupServer(grid, threads), theirs), daemon=True)
        self._process.start()
        theirs.close()

    def _send(self, group: Group | None) -> None:
        try:
            self.channel.send(group)
        except (BrokenPipeError, OSError):
            return  # it died while idle; reading its pipe says so

    def receive(self) -> Message:
        try:
            message: Message = self.channel.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE)
            self._process.terminate()
            self._process.join()
            return Message("died", f"the worker process ended with exit code {self._process.exitcode}")
        return message

    def close(self) -> None:
        """Ends the process: by itself where it waits for a group, otherwise whatever it does."""
        if not self.owed and self._process.is_alive():
            self._send(None)
            self._process.join(PATIENCE)
        self._process.terminate()
        self._process.join()
        self.channel.close()


def _serve(server: GroupServer, pipe: Connection[Any, Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    message = server.load()
    pipe.send(message)
    while message.kind != "error" and (group := pipe.recv()) is not None:
        message = server.step(group)
        while message.kind == "record":
            pipe.send(message)
            message = server.step()
        pipe.send(message)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
