"""Runs a grid into a directory: what is finished stays, what is missing is done, whatever ended the run before."""

from __future__ import annotations

import logging
import multiprocessing
import os
import statistics
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import torch

from lora_da_core.ablation.grid import Cell, Grid, Group, make_grid, read_grid
from lora_da_core.ablation.results import DONE, RESULTS, RUN, Record, Results, locked, write_parquet, write_run
from lora_da_core.errors import LoraDAError, OptionError, StorageError
from lora_da_core.registry import Registry

logger = logging.getLogger(__name__)

PATIENCE: Final = 5.0
"""Seconds that an idle worker has to end by itself."""

OnRecord = Callable[[Record, int, int], None]
"""Called with each new record, how many cells of the grid are finished, and how many there are."""


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        cells: Cells of the grid.
        finished: Those that the directory holds.
        groups: Groups with cells to do; each takes one estimation.
        seconds: Estimated time, from the directory's finished cells; None where there are none.
    """

    cells: int
    finished: int
    groups: int
    seconds: float | None


def run_grid(
    grid: Grid | Mapping[str, Any] | Path | str,
    output: Path | str,
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    on_record: OnRecord | None = None,
) -> list[Record]:
    """Runs what a grid lacks, then writes results.parquet, report.md and report.html.

    With `jobs` above 1 processes are spawned, so a script must call this under `if __name__ == "__main__"`.

    Args:
        grid: A grid, its content as mappings, or its file.
        output: The directory; cells of other grids that it holds are kept.
        jobs: Groups that run at once, each in a process with a model of its own. Times and memory are best
            compared with 1.
        retry_failed: Whether cells that failed are run again.
        on_record: Told of every cell as it finishes.

    Returns:
        The records of this grid's cells.

    Raises:
        OptionError: The grid or an argument is wrong; nothing was loaded.
        StorageError: The directory cannot be used.
        LoraDAError: The model or the data cannot be loaded.
    """
    from lora_da_core.ablation.report import write_report

    checked = _grid(grid)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise OptionError(f"jobs is {jobs!r}; it must be a whole number of at least 1.")
    directory = Path(output)
    _prepare(directory)
    with locked(directory):
        results = Results(directory)
        results.drop_torn_line()
        finished = _finished(results, retry_failed)
        groups = checked.groups(without=finished)
        total = len(checked.cells)
        done = total - sum(len(group.cells) for group in groups)
        with closing(_records(checked, groups, directory, jobs)) as records:
            for record in records:
                results.append(record)
                done += 1
                if on_record is not None:
                    on_record(record, done, total)
        every = results.read()
        write_parquet(directory, every)
        write_report(directory, every, checked.run)
    wanted = {cell.id for cell in checked.cells}
    return [record for record in every if record["cell"] in wanted]


def plan(
    grid: Grid | Mapping[str, Any] | Path | str, output: Path | str, *, jobs: int = 1, retry_failed: bool = False
) -> Plan:
    """What `run_grid` would do; nothing is loaded or written.

    Args:
        grid: As `run_grid` takes it.
        output: As `run_grid` takes it.
        jobs: As `run_grid` takes it.
        retry_failed: As `run_grid` takes it.

    Returns:
        The plan.
    """
    checked, results = _grid(grid), Results(Path(output))
    groups = checked.groups(without=_finished(results, retry_failed))
    left = sum(len(group.cells) for group in groups)
    records = [record for record in results.read() if record["status"] == DONE]
    return Plan(len(checked.cells), len(checked.cells) - left, len(groups), _estimated(groups, records, jobs))


def _grid(grid: Grid | Mapping[str, Any] | Path | str) -> Grid:
    if isinstance(grid, Grid):
        return grid
    return make_grid(grid) if isinstance(grid, Mapping) else read_grid(grid)


def _prepare(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise StorageError(f"{directory} is a file; give a directory.")
    files = [path.name for path in directory.iterdir()] if directory.exists() else []
    if any(not name.startswith(".") for name in files) and not {RESULTS, RUN} & set(files):
        raise StorageError(f"{directory} holds something that is not a grid's results; give another directory.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{directory} cannot be created: {error}") from error


def _finished(results: Results, retry_failed: bool) -> set[str]:
    return {record["cell"] for record in results.read() if record["status"] == DONE or not retry_failed}


def _estimated(groups: Sequence[Group], records: Sequence[Record], jobs: int) -> float | None:
    if not records:
        return None
    total = 0.0
    for group in groups:
        alike = [record for record in records if _kind_of(record) == _kind(group.cells[0])] or records
        total += len(group.cells) * statistics.median(_own_seconds(record) for record in alike)
        total += statistics.median(_estimation_seconds(record) for record in alike)
    return total / min(jobs, len(groups)) if groups else 0.0


def _kind(cell: Cell) -> Any:
    return cell.baseline or (None if cell.estimator is None else cell.estimator[0])


def _kind_of(record: Record) -> Any:
    return record["baseline"] or record["estimator"]


def _estimation_seconds(record: Record) -> float:
    phases = record["phases"]
    return float(phases.get("statistics", 0.0) + phases.get("gradient", 0.0))


def _own_seconds(record: Record) -> float:
    return float(record["spent"]) - (0.0 if record["reused"] else _estimation_seconds(record))


def _records(grid: Grid, groups: Sequence[Group], directory: Path, jobs: int) -> Generator[Record, None, None]:
    if not groups:
        return
    if min(jobs, len(groups)) > 1:
        yield from _in_processes(grid, groups, directory, min(jobs, len(groups)))
        return
    from lora_da_core.ablation.cells import GroupRun
    from lora_da_core.ablation.workspace import Workspace

    workspace = Workspace(grid.run, Registry())
    write_run(directory, workspace.entry(grid))
    run = GroupRun(workspace)
    for group in groups:
        yield from run.records(group)


# Several processes: the parent alone writes, so that a worker's death loses at most what it was doing.


class _Worker:
    """A process that runs groups, and what it still owes."""

    def __init__(self, grid: Grid, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_work, args=(grid, threads, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.group: Group | None = None
        self.owed: dict[str, Cell] = {}

    def give(self, group: Group | None) -> None:
        """Hands over the next group, or the end."""
        self.group, self.owed = group, {} if group is None else {cell.id: cell for cell in group.cells}
        try:
            self.pipe.send(group)
        except (BrokenPipeError, OSError):
            return  # it died while idle; reading its pipe says so

    def close(self) -> None:
        """Ends the process: by itself where it waits for a group, otherwise whatever it does."""
        if not self.owed and self.process.is_alive():
            self.give(None)
            self.process.join(PATIENCE)
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _in_processes(grid: Grid, groups: Sequence[Group], directory: Path, jobs: int) -> Generator[Record, None, None]:
    from lora_da_core.ablation.cells import failed_record

    waiting = list(reversed(groups))
    threads = max(1, torch.get_num_threads() // jobs)
    workers = [_Worker(grid, threads) for _ in range(jobs)]
    try:
        while workers:
            for pipe in wait([worker.pipe for worker in workers]):
                worker = next(each for each in workers if each.pipe is pipe)
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.close()
                    workers.remove(worker)
                    text = f"the worker process ended with exit code {worker.process.exitcode}"
                    if worker.group is None:
                        # Where the memory is too small for one more model, the others do the work.
                        logger.warning("%s while it loaded the model", text)
                        if not workers:
                            raise StorageError(f"{text} while it loaded the model; take fewer jobs.") from None
                        continue
                    for cell in worker.owed.values():
                        yield failed_record(cell, worker.group, f"{text}; it may have run out of memory")
                    if waiting:
                        workers.append(_Worker(grid, threads))
                    continue
                if kind == "record":
                    worker.owed.pop(content["cell"], None)
                    yield content
                elif kind == "error":
                    raise content
                else:
                    if content is not None:
                        write_run(directory, content)
                    if waiting:
                        worker.give(waiting.pop())
                    else:
                        worker.close()
                        workers.remove(worker)
    finally:
        for worker in workers:
            worker.close()


def _work(grid: Grid, threads: int, pipe: Connection[Any, Any]) -> None:
    """A worker: tells what it loaded, then runs the groups it is given."""
    from lora_da_core.ablation.cells import GroupRun
    from lora_da_core.ablation.workspace import Workspace

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # as the command line does for its own process
    try:
        workspace = Workspace(grid.run, Registry())
        pipe.send(("idle", workspace.entry(grid)))
    except LoraDAError as error:
        pipe.send(("error", error))
        return
    run = GroupRun(workspace)
    while (group := pipe.recv()) is not None:
        for record in run.records(group):
            pipe.send(("record", record))
        pipe.send(("idle", None))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
