"""What a person reads of `lora-da` where things are not as they should be, and on odd terminals."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer import rich_utils
from typer.main import get_command
from typer.testing import CliRunner

from lora_da_core.cli import app

WRONG, FAILED = 2, 1


@pytest.fixture(scope="module")
def desk(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data, a finished run and files that are not what they should be."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "model").symlink_to(world / "model")
    (folder / "data.jsonl").write_text((world / "data.jsonl").read_text())
    (folder / "bad.toml").write_text("rank = \n")
    (folder / "unknown.toml").write_text("[run]\nmodle = 'model'\n[grid]\nrank = [2]\n")
    (folder / "grid.toml").write_text("[run]\nmodel = 'model'\ndata = 'data.jsonl'\n[grid]\nestimator = ['identity']\n")
    (folder / "blank.toml").write_text("[run]\nmodel = 'model'\ndata = ''\n[grid]\nrank = [2]\n")
    (folder / "odd").mkdir()
    (folder / "odd" / "lora_da_report.json").write_text("{}")
    before = Path.cwd()
    os.chdir(folder)
    try:
        outcome = lora_da("init", "--model", "model", "--data", "data.jsonl", "--output", "run", "--rank", "2")
        assert outcome.exit_code == 0, outcome.output
        shutil.copytree(folder / "run", folder / "cut")
        shutil.copytree(folder / "run", folder / "other")
        settings = folder / "other" / "adapter_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "r": 4}))
        with (folder / "cut" / "adapter_model.safetensors").open("r+b") as file:
            file.truncate(1000)
        yield folder
    finally:
        os.chdir(before)


def lora_da(*arguments: str, **environment: str) -> Any:
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "80", **environment}).invoke(app, arguments)


EMPTY = (
    "init --model model --data data.jsonl --output",
    "init --model model --data data.jsonl --output new --config",
    "init --model model --data data.jsonl --output new --cache-dir",
    "init --model model --data data.jsonl --output new --offload-dir",
    "inspect",
    "inspect run --plot",
    "verify",
    "verify run --numerics --cache-dir",
    "ablate grid.toml --output",
    "ablate --output new",
)
"""Commands that an empty path completes."""

TABLE = [
    ("inspect", WRONG, "Missing argument 'DIR'"),
    ("inspect nosuch", FAILED, "nosuch/lora_da_report.json does not exist; give a directory that 'lora-da init' wrote"),
    ("inspect model", FAILED, "give a directory that 'lora-da init' wrote"),
    ("inspect data.jsonl", FAILED, "give a directory that 'lora-da init' wrote"),
    ("inspect odd", FAILED, "odd/lora_da_report.json: this is not a lora-da report: it has no 'layers'."),
    ("inspect run run", WRONG, "unexpected extra argument"),
    ("inspect run --jsn", WRONG, "--json"),
    ("inspect run --plot", WRONG, "requires an argument"),
    ("inspect run --plot nosuch/picture.png", WRONG, "the folder nosuch does not exist"),
    ("inspect run --plot model", FAILED, "cannot write the picture model"),
    ("verify", WRONG, "Missing argument 'DIR'"),
    ("verify nosuch", FAILED, "give a directory that 'lora-da init' wrote"),
    ("verify odd", FAILED, "odd/lora_da_report.json: this is not a lora-da report"),
    ("verify run --model ./nosuch", FAILED, "model './nosuch' does not exist"),
    ("verify run --model data.jsonl", FAILED, "not a .gguf file; give the directory"),
    ("verify run --data nosuch.jsonl", FAILED, "In that folder there is: data.jsonl"),
    ("verify run --data data.jsonl --split nosuch", FAILED, "Unknown split"),
    ("verify run --dtype float8", WRONG, "choose one of auto, float32"),
    ("verify run --device abacus", WRONG, "device 'abacus' cannot be used: torch knows no such device. Take 'auto'"),
    ("verify run --devize cpu", WRONG, "--device"),
    ("verify run --split train", WRONG, "--split is a part of --data; give both, or neither."),
    ("verify run --cache-dir cache", WRONG, "--cache-dir holds the statistics that --numerics reads"),
    ("verify other", FAILED, "PEFT cannot load other onto this model: Error(s) in loading"),
    ("verify cut --device abacus", FAILED, "cut/adapter_model.safetensors cannot be read: "),
    ("plugins extra", WRONG, "unexpected extra argument"),
    ("plugins --jsn", WRONG, "--json"),
    ("ablate", WRONG, "Missing argument 'GRID.toml'"),
    ("ablate grid.toml", WRONG, "Missing option '--output'"),
    ("ablate nosuch.toml --output new", WRONG, "grid nosuch.toml cannot be read"),
    ("ablate bad.toml --output new", WRONG, "is not valid TOML"),
    ("ablate unknown.toml --output new", WRONG, "unknown key 'modle'. Did you mean 'model'"),
    ("ablate grid.toml --output data.jsonl", WRONG, "data.jsonl is a file; give a directory"),
    ("ablate grid.toml --output /proc/lora-da/new", WRONG, "cannot be created: /proc is not writable; give another"),
    ("ablate grid.toml --output /proc/self/fd", WRONG, "error: /proc/self/fd is not writable; give another directory."),
    ("ablate grid.toml --output odd", WRONG, "is not a grid's results; give another directory"),
    ("ablate grid.toml --output odd --dry-run", WRONG, "is not a grid's results; give another directory"),
    ("ablate grid.toml --output new --model ''", WRONG, "error: --model is empty; leave it out to take the grid's."),
    ("ablate blank.toml --output new", WRONG, "blank.toml [run]: data is ''; it must be a text that is not empty."),
    ("ablate grid.toml --output new --jobs 0", WRONG, "jobs is 0"),
    ("ablate grid.toml --output new --jobs some", WRONG, "Invalid value for '--jobs'"),
    ("ablate grid.toml --output new --executor slurm", WRONG, "it must be 'local' or 'ray'"),
    ("ablate grid.toml --output new --data nosuch.jsonl", FAILED, "data file 'nosuch.jsonl' does not exist"),
    *((f"{line} ''", WRONG, "the path is empty; '.' is the working directory") for line in EMPTY),
    ("innit", WRONG, "Did you mean 'init'? See --help."),
    ("--nosuch", WRONG, "No such option: --nosuch. See --help."),
]
"""Commands, exit codes and part of the one line that says what is wrong.

