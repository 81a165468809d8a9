"""Anything on the command line, in a settings file, a grid or a damaged report: a result or one clear error."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import event, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import lora_da_core
from fuzzing import fuzzed
from lora_da_core import storage
from lora_da_core.ablation.axes import AXES
from lora_da_core.ablation.grid import make_grid, read_grid
from lora_da_core.ablation.settings import FinetuneSettings, RunSettings
from lora_da_core.cli import app
from lora_da_core.cli_init_options import InitOptions
from lora_da_core.cli_plan import PlanOptions
from lora_da_core.registry import Registry

REGISTRY = Registry()
NAMES = {kind: sorted(REGISTRY.names(kind)) for kind in ("estimator", "gradient", "solver", "allocator", "preset")}
WORDS = st.sampled_from(
    [
        "",
        " ",
        "0",
        "1",
        "-1",
        "2",
        "8",
        "1.5",
        "1e400",
        "nan",
        "-inf",
        "true",
        "none",
        "auto",
        "9" * 5000,
        "[" * 5000,
        "ü\u202e",
        "\udcff",
        "a\x00b",
        "../..",
        "q_proj",
        "all-linear",
        ".*[",
        "a=b",
        "output=full",
        "output=[[1]]",
        "size=0",
        "size=1e99",
        "tolerance=nan",
        "block={}",
        "=",
        "fixed",
        "relative",
        "error",
        "labels",
        "x" * 5000,
        "24GiB",
        "1" * 400 + "GiB",
        "~nobody/x",
    ]
)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        WORDS,
        st.just(10**400),
        st.dates(),
        st.sampled_from([2**63, "eigh", "kfac", "cpu", datetime.datetime(2000, 1, 1)]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["name", "output", "a"]), inner)
    ),
    max_leaves=5,
)
FIELDS = [entry.name for entry in dataclasses.fields(InitOptions)]
OPTIONS = [name for name in FIELDS if name not in ("model", "data", "output", "config", "device", "cache_dir", "plot")]
PLAN = [entry.name for entry in dataclasses.fields(PlanOptions) if entry.name not in ("model", "as_json")]
FLAGS = ("overwrite", "use_rslora", "normalize", "trust_remote_code")


@st.composite
def command_lines(draw: st.DrawFn, options: list[str]) -> list[str]:
    """Some options of a command, with values that fit their kind and values that do not."""
    found: list[str] = []
    for name in draw(st.lists(st.sampled_from(options), max_size=4)):
        option = f"--{name.replace('_', '-')}"
        if name in FLAGS:
            found.append(option)
            continue
        fitting = st.sampled_from(NAMES[name]) if name in NAMES else st.sampled_from(["1", "2", "4", "0.5", "fixed"])
        found += [option, draw(st.one_of(fitting, WORDS))]
    return found


def invoke(*arguments: str) -> Any:
    """One run of the program; anything but an exit code of its own, or an error that nobody foresaw, fails the test."""
    outcome = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}).invoke(app, list(arguments))
    assert outcome.exit_code in (0, 1, 2), outcome.output
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), repr(outcome.exception)
    assert "(unexpected; --debug" not in outcome.output, outcome.output[-600:]
    if outcome.exit_code:
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, outcome.output[-600:]
    return outcome


@pytest.fixture(scope="module")
def here(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with a model and data, entered for the module's tests."""
    os.chdir(world)
    return world


@pytest.fixture(scope="module", autouse=True)
def _back() -> Any:
    before = Path.cwd()
    yield
    os.chdir(before)


@given(arguments=command_lines(OPTIONS))
@fuzzed(20, 300)
def test_any_command_line_gives_an_adapter_or_one_line(here: Path, arguments: list[str]) -> None:
    target = here / "fuzzed"
    given = ["--samples", "8", "--rank", "2", "--target-modules", "q_proj,v_proj"]
    outcome = invoke(
        "init", "--model", "model", "--data", "data.jsonl", "--output", "fuzzed", "--overwrite", *given, *arguments
    )
    event(f"exit code {outcome.exit_code}")
    if outcome.exit_code == 0:
        factors = load_file(target / "adapter_model.safetensors")
        assert factors and all(bool(value.isfinite().all()) for value in factors.values())
        storage.read_report(target)
    else:
        assert not [entry for entry in here.iterdir() if entry.name.startswith(".fuzzed.")], "a temporary was left"


@given(arguments=command_lines(PLAN))
@fuzzed(20, 300)
def test_any_command_line_gives_a_plan_or_one_line(here: Path, arguments: list[str]) -> None:
    outcome = invoke("plan", "--model", "model", "--json", *arguments)
    event(f"exit code {outcome.exit_code}")
    if outcome.exit_code == 0:
        assert json.loads(outcome.stdout)["peak_bytes"] > 0


