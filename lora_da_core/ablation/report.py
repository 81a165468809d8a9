"""report.md and one self-contained report.html from the records of a directory."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_da_core.ablation import comparison, figures
from lora_da_core.ablation.comparison import Configuration
from lora_da_core.ablation.grid import RunSettings
from lora_da_core.ablation.results import FAILED, Record, write_bytes
from lora_da_core.report import number

MARKDOWN: Final = "report.md"
HTML: Final = "report.html"

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #888; vertical-align: bottom }
td.text, th.text { text-align: left; white-space: normal }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e6e6e6 } th, td { border-color: #3a3d44 } img { background: #fff }
}
"""


@dataclass(frozen=True)
class Section:
    """One part of the report: a sentence, a picture or a table, or several of them."""

    title: str
    text: str = ""
    picture: tuple[str, bytes] | None = None
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    prose: frozenset[int] = frozenset({0})
    """Columns that hold words, not numbers."""


def write_report(directory: Path, records: Sequence[Record], run: RunSettings) -> None:
    """Writes both reports, and the pictures that the markdown one shows.

    Args:
        directory: Where to.
        records: What the directory holds.
        run: Says what to compare to.
    """
    parts = sections(records, run.compare_to)
    title = f"LoRA-DA ablation: {run.model} on {run.data}"
    for part in parts:
        if part.picture is not None:
            write_bytes(directory / part.picture[0], part.picture[1])
    write_bytes(directory / MARKDOWN, _markdown(title, parts).encode())
    write_bytes(directory / HTML, _html(title, parts).encode())


def sections(records: Sequence[Record], compare_to: str | None) -> list[Section]:
    """The parts of the report.

    Args:
        records: Any records, finished or failed.
        compare_to: What to compare to, as `RunSettings` has it.

    Returns:
        The parts in order; those that would be empty are left out, the failures are always there.
    """
    found = comparison.configurations(records)
    baseline = comparison.baseline_of(found, compare_to)
    failed = [record for record in records if record["status"] == FAILED]
    parts = [_overview(records, found, failed)]
    cost = figures.pareto_picture(found)
    if cost is not None:
        parts.append(Section("Cost and fidelity", _references(records), ("pareto.png", cost)))
    if found:
        parts.append(_table(found))
    curves = figures.loss_picture(found, baseline)
    if curves is not None:
        text = f"Dashed: {baseline}, what the others are compared to." if baseline else ""
        parts.append(Section("Loss curves", text, ("losses.png", curves)))
    if compare_to is not None and baseline is None:
        parts.append(Section("Paired differences", f"No finished cell is a {compare_to!r}: nothing to compare to."))
    elif baseline is not None and (rows := _differences(found, baseline)):
        parts.append(rows)
    parts.append(_failures(failed))
    return parts


def _overview(records: Sequence[Record], found: Sequence[Configuration], failed: Sequence[Record]) -> Section:
    seeds = sorted({record["seed"] for record in records})
    text = (
        f"{len(records)} cells: {len(records) - len(failed)} done, {len(failed)} failed; "
        f"{len(found)} configurations, seeds {', '.join(map(str, seeds)) or 'none'}; "
        f"{number(sum(record['spent'] for record in records), digits=3)} s in all. "
        "Every number is in results.jsonl and results.parquet, what made them in run.json."
    )
    return Section("Overview", text)


def _references(records: Sequence[Record]) -> str:
    names = sorted({record["reference"] for record in records if record["reference"]})
    return (
        f"The angle is the largest principal angle between a cell's subspace and that of the reference "
        f"({'; '.join(names)}) with the same data, α, β and damping, median over layers; PEFT's own initialisations "
        "(black rim) are measured against the default preset's. Time and memory count the estimation in full, also "
        "where another cell's was reused."
    )


def _table(found: Sequence[Configuration]) -> Section:
    header = (
        "configuration", "seeds", "time [s]", "peak [MiB]", "passes",
        "angle [°]", "largest [°]", "objective gap", "not conv.",
    )  # fmt: skip
    rows = tuple(
        (
            each.label,
            str(len(each.by_seed)),
            number(each.mean("seconds"), digits=3),
            number(each.mean("peak_bytes") / 2**20, digits=3),
            number(each.mean("passes")),
            number(math.degrees(each.mean("angle")), digits=3),
            number(math.degrees(each.mean("angle_max")), digits=3),
            number(each.mean("objective_gap")),
            number(each.mean("not_converged")),
        )
        for each in found
    )
    return Section("Configurations", "Means over seeds; angle and gap are medians over layers.", None, header, rows)


def _differences(found: Sequence[Configuration], baseline: str) -> Section | None:
    rows = tuple(
        (
            each.label,
            each.measure,
            number(each.mean, digits=4),
            number(each.other, digits=4),
            _signed(each.interval.mean),
            f"[{_signed(each.interval.low)}, {_signed(each.interval.high)}]" if each.interval.count > 1 else "–",
            str(each.interval.count),
        )
        for each in comparison.differences(found, baseline)
    )
    if not rows:
        return None
    text = (
        f"Each configuration minus {baseline} of the same rank, seed by seed; negative is better. Intervals are "
        "t-intervals of the mean difference, and take at least two seeds. Losses are held-out, after the last step; "
        "the best learning rate is each one's own. Seeds that diverged are left out of the pairs."
    )
    header = ("configuration", "measure", "mean", baseline, "difference", "95 % interval", "seeds")
    return Section(f"Paired differences against {baseline}", text, None, header, rows, frozenset({0, 1}))


def _failures(failed: Sequence[Record]) -> Section:
    if not failed:
        return Section("What failed", "Nothing failed.")
    rows = tuple(
        (
            record["cell"],
            str(record["baseline"] or f"{record['estimator']}, {record['solver']}"),
            str(record["rank"]),
            str(record["seed"]),
            str(record["error"]),
        )
        for record in failed
    )
    return Section("What failed", "", None, ("cell", "what", "rank", "seed", "error"), rows, frozenset({0, 1, 4}))


def _signed(value: float) -> str:
    text = number(value, digits=3)
    return f"+{text}" if value > 0 else text


def _markdown(title: str, parts: Sequence[Section]) -> str:
    lines = [f"# {title}"]
    for part in parts:
        lines += ["", f"## {part.title}"]
        if part.text:
            lines += ["", part.text]
        if part.picture is not None:
            lines += ["", f"![{part.title}]({part.picture[0]})"]
        if part.header:
            rules = ["---" if place in part.prose else "---:" for place in range(len(part.header))]
            lines += ["", *(_row(row) for row in (part.header, rules, *part.rows))]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _html(title: str, parts: Sequence[Section]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for part in parts:
        body.append(f"<h2>{html.escape(part.title)}</h2>")
        if part.text:
            body.append(f"<p>{html.escape(part.text)}</p>")
        if part.picture is not None:
            data = base64.b64encode(part.picture[1]).decode()
            body.append(f'<img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}">')
        if part.header:
            rows = "\n".join(_html_row(row, "td", part.prose) for row in part.rows)
            head = _html_row(part.header, "th", part.prose)
            body.append(f'<div class="wide"><table><thead>{head}</thead><tbody>\n{rows}\n</tbody></table></div>')
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html_row(cells: Sequence[str], tag: str, prose: frozenset[int]) -> str:
    made = [
        f"<{tag}{' class=' + chr(34) + 'text' + chr(34) if place in prose else ''}>{html.escape(cell)}</{tag}>"
        for place, cell in enumerate(cells)
    ]
    return f"<tr>{''.join(made)}</tr>"