Those of `init` and `plan` are in test_cli.py, but for empty paths.
"""


@pytest.mark.parametrize(("line", "status", "message"), TABLE, ids=[line for line, _, _ in TABLE])
def test_what_is_wrong_is_one_line(desk: Path, line: str, status: int, message: str) -> None:
    there = sorted(desk.rglob("*"))
    outcome = lora_da(*shlex.split(line))
    assert outcome.exit_code == status, outcome.output
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last and len(last) < 700, last
    assert [text for text in outcome.stderr.splitlines() if text.startswith(("error", "Traceback"))] == [last]
    left = [path.name for path in sorted(desk.rglob("*")) if path not in there]
    assert set(left) <= {"spectra.png"} | ({"new", ".lock"} if status == FAILED else set())


def test_a_narrow_terminal_loses_nothing(desk: Path) -> None:
    for arguments in (("inspect", "run"), ("plugins",)):
        narrow, usual = (lora_da(*arguments, COLUMNS=columns).stdout for columns in ("30", "80"))
        assert narrow == usual
    narrow, usual = (lora_da("plan", "--model", "model", COLUMNS=columns).stdout for columns in ("30", "80"))
    assert narrow != usual
    assert re.findall(r"[\d.]+ [KM]iB", narrow) == re.findall(r"[\d.]+ [KM]iB", usual) != []


@pytest.mark.parametrize("arguments", [("inspect", "run"), ("plugins",), ("init", "--help"), ("nosuch",)])
def test_no_color_means_none_even_on_a_terminal(
    desk: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich_utils, "FORCE_TERMINAL", True)
    forced = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    plain = lora_da(*arguments, **forced, NO_COLOR="1").output
    assert re.findall(r"\x1b\[[\d;]*3\d[\d;]*m", plain) == []
    assert "\x1b" not in lora_da(*arguments, TERM="dumb").output


def process(desk: Path, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    colouring = ("FORCE_COLOR", "TTY_COMPATIBLE", "GITHUB_ACTIONS", "PY_COLORS")
    environment = {name: value for name, value in os.environ.items() if name not in colouring}
    environment |= changes
    code = "from lora_da_core.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=desk, text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell has its background jobs ignore interrupts, and so would what they start.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_help_on_a_narrow_terminal_shows_every_option_whole(desk: Path) -> None:
    group: Any = get_command(app)
    for name in ("init", "plan"):
        shown = process(desk, name, "--help", COLUMNS="40").communicate(timeout=120)[0]
        options = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert [option for option in sorted(options) if not re.search(rf"{option}\b", shown)] == []
        assert re.findall(r"\w…", shown) == []  # what is cut short


def test_an_interrupt_leaves_nothing_and_says_so_in_a_line(desk: Path) -> None:
    running = process(
        desk, "init", "--model", "model", "--data", "data.jsonl", "--output", "interrupted", "--rank", "2",
        "--estimator-option", "labels=exact", "--batch-size", "1",
    )  # fmt: skip
    assert running.stderr is not None
    seen = []
    for line in running.stderr:  # the run has begun when it tells of its progress
        seen.append(line)
        if line.startswith("statistics:"):
            break
    running.send_signal(signal.SIGINT)
    rest = running.communicate(timeout=120)[1]
    assert running.returncode == 130, (seen, rest)
    assert rest.splitlines()[-1] == "error: interrupted."
    assert "Traceback" not in rest and not list(desk.glob("*interrupted*"))
