"""Workers as actors on Ray: a cluster where RAY_ADDRESS names one, otherwise an instance of this run's own."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import signal
import socket
import textwrap
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import torch

from lora_da_core.ablation.dispatch import GroupServer, Message, Pool, Worker
from lora_da_core.ablation.grid import Grid, Group
from lora_da_core.ablation.settings import RunSettings
from lora_da_core.errors import LoraDAError, OptionError
from lora_da_core.sources import reason

ADDRESS: Final = "RAY_ADDRESS"
OWN: Final = "local"
"""Ray's address of an instance that is started and ended with the run."""

RETRIES: Final = 2
"""How often in a row a group that kills its worker is given to another."""

OBJECT_STORE: Final = 128 * 2**20
"""Bytes of an own instance's object store. Grids and records are small; Ray would take a third of the memory."""

REACHABLE_WITHIN: Final = 10.0
"""Seconds for a cluster to answer; Ray itself would try for many minutes."""

_LONGEST_REASON: Final = 400
_HOST_AND_PORT: Final = re.compile(r"\[?(?P<host>[^/\]]+)\]?:(?P<port>\d+)")


def check(run: RunSettings) -> None:
    """Whether a run can go to Ray; nothing is started.

    Args:
        run: The grid's settings.

    Raises:
        OptionError: Ray is not installed, RAY_ADDRESS is none that workers can be started at, or the device names
            one GPU of several.
    """
    _ray()
    kind, _, index = run.device.partition(":")
    if kind == "cuda" and index not in ("", "0"):
        raise OptionError(f"device is '{run.device}', but Ray chooses each worker's GPU; write 'cuda'.")
    address = _address()
    if address not in (OWN, "auto") and _HOST_AND_PORT.fullmatch(address) is None:
        raise OptionError(f"{ADDRESS} is '{address}'; give the cluster's own address as host:port, or unset it.")


class RayPool(Pool):
    """Actors of a Ray cluster, each with the CPUs of its threads, and a GPU where the device is one.

    A session that the caller has begun is used and left open. One that was opened here is closed, and an own instance
    ends with it.

    Args:
        grid: The grid.
        threads: Threads of each worker.
        jobs: Workers that an own instance has room for.
    """

    retries = RETRIES

    def __init__(self, grid: Grid, threads: int, jobs: int) -> None:
        self._ray = _ray()
        self._grid, self._threads, self._jobs = grid, threads, jobs
        self._session = contextlib.ExitStack()

    def __enter__(self) -> RayPool:
        joined = self._ray.is_initialized() or _address() != OWN
        with contextlib.ExitStack() as opened:
            if not self._ray.is_initialized():
                opened.enter_context(_as_it_was())
                opened.callback(self._ray.shutdown)
                self._connect()
            self._actor = self._ray.remote(_Actor).options(**self._request())
            self._session = opened.pop_all()
        # Workers of an own instance begin in this directory by themselves.
        self._directory = os.getcwd() if joined else None
        return self

    def __exit__(self, *exc: object) -> None:
        self._session.close()

    def start(self) -> Worker:
        return _RayWorker(self._ray, self._actor.remote(self._grid, self._threads, self._directory))

    def ready(self, workers: Sequence[Worker]) -> Iterable[Worker]:
        heard, _ = self._ray.wait([worker.channel for worker in workers], num_returns=1)
        return [worker for worker in workers if worker.channel in heard]

    def _connect(self) -> None:
        address = _address()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == OWN:
            # What torch sees rather than what Ray finds: a build without CUDA must not wait for a GPU.
            quiet |= {"num_cpus": self._jobs * self._threads, "num_gpus": torch.cuda.device_count()}
            quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            _knock(address)
            self._ray.init(address=address, **quiet)
        except Exception as error:  # Ray raises what the step that failed happens to raise
            where = "Ray cannot be started" if address == OWN else f"the Ray cluster at {address} cannot be joined"
            raise LoraDAError(f"{where}: {reason(error)}") from error

    def _request(self) -> dict[str, Any]:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        kind = self._grid.run.device.partition(":")[0]
        wants_gpu = kind == "cuda" or (kind == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes))
        wanted = {"CPU": self._threads, "GPU": int(wants_gpu)}
        if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
            need = ", ".join(f"{amount} {name}" for name, amount in wanted.items())
            raise OptionError(
                f"no node of the Ray cluster has what each job asks for: {need}. Take more jobs, or set "
                "OMP_NUM_THREADS, for fewer CPUs each; device 'cpu' takes no GPU."
            )
        return {"num_cpus": wanted["CPU"], "num_gpus": wanted["GPU"], "max_restarts": 0, "max_task_retries": 0}


class _Actor(GroupServer):
    """A worker's own side on some node.

    Args:
        grid: The grid.
        threads: Threads that torch may use.
        directory: Where the grid's relative paths begin, on a node that has it; None stays where it is.
    """

    def __init__(self, grid: Grid, threads: int, directory: str | None) -> None:
        super().__init__(grid, threads)
        self._on_other_node = directory is not None
        if directory is not None and os.path.isdir(directory):
            os.chdir(directory)

    def load(self) -> Message:
        message = super().load()
        if message.kind == "error" and self._on_other_node:
            message.content.args = (f"{message.content} (on node {platform.node()})",)
        return message


class _RayWorker(Worker):
    """An actor, and its call that is under way."""

    def __init__(self, ray: Any, actor: Any) -> None:
        super().__init__()
        self._ray, self._actor = ray, actor
        self.channel = actor.load.remote()

    def _send(self, group: Group) -> None:
        self.channel = self._actor.step.remote(group)

    def receive(self) -> Message:
        try:
            message: Message = self._ray.get(self.channel)
        except self._ray.exceptions.RayError as error:
            why = textwrap.shorten(str(error), _LONGEST_REASON, placeholder=" …")
            return Message("died", f"the Ray worker ended: {why}")
        if message.kind == "record":
            self.channel = self._actor.step.remote()
        return message

    def close(self) -> None:
        self._ray.kill(self._actor)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise OptionError(
            f"executor 'ray' needs Ray, which cannot be imported ({error}); pip install 'lora-da-core[ray]'."
        ) from error
    return ray


def _address() -> str:
    return os.environ.get(ADDRESS) or OWN


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at host:port."""
    found = _HOST_AND_PORT.fullmatch(address)
    if found is not None:
        socket.create_connection((found["host"], int(found["port"])), REACHABLE_WITHIN).close()


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Undoes what Ray leaves behind in the process: variables of the environment, the handler of SIGTERM."""
    variables, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_") or name == "PYTHONBREAKPOINT"]:
            if name in variables:
                os.environ[name] = variables[name]
            else:
                del os.environ[name]
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
