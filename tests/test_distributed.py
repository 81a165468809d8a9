"""Processes that share a run: what they tell each other, and what each notices of another's end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lora_da_core.distributed import joined
from lora_da_core.errors import RankError
from lora_da_core.roll_call import RollCall
from process_worlds import PATIENCE, Worlds


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    found = Worlds()
    yield found
    found.kill()


def talk() -> Any:
    with joined(60) as world:
        told = world.exchange("numbers", world.rank + 0.1)
        tensors = [torch.full((3,), world.rank + 1.0), torch.ones(0), torch.full((2, 2), 2.0, dtype=torch.float64).mT]
        world.add("sums", tensors)
        sent = world.broadcast("sent", {"x": torch.arange(3) + world.rank}, 1, torch.device("cpu"))
        return told, [value.tolist() for value in tensors], sent["x"].tolist(), world.gather("all", {world.rank})


def test_processes_exchange_add_and_broadcast(worlds: Worlds) -> None:
    for found in worlds.run(3, talk):
        told, sums, sent, gathered = found
        assert told == [0.1, 1.1, 2.1] and sent == [1, 2, 3] and gathered == [{0}, {1}, {2}]
        assert sums == [[6.0] * 3, [], [[6.0] * 2] * 2]


def fail(kind: str, place: str) -> None:
    def fault(here: str) -> None:
        if dist.get_rank() == 1 and here == place:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("out of luck")

    with joined(20) as world:
        fault("before")
        world.add("sums", [torch.ones(2)])
        fault("after")


@pytest.mark.parametrize("kind", ["raised", "killed"])
def test_a_rank_that_ends_is_named_by_all(worlds: Worlds, kind: str) -> None:
    numbers = [worlds.start(3, fail, kind, place) for place in ("before", "after")]
    for number in numbers:
        endings = worlds.endings(number)
        wanted = "rank 1 of 3 failed: ValueError: out of luck" if kind == "raised" else "rank 1 of 3 was killed or lost"
        for rank in (0, 2):
            assert endings[rank].error.startswith(f"RankError: {wanted}") and endings[rank].seconds < 20
        assert endings[1].error == ("ValueError: out of luck" if kind == "raised" else "")


def test_a_process_that_waits_in_anothers_collective_is_freed_once() -> None:
    store, freed = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False), threading.Semaphore(0)
    first, second = (RollCall(store.clone(), rank, 2, 5.0, freed.release) for rank in range(2))
    first.start()
    second.start()
    assert not freed.acquire(timeout=1)
    second.report(ValueError("out of luck"))
    second.leave()
    # The first one does not look for faults, as one that waits for a collective of NCCL.
    assert freed.acquire(timeout=PATIENCE) and first.freed and not second.freed
    with pytest.raises(RankError, match="rank 1 of 2 failed: ValueError: out of luck"):
        first.look("statistics")
    assert not freed.acquire(timeout=1)
    first.leave()
