"""Models that FSDP2 shards among processes, against the same run of one process on the whole model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, adapter
from lora_da_core.errors import OptionError, RankError
from lora_da_core.placement import resident_bytes
from process_worlds import Worlds

LAYERS = 3
"""Blocks: with two, FSDP2 would gather all of them while one computes."""
FIXED = LoraDAConfig(gamma=64.0, damping=1.0)
OFFLOADED = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
CASES: dict[str, dict[str, Any]] = {
    "kfac": {},
    "kfac, weights kept after the forward pass": {"fsdp": {"reshard_after_forward": False}},
    "kfac, weights in host memory": {"fsdp": OFFLOADED},
    "ekfac": {"estimator": "ekfac"},
    "frequent directions": {"estimator": "sketched"},
    "sketched gradient": {"estimator": "diagonal", "gradient": "sketched"},
    "drawn labels": {"estimator": ("kfac", {"output": "full", "labels": "sampled"})},
    "no backward pass": {
        "estimator": ("kfac", {"output": "identity"}),
        "gradient": ("zeroth_order", {"steps": 2, "probes": 1}),
    },
    "sums on disk": {"config": LoraDAConfig(gamma=64.0, damping=1.0, statistics_device="disk")},
    "sums of two passes, on disk": {
        "estimator": "ekfac",
        "config": LoraDAConfig(gamma=64.0, damping=1.0, statistics_device="disk"),
    },
    "layers in two passes": {"config": LoraDAConfig(gamma=64.0, damping=1.0, layers_per_pass=11)},
    "automatic scale": {"config": LoraDAConfig()},
    "fewer samples than processes": {"samples": 3},
}
ON_FOUR = ["kfac", "kfac, weights in host memory", "ekfac", "fewer samples than processes"]
LIMIT = "600kB"
FACTORS = 1e-6
"""How far B·A may lie from one process's, all sums in float64."""


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def whole_model(blocks: int = LAYERS) -> Any:
    return make_tiny_llama(torch.float64, num_hidden_layers=blocks)


