import base64
import copy
import hashlib
import html
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from scipy import linalg
from typer.testing import CliRunner

import lora_da_core.models
from conftest import ROWS
from lora_da_core import adapter
from lora_da_core.ablation import make_grid, plan, read_grid, run_grid
from lora_da_core.ablation.axes import NEEDED_MODULES
from lora_da_core.ablation.cells import GroupRun
from lora_da_core.ablation.fidelity import principal_angle, span
from lora_da_core.ablation.finetune import TrainingData, held_out_loss
from lora_da_core.ablation.grid_cell import pipeline_of
from lora_da_core.ablation.memory import PeakMemory
from lora_da_core.ablation.results import Results, finite, locked
from lora_da_core.ablation.workspace import Workspace
from lora_da_core.cli import app
from lora_da_core.errors import DataError, OptionError, StorageError
from lora_da_core.pipeline import Pipeline
from lora_da_core.registry import Registry

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def content(world, grid, *, finetune=None, **run):
    settings = {"model": str(world / "model"), "data": str(world / "data.jsonl"), "samples": 12, "device": "cpu"}
    settings |= run
    if finetune:
        settings["finetune"] = {"batch_size": 4, "held_out": 16, **finetune}
    return {"run": settings, "grid": grid}


def by_id(records):
    return {record["cell"]: record for record in records}


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(lora_da_core.models, "load_model", refuse)
    monkeypatch.setattr("lora_da_core.ablation.workspace.load_model", refuse)


