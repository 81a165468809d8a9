"""The benchmarks for an accelerator, whole but small, on the CPU: that they run and check what they say."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import (
    candidates,
    evidence,
    first_run,
    forgetting,
    gpu_7b,
    primitives,
    scaling,
    solvers,
    statistics_device,
)

GRID = """
[run]
model = "model"
data = "data.jsonl"
samples = 8
seeds = [0, 1]
reference = "none"
use_rslora = true

[run.finetune]
steps = 2
learning_rates = [1e-3]
eval_steps = [0, 2]
batch_size = 4
held_out = 6
validation = 6
together = 8

[[grid]]
baseline = ["default"]
"""


class _InThisProcess:
    """A pool that runs what it is given at once."""

    def __init__(self, *settings: Any, **more: Any) -> None:
        pass

    def __enter__(self) -> _InThisProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, work: Any, items: Any) -> list[Any]:
        return [work(item) for item in items]

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a benchmark as its command would be, and gives what it wrote."""

    def run(benchmark: ModuleType, *arguments: str) -> Any:
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, *arguments, "--device", "cpu", "--output", str(path)])
        benchmark.main()
        return json.loads(path.read_text())

    return run


def test_the_7b_comparison_measures_every_program_and_checks_both_presets(figures: Any) -> None:
    shape = ("--layers", "2", "--hidden", "64", "--intermediate", "96", "--vocabulary", "64")
    found = figures(gpu_7b, *shape, "--samples", "8", "--batch-tokens", "600", "--repetitions", "1")
    assert list(found["rows"]) == [
        "peft lora_ga",
        *(f"lora_da {n}" for n in ("robust, fixed scale", "robust", "paper")),
    ]
    reference = found["rows"]["peft lora_ga"]["seconds"]
    for name, row in found["rows"].items():
        assert row["ratio_to_lora_ga"] == pytest.approx(row["seconds"] / reference)
        if name != "peft lora_ga":
            assert row["converged"] == 14 == sum(row["solvers"].values())
            assert row["phases"]["statistics"] + row["phases"]["solve"] < row["seconds"]
    for preset in ("fixed", "paper"):
        check = found[f"check {preset}"]
        assert check["worst_residual"] < 1e-6
        assert len(check["angles"]) == 7
        assert all(each["sine"] < 1e-6 for each in check["angles"].values() if each["gap"] > 1e-4)
        assert check["seconds_and_calls"]["prepare"][1] == 14


