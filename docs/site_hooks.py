"""What the site needs beside its pages: files of the repository, the command line's own help, formulas as MathML."""

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
    """Turns formulas into MathML, which browsers draw without any program or font from elsewhere."""
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    formula = convert(html.unescape(match[3]).strip(), display=display)
    return f'<div class="formula">{formula}</div>' if display == "block" else formula
