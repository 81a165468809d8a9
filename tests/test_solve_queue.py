"""Batches that are solved beside the next layers' preparation: the same results, and nothing left running."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig

import lora_da_core
from conftest import assert_same, make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, PluginError, solve_queue
from lora_da_core.memory import phases
from lora_da_core.memory.phases import LayerBytes
from lora_da_core.memory.workspace import Workspace
from lora_da_core.solving import WAITING_BYTES, LayerSolver
from test_memory import group

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
BATCHES = make_batches(make_samples())


def run() -> Any:
    return lora_da_core.build_pipeline(config=LoraDAConfig(gamma=64.0)).run(make_tiny_llama(), BATCHES, LORA)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU solves in other threads too, as an accelerator does."""
    monkeypatch.setattr(solve_queue, "batches_beside", lambda *_: 2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_solved_beside_is_what_is_solved_in_turn(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    expected, threads, solve = run(), [], LayerSolver.solve
    together = threading.Barrier(count)

    def watched(self: LayerSolver, *arguments: Any) -> Any:
        threads.append(threading.current_thread())
        if len(threads) <= count:
            # Only where so many are solved at once do they all come here.
            together.wait(timeout=60)
        return solve(self, *arguments)

    monkeypatch.setattr(LayerSolver, "solve", watched)
    monkeypatch.setattr(solve_queue, "batches_beside", lambda *_: count)
    assert_same(run(), expected)
    assert threading.main_thread() not in threads and len(set(threads)) == count
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("phase", ["solve", "prepare"])
def test_an_error_comes_out_and_nothing_is_left_running(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    calls, before = [], threading.active_count()
    real = getattr(LayerSolver, phase)

    def failing(self: LayerSolver, *arguments: Any) -> Any:
        calls.append(phase)
        if len(calls) == 3:
            raise PluginError("the third fails")
        return real(self, *arguments)

    monkeypatch.setattr(LayerSolver, phase, failing)
    with pytest.raises(PluginError, match="the third fails"):
        run()
    assert threading.active_count() == before
    monkeypatch.undo()
    run()


def test_a_plan_counts_what_is_solved_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(beside: int) -> int:
        monkeypatch.setattr(solve_queue, "batches_beside", lambda *_: beside)
        queue = phases._Queue(torch.device("cpu"), 1)
        for number in range(3):
            (layer,) = group(64, shared=number)
            workspace = Workspace(update=0, end_pass=0, prepare=7, shared=2, kept=5, solve=11)
            queue.prepare(number, LayerBytes(**{**vars(layer), "workspace": workspace}))
            queue.close(number)
        queue.solve_the_rest()
        assert queue._live == 0
        return queue.peak

    # One layer at a time: what it shares and keeps, and the solver's; beside it the next one is prepared.
    assert peak(beside=0) == 2 + 5 + 11
    assert peak(beside=1) == 2 + 5 + 11 + 7
    assert peak(beside=2) == 2 * (2 + 5 + 11) + 7


def test_where_memory_is_scarce_one_batch_is_solved_at_a_time() -> None:
    cuda = torch.device("cuda")
    assert solve_queue.batches_beside(cuda) == solve_queue.batches_beside(cuda, WAITING_BYTES) == 2
    assert solve_queue.batches_beside(cuda, WAITING_BYTES - 1) == 1
    assert solve_queue.batches_beside(torch.device("cpu")) == 0