@given(
    settings=st.dictionaries(
        st.one_of(st.sampled_from([name.replace("_", "-") for name in FIELDS]), st.text(max_size=5)), VALUES, max_size=3
    ),
    suffix=st.sampled_from([".toml", ".json"]),
)
@fuzzed(25, 300)
def test_any_settings_file_gives_an_adapter_or_one_line(here: Path, settings: dict[str, Any], suffix: str) -> None:
    path = here / f"settings{suffix}"
    try:
        text = json.dumps(settings, default=str) if suffix == ".json" else tomli_w.dumps(settings)
        path.write_text(text, encoding="utf-8")
    except (TypeError, ValueError):  # TOML has no null, UTF-8 no halves of characters
        event("cannot be written")
        return
    invoke("plan", "--model", "model", "--config", str(path))
    arguments = ["--data", "data.jsonl", "--output", "fuzzed", "--overwrite", "--samples", "8", "--rank", "2"]
    invoke("init", "--model", "model", "--dtype", "float32", "--device", "cpu", "--config", str(path), *arguments)


@given(content=st.one_of(st.binary(max_size=64), st.text(max_size=64).map(lambda text: text.encode(errors="ignore"))))
@fuzzed(12, 200)
def test_any_bytes_as_a_settings_file_a_grid_or_a_report_give_one_line(here: Path, content: bytes) -> None:
    (here / "broken").mkdir(exist_ok=True)
    for name in ("broken.toml", "broken.json", f"broken/{storage.REPORT_FILE}", f"broken/{storage.SETTINGS_FILE}"):
        (here / name).write_bytes(content)
    for name in ("broken.toml", "broken.json"):
        invoke(
            "init", "--model", "model", "--data", "missing.jsonl", "--output", "fuzzed", "--overwrite", "--config", name
        )
    invoke("ablate", "broken.toml", "--output", "ablated", "--dry-run")
    invoke("inspect", "broken", "--json")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("deep.toml", "rank = " + "[" * 30000, "nested too deeply"),
        ("deep.json", '{"rank": ' + "[" * 30000, "nested too deeply"),
        ("large.toml", "# " + "x" * 2**16, "larger than 65536 bytes"),
        ("large.json", " " * 2**16 + "{}", "larger than 65536 bytes"),
        ("digits.json", '{"rank": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("code.toml", "trust-remote-code = true", "taken from the command line alone"),
        ("code.json", '{"trust-remote-code": 1}', "taken from the command line alone"),
        ("date.toml", "estimator-option = {output = 1979-05-27}", "output is '1979-05-27'"),
    ],
)
def test_hostile_settings_files_are_refused_by_name(here: Path, name: str, text: str, says: str) -> None:
    (here / name).write_text(text)
    outcome = invoke("init", "--model", "model", "--data", "data.jsonl", "--output", "refused", "--config", name)
    assert outcome.exit_code == 2 and says in outcome.stderr
    if name.endswith(".toml") and "date" not in name and "code" not in name:
        with pytest.raises(lora_da_core.OptionError, match=says):
            read_grid(here / name)


def test_a_grid_of_more_cells_than_anyone_can_run_is_refused_at_once() -> None:
    axes = {name: list(range(1, 1000)) for name in ("rank", "samples", "damping", "beta", "alpha", "gamma")}
    with pytest.raises(lora_da_core.OptionError, match="more than 100000; divide the grid"):
        make_grid({"run": {"model": "m", "data": "d"}, "grid": axes}, registry=REGISTRY)


def test_a_grid_that_holds_no_tables_is_refused(here: Path) -> None:
    (here / "list.json").write_text("[1]")
    with pytest.raises(lora_da_core.OptionError, match="holds no tables"):
        read_grid(here / "list.json")


RUN_FIELDS = [entry.name for entry in dataclasses.fields(RunSettings)]
TUNE_FIELDS = [entry.name for entry in dataclasses.fields(FinetuneSettings)]
FITTING = st.sampled_from(
    [0, 1, 8, 0.5, "kfac", "auto", "none", "fixed", "eigh", {"name": "kfac", "output": "full"}, "robust"]
)


