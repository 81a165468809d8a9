"""The built package: what is in it, what it offers, and what importing it loads."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENTRY_POINTS = PROJECT["project"]["entry-points"]["lora_da_core"]
PACKAGES = [ROOT / path for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


def python(*arguments, **options):
    """A fresh interpreter that sees nothing of the source tree."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= options.pop("environment", {})
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, **options
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution, and the wheel that is built from it alone."""
    directory = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", directory, ROOT, cwd="/")
    return directory


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    python(*pip, cwd="/")
    return target


def has_hookimpl(path):
    tree = ast.parse(path.read_text())
    decorators = [
        decorator.func if isinstance(decorator, ast.Call) else decorator
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
    ]
    names = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None) for node in decorators}
    return "hookimpl" in names


def module_name(path):
    parts = path.relative_to(ROOT / "plugins").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class TestProject:
    def test_every_package_is_listed_and_typed(self):
        there = {file.parent for file in [ROOT / "lora_da_core/__init__.py", *ROOT.glob("plugins/*/__init__.py")]}
        assert set(PACKAGES) == there
        assert [package.name for package in PACKAGES if not (package / "py.typed").is_file()] == []

    def test_every_module_with_a_hook_is_an_entry_point_of_its_own(self):
        with_hooks = {module_name(path) for path in ROOT.glob("plugins/**/*.py") if has_hookimpl(path)}
        assert set(ENTRY_POINTS.values()) == with_hooks
        assert len(set(ENTRY_POINTS.values())) == len(ENTRY_POINTS)

    def test_static_checks_cover_every_package(self):
        names = {package.name for package in PACKAGES}
        assert set(PROJECT["tool"]["mypy"]["packages"]) == names
        assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == names

    def test_constraints_pin_what_the_project_names(self):
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
        pinned = {canonical(name) for name in pins}
        named = [*PROJECT["project"]["dependencies"]]
        for group in (*PROJECT["project"]["optional-dependencies"].values(), *PROJECT["dependency-groups"].values()):
            named += group
        assert {canonical(requirement) for requirement in named} <= pinned


def canonical(requirement):
    name = requirement.partition(";")[0]
    for sign in "<>=!~[ ":
        name = name.partition(sign)[0]
    return name.strip().lower().replace("_", "-").replace(".", "-")


class TestSourceDistribution:
    def test_it_holds_what_a_developer_needs_and_nothing_that_was_built(self, built):
        (path,) = built.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        needed = ("Makefile", "mkdocs.yml", "constraints.txt", "CHANGELOG.md", "tests/conftest.py", "docs/index.md")
        assert [name for name in needed if name not in names] == []
        built_here = re.compile(r"(\.venv|site|runs|dist|\.git)/|.*__pycache__/|.*\.pyc$")
        assert [name for name in names if built_here.match(name)] == []


class TestWheel:
    def test_it_holds_the_packages_and_nothing_else(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        inside = {name for name in names if ".dist-info/" not in name}
        sources = {
            f"{package.name}/{file.relative_to(package)}"
            for package in PACKAGES
            for file in package.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }
        assert inside == sources
        assert any(name.endswith(".dist-info/METADATA") for name in names)

    def test_its_metadata_names_the_command_and_the_plugins(self, installed):
        (info,) = installed.glob("*.dist-info")
        entries = Distribution.at(info).entry_points
        assert {entry.name: entry.value for entry in entries.select(group="lora_da_core")} == ENTRY_POINTS
        (command,) = entries.select(group="console_scripts")
        assert (command.name, command.value) == ("lora-da", "lora_da_core.cli:main")

    def test_it_works_from_elsewhere(self, installed):
        code = (
            "import pathlib, lora_da_core, lora_da_solvers.eigh as eigh;"
            "names = {r['name'] for r in lora_da_core.list_plugins() if r['status'] == 'ok'};"
            "print(*{str(pathlib.Path(m.__file__).parents[1]) for m in (lora_da_core, eigh)}); print(*sorted(names))"
        )
        where, names = python("-c", code, cwd="/", environment={"PYTHONPATH": str(installed)}).splitlines()
        assert Path(where) == installed
        assert {"kfac", "full", "eigh", "lanczos", "causal_lm"} <= set(names.split())
        out = python("-m", "lora_da_core.cli", "--help", cwd="/", environment={"PYTHONPATH": str(installed)})
        assert all(command in out for command in ("init", "inspect", "verify", "plugins"))


class TestImport:
    def test_it_loads_no_plugin_and_no_heavy_library(self, record_property):
        code = (
            "import sys, time, torch; start = time.perf_counter(); import lora_da_core;"
            "print(time.perf_counter() - start); print(*sorted({name.partition('.')[0] for name in sys.modules}))"
        )
        seconds, modules = python("-c", code, cwd="/").splitlines()
        loaded = set(modules.split())
        record_property("seconds_beyond_torch", float(seconds))
        heavy = {"transformers", "peft", "datasets", "matplotlib", "pandas", "typer", "rich"}
        assert "lora_da_core" in loaded
        assert loaded & (heavy | {package.name for package in PACKAGES if package.name != "lora_da_core"}) == set()

    def test_the_command_s_help_loads_no_heavy_library(self):
        code = (
            "import sys, lora_da_core.cli as cli\n"
            "sys.argv = ['lora-da', 'plugins', '--help']\n"
            "try:\n    cli.main()\nexcept SystemExit as leave:\n    assert not leave.code\n"
            "print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
        )
        loaded = set(python("-c", code, cwd="/").rpartition("LOADED")[2].split())
        assert loaded & {"transformers", "peft", "datasets", "matplotlib"} == set()
