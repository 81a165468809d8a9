"""report.md and one self-contained report.html from the records of a directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from lora_da_core.ablation import comparison, figures, forgetting, loss_figures, provenance, tables
from lora_da_core.ablation.comparison import Configuration, Difference
from lora_da_core.ablation.downstream import AtBest, at_best
from lora_da_core.ablation.page import PICTURES, Section, markdown, page
from lora_da_core.ablation.results import FAILED, Record, read_run, write_bytes
from lora_da_core.ablation.settings import RunSettings

MARKDOWN: Final = "report.md"
HTML: Final = "report.html"


def write_report(directory: Path, records: Sequence[Record], run: RunSettings) -> None:
    """Writes both reports, and the pictures that the Markdown one shows.

    Args:
        directory: Where to; its run.json says what made the records.
        records: What the directory holds. Those of another model, data set or fine-tune are counted, not shown.
        run: The settings of the run that is reported.
    """
    parts = sections(records, run, read_run(directory))
    (directory / PICTURES).mkdir(exist_ok=True)
    for picture in (picture for part in parts for picture in part.pictures):
        write_bytes(directory / PICTURES / f"{picture.name}.png", picture.png)
    title = provenance.title(run)
    write_bytes(directory / MARKDOWN, markdown(title, parts).encode())
    write_bytes(directory / HTML, page(title, parts).encode())


def sections(records: Sequence[Record], run: RunSettings, made_by: Mapping[str, Any] | None = None) -> list[Section]:
    """The parts of the report.

    Args:
        records: Any records, finished or failed.
        run: The settings of the run that is reported.
        made_by: The directory's run.json.

    Returns:
        The parts in order; those that would be empty are left out, the failures are always there.
    """
    entries = provenance.entries_of(made_by, run)
    shown = provenance.comparable(records, entries)
    found = comparison.configurations(shown)
    baseline = comparison.baseline_of(found, run.compare_to)
    base = None if baseline is None else _called(baseline, found)
    about = provenance.facts(shown, len(records) - len(shown), entries, run)
    parts = [Section("What was run", facts=tuple(about))]
    if found:
        pictures = tuple(figures.cost_pictures(found))
        table = tables.cost_table(found)
        parts.append(Section("Cost and fidelity", _cost_text(shown, found), pictures=pictures, table=table))
    if run.finetune is not None and (trained := at_best(found, baseline, run.finetune.batch_size)):
        what = "loss" if run.objective is None else f"{_name_of(run.objective)} loss"
        measured = f"validation {what}" if run.finetune.validation else f"held-out {what}"
        parts += _finetunes(trained, measured, "label token" if run.objective is None else "pair", base)
    if run.compare_to is not None and baseline is None:
        text = f"No finished cell is a {run.compare_to!r}: nothing to compare to."
        parts.append(Section("Paired differences", text))
    elif baseline is not None and base is not None and (rows := comparison.differences(found, baseline)):
        parts.append(_differences(rows, base))
    failed = [record for record in shown if record["status"] == FAILED]
    parts.append(
        Section("What failed", table=tables.failure_table(failed)) if failed else Section("What failed", "Nothing.")
    )
    if entries:
        parts.append(_again(entries[0]))
    return parts


def _name_of(objective: str | Mapping[str, Any]) -> str:
    return objective if isinstance(objective, str) else str(objective["name"])


def _called(baseline: str, found: Sequence[Configuration]) -> str:
    """What is compared to, by its configuration's name where it is the same for all."""
    others = (comparison.counterpart(found, each, baseline) for each in found)
    names = {other.name for other in others if other is not None}
    return names.pop() if len(names) == 1 else baseline


def _cost_text(records: Sequence[Record], found: Sequence[Configuration]) -> str:
    sentences = [
        "Means over seeds.",
        "Time and memory count the estimation in full, also where another cell's was reused.",
    ]
    if tables.searched(found):
        sentences.append("Search is the part of the time that the line search of the scale takes.")
    if references := sorted({record["reference"] for record in records if record["reference"]}):
        sentences += [
            "The angle is the largest principal angle between a cell's subspace and that of the reference "
            f"({'; '.join(references)}) with the same data, α, β and damping: median and maximum over layers.",
            "PEFT's own initialisations (hollow) are measured against the default preset's.",
            "Dashed, and unbeaten in: what no other of the same rank beats in both cost and angle.",
        ]
    if errors := [record["reference_error"] for record in records if record["reference_error"]]:
        sentences.append(f"{len(errors)} cells have no angle: {'; '.join(sorted(set(errors)))}")
    return " ".join([*sentences, *_ranks_left_out(found)])