@given(
    run=st.dictionaries(st.sampled_from(RUN_FIELDS), VALUES, max_size=2),
    tune=st.none() | st.dictionaries(st.sampled_from(TUNE_FIELDS), VALUES, max_size=2),
    axes=st.dictionaries(
        st.sampled_from(AXES),
        st.one_of(st.lists(st.one_of(FITTING, VALUES), min_size=1, max_size=2), VALUES),
        max_size=3,
    ),
    whole=st.none() | VALUES,
)
@example(run={"objective": []}, tune=None, axes={}, whole=None)
@example(run={"objective": ["dpo", "beta"]}, tune=None, axes={}, whole=None)
@fuzzed(80, 2000)
def test_any_grid_gives_cells_or_one_clear_error(run: Any, tune: Any, axes: Any, whole: Any) -> None:
    settings = {"model": "m", "data": "d", **run}
    if tune is not None:
        settings["finetune"] = {"steps": 4, "learning_rates": [1e-3], "eval_steps": [0, 4], **tune}
    for content in ({"run": settings, "grid": axes}, {"run": whole, "grid": axes}, {"run": settings, "grid": whole}):
        try:
            grid = make_grid(content, registry=REGISTRY)
        except lora_da_core.LoraDAError as error:
            event("refused")
            assert "\n" not in str(error).strip()
        else:
            event("a grid")
            assert len({cell.id for cell in grid.cells}) == len(grid.cells) == sum(len(g.cells) for g in grid.groups())


@given(
    values=st.dictionaries(
        st.sampled_from([entry.name for entry in dataclasses.fields(lora_da_core.LoraDAConfig)]), VALUES, max_size=3
    ),
    choices=st.dictionaries(
        st.sampled_from(["estimator", "solver", "gradient", "objective", "allocator", "preset"]),
        st.one_of(VALUES, st.tuples(st.sampled_from([name for names in NAMES.values() for name in names]), VALUES)),
        max_size=2,
    ),
)
@fuzzed(80, 2000)
def test_any_configuration_gives_a_pipeline_or_one_clear_error(values: dict[str, Any], choices: dict[str, Any]) -> None:
    try:
        config = lora_da_core.LoraDAConfig(**values)
        lora_da_core.build_pipeline(config=config, **choices)
        event("a pipeline")
    except lora_da_core.OptionError:
        event("refused")


RUN = (
    "init",
    "--model",
    "model",
    "--data",
    "data.jsonl",
    "--samples",
    "8",
    "--rank",
    "2",
    "--target-modules",
    "q_proj",
)


@pytest.fixture(scope="module")
def reported(here: Path) -> Path:
    """A run's directory."""
    assert invoke(*RUN, "--output", "reported").exit_code == 0
    return here / "reported"


@pytest.fixture(scope="module")
def report(reported: Path) -> dict[str, Any]:
    """A run's report, as JSON values."""
    found: dict[str, Any] = json.loads((reported / storage.REPORT_FILE).read_text())
    return found


@given(
    changes=st.dictionaries(
        st.sampled_from([name.replace("_", "-") for name in FIELDS]) | st.text(max_size=5),
        VALUES,
        min_size=1,
        max_size=2,
    ),
    content=st.none() | VALUES,
)
@fuzzed(20, 300)
def test_settings_of_a_run_that_were_changed_are_obeyed_or_refused(
    reported: Path, changes: dict[str, Any], content: Any
) -> None:
    path = reported / storage.SETTINGS_FILE
    before = path.read_text()
    changed = {**json.loads(before), **changes} if content is None else content
    try:
        path.write_text(json.dumps(changed, default=str), encoding="utf-8")
        for command in (
            ["verify", "reported", "--numerics", "--device", "cpu"],
            [*RUN, "--output", "reported", "--resume"],
        ):
            outcome = CliRunner(env={"HF_HUB_OFFLINE": "1"}).invoke(app, command)
            event(f"{command[0]}: exit code {outcome.exit_code}")
            assert outcome.exit_code in (0, 1, 2) and "(unexpected; --debug" not in outcome.output, outcome.output[
                -600:
            ]
            failed = outcome.exit_code and "✗" not in outcome.output
            assert outcome.stderr.count("error: ") == bool(failed), outcome.output[-600:]
    finally:
        path.write_text(before)


@given(place=st.lists(st.integers(0, 30), min_size=1, max_size=3), value=VALUES, removed=st.booleans())
@fuzzed(25, 500)
def test_a_report_that_was_changed_is_shown_or_refused(
    here: Path, report: dict[str, Any], place: list[int], value: Any, removed: bool
) -> None:
    changed = json.loads(json.dumps(report))
    owner: Any = changed
    for step in place[:-1]:
        keys: list[Any] = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        deeper = owner[keys[step % len(keys)]] if keys else None
        if not isinstance(deeper, (dict, list)) or not deeper:
            break
        owner = deeper
    keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
    key = keys[place[-1] % len(keys)]
    if removed:
        del owner[key]
    else:
        owner[key] = value
    directory = here / "changed"
    directory.mkdir(exist_ok=True)
    try:
        text = json.dumps(changed, default=str)
        (directory / storage.REPORT_FILE).write_text(text, encoding="utf-8")
    except ValueError:
        return
    outcome = invoke("inspect", "changed", "--plot", "changed/spectra.png")
    event(f"exit code {outcome.exit_code}")
    assert "\x1b" not in outcome.output
