"""Draws the picture of the README from the losses that `benchmarks.evidence` measured: curves, last losses and costs.

    python -m benchmarks.evidence_picture benchmarks/results/gsm8k_2026-11-26.jsonl docs/pictures/evidence.png

Each start is shown at its own best learning rate by the last loss. Intervals are 95 %, paired with the default by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from scipy.stats import t

DEFAULT: Final = "default"
NAMES: Final = {
    "robust": "LoRA-DA (robust)", "default": "PEFT default", "eva": "PEFT EVA", "lora_ga": "PEFT LoRA-GA",
    "pissa": "PEFT PiSSA", "corda": "PEFT CorDA", "olora": "PEFT OLoRA", "lora_one": "preset lora_one",
    "spectral": "preset spectral", "paper": "preset paper",
}  # fmt: skip
COLOURS: Final = {
    "robust": "C0", "lora_one": "C9", "spectral": "C2", "paper": "C6", "default": "black", "eva": "C5", "lora_ga": "C4",
    "pissa": "C1", "corda": "C3", "olora": "C8",
}  # fmt: skip
CURVES: Final = ("default", "corda", "pissa", "lora_ga", "eva", "robust")

Rows = Mapping[int, Mapping[str, Any]]
"""A start's records at one rate, by seed."""


def at_best_rate(records: Sequence[Mapping[str, Any]]) -> dict[str, Rows]:
    """Each start's records at the rate whose mean last loss is lowest; rates at which a seed diverged are left out."""
    by_rate: dict[str, dict[float, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        by_rate[record["start"]][record["rate"]][record["seed"]] = record
    found = {}
    for start, rates in by_rate.items():
        finite = {
            rate: rows for rate, rows in rates.items() if None not in [row["held_out"][-1] for row in rows.values()]
        }
        found[start] = min(
            finite.values(), key=lambda rows: statistics.mean(row["held_out"][-1] for row in rows.values())
        )
    return found


def paired(rows: Rows, default: Rows) -> tuple[float, float]:
    """Mean and 95 % half-width of the last loss's difference to the default's, over the seeds that both have."""
    differences = [rows[seed]["held_out"][-1] - default[seed]["held_out"][-1] for seed in rows if seed in default]
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(t.ppf(0.975, len(differences) - 1)) * spread


def seconds(rows: Rows) -> float:
    """Median time of making a start, over seeds."""
    return statistics.median(row["init_seconds"] for row in rows.values())


def figure_of(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Curves on the left; on the right differences after the last step, and what each start took."""
    best = at_best_rate(records)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, last = figure.subplots(1, 2)
    for start in CURVES:
        rows = list(best[start].values())
        means = [statistics.mean(values) for values in zip(*(row["held_out"] for row in rows), strict=True)]
        curves.plot(
            rows[0]["steps"], means, color=COLOURS[start], label=f"{NAMES[start]}, lr {rows[0]['rate']:g}", marker=".",
            lw=2.4 if start == "robust" else 1.4, ls="--" if start == DEFAULT else "-",
        )  # fmt: skip
    ours, others = (best[start][0]["held_out"][0] for start in ("robust", DEFAULT))
    curves.set(
        xlabel="step", ylabel="held-out loss [nats per token]", ylim=(0.72, 0.92),
        title=f"Training from each start (untrained: {ours:.2f} LoRA-DA, {others:.2f} PEFT's)",
    )  # fmt: skip
    curves.legend(fontsize=8)
    order = sorted(
        (start for start in best if start != DEFAULT), key=lambda start: paired(best[start], best[DEFAULT])[0]
    )
    for place, start in enumerate(order):
        mean, half = paired(best[start], best[DEFAULT])
        last.errorbar(mean, place, xerr=half, color=COLOURS[start], fmt="o", capsize=3)
    last.set_yticks(range(len(order)), [f"{NAMES[start]}, {seconds(best[start]):.0f} s" for start in order])
    last.invert_yaxis()
    last.axvline(0, color="black", ls="--", lw=1.4)
    last.set(
        xlabel="last loss − PEFT default's, paired by seed, 95 %",
        title="After the last step, and seconds that the start took",
    )
    for axes in (curves, last):
        axes.grid(alpha=0.25, lw=0.5)
        axes.title.set_fontsize(10)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Reads the records and saves the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    records = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    figure_of(records).savefig(options.picture, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
