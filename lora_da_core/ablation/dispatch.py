"""Groups to workers, whatever carries the messages: who does what next, and what a worker's death costs."""

from __future__ import annotations

import logging
import sys
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lora_da_core.ablation.grid import Grid, Group
from lora_da_core.ablation.grid_cell import Cell
from lora_da_core.ablation.results import Record, write_run
from lora_da_core.errors import LoraDAError, StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """What is heard of a worker.

    Attributes:
        kind: `loaded`, a `record`, `idle` after a group's last one, an `error` that no other worker would escape, or
            that it `died`.
        content: What `run.json` says, the record, nothing, the error, or in what way it died.
    """

    kind: Literal["loaded", "record", "idle", "error", "died"]
    content: Any = None


class GroupServer:
    """The worker's own side: loads the model once, then runs the groups it is given, a cell per step.

    Args:
        grid: The grid.
        threads: Threads that torch may use.
    """

    def __init__(self, grid: Grid, threads: int) -> None:
        self._grid, self._threads = grid, threads
        self._records: Iterator[Record] = iter(())

    def load(self) -> Message:
        """Loads the model and the data.

        Returns:
            `loaded`, or the `error`.
        """
        from lora_da_core.ablation.cells import GroupRun
        from lora_da_core.ablation.workspace import Workspace
        from lora_da_core.registry import Registry

        torch.set_num_threads(self._threads)
        if not sys.warnoptions:
            warnings.simplefilter("ignore", FutureWarning)  # as the command line does for its own process
        try:
            workspace = Workspace(self._grid.run, Registry())
            self._run = GroupRun(workspace)
            return Message("loaded", workspace.entry(self._grid))
        except LoraDAError as error:
            return Message("error", error)

    def step(self, group: Group | None = None) -> Message:
        """Runs one cell.

        Args:
            group: A group to begin with; None goes on with the last one.

        Returns:
            A `record`, or `idle` where the group has no more.
        """
        if group is not None:
            self._records = self._run.records(group)
        record = next(self._records, None)
        return Message("idle") if record is None else Message("record", record)


class Worker(ABC):
    """A worker as the parent sees it.

    Attributes:
        channel: What its pool waits for.
        group: What it was last given.
        owed: Cells of that without a record yet, by id.
    """

    def __init__(self) -> None:
        self.channel: Any = None
        self.group: Group | None = None
        self.owed: dict[str, Cell] = {}

    def give(self, group: Group) -> None:
        """Hands over the next group.

        Args:
            group: The cells to run.
        """
        self.group, self.owed = group, {cell.id: cell for cell in group.cells}
        self._send(group)

    @abstractmethod
    def _send(self, group: Group) -> None:
        """Passes a group on; that it cannot be passed on is for `receive` to say."""

    @abstractmethod
    def receive(self) -> Message:
        """The message that waits; a death is one, and never an exception."""

    @abstractmethod
    def close(self) -> None:
        """Ends the worker, whatever it does."""


class Pool(ABC):
    """Where workers come from. As a context it ends, when it is left, what it began for them.

    Attributes:
        retries: How often the work of a worker that died goes to another, without a cell finished in between.
    """

    retries = 0

    @abstractmethod
    def __enter__(self) -> Pool:
        """Makes ready.

        Raises:
            LoraDAError: There is no place for workers.
        """

    @abstractmethod
    def __exit__(self, *exc: object) -> None:
        """Ends everything that was begun."""

    @abstractmethod
    def start(self) -> Worker:
        """A new worker; its first message says that it has loaded."""

    @abstractmethod
    def ready(self, workers: Sequence[Worker]) -> Iterable[Worker]:
        """Waits until there are messages.

        Args:
            workers: Those that are waited for.

        Returns:
            Those with a message, at least one.
        """


class Dispatch:
    """Runs groups on a pool's workers. The caller alone writes, so a death loses at most the cell it was at.

    Args:
        pool: Where workers come from, entered.
        groups: What is to be done.
        directory: Where `run.json` is written.
    """

    def __init__(self, pool: Pool, groups: Sequence[Group], directory: Path) -> None:
        self._pool, self._directory = pool, directory
        self._waiting = list(reversed(groups))
        self._workers: list[Worker] = []
        self._deaths: Counter[str | None] = Counter()
        self._entries: list[Any] = []

    def records(self, jobs: int) -> Generator[Record, None, None]:
        """Starts workers and has every group done; ends the workers however it is left.

        Args:
            jobs: How many workers.

        Yields:
            One record per cell.

        Raises:
            LoraDAError: The model or the data cannot be loaded.
        """
        try:
            self._workers.extend(self._pool.start() for _ in range(jobs))
            while self._waiting or any(worker.owed for worker in self._workers):
                for worker in self._pool.ready(self._workers):
                    yield from self._heard(worker, worker.receive())
        finally:
            for worker in self._workers:
                worker.close()

    def _heard(self, worker: Worker, message: Message) -> Iterable[Record]:
        if message.kind == "error":
            raise message.content
        if message.kind == "died":
            return self._died(worker, message.content)
        self._deaths.pop(_key(worker.group), None)
        if message.kind == "record":
            worker.owed.pop(message.content["cell"], None)
            return [message.content]
        if message.kind == "loaded" and message.content not in self._entries:
            self._entries.append(message.content)
            write_run(self._directory, message.content)
        if self._waiting:
            worker.give(self._waiting.pop())
        else:
            self._end(worker)
        return []

    def _died(self, worker: Worker, how: str) -> list[Record]:
        from lora_da_core.ablation.cells import failed_record

        self._end(worker)
        group, owed = worker.group, tuple(worker.owed.values())
        self._deaths[_key(group)] += 1
        again = self._deaths[_key(group)] <= self._pool.retries
        if group is None:
            self._died_loading(how, again)
            return []
        lost: list[Record] = []
        if again and owed:
            logger.warning("%s; another worker does the %d cells that it owed", how, len(owed))
            self._waiting.append(Group(group.key, owed))
        else:
            times = f", {self._pool.retries + 1} times in a row" if self._pool.retries else ""
            lost = [failed_record(cell, group, f"{how}{times}; it may have run out of memory") for cell in owed]
        if self._waiting:
            self._workers.append(self._pool.start())
        return lost

    def _died_loading(self, how: str, again: bool) -> None:
        logger.warning("%s while it loaded the model", how)
        if again:
            self._workers.append(self._pool.start())
        elif not self._workers:
            # Where the memory is too small for one more model, the others do the work.
            raise StorageError(f"{how} while it loaded the model; take fewer jobs.")

    def _end(self, worker: Worker) -> None:
        worker.close()
        self._workers.remove(worker)


def _key(group: Group | None) -> str | None:
    return None if group is None else group.key
