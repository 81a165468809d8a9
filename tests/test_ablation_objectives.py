"""Objectives as an axis of a grid: pairs as TRL encodes them, TRL's own loss, one fine-tune for all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lora_da_core import DataError, OptionError
from lora_da_core.ablation import make_grid, run_grid
from lora_da_core.ablation.finetune import finetune
from lora_da_core.ablation.pairs import encode_pairs, pair_batch
from lora_da_core.ablation.workspace import Workspace
from lora_da_core.data import TextOptions
from lora_da_core.registry import Registry
from test_preferences import dpo_trainer

DPO = {"name": "dpo", "beta": 0.2}
TUNE = {"steps": 8, "learning_rates": [2e-2], "eval_steps": [0, 8], "batch_size": 4, "held_out": 8}


@pytest.fixture(scope="module")
def preferences(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's rows, each answer against another row's."""
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": row["question"], "chosen": " " + row["answer"], "rejected": " " + other["question"][:8]}
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    path = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def content(world: Path, data: Path, *tables: dict[str, Any], **run: Any) -> dict[str, Any]:
    settings = {"model": str(world / "model"), "data": str(data), "samples": 12, "device": "cpu", "reference": "kfac"}
    settings |= {"objective": DPO, "finetune": TUNE, **run}
    return {"run": settings, "grid": list(tables) or {"rank": [2]}}


def test_pairs_are_encoded_as_trl_encodes_them(world: Path, preferences: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in preferences.read_text().splitlines()]
    trainer = dpo_trainer(tmp_path, world)
    tokenizer = trainer.processing_class
    ours = encode_pairs(rows, tokenizer, TextOptions("{prompt}{chosen}"), model_limit=64)
    theirs = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, trainer.args, "train")
    assert len(ours.samples) == len(theirs) == len(rows)
    for pair, row in zip(ours.samples, theirs, strict=True):
        for text, ids in ((pair.chosen, row["chosen_ids"]), (pair.rejected, row["rejected_ids"])):
            assert text["input_ids"] == [*row["prompt_ids"], *ids]
            assert text["labels"] == [*[-100] * len(row["prompt_ids"]), *ids]


def test_a_fine_tune_begins_at_trls_own_loss(world: Path, preferences: Path, tmp_path: Path) -> None:
    """The first training loss of an adapter that is not zero, on the grid's own batch, by TRL's trainer."""
    grid = make_grid(content(world, preferences))
    space = Workspace(grid.run, Registry())
    data = space.training(0)
    trainer = dpo_trainer(tmp_path, world, beta=0.2)
    model, draw = trainer.model, torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    drawn = next(data.draws(1, 4))
    pairs = {name: value for name, value in pair_batch(drawn, data.pad_token_id).items() if not name.startswith("ref")}
    flat = {name: torch.cat(value.unbind(1)) for name, value in pairs.items()}
    batch = {
        "input_ids": flat["input_ids"], "attention_mask": flat["attention_mask"],
        "completion_mask": (flat["labels"] != -100).long(),
    }  # fmt: skip
    with torch.no_grad():
        expected = float(trainer.compute_loss(model.eval(), batch))
    assert grid.run.finetune is not None
    curve = finetune(model, data, grid.run.finetune, 1e-3)
    assert curve.train_losses[0] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - math.log(2)) > 0.01


@pytest.fixture(scope="module")
def compared(world: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Three objectives, PEFT's own start, and a trainer plugin, all fine-tuned by DPO."""
    rpo = {"name": "rpo", "average": True}
    tables = (
        {"objective": ["causal_lm", DPO, rpo], "rank": [2]},
        {"baseline": ["default", "pissa"], "rank": [2]},
        {"preset": ["lora_one"], "trainer": ["riemannion"], "rank": [2]},
    )
    directory = tmp_path_factory.mktemp("objectives") / "out"
    return directory, run_grid(content(world, preferences, *tables), directory)


def test_starts_of_all_objectives_are_judged_by_one_loss(compared: tuple[Path, list[Any]]) -> None:
    records = compared[1]
    assert [record["error"] for record in records] == [None] * 6
    ours = [record for record in records if record["baseline"] is None and record["trainer"] == "none"]
    assert {record["objective"] for record in ours} == {"causal_lm", "dpo", "rpo"}
    assert len({record["group"] for record in ours}) == 3 and len({record["digest"] for record in ours}) == 3
    starts = {record["objective"]: record["curves"][0]["losses"][0] for record in ours}
    # The base is the reference, so its loss is log 2 on every pair; the objective's own start is below.
    plain, pissa = (r["curves"][0]["losses"][0] for r in records if r["baseline"] is not None)
    assert plain == pytest.approx(math.log(2), rel=1e-6) and pissa == pytest.approx(math.log(2), abs=1e-4)
    assert starts["dpo"] < math.log(2) - 1e-3
    curves = [record["curves"][0]["losses"] for record in records]
    assert all(end < start for start, end in curves), curves
    assert all(record["angle"] < 1e-2 for record in ours)  # each against its own objective's reference


def test_the_report_says_which_loss_and_its_grid_gives_the_same_cells(compared: tuple[Path, list[Any]]) -> None:
    import tomllib

    directory, records = compared
    report = (directory / "report.md").read_text()
    assert "In nats per pair" in report and "held-out dpo loss" in report and "rpo" in report
    again = tomllib.loads(report.split("```toml\n")[1].split("```")[0])
    assert {cell.id for cell in make_grid(again).cells} == {record["cell"] for record in records}


def test_without_a_fine_tune_objectives_differ_in_their_subspaces(
    world: Path, preferences: Path, tmp_path: Path
) -> None:
    given = content(world, preferences, {"objective": ["causal_lm", "dpo"], "rank": [2]}, objective=None, finetune=None)
    texts, pairs = run_grid(given, tmp_path / "out")
    assert texts["status"] == pairs["status"] == "done" and texts["digest"] != pairs["digest"]


def test_cells_keep_the_names_they_had_before_there_was_the_axis() -> None:
    run = {"model": "m", "data": "d.jsonl", "seeds": [3]}
    (plain,) = make_grid({"run": run, "grid": {"rank": [4]}}).cells
    assert plain.id == "2ed6100edb34ba15"
    (named,) = make_grid(
        {"run": {**run, "objective": "causal_lm"}, "grid": {"rank": [4], "objective": ["causal_lm"]}}
    ).cells
    assert named.id == plain.id
    (other,) = make_grid({"run": run, "grid": {"rank": [4], "objective": ["dpo"]}}).cells
    assert other.id != plain.id and other.group_key() != plain.group_key()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": "seq2seq"}, "train causal language models"),
        ({"objective": "dpa"}, "dpo"),
        ({"objective": {"name": "dpo", "beta": -1.0}}, "beta is -1"),
        ({"finetune": {**TUNE, "together": 4}}, "set together = 1"),
        ({"source": {"data": "source.jsonl"}}, r"leave \[run.source\]"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], says: str, world: Path, preferences: Path
) -> None:
    with pytest.raises(OptionError, match=says):
        make_grid(content(world, preferences, **changes))


def test_data_without_pairs_and_a_template_without_the_answer_are_refused(world: Path, preferences: Path) -> None:
    with pytest.raises(DataError, match="reads columns 'chosen' and 'rejected'; the data has"):
        Workspace(make_grid(content(world, world / "data.jsonl")).run, Registry())
    with pytest.raises(OptionError, match=r"must hold \{chosen\}"):
        Workspace(make_grid(content(world, preferences, prompt_template="{prompt}{rejected}")).run, Registry())
