"""How much memory a phase takes at its peak, on the host and on an accelerator."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Final

import torch

INTERVAL: Final = 0.002
"""Seconds between two looks at the resident set."""

_STATM: Final = Path("/proc/self/statm")
_MEMINFO: Final = Path("/proc/meminfo")


class PeakMemory:
    """Growth of memory within a `with` block: the accelerator's allocations there, the resident set on the host.

    What earlier work freed is given back to the system first, so that it does not hide what this block takes.

    Attributes:
        peak: Most bytes above the start, ≥ 0.
        kept: Bytes above the start at the end, ≥ 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = self.kept = 0
        self._start = self._most = 0
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        release_unused()
        self._start = self._most = resident_bytes()
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._most = torch.cuda.max_memory_allocated(self.device)
            end = torch.cuda.memory_allocated(self.device)
        else:
            self._look()
            self._stop.set()
            self._watcher.join()
            release_unused()
            end = resident_bytes()
        self.peak, self.kept = max(0, self._most - self._start), max(0, end - self._start)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self._most = max(self._most, resident_bytes())


def resident_bytes() -> int:
    """Resident set of this process; where the system does not tell it, the most it ever was."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def release_unused() -> None:
    """Asks the C library to give freed memory back to the system, where it has a call for that."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def available_bytes(device: torch.device) -> int:
    """Memory that may still be taken on a device; half of the machine's where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 2**33
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
