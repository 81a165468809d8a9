"""Runs that are killed at random points: what they leave is nothing or whole, and going on gives the same bytes.

`pytest -m nightly tests/test_crashes.py` kills at many more points than the rest of the tests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lora_da_core import storage
from lora_da_core.cli import app

OURS = ("lora_da_core", "lora_da_estimators", "lora_da_gradients", "lora_da_objectives", "lora_da_solvers")
MARKS = {
    "collect": "statistics",
    "prepare": "solve",
    "search": "scale",
    "save_run": "write",
    "append": "write",
    "show": "after",
    "write_parquet": "after",
}
"""Functions whose first call begins a phase; while something is written, every call of any code is counted."""
PLACES = ("before", "statistics", "solve", "scale", "write", "after")
PRELOADED = (
    "datasets",
    "lora_da_core.ablation.memory",
    "lora_da_core.ablation.runner",
    "lora_da_core.ablation.report",
    "lora_da_core.adapter",
    "lora_da_core.cli",
    "lora_da_core.data",
    "lora_da_core.models",
    "lora_da_core.pipeline",
    "lora_da_core.progress",
    "lora_da_core.report",
    "peft.tuners.lora.bnb",
    "pydantic.type_adapter",
    "pytest",
    "scipy.io",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "typer.testing",
)
PATIENCE = 1200
"""Seconds for a run that takes one or two: a machine may have a great deal else to do."""
LAST = 60
"""Calls at the end of a write, of flushes, renames and what removes the earlier run."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class Clock:
    """Counts calls of functions of this project, and kills the process at one of them."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.calls, self.place = stop, 0, "before"
        self.spans: dict[str, list[int]] = {"before": [0, 0]}
        self._ours: dict[str, bool] = {}

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        """What `sys.settrace` wants, which asks for every call of a run: told of no line, it is told of calls alone."""
        ours = self._ours.get(frame.f_code.co_filename)
        if ours is None:
            name = frame.f_code.co_filename
            ours = self._ours[name] = any(f"/{part}/" in name for part in OURS)
        if not ours:
            if self.place == "write":
                self._count()
            return
        place = MARKS.get(frame.f_code.co_name)
        if place is not None and place not in self.spans:
            self.place = place
            self.spans[place] = [self.calls, self.calls]
        self._count()

    def _count(self) -> None:
        self.calls += 1
        self.spans[self.place][1] = self.calls
        if self.calls == self.stop:
            os.kill(os.getpid(), signal.SIGKILL)


def counted(work: Callable[..., None], arguments: tuple[Any, ...], stop: int | None, spans: Any) -> None:
    """In a process of its own: the work, and where its phases were."""
    logging.disable()
    torch.set_num_threads(1)  # with matrices this small, threads take most of a run to wait for each other
    clock = Clock(stop)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        if stop is not None or spans is not None:
            sys.settrace(clock)
        try:
            work(*arguments)
        finally:
            sys.settrace(None)
    if spans is not None:
        spans.put(clock.spans)


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    # Whatever a run imports, so that a new process starts at once and its calls are those of the run.
    plugins = [point.value for point in entry_points(group="lora_da_core")]
    context.set_forkserver_preload([*PRELOADED, *plugins])
    return context


def run(
    processes: Any, work: Callable[..., None], *arguments: Any, stop: int | None = None, after: float | None = None
) -> int:
    """The exit code."""
    process = processes.Process(target=counted, args=(work, arguments, stop, None))
    process.start()
    if after is not None:
        time.sleep(after)
        process.kill()
    process.join(timeout=PATIENCE)
    assert process.exitcode is not None, f"it did not end within {PATIENCE} s"
    return int(process.exitcode)


def measured(processes: Any, work: Callable[..., None], *arguments: Any) -> dict[str, list[int]]:
    """The phases of an undisturbed run as counts of calls."""
    spans = processes.Queue()
    process = processes.Process(target=counted, args=(work, arguments, None, spans))
    process.start()
    found: dict[str, list[int]] = spans.get(timeout=PATIENCE)
    process.join(timeout=PATIENCE)
    assert process.exitcode == 0
    return found


def points(spans: dict[str, list[int]], each: dict[str, int], seed: int) -> list[int]:
    """So many random calls of each phase."""
    draw = random.Random(seed)
    return [draw.randint(spans[place][0] + 1, spans[place][1]) for place, count in each.items() for _ in range(count)]


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


# init


def init(world: Path, output: Path, *more: str) -> None:
    os.chdir(world)
    arguments = [
        "init",
        "--model",
        "model",
        "--data",
        "data.jsonl",
        "--samples",
        "12",
        "--rank",
        "2",
        "--device",
        "cpu",
    ]
    outcome = CliRunner().invoke(app, [*arguments, "--output", str(output), *more])
    if outcome.exit_code:
        raise SystemExit(outcome.exit_code)


def adapter_bytes(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in ADAPTER}


@dataclass(frozen=True)
class Undisturbed:
    """A run of `init` that nobody killed: its directory, its phases as counts of calls."""

    output: Path
    spans: dict[str, list[int]]


@pytest.fixture(scope="module")
def undisturbed(processes: Any, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    spans = measured(processes, init, world, output, "--resume")
    assert set(spans) == set(PLACES) and hidden(output.parent) == []
    verified = CliRunner().invoke(app, ["verify", str(output), "--model", str(world / "model"), "--device", "cpu"])
    assert verified.exit_code == 0, verified.output
    return Undisturbed(output, spans)


def check_init(
    processes: Any, world: Path, whole_run: Undisturbed, root: Path, each: dict[str, int], delays: int, seed: int
) -> tuple[int, int]:
    """Kills runs, and goes on with them; how many were killed, and how many of those had written their adapter."""
    expected = adapter_bytes(whole_run.output)
    draw = random.Random(seed)
    stops: list[dict[str, Any]] = [{"stop": stop} for stop in points(whole_run.spans, each, seed)]
    if delays:
        # One that counts nothing, as those that are killed after a time: counting takes longer than running.
        start = time.perf_counter()
        assert run(processes, init, world, root / "timed" / "run", "--resume") == 0
        seconds = time.perf_counter() - start
        stops += [{"after": draw.uniform(0.1, 0.9) * seconds} for _ in range(delays)]
    killed = whole = 0
    for number, stop in enumerate(stops):
        output = root / str(number) / "run"
        output.parent.mkdir()
        code = run(processes, init, world, output, "--resume", **stop)
        assert code in (0, -signal.SIGKILL), (stop, code)
        killed += code != 0
        if output.exists():
            whole += code != 0
            assert adapter_bytes(output) == expected, stop
            assert storage.read_report(output).layers and storage.read_settings(output)
        assert run(processes, init, world, output, "--resume") == 0, stop
        assert adapter_bytes(output) == expected, stop
        assert hidden(output.parent) == [] and [path.name for path in output.parent.iterdir()] == ["run"], stop
    return killed, whole


def test_a_killed_init_leaves_nothing_or_everything_and_goes_on(
    processes: Any, world: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    each = dict.fromkeys(PLACES, 1)
    killed, _ = check_init(processes, world, undisturbed, tmp_path, each, delays=0, seed=0)
    assert killed == len(PLACES)


@pytest.mark.nightly
def test_init_killed_at_many_points(processes: Any, world: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    each = {"before": 4, "statistics": 10, "solve": 8, "scale": 8, "write": 14, "after": 4}
    killed, whole = check_init(processes, world, undisturbed, tmp_path, each, delays=12, seed=1)
    print(f"killed {killed} runs of init; {whole} of them had written their adapter")
    assert killed >= 48


def replace(world: Path, output: Path) -> None:
    init(world, output, "--overwrite", "--alpha", "0.5", "--scale", "fixed", "--gamma", "8")


def check_replacing(processes: Any, world: Path, first: Path, root: Path, count: int, seed: int) -> int:
    """Kills runs that replace an earlier one; how many of them left the new one."""
    second = Path(shutil.copytree(first, root / "second" / "run"))
    spans = measured(processes, replace, world, second)
    old, new = adapter_bytes(first), adapter_bytes(second)
    assert old != new
    start, end = spans["write"]
    draw = random.Random(seed)
    # The renames come last; half of the kills are where they are.
    stops = draw.sample(range(start + 1, end - LAST), count - count // 2)
    stops += draw.sample(range(end - LAST, end + 1), count // 2)
    replaced = 0
    for number, stop in enumerate(stops):
        output = Path(shutil.copytree(first, root / str(number) / "run"))
        assert run(processes, replace, world, output, stop=stop) == -signal.SIGKILL
        storage.settle_leftovers(output)
        assert adapter_bytes(output) in (old, new), stop
        assert hidden(output.parent) == []
        replaced += adapter_bytes(output) == new
    return replaced


def test_an_earlier_run_is_never_lost(processes: Any, world: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Killed while it replaces: the earlier run is there, or the new one, or comes back with the next command."""
    check_replacing(processes, world, undisturbed.output, tmp_path, count=2, seed=2)


