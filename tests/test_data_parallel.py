"""Runs that several processes share, against the same run of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig
from lora_da_core.shares import owners_of, share_of
from lora_da_core.types import LayerSpec
from process_worlds import Worlds

FIXED = LoraDAConfig(gamma=64.0, damping=1.0)
PROJECTIONS = {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SUMS = {torch.float64: 1e-12, torch.float32: 1e-6}
"""How far sums may lie from one process's, relative to the largest of a tensor."""
FACTORS = {torch.float64: 1e-7, torch.float32: 1e-4}
"""How far B·A may: a gap between eigenvalues divides what sums differ by."""

CASES: dict[str, dict[str, Any]] = {
    "kfac": {},
    "kfac in float32": {"dtype": torch.float32},
    "layers in two passes": {"config": LoraDAConfig(gamma=64.0, damping=1.0, layers_per_pass=3)},
    "sums on disk": {"estimator": "ekfac", "config": LoraDAConfig(gamma=64.0, damping=1.0, statistics_device="disk")},
    "sums that do not add, on disk": {
        "estimator": "empirical",
        "config": LoraDAConfig(gamma=64.0, statistics_device="disk"),
    },
    "drawn labels": {"estimator": ("kfac", {"output": "full", "labels": "sampled"})},
    "ekfac": {"estimator": "ekfac"},
    "sketched gradient": {"estimator": "diagonal", "gradient": "sketched"},
    "empirical": {"estimator": "empirical"},
    "frequent directions": {"estimator": "sketched"},
    "no backward pass": {
        "estimator": ("kfac", {"output": "identity"}),
        "gradient": ("zeroth_order", {"steps": 3, "probes": 2}),
    },
    "automatic scale": {"config": LoraDAConfig(samples=9)},
    "two rounds, ranks shared out": {"config": LoraDAConfig(samples=12, rounds=2), "allocator": "greedy"},
    "preferences": {"objective": "dpo", "samples": 7},
    "experts": {"model": "mixtral", "samples": 4, "config": LoraDAConfig(gamma=64.0, token_mask="attention")},
    "fewer samples than processes": {"samples": 3},
}
ON_FOUR = ["kfac", "drawn labels", "empirical", "automatic scale", "experts", "fewer samples than processes"]


def made_model(name: str, dtype: torch.dtype) -> nn.Module:
    if name == "llama":
        return make_tiny_llama(dtype, num_hidden_layers=1)
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=61, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        experts = MixtralForCausalLM(config).to(dtype)
        experts.set_experts_implementation("eager")  # the only one that takes float64
        return experts


def outcome(name: str) -> dict[str, Any]:
    """Sums, factors and report of one case, as values that processes can send."""
    case = {"model": "llama", "dtype": torch.float64, "samples": 14, "config": FIXED, **CASES[name]}
    model, batches = made_model(case.pop("model"), case.pop("dtype")), make_batches(make_samples(case.pop("samples")))
    if name == "preferences":
        # Every text against one of other tokens; the reference's log-probabilities come from the model itself.
        batches = [{key: torch.stack([value, other_tokens(key, value)], 1) for key, value in each.items()}
                   for each in batches]  # fmt: skip
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", **(EXPERTS if name == "experts" else PROJECTIONS))
    pipeline = lora_da_core.build_pipeline(**case)
    sums: dict[str, Any] = {}
    if pipeline.config.layers_per_pass == "auto":
        found = pipeline.estimate(model, batches, lora)
        result = pipeline.solve(found)
        for layer, of_layer in found.statistics.layers.items():
            if of_layer.group is None:
                continue
            roles = {"layer": of_layer.fisher.statistics(), "input": of_layer.group.accumulator.statistics()}
            for role, values in {**roles, "gradient": found.gradient_sums[layer]}.items():
                sums.update({f"{layer} {role} {key}": value.numpy() for key, value in values.items()})
    else:
        result = pipeline.run(model, batches, lora)
    report = result.report
    return {
        "sums": sums,
        "factors": {layer: (pair.A.numpy(), pair.B.numpy()) for layer, pair in result.factors.items()},
        "bytes": [(layer.digest_A, layer.digest_B) for layer in report.layers],
        "counts": (report.samples, report.label_tokens, [(layer.tokens, layer.rank) for layer in report.layers]),
        "scale": report.scale,
        "loss": report.loss,
    }


