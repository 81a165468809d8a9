"""docs/related-work.md: what its table names is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from typer.testing import CliRunner

from lora_da_core import hookspecs
from lora_da_core.ablation import make_grid
from lora_da_core.cli import app
from lora_da_core.registry import HOOK_OF_KIND, Registry

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "related-work.md").read_text()
REGISTRY = Registry()
KINDS = {"gradient": "gradient", "allocator": "allocator", "allocators": "allocator", "regularizer": "regularizer",
         "preset": "preset", "trainer": "trainer", "objective": "objective"}  # fmt: skip


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_every_row_names_a_hook_of_its_kind_and_a_component_that_is_installed() -> None:
    assert len(rows()) >= 15
    for row in rows():
        assert len(row) == 7, row
        hook, here = row[2].strip("`"), row[4]
        assert hasattr(hookspecs, hook)
        kind = KINDS[here.split(" ", 1)[0]]
        assert HOOK_OF_KIND[kind][0] == hook
        name = re.findall(r"`(\w+)`", here)[0]
        assert name in REGISTRY.names(kind), (kind, name)


def test_tests_and_examples_exist() -> None:
    for row in rows():
        (test,) = re.findall(r"`(tests/\w+\.py)`", row[5])
        assert (ROOT / test).is_file()
        for path in re.findall(r"((?:examples|benchmarks)/[\w/]+\.\w+)", row[6]):
            assert (ROOT / path).is_file(), path


def test_every_component_of_the_new_kinds_has_a_row() -> None:
    for kind in ("allocator", "regularizer", "trainer"):
        for name, component in REGISTRY.names(kind).items():
            if REGISTRY.origin(kind, component).startswith("lora-da-core "):
                assert any(f"`{name}`" in row[4] for row in rows()), name
    for preset in REGISTRY.names("preset"):
        assert preset in ("paper", "robust") or any(f"preset `{preset}`" in row[4] for row in rows()), preset


def named() -> dict[str, set[str]]:
    """What the table's rows offer, by kind."""
    found: dict[str, set[str]] = {}
    for row in rows():
        kind, rest = row[4].split(" ", 1)
        known = REGISTRY.names(KINDS[kind])
        found.setdefault(KINDS[kind], set()).update(name for name in re.findall(r"`(\w+)`", rest) if name in known)
    return found


def test_the_command_lists_all_of_it() -> None:
    listed = CliRunner().invoke(app, ["plugins", "--json"])
    assert listed.exit_code == 0
    there = {(each["kind"], each["name"]) for each in json.loads(listed.output) if each["status"] == "ok"}
    assert {(kind, name) for kind, names in named().items() for name in names} <= there


def test_a_grid_takes_all_of_it() -> None:
    """One list for every kind; what the table names is a cell of its own."""
    run = {
        "model": "model", "data": "pairs.jsonl", "source": {"data": "source.jsonl"},
        "finetune": {"steps": 1, "learning_rates": [1e-3], "eval_steps": [1]},
    }  # fmt: skip
    names = named()
    assert set(names) == {"gradient", "objective", "allocator", "preset", "regularizer", "trainer"}
    for kind, listed in names.items():
        cells = make_grid({"run": run, "grid": {kind: sorted(listed)}}).cells
        chosen = [cell.preset if kind == "preset" else getattr(cell, kind)[0] for cell in cells]
        assert chosen == sorted(listed)
        assert len({cell.id for cell in cells}) == len(cells)
