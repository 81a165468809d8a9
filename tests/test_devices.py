"""The same result on another device, and with layers on two of them, to within stated angles.

`LORA_DA_TEST_DEVICE=cuda python -m pytest tests/test_devices.py -s` holds a GPU to the CPU; without it the device is
the CPU itself, and what is compared is float32 with float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig
from scipy.linalg import subspace_angles
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, LoraDAResult, ModelError
from lora_da_core.operators import LowRankMap
from lora_da_core.probe import LowRankProbe

DEVICE = torch.device(os.environ.get("LORA_DA_TEST_DEVICE", "cpu"))
LORA = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
BATCHES = make_batches(make_samples(24), 6)
ANGLE = 1e-3
"""Largest principal angle, in radians, between what A spans in float32 on a device and in float64 on the CPU."""
FORWARD_ONLY_ANGLE = 1e-2
"""The same where the gradient is found from differences of losses, which float32 rounds."""
PARTS: list[dict[str, Any]] = [
    *({"estimator": name} for name in ("kfac", "ekfac", "diagonal", "empirical", "sketched", "identity")),
    *({"solver": name} for name in ("eigh", "lanczos", "davidson", "lobpcg", "randomized_svd", "arpack")),
    {"gradient": "sketched"},
    {"gradient": ("zeroth_order", {"steps": 8, "probes": 4}), "estimator": "identity"},
]


def model_of(dtype: torch.dtype = torch.float32) -> Any:
    return make_tiny_llama(dtype, hidden_size=64, intermediate_size=96)


def run(model: nn.Module, **parts: Any) -> LoraDAResult:
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(gamma=64.0), **parts)
    return pipeline.run(model, BATCHES, LORA)


def furthest(found: LoraDAResult, expected: LoraDAResult) -> tuple[float, float]:
    """Over all layers: the largest angle between what A spans, and the largest relative difference of B·A."""
    angles, products = [], []
    assert found.factors.keys() == expected.factors.keys()
    for name, pair in found.factors.items():
        (a, b), (other_a, other_b) = (
            (each.A.double().cpu(), each.B.double().cpu()) for each in (pair, expected.factors[name])
        )
        angles.append(float(subspace_angles(a.mT.numpy(), other_a.mT.numpy()).max()))
        products.append(float((b @ a - other_b @ other_a).norm() / (other_b @ other_a).norm()))
    return max(angles), max(products)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_device_gives_what_float64_on_the_cpu_gives(parts: dict[str, Any]) -> None:
    angle, product = furthest(run(model_of().to(DEVICE), **parts), run(model_of(torch.float64), **parts))
    print(f"{DEVICE} {parts}: angle {angle:.1e}, product {product:.1e}")
    limit = FORWARD_ONLY_ANGLE if parts is PARTS[-1] else ANGLE
    assert angle < limit and product < limit


# Layers on several devices


def on_the_host(model: Any) -> None:
    """Two layers compute on the CPU; hooks move what they are given there, and what they return back."""
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.down_proj):
        layer.to("cpu")
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def kept_by_the_host(model: Any) -> None:
    """All weights are in host memory and come to the device in turn."""
    cpu_offload(model.cpu(), execution_device=DEVICE)


@pytest.mark.parametrize("place", [on_the_host, kept_by_the_host])
@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "empirical"])
def test_layers_on_two_devices_give_what_one_gives(place: Callable[[Any], None], estimator: str) -> None:
    model = model_of().to(DEVICE)
    expected = run(model_of().to(DEVICE), estimator=estimator)
    place(model)
    before = [(name, parameter.device) for name, parameter in model.named_parameters()]
    angle, product = furthest(run(model, estimator=estimator), expected)
    print(f"{place.__name__} beside {DEVICE}, {estimator}: angle {angle:.1e}, product {product:.1e}")
    assert max(angle, product) < ANGLE
    assert [(name, parameter.device) for name, parameter in model.named_parameters()] == before


@pytest.mark.parametrize("place", [on_the_host, kept_by_the_host])
def test_layers_on_two_devices_are_changed_where_they_compute(place: Callable[[Any], None]) -> None:
    losses = []
    for put in (place, lambda model: None):
        model = model_of().to(DEVICE)
        put(model)
        task = lora_da_core.build_pipeline().estimate(model, BATCHES, LORA).task
        draw = torch.Generator().manual_seed(0)
        steps = {
            spec.name: [
                torch.randn(size, 2, generator=draw).to(task.device_of(spec.name))
                for size in (spec.out_features, spec.in_features)
            ]
            for spec in task.specs
        }
        changes = {name: LowRankMap(0.1 * left, right) for name, (left, right) in steps.items()}
        with LowRankProbe(task, BATCHES, pytest.fail) as probe:
            losses.append(probe.losses(changes).cpu() - probe.losses({}).cpu())
    assert losses[1].abs().max() > 0.1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


def with_a_stray_layer() -> Any:
    """A model with one layer on another device, that nothing moves to; where there is no other, torch plays one."""
    model = model_of()
    layer = model.model.layers[1].self_attn.q_proj
    if DEVICE.type != "cpu":
        layer.to(DEVICE)
        return model
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.weight = nn.Parameter(torch.empty(layer.weight.shape, device="cuda"))
    return model


def test_a_layer_that_nothing_moves_to_is_named() -> None:
    words = (
        r"on several devices \(model\.embed_tokens\.weight on cpu, "
        rf"model\.layers\.1\.self_attn\.q_proj\.weight on {'cuda' if DEVICE.type == 'cpu' else DEVICE.type}(:0)?\)"
    )
    model = with_a_stray_layer()
    with pytest.raises(ModelError, match=words) as caught:
        run(model)
    assert "\n" not in str(caught.value).strip() and "move it to one device with .to()" in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_command_takes_a_device_and_says_the_same(world: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from typer.testing import CliRunner

    from lora_da_core.cli import app

    found = []
    for device in ("cpu", str(DEVICE)):
        output = tmp_path / str(len(found))
        arguments = ["init", "--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--samples", "12"]
        more = ["--rank", "2", "--dtype", "float32", "--gamma", "64", "--device", device, "--output", str(output)]
        outcome = CliRunner().invoke(app, [*arguments, *more])
        assert outcome.exit_code == 0, outcome.output
        verified = CliRunner().invoke(app, ["verify", str(output), "--device", device])
        assert verified.exit_code == 0, verified.output
        found.append(load_file(output / "adapter_model.safetensors"))
    first, second = found
    assert first.keys() == second.keys()
    for name in first:
        if name.endswith("lora_A.weight"):
            assert subspace_angles(first[name].mT.numpy(), second[name].mT.numpy()).max() < ANGLE