@pytest.mark.nightly
def test_an_earlier_run_survives_many_kills(
    processes: Any, world: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    replaced = check_replacing(processes, world, undisturbed.output, tmp_path, count=16, seed=5)
    print(f"killed 16 runs that replace another; {replaced} of them left the new one")


def test_between_the_two_renames_the_new_run_is_completed(tmp_path: Path) -> None:
    workspace, output = tmp_path / ".run.abcdefgh.partial", tmp_path / "run"
    for part in ("old", "new"):
        (workspace / part).mkdir(parents=True)
        (workspace / part / storage.REPORT_FILE).write_text(part)
    other = tmp_path / ".run.mine.abcdefgh.partial"
    other.mkdir()
    storage.settle_leftovers(output)
    assert (output / storage.REPORT_FILE).read_text() == "new" and not workspace.exists()
    assert other.exists(), "of a directory called run.mine"


def test_what_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    output = tmp_path / "run"

    def fill(fresh: Path) -> None:
        (fresh / "file").write_text("whole")
        storage.settle_leftovers(output)

    storage.replace_directory(output, fill)
    assert (output / "file").read_text() == "whole" and hidden(tmp_path) == []


# What --resume does where nothing was killed


def invoke(world: Path, output: Path, *more: str) -> Any:
    arguments = ["init", "--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--device", "cpu"]
    return CliRunner().invoke(app, [*arguments, "--samples", "12", "--rank", "2", "--output", str(output), *more])


def test_resume_leaves_a_complete_run_and_refuses_another(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert invoke(world, output, "--resume").exit_code == 0
    stamp, there = (output / ADAPTER[1]).stat().st_mtime_ns, sorted(output.iterdir())
    again = invoke(world, output, "--resume")
    assert again.exit_code == 0 and "the run is complete already" in again.output
    assert (output / ADAPTER[1]).stat().st_mtime_ns == stamp and sorted(output.iterdir()) == there
    other = invoke(world, output, "--resume", "--damping", "2")
    assert other.exit_code == 2 and f"{output} holds a run with another damping" in " ".join(other.output.split())
    both = invoke(world, output, "--resume", "--overwrite")
    assert both.exit_code == 2 and "leave out one of them" in both.output
    (output / storage.REPORT_FILE).unlink()
    foreign = invoke(world, output, "--resume")
    assert foreign.exit_code == 2 and "finds no run of lora-da" in foreign.output


def test_resume_goes_with_divided_layers_and_not_with_a_cache(world: Path, tmp_path: Path) -> None:
    refused = invoke(world, tmp_path / "run", "--resume", "--cache-dir", str(tmp_path / "cache"))
    assert refused.exit_code == 2 and "leave out --resume" in refused.output
    assert invoke(world, tmp_path / "parts", "--resume", "--max-memory", "1GiB").exit_code == 0
    assert hidden(tmp_path) == []


# Cells of a grid


def grid(world: Path, output: Path, estimators: tuple[str, ...]) -> None:
    from lora_da_core.ablation.runner import run_grid

    run_grid(
        {
            "run": {"model": str(world / "model"), "data": str(world / "data.jsonl"), "samples": 12, "device": "cpu"},
            "grid": {"estimator": list(estimators), "rank": [2], "beta": [0.1, 1.0]},
        },
        output,
    )


def cells(output: Path) -> dict[str, tuple[str, str]]:
    lines = (output / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["cell"] for record in records}) == len(records)
    return {record["cell"]: (record["status"], record["digest"]) for record in records}


def check_grid(
    processes: Any, world: Path, root: Path, estimators: tuple[str, ...], each: dict[str, int], seed: int
) -> int:
    spans = measured(processes, grid, world, root / "undisturbed", estimators)
    expected = cells(root / "undisturbed")
    assert len(expected) == 2 * len(estimators) and {status for status, _ in expected.values()} == {"done"}
    for number, stop in enumerate(points(spans, each, seed)):
        output = root / str(number)
        assert run(processes, grid, world, output, estimators, stop=stop) == -signal.SIGKILL
        assert run(processes, grid, world, output, estimators) == 0
        assert cells(output) == expected, stop
    return sum(each.values())


def test_a_killed_grid_goes_on_with_the_same_results(processes: Any, world: Path, tmp_path: Path) -> None:
    each = {"statistics": 1, "write": 1}
    assert check_grid(processes, world, tmp_path, ("kfac",), each, seed=3) == 2


@pytest.mark.nightly
def test_a_grid_killed_at_many_points(processes: Any, world: Path, tmp_path: Path) -> None:
    each = {"before": 1, "statistics": 5, "solve": 5, "write": 10, "after": 3}
    print(f"killed {check_grid(processes, world, tmp_path, ('kfac', 'identity'), each, seed=4)} grids")
