"""Every page: its Python runs, its commands work, its links lead somewhere, and the site builds."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from lora_da_core.ablation import read_grid
from lora_da_core.cli import app
from page_blocks import PAGES, ROOT, Block, Desk, blocks

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUN_BY_ANOTHER = "docs/plugins.md"
"""Its Python is one module, which tests/test_docs.py runs and checks."""
PYTHON_PAGES = [page for page in PAGES if page != RUN_BY_ANOTHER and any(blocks(page, "python"))]
COMMANDS = [
    pytest.param(block, line.strip(), id=f"{block.page}:{block.line + number}")
    for page in PAGES
    for block in blocks(page, "bash")
    for number, line in enumerate(block.text.splitlines())
    if line.strip()
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    before = Path.cwd()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        os.chdir(folder)
        try:
            yield Desk(folder, world)
        finally:
            os.chdir(before)


def test_every_block_says_what_it_is() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert len(found) >= 40
    assert [block for block in found if block.language not in ("python", "bash", "toml", "text")] == []
    fences = sum(path.read_text().count("```") for path in PAGES.values())
    assert fences == 2 * len(found)


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_runs(page: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "docs/index.md":  # its second part trains what its first has written
        command(desk, "lora-da init --model dense --data train.jsonl --output runs/init --samples 16")
    module = types.ModuleType(f"page_{re.sub(r'[^a-z]', '_', page)}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(desk.given())
    module.__dict__.update(GIVEN.get(page, lambda _: {})(desk))
    for block in blocks(page, "python"):
        source = "\n" * (block.line - 1) + desk.placed(block.text)
        exec(compile(source, str(PAGES[page]), "exec"), module.__dict__)


GRIDS = [(page, block.text) for page in PAGES if page != RUN_BY_ANOTHER for block in blocks(page, "toml")]


@pytest.mark.parametrize(("page", "text"), GRIDS)
def test_a_grid_is_one_that_runs(page: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(text)
    axes = tomllib.loads(text)["grid"]
    assert len(read_grid(tmp_path / "grid.toml").cells) == math.prod(map(len, axes.values())) > 1


def test_programs_and_files_that_the_text_names_are_there() -> None:
    texts = "".join(path.read_text() for path in PAGES.values())
    modules = set(re.findall(r"python -m (benchmarks\.\w+)", texts))
    files = set(re.findall(r"(?<![\w/.-])(?:benchmarks|examples|tests|docs|\.ci)/[\w/.-]*\w", texts))
    assert len(modules) > 10 and len(files) > 20
    assert [name for name in sorted(modules) if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


def third_party(desk: Desk) -> dict[str, Any]:
    """A stand-in for the distribution that its own tests install: a page about it, with K-FAC's own option."""
    import lora_da_core

    def build_pipeline(estimator: tuple[str, dict[str, Any]]) -> Any:
        assert estimator == ("head_blocks", {"blocks": 12})
        return lora_da_core.build_pipeline(estimator="kfac")

    return {"lora_da_core": types.SimpleNamespace(build_pipeline=build_pipeline)}


def related_work(desk: Desk) -> dict[str, Any]:
    """A directory with an adapter and the frozen one that takes its start out."""
    from peft import PeftModel

    import lora_da_core

    pipeline = lora_da_core.build_pipeline(
        preset="lora_ga", config=lora_da_core.LoraDAConfig(
            beta=0.0, pairing="right_first", scale="stable", offset="frozen_adapter"
        )
    )  # fmt: skip
    given = desk.given()
    directory = desk.folder / "offset"
    lora_da_core.get_lora_da_model(given["model"], given["lora"], given["batches"], pipeline=pipeline).save_pretrained(
        directory
    )
    return {"directory": directory, "PeftModel": PeftModel, "loss": torch.zeros(())}


def preferences(desk: Desk) -> dict[str, Any]:
    """Two pairs as TRL's collator lays them out."""
    ids = torch.randint(7, 40, (4, 6))
    mask = torch.ones_like(ids)
    completion = mask.clone()
    completion[:, :3] = 0
    return {"collated": [{"input_ids": ids, "attention_mask": mask, "completion_mask": completion}]}


GIVEN = {
    "docs/howto/preferences.md": preferences,
    "docs/related-work.md": related_work,
    "examples/third_party_plugin/README.md": third_party,
}