def other_tokens(key: str, value: Any) -> Any:
    return value if key == "attention_mask" else torch.where(value >= 0, (7 * value + 3) % 61, value)


def outcomes(names: list[str]) -> dict[str, Any]:
    return {name: outcome(name) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return outcomes(list(CASES))


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """What every process found, of groups that run at the same time."""
    worlds = Worlds()
    wanted = {"2": (2, list(CASES)), "2 again": (2, ["kfac", "experts"]), "4": (4, ON_FOUR), "4 again": (4, ["kfac"])}
    try:
        started = {name: worlds.start(size, outcomes, cases) for name, (size, cases) in wanted.items()}
        yield {name: worlds.values(number) for name, number in started.items()}
    finally:
        worlds.kill()


def stored(cache_dir: Any) -> tuple[bool, list[tuple[str, str]]]:
    """Whether rank 0's statistics came from a cache, and the digests."""
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", **PROJECTIONS)
    model, batches = made_model("llama", torch.float64), make_batches(make_samples(8))
    config = LoraDAConfig(gamma=64.0, layers_per_pass=3)
    result = lora_da_core.build_pipeline(estimator="ekfac", config=config).run(
        model, batches, lora, cache_dir=cache_dir
    )
    digests = [(layer.digest_A, layer.digest_B) for layer in result.report.layers]
    return any("read from the cache" in note for note in result.report.notes), digests


def stored_twice(cache_dir: Any) -> list[tuple[bool, list[tuple[str, str]]]]:
    return [stored(cache_dir), stored(cache_dir)]


def test_rank_0_reads_what_was_stored_for_all(tmp_path: Any) -> None:
    worlds = Worlds()
    try:
        for (before, made), (after, read) in worlds.run(2, stored_twice, tmp_path):
            assert (before, after) == (False, True) and made == read
    finally:
        worlds.kill()
    # One process goes on with what two have stored.
    assert stored(tmp_path) == (True, made)


def largest_difference(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)) if expected.size else 0.0


@pytest.mark.parametrize(("size", "name"), [*(("2", n) for n in CASES), *(("4", n) for n in ON_FOUR)])
def test_shared_runs_give_one_processes_sums_and_factors(
    size: str, name: str, alone: dict[str, Any], shared: dict[str, list[dict[str, Any]]]
) -> None:
    dtype, expected, first = CASES[name].get("dtype", torch.float64), alone[name], shared[size][0][name]
    assert first["counts"] == expected["counts"]
    assert first["loss"] == pytest.approx(expected["loss"], rel=SUMS[dtype])
    assert first["sums"].keys() == expected["sums"].keys() and first["factors"].keys() == expected["factors"].keys()
    for key, value in expected["sums"].items():
        # A sketch of sketches is another sketch, and processes add EKFAC's bases, whose lengths mean nothing.
        if name != "frequent directions" and not key.endswith("basis"):
            # Finite differences divide the losses' rounding by the step.
            allowed = SUMS[dtype] * (1e4 if name == "no backward pass" else 1)
            assert largest_difference(first["sums"][key], value) < allowed, key
    for layer, (lora_A, lora_B) in expected["factors"].items():
        found_A, found_B = first["factors"][layer]
        assert largest_difference(found_B @ found_A, lora_B @ lora_A) < FACTORS[dtype], layer


@pytest.mark.parametrize("size", ["2", "4"])
def test_every_process_holds_the_same_bytes(size: str, shared: dict[str, list[dict[str, Any]]]) -> None:
    first, *others = shared[size]
    for other in others:
        for name in first:
            assert other[name]["bytes"] == first[name]["bytes"] and other[name]["scale"] == first[name]["scale"], name


