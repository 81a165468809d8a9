"""Regularizers and trainer plugins in a grid: real trainers, one start for all, and what is forgotten."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from lora_da_core import adapter
from lora_da_core.ablation import make_grid, run_grid
from lora_da_core.ablation.cells import GroupRun
from lora_da_core.ablation.finetune import Curve, TrainingData, finetune, held_out_loss
from lora_da_core.ablation.results import read_run
from lora_da_core.ablation.trainer_finetune import finetune_by_trainer
from lora_da_core.ablation.training import BY_ITSELF
from lora_da_core.ablation.workspace import Workspace
from lora_da_core.errors import OptionError, StorageError
from lora_da_core.registry import Registry
from lora_da_core.regularization import Penalty, penalty_of
from test_ablation_stacked import SETTINGS, lora, random_factors, tiny_model, training_data

REGISTRY = Registry()


def adapted(seed: int = 1) -> PeftModel:
    model = tiny_model()
    specs = adapter.resolve_targets(model, lora(2)).specs
    wrapped = get_peft_model(model, lora(2))
    adapter.write(wrapped, adapter.state_dict(random_factors(specs, 2, seed)), "default")
    return wrapped


def penalised(model: PeftModel, data: TrainingData) -> Penalty:
    return penalty_of(model, ("laplace", {"strength": 300.0}), list(data.held_out))


def factors(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("with_penalty", [False, True])
def test_transformers_trainer_trains_as_the_plain_loop_does(with_penalty: bool) -> None:
    """Same batches, schedule, clipping, weight decay and penalty: the same curve and the same factors."""
    data = replace(training_data(5), source=training_data(9).held_out)
    curves, ends = [], []
    for train in (finetune, finetune_by_trainer):
        model = adapted()
        term = penalised(model, data) if with_penalty else None
        states = torch.random.get_rng_state()
        curves.append(train(model, data, SETTINGS, 2e-2, penalty=term))  # type: ignore[operator]
        assert torch.equal(torch.random.get_rng_state(), states)
        ends.append(factors(model))
    ours, theirs = curves
    assert isinstance(ours, Curve) and ours.steps == theirs.steps == (0, 2, 5)
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)
    assert ours.train_losses == pytest.approx(theirs.train_losses, abs=1e-5)
    assert ours.source_losses == pytest.approx(theirs.source_losses, abs=1e-5) and len(ours.source_losses) == 3
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-5)


def test_the_trainer_follows_the_plugin_s_optimizer_and_the_grid_s_schedule() -> None:
    """Riemannion by hand, one step at a time at the schedule's rates, against the trainer's run."""
    from lora_da_core.ablation.finetune import rate_factor

    data, settings = training_data(5), replace(SETTINGS, weight_decay=0.0)
    by_trainer = adapted()
    finetune_by_trainer(by_trainer, data, settings, 2e-2, REGISTRY.create("trainer", ("riemannion", {})))
    by_hand = adapted()
    holder: Any = type("Trainer", (), {"model": by_hand, "args": type("Args", (), {"learning_rate": 2e-2})})
    REGISTRY.create("trainer", ("riemannion", {})).attach(holder)
    by_hand.train()
    for step, batch in enumerate(data.batches(settings.steps, settings.batch_size)):
        for group in holder.optimizer.param_groups:
            group["lr"] = 2e-2 * rate_factor(step, settings.steps)
        holder.optimizer.zero_grad()
        by_hand(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in by_hand.parameters() if p.requires_grad], settings.max_grad_norm)
        holder.optimizer.step()
    for name, value in factors(by_hand).items():
        torch.testing.assert_close(value, factors(by_trainer)[name], rtol=1e-4, atol=1e-5)


TUNE = {"steps": 4, "learning_rates": [1e-2, 3e-2], "eval_steps": [0, 4], "batch_size": 4, "held_out": 12}


def grid_of(world: Path, *tables: dict[str, Any], source: Path | None = None, **finetune: Any) -> dict[str, Any]:
    run = {"model": str(world / "model"), "data": str(world / "data.jsonl"), "samples": 12, "device": "cpu"}
    run |= {"reference": "none", "finetune": {**TUNE, **finetune}}
    if source is not None:
        run |= {"source": {"data": str(source), "prompt_template": "{answer} {question}", "samples": 8, "held_out": 6}}
    return {"run": run, "grid": list(tables)}


@pytest.fixture(scope="module")
def source(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.jsonl"
    path.write_text("".join((world / "data.jsonl").read_text().splitlines(keepends=True)[:24]))
    return path


@pytest.fixture(scope="module")
def regularised(world: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """One start without a penalty, with one of strength 0, and with growing ones from two Fishers; and PEFT's own."""
    strengths = [{"name": "laplace", "strength": strength} for strength in (0.0, 1e4, 1e6)]
    tables = (
        {"regularizer": ["none"], "rank": [2]},
        {"regularizer": strengths, "source_fisher": ["kfac", "diagonal"], "rank": [2]},
        {"baseline": ["default"], "regularizer": ["none", strengths[1]], "rank": [2]},
    )
    directory = tmp_path_factory.mktemp("regularised") / "out"
    return directory, run_grid(grid_of(world, *tables, source=source, together=20), directory)


