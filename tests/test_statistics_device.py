"""Sums on the host or on disk: the same numbers, less memory where layers are, and nothing left behind.

On the CPU, or where `LORA_DA_TEST_DEVICE` says so on a GPU; there the host's memory is another place than the device's.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_da_core
from conftest import assert_same as assert_same_bits
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, LoraDAError, OptionError, StorageError, rounds
from lora_da_core.ablation.memory import PeakMemory
from lora_da_core.interfaces import Accumulator
from lora_da_core.memory import Plan, estimate_memory
from lora_da_core.memory.time import PassTime
from lora_da_core.memory.workload import Workload
from lora_da_core.running_sums import StoredSums
from lora_da_core.sums_storage import DiskStorage, HostStorage, OffloadedSums
from test_data_parallel import made_model
from test_memory import group, recorded

DEVICE = torch.device(os.environ.get("LORA_DA_TEST_DEVICE", "cpu"))
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
FIXED = LoraDAConfig(gamma=64.0)
PLACES = ["disk"] if DEVICE.type == "cpu" else ["host", "disk"]
COMPONENTS: dict[str, tuple[Any, Any]] = {
    "kfac": ("kfac", "full"),
    "kfac, full output, sampled": (("kfac", {"output": "full", "labels": "sampled"}), "full"),
    "ekfac": ("ekfac", "full"),
    "diagonal": ("diagonal", "sketched"),
    "identity": ("identity", "full"),
    "empirical rows": (("empirical", {"storage": "rows"}), "full"),
    "empirical tokens": (("empirical", {"storage": "factored"}), "full"),
    "frequent directions": (("sketched", {"size": 3}), "full"),
    "nystrom": (("sketched", {"method": "nystrom", "size": 3}), "full"),
    "svd": (("sketched", {"method": "svd", "size": 3}), "full"),
    "forward only": (("kfac", {"output": "identity"}), ("zeroth_order", {"steps": 2, "probes": 1})),
    "smoothed": ("kfac", ("smoothed", {"probes": 2})),
}


def made(place: str, estimator: Any = "kfac", gradient: Any = "full", **settings: Any) -> Any:
    config = dataclasses.replace(FIXED, statistics_device=place, **settings)  # type: ignore[arg-type]
    return lora_da_core.build_pipeline(estimator, gradient=gradient, config=config)


def assert_same(one: Any, other: Any) -> None:
    """To the bit on a CPU; a GPU's own sums of float64 numbers differ in the last one from run to run."""
    if DEVICE.type == "cpu":
        return assert_same_bits(one, other)
    assert list(one.factors) == list(other.factors)
    for name, pair in one.factors.items():
        torch.testing.assert_close((pair.A, pair.B), (other.factors[name].A, other.factors[name].B))
    assert (one.report.samples, one.report.label_tokens) == (other.report.samples, other.report.label_tokens)


def llama(**shape: Any) -> nn.Module:
    return make_tiny_llama(**{"num_hidden_layers": 1, **shape}).to(DEVICE)


def data() -> list[dict[str, Tensor]]:
    return make_batches(make_samples())


# The same numbers


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", COMPONENTS)
def test_factors_are_those_of_sums_on_the_device(name: str, place: str, tmp_path: Path) -> None:
    estimator, gradient = COMPONENTS[name]
    found = [
        made(each, estimator, gradient).run(llama(), data(), LORA, offload_dir=tmp_path) for each in ("device", place)
    ]
    assert_same(*found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_per_pass": 3},
        {"gamma": None, "samples": 9},
        {"gamma": None, "rounds": 2},
    ],
    ids=["several passes", "line search", "two rounds"],
)
def test_the_same_in_every_kind_of_run(settings: dict[str, Any]) -> None:
    found = [made(place, **settings).run(llama(), data(), LORA) for place in ("device", "disk")]
    assert_same(*found)