def _ranks_left_out(found: Sequence[Configuration]) -> list[str]:
    drawn, ranks = figures.ranks_of(found), {each.rank for each in found}
    return [f"Pictures show ranks {', '.join(map(str, drawn))} of {len(ranks)}."] if len(drawn) < len(ranks) else []


def _finetunes(entries: Sequence[AtBest], measured: str, unit: str, base: str | None) -> list[Section]:
    found = [entry.configuration for entry in entries]
    pictures, left_out = [], []
    for rank, group in groupby(entries, lambda entry: entry.configuration.rank):
        alike = list(group)
        shown = len(loss_figures.leading(alike))
        if rank in figures.ranks_of(found):
            pictures += loss_figures.loss_pictures(alike, f"{measured} [nats per {unit}]")
            left_out += [f"Rank {rank}: the best {shown} of {len(alike)} are shown."] if shown < len(alike) else []
    sentences = ["Lines are means over seeds, bands and bars 95 % t-intervals.", *left_out, *_ranks_left_out(found)]
    if base is not None:
        sentences += [f"Dashed: {base}, what the others are compared to.", "Differences are paired by seed."]
    sentences += [
        "Compute counts every sample that an initialisation reads like a training sample.",
        "Frames of differences and of compute are those of the later steps, earlier ones may leave them.",
    ]
    if any(not each.survivors(rate) for each in found for rate in comparison.learning_rates([each])):
        sentences.append("Where a learning rate has no point, every seed diverged.")
    return [
        Section("Loss curves", " ".join(sentences), pictures=tuple(pictures)),
        Section(
            "At each one's best learning rate",
            _at_best_text(entries, measured, unit, base),
            table=tables.at_best_table(entries, measured, base),
        ),
        *_forgetting(entries, measured, base),
    ]


def _forgetting(entries: Sequence[AtBest], measured: str, base: str | None) -> list[Section]:
    rows = forgetting.forgotten(entries)
    if not rows:
        return []
    text = (
        f"Loss on rows of the source, which no fine-tune reads, beside the {measured}; each configuration at the "
        "learning rate that is best for what is learnt, means over seeds ± half the 95 % t-interval, at the last step. "
        "What forgets least comes first."
    )
    pictures = tuple(forgetting.forgetting_pictures(rows, measured))
    table = forgetting.forgetting_table(rows, measured, base)
    return [Section("What is forgotten", text, pictures=pictures, table=table)]


def _at_best_text(entries: Sequence[AtBest], measured: str, unit: str, base: str | None) -> str:
    sentences = [
        f"In nats per {unit}, mean over seeds ± half the 95 % t-interval; the lowest at the last step first.",
        f"The best rate is the one with the lowest mean {measured} at the last step.",
        "Worst lr: how much higher that loss is at the worst of the rates.",
    ]
    if base is not None:
        sentences += [
            f"To {base}'s minimum: the step at which the mean curve is as low as {base}'s ever gets, and its share of "
            f"the steps that {base} takes to get there.",
            "Compute: the samples that the initialisation reads, in training steps; and the steps, those included, "
            f"from which on the mean curve stays below {base}'s.",
            "Differences are paired by seed; ▼ and ▲ mark intervals that exclude zero, ▼ is better.",
        ]
    evaluated = {step for entry in entries for step in entry.losses}
    if len(shown := tables.steps_of(entries)) < len(evaluated):
        sentences.append(f"{len(shown)} of {len(evaluated)} evaluated steps are shown.")
    return " ".join(sentences)


def _differences(rows: Sequence[Difference], base: str) -> Section:
    text = (
        f"Each configuration minus {base} of the same rank, seed by seed, with the 95 % t-interval of the mean "
        "difference, which takes at least two seeds; the lowest first. ▼ and ▲ mark intervals that exclude zero, ▼ is "
        "better. Each interval is for one comparison: among twenty that differ by nothing, one is expected to exclude "
        "zero. Losses are those of the last step. Seeds that diverged are left out of the pairs."
    )
    return Section(f"Paired differences against {base}", text, table=tables.difference_table(rows))


def _again(entry: Mapping[str, Any]) -> Section:
    text = (
        "Save the grid below as grid.toml and run lora-da ablate grid.toml --output DIR. With the versions above its "
        "cells have the same ids as those reported here."
    )
    return Section("How to reproduce", text, code=("grid.toml", provenance.grid_of(entry)))