class TestGrid:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[grid]\nrank = [4]", r"\[run\]: model, data must be given"),
            ("[run]\nmodel='m'\ndata='d'", r"needs a \[run\] and a \[grid\]"),
            ("[run]\nmodel = 'm'\n[grid]\nrank = [4]", r"\[run\]: data must be given"),
            ("[run]\nmodel='m'\ndata='d'\nsample=3\n[grid]\nrank=[4]", "unknown key 'sample'. Did you mean 'samples'"),
            ("[run]\nmodel='m'\ndata='d'\nseeds=3\n[grid]\nrank=[4]", "seeds is 3; write a list"),
            ("[run]\nmodel='m'\ndata='d'\nseeds=[]\n[grid]\nrank=[4]", "at least one seed"),
            ("[run]\nmodel='m'\ndata='d'\nreference='ekfca'\n[grid]\nrank=[4]", "Did you mean 'ekfac'"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nestimators=['kfac']", "unknown key 'estimators'. Did you mean"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nestimator=['kfacc']", r"\[grid\]: unknown estimator 'kfacc'. Did"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nsolver=['lanczoz']", "Did you mean 'lanczos'"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nestimator='kfac'", "estimator is 'kfac'; write a list"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nrank=[]", "rank is an empty list"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nrank=[0]", "rank is 0"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nsamples=[0]", "samples is 0"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\ndamping=[-1]", "damping is -1"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nbaseline=['evaa']", "unknown baseline 'evaa'. Did you mean 'eva'"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\ngamma=[4]\nscale=['auto']", "scale is never 'fixed'"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\npreset=['papr']", "Did you mean 'paper'"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nestimator=[{output='full'}]", "has no name"),
            ("[run]\nmodel='m'\ndata='d'\n[grid]\nestimator=[{name='kfac',outpt='full'}]", "Did you mean 'output'"),
            (
                "[run]\nmodel='m'\ndata='d'\n[run.finetune]\nsteps=3\n[grid]\nrank=[4]",
                "learning_rates, eval_steps must",
            ),
            (
                "[run]\nmodel='m'\ndata='d'\n[run.finetune]\nsteps=3\nlearning_rates=[1e-3]\neval_steps=[4]\n[grid]",
                "beyond the 3 steps",
            ),
            ("[run\n", "is not valid TOML"),
        ],
    )
    def test_a_wrong_file_is_one_clear_error_before_anything_is_loaded(self, tmp_path, no_loading, text, message):
        path = tmp_path / "wrong.toml"
        path.write_text(text)
        with pytest.raises(OptionError, match=message) as caught:
            run_grid(path, tmp_path / "out")
        assert str(path) in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_it_is_the_product_of_the_lists_and_the_seeds(self, world):
        grid = make_grid(
            content(world, {"estimator": ["kfac", "ekfac"], "rank": [2, 4], "beta": [0, 1, 2]}, seeds=[0, 1])
        )
        assert len(grid.cells) == len({cell.id for cell in grid.cells}) == 2 * 2 * 3 * 2
        assert {(cell.seed, cell.config.seed) for cell in grid.cells} == {(0, 0), (1, 1)}
        assert len(grid.groups()) == 2 * 2

    def test_gamma_goes_with_a_fixed_scale_alone(self, world):
        cells = make_grid(content(world, {"scale": ["auto", "fixed"], "gamma": [4.0, 16.0]})).cells
        assert [(cell.config.scale, cell.config.gamma) for cell in cells] == [
            ("auto", None), ("fixed", 4.0), ("fixed", 16.0),
        ]  # fmt: skip

    def test_baselines_vary_with_rank_and_seed_alone(self, world):
        grid = make_grid(content(world, {"baseline": ["eva"], "rank": [2, 4], "beta": [0, 1]}, seeds=[0, 1, 2]))
        assert sum(cell.baseline == "eva" for cell in grid.cells) == 6
        assert len(grid.cells) == 6 + 12
        only = make_grid(content(world, {"baseline": ["default", "eva"], "rank": [2]}))
        assert [cell.baseline for cell in only.cells] == ["default", "eva"]

    def test_several_grids_are_joined_and_the_same_cell_is_run_once(self, world):
        given = content(
            world, [{"estimator": ["kfac"], "beta": [0.03]}, {"estimator": [{"name": "kfac", "output": "diagonal"}]}]
        )
        assert len(make_grid(given).cells) == 1

    def test_ids_name_everything_that_matters_and_nothing_else(self, world):
        def ids(grid, **run):
            return [cell.id for cell in make_grid(content(world, grid, **run)).cells]

        base = ids({"rank": [4]})
        assert ids({"rank": [4], "estimator": ["kfac"], "solver": ["auto"]}, compare_to="default") == base
        assert ids({"rank": [4]}, seeds=[0, 1])[0] == base[0]
        for other in ({"rank": [2]}, {"beta": [1.0], "rank": [4]}, {"estimator": ["ekfac"], "rank": [4]}):
            assert ids(other) != base
        assert ids({"rank": [4]}, data="other.jsonl") != base
        assert ids({"rank": [4]}, finetune={"steps": 2, "learning_rates": [1e-3], "eval_steps": [2]}) != base

    def test_cells_that_share_statistics_are_one_group(self, world):
        varied = {"solver": ["eigh", "lanczos"], "rank": [2, 4], "alpha": [1, 2], "beta": [0.1, 1], "damping": [1, 10],
                  "scale": ["auto", "fixed"], "fisher_scale": ["token_mean", "sample"]}  # fmt: skip
        grid = make_grid(content(world, varied))
        assert len(grid.groups()) == 1 and len(grid.cells) == 2**7
        split = {"token_mask": ["labels", "attention"], "samples": [4, 8], "estimator": ["kfac", "ekfac"]}
        assert len(make_grid(content(world, split)).groups()) == 8

    def test_a_missing_module_of_peft_is_named_before_anything_is_loaded(self, world, no_loading, monkeypatch):
        monkeypatch.setitem(NEEDED_MODULES, "eva", ("no_such_module", "no-such-package"))
        with pytest.raises(OptionError, match="pip install no-such-package"):
            make_grid(content(world, {"baseline": ["eva"]}))

    @pytest.mark.parametrize("path", sorted((EXAMPLES / "grids").glob("*.toml")), ids=lambda path: path.stem)
    def test_the_example_grids_are_right(self, path, monkeypatch):
        monkeypatch.setitem(NEEDED_MODULES, "corda", ("", ""))
        grid = read_grid(path)
        assert len(grid.cells) > 4
        assert (EXAMPLES.parent / grid.run.data).is_file()


