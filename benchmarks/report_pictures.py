"""Draws the report's pictures again from the short records that are kept of `benchmarks.evidence` and `.forgetting`.

    python -m benchmarks.report_pictures benchmarks/results/gsm8k_2026-11-26.jsonl docs/pictures
    python -m benchmarks.report_pictures benchmarks/results/forgetting_2026-11-26.jsonl docs/pictures

Writes `gsm8k_differences.png` and `gsm8k_rates.png` (what the ablation's own report has of losses by step and by rate),
or `forgetting.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lora_da_core.ablation.axes import BASELINES, CONFIG_AXES, choice_of
from lora_da_core.ablation.comparison import configurations
from lora_da_core.ablation.downstream import AtBest, at_best
from lora_da_core.ablation.forgetting import forgetting_pictures, forgotten
from lora_da_core.ablation.loss_figures import loss_pictures
from lora_da_core.registry import Registry

SETTINGS: Final = {"status": "done", "rank": 8, "samples": 64}
"""What the cells of both grids have in common."""
BATCH_SIZE: Final = 32
"""Of training; it matters to costs alone, which are not drawn."""
LOSS: Final = "held-out loss"


def pictures(kept: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The pictures.

    Args:
        kept: Lines of a results file.

    Returns:
        PNG files by what they show: `differences` and `rates`, or nothing where losses on a source were kept.
    """
    records = records_of(kept)
    if "source" in kept[0]:
        (found,) = forgetting_pictures(forgotten(_at_best(records, "kfac")), LOSS)
        return {"": found.png}
    drawn = {each.name: each.png for each in loss_pictures(_at_best(records, "default"), f"{LOSS} [nats per token]")}
    return {what: drawn[f"{what}_r{SETTINGS['rank']}"] for what in ("differences", "rates")}


def _at_best(records: Sequence[dict[str, Any]], baseline: str) -> list[AtBest]:
    return at_best(configurations(records), baseline, BATCH_SIZE)


def records_of(kept: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a grid's records say, as far as these pictures read it: one per start, penalty and seed.

    Args:
        kept: Lines of a results file.

    Returns:
        Records.
    """
    registry, found = Registry(), {}
    for each in kept:
        settings = {name: each.get(name) for name in ("regularizer", "source_fisher")}
        settings |= {"regularizer_options": each.get("options"), "seed": each["seed"]}
        settings |= _start(registry, each["start"])
        record = found.setdefault(json.dumps(settings), {**SETTINGS, **settings, "curves": []})
        losses = each["target"] if "target" in each else each["held_out"]
        curve = {"learning_rate": each["rate"], "steps": each["steps"], "losses": losses}
        record["curves"].append({**curve, "source_losses": each.get("source")})
    return list(found.values())


def _start(registry: Registry, name: str) -> dict[str, Any]:
    if name in BASELINES:
        return {"baseline": name, "estimator": None}
    preset = registry.resolve("preset", name)
    estimator, options = choice_of(registry, "estimator", _choice(preset.estimator))
    config = {axis: getattr(preset.config, axis) for axis in CONFIG_AXES}
    return {"baseline": None, "preset": name, "estimator": estimator, "estimator_options": options, **config}


def _choice(component: Any) -> Any:
    """A preset's component as a grid file names it."""
    return component if isinstance(component, str) else {"name": component[0], **component[1]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(arguments)
    stem = options.results.name.partition("_")[0]
    kept = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    for what, png in pictures(kept).items():
        (options.directory / f"{'_'.join(filter(None, (stem, what)))}.png").write_bytes(png)


if __name__ == "__main__":
    main()
