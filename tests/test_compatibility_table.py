"""docs/compatibility.md holds the table that its rows make, and every row is shown by tests that are there."""

from __future__ import annotations

import importlib
import itertools
import re
from collections import Counter
from typing import Any

import pytest

from compatibility_table import AREAS, PAGE, Outcomes, Row, expected, functions, rows, shown_by, table, verdicts


def test_the_page_holds_this_table() -> None:
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), PAGE.read_text().splitlines())
    found = "\n".join(itertools.takewhile(lambda line: line.startswith("|"), lines))
    assert found == table(expected()), "make compatibility writes docs/compatibility.md"
    assert re.search(r"^Written by `make compatibility` on .*\d tests passed, 0 failed[^.]*\.$", PAGE.read_text(), re.M)


def test_subjects_are_told_apart() -> None:
    assert [what for what, count in Counter(row.what for row in rows()).items() if count > 1] == []
    assert all(row.tests for row in rows()) and len(AREAS) == 8


@pytest.mark.parametrize("named", sorted({test.partition("[")[0] for row in rows() for test in row.tests}))
def test_what_shows_a_row_is_a_test(named: str) -> None:
    module, *path = named.split("::")
    found: Any = importlib.import_module(module)
    for part in path:
        found = getattr(found, part)
    assert callable(found) and path[-1].startswith("test_")


def test_results_decide_what_is_said() -> None:
    one, all_cases = Row("`a`", "", ("test_x::test_y[`a`]",)), Row("b", "", ("test_x::test_y", "test_x::test_z"))
    outcomes = Outcomes()
    assert outcomes.verdict(one) == "**fails**", "a test that did not run shows nothing"
    outcomes.found = {"test_x::test_y[`a`]": "passed", "test_x::test_y[c]": "failed", "test_x::test_z": "passed"}
    assert outcomes.verdict(one) == "works" and outcomes.verdict(all_cases) == "**fails**"
    outcomes.found["test_x::test_y[c]"] = "skipped"
    assert outcomes.verdict(all_cases) == "works"
    outcomes.found["test_x::test_y[`a`]"] = "skipped"
    assert outcomes.verdict(one) == "not tried"
    assert shown_by(one) == "`test_x::test_y`"


def test_some_modules_alone_leave_the_other_rows_as_they_stand() -> None:
    outcomes = Outcomes()
    page = "| FSDP2 | **fails** | | |\n| Gemma | works | | |\n| Phi | **fails** | | |\n"
    assert len(functions(["test_sharded"])) == 2 < len(functions()) == len(set(functions()))
    outcomes.found = {
        "test_sharded::test_a_sharded_model_gives_what_the_whole_one_gives[2-kfac]": "passed",
        "test_sharded::test_adapters_of_sharded_models_are_written": "passed",
    }
    found = verdicts(outcomes, ["test_sharded"], page)
    assert (found["FSDP2"], found["Gemma"], found["Phi"]) == ("works", "works", "**fails**")