def command(desk: Desk, line: str, *, run: bool = True) -> None:
    """Runs a command of `lora-da`; where what it needs is not here, or not wanted, it must know the options."""
    words = shlex.split(desk.placed(line), comments=True)
    environment = [word for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
    words = words[len(environment) :]
    assert words[0] == "lora-da", line
    arguments = [word for word in words[1:] if word not in ("...", "…")]
    there = not {"ray", "head_blocks", "input_scale", "model.gguf"} & {*arguments} and len(arguments) == len(words) - 1
    if there and run:
        if arguments[0] == "init":
            arguments.append("--overwrite")  # pages use the same folder
        outcome = CliRunner(env={"NO_COLOR": "1"}).invoke(app, arguments)
        assert outcome.exit_code == 0, f"{line}\n{outcome.output}"
        return
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    known = {option for parameter in group.commands[name].params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known, line


@pytest.mark.parametrize(("block", "line"), COMMANDS)
def test_a_command_is_one_that_works(block: Block, line: str, desk: Desk) -> None:
    words = shlex.split(line, comments=True)
    if "lora-da" in words:
        command(desk, line)
        return
    match words:
        case ["torchrun" | "accelerate", *_]:
            command(desk, shlex.join(["lora-da", *words[words.index("lora_da_core.cli") + 1 :]]), run=False)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None
        case ["make", *targets]:
            assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
        case ["pip", "install", "."]:
            folder = PAGES[block.page].parent
            assert ((ROOT if folder == ROOT / "docs" else folder) / "pyproject.toml").is_file()
        case ["pip", "install", name]:
            base, _, extra = name.partition("[")
            assert base == PROJECT["name"] and (not extra or extra.rstrip("]") in PROJECT["optional-dependencies"])
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case _:
            pytest.fail(f"{block.page}: nothing checks {line!r}")


def anchors(path: Path) -> set[str]:
    """What a heading's link ends in."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = PAGES[page]
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        goal = path if not name else (path.parent / name)
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            wrong.append(target)
    assert wrong == []


FAMILIES = ("cli", "adapter", "memory", "testing")
"""Rooms whose parts, `cli_options` and the like, the page names together with them."""


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    rooms = {path.stem for path in (ROOT / "lora_da_core").glob("[!_]*") if path.suffix in ("", ".py")}
    assert sorted(room for room in rooms - named if room.partition("_")[0] not in FAMILIES) == []
    assert all(f"`{family}` and its parts" in page for family in FAMILIES)


PUBLIC_MODULES = {"ablation", "data", "errors", "interfaces", "memory", "models", "operators", "testing", "types"}
"""What docs/stability.md lets a user import beside the names of `lora_da_core` itself."""


def test_pages_and_examples_use_what_is_public() -> None:
    import lora_da_core

    public = PUBLIC_MODULES | set(lora_da_core.__all__)
    sources = {block.page: block.text for page in PAGES for block in blocks(page, "python")}
    sources |= {str(path.relative_to(ROOT)): path.read_text() for path in ROOT.glob("examples/**/*.py")}
    taken = {
        (name, module or imported.strip())
        for name, text in sources.items()
        for module, names in re.findall(r"^ *from lora_da_core(?:\.(\w+))? import \(?([\w, ]+)", text, re.MULTILINE)
        for imported in names.split(",")
    }
    assert len(taken) > 20
    assert sorted((name, one) for name, one in taken if one and one not in public) == []


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


class Fetches(HTMLParser):
    """Addresses that a browser fetches by itself, and how many formulas there are."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.formulas = 0
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.formulas += tag == "math"
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "modulepreload"):
            self.found.append(given.get("href") or "")


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= 20
    for page in pages:
        assert [one for one in Fetches(page.read_text()).found if "//" in one] == [], page.name
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"url\((?:https?:)?//[^)]*\)|@import", styles) == []


def test_formulas_are_mathml(site: Path) -> None:
    source = (ROOT / "docs" / "theory.md").read_text()
    blocks_, rest = re.subn(r"\$\$.*?\$\$", "", source, flags=re.DOTALL)[::-1]
    inline = len(re.findall(r"\$[^$]+\$", rest))
    page = (site / "theory.html").read_text()
    assert Fetches(page).formulas == inline + blocks_ > 60
    assert "arithmatex" not in page and "\\lambda" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_a_list_is_one_and_not_a_paragraph_of_dashes(site: Path) -> None:
    for page in site.rglob("*.html"):
        paragraphs = re.findall(r"<p>(.*?)</p>", page.read_text(), re.DOTALL)
        assert [one for one in paragraphs if re.search(r"^- ", one, re.MULTILINE)] == [], page.name


def test_indices_are_written_below_the_line(site: Path) -> None:
    page = (site / "components.html").read_text()
    text = re.sub(r"<(pre|code|h\d|nav|script|head)\b.*?</\1>|<[^>]*>", "", page, flags=re.DOTALL)
    assert page.count("<sub>") > 60
    assert re.findall(r"\w+_[\w{<≤]+", text) == []


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    page = (site / "reference" / "cli.html").read_text()
    group: Any = typer.main.get_command(app)
    assert set(group.commands) >= {"init", "plan", "inspect", "verify", "plugins", "ablate"}
    for name, one in group.commands.items():
        assert f"lora-da {name}" in page
        for parameter in one.params:
            assert all(option in page for option in parameter.opts if option.startswith("--")), (name, parameter.name)


def test_the_reference_has_every_public_name(site: Path) -> None:
    import lora_da_core

    page = (site / "reference" / "api.html").read_text() + (site / "reference" / "contracts.html").read_text()
    missing = [
        name for name in lora_da_core.__all__ if not re.search(rf'id="lora_da_core\.(\w+\.)*{name}"', page)
    ]  # fmt: skip
    assert missing == []
