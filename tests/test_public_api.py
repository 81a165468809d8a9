"""The public API does not change unnoticed: what differs from the written list stands in the changelog."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import lora_da_core
from public_api import RELEASED, lines, name_of

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def sections() -> dict[str, str]:
    """The changelog's text by version, newest first."""
    parts = re.split(r"^## (.+)$", CHANGELOG, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def unnamed(before: list[str], now: list[str], entry: str) -> list[str]:
    """Lines that came, went or changed and whose name the entry does not have as a word."""
    words = set(re.findall(r"--[\w-]+|\w+", entry))
    return [line for line in sorted({*before} ^ {*now}) if name_of(line) not in words]


def test_what_changed_stands_in_the_changelog() -> None:
    before = RELEASED.read_text(encoding="utf-8").splitlines()
    missing = unnamed(before, lines(), sections()["Unreleased"])
    assert missing == [], (
        "the public API differs from tests/public_api.txt in these lines; name what changed under Unreleased in "
        f"CHANGELOG.md: {missing}"
    )


def test_a_change_is_noticed() -> None:
    before = ["class a.Old()", "a.f(x)", "lora-da init --rank", "solver eigh()"]
    now = ["a.f(x, y)", "lora-da init --rank", "lora-da init --ranks", "a.T.same: int", "solver eigh(size)"]
    entry = "- `Old` is gone; `--ranks` is new; solver eigh takes `size`."
    assert unnamed(before, now, entry) == ["a.T.same: int", "a.f(x)", "a.f(x, y)"]
    assert unnamed(before, now, entry + " `f` takes y; `T.same`.") == []
    assert unnamed(before, before, "") == []


def test_the_list_has_all_kinds_of_names() -> None:
    found = lines()
    for name in lora_da_core.__all__:
        assert any(re.match(rf"(class )?lora_da_core\.{name}\b", line) for line in found), name
    for line in (
        "lora-da ablate --dry-run",
        "estimator kfac(output, labels)",
        "preset robust()",
        "class lora_da_core.interfaces.Solver(Component)",
        "lora_da_core.LoraDAConfig.beta: float = 0.03",
        "lora_da_core.Pipeline.fishers",
    ):
        assert any(entry.startswith(line) for entry in found), line


def test_the_changelog_keeps_its_form() -> None:
    found = sections()
    newest, *released = found
    assert newest == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", title) for title in released)
    for title, text in found.items():
        assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= KINDS, title


def test_the_version_stands_in_one_place() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version("lora-da-core") == declared
    released = [tuple(map(int, title.split(" ")[0].split("."))) for title in sections() if title != "Unreleased"]
    assert released == sorted(released, reverse=True)
    assert all(one <= tuple(map(int, declared.split("."))) for one in released)
    sources = [*ROOT.glob("lora_da_core/**/*.py"), *ROOT.glob("plugins/**/*.py")]
    assert [path.name for path in sources if f'"{declared}"' in path.read_text(encoding="utf-8")] == []
