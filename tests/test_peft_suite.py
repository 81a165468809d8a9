"""PEFT's own tests of LoRA on its custom models, every adapter that can be ours started by us.

Run by hand: the tests come with PEFT's source distribution, not with its wheel, and import diffusers. The command
fetches both into `build/`.

    make peft-suite
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import peft
import pytest

SOURCE = os.environ.get("LORA_DA_PEFT_SOURCE", "")
PLUGIN = Path(__file__).parent / "peft_suite"
SUBJECTS = ("save", "load", "merge", "delete", "active", "disable", "adapter_name", "state_dict")
OTHERS = (
    "KaSA",
    "MiCA",
    "VeLoRA",
    "BD-LoRA",
    "MonteCLoRA",
    "AdaLora",
    "GraLoRA",
    "VBLoRA",
    "TinyLoRA",
    "GLoRA",
    "Groups",
    "MHA",
)
"""What is not ours to start: variants, tuners, attention modules; grouped convolutions need ranks of their own."""
CHOSEN = f"TestPeftCustomModel and LoRA and ({' or '.join(SUBJECTS)}) and not {' and not '.join(OTHERS)}"
IDENTITY = ("test_disable_adapters[", "test_disable_adapters_with_merging[", "test_parameters_after_loading_model[")
"""Tests of adapters that start at the base's function: the first two ask for it, the last one's rate diverges else."""
LEAST = 500
"""Adapters that must have been ours, so that the rest proves something."""


def excused(failed: str) -> bool:
    """Whether a line of pytest's summary is of such a test, and of what it compares: any other error counts."""
    test, _, why = failed.partition("] - ")
    return any(name in f"{test}]" for name in IDENTITY) and why.startswith(("assert ", "AssertionError"))


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        (
            "t.py::TestPeftCustomModel::test_disable_adapters[MLP 1 LoRA-MLP-LoraConfig-config_kwargs6] - assert False",
            True,
        ),
        ("t.py::TestPeftCustomModel::test_disable_adapters[MLP 1 LoRA] - ValueError: assert", False),
        ("t.py::TestPeftCustomModel::test_disable_adapters[MLP 1 LoRA]", False),
        ("t.py::TestPeftCustomModel::test_save_pretrained[MLP 1 LoRA] - assert False", False),
    ],
)
def test_what_is_excused(failed: str, expected: bool) -> None:
    assert excused(failed) == expected


@pytest.mark.skipif(not SOURCE, reason="takes minutes, and needs PEFT's source distribution in LORA_DA_PEFT_SOURCE")
def test_pefts_own_tests_pass_from_our_start(tmp_path: Path) -> None:
    assert importlib.util.find_spec("diffusers"), "PEFT's tests import diffusers: pip install --no-deps diffusers"
    with tarfile.open(SOURCE) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    assert root.name == f"peft-{peft.__version__}", f"{root.name} is another version than {peft.__version__}"
    (root / "tests" / "__init__.py").touch()
    command = [sys.executable, "-m", "pytest", "tests/test_custom_models.py", "-p", "lora_da_start", "-q", "-k", CHOSEN]
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore"]
    paths = [str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]
    # In narrower columns pytest leaves out why a test failed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "COLUMNS": "1000"}
    run = subprocess.run([*command, *options], cwd=root, env=environment, capture_output=True, text=True, check=False)
    print("\n".join(line for line in run.stdout.splitlines() if line.startswith(("adapters ", "FAILED"))))
    print(run.stdout.splitlines()[-1])
    failed = re.findall(r"^FAILED (.+)$", run.stdout, re.MULTILINE)
    assert [test for test in failed if not excused(test)] == []
    ours = re.findall(r"started by us: (\d+)", run.stdout)
    assert ours, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    assert int(ours[0]) >= LEAST
