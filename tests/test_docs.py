"""The page on plugins: its code runs, its hooks are those of the specification."""

from __future__ import annotations

import inspect
import re
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_da_core import hookspecs
from lora_da_core.testing import estimator_checks

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "plugins.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's Python blocks define, run in order as one module."""
    module = types.ModuleType("page_on_plugins")
    import sys

    sys.modules[module.__name__] = module  # dataclasses look their module up
    with torch.random.fork_rng(devices=[]):
        for number, block in enumerate(blocks("python")):
            exec(compile(block, f"docs/plugins.md, block {number}", "exec"), module.__dict__)
    return vars(module)


def test_every_block_runs(page: dict[str, Any]) -> None:
    assert len(blocks("python")) >= 8
    assert page["lora_da_fisher_estimators"]() == [page["InputScale"]]
    assert page["lora_da_solvers"]() == [page["Exact"]]


def test_the_estimator_passes_with_other_options(page: dict[str, Any]) -> None:
    checks = dict(estimator_checks(page["InputScale"], options={"power": 1.0}))
    assert len(checks) > 20
    for check in checks.values():
        check()


def test_the_estimator_is_what_the_text_says(page: dict[str, Any]) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    fisher = page["fisher_from_tensors"](
        page["InputScale"], x, torch.ones(2, 3), torch.arange(2), damping=1.0, damping_kind="absolute"
    )
    assert fisher.apply(torch.ones(3, 2))[0].tolist() == [6.0, 3.0]
    assert fisher.inverse_input_trace().diagonal().tolist() == [0.5, 1.0]


def test_the_project_file_names_the_module() -> None:
    (text,) = blocks("toml")
    project = tomllib.loads(text)["project"]
    assert project["entry-points"] == {hookspecs.PROJECT: {"input_scale": "acme_input_scale"}}
    assert "`acme_input_scale.py`" in PAGE


def hooks() -> dict[str, str]:
    """Every hook and its signature, as it stands in the source."""
    found = {}
    for name, function in vars(hookspecs).items():
        if hasattr(function, f"{hookspecs.PROJECT}_spec"):
            found[name] = f"{name}{inspect.signature(function)}".replace("'", "")
    return found


def test_every_hook_is_in_the_table_with_its_signature() -> None:
    assert len(hooks()) >= 7
    rows = [line.replace("\\|", "|") for line in PAGE.splitlines() if line.startswith("| `lora_da_")]
    listed = {match[1]: match[0] for row in rows if (match := re.search(r"(lora_da_\w+)\([^`]*", row))}
    assert listed == hooks()


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert targets
    assert [target for target in targets if not (Path(__file__).parents[1] / "docs" / target).exists()] == []
