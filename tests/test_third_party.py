"""A plugin of someone else's, installed by pip, is found and used like our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_cli import world  # noqa: F401 - the tiny model and data set that the commands run on

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "third_party_plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target")
    done = python(*pip, str(target), str(EXAMPLE))
    assert done.returncode == 0, done.stderr
    return target


def python(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LORA_DA"))}
    environment |= {"NO_COLOR": "1"} | ({} if path is None else {"PYTHONPATH": str(path)})
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def lora_da(*arguments: str, path: Path | None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("-c", "from lora_da_core.cli import main; main()", *arguments, path=path, cwd=cwd)


def test_the_name_is_unknown_without_the_package() -> None:
    done = lora_da("plugins", "--json", path=None)
    assert done.returncode == 0, done.stderr
    assert "head_blocks" not in done.stdout


def test_plugins_lists_it(site: Path) -> None:
    done = lora_da("plugins", "--json", path=site)
    assert done.returncode == 0, done.stderr
    (found,) = [record for record in json.loads(done.stdout) if record["distribution"] == "lora-da-head-blocks"]
    assert found == {
        "kind": "estimator",
        "name": "head_blocks",
        "distribution": "lora-da-head-blocks",
        "version": "0.1.0",
        "status": "ok",
        "reason": "",
    }


def test_build_pipeline_takes_it_and_the_kit_passes(site: Path) -> None:
    code = (
        "import lora_da_core, sys\n"
        "assert 'lora_da_head_blocks' not in sys.modules\n"
        "from lora_da_core.testing import check_plugin\n"
        "made = lora_da_core.build_pipeline(estimator=('head_blocks', {'blocks': 4}), solver='lanczos')\n"
        "assert made.components.estimator.options.blocks == 4\n"
        "print(made)\n"
        "print(len(check_plugin('head_blocks')), len(check_plugin('lora-da-head-blocks:head_blocks')))\n"
    )
    done = python("-c", code, path=site)
    assert done.returncode == 0, done.stderr
    assert "estimator='head_blocks'" in done.stdout
    assert done.stdout.splitlines()[-1] == "24 24"


def test_init_uses_it_on_a_model(site: Path, world: Path) -> None:  # noqa: F811
    arguments = ["init", "--model", "model", "--data", "data.jsonl", "--output", "third-party", "--rank", "4"]
    arguments += ["--estimator", "head_blocks", "--estimator-option", "blocks=2"]
    done = lora_da(*arguments, path=site, cwd=world)
    assert done.returncode == 0, done.stderr
    report = json.loads((world / "third-party" / "lora_da_report.json").read_text())
    assert report["components"]["estimator"] == "head_blocks"
    assert report["options"]["estimator"] == {"blocks": 2}
    assert all(layer["converged"] for layer in report["layers"])
    assert (world / "third-party" / "adapter_model.safetensors").is_file()


def test_its_own_tests_pass(site: Path) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"), path=site, cwd=EXAMPLE)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_it_knows_nothing_but_the_front_door() -> None:
    source = (EXAMPLE / "src" / "lora_da_head_blocks" / "__init__.py").read_text()
    imports = {line.split()[1] for line in source.splitlines() if line.startswith(("from lora", "import lora"))}
    assert imports == {
        "lora_da_core",
        "lora_da_core.interfaces",
        "lora_da_core.operators",
        "lora_da_core.types",
    }
