"""What made the cells of a report: model, data, versions, seeds, and the grid that runs them once more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import PurePath
from typing import Any, Final

from lora_da_core.ablation.axes import CHOICES, TRAINING, USUAL
from lora_da_core.ablation.grid import make_grid
from lora_da_core.ablation.results import FAILED, Record
from lora_da_core.ablation.run_table import INNER
from lora_da_core.ablation.settings import FinetuneSettings, RunSettings, SourceSettings
from lora_da_core.display import number

_FINGERPRINT: Final = 12
"""Digits of a fingerprint that are shown."""

_SHARED: Final = ("seeds", "samples", "compare_to")
"""What runs may differ in while their cells compare."""

Entry = Mapping[str, Any]
"""What `run.json` says of one grid."""


def entries_of(content: Mapping[str, Any] | None, run: RunSettings) -> list[Entry]:
    """What `run.json` says of this run and of earlier ones whose cells compare with its own, the latest first.

    Args:
        content: `run.json`, or None where there is none.
        run: The settings of the run that is reported.

    Returns:
        Entries with the same model, data, adapter and fine-tune.
    """
    if content is None:
        return []
    wanted = _comparable(json.loads(json.dumps(asdict(run))))
    return [entry for entry in (content, *content.get("earlier", [])) if _comparable(entry.get("run", {})) == wanted]


def comparable(records: Sequence[Record], entries: Sequence[Entry]) -> list[Record]:
    """The records of those runs; all of them where nothing is known of any run.

    Args:
        records: What a directory holds.
        entries: As `entries_of` gives them.

    Returns:
        The records, in their order.
    """
    cells = {cell["cell"] for entry in entries for cell in entry["cells"]}
    return [record for record in records if record["cell"] in cells] if cells else list(records)


def title(run: RunSettings) -> str:
    """The report's heading."""
    return f"LoRA-DA ablation: {_short(run.model)} on {_short(run.data)}"


def facts(
    records: Sequence[Record], left_out: int, entries: Sequence[Entry], run: RunSettings
) -> list[tuple[str, str]]:
    """What a reader has to know before the numbers.

    Args:
        records: What is reported.
        left_out: Cells in the directory that do not compare with these.
        entries: As `entries_of` gives them.
        run: The settings.

    Returns:
        Names and sentences.
    """
    entry: Entry = entries[0] if entries else {}
    seeds = sorted({record["seed"] for record in records})
    failed = sum(record["status"] == FAILED for record in records)
    cells = f"{len(records)}: {len(records) - failed} done, {failed} failed"
    if left_out:
        cells += f"; {left_out} more in the directory are of another model, data set or fine-tune, and not shown"
    found = [("Model", _model(entry, run)), ("Data", _data(entry, run)), ("Adapter", _adapter(records, run))]
    if run.finetune is not None:
        found.append(("Fine-tune", _finetune(run.finetune)))
    if run.source is not None:
        found.append(("Not to be forgotten", _source(run.source)))
    found += [("Seeds", ", ".join(map(str, seeds)) or "none"), ("Cells", cells)]
    found.append(("Time", f"{number(sum(record['spent'] for record in records), digits=3)} s for all cells together"))
    if entry:
        found.append(("Versions", _versions(entries)))
        found.append(("Machine", "; ".join(dict.fromkeys(map(_machine, entries)))))
    found.append(("Files", "every number is in results.jsonl and results.parquet, what made them in run.json"))
    return found


def _model(entry: Entry, run: RunSettings) -> str:
    parts = [run.model]
    if entry:
        model = entry["model"]
        parts += [f"{model['parameters']:,} parameters", f"fingerprint {model['fingerprint'][:_FINGERPRINT]}"]
    return ", ".join([*parts, f"dtype {run.dtype}"])


def _data(entry: Entry, run: RunSettings) -> str:
    parts = [run.data]
    if entry:
        data = entry["data"]
        parts += [f"{data['rows']:,} rows", f"fingerprint {data['fingerprint'][:_FINGERPRINT]}"]
    return ", ".join([*parts, f"split {run.split}"])


