"""The README's picture and its rows of differences are those of the losses that were measured."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation
from scipy import stats

from benchmarks import evidence_picture, report_pictures
from lora_da_core.ablation import forgetting
from lora_da_core.ablation.comparison import configurations

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


def drawn_again(what: str, folder: Path) -> list[str]:
    """Runs the command that the page names; the pictures that it wrote are those of the page."""
    choosing = (ROOT / "docs" / "choosing.md").read_text()
    (source,) = re.findall(rf"`python -m benchmarks\.report_pictures (\S+/{what}_\S+\.jsonl) docs/pictures`", choosing)
    report_pictures.main([str(ROOT / source), str(folder)])
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        drawn, kept = imread(folder / name), imread(ROOT / "docs" / "pictures" / name)
        assert f"](pictures/{name})" in choosing
        assert drawn.shape == kept.shape and float(abs(drawn - kept).mean()) < 0.02
    return names


def test_the_pictures_of_differences_and_rates_are_drawn_from_the_records(tmp_path: Path) -> None:
    assert drawn_again("gsm8k", tmp_path) == ["gsm8k_differences.png", "gsm8k_rates.png"]
    found = configurations(report_pictures.records_of(RECORDS))
    assert sorted(each.name for each in found) == [
        "PEFT corda", "PEFT default", "PEFT eva", "PEFT lora_ga", "PEFT olora", "PEFT pissa",
        "lora_one identity", "paper kfac", "robust kfac", "spectral identity",
    ]  # fmt: skip


def test_the_picture_of_what_is_forgotten_is_drawn_from_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    kept_png = forgetting.png
    monkeypatch.setattr(forgetting, "png", lambda figure: figures.append(figure) or kept_png(figure))
    assert drawn_again("forgetting", tmp_path) == ["forgetting.png"]
    (axes,) = figures[0].axes
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert sorted(legend) == [
        "PEFT default", "kfac", "kfac + laplace(strength=…) of diagonal", "kfac + laplace(strength=…) of kfac",
    ]  # fmt: skip
    notes = [note for note in axes.findobj(Annotation) if note.get_text()]
    assert {"10", "100", "1000", "1e4"} <= {note.get_text() for note in notes}
    for line in (line for bars in axes.collections for line in bars.get_segments()):  # the intervals
        (left, low), (right, high) = sorted(axes.transData.transform(line).tolist())
        for box in (note.get_window_extent() for note in notes):
            assert right < box.x0 or box.x1 < left or max(low, high) < box.y0 or box.y1 < min(low, high)
