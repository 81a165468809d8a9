"""docs/components.md: every installed component has its table, with the defaults and bytes that the code states."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lora_da_core.registry import Registry
from lora_da_core.types import LayerSpec

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "components.md").read_text()
HEADINGS = {
    "Fisher estimators": "estimator",
    "Gradient estimators": "gradient",
    "Solvers": "solver",
    "Objectives": "objective",
    "Rank allocators": "allocator",
}
ROWS = ("Assumes", "Formula", "Source", "Options", "Bytes", "Passes", "Flops", "Choose it")
SHAPES = ((576, 576), (1536, 576))
SAMPLES, TOKENS, ITEMSIZE = 256, 256 * 170, 4
REGISTRY = Registry()


def tables() -> dict[tuple[str, str], dict[str, str]]:
    """Rows by (kind, name)."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        kind = HEADINGS[part.splitlines()[0]]
        for section in re.split(r"^### ", part, flags=re.MULTILINE)[1:]:
            lines = [line.strip("| ").split(" | ", 1) for line in section.splitlines() if line.startswith("| ")]
            found[kind, section.splitlines()[0]] = {row[0]: row[1] for row in lines if len(row) == 2}
    return found


TABLES = tables()
COMPONENTS = {
    (kind, name): component
    for kind in HEADINGS.values()
    for name, component in REGISTRY.names(kind).items()
    if REGISTRY.origin(kind, component).startswith("lora-da-core ")
}


def test_every_component_has_one_table_and_every_table_a_component() -> None:
    assert set(TABLES) == set(COMPONENTS)
    headings = re.findall(r"^### .*$", TEXT, flags=re.MULTILINE)
    assert len(headings) == len(TABLES)


@pytest.mark.parametrize("key", sorted(COMPONENTS), ids="-".join)
def test_a_table_has_every_row_and_every_default(key: tuple[str, str]) -> None:
    rows = TABLES[key]
    assert [row for row in rows if "," not in row] == list(ROWS)
    defaults = asdict(COMPONENTS[key].Options())
    stated = re.findall(r"`(\w+)=([^`]*)`", rows["Options"])
    assert stated == [(name, str(value)) for name, value in defaults.items()]
    if not defaults:
        assert rows["Options"] == "none"


def figures(key: tuple[str, str], options: dict[str, Any]) -> str:
    """The bytes of both shapes as the document writes them."""
    component = COMPONENTS[key](COMPONENTS[key].Options(**options))
    parts = []
    for out_features, in_features in SHAPES:
        spec = LayerSpec("layer", "linear", in_features, out_features, rank=8, scaling=1.0)
        if key[0] == "estimator":
            sizes = component.statistics_bytes(spec, samples=SAMPLES, tokens=TOKENS, itemsize=ITEMSIZE)
        else:
            sizes = (component.statistics_bytes(spec, itemsize=ITEMSIZE),)
        parts.append(f"{out_features}×{in_features}: {' + '.join(f'{size:,}' for size in sizes)}")
    return "; ".join(parts)


BYTE_ROWS = [
    (key, row)
    for key, rows in sorted(TABLES.items())
    if key[0] in ("estimator", "gradient")
    for row in rows
    if row.startswith("Bytes")
]


@pytest.mark.parametrize(
    ("key", "row"), BYTE_ROWS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_bytes_are_the_code_s_own(key: tuple[str, str], row: str) -> None:
    options = dict(part.strip().split("=") for part in row.split(",")[1:])
    typed = {name: int(value) if value.isdigit() else value for name, value in options.items()}
    assert TABLES[key][row] == figures(key, typed)


def test_the_stated_data_is_the_data_of_the_figures() -> None:
    flat = " ".join(TEXT.split())
    assert "m×k = 576×576 and 1536×576, 256 samples of 170 tokens" in flat
    assert len(BYTE_ROWS) >= len([key for key in COMPONENTS if key[0] in ("estimator", "gradient")])