class TestFidelity:
    @given(st.integers(0, 2**16), st.integers(1, 5))
    @settings(max_examples=25, deadline=None)
    def test_the_angle_is_scipys(self, seed, rank):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(rank, 9, generator=generator, dtype=torch.float64) for _ in range(2))
        expected = linalg.subspace_angles(a.mT.numpy(), b.mT.numpy()).max()
        assert principal_angle(span(a), span(b)) == pytest.approx(expected, abs=1e-12)

    def test_tiny_angles_are_exact(self):
        first = torch.eye(5, dtype=torch.float64)[:, :2]
        turned = first.clone()
        turned[2, 0] = 1e-9
        assert principal_angle(first, span(turned.mT)) == pytest.approx(1e-9, rel=1e-6)
        assert principal_angle(first, torch.eye(5, dtype=torch.float64)[:, 2:4]) == pytest.approx(math.pi / 2)

    def test_the_reference_itself_is_at_angle_zero_and_others_are_not(self, world, tmp_path):
        grid = {"estimator": ["empirical", "kfac"], "solver": ["eigh", "lanczos"], "beta": [0.03, 30.0], "rank": [2, 3]}
        records = run_grid(content(world, grid, reference="empirical"), tmp_path / "out")
        assert len(records) == 16
        for record in records:
            assert record["reference"] == "empirical, eigh in float64"
            if record["estimator"] == "empirical":
                assert record["angle_max"] < 1e-4 and abs(record["objective_gap_max"]) < 1e-7
            else:
                assert record["angle"] > 1e-3 and record["objective_gap"] > 0
            assert record["angle"] <= record["angle_max"] <= math.pi / 2 + 1e-12
            assert record["objective_gap_max"] >= record["objective_gap"] > -1e-9

    def test_two_roads_to_the_gradients_leading_vectors_agree(self, world, tmp_path):
        """Without curvature or variance LoRA-DA's subspace is LoRA-GA's, which PEFT computes by itself."""
        run = {"batch_size": 1, "reference": "empirical"}
        grid = [{"estimator": ["identity"], "rank": [2]}, {"baseline": ["lora_ga", "default"], "rank": [2]}]
        identity, ga, default = run_grid(content(world, grid, **run), tmp_path / "out")
        assert (ga["baseline"], default["baseline"]) == ("lora_ga", "default")
        assert ga["angle"] == pytest.approx(identity["angle"], abs=2e-3)
        assert ga["objective_gap"] == pytest.approx(identity["objective_gap"], abs=2e-3)
        assert default["angle"] > identity["angle"]

    def test_a_reference_that_cannot_be_had_costs_no_cell(self, world, tmp_path, monkeypatch):
        monkeypatch.setattr("lora_da_core.ablation.fidelity.available_bytes", lambda device: 10)
        (record,) = run_grid(content(world, {"rank": [2]}), tmp_path / "out")
        assert record["status"] == "done" and record["angle"] is None
        assert "no reference fits into a third" in record["reference_error"]


