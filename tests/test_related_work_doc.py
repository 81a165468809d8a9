"""docs/related-work.md: what its table names is there."""

from __future__ import annotations

import re
from pathlib import Path

from lora_da_core import hookspecs
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
