"""What the site needs beside its pages: files of the repository, the command line's help, formulas, cells with room."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import typer
import typer.cli
from latex2mathml.converter import convert

from lora_da_core.cli import app

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages that are files of the repository's root."""
CLI_PAGE = "reference/cli.md"
CLI_MARK = "<!-- the program's own help -->"
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./(?:examples|benchmarks|tests)[^)]*\)")
_SHORT_LIST = re.compile(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_CODE = re.compile(r"(<pre.*?</pre>|<code>.*?</code>)", re.DOTALL)
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_CELL = re.compile(r"<td>(.*?)</td>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_NAME = re.compile(r"\w+\.py::\w+")
# An index is a group, one of the few signs that formulas have there, or at most two letters.
_INDEX = re.compile(r"(?<![A-Za-z_])(in|out|cost|label|[^\W\d_])_(\{[^{}]*\}|&lt;t|≤t|o·|[A-Za-zλ]{1,2}(?![A-Za-z_]))")
PROSE = 40
"""Characters of a cell that is read as text, not as an entry."""


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fills the pages that are made, and shows what links lead to outside of the site by its path."""
    name = page.file.src_uri
    if name in ABOVE:
        text = (ROOT / ABOVE[name]).read_text(encoding="utf-8")
        return text.replace("](docs/", "](").replace("](CHANGELOG.md", "](changelog.md")
    if name == CLI_PAGE:
        if CLI_MARK not in markdown:
            raise ValueError(f"{CLI_PAGE} does not hold {CLI_MARK!r}, so the commands have no place.")
        return markdown.replace(CLI_MARK, commands())
    # A half-width stays with its sign where a narrow cell wraps.
    return _OUTSIDE.sub(r"`\1`", markdown).replace("± ", "±\N{NO-BREAK SPACE}")


def commands() -> str:
    """Every command with its options, as Markdown: headings of the second level and below.

    The list of commands is left out: it cuts their descriptions short, which the headings below it give in full.
    """
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="lora-da")
    text = typer.cli.get_docs_for_click(obj=group, ctx=context, name="lora-da", indent=1)
    return _SHORT_LIST.sub("", text).replace("```console\n$ ", "```text\n")


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into MathML, which browsers draw with what they have; sets cells and code."""
    content = _FORMULA.sub(_mathml, content)
    parts = _CODE.split(content)
    parts = [_set_code(part) if place % 2 else _set_indices(part) for place, part in enumerate(parts)]
    return _CELL.sub(_set_cell, "".join(parts))


def _set_code(code: str) -> str:
    """An option keeps its dashes; in blocks no line is broken anyway."""
    return code if code.startswith("<pre") else _OPTION.sub(r'<span class="whole">\g<0></span>', code)


def _set_indices(text: str) -> str:
    """Writes `G_n` with the index below the line, outside of tags."""
    return "".join(part if part.startswith("<") else _INDEX.sub(_index, part) for part in re.split(r"(<[^>]+>)", text))


def _index(match: re.Match[str]) -> str:
    return f"{match[1]}<sub>{_INDEX.sub(_index, match[2].strip('{}'))}</sub>"


def _set_cell(match: re.Match[str]) -> str:
    """Gives text and tests' names room; the names may wrap."""
    cell = match[1]
    if _NAME.search(cell):
        named = _NAME.sub(lambda name: re.sub(r"(::|(?<=[a-z])_)", r"\1<wbr>", name[0]), cell)
        return f'<td class="names">{named}</td>'
    return f'<td class="prose">{cell}</td>' if len(_TAG.sub("", cell)) > PROSE else match[0]


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    formula = convert(html.unescape(match[3]).strip(), display=display)
    return f'<div class="formula">{formula}</div>' if display == "block" else formula
