"""`lora-da ablate`: its options and what it prints."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_da_core.cli_options import ExitCode, path
from lora_da_core.errors import OptionError

if TYPE_CHECKING:
    from lora_da_core.ablation.results import Record


@dataclass(frozen=True)
class AblateOptions:
    """Everything `lora-da ablate` is told."""

    grid: Annotated[
        Path, typer.Argument(parser=path, metavar="GRID.toml", help="The grid: what is run and what is varied.")
    ]
    output: Annotated[
        Path, typer.Option(parser=path, help="Directory of the results; a run that was cut off there goes on.")
    ]
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many cells there are, and how long they would take.")
    ] = False
    executor: Annotated[
        str, typer.Option(metavar="local | ray", help="Where groups run: on this machine, or on Ray's workers.")
    ] = "local"
    jobs: Annotated[int, typer.Option(help="Groups of cells that run at once, in processes of their own.")] = 1
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run cells that failed once more.")] = False
    model: Annotated[str | None, typer.Option(help="The base model.", show_default="the grid's")] = None
    data: Annotated[str | None, typer.Option(help="The data set.", show_default="the grid's")] = None
    device: Annotated[str | None, typer.Option(help="Where to run.", show_default="the grid's")] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with the model; a grid alone cannot ask for it."),
    ] = False


def ablate(options: AblateOptions) -> None:
    """Run a grid of approximations: cost, fidelity and fine-tunes of each, with a report."""
    from lora_da_core.ablation.grid import read_grid
    from lora_da_core.ablation.report import HTML
    from lora_da_core.ablation.results import FAILED
    from lora_da_core.ablation.runner import plan, run_grid

    given: dict[str, Any] = {name: getattr(options, name) for name in ("model", "data", "device")}
    for name, value in given.items():
        if value == "":
            raise OptionError(f"--{name} is empty; leave it out to take the grid's.")
    given["trust_remote_code"] = options.trust_remote_code or None
    grid = read_grid(options.grid, **{name: value for name, value in given.items() if value is not None})
    if grid.run.trust_remote_code and not options.trust_remote_code:
        raise OptionError(
            f"{options.grid} asks for trust_remote_code; give --trust-remote-code if you trust the model."
        )
    how: dict[str, Any] = {name: getattr(options, name) for name in ("executor", "jobs", "retry_failed")}
    if options.dry_run:
        found = plan(grid, options.output, **how)
        typer.echo(f"cells: {found.cells}, {found.finished} of them finished")
        typer.echo(f"groups to estimate: {found.groups}")
        typer.echo(f"estimated time: {'unknown' if found.seconds is None else f'{found.seconds:.0f} s'}")
        return
    with _notes_in_records():
        records = run_grid(grid, options.output, on_record=_tell, **how)
    failed = sum(record["status"] == FAILED for record in records)
    typer.echo(
        f"{len(records)} {'cell' if len(records) == 1 else 'cells'}, {failed} failed; report: {options.output / HTML}"
    )
    if failed == len(records):
        raise typer.Exit(ExitCode.FAILED)


def _tell(record: Record, done: int, total: int) -> None:
    name = record["baseline"] or f"{record['estimator']} {record['solver']}"
    angle = "" if record["angle"] is None else f", angle {record['angle']:.3g}"
    outcome = record["error"] if record["error"] else f"{record['seconds']:.2f} s{angle}"
    typer.echo(f"{done}/{total} {name} r={record['rank']} seed={record['seed']}: {outcome}", err=True)


@contextlib.contextmanager
def _notes_in_records() -> Iterator[None]:
    """Keeps warnings of single runs off the terminal: every record holds its own as `notes`."""
    logger = logging.getLogger("lora_da_core")
    handler, propagate = logging.NullHandler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