def test_the_7b_comparison_stops_at_its_time_limit_with_what_it_has(
    figures: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ("--layers", "1", "--hidden", "64", "--intermediate", "96", "--vocabulary", "64")
    found = figures(gpu_7b, *shape, "--samples", "4", "--repetitions", "2", "--time-limit", "0")
    assert [len(row["all_seconds"]) for row in found["rows"].values()] == [1, 1, 1, 1]
    assert "time limit reached" in capsys.readouterr().out


def test_the_7b_comparison_keeps_within_a_limit_and_shows_the_plan_beside_it(figures: Any) -> None:
    shape = ("--layers", "2", "--hidden", "64", "--intermediate", "96", "--vocabulary", "64")
    least = ("--programs", "fixed", "--checks", "", "--samples", "8", "--batch-tokens", "600", "--repetitions", "1")
    found = figures(gpu_7b, *shape, *least, "--max-memory", "3200KiB,1GiB")
    free, tight, loose = found["rows"].values()
    assert loose["plan"]["passes"] == 1 and tight["plan"]["batch_size"] < loose["plan"]["batch_size"]
    assert tight["plan"]["peak_gib"] <= 3200 / 2**20 and tight["plan"]["fits"]
    assert free["residual"] == loose["residual"] and tight["converged"] == 14 and tight["residual"] < 1e-12


def test_the_7b_comparison_sweeps_blocks_within_a_limit(figures: Any) -> None:
    shape = ("--layers", "4", "--hidden", "64", "--intermediate", "96", "--vocabulary", "64")
    least = ("--programs", "fixed", "--checks", "", "--samples", "8", "--batch-tokens", "600", "--repetitions", "1")
    free, swept = figures(gpu_7b, *shape, *least, "--max-memory", "7MiB")["rows"].values()
    assert swept["plan"]["schedule"] == "blocks" and swept["plan"]["passes"] == 1 < swept["plan"]["parts"]
    assert swept["plan"]["peak_gib"] <= 7 / 2**10 and swept["converged"] == free["converged"] == 28


def test_first_runs_are_those_of_new_processes(figures: Any) -> None:
    shape = ("--layers", "1", "--hidden", "64", "--intermediate", "96", "--vocabulary", "64", "--samples", "4")
    found = figures(first_run, "--programs", "fixed", "--repetitions", "1", *shape)
    assert found["medians"]["fixed"] == found["seconds"]["fixed"][0] > 0


def test_the_solvers_comparison_verifies_residuals_and_objectives(figures: Any) -> None:
    found = figures(solvers, "--sizes", "120", "--ranks", "4", "--batch", "2", "--repetitions", "1")
    rows = [row for row in found["rows"] if row["solver"] != "eigh"]
    assert len(rows) == 8 and {row["solver"] for row in rows} == {"lanczos", "randomized_svd"}
    for row in rows:
        assert row["solved"] and row["residual"] <= max(row["tolerance"], 1e-5), row
        assert abs(row["objective_gap"]) < 1e-4
        eigh = next(r["seconds"] for r in found["rows"] if r["solver"] == "eigh" and r["dtype"] == row["dtype"])
        assert row["speed_up"] == pytest.approx(eigh / row["seconds"])


def test_growth_is_measured_along_every_axis_and_a_deep_model_is_extrapolated(figures: Any) -> None:
    axes = ("--samples", "16,32", "--blocks", "1,2", "--widths", "64,128", "--ranks", "2,4", "--hidden", "64")
    found = figures(scaling, *axes, "--length", "8", "--repetitions", "1", "--deep", "tiny", "--deep-samples", "16")
    assert list(found["curves"]) == ["samples", "blocks", "hidden", "rank"]
    for name, curve in found["curves"].items():
        rows, passes = curve["rows"], curve["exponents"]["passes"]
        assert [row["converged"] for row in rows] == [True, True]
        measured = math.log(rows[1]["passes"] / rows[0]["passes"]) / math.log(rows[1][name] / rows[0][name])
        assert passes["exponent"] == pytest.approx(measured)
        assert passes["met"] == (None if passes["limit"] is None else measured <= passes["limit"])
    deep = found["deep"]["tiny"]
    one, two = deep["measured"]["1"], deep["measured"]["2"]
    whole = deep["extrapolated, in one pass"]
    assert whole["passes"] == pytest.approx(one["passes"] + 5 * (two["passes"] - one["passes"]))
    assert deep["planned, not run"]["layers"] == 6 * 7


def test_the_primitives_are_timed_in_both_dtypes(figures: Any) -> None:
    found = figures(primitives, "--sizes", "48", "--batch", "2")
    names = {(row["primitive"], row["dtype"]) for row in found["rows"]}
    assert len(names) == len(found["rows"]) == 34
    assert all(math.isfinite(row["seconds"]) and row["seconds"] > 0 for row in found["rows"])


def test_every_candidate_trains_and_is_paired_with_the_default(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID)
    output = tmp_path / "candidates.jsonl"
    arguments = [
        str(grid),
        "--output",
        str(output),
        "--model",
        str(world / "model"),
        "--data",
        str(world / "data.jsonl"),
    ]
    monkeypatch.setattr(sys, "argv", ["candidates", *arguments, "--device", "cpu"])
    monkeypatch.setattr(candidates, "ProcessPoolExecutor", _InThisProcess)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    candidates.main()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted((line["candidate"], line["seed"]) for line in lines) == sorted(
        (name, seed) for name in candidates.CANDIDATES for seed in (0, 1)
    )
    ends = {(line["candidate"], line["seed"]): line["losses"] for line in lines}
    assert all(math.isfinite(loss) for losses in ends.values() for loss in losses)
    starts = {name: ends[name, 0][0] for name in candidates.CANDIDATES}
    assert starts["default"] == pytest.approx(starts["default, AdamW warmed"], rel=1e-6)
    assert starts["robust"] == pytest.approx(starts["A·x twice"], rel=1e-4)
    differences = [ends["robust", seed][-1] - ends["default", seed][-1] for seed in (0, 1)]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("robust "))
    assert f"{sum(differences) / 2:+.4f} ± " in row