class TestRegularizers:
    def test_cells_that_differ_in_their_penalty_share_the_start(self, regularised: Any) -> None:
        records = [record for record in regularised[1] if record["baseline"] is None]
        assert len(records) == 7 and {record["status"] for record in regularised[1]} == {"done"}
        assert len({record["digest"] for record in records}) == 1 and len({record["cell"] for record in records}) == 7
        assert sum(not record["reused"] for record in records) == 1
        # One is trained alone and the others together, which rounds in another order.
        first = [curve["losses"][0] for record in records[1:] for curve in record["curves"]]
        assert first == pytest.approx([first[0]] * len(first), rel=1e-6)

    def test_no_strength_is_no_penalty(self, regularised: Any) -> None:
        records = [record for record in regularised[1] if record["baseline"] is None]
        plain = next(record for record in records if record["regularizer"] == "none")
        weightless = [r for r in records if r["regularizer_options"].get("strength") == 0.0]
        assert {record["source_fisher"] for record in weightless} == {"kfac", "diagonal"}
        assert plain["source_fisher"] == "none"
        for record in weightless:
            for ours, theirs in zip(record["curves"], plain["curves"], strict=True):
                # One is trained alone and the other together with more, so that both also agree on the source's loss.
                for key in ("losses", "source_losses"):
                    assert ours[key] == pytest.approx(theirs[key], abs=5e-5)

    def test_the_stronger_the_penalty_the_less_is_learnt_and_the_less_the_source_moves(self, regularised: Any) -> None:
        """The random model knows no source, so its loss may fall as well as rise: it is held where it was."""
        for fisher in ("kfac", "diagonal"):
            own = [r for r in regularised[1] if r["source_fisher"] == fisher and r["baseline"] is None]
            own.sort(key=lambda record: record["regularizer_options"]["strength"])
            for rate in (0, 1):
                moved = [abs(c["source_losses"][1] - c["source_losses"][0]) for c in (r["curves"][rate] for r in own)]
                learnt = [r["curves"][rate]["losses"][1] for r in own]
                assert max(moved[1:]) < 0.5 * moved[0], (fisher, moved)
                assert learnt == sorted(learnt), (fisher, learnt)

    def test_what_is_not_trained_together_says_so(self, regularised: Any) -> None:
        for record in regularised[1]:
            assert (BY_ITSELF in record["notes"]) == (record["regularizer"] != "none")

    def test_the_report_tells_what_is_forgotten(self, regularised: Any) -> None:
        text = (regularised[0] / "report.md").read_text()
        assert "What is forgotten" in text and "Not to be forgotten" in text and "forgetting_r2.png" in text
        assert "+ laplace(strength=1000000.0) of diagonal" in text
        assert "PEFT default + laplace(strength=10000.0) of kfac" in text
        assert (regularised[0] / "pictures" / "forgetting_r2.png").stat().st_size > 1000

    def test_a_source_that_changed_is_refused(self, world: Path, regularised: Any, tmp_path: Path) -> None:
        entry = read_run(regularised[0])
        assert entry is not None and entry["source"]["held_out"] == 6
        other = tmp_path / "source.jsonl"
        lines = (world / "data.jsonl").read_text().splitlines(keepends=True)
        other.write_text("".join(lines[:20]))
        directory = tmp_path / "out"
        run_grid(grid_of(world, {"baseline": ["default"], "rank": [2]}, source=other), directory)
        other.write_text("".join(lines[20:40]))
        with pytest.raises(StorageError, match=r"source .* has changed"):
            run_grid(grid_of(world, {"baseline": ["default"], "rank": [3]}, source=other), directory)


def test_trainers_are_an_axis(world: Path) -> None:
    """Each plugin trains from the same start at every rate, and the base that all cells share stays as it is."""
    plugins = ["none", "riemannion", {"name": "odelora", "method": "rk2"}, {"name": "rac_lora", "every": 2}]
    grid = make_grid(grid_of(world, {"trainer": plugins, "preset": ["lora_one"], "rank": [2]}, together=4))
    space = Workspace(grid.run, REGISTRY)
    before = adapter.fingerprint(space.model)
    records = list(GroupRun(space).records(*grid.groups()))
    assert adapter.fingerprint(space.model) == before
    assert {record["trainer"] for record in records} == {"none", "odelora", "rac_lora", "riemannion"}
    assert len({record["digest"] for record in records}) == 1
    starts = {round(curve["losses"][0], 4) for record in records for curve in record["curves"]}
    ends = {round(curve["losses"][1], 6) for record in records for curve in record["curves"]}
    assert len(starts) == 1 and len(ends) == 8
    for record in records:
        assert record["status"] == "done" and (BY_ITSELF in record["notes"]) == (record["trainer"] != "none")
        assert all(math.isfinite(loss) for curve in record["curves"] for loss in curve["losses"])


