"""A rank that raises, disagrees, is killed or comes late: every other says so and stops, and nothing is left half.

On two GPUs, with NCCL: LORA_DA_TEST_DEVICE=cuda python -m pytest tests/test_rank_faults.py -q -p no:cacheprovider
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, adapter, agreement, capture, distributed, rounds, storage
from lora_da_core.distributed import joined
from process_worlds import ON_GPUS, PATIENCE, Worlds, own_device

TIMEOUT = 40.0
"""Of the runs here; a rank counts as killed after a tenth."""
NOTICED = PATIENCE / 2
"""Seconds in which the others must have ended, half of what the process group's own timeout would take."""

PHASES = {
    "before the sums are added": "statistics",
    "while the sums are added": "all_reduce",
    "after the sums were added": "solve",
    "in the solve": "solution",
    "in the write": "write",
}


def at(phase: str, action: Callable[[], None]) -> None:
    """Lets `action` happen in this process at a phase of a run, before what the phase does."""
    places: dict[str, tuple[Any, str]] = {
        "statistics": (capture.Merger, "merged"),
        "all_reduce": (dist, "all_reduce"),
        "solve": (rounds.LayerSolver, "prepare"),
        "solution": (rounds.LayerSolver, "solve"),
        "write": (storage, "write_json"),
        "reduce": (dist, "reduce"),
    }
    owner, name = places[phase]
    real, calls = getattr(owner, name), []

    def acting(*arguments: Any, **rest: Any) -> Any:
        calls.append(name)
        # Within the collectives: when the others are in one already, and more of them are to come.
        if phase not in ("all_reduce", "reduce") or len(calls) == 2:
            action()
        return real(*arguments, **rest)

    setattr(owner, name, acting)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("out of luck")


def run_out() -> None:
    raise torch.OutOfMemoryError("no room")


def stop(phase: str, kind: str, who: int) -> None:
    """A fault to come in the rank `who`."""
    if dist.get_rank() == who:
        at(phase, {"killed": die, "raised": fail, "memory": run_out}[kind])


def init(output: Path, phase: str, kind: str, who: int) -> None:
    """What the command line does, with a fault in the rank `who`."""
    stop(phase, kind, who)
    distributed.BUCKET_BYTES = 2**12  # so that there are several collectives to die in
    config = LoraDAConfig(gamma=64.0, process_timeout=TIMEOUT)
    model = make_tiny_llama(num_hidden_layers=1).to(own_device())
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"])
    with joined(config.process_timeout) as world:
        result = lora_da_core.build_pipeline(config=config).run(model, make_batches(make_samples()), lora, world=world)
        if world.rank == 0:
            peft_model = adapter.apply(model, lora, result.factors)
            storage.save_run(output, peft_model.save_pretrained, result.report, settings={})


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    found = Worlds()
    yield found
    found.kill()


@pytest.mark.parametrize("kind", ["killed", "raised"])
def test_a_fault_at_any_phase_is_named_by_every_other_rank(worlds: Worlds, tmp_path: Path, kind: str) -> None:
    started = {}
    for name, phase in PHASES.items():
        who, size = 0 if phase == "write" else 1, 3 if phase == "all_reduce" and not ON_GPUS else 2
        started[name] = who, worlds.start(size, init, tmp_path / name, phase, kind, who)
    for name, (who, number) in started.items():
        endings = worlds.endings(number)
        wanted = f"RankError: rank {who} of {len(endings)} " + (
            "was killed" if kind == "killed" else "failed: ValueError: out of"
        )
        for rank, ending in enumerate(endings):
            if rank != who:
                assert ending.error.startswith(wanted), (name, endings)
                assert ending.seconds < NOTICED and ending.exitcode == 0
        assert endings[who].exitcode == (-signal.SIGKILL if kind == "killed" else 0)
        assert endings[who].error == ("" if kind == "killed" else "ValueError: out of luck"), name
        assert not (tmp_path / name).exists(), name
    if kind == "raised":
        assert list(tmp_path.iterdir()) == []