def _adapter(records: Sequence[Record], run: RunSettings) -> str:
    modules = run.target_modules if isinstance(run.target_modules, str) else ", ".join(run.target_modules)
    ranks = ", ".join(map(str, sorted({record["rank"] for record in records}))) or "none"
    return f"{modules}, rank {ranks}, lora_alpha {run.lora_alpha:g}{', rsLoRA' if run.use_rslora else ''}"


def _finetune(tune: FinetuneSettings) -> str:
    rates = ", ".join(f"{rate:g}" for rate in tune.learning_rates)
    rows = f"{tune.validation} validation" if tune.validation else f"{tune.held_out} held-out"
    return (
        f"AdamW, {tune.steps} steps of {tune.batch_size} samples, learning rates {rates}; the loss is taken on {rows} "
        "rows, which nothing else reads"
    )


def _source(source: SourceSettings) -> str:
    return (
        f"{_short(source.data)}, split {source.split}: a regularizer's Fisher is of {source.samples} rows, the loss is "
        f"taken on {source.held_out} others"
    )


def _versions(entries: Sequence[Entry]) -> str:
    text = ", ".join(f"{name} {value}" for name, value in entries[0]["versions"].items())
    if any(entry["versions"] != entries[0]["versions"] for entry in entries):
        text += "; some cells are of runs with other versions (run.json, earlier)"
    return text


def _machine(entry: Entry) -> str:
    machine = entry["machine"]
    return f"{machine['device']}, {machine['threads']} threads, {machine['platform']}"


def grid_of(entry: Entry) -> str:
    """The grid file that gives the cells of a run, with the same ids.

    Args:
        entry: What `run.json` says of it.

    Returns:
        TOML. What is at its default is left out, so it is for the version that made the cells.
    """
    run = dict(entry["run"])
    inner = {name: run.pop(name, None) for name in INNER}
    lines = ["[run]", *_settings(run, _defaults(RunSettings))]
    for name, values in inner.items():
        if values is not None:
            lines += ["", f"[run.{name}]", *_settings(values, _defaults(INNER[name]))]
    common = {name: run[name] for name in ("model", "data", "samples", "objective") if run.get(name) is not None}
    standard = make_grid({"run": common, "grid": {"rank": [8]}})
    usual = json.loads(json.dumps(standard.cells[0].settings()))
    ranks: dict[str, list[int]] = {}
    for cell in entry["cells"]:
        listed = ranks.setdefault(json.dumps(_axes(cell, usual)), [])
        if cell["rank"] not in listed:
            listed.append(cell["rank"])
    for axes, listed in ranks.items():
        lines += ["", "[[grid]]", *(f"{name} = [{_toml(value)}]" for name, value in json.loads(axes).items())]
        lines.append(f"rank = {_toml(listed)}")
    return "\n".join(lines) + "\n"


def _axes(cell: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in CHOICES if cell["baseline"] is None else TRAINING:
        choice = (cell.get(kind, USUAL.get(kind)), cell.get(f"{kind}_options", {}))
        if choice != (usual[kind], usual[f"{kind}_options"]):
            found[kind] = {"name": choice[0], **choice[1]} if choice[1] else choice[0]
    if cell["baseline"] is not None:
        return {"baseline": cell["baseline"], **found}
    parts = {"cell", "baseline", "rank", "seed", *CHOICES, *(f"{kind}_options" for kind in CHOICES)}
    return found | {name: value for name, value in cell.items() if name not in parts and value != usual.get(name)}


def _defaults(cls: type[Any]) -> dict[str, Any]:
    return {each.name: each.default for each in fields(cls)}


def _settings(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    shown = {name: value for name, value in values.items() if value != _plain(defaults[name]) and value is not None}
    return [f"{name} = {_toml(value)}" for name, value in shown.items()]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    """A JSON value as TOML; their texts and numbers are written alike."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items() if inner is not None) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _comparable(run: Mapping[str, Any]) -> dict[str, Any]:
    # What is not set is left out: earlier versions did not know all names.
    return {name: value for name, value in run.items() if name not in _SHARED and value is not None}


def _short(source: str) -> str:
    """The last part of a path on this machine; a hub's name as it is."""
    return PurePath(source).name if PurePath(source).is_absolute() else source