def sharded(model: Any, **settings: Any) -> Any:
    """Every block by itself, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def data(samples: int) -> list[dict[str, torch.Tensor]]:
    return make_batches(make_samples(samples))


def build(case: dict[str, Any]) -> Any:
    chosen = {key: value for key, value in case.items() if key in ("estimator", "gradient", "config")}
    return lora_da_core.build_pipeline(**{"config": FIXED, **chosen})


def described(result: Any) -> dict[str, Any]:
    report = result.report
    return {
        "products": {name: (pair.B @ pair.A).numpy() for name, pair in result.factors.items()},
        "bytes": [(layer.digest_A, layer.digest_B) for layer in report.layers],
        "counts": (report.samples, report.label_tokens, [(layer.tokens, layer.rank) for layer in report.layers]),
        "loss": report.loss,
        "base": report.base,
        "seconds": sorted(report.seconds),
    }


def alone(name: str) -> dict[str, Any]:
    case = CASES[name]
    return described(build(case).run(whole_model(), data(case.get("samples", 14)), lora()))


def state_of(model: nn.Module) -> list[Any]:
    parameters = [(name, type(p).__name__, p.requires_grad, p.to_local().sum().item()) for name, p in named(model)]
    modules = [
        (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()
    ]
    return [parameters, modules]


def named(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        yield name, parameter


@contextlib.contextmanager
def watching_gathered(model: Any, seen: list[int]) -> Iterator[None]:
    """Notes how many blocks have whole weights whenever a block computes, forward and backward."""

    def note(*_: Any) -> None:
        blocks = [next(block.mlp.up_proj.parameters()) for block in model.model.layers]
        seen.append(sum(not isinstance(parameter, DTensor) for parameter in blocks))

    def look(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        note()
        if output.requires_grad:
            output.register_hook(note)

    with contextlib.ExitStack() as stack:
        for block in model.model.layers:
            stack.callback(block.mlp.up_proj.register_forward_hook(look).remove)
        yield


def outcome(name: str) -> dict[str, Any]:
    case = CASES[name]
    model = sharded(whole_model(), **case.get("fsdp", {}))
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].train()
    before, gathered = state_of(model), list[int]()
    with watching_gathered(model, gathered):
        found = described(build(case).run(model, data(case.get("samples", 14)), lora()))
    return {**found, "gathered": max(gathered), "restored": state_of(model) == before}


def gradients(model: Any) -> list[np.ndarray]:
    model.train()
    batch = data(4)[0]
    model(**batch, use_cache=False).loss.backward()
    return [parameter.grad.full_tensor().numpy() for _, parameter in named(model)]


def held(pipeline: Any) -> dict[str, int]:
    """Bytes that this process holds of weights and of statistics, of four blocks."""
    model = sharded(whole_model(4))
    layers = pipeline.estimate(model, data(14), lora()).statistics.layers.values()
    groups = {id(layer.group): layer.group for layer in layers}
    sums = [each.statistics() for layer in layers for each in (layer.fisher, layer.gradient)]
    sums += [group.accumulator.statistics() for group in groups.values()]
    return {
        "weights": sum(parameter.to_local().nbytes for _, parameter in named(model)),
        "statistics": sum(value.nbytes for values in sums for value in values.values()),
    }


def adapters() -> dict[str, Any]:
    """What becomes of adapters of sharded models, and of training after a run."""
    pipeline, batches = build({}), data(14)
    wrapped = get_peft_model(whole_model(), lora())
    sharded(wrapped.get_base_model())
    lora_da_core.initialize_lora_da_weights(wrapped, batches, pipeline=pipeline)
    written = {key: value.full_tensor().numpy() for key, value in get_peft_model_state_dict(wrapped).items()}
    model, untouched = sharded(whole_model()), sharded(whole_model())
    pipeline.run(model, batches, lora())
    same = all(map(np.array_equal, gradients(model), gradients(untouched)))
    model = lora_da_core.get_lora_da_model(sharded(whole_model()), lora(), batches, pipeline=pipeline)
    with torch.no_grad():
        logits = model(input_ids=batches[0]["input_ids"]).logits.numpy()
    refused = []
    for attempt in (
        lambda: pipeline.estimate(sharded(whole_model()), batches, lora(), cache_dir=tempfile.mkdtemp()),
        lambda: pipeline.fishers(pipeline.estimate(sharded(whole_model()), batches, lora())),
        lambda: build({"config": LoraDAConfig(offset="base")}).run(sharded(whole_model()), batches, lora()),
    ):
        try:
            attempt()
        except (OptionError, RankError) as error:  # its own, or what another process has told of its own
            refused.append(str(error))
    return {"written": written, "trains alike": same, "logits": logits, "refused": refused}


def in_bfloat16() -> Any:
    """A run in which FSDP2 gathers weights in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = make_tiny_llama(torch.float32, num_hidden_layers=LAYERS)
    return described(build({}).run(sharded(model, mp_policy=policy), data(14), lora()))["products"]


