"""What the processes of a run tell each other through torch's store: small values, faults, and signs of life."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lora_da_core.errors import RankError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

LONGEST_SILENCE = 30.0
"""Seconds without a sign of life after which a process counts as killed; a tenth of the timeout where that is less."""

BEATS = 5
"""Signs of life that a process gives in the time after which it would count as killed."""

LOOKS = 20
"""How often a process listens for the others in the time after which one would count as killed."""

FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.05
"""Seconds between two looks at the store, from the first of a wait on."""


class RollCall:
    """A meeting place that never waits for a process which is gone.

    A thread of every process gives signs of life and listens for those of the others; that one has fallen silent is a
    fault like those that processes report of themselves. Whoever waits looks for what it waits for and for a fault;
    the first is everybody's. A process that does not look, since it waits in a collective of others' making, is freed.

    Args:
        store: The process group's, under a prefix of this run.
        rank: This process.
        size: How many there are.
        timeout: Seconds that a process waits for the others at most.
        free: Ends collectives that another process will never come to; called from a thread, once, where this process
            has not looked for a fault for as long as it would take to count as killed.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float, free: Callable[[], None]) -> None:
        self._store, self._rank, self._size, self.timeout, self._free = store, rank, size, timeout, free
        self.silence = min(LONGEST_SILENCE, timeout / 10)
        self.freed = False
        self._count = 0
        self._last_look = 0.0
        self._phase = ""
        self._lost: set[int] = set()
        self._leaves = False
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._live, name="lora-da signs of life", daemon=True)

    def start(self) -> None:
        """Gives the first sign of life, and goes on giving them."""
        with self._reached():
            self._store.set(f"beat/{self._rank}", "0")
            # One per thread: a store serves one caller at a time.
            self._own: Store = self._store.clone()  # type: ignore[attr-defined]  # its stub forgets it
        self._heart.start()

    def exchange(self, phase: str, value: Any) -> list[Any]:
        """Every process's value, by rank; nobody goes on before all have given theirs.

        Args:
            phase: What for; all must be in the same.
            value: JSON-representable, and small.

        Returns:
            The values as JSON gives them back.

        Raises:
            RankError: Another process failed, fell silent, did not come in time, or is in another phase.
        """
        number, self._count, self._phase = self._count, self._count + 1, phase
        names = [f"{number}/{rank}" for rank in range(self._size)]
        with self._reached():
            self._store.set(names[self._rank], json.dumps([phase, value]))
            self._wait(names, phase)
            # A process that comes late finds the values of one that has given up.
            self._look_for_fault()
            told = [json.loads(text) for text in self._store.multi_get(names)]
            if number:
                # All have come this far, so all have read what came before.
                self._store.delete_key(f"{number - 1}/{self._rank}")
        for rank, (theirs, _) in enumerate(told):
            if theirs != told[0][0]:
                self._fail(rank, f"is at {theirs!r} where rank 0 is at {told[0][0]!r}: it was started differently")
        return [each for _, each in told]

    def look(self, phase: str) -> None:
        """Stops this process if another has failed or fallen silent; cheap enough for every batch.

        Args:
            phase: Where this process is.

        Raises:
            RankError: Another process has failed or fallen silent.
        """
        now, self._phase = time.monotonic(), phase
        if now - self._last_look >= LONGEST_PAUSE:
            self._last_look = now
            with self._reached():
                self._look_for_fault()

    def report(self, error: BaseException) -> None:
        """Tells the others that this process failed, unless another has failed before.

        Args:
            error: Why.
        """
        text = f"failed: {type(error).__name__}: {error}" if str(error) else f"failed: {type(error).__name__}"
        # What this process raises is the error itself.
        with contextlib.suppress(RankError), self._reached():
            _tell(self._store, self._rank, text)

    def wait_for(self, done: Callable[[], bool], phase: str) -> None:
        """Waits for a collective, unless a process that takes part has failed or fallen silent.

        Args:
            done: Whether it has ended, in whatever way.
            phase: Which collective.

        Raises:
            RankError: Another process failed or fell silent, or the time is over.
        """
        until, pause, self._phase = time.monotonic() + self.timeout, FIRST_PAUSE, phase
        while not done():
            with self._reached():
                self._look_for_fault()
            if time.monotonic() > until:
                self._fail(
                    self._rank, f"could not complete {phase!r} within {self.timeout:g} s though every rank lives"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def explain(self, phase: str, error: Exception) -> None:
        """Finds out whose fault it is that a collective failed; always raises.

        Args:
            phase: Which collective.
            error: What it raised here.

        Raises:
            RankError: Names the process that failed or fell silent.
        """
        self.await_fault()
        self._fail(self._rank, f"could not complete {phase!r} though every process lives: {error}")

    def await_fault(self) -> None:
        """Gives another process the time that it takes to be missed, or to say that it failed.

        Raises:
            RankError: It was another's fault.
        """
        until = time.monotonic() + self.silence * (1 + 2 / BEATS)
        while time.monotonic() < until:
            with self._reached():
                self._look_for_fault()
            time.sleep(LONGEST_PAUSE)

    def leave(self) -> None:
        """Ends the signs of life, after the others have had time to hear of a fault: one of them may keep the store."""
        self._leaves = True
        # The store's keeper may have left already.
        with contextlib.suppress(RankError), self._reached():
            self._store.set(f"left/{self._rank}", "")
            until, pause = time.monotonic() + self.silence, FIRST_PAUSE
            names = [f"left/{rank}" for rank in self._others if rank not in self._lost]
            while time.monotonic() < until and not self._store.check(names):
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self._ended.set()
        if self._heart.is_alive():
            self._heart.join()

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    def _live(self) -> None:
        """The thread: signs of life, those of the others, and what to do where this process hears of no fault."""
        turn, pause = 0, self.silence / LOOKS
        quiet: dict[int, tuple[bytes, float]] = {}
        last, faulty = time.monotonic(), 0.0
        while not self._ended.wait(pause):
            turn, now = turn + 1, time.monotonic()
            # Where this process itself was held up, the others had no chance to be heard.
            passed, last = min(now - last, 2 * pause), now
            if not faulty:
                try:
                    if turn % (LOOKS // BEATS) == 0:
                        self._own.set(f"beat/{self._rank}", str(turn))
                    self._listen(quiet, passed)
                    faulty = now if self._own.check(["fault"]) else 0.0
                except RuntimeError:  # whoever looks will find the store gone, and say so
                    faulty = now
            elif now - faulty > self.silence and not self.freed and not self._leaves:
                self.freed = True
                self._free()

    def _listen(self, quiet: dict[int, tuple[bytes, float]], passed: float) -> None:
        """Reports the processes that have given no sign of life for too long."""
        names = [f"beat/{rank}" for rank in self._others]
        # One that has not yet started gives none.
        everyone = self._own.check(names)
        started = [rank for rank in self._others if everyone or self._own.check([f"beat/{rank}"])]
        beats = self._own.multi_get([f"beat/{rank}" for rank in started]) if started else []
        for rank, beat in zip(started, beats, strict=True):
            before, silent = quiet.get(rank, (beat, 0.0))
            quiet[rank] = beat, silent + passed if beat == before else 0.0
            if quiet[rank][1] > self.silence:
                text = f"was killed or lost: no sign of life for {self.silence:g} s, at {self._phase!r}"
                _tell(self._own, rank, text, lost=True)

    def _wait(self, names: list[str], phase: str) -> None:
        until, pause = time.monotonic() + self.timeout, FIRST_PAUSE
        while not self._store.check(names):
            self._look_for_fault()
            if time.monotonic() > until:
                missing = [rank for rank in self._others if not self._store.check([names[rank]])]
                if missing:
                    hint = "is it waiting for something, or was only part of the ranks started?"
                    self._fail(missing[0], f"did not reach {phase!r} within {self.timeout:g} s; {hint}")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _look_for_fault(self) -> None:
        if self._store.check(["fault"]):
            self._raise(json.loads(self._store.get("fault")))

    def _fail(self, rank: int, text: str) -> None:
        with self._reached():
            first = _tell(self._store, rank, text)
        self._raise(first)

    def _raise(self, fault: Any) -> None:
        if fault["lost"]:
            self._lost.add(fault["rank"])
        raise RankError(f"rank {fault['rank']} of {self._size} {fault['text']}")

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """What the store raises means that it is gone, and its keeper with it."""
        try:
            yield
        except RuntimeError as error:
            keeper = "rank 0, or the launcher, which keeps the store,"
            raise RankError(f"{keeper} of the process group cannot be reached: {str(error).splitlines()[0]}") from error


def _tell(store: Store, rank: int, text: str, *, lost: bool = False) -> Any:
    """Reports a fault; gives the one that all processes are told, the first."""
    fault = json.dumps({"rank": rank, "text": text, "lost": lost})
    return json.loads(store.compare_set("fault", "", fault))
