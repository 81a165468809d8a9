"""The `paper` preset gives what the original authors' program gave on a tiny Llama, to 1e-2 in every layer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import lora_da_core
from conftest import make_tiny_llama
from lora_da_presets import PAPER


@pytest.mark.parametrize("solver", ["eigh", "lanczos"])
@pytest.mark.parametrize("mask", ["attention", "labels"])
def test_paper_preset_reproduces_the_original_program(oracle: Path, mask: str, solver: str) -> None:
    tensors = load_file(oracle / f"original_tiny_llama_{mask}.safetensors")
    meta = json.loads((oracle / f"original_tiny_llama_{mask}.json").read_text())
    model = make_tiny_llama(**meta["config"])
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights)
    config = dataclasses.replace(
        PAPER.config,
        beta=meta["beta"],
        gamma=meta["gamma"],
        population=meta["population"],
        token_mask=meta["token_mask"],
    )
    data = {key.removeprefix("data."): value for key, value in tensors.items() if key.startswith("data.")}
    batches = [{key: value[start : start + 8] for key, value in data.items()} for start in range(0, 40, 8)]
    pipeline = lora_da_core.build_pipeline(preset="paper", solver=solver, config=config)
    lora = LoraConfig(r=meta["rank"], target_modules="all-linear")
    result = pipeline.run(model, batches, lora)
    expected = {key.removeprefix("lora_A."): value for key, value in tensors.items() if key.startswith("lora_A.")}
    assert set(result.factors) == set(expected)
    for name, a in expected.items():
        ours = result.factors[name]
        b = tensors[f"lora_B.{name}"]
        assert _relative(ours.A.T @ ours.A, a.T @ a) < 1e-2, name
        assert _relative(ours.B @ ours.A, b @ a) < 1e-2, name
    assert all(layer.converged and layer.residual < 1e-5 for layer in result.report.layers)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
