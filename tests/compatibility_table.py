"""Writes the table of docs/compatibility.md from the results of the tests that it names: `make compatibility`.

`make compatibility ONLY=test_sharded` runs the tests of some modules again; rows that others show as well, or alone,
keep what stands in the page. It is no script, since processes that tests start would import a script again.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from compatibility_rows import AFTER, BEFORE, Row
from test_compatibility import REFUSALS, SITUATIONS, WORKS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
OPTIONS = "PEFT's options"


def of_options() -> Iterable[Row]:
    """PEFT's options and situations, each a case of a test or a test of its own."""
    for works in WORKS:
        yield Row(works.options, works.note, (f"test_compatibility::test_a_row_that_works[{works.options}]",))
    for name, (verdict, note, *tests) in SITUATIONS.items():
        shown_by = (test if "::" in test else f"test_compatibility::{test}" for test in tests)
        yield Row(name, note, tuple(shown_by), verdict)
    for refused in REFUSALS:
        test = f"test_compatibility::test_a_row_that_is_refused[{refused.options}]"
        yield Row(refused.options, refused.note, (test,), "refused")


AREAS: Mapping[str, list[Row]] = {**BEFORE, OPTIONS: list(of_options()), **AFTER}


def rows() -> list[Row]:
    """All rows of all areas."""
    return [row for area in AREAS.values() for row in area]


class Outcomes:
    """A plugin of pytest that keeps what came of each test, by `module::name[case]`."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.skipped: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = Path(report.nodeid.partition("::")[0]).stem + "::" + report.nodeid.partition("::")[2]
        if report.when == "call" or report.outcome != "passed":
            self.found[name] = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def verdict(self, row: Row) -> str:
        """The row's own verdict if its tests passed; that it fails, or that nothing was tried."""
        outcomes = [outcome for test in row.tests for outcome in self.of(test)]
        if any(outcome == "failed" for outcome in outcomes) or not all(self.of(test) for test in row.tests):
            return "**fails**"
        return row.verdict if "passed" in outcomes else "not tried"

    def of(self, test: str) -> list[str]:
        """What came of a test: of all its cases, or of the one that is named."""
        # As pytest writes an identifier.
        named = test.encode("unicode_escape").decode()
        return [
            outcome
            for name, outcome in self.found.items()
            if name == named or (not test.endswith("]") and name.startswith(f"{named}["))
        ]


def shown_by(row: Row) -> str:
    """The tests' names, without a case that is the row itself."""
    return ", ".join(f"`{test.removesuffix(f'[{row.what}]')}`" for test in row.tests)


def table(verdicts: Mapping[str, str]) -> str:
    """The table, with verdicts by row."""
    lines = ["| what | here | remarks | shown by |", "|---|---|---|---|"]
    for area, listed in AREAS.items():
        lines.append(f"| **{area}** | | | |")
        lines += [f"| {row.what} | {verdicts[row.what]} | {row.remark} | {shown_by(row)} |" for row in listed]
    return "\n".join(lines)


def expected() -> dict[str, str]:
    """The verdicts if every test passes."""
    return {row.what: row.verdict for row in rows()}


def functions(modules: Collection[str] = ()) -> list[str]:
    """Every function that shows something, or those of some modules, as pytest is told to run it."""
    names = sorted({test.partition("[")[0] for row in rows() for test in row.tests})
    chosen = [name for name in names if not modules or name.partition("::")[0] in modules]
    return [f"{PAGE.parents[1]}/tests/{name.replace('::', '.py::', 1)}" for name in chosen]


def verdicts(outcomes: Outcomes, modules: Collection[str], page: str) -> dict[str, str]:
    """What is said of each row: what came of its tests, or what the page says where some were not run again."""
    said = dict(re.findall(r"^\| (.*?) \| (.*?) \|", page, re.MULTILINE))
    run = {row.what: all(test.partition("::")[0] in modules for test in row.tests) for row in rows()}
    return {
        row.what: outcomes.verdict(row) if not modules or run[row.what] else said.get(row.what, "not tried")
        for row in rows()
    }


def main(modules: Collection[str]) -> int:
    """Runs the tests and writes the table; the status is pytest's."""
    outcomes, page = Outcomes(), PAGE.read_text()
    status = int(pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *functions(modules)], plugins=[outcomes]))
    text = table(verdicts(outcomes, modules, page))
    counts = Counter(outcomes.found.values())
    skipped = "".join(f"; {count} skipped: {reason}" for reason, count in outcomes.skipped.items())
    came = f"{counts['passed']} tests passed, {counts['failed']} failed{skipped}."
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    written = f"Written by `make compatibility` on {datetime.date.today()}, {versions}: {came}"
    again = f" Then of {', '.join(modules)} alone: {came}"
    page = re.sub(r"^Written by .*?$", lambda old: old[0] + again if modules else written, page, flags=re.MULTILINE)
    page = re.sub(r"(^\|.*\n)+", lambda _: f"{text}\n", page, count=1, flags=re.MULTILINE)
    PAGE.write_text(page)
    return status
