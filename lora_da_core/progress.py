"""Progress and notes of a run: a live display on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINES_PER_PHASE: Final = 10
"""Most lines that a phase writes where there is no terminal."""

_COUNTED: Final = {"scale": ("loss", "losses")}
"""What a phase counts of which nobody knows how many there will be: one, and more."""


class LiveProgress:
    """One bar per phase, with counts and the time that is left."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Takes what `Pipeline.run` tells; `total` is 0 where nobody knows it."""
        if phase not in self._tasks:
            self._finish_unbounded()
            self._tasks[phase] = self._bars.add_task(phase, total=total or None, bounded=total > 0)
        self._bars.update(self._tasks[phase], completed=done)

    def _finish_unbounded(self) -> None:
        for task in self._bars.tasks:
            if task.total is None:
                self._bars.update(task.id, total=task.completed)

    def close(self) -> None:
        """Ends the bars of unknown length."""
        self._finish_unbounded()


class Counts(MofNCompleteColumn):
    """`3/7`, or `3 losses` where nobody knew how many there would be."""

    def render(self, task: Task) -> Text:
        if task.fields["bounded"]:
            return super().render(task)
        return Text(_counted(task.description, int(task.completed)), style="progress.download")


@dataclass
class _Phase:
    started: float
    lines: int = 0
    pending: str = ""
    """A line that was not due yet, of a phase whose end nobody knows before it comes."""


class PlainProgress:
    """A line per tenth of a phase; where the total is unknown, at each doubling of the count, and at the end.

    Args:
        write: Takes one line.
        clock: Seconds from any origin.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._write = write
        self._clock = clock
        self._phases: dict[str, _Phase] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Takes what `Pipeline.run` tells; `total` is 0 where nobody knows it."""
        state = self._phases.setdefault(phase, _Phase(self._clock()))
        line = self._line(state, phase, done, total)
        if self._due(state, done, total):
            self._write(line)
            state.lines += 1
            state.pending = ""
        elif total == 0:
            state.pending = line

    def _line(self, state: _Phase, phase: str, done: int, total: int) -> str:
        passed = self._clock() - state.started
        if total == 0:
            return f"{phase}: {_counted(phase, done)}, {passed:.1f} s"
        if done < total and passed > 0:
            # The first step is not in `passed`: the phase was first heard of when that step had ended.
            left = f", about {passed / (done - 1) * (total - done):.0f} s left" if done > 1 else ""
            return f"{phase}: {done}/{total}{left}"
        return f"{phase}: {done}/{total}, {passed:.1f} s"

    def _due(self, state: _Phase, done: int, total: int) -> bool:
        if total == 0:
            return state.lines < LINES_PER_PHASE and done & (done - 1) == 0
        return done * LINES_PER_PHASE // total > (done - 1) * LINES_PER_PHASE // total

    def close(self) -> None:
        """Writes the last counts of phases of unknown length."""
        for state in self._phases.values():
            if state.pending:
                self._write(state.pending)


def _counted(phase: str, number: int) -> str:
    one, many = _COUNTED.get(phase, ("step", "steps"))
    return f"{number} {one if number == 1 else many}"


class _NoteHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        kind = "note" if record.levelno == logging.INFO else record.levelname.lower()
        note(self._console, record.getMessage(), kind=kind)


def note(console: Console, text: str, *, kind: str = "note") -> None:
    """Writes a sentence on a line of its own, as it is: no markup, no cutting."""
    console.print(f"{kind}: {' '.join(text.split())}", markup=False, highlight=False, soft_wrap=True)


def tell(sentences: Iterable[str]) -> None:
    """Writes notes to stderr, for a command that shows no other progress yet."""
    console = Console(stderr=True)
    for sentence in sentences:
        note(console, sentence)


@contextmanager
def shown_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a run's progress, and this package's notes and warnings as they come.

    Args:
        console: Where to write; whether it is a terminal decides how.

    Yields:
        What `Pipeline.run` takes as `on_progress`.
    """
    handler = _NoteHandler(console)
    logger = logging.getLogger("lora_da_core")
    propagate, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        if console.is_terminal:
            columns = (
                TextColumn("{task.description:<10}"),
                BarColumn(),
                Counts(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=console) as bars:
                live = LiveProgress(bars)
                yield live
                live.close()
        else:
            plain = PlainProgress(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
            yield plain
            plain.close()
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)