def run_sharded(place: str, kind: str) -> None:
    """A run on a model that FSDP2 shards, in which rank 1 stops while rank 0 gathers weights or sends sums."""
    model: Any = make_tiny_llama(num_hidden_layers=2).to(own_device())
    mesh = init_device_mesh(own_device().type, (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if place == "sums":
        stop("reduce", kind, 1)
    elif dist.get_rank() == 1:
        calls: list[int] = []

        def third(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                {"killed": die, "raised": fail}[kind]()

        model.model.layers[0].mlp.register_forward_pre_hook(third)
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"])
    config = LoraDAConfig(gamma=64.0, process_timeout=TIMEOUT)
    lora_da_core.build_pipeline(config=config).run(model, make_batches(make_samples()), lora)


def test_a_fault_in_a_sharded_run_is_named_too(worlds: Worlds) -> None:
    cases = [(place, kind) for place in ("weights", "sums") for kind in ("killed", "raised")]
    started = {case: worlds.start(2, run_sharded, *case) for case in cases}
    for (place, kind), number in started.items():
        first, second = worlds.endings(number)
        how = "was killed or lost" if kind == "killed" else "failed: "
        assert first.error.startswith(f"RankError: rank 1 of 2 {how}"), (place, kind, first, second)
        assert first.seconds < NOTICED and first.exitcode == 0
        assert second.exitcode == (-signal.SIGKILL if kind == "killed" else 0)
        assert kind == "killed" or ("out of luck" in first.error and "out of luck" in second.error)


def test_memory_that_runs_out_in_one_rank_stops_all(worlds: Worlds, tmp_path: Path) -> None:
    first, second = worlds.endings(worlds.start(2, init, tmp_path / "out", "solve", "memory", 1))
    assert first.error.startswith("RankError: rank 1 of 2 failed: LoraDAError: memory ran out")
    assert first.error.endswith("OutOfMemoryError: no room")
    assert second.error.startswith("LoraDAError: memory ran out") and not (tmp_path / "out").exists()


def disagree(what: str) -> None:
    """A run in which rank 1 was given something else."""
    other = dist.get_rank() == 1
    config = LoraDAConfig(gamma=64.0, beta=0.5 if other and what == "beta" else 0.03, process_timeout=TIMEOUT)
    samples = make_samples(12, seed=2 if other and what == "data" else 1)
    model = make_tiny_llama(num_hidden_layers=1)
    if other and what == "weights":
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[3, 3] += 1e-3  # type: ignore[union-attr, index, operator]
    if other and what == "version":
        agreement.version = lambda name: "0.0"
    lora = LoraConfig(r=3 if other and what == "layer" else 2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    lora_da_core.build_pipeline(config=config).run(model, make_batches(samples), lora)


DIFFERENCES = {
    "beta": "its config.beta is 0.5, rank 0's 0.03",
    "data": "its data is '",
    "weights": "its weights is '",
    "version": "its versions.peft is '0.0'",
    "layer": "its layer.model.layers.0.self_attn.q_proj is [",
}


def every_difference() -> dict[str, str]:
    """The error of each, in one process group."""
    found = {}
    for what in DIFFERENCES:
        kept = agreement.version
        try:
            disagree(what)
        except lora_da_core.RankError as error:
            found[what] = str(error)
        agreement.version = kept
    return found


def test_ranks_that_were_told_different_things_do_not_begin(worlds: Worlds) -> None:
    for errors in worlds.run(2, every_difference):
        for what, difference in DIFFERENCES.items():
            assert errors[what].startswith("rank 1 of 2 does not agree with rank 0 on what to do: its "), errors
            assert difference in errors[what]


def come_late(place: str) -> str:
    """Rank 1 lives but does not come: to the run at all, or to the end of a pass."""
    late = dist.get_rank() == 1
    try:
        if late and place == "start":
            time.sleep(5)
        with joined(4.0) as world:
            if late and place == "sums":
                time.sleep(5)
            world.exchange("sums", None)
    except lora_da_core.RankError as error:
        return str(error)
    return ""


def test_a_rank_that_lives_but_does_not_come_is_named(worlds: Worlds) -> None:
    started = {place: worlds.start(2, come_late, place) for place in ("start", "sums")}
    for place, number in started.items():
        for found in worlds.values(number):
            assert found.startswith(f"rank 1 of 2 did not reach {place!r} within 4 s")


def out_of_step() -> str:
    try:
        with joined(TIMEOUT) as world:
            world.exchange("here" if world.rank == 0 else "there", None)
    except lora_da_core.RankError as error:
        return str(error)
    return ""


def fault_between_batches() -> tuple[int, str]:
    """Rank 1 fails at once, rank 0 has many batches to go and hears of it at the next."""
    done = 0
    try:
        with joined(TIMEOUT) as world:
            if world.rank == 1:
                raise ValueError("out of luck")
            watched = world.watched(None)
            assert watched is not None
            for done in range(1000):
                time.sleep(0.02)
                watched("statistics", done, 1000)
    except (lora_da_core.RankError, ValueError) as error:
        return done, str(error)
    return done, ""


def several() -> list[Any]:
    return [out_of_step(), fault_between_batches()]


def test_ranks_out_of_step_and_faults_between_batches(worlds: Worlds) -> None:
    first, second = worlds.run(2, several)
    assert first[0] == second[0] == "rank 1 of 2 is at 'there' where rank 0 is at 'here': it was started differently"
    assert first[1][0] < 500 and first[1][1] == "rank 1 of 2 failed: ValueError: out of luck"


def die_between_batches() -> str:
    """Rank 1 dies while rank 0 is at work and waits for nobody."""
    try:
        with joined(TIMEOUT) as world:
            if world.rank == 1:
                die()
            watched = world.watched(None)
            assert watched is not None
            for done in range(10 * PATIENCE):
                time.sleep(0.1)
                watched("statistics", done, 10 * PATIENCE)
    except lora_da_core.RankError as error:
        return str(error)
    return ""


def test_a_rank_that_dies_is_missed_before_anyone_waits_for_it(worlds: Worlds) -> None:
    first, _ = worlds.endings(worlds.start(2, die_between_batches))
    assert first.value.startswith("rank 1 of 2 was killed or lost: no sign of life for 4 s, at 'statistics'")


def lose_the_store() -> None:
    with joined(TIMEOUT) as world:
        if world.rank == 0:
            die()
        world.exchange("sums", None)


def test_a_store_that_goes_with_rank_0_is_named(worlds: Worlds) -> None:
    _, second = worlds.endings(worlds.start(2, lose_the_store, kept_by_rank_0=True))
    assert second.error.startswith("RankError: rank 0, or the launcher, which keeps the store, of the process group")
    assert second.seconds < NOTICED
