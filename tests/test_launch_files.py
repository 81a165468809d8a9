"""The launch files of `examples/distributed`: those that this machine can run are run, the others are parsed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import storage
from lora_da_core.cli import app
from process_worlds import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "examples" / "distributed"
OPTIONS = ("--rank", "2", "--samples", "20", "--target-modules", "q_proj,down_proj")


def launched(*command: str | Path) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_processes_write_the_adapter_of_one(world: Path, tmp_path: Path) -> None:
    given = (world / "model", world / "data.jsonl")
    running = {
        name: launched("bash", FILES / f"{name}.sh", "2", *given, tmp_path / name, *OPTIONS)
        for name in ("torchrun", "accelerate")
    }
    init = ("init", "--model", given[0], "--data", given[1], "--output", tmp_path / "one")
    alone = CliRunner().invoke(app, [*map(str, init), *OPTIONS])
    assert alone.exit_code == 0, alone.output
    told = {"one": alone.output}
    for name, process in running.items():
        told[name], _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, told[name]
    for name, output in told.items():
        # The first process speaks for all.
        assert output.count("saved to") == 1 and output.count("note: N = ") == 1, output
        shared = "2 processes shared the run" in storage.read_report(tmp_path / name).notes
        assert shared == (name != "one")
    one, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in told)
    for other in others:
        for name in [name for name in one if "lora_A" in name]:
            pair = name, name.replace("lora_A", "lora_B")
            expected, found = (each[pair[1]] @ each[pair[0]] for each in (one, other))
            assert float((found - expected).norm() / expected.norm()) < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accelerate", "one", "torchrun"]


@pytest.mark.parametrize("path", sorted(FILES.glob("*.sh")), ids=lambda path: path.name)
def test_every_launch_file_is_short_parses_and_is_listed(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert len(text.splitlines()) <= 25 and os.access(path, os.X_OK)
    assert f"`{path.name}`" in (FILES.parent / "README.md").read_text()
    if "lora_da_core.cli init" not in text:
        usage = CliRunner().invoke(app, ["ablate", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        assert set(re.findall(r"--[a-z]+", text)) <= set(re.findall(r"--[a-z-]+", usage))


def test_the_pages_code_runs_and_its_links_lead_somewhere() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    module = types.ModuleType("page_on_scale")
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/scale.md", "exec"), module.__dict__)
    model, first = module.start(make_tiny_llama(num_hidden_layers=1), make_batches(make_samples()))
    assert isinstance(model, nn.Module) and first and lora_da_core.__all__
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
