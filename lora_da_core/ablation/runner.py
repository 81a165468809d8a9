"""Runs a grid into a directory: what is finished stays, what is missing is done, whatever ended the run before."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lora_da_core.ablation.dispatch import Dispatch, Pool
from lora_da_core.ablation.grid import Grid, Group, make_grid, read_grid
from lora_da_core.ablation.grid_cell import Cell
from lora_da_core.ablation.processes import ProcessPool
from lora_da_core.ablation.results import DONE, RESULTS, RUN, Record, Results, locked, write_parquet, write_run
from lora_da_core.cli_options import places_checked
from lora_da_core.errors import OptionError
from lora_da_core.registry import Registry
from lora_da_core.storage import check_writable

LOCAL: Final = "local"
RAY: Final = "ray"

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
    executor: str = LOCAL,
    jobs: int = 1,
    retry_failed: bool = False,
    on_record: OnRecord | None = None,
) -> list[Record]:
    """Runs what a grid lacks, then writes results.parquet, report.md and report.html.

    With `jobs` above 1 the local executor spawns processes, so a script must call this under
    `if __name__ == "__main__"`.

    Args:
        grid: A grid, its content as mappings, or its file.
        output: The directory; cells of other grids that it holds are kept.
        executor: `local` runs on this machine; `ray` on the Ray cluster that RAY_ADDRESS names, or on an instance that
            is started here and ended with the run.
        jobs: Groups that run at once, each in a process with a model of its own. Times and memory are best
            compared with 1.
        retry_failed: Whether cells that failed are run again.
        on_record: Told of every cell as it finishes.

    Returns:
        The records of this grid's cells.

    Raises:
        OptionError: The grid or an argument is wrong, or the directory cannot be written; nothing was loaded.
        StorageError: Another run writes to the directory, or what it holds is damaged or of data that have changed.
        LoraDAError: The model or the data cannot be loaded, or the Ray cluster cannot be joined.
    """
    from lora_da_core.ablation.report import write_report

    checked = _grid(grid)
    _check(checked, executor, jobs)
    directory = Path(output)
    _check_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        results = Results(directory)
        results.drop_torn_line()
        finished = _finished(results, retry_failed)
        groups = checked.groups(without=finished)
        total = len(checked.cells)
        done = total - sum(len(group.cells) for group in groups)
        with closing(_records(checked, groups, directory, executor, jobs)) as records:
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
    grid: Grid | Mapping[str, Any] | Path | str,
    output: Path | str,
    *,
    executor: str = LOCAL,
    jobs: int = 1,
    retry_failed: bool = False,
) -> Plan:
    """What `run_grid` would do; nothing is loaded, and nothing is left behind.

    Args:
        grid: As `run_grid` takes it.
        output: As `run_grid` takes it.
        executor: As `run_grid` takes it.
        jobs: As `run_grid` takes it.
        retry_failed: As `run_grid` takes it.

    Returns:
        The plan.

    Raises:
        OptionError: As `run_grid`.
    """
    checked, results = _grid(grid), Results(Path(output))
    _check(checked, executor, jobs)
    _check_directory(results.directory)
    groups = checked.groups(without=_finished(results, retry_failed))
    left = sum(len(group.cells) for group in groups)
    records = [record for record in results.read() if record["status"] == DONE]
    return Plan(len(checked.cells), len(checked.cells) - left, len(groups), _estimated(groups, records, jobs))


def _grid(grid: Grid | Mapping[str, Any] | Path | str) -> Grid:
    if isinstance(grid, Grid):
        return grid
    return make_grid(grid) if isinstance(grid, Mapping) else read_grid(grid)


def _check(grid: Grid, executor: str, jobs: int) -> None:
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise OptionError(f"jobs is {jobs!r}; it must be a whole number of at least 1.")
    if executor not in (LOCAL, RAY):
        raise OptionError(f"executor is {executor!r}; it must be {LOCAL!r} or {RAY!r}.")
    if executor == RAY:
        from lora_da_core.ablation import ray_actors

        ray_actors.check(grid.run)


def _check_directory(directory: Path) -> None:
    with places_checked():
        check_writable(directory)
    files = [path.name for path in directory.iterdir()] if directory.exists() else []
    if any(not name.startswith(".") for name in files) and not {RESULTS, RUN} & set(files):
        raise OptionError(f"{directory} holds something that is not a grid's results; give another directory.")


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


def _records(
    grid: Grid, groups: Sequence[Group], directory: Path, executor: str, jobs: int
) -> Generator[Record, None, None]:
    if not groups:
        return
    pool = _pool(executor, grid, min(jobs, len(groups)))
    if pool is not None:
        with pool:
            yield from Dispatch(pool, groups, directory).records(min(jobs, len(groups)))
        return
    from lora_da_core.ablation.cells import GroupRun
    from lora_da_core.ablation.workspace import Workspace

    workspace = Workspace(grid.run, Registry())
    write_run(directory, workspace.entry(grid))
    yield from GroupRun(workspace).records(*groups)


def _pool(executor: str, grid: Grid, jobs: int) -> Pool | None:
    threads = max(1, torch.get_num_threads() // jobs)
    if executor == RAY:
        from lora_da_core.ablation.ray_actors import RayPool

        return RayPool(grid, threads, jobs)
    return ProcessPool(grid, threads) if jobs > 1 else None