def test_on_a_cpu_the_host_is_where_layers_are() -> None:
    assert_same(*(made(place).run(llama(), data(), LORA) for place in ("device", "host")))


def test_experts_have_sums_elsewhere_too() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    settings: dict[str, Any] = {"token_mask": "attention"}
    found = [
        made(place, **settings).run(made_model("mixtral", torch.float32).to(DEVICE), data(), lora)
        for place in ("device", "disk")
    ]
    assert_same(*found)


def test_estimates_can_be_solved_again_and_outlive_a_collection(tmp_path: Path) -> None:
    model, batches = llama(), data()
    kept = made("device").estimate(model, batches, LORA)
    away = made("disk").estimate(model, batches, LORA, offload_dir=tmp_path)
    gc.collect()
    for damping in (1.0, 10.0):
        pipes = [made(place, damping=damping) for place in ("device", "disk")]
        assert_same(pipes[0].solve(kept), pipes[1].solve(away))
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_a_cache_is_written_from_disk_and_read_to_it(tmp_path: Path) -> None:
    model, batches = llama(), data()
    expected = made("device").run(model, batches, LORA)
    for place in ("disk", "device", "disk"):  # written by the first, read by the others
        found = made(place).run(model, batches, LORA, cache_dir=tmp_path / "cache", offload_dir=tmp_path)
        assert_same(expected, found)
    assert any("read from the cache" in note for note in found.report.notes)


# Less memory


def grown(work: Any) -> tuple[int, Any]:
    """Most bytes of tensors that live while something runs, beyond those before."""
    if DEVICE.type == "cuda":
        with PeakMemory(DEVICE) as memory:
            outcome = work()
        return memory.peak, outcome
    peak, _, outcome = recorded(work)
    return peak, outcome


def plan_of(pipeline: Any, model: nn.Module) -> Plan:
    return estimate_memory(model, LORA, pipeline=pipeline, workload=Workload(8, 16, batch_size=4))


def full_batches(vocabulary: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(vocabulary, (8, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(4)]
    for batch in batches:
        batch["attention_mask"][0, -1] = 0  # with padding attention takes a mask, as a plan assumes
    return batches


@pytest.mark.parametrize("name", ["kfac", "ekfac", "diagonal", "empirical rows", "nystrom"])
def test_disk_takes_less_memory_as_planned(name: str) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 100}
    model, batches, peaks = llama(**shape), full_batches(100), {}
    for place in ("device", "disk"):
        pipeline = made(place, *COMPONENTS[name], token_mask="attention")
        # On a GPU layers wait for each other's solves, which takes more than the sums of so small a model.
        work = pipeline.run if DEVICE.type == "cpu" else pipeline.estimate
        work(model, batches, LORA)  # what is made once and stays
        measured, _ = grown(lambda work=work: work(model, batches, LORA))
        plan = plan_of(pipeline, model)
        peaks[place] = (measured, plan.peak_bytes - plan.weights, plan)
    (before, _, whole), (measured, planned, plan) = peaks["device"], peaks["disk"]
    assert (plan.statistics_device, plan.offloaded_bytes) == ("disk", plan.statistics_bytes)
    assert (whole.statistics_device, whole.offloaded_bytes) == ("device", 0)
    assert measured < before - 0.5 * plan.statistics_bytes
    if DEVICE.type == "cpu":
        assert 0.95 * measured < planned < 1.2 * measured


# Plans


def test_a_plan_takes_the_cheapest_place_that_fits() -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 500}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, **shape))
    workload = Workload(16, 512, batch_size=2)

    def plan(place: str, device: str, **limits: Any) -> Plan:
        return estimate_memory(model, LORA, pipeline=made(place), workload=workload, device=device, **limits)

    whole = plan("auto", "cpu")
    assert (whole.statistics_device, whole.passes, whole.offloaded_bytes) == ("device", 1, 0)
    limit = whole.peak_bytes - 7 * whole.statistics_bytes // 10
    places = ("device", "disk", "auto")
    device, disk, auto = (plan(place, "cpu", max_memory=limit, by_block=False) for place in places)
    assert device.fits and device.passes > 1 and device.offloaded_bytes == 0
    assert disk.fits and disk.passes == 1 and disk.offloaded_bytes == disk.statistics_bytes
    # Reading sums from disk costs a CPU less than a further pass.
    assert auto == disk and 1 < disk.relative_time < device.relative_time
    # One sweep over blocks costs less than either.
    swept = plan("auto", "cpu", max_memory=limit)
    assert swept.fits and (swept.schedule, swept.statistics_device) == ("blocks", "device")
    assert 1 < swept.relative_time < disk.relative_time
    assert {"statistics_device", "offloaded_bytes"} <= set(auto.to_json())
    assert "statistics on the disk" in auto._repr_html_() and "elsewhere" not in whole._repr_html_()
    short = plan("host", "cuda", host_memory=whole.statistics_bytes - 1)
    assert not short.fits and "statistics_device='disk'" in short.notes[-1]
    assert plan("host", "cpu").statistics_device == "device", "a CPU's memory is the host's"