@pytest.mark.parametrize("size", ["2", "4"])
def test_the_same_number_of_processes_gives_the_same_bytes_again(
    size: str, shared: dict[str, list[dict[str, Any]]]
) -> None:
    for name, found in shared[f"{size} again"][0].items():
        before = shared[size][0][name]
        assert found["bytes"] == before["bytes"]
        for key, value in found["sums"].items():
            assert value.tobytes() == before["sums"][key].tobytes(), key


def trained(directory: Any) -> dict[str, Any]:
    """A Trainer's start, as its launcher would have its processes compute it."""
    import os

    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    if dist.is_initialized():
        names = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost", MASTER_PORT="1")
    model = get_peft_model(made_model("llama", torch.float64), LoraConfig(r=2, task_type="CAUSAL_LM", **PROJECTIONS))
    rows = [{key: value[0] for key, value in batch.items()} for batch in make_batches(make_samples(20), 1)]
    arguments = TrainingArguments(str(directory), per_device_train_batch_size=2, use_cpu=True, report_to="none", seed=3)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=padded)
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(gamma=64.0, samples=8))
    report = lora_da_core.init_before_training(trainer, pipeline=pipeline)
    state = {name: value.detach().numpy() for name, value in model.named_parameters() if "lora_" in name}
    return {"state": state, "samples": report.samples, "loss": report.loss, "notes": report.notes}


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    pad = torch.nn.utils.rnn.pad_sequence
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {key: pad([row[key] for row in rows], batch_first=True, padding_value=fill) for key, fill in fills.items()}


def test_a_trainers_processes_share_its_start(tmp_path: Any) -> None:
    worlds = Worlds()
    try:
        first, second = worlds.run(2, trained, tmp_path)
    finally:
        worlds.kill()
    alone = trained(tmp_path)
    assert first["samples"] == alone["samples"] == 8 and first["loss"] == pytest.approx(alone["loss"], rel=1e-9)
    assert "2 processes shared the run" in first["notes"]
    for name, value in alone["state"].items():
        assert first["state"][name].tobytes() == second["state"][name].tobytes()
        assert bool(value.any()) and first["state"][name].shape == value.shape
    for name in [name for name in alone["state"] if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        expected = alone["state"][other] @ alone["state"][name]
        assert largest_difference(first["state"][other] @ first["state"][name], expected) < 1e-6


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_shares_are_whole_ordered_and_even(size: int) -> None:
    batches = make_batches(make_samples(23), 5)
    shares = [share_of(batches, rank, size) for rank in range(size)]
    rows = [row for share in shares for _, batch in share.batches for row in batch["input_ids"]]
    everything = [row for batch in batches for row in batch["input_ids"]]
    assert len(rows) == len(everything) and all(map(torch.equal, rows, everything))
    costs = [sum(batch["labels"].numel() for _, batch in share.batches) for share in shares]
    widest = max(batch["labels"].shape[1] for batch in batches)
    assert max(costs) - sum(costs) / size <= widest
    assert all(torch.equal(share.owners, shares[0].owners) for share in shares)


def test_layers_of_one_input_are_solved_together_and_the_work_is_even() -> None:
    specs = [LayerSpec(f"{block}.{name}", "linear", *sizes, 2, 1.0)
             for block in range(8)
             for name, sizes in {"q": (64, 64), "k": (64, 16), "v": (64, 16), "o": (64, 64), "up": (64, 172), "down": (172, 64)}.items()]  # fmt: skip  # noqa: E501
    groups = {spec.name: spec.name.replace(".k", ".q").replace(".v", ".q") for spec in specs}
    owners = owners_of(specs, groups, 4)
    assert all(owners[spec.name] == owners[groups[spec.name]] for spec in specs)
    assert owners.keys() == groups.keys()
    loads = [
        sum(s.in_features**2 * (s.in_features + s.out_features) for s in specs if owners[s.name] == rank)
        for rank in range(4)
    ]
    assert max(loads) < 1.05 * sum(loads) / 4
    assert len(set(owners_of(specs[:2], {}, 4).values())) == 2
