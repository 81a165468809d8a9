"""How values read: numbers and names in few characters, rows as a table of HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

_NUMERIC: Final = "0123456789-–∞"
"""What a number begins with."""


def number(value: float, *, digits: int = 2) -> str:
    """A number in few characters.

    >>> number(0.000312), number(-1.0), number(12345.6), number(float("nan")), number(0.0)
    ('3.1e-4', '-1', '1.2e4', '–', '0')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.{digits - 1}e}"
    if "e" not in text:
        return text
    # Written out where that is no longer: 1.2e+02 is 120.
    if 1e-3 <= abs(value) < 1e4:
        return f"{float(text):.0f}"
    mantissa, exponent = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def abbreviate(names: Sequence[str], width: int) -> list[str]:
    """Module names in at most `width` characters where that keeps them apart.

    Parts that all names share in front are dropped, then parts in the middle; names that would become the
    same are kept in full.

    >>> abbreviate(["model.layers.3.self_attn.q_proj", "model.layers.12.mlp.up_proj"], 16)
    ['3.…q_proj', '12.mlp.up_proj']
    """
    shared = shared_prefix(names)
    short = [_squeeze(name.removeprefix(shared), width) for name in names]
    return [
        text if short.count(text) == 1 else name.removeprefix(shared) for text, name in zip(short, names, strict=True)
    ]


def _squeeze(name: str, width: int) -> str:
    parts = name.split(".")
    if len(name) <= width or len(parts) < 3:
        return name
    head = parts[0]
    for part in parts[1:-2]:
        if len(f"{head}.{part}.…{parts[-1]}") > width:
            break
        head = f"{head}.{part}"
    return f"{head}.…{parts[-1]}"


def shared_prefix(names: Sequence[str]) -> str:
    """The leading parts that all module names share, with the dot after them; empty for fewer than two names."""
    if len(names) < 2:
        return ""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) + "." if shared else ""


def brief(value: Any) -> str:
    """A value of a report on one line: long lists by their length.

    >>> brief({"multiplier": 3.25, "tried": [[1.0, 1.2]] * 9})
    '{multiplier: 3.25, tried: 9 times}'
    """
    if isinstance(value, float):
        return number(value, digits=3)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {brief(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(brief(entry) for entry in value) + "]" if len(value) <= 3 else f"{len(value)} times"
    return str(value)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def same(values: Sequence[str]) -> str:
    """What all values are, or that they vary."""
    return values[0] if len(set(values)) == 1 else "varies"


def html_table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Rows as an HTML table whose first column says what the row is about.

    >>> table = html_table([["a<b", "1"]], ["what", "n"])
    >>> table.count("&lt;"), table.count("text-align: left"), table.count("text-align: right")
    (1, 2, 2)

    Args:
        rows: Cells as text; they are escaped.
        header: Names of the columns; none for rows that speak for themselves.

    Returns:
        The table, in the colours of whatever shows it.
    """
    # Columns of numbers to the right and words to the left, whatever the notebook's own style does to both.
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    words = [
        not header or place == 0 or any(cell[:1] not in _NUMERIC for cell in column)
        for place, column in enumerate(columns)
    ]
    styles = [f' style="text-align: {"left" if each else "right"}"' for each in words]

    def line(cells: Sequence[str], *tags: str) -> str:
        """A row: the first tag is that of its first cell, the last that of the others."""
        shown = zip((tags[0], *[tags[-1]] * (len(cells) - 1)), styles, cells, strict=True)
        return f"<tr>{''.join(f'<{tag}{style}>{html.escape(cell)}</{tag}>' for tag, style, cell in shown)}</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    table = f"<table>{head}{''.join(line(row, 'th', 'td') for row in rows)}</table>"
    # Names of layers are long, and a notebook may be narrow.
    return f'<div style="overflow-x: auto">{table}</div>'