FORGETTING = """
[run]
model = "model"
data = "data.jsonl"
samples = 8
seeds = [0, 1]
reference = "none"
compare_to = "kfac"

[run.source]
data = "source.jsonl"
samples = 6
held_out = 4

[run.finetune]
steps = 2
learning_rates = [1e-2]
eval_steps = [0, 2]
batch_size = 4
held_out = 6

[[grid]]
rank = [2]
regularizer = ["none", { name = "laplace", strength = 1e6 }]

[[grid]]
baseline = ["default"]
rank = [2]
"""


def test_forgetting_is_measured_on_passages_of_pythons_reference(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, output = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(FORGETTING)
    inputs = ["--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["forgetting", "--grid", str(grid), "--output", str(output), *inputs])
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", _InThisProcess)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forgetting.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    named = {row[0].removeprefix("| "): row for row in rows[1:]}
    assert list(sorted(named)) == ["PEFT default", "kfac", "kfac + laplace of kfac"]
    assert {row[1] for row in named.values()} == {"2"}
    assert named["kfac"][5] == "–" and " ± " in named["kfac + laplace of kfac"][6]
    records = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    penalised = [r for r in records if r["regularizer"] == "laplace"]
    free = [r["curves"][0]["source_losses"] for r in records if r["regularizer"] == "none" and not r["baseline"]]
    for record, losses in zip(penalised, free, strict=True):
        ours = record["curves"][0]["source_losses"]
        assert ours[0] == pytest.approx(losses[0], abs=1e-6) and abs(ours[1] - losses[1]) > 1e-4
    shown = float(named["kfac"][4].split(" ± ")[0])
    assert shown == pytest.approx(sum(last for _, last in free) / 2, abs=1e-4)
    report = (output / "report.md").read_text()
    assert f"{len(records)} done" in report and "not shown" not in report
    before = (output / "run.json").read_bytes()
    forgetting.main()
    assert (output / "run.json").read_bytes() == before


def test_passages_are_whole_paragraphs_long_enough() -> None:
    found = list(forgetting.passages(forgetting.topics()))
    assert len(found) > 200 and len(set(found)) > 0.9 * len(found)
    assert all(len(text) >= forgetting.PASSAGE for text in found)
    assert list(forgetting.passages({"b": "x" * 900 + "\n\nrest", "a": "y" * 500 + "\n\n" + "z" * 500})) == [
        "y" * 500 + "\n\n" + "z" * 500, "x" * 900,
    ]  # fmt: skip


def test_places_of_sums_are_compared(figures: Any) -> None:
    shape = ("--layers", "1", "--hidden", "64", "--intermediate", "96", "--vocabulary", "64")
    found = figures(
        statistics_device, *shape, "--samples", "4", "--length", "16", "--batch", "2", "--max-memory", "1GiB"
    )
    assert [row["planned_place"] for row in found["rows"]] == ["device", "device", "disk", "device"]
    assert all(row["largest_difference"] == 0.0 for row in found["rows"]) and found["rows"][2]["offloaded"] > 0
    assert [row.get("same_sums") for row in found["rows"]] == [True, True, True, None]