def test_moving_sums_is_weighed_against_further_passes() -> None:
    groups = [group(4 * 64, shared=number) for number in range(16)]
    layers = PassTime(beside=10**4, backward=True, tokens=2**16, batch_tokens=2**12, offloaded_weights=0, device="cuda")
    streamed = dataclasses.replace(layers, offloaded_weights=10**6)
    whole, single = [groups], [[each] for each in groups]
    assert layers.relative(whole, "device") == 1.0 == streamed.relative(whole, "device")
    moved = [layers.relative(whole, place) for place in ("device", "host", "disk")]
    assert moved == sorted(moved) and moved[0] < moved[1] < moved[2]
    # A pass that reads all weights again takes longer than moving the sums of all layers.
    assert streamed.relative(single, "device") > layers.relative(single, "device") > 1.0
    assert streamed.relative(whole, "host") < streamed.relative(single, "device")


def test_a_run_within_a_limit_says_where_its_sums_are(tmp_path: Path) -> None:
    model, pipeline = llama(num_hidden_layers=4, hidden_size=128, intermediate_size=256), made("disk")
    plan = plan_of(made("device"), model)
    limit = plan.peak_bytes - plan.statistics_bytes // 2
    result = pipeline.run(model, data(), LORA, max_memory=limit, offload_dir=tmp_path)
    note = next(note for note in result.report.notes if note.startswith("planned for a limit"))
    assert note.endswith("of statistics on the disk")
    # On a GPU layers that wait for each other's solves are divided as well.
    assert DEVICE.type != "cpu" or "1 passes over the data of a round" in note
    assert result.report.config["statistics_device"] == "disk"
    assert not list(tmp_path.iterdir())


# Accumulators


class Odd(Accumulator):
    """Tensors in all places that are looked at, some that may not be moved, one of a strange shape."""

    def __init__(self) -> None:
        self.total = torch.zeros(3, 4).mT
        self.parts = {"list": [torch.zeros(2, dtype=torch.float64)], "tuple": (torch.zeros((), dtype=torch.bool),)}
        self.whole = torch.zeros(6)
        self.view = self.whole[:3]
        self.same = self.total
        self.grows = torch.zeros(0)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        self.total += inputs
        self.parts["list"][0] += 1
        self.parts["tuple"][0].logical_not_()
        self.view += 1
        self.grows = torch.cat([self.grows, inputs.flatten()])

    def statistics(self) -> dict[str, Tensor]:
        parts = {"list": self.parts["list"][0], "tuple": self.parts["tuple"][0]}
        return {"total": self.total, "whole": self.whole, "grows": self.grows, **parts}


