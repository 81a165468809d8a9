"""The README's picture and its rows of differences are those of the losses that were measured."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
from matplotlib.image import imread
from scipy import stats

from benchmarks import evidence_picture

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
NAMES = {
    "LoRA-DA `robust`": "robust",
    "PEFT EVA": "eva",
    "PEFT LoRA-GA": "lora_ga",
    "PEFT PiSSA": "pissa",
    "PEFT CorDA": "corda",
}
(SOURCE,) = re.findall(r"evidence_picture (\S+\.jsonl) (docs/pictures/\S+\.png)`", README)
RECORDS = [json.loads(line) for line in (ROOT / SOURCE[0]).read_text().splitlines()]


def last_losses(start: str) -> dict[float, dict[int, float]]:
    found: dict[float, dict[int, float]] = {}
    for record in RECORDS:
        if record["start"] == start:
            found.setdefault(record["rate"], {})[record["seed"]] = record["held_out"][-1]
    return {rate: losses for rate, losses in found.items() if None not in losses.values()}


@pytest.mark.parametrize(("name", "start"), NAMES.items())
def test_a_row_of_the_readme_is_what_was_measured(name: str, start: str) -> None:
    best, default = (
        min(last_losses(one).values(), key=lambda losses: statistics.mean(losses.values()))
        for one in (start, "default")
    )
    pairs = [best[seed] - default[seed] for seed in best]
    interval = stats.ttest_1samp(pairs, 0.0).confidence_interval()
    half = (interval.high - interval.low) / 2
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {name} ")]
    mean_shown, half_shown = (float(text) for text in re.findall(r"([+-]?\.\d+) ± (\.\d+)", row.replace("−", "-"))[0])
    assert mean_shown == pytest.approx(statistics.mean(pairs), abs=6e-5)
    assert half_shown == pytest.approx(half, abs=6e-5)
    mean, width = evidence_picture.paired(
        evidence_picture.at_best_rate(RECORDS)[start], evidence_picture.at_best_rate(RECORDS)["default"]
    )
    assert (mean, width) == pytest.approx((statistics.mean(pairs), half))


def test_the_picture_is_drawn_from_the_records(tmp_path: Path) -> None:
    evidence_picture.main([str(ROOT / SOURCE[0]), str(tmp_path / "evidence.png")])
    drawn, kept = imread(tmp_path / "evidence.png"), imread(ROOT / SOURCE[1])
    assert drawn.shape == kept.shape and float(abs(drawn - kept).mean()) < 0.02
    figure = evidence_picture.figure_of(RECORDS)
    curve = next(line for line in figure.axes[0].lines if str(line.get_label()).startswith("LoRA-DA"))
    best = min(last_losses("robust"), key=lambda rate: statistics.mean(last_losses("robust")[rate].values()))
    seeds = [record["held_out"] for record in RECORDS if record["start"] == "robust" and record["rate"] == best]
    assert list(curve.get_ydata()) == pytest.approx([statistics.mean(values) for values in zip(*seeds, strict=True)])
    taken = statistics.median(
        record["init_seconds"] for record in RECORDS if record["start"] == "robust" and record["rate"] == best
    )
    shown = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert f"LoRA-DA (robust), {taken:.0f} s" in shown and len(shown) == 9
