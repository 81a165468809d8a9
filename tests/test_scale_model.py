"""The model of time and memory: what it counts against transformers and real runs, and what it predicts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import scale_check, scale_model
from benchmarks.scale_model import GIB, GPU_7B, SHAPES, Assumptions, Costs, Workload, predicted, statistics_bytes
from process_worlds import Worlds

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
COSTS = Costs.measured(*GPU_7B)
SMALL = ["--layers", "2", "--hidden", "64", "--intermediate", "160", "--vocabulary", "50", "--tokens", "16"]


def options(*more: str) -> argparse.Namespace:
    return scale_check._options(["--measure", "file", *SMALL, "--samples", "12", *more])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_shapes_are_those_of_transformers(shape: scale_model.Shape) -> None:
    heads = shape.hidden // 128
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=shape.keys // 128,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linear = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert sum(module.weight.numel() for module in linear) == shape.block_parameters
    ends = model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel()
    assert shape.block_parameters * shape.blocks + ends == shape.parameters


def test_one_process_is_predicted_as_it_was_measured() -> None:
    shape, workload, seconds = GPU_7B
    found = predicted(shape, 1, workload, COSTS, Assumptions()).seconds
    expected = {"passes": seconds["statistics"], "solves": seconds["solve"], "search": seconds["scale"]}
    assert found == pytest.approx({**expected, "adding sums": 0.0})


def test_collectives_take_what_rings_take() -> None:
    links = Assumptions(latency=0.0, gpus_per_node=4)
    # Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009: 2(p − 1)/p of the bytes pass each process.
    assert scale_model._transfer(links, 4, 100.0, 1, times=2) == pytest.approx(2 * 75 / links.fast)
    assert scale_model._transfer(links, 8, 100.0, 1, times=2) == pytest.approx(2 * 87.5 / links.slow)
    assert scale_model._transfer(links, 1, 100.0, 1, times=2) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_work_is_divided_until_a_sample_or_a_layer_is_the_least(shape: scale_model.Shape) -> None:
    workload, rows = Workload(), {}
    for count in (1, 2, 8, 512):
        rows[count] = scale_model.way_of(shape, count, workload, COSTS, Assumptions(), sharded=count > 1)
    assert rows[8].seconds["passes"] == pytest.approx(rows[1].seconds["passes"] / 8)
    assert rows[512].seconds["passes"] == pytest.approx(rows[1].seconds["passes"] / 256)
    assert rows[2].seconds["solves"] == pytest.approx(rows[1].seconds["solves"] / 2, rel=0.05)
    assert rows[8].peak < rows[2].peak < rows[1].peak
    least = max(statistics_bytes(shape, workload).values())
    assert rows[512].bytes["statistics"] >= 2 * least


def test_what_does_not_fit_is_said_not_to_fit() -> None:
    giant = predicted(SHAPES[-1], 1, Workload(), COSTS, Assumptions())
    assert not giant.fits and giant.peak > 1000 * GIB
    assert predicted(SHAPES[0], 2, Workload(), COSTS, Assumptions()).fits


def measured(sharded: bool) -> dict[str, Any]:
    return scale_check.run_figures(options(*(["--sharded"] if sharded else [])))


def test_bytes_of_measured_runs_are_those_that_were_predicted() -> None:
    worlds = Worlds()
    try:
        whole, divided = worlds.start(2, measured, False), worlds.start(2, measured, True)
        alone = measured(False)
        found = scale_check.measured([alone, worlds.values(whole)[0], worlds.values(divided)[0]])
    finally:
        worlds.kill()
    one, two, sharded = found
    assert [each.run.processes for each in found] == [1, 2, 2]
    assert [each.run.held for each in found] == [each.held for each in found]
    assert one.seconds == pytest.approx(one.run.seconds, rel=1e-2) and abs(one.error) < 1e-2
    assert sharded.run.held < 0.75 * two.run.held
    assert all(each.run.seconds > 0 and each.seconds > 0 for each in found)
    assert len(list(scale_check.rows_of(found))) == 5


def test_the_page_shows_two_gpus_beside_what_is_predicted_of_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ROOT / "benchmarks" / "results" / "two_gpus_2026-11-26.json"
    monkeypatch.setattr("sys.argv", ["scale_check", str(file)])
    scale_check.main()
    shown = capsys.readouterr().out
    assert shown in PAGE.read_text()
    figures = json.loads(file.read_text())
    one, all_, sharded = scale_check.on_gpus(figures)
    assert one.seconds == pytest.approx(sum(figures["rows"]["one"]["phases"].values()), rel=1e-3)
    assert all_.run.seconds == figures["rows"]["all"]["seconds"]
    assert all_.way.seconds["adding sums"] > 0 and sharded.way.seconds["gathering weights"] > 0
    assert sharded.held < all_.held <= one.held


def test_the_page_shows_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["scale_model"])
    monkeypatch.setattr(scale_model, "PROCESSES", (1, 8, 32, 128, 512))
    scale_model.main()
    assert capsys.readouterr().out in PAGE.read_text()