def test_a_plugin_that_refuses_the_start_fails_its_cell_alone(world: Path, tmp_path: Path) -> None:
    table = {"baseline": ["default"], "trainer": ["none", "riemannion", "rac_lora"], "rank": [2]}
    records = run_grid(grid_of(world, table), tmp_path / "out")
    status = {record["trainer"]: record["status"] for record in records}
    assert status == {"none": "done", "riemannion": "failed", "rac_lora": "done"}
    failed = next(record for record in records if record["status"] == "failed")
    assert "full rank" in failed["error"]


@pytest.mark.parametrize(
    ("table", "source", "message"),
    [
        ({"regularizer": ["laplace"]}, False, r"give \[run.source\]"),
        ({"regularizer": ["laplce"]}, True, "Did you mean 'laplace'"),
        ({"regularizer": [{"name": "laplace", "strength": -1}]}, True, "strength"),
        ({"regularizer": ["laplace"], "source_fisher": ["none"]}, True, "takes a Fisher"),
        ({"regularizer": ["laplace"], "source_fisher": ["kfacc"]}, True, "Did you mean 'kfac'"),
        ({"trainer": ["rac_lora"], "regularizer": ["laplace"]}, True, "changes the base's weights"),
        ({"trainer": [{"name": "odelora", "method": "rk3"}]}, False, "method"),
        ({"trainer": [{"name": "none", "lr": 1}]}, False, "takes no options"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    table: dict[str, Any], source: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        make_grid(grid_of(tmp_path, table, source=tmp_path / "s.jsonl" if source else None))


def test_a_fine_tune_is_asked_for() -> None:
    run = {"model": "m", "data": "d"}
    for more, table in (({}, {"trainer": ["odelora"]}), ({"source": {"data": "s"}}, {"rank": [2]})):
        with pytest.raises(OptionError, match=r"give \[run.finetune\]"):
            make_grid({"run": {**run, **more}, "grid": table})


def test_a_fisher_without_a_penalty_makes_no_further_cells() -> None:
    run = {"model": "m", "data": "d", "source": {"data": "s"}, "finetune": TUNE}
    axes = {"regularizer": ["none", "laplace"], "source_fisher": ["kfac", "diagonal"], "trainer": ["none", "odelora"]}
    cells = make_grid({"run": run, "grid": {**axes, "rank": [2]}}).cells
    assert len(cells) == 2 * 3 and len({cell.start_key() for cell in cells}) == 1
    assert len({cell.id for cell in cells}) == 6


def test_each_fisher_of_the_source_is_estimated_once(
    world: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strengths = [{"name": "laplace", "strength": strength} for strength in (1.0, 2.0, 3.0)]
    axes = {"regularizer": ["none", *strengths], "source_fisher": ["kfac", "diagonal"], "rank": [2]}
    grid = make_grid(grid_of(world, axes, source=source, steps=1, eval_steps=[1], learning_rates=[1e-3]))
    space, asked = Workspace(grid.run, REGISTRY), []
    read = space.source

    def counted(seed: int) -> Any:
        asked.append(seed)
        return read(seed)

    monkeypatch.setattr(space, "source", counted)
    records = list(GroupRun(space).records(*grid.groups()))
    assert [record["status"] for record in records] == ["done"] * 7 and asked == [0, 0]


def test_the_loss_on_the_source_is_that_of_the_model(world: Path, source: Path) -> None:
    """Against the plain model's own loss: with B = 0 the first evaluation is the base's."""
    grid = make_grid(grid_of(world, {"baseline": ["default"], "rank": [2]}, source=source))
    space = Workspace(grid.run, REGISTRY)
    (record,) = GroupRun(space).records(*grid.groups())
    kept_out = space.training(0).source
    assert sum(len(batch["input_ids"]) for batch in kept_out) == 6
    expected = held_out_loss(space.model, kept_out)
    assert record["curves"][0]["source_losses"][0] == pytest.approx(expected, abs=1e-6)
    rows = {tuple(row[row != 3].tolist()) for batch in space.source(0) for row in batch["input_ids"]}
    held = {tuple(row[row != 3].tolist()) for batch in kept_out for row in batch["input_ids"]}
    assert len(rows) == 8 and not rows & held