class TestCells:
    def test_a_cell_gives_what_a_pipeline_of_its_own_gives(self, world, tmp_path):
        given = content(
            world, {"estimator": ["ekfac"], "solver": ["lanczos", "eigh"], "beta": [0.1, 1.0], "rank": [2, 4]}
        )
        records = by_id(run_grid(given, tmp_path / "out"))
        space = Workspace(make_grid(given).run, Registry())
        for cell in make_grid(given).cells[::3]:
            alone = GroupRun(space)._with_population(cell)
            draw, pipeline = space.draw(cell.samples, cell.seed), pipeline_of(space.registry, alone)
            pipeline.config = replace(pipeline.config, samples=draw.samples)
            result = pipeline.run(space.model, [*draw.batches, *draw.unseen], space.lora(cell.rank))
            assert records[cell.id]["base_loss"] == result.report.loss
            digests = "".join(layer.digest_A + layer.digest_B for layer in result.report.layers)
            assert records[cell.id]["digest"] == hashlib.sha256(digests.encode()).hexdigest()

    def test_statistics_are_estimated_once_per_group(self, world, tmp_path, monkeypatch):
        passes = []
        estimate = Pipeline.estimate
        monkeypatch.setattr(Pipeline, "estimate", lambda self, *a, **k: passes.append(self) or estimate(self, *a, **k))
        varied = {
            "estimator": ["kfac", "ekfac"],
            "solver": ["eigh", "lanczos"],
            "beta": [0.1, 1.0],
            "damping": [1.0, 10.0],
        }
        records = run_grid(content(world, varied, reference="ekfac"), tmp_path / "out")
        assert len(records) == 16
        # One each; the reference is the group's own where the estimators are the same, and is made once at most.
        assert len(passes) == 3
        for name in ("kfac", "ekfac"):
            ours = [record for record in records if record["estimator"] == name]
            assert sorted(record["reused"] for record in ours) == [False] + [True] * 7
            assert len({record["phases"]["statistics"] for record in ours}) == 1
            first = next(record for record in ours if not record["reused"])
            assert first["spent"] > first["phases"]["statistics"]
            assert {record["passes"] for record in ours} == {1 if name == "kfac" else 2}
            assert all(record["seconds"] == sum(record["phases"].values()) for record in ours)

    def test_every_baseline_starts_where_the_base_is_and_leaves_it_alone(self, world, tmp_path):
        names = ["default", "eva", "pissa", "olora"]
        given = content(
            world,
            {"baseline": names, "rank": [3], "estimator": ["kfac"]},
            finetune={"steps": 2, "learning_rates": [1e-3], "eval_steps": [0, 2]},
        )
        grid = make_grid(given)
        space = Workspace(grid.run, Registry())
        before = adapter.base_digests(space.model)
        modules = [(name, id(module)) for name, module in space.model.named_modules()]
        base = held_out_loss(space.model, space.training(0).held_out)
        run = GroupRun(space)
        records = [record for group in grid.groups() for record in run.records(group)]
        assert adapter.base_digests(space.model) == before
        assert [(name, id(module)) for name, module in space.model.named_modules()] == modules
        assert {record["status"] for record in records} == {"done"}
        for record in records:
            if record["baseline"]:
                assert record["curves"][0]["losses"][0] == pytest.approx(base, abs=1e-5)
                assert record["passes"] == (1 if record["baseline"] == "eva" else 0)
            else:
                assert abs(record["curves"][0]["losses"][0] - base) > 1e-4

    def test_corda_needs_its_module_or_runs(self, world, tmp_path):
        given = content(world, {"baseline": ["corda"], "rank": [2]})
        try:
            import attr  # noqa: F401
        except ImportError:
            with pytest.raises(OptionError, match="pip install attrs"):
                make_grid(given)
            return
        (record,) = run_grid(given, tmp_path / "out")
        assert record["status"] == "done", record["error"]
        assert 0 < record["angle"] < math.pi / 2

    def test_a_failing_cell_is_recorded_and_the_others_go_on(self, world, tmp_path):
        given = content(world, {"estimator": ["kfac"], "rank": [4, 17, 2], "baseline": ["default", "eva"]})
        records = run_grid(given, tmp_path / "out")
        failed = [record for record in records if record["status"] == "failed"]
        assert {(record["rank"], record["baseline"]) for record in failed} == {(17, None), (17, "default"), (17, "eva")}
        assert all("rank 17 is above" in record["error"] for record in failed)
        assert sum(record["status"] == "done" for record in records) == 6
        page = (tmp_path / "out" / "report.md").read_text()
        assert page.count("rank 17 is above") == 3

    def test_a_failing_estimation_fails_its_group_alone(self, world, tmp_path, monkeypatch):
        estimate = Pipeline.estimate

        def broken(self, *args, **kwargs):
            if self.components.estimator.name == "ekfac":
                raise MemoryError("too <large>")
            return estimate(self, *args, **kwargs)

        monkeypatch.setattr(Pipeline, "estimate", broken)
        records = run_grid(content(world, {"estimator": ["ekfac", "kfac"], "rank": [2, 4]}), tmp_path / "out")
        assert [record["status"] for record in records if record["estimator"] == "ekfac"] == ["failed"] * 2
        assert [record["status"] for record in records if record["estimator"] == "kfac"] == ["done"] * 2
        assert "MemoryError: too &lt;large&gt;" in (tmp_path / "out" / "report.html").read_text()

    def test_peak_memory_is_the_growth_within_the_block(self):
        with PeakMemory(torch.device("cpu")) as passing:
            held = torch.ones(2**24)
            time.sleep(0.02)
            del held
        assert 0.9 * 2**26 < passing.peak < 2 * 2**26
        assert passing.kept < 2**24
        with PeakMemory(torch.device("cpu")) as keeping:
            held = torch.ones(2**24)
        assert keeping.kept > 0.9 * 2**26 and len(held)