def outcomes(names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {name: outcome(name) for name in names}
    return {**found, "held": {name: held(build({"estimator": name})) for name in ("kfac", "ekfac")}}


def limited() -> dict[str, Any]:
    """Runs within limits: one in several passes, and one that is refused."""
    pipeline, batches, runs = build({}), make_batches(make_samples(14), 1), {}  # no smaller batches to weigh
    runs["weights"] = resident_bytes(sharded(whole_model()))
    for name, limit in {"tight": LIMIT, "none": 10**4}.items():
        try:
            result = pipeline.run(sharded(whole_model()), batches, lora(), max_memory=limit)
            runs[name] = {**described(result), "notes": result.report.notes}
        except (OptionError, RankError) as error:  # its own, or what another process has told of its own
            runs[name] = str(error)
    return runs


def everything(names: list[str]) -> dict[str, Any]:
    return {**outcomes(names), "adapters": adapters(), "bfloat16": in_bfloat16(), "limited": limited()}


@pytest.fixture(scope="module")
def found() -> Iterator[dict[int, list[dict[str, Any]]]]:
    """What every process found, by how many there are; both groups run at the same time."""
    worlds = Worlds()
    try:
        numbers = {2: worlds.start(2, everything, list(CASES)), 4: worlds.start(4, outcomes, ON_FOUR)}
        yield {size: worlds.values(number) for size, number in numbers.items()}
    finally:
        worlds.kill()


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {name: alone(name) for name in CASES}


def difference(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


ALL = [*((2, name) for name in CASES), *((4, name) for name in ON_FOUR)]


@pytest.mark.parametrize(("size", "name"), ALL)
def test_a_sharded_model_gives_what_the_whole_one_gives(size: int, name: str, found: Any, expected: Any) -> None:
    mine, theirs = found[size][0][name], expected[name]
    assert mine["counts"] == theirs["counts"]
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
    assert mine["base"] == theirs["base"], "fingerprint of the base"
    for layer, product in theirs["products"].items():
        assert difference(mine["products"][layer], product) < FACTORS, layer
    assert all(other[name]["bytes"] == mine["bytes"] for other in found[size])


@pytest.mark.parametrize(("size", "name"), ALL)
def test_whole_weights_are_there_only_while_they_are_gathered(size: int, name: str, found: Any) -> None:
    kept = CASES[name].get("fsdp", {}).get("reshard_after_forward", True) is False
    for each in found[size]:
        assert each[name]["restored"], "parameters, flags, modes and hooks"
        # The block that computes, and the next one, which FSDP2 gathers ahead.
        assert each[name]["gathered"] == LAYERS if kept else each[name]["gathered"] <= 2


@pytest.mark.parametrize("estimator", ["kfac", "ekfac"])
def test_what_a_process_holds_falls_with_their_number(estimator: str, found: Any) -> None:
    layers = build({"estimator": estimator}).estimate(whole_model(4), data(14), lora()).statistics.layers.values()
    groups = {id(layer.group): layer.group for layer in layers}
    accumulators = [each for layer in layers for each in (layer.fisher, layer.gradient)]
    accumulators += [group.accumulator for group in groups.values()]
    statistics = sum(value.nbytes for each in accumulators for value in each.statistics().values())
    weights = sum(parameter.nbytes for parameter in whole_model(4).parameters())
    for size in (2, 4):
        of_ranks = [each["held"][estimator] for each in found[size]]
        assert sum(each["statistics"] for each in of_ranks) == statistics
        assert sum(each["weights"] for each in of_ranks) == weights
        assert max(each["statistics"] for each in of_ranks) < 1.25 * statistics / size
        assert max(each["weights"] for each in of_ranks) < 1.05 * weights / size


def test_adapters_of_sharded_models_are_written(found: Any, expected: Any) -> None:
    reference = build({}).run(whole_model(), data(14), lora())
    state = adapter.state_dict(reference.factors)
    plain = adapter.apply(whole_model(), lora(), reference.factors)
    with torch.no_grad():
        logits = plain(input_ids=data(14)[0]["input_ids"]).logits.numpy()
    for each in (every["adapters"] for every in found[2]):
        assert each["written"].keys() == state.keys()
        for key_a in (key for key in state if "lora_A" in key):
            key_b = key_a.replace("lora_A", "lora_B")
            product = each["written"][key_b] @ each["written"][key_a]
            assert difference(product, (state[key_b] @ state[key_a]).numpy()) < 1e-5
        assert difference(each["logits"], logits) < 1e-5
        assert each["trains alike"]


def test_what_a_sharded_model_cannot_do_is_refused(found: Any) -> None:
    for each in (every["adapters"] for every in found[2]):
        for text, part in zip(each["refused"], ["cache_dir", "Fishers", "offset='base'"], strict=True):
            assert part in text


def test_a_sharded_model_keeps_within_a_limit(found: Any, expected: Any) -> None:
    of_ranks = [each["limited"] for each in found[2]]
    model = whole_model()
    weights, block = (sum(p.nbytes for p in part.parameters()) for part in (model, model.model.layers[0]))
    # A half of all, the root's own, and two blocks.
    resident = weights / 2 + (weights - LAYERS * block) + 2 * block
    for each in of_ranks:
        assert each["weights"] == pytest.approx(resident, rel=0.02)
        assert each["tight"]["bytes"] == of_ranks[0]["tight"]["bytes"]
        for layer, product in expected["kfac"]["products"].items():
            assert difference(each["tight"]["products"][layer], product) < FACTORS, layer
        (note,) = [note for note in each["tight"]["notes"] if note.startswith("planned for a limit")]
        assert " 1 passes over the data" not in note
        assert "the smallest that works" in each["none"]


def test_weights_that_are_gathered_in_bfloat16_give_nearly_the_same(found: Any) -> None:
    exact = described(build({}).run(make_tiny_llama(num_hidden_layers=LAYERS), data(14), lora()))["products"]
    rounded = found[2][0]["bfloat16"]
    cosines = [
        float((exact[n] * rounded[n]).sum() / np.linalg.norm(exact[n]) / np.linalg.norm(rounded[n])) for n in exact
    ]
    assert min(cosines) > 0.9 and max(cosines) < 1 - 1e-9
