"""The parts of a report, as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, NamedTuple

from lora_da_core.ablation.figures import Picture

PICTURES: Final = "pictures"
"""Directory of the pictures that the Markdown report shows, beside it."""

_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser fetches nothing, whatever a name in a table says."""

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5f66; --paper: #fff; --line: #ddd; --rule: #888;
  --better: #0b6b34; --worse: #a61b1b }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 80rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin-top: 2.4rem }
p { max-width: 62rem } code, pre { font-family: ui-monospace, monospace; font-size: .85rem }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1.2rem; margin: 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }
.pictures img { width: 100%; max-width: 40rem; height: auto; align-self: start }
.wide { overflow-x: auto; margin-top: 1rem; background: linear-gradient(to left, var(--paper) 30%, transparent)
  right / 3rem 100% no-repeat local, linear-gradient(to left, #8886, transparent) right / 1rem 100% no-repeat scroll }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; line-height: 20px;
  font-variant-numeric: tabular-nums }
th, td { padding: 4px 11px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { vertical-align: bottom } thead tr:last-child th, th[rowspan] { border-bottom: 2px solid var(--rule) }
th[colspan] { text-align: left; border-bottom: 1px solid var(--rule) } tbody tr:hover td { background: #8882 }
td.text, th.text { text-align: left } td.prose { text-align: left; white-space: normal; min-width: 22rem }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); padding-left: 0 }
thead tr:not(:first-child) th:first-child { position: static; padding-left: .7rem }
.better { color: var(--better); font-weight: 600 } .worse { color: var(--worse); font-weight: 600 }
pre { overflow-x: auto; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 4px }
summary { cursor: pointer }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a3a6ad; --paper: #171717; --line: #38393c; --rule: #777; --better: #6fd093;
    --worse: #ff8f85 }
  .pictures img { filter: invert(.91) hue-rotate(180deg) }
}
@media (max-width: 40rem) {
  dl { grid-template-columns: minmax(0, 1fr); gap: 0 } dd { margin-bottom: .5rem }
  th:first-child, td:first-child { min-width: 168px; max-width: 45vw; white-space: normal; overflow-wrap: anywhere }
}
@media print { .wide { overflow: visible } }
"""


class Cell(NamedTuple):
    """A table's cell.

    Attributes:
        text: What it says.
        tone: `better`, `worse`, or nothing: how the page colours it.
    """

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """A table's column.

    Attributes:
        title: Its head.
        group: What it has in common with its neighbours, above their heads.
        kind: `number`, `text`, or `prose` that is broken into lines.
    """

    title: str
    group: str = ""
    kind: str = "number"


@dataclass(frozen=True)
class Table:
    """Columns and rows."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Section:
    """One part of a report: whatever it has of these, in this order.

    Attributes:
        title: Its heading.
        text: Sentences.
        facts: Names and what they are.
        pictures: Pictures.
        table: A table.
        code: Text that is shown as it is, folded on the page: its summary and itself.
    """

    title: str
    text: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None
    code: tuple[str, str] | None = None


def markdown(title: str, parts: Sequence[Section]) -> str:
    """The report as Markdown; pictures are in the directory `PICTURES` beside it.

    Args:
        title: Of the whole.
        parts: Its parts.

    Returns:
        The text.
    """
    lines = [f"# {_plain(title)}"]
    for part in parts:
        lines += ["", f"## {_plain(part.title)}"]
        if part.text:
            lines += ["", _plain(part.text)]
        if part.facts:
            lines += ["", *(f"- **{name}**: {_plain(value)}" for name, value in part.facts)]
        for picture in part.pictures:
            lines += ["", f"![{picture.title}]({PICTURES}/{picture.name}.png)"]
        if part.table is not None:
            titles = [
                f"{column.group}, {column.title}" if column.group else column.title for column in part.table.columns
            ]
            rules = ["---:" if column.kind == "number" else "---" for column in part.table.columns]
            rows = [[cell.text for cell in row] for row in part.table.rows]
            lines += ["", *(_row(row) for row in (titles, rules, *rows))]
        if part.code is not None:
            lines += ["", f"{_plain(part.code[0])}:", "", "```toml", part.code[1].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _plain(text: str) -> str:
    """Text that no Markdown reader takes for a tag."""
    return text.replace("<", "\\<")


def page(title: str, parts: Sequence[Section]) -> str:
    """The report as an HTML page that holds its pictures and asks for no other file.

    Args:
        title: Of the whole.
        parts: Its parts.

    Returns:
        The page.
    """
    body = [f"<h1>{html.escape(title)}</h1>", *(_section(part) for part in parts)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _section(part: Section) -> str:
    lines = [f"<h2>{html.escape(part.title)}</h2>"]
    if part.text:
        lines.append(f"<p>{html.escape(part.text)}</p>")
    if part.facts:
        facts = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in part.facts)
        lines.append("<dl>\n" + "\n".join(facts) + "\n</dl>")
    if part.pictures:
        lines.append('<div class="pictures">\n' + "\n".join(map(_image, part.pictures)) + "\n</div>")
    if part.table is not None:
        table = f"<table>\n{_head(part.table.columns)}\n{_body(part.table)}\n</table>"
        lines.append(
            f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(part.title)}">{table}</div>'
        )
    if part.code is not None:
        summary, code = map(html.escape, part.code)
        lines.append(f"<details><summary>{summary}</summary>\n<pre><code>{code}</code></pre></details>")
    return "\n".join(lines)


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{data}">'


def _head(columns: Sequence[Column]) -> str:
    if not any(column.group for column in columns):
        return f"<thead><tr>{''.join(_heading(column) for column in columns)}</tr></thead>"
    upper = []
    for group, alike in groupby(columns, key=lambda column: column.group):
        members = list(alike)
        if group:
            upper.append(f'<th colspan="{len(members)}">{html.escape(group)}</th>')
        else:
            upper += [_heading(column, ' rowspan="2"') for column in members]
    lower = [_heading(column) for column in columns if column.group]
    return f"<thead><tr>{''.join(upper)}</tr>\n<tr>{''.join(lower)}</tr></thead>"


def _heading(column: Column, more: str = "") -> str:
    kind = "" if column.kind == "number" else ' class="text"'
    return f"<th{kind}{more}>{html.escape(column.title)}</th>"


def _body(table: Table) -> str:
    rows = ("".join(map(_cell, row, table.columns)) for row in table.rows)
    return "<tbody>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</tbody>"


def _cell(cell: Cell, column: Column) -> str:
    kinds = [kind for kind in ("" if column.kind == "number" else column.kind, cell.tone) if kind]
    return f"<td{f' class={chr(34)}{chr(32).join(kinds)}{chr(34)}' if kinds else ''}>{html.escape(cell.text)}</td>"