class TestFinetune:
    def test_it_learns_repeats_itself_and_pairs_the_seeds(self, world, tmp_path):
        tune = {"steps": 30, "learning_rates": [3e-2, 1e-3], "eval_steps": [0, 15, 30]}
        given = content(
            world, {"estimator": ["kfac"], "baseline": ["default"], "rank": [4]}, seeds=[0, 1], finetune=tune
        )
        records = run_grid(given, tmp_path / "one")
        again = by_id(run_grid(given, tmp_path / "two"))
        for record in records:
            assert [curve["learning_rate"] for curve in record["curves"]] == [3e-2, 1e-3]
            for curve, other in zip(record["curves"], again[record["cell"]]["curves"], strict=True):
                assert curve["steps"] == [0, 15, 30] and curve["losses"] == other["losses"]
            assert record["digest"] == again[record["cell"]]["digest"]
            fast, slow = record["curves"]
            # Both rates start at the same place, so the adapter is put back in between.
            assert fast["losses"][0] == slow["losses"][0]
            assert fast["losses"][-1] < fast["losses"][0] - 0.2
            assert fast["losses"][-1] < slow["losses"][-1] < slow["losses"][0]

    def test_the_seed_alone_orders_the_batches(self, world):
        given = content(world, {"rank": [2]}, finetune={"steps": 20, "learning_rates": [1e-3], "eval_steps": [20]})
        space = Workspace(make_grid(given).run, Registry())

        def ids(data):
            return [batch["input_ids"].tolist() for batch in data.batches(20, 4)]

        assert ids(space.training(0)) == ids(space.training(0))
        assert ids(space.training(0)) != ids(space.training(1))

    def test_held_out_rows_are_never_read_otherwise(self, world):
        given = content(world, {"rank": [2]}, finetune={"steps": 50, "learning_rates": [1e-3], "eval_steps": [50]})
        space = Workspace(make_grid(given).run, Registry())
        assert (len(space.pool), len(space.kept_out)) == (ROWS - 16, 16) and space.population == ROWS - 16
        assert not set(space.pool.positions) & set(space.kept_out.positions)
        assert len(space.training(0).samples) == ROWS - 16
        kept = {tuple(row["question"].split()) for row in map(space.kept_out.__getitem__, range(16))}
        read = {tuple(row["question"].split()) for row in map(space.pool.__getitem__, range(ROWS - 16))}
        assert not kept & read

    def test_every_sample_is_seen_once_per_round(self):
        samples = [{"input_ids": [place, 1], "labels": [-100, 1]} for place in range(10)]
        data = TrainingData(samples, [], 0, seed=3)
        seen = [int(row[0]) for batch in data.batches(10, 3) for row in batch["input_ids"]]
        assert len(seen) == 30
        rounds = [seen[:10], seen[10:20], seen[20:30]]
        assert rounds[0] == list(range(10)) and rounds[1] != rounds[0] and rounds[1] != rounds[2]
        assert all(sorted(each) == list(range(10)) for each in rounds)

    def test_held_out_loss_is_the_mean_over_label_tokens(self, world):
        given = content(world, {"rank": [2]}, finetune={"steps": 1, "learning_rates": [1e-3], "eval_steps": [1]})
        space = Workspace(make_grid(given).run, Registry())
        batches = space.training(0).held_out
        total, count = 0.0, 0
        for batch in batches:
            labels = int((batch["labels"][:, 1:] != -100).sum())
            total += float(space.model(**batch).loss) * labels
            count += labels
        assert held_out_loss(space.model, batches) == pytest.approx(total / count, rel=1e-6)

    def test_too_many_held_out_rows_are_refused(self, world, tmp_path):
        tune = {"steps": 1, "learning_rates": [1e-3], "eval_steps": [1], "held_out": ROWS}
        with pytest.raises(DataError, match=f"data set has {ROWS} rows"):
            run_grid(content(world, {"rank": [2]}, finetune=tune), tmp_path / "out")