def assert_equal_sums(one: Accumulator, other: Accumulator) -> None:
    mine, theirs = one.statistics(), other.statistics()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]) and value.stride() == theirs[key].stride(), key


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    plain, inner = Odd(), Odd()
    away = OffloadedSums(inner, DiskStorage(tmp_path))
    for number in range(5):
        block = torch.full((4, 3), float(number))
        for sums in (plain, away):
            sums.update(block, None, torch.zeros(3))
        assert inner.total.is_meta and inner.total is inner.same and not inner.whole.is_meta
        assert_equal_sums(plain, away)
    twin = copy.deepcopy(away)
    twin.update(torch.ones(4, 3), None, torch.zeros(3))
    assert_equal_sums(plain, away)
    away.merge({key: value.clone() for key, value in plain.statistics().items() if key not in ("tuple", "grows")} | {
        "tuple": torch.zeros((), dtype=torch.bool), "grows": torch.zeros(60)})  # fmt: skip
    assert torch.equal(away.statistics()["total"], 2 * plain.statistics()["total"])


def test_the_host_is_another_place_for_an_accelerator_alone() -> None:
    sums = StoredSums({"total": torch.ones(4, device=DEVICE)})
    away = HostStorage().keep(sums)
    inside = next(iter(vars(sums)["_sums"].values()))
    assert inside.is_meta == (DEVICE.type != "cpu")
    assert torch.equal(away.statistics()["total"], torch.ones(4, device=DEVICE))


def test_places_on_disk_are_used_again(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    for _ in range(3):
        sums = [storage.keep(StoredSums({"total": torch.rand(1000)})) for _ in range(4)]
        end = storage._end
        del sums
        gc.collect()
    assert end == storage._end == 4 * 4000


# Faults


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses what goes beyond, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("estimator", ["kfac", ("empirical", {"storage": "rows"})], ids=["at once", "as it grows"])
def test_a_full_disk_ends_a_run_clearly(estimator: Any, tmp_path: Path, model_unchanged: Any) -> None:
    model, batches = make_tiny_llama(), data()
    model_unchanged(model)
    enough = 4 * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    with (
        files_of_at_most(enough),
        pytest.raises(LoraDAError, match=r"(?s)statistics cannot be written in .*offload_dir"),
    ):
        made("disk", estimator).run(model, batches, LORA, offload_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_told_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"are wanted and .* are free"):
        DiskStorage(tmp_path, expected=2**62)
    model = make_tiny_llama(num_hidden_layers=4, hidden_size=128, intermediate_size=256)
    pipeline = made("disk")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(rounds, "estimate", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(StorageError, match="are wanted"):
        pipeline.run(model, data(), LORA, max_memory="10GiB", offload_dir=tmp_path)


def test_a_place_that_is_no_directory_is_told_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(nn.Module, "__call__", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(StorageError, match=f"statistics cannot be written in {re.escape(str(file / 'below'))}"):
        made("disk").run(make_tiny_llama(), data(), LORA, offload_dir=file / "below")


def test_a_file_that_lost_its_end_is_told(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    sums = storage.keep(StoredSums({"total": torch.ones(1000)}))
    os.ftruncate(storage._file, 100)
    with pytest.raises(StorageError, match="cannot be read again"):
        sums.statistics()


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    program = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from test_statistics_device import LORA, data, made
        from conftest import make_tiny_llama
        def progress(phase, done, total):
            if phase == "statistics" and done == 2:
                print([name.name for name in Path(sys.argv[2]).iterdir()], flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        made("disk").run(make_tiny_llama(), data(), LORA, offload_dir=sys.argv[2], on_progress=progress)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(Path(__file__).parent), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ended.stdout.strip() == "[]" and not list(tmp_path.iterdir())


def test_only_places_are_taken() -> None:
    with pytest.raises(OptionError, match="statistics_device is 'gpu'; choose one of auto, device, host, disk"):
        LoraDAConfig(statistics_device="gpu")  # type: ignore[arg-type]
