"""Same inputs, same bytes on the CPU: with other random states and threads, and in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama

ESTIMATORS = ("kfac", "ekfac", "sketched")


def digests(estimator: str) -> list[list[str]]:
    model = make_tiny_llama(hidden_size=64, intermediate_size=96)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    pipeline = lora_da_core.build_pipeline(estimator=estimator, solver="lanczos")
    report = pipeline.run(model, make_batches(make_samples(24)), lora).report
    return [[layer.digest_A, layer.digest_B] for layer in report.layers]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[str]]]:
    return {name: digests(name) for name in ESTIMATORS}


@pytest.mark.parametrize("threads", [1, 2])
def test_random_states_and_threads_change_no_byte(expected: dict[str, list[list[str]]], threads: int) -> None:
    """Products of these sizes are summed in the same order by any number of threads; docs/reliability.md has larger."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(threads)
            assert {name: digests(name) for name in ESTIMATORS} == expected
    finally:
        torch.set_num_threads(before)


def test_another_process_and_hash_seed_change_no_byte(expected: dict[str, list[list[str]]]) -> None:
    code = "import json, test_determinism as t; print(json.dumps({name: t.digests(name) for name in t.ESTIMATORS}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout.splitlines()[-1]) == expected