class TestResuming:
    GRID = {"estimator": ["kfac", "identity"], "rank": [2, 3], "beta": [0.1, 1.0]}  # noqa: RUF012

    def test_finished_cells_are_never_repeated_and_a_torn_line_is(self, world, tmp_path):
        given, out = content(world, self.GRID), tmp_path / "out"
        whole = run_grid(given, out)
        lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
        (out / "results.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
        told = []
        records = run_grid(given, out, on_record=lambda record, done, total: told.append((record["cell"], done, total)))
        now = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
        assert now[:3] == lines[:3] and len(now) == 8
        assert [entry[1:] for entry in told] == [(done, 8) for done in range(4, 9)]
        assert {r["cell"]: r["digest"] for r in records} == {r["cell"]: r["digest"] for r in whole}
        before = (out / "results.jsonl").read_bytes()
        assert len(run_grid(given, out)) == 8
        assert (out / "results.jsonl").read_bytes() == before

    def test_nothing_is_loaded_where_nothing_is_missing(self, world, tmp_path, monkeypatch):
        given, out = content(world, {"rank": [2]}), tmp_path / "out"
        run_grid(given, out)
        monkeypatch.setattr("lora_da_core.ablation.workspace.load_model", None)
        assert len(run_grid(given, out)) == 1

    def test_a_changed_grid_keeps_foreign_cells(self, world, tmp_path):
        out = tmp_path / "out"
        first = run_grid(content(world, {"rank": [2, 3]}), out)
        second = run_grid(content(world, {"rank": [3, 4]}), out)
        assert [record["rank"] for record in first] == [2, 3]
        assert sorted(record["rank"] for record in second) == [3, 4]
        assert [record["rank"] for record in Results(out).read()] == [2, 3, 4]
        run = json.loads((out / "run.json").read_text())
        assert len(run["cells"]) == 2 and len(run["earlier"]) == 1
        assert len(parquet.read_table(out / "results.parquet")) == 3

    def test_changed_data_is_refused(self, world, tmp_path):
        shutil.copytree(world, tmp_path / "world")
        given, out = content(tmp_path / "world", {"rank": [2]}), tmp_path / "out"
        run_grid(given, out)
        data = tmp_path / "world" / "data.jsonl"
        data.write_text(data.read_text().replace("w1 ", "w2 "))
        with pytest.raises(StorageError, match="has changed since"):
            run_grid(content(tmp_path / "world", {"rank": [3]}), out)
        assert len(Results(out).read()) == 1

    def test_failed_cells_are_run_again_only_when_asked(self, world, tmp_path, monkeypatch):
        given, out = content(world, {"rank": [2]}), tmp_path / "out"
        with monkeypatch.context() as broken:
            broken.setattr(Pipeline, "solve", lambda *a, **k: 1 / 0)
            (record,) = run_grid(given, out)
            assert record["status"] == "failed" and "ZeroDivisionError" in record["error"]
        assert run_grid(given, out)[0]["status"] == "failed"
        assert run_grid(given, out, retry_failed=True)[0]["status"] == "done"
        assert [record["status"] for record in Results(out).read()] == ["done"]

    def test_a_damaged_line_and_a_foreign_directory_are_named(self, world, tmp_path):
        (tmp_path / "results.jsonl").write_text('{"cell": "a", "status": "done"}\nnonsense\n')
        with pytest.raises(StorageError, match="line 2 is not a record"):
            run_grid(content(world, {"rank": [2]}), tmp_path)
        with pytest.raises(OptionError, match="not a grid's results"):
            run_grid(content(world, {"rank": [2]}), world)
        with pytest.raises(OptionError, match="is a file"):
            run_grid(content(world, {"rank": [2]}), world / "data.jsonl")

    def test_two_runs_do_not_write_to_one_directory(self, world, tmp_path):
        with locked(tmp_path), pytest.raises(StorageError, match="another run is writing"):
            run_grid(content(world, {"rank": [2]}), tmp_path)

    def test_a_killed_run_goes_on_where_it_was(self, world, tmp_path):
        grid = tmp_path / "grid.toml"
        betas = [round(0.01 * place, 2) for place in range(1, 61)]
        grid.write_text(
            f'[run]\nmodel = "{world / "model"}"\ndata = "{world / "data.jsonl"}"\nsamples = 12\ndevice = "cpu"\n'
            f'[grid]\nestimator = ["kfac", "identity"]\nrank = [2]\nbeta = {betas}\n'
        )
        out = tmp_path / "out"
        command = [sys.executable, "-m", "lora_da_core.cli", "ablate", str(grid), "--output", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file = out / "results.jsonl"
        while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 3):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        left = file.read_bytes()
        kept = left[: left.rfind(b"\n") + 1]
        assert 3 <= kept.count(b"\n") < 120
        records = run_grid(grid, out)
        assert file.read_bytes().startswith(kept)
        cells = [json.loads(line)["cell"] for line in file.read_text().splitlines()]
        assert len(cells) == len(set(cells)) == len(records) == 120
        assert all(record["status"] == "done" for record in records)

    def test_a_worker_that_dies_fails_what_it_owed_and_no_more(self, world, tmp_path):
        import multiprocessing

        given = content(
            world, {"estimator": ["kfac", "ekfac", "identity", "diagonal"], "beta": [0.1 * i for i in range(1, 9)]}
        )
        killed = []

        def kill(record, done, total):
            if not killed:
                killed.extend(child.pid for child in multiprocessing.active_children())
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

        records = run_grid(given, tmp_path / "out", jobs=2, on_record=kill)
        failed = [record for record in records if record["status"] == "failed"]
        assert len(killed) == 2 and not multiprocessing.active_children()
        assert len(records) == len({record["cell"] for record in records}) == 32 and failed
        assert all("worker process ended with exit code -9" in record["error"] for record in failed)
        assert len({record["group"] for record in failed}) <= 2
        mended = run_grid(given, tmp_path / "out", retry_failed=True)
        assert {record["status"] for record in mended} == {"done"}
        alone = by_id(run_grid(given, tmp_path / "alone"))
        assert {r["cell"]: r["digest"] for r in mended} == {cell: r["digest"] for cell, r in alone.items()}


class TestPlan:
    def test_the_time_is_unknown_until_something_has_run(self, world, tmp_path):
        small, large = (
            content(world, {"rank": [2]}),
            content(world, {"rank": [2, 3, 4], "estimator": ["kfac", "ekfac"]}),
        )
        assert plan(large, tmp_path / "out").seconds is None
        assert not (tmp_path / "out").exists()
        run_grid(small, tmp_path / "out")
        found = plan(large, tmp_path / "out")
        assert (found.cells, found.finished, found.groups) == (6, 1, 2)
        spent = Results(tmp_path / "out").read()[0]["spent"]
        assert 0 < found.seconds < 6 * spent
        assert plan(large, tmp_path / "out", jobs=2).seconds == pytest.approx(found.seconds / 2)
        assert plan(small, tmp_path / "out").seconds == 0


class TestReport:
    @pytest.fixture(scope="class")
    @classmethod
    def out(cls, world, tmp_path_factory):
        out = tmp_path_factory.mktemp("report") / "out"
        tune = {"steps": 4, "learning_rates": [1e-2, 1e-3], "eval_steps": [0, 2, 4]}
        grid = {"estimator": ["kfac", "identity"], "rank": [2, 17], "baseline": ["default"]}
        run_grid(content(world, grid, seeds=[0, 1], finetune=tune, compare_to="default"), out)
        return out

    def test_the_page_stands_alone(self, out):
        page = (out / "report.html").read_text()
        tags = []

        class Reader(HTMLParser):
            def handle_starttag(self, tag, attrs):
                tags.append((tag, dict(attrs)))

        Reader().feed(page)
        images = [attrs["src"] for tag, attrs in tags if tag == "img"]
        names = [f"{name}_r2" for name in ("cost_time", "cost_memory", "losses", "differences", "rates", "compute")]
        assert {path.stem for path in (out / "pictures").iterdir()} == set(names)
        for name, source in zip(names, images, strict=True):
            kind, data = source.split(",", 1)
            assert kind == "data:image/png;base64"
            assert base64.b64decode(data) == (out / "pictures" / f"{name}.png").read_bytes()
        assert not re.search(r"(src|href)=.?(https?:|//|\.)|url\(|@import", page)
        assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}

    def test_both_reports_hold_the_same_tables(self, out):
        page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
        rows = [line for line in text.splitlines() if line.startswith("| ")]
        heads = [place for place, line in enumerate(rows) if "| ---" in line]
        body = [row for place, row in enumerate(rows) if place not in heads and place + 1 not in heads]
        cells = re.findall(r"<td(?: [^>]*)?>(.*?)</td>", page)
        assert [cell.strip() for row in body for cell in row[1:-1].split(" |")] == [html.unescape(c) for c in cells]
        assert len(heads) == page.count("<table>") == 4
        assert "## Paired differences against PEFT default" in text and "## At each one's best learning rate" in text
        assert text.count("rank 17 is above") == 3 and "| 0, 1 |" in text

    def test_the_page_tells_how_to_run_it_again(self, out, world):
        text = (out / "report.md").read_text()
        grid = make_grid(tomllib.loads(text.split("```toml\n")[1].split("```")[0]))
        assert {cell.id for cell in grid.cells} == {record["cell"] for record in Results(out).read()}
        for told in (str(world / "model"), torch.__version__, "0, 1", "12: 6 done, 6 failed"):
            assert told in text

    def test_cells_of_another_run_are_counted_and_not_mixed_in(self, world, tmp_path):
        run_grid(content(world, {"rank": [2], "estimator": ["identity"]}), tmp_path / "out")
        run_grid(content(world, {"rank": [3]}, lora_alpha=4.0), tmp_path / "out")
        text = (tmp_path / "out" / "report.md").read_text()
        assert "1 more in the directory" in text and "**Adapter**: all-linear, rank 3, lora_alpha 4" in text
        assert "identity" not in text
        run_grid(content(world, {"rank": [2], "estimator": ["identity"]}), tmp_path / "out")
        assert "identity" in (tmp_path / "out" / "report.md").read_text()

    def test_parquet_holds_every_record(self, out):
        records = Results(out).read()
        table = parquet.read_table(out / "results.parquet").to_pylist()
        assert len(table) == len(records) == 12
        for row, record in zip(table, records, strict=True):
            assert json.loads(row["curves"]) == record["curves"]
            for name in ("cell", "status", "estimator", "rank", "seed", "seconds", "angle", "objective_gap", "error"):
                assert row[name] == record[name]

    def test_records_have_all_that_is_promised(self, out):
        promised = {"cell", "estimator", "gradient", "solver", "rank", "seed", "status", "seconds", "phases",
                    "peak_bytes", "passes", "angle", "objective_gap", "error"}  # fmt: skip
        keys = {frozenset(record) - {"fidelity_seconds"} for record in Results(out).read()}
        assert len(keys) == 1 and promised <= next(iter(keys))

    def test_the_run_says_what_made_it(self, out):
        run = json.loads((out / "run.json").read_text())
        assert run["versions"]["torch"] == torch.__version__
        assert run["seeds"] == [0, 1] and run["run"]["finetune"]["steps"] == 4
        assert len(run["model"]["fingerprint"]) == len(run["data"]["fingerprint"]) == 64

    def test_a_baseline_that_never_ran_is_said(self, world, tmp_path):
        run_grid(content(world, {"rank": [2]}, compare_to="pissa"), tmp_path / "out")
        assert "No finished cell is a 'pissa'" in (tmp_path / "out" / "report.md").read_text()

    def test_what_is_not_finite_becomes_null(self):
        given = {"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf}}
        before = copy.deepcopy(given)
        assert finite(given) == {"a": None, "b": [None, 1.0], "c": {"d": None}}
        assert str(given) == str(before)


class TestCommand:
    def run(self, *arguments):
        return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "100"}).invoke(app, ["ablate", *map(str, arguments)])

    @pytest.fixture
    def grid(self, world, tmp_path):
        path = tmp_path / "grid.toml"
        path.write_text(
            '[run]\nmodel = "elsewhere"\ndata = "data.jsonl"\nsamples = 12\n'
            '[grid]\nestimator = ["kfac"]\nrank = [2, 17]\n'
        )
        return (path, "--model", world / "model", "--data", world / "data.jsonl", "--device", "cpu")

    def test_dry_run_then_run_then_dry_run(self, grid, tmp_path):
        out = tmp_path / "out"
        dry = self.run(*grid, "--output", out, "--dry-run")
        assert dry.exit_code == 0
        assert dry.stdout == "cells: 2, 0 of them finished\ngroups to estimate: 1\nestimated time: unknown\n"
        assert not out.exists()
        done = self.run(*grid, "--output", out)
        assert done.exit_code == 0, done.output
        assert done.stdout == f"2 cells, 1 failed; report: {out / 'report.html'}\n"
        assert re.search(r"1/2 kfac auto r=2 seed=0: [\d.]+ s, angle", done.stderr)
        assert "2/2 kfac auto r=17 seed=0: TargetError" in done.stderr
        again = self.run(*grid, "--output", out, "--dry-run")
        assert again.stdout == "cells: 2, 2 of them finished\ngroups to estimate: 0\nestimated time: 0 s\n"

    def test_wrong_use_is_one_line_and_status_2(self, grid, tmp_path, no_loading):
        missing = self.run("missing.toml", "--output", tmp_path / "out")
        assert missing.exit_code == 2 and missing.stderr.startswith("error: grid missing.toml cannot be read")
        none = self.run(*grid, "--output", tmp_path / "out", "--jobs", "0")
        assert none.exit_code == 2 and "jobs is 0" in none.stderr
        assert self.run(*grid).exit_code == 2
