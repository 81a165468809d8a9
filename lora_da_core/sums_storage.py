"""Where sums lie between updates: beside the layer, in the host's memory, or in a file that no ending leaves behind."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_da_core.errors import StorageError
from lora_da_core.interfaces import Accumulator
from lora_da_core.types import FisherStatistics, StatisticsDevice


class SumsStorage(ABC):
    """A place for the tensors of accumulators while nobody updates or reads them."""

    @abstractmethod
    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is better kept here."""

    @abstractmethod
    def put(self, content: Tensor, place: Any) -> Any:
        """Stores bytes.

        Args:
            content: (bytes,), uint8, on any device.
            place: What an earlier `put` of the same tensor returned; None for a new one.

        Returns:
            Where they are now.
        """

    @abstractmethod
    def get(self, content: Tensor, place: Any) -> None:
        """Fills `content`, (bytes,), uint8, with what `put` stored at a place."""

    def keep(self, accumulator: Accumulator) -> Accumulator:
        """The accumulator, with its sums here between updates."""
        return OffloadedSums(accumulator, self)


class HostStorage(SumsStorage):
    """The host's memory, pinned where CUDA copies from it."""

    def takes(self, tensor: Tensor) -> bool:
        return tensor.device.type != "cpu"

    def put(self, content: Tensor, place: Any) -> Any:
        if place is None or place.numel() != content.numel():
            place = torch.empty(content.numel(), dtype=torch.uint8, pin_memory=content.is_cuda)
        # One stream copies there and back in order, and nobody on the host reads it: there is nothing to wait for.
        return place.copy_(content, non_blocking=content.is_cuda)

    def get(self, content: Tensor, place: Any) -> None:
        content.copy_(place, non_blocking=content.is_cuda)


class DiskStorage(SumsStorage):
    """A file without a name, so that the system frees it however the process ends.

    Args:
        directory: On which file system; None takes the system's temporary directory.
        expected: Bytes that will lie there, as far as they are known.

    Raises:
        StorageError: No file can be made there, or less is free than is expected.
    """

    def __init__(self, directory: Path | str | None = None, expected: int = 0) -> None:
        self._directory = Path(tempfile.gettempdir() if directory is None else directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._directory).free
            if free < expected:
                raise OSError(f"{expected / 1024**3:.1f} GiB are wanted and {free / 1024**3:.1f} GiB are free")
            with tempfile.TemporaryFile(dir=self._directory) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise self._fault("be written", error) from error
        weakref.finalize(self, os.close, self._file)
        self._lock = threading.Lock()  # a backward pass over several devices has a thread for each
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def takes(self, tensor: Tensor) -> bool:
        return True

    def put(self, content: Tensor, place: Any) -> Any:
        region: _Region = place
        if region is None or region.capacity < content.numel():
            # What has grown once will grow again.
            region = self._region(content.numel() if region is None else 1 << (content.numel() - 1).bit_length())
        left, offset = content.cpu().numpy().data, region.offset
        try:
            while left:
                written = os.pwrite(self._file, left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            raise self._fault("be written", error) from error
        return region

    def get(self, content: Tensor, place: Any) -> None:
        here = content if content.device.type == "cpu" else torch.empty(content.numel(), dtype=torch.uint8)
        left, offset = here.numpy().data, place.offset
        try:
            while left:
                read = os.preadv(self._file, [left], offset)
                if not read:
                    raise OSError("the file has lost its end")
                left, offset = left[read:], offset + read
        except OSError as error:
            raise self._fault("be read again", error) from error
        if here is not content:
            content.copy_(here)

    def _region(self, capacity: int) -> _Region:
        with self._lock:
            freed = self._free.get(capacity)
            offset = freed.pop() if freed else self._end
            self._end = max(self._end, offset + capacity)
        region = _Region(offset, capacity)
        weakref.finalize(region, self._release, offset, capacity)
        return region

    def _release(self, offset: int, capacity: int) -> None:
        with self._lock:
            self._free.setdefault(capacity, []).append(offset)

    def _fault(self, what: str, error: OSError) -> StorageError:
        return StorageError(
            f"statistics cannot {what} in {self._directory}: {error.strerror or error}. Give another directory as "
            "offload_dir (--offload-dir), or another statistics_device."
        )


def storage_at(place: StatisticsDevice, directory: Path | str | None = None, expected: int = 0) -> SumsStorage | None:
    """The storage of a place.

    Args:
        place: As `LoraDAConfig.statistics_device` names it.
        directory: As `DiskStorage` takes it.
        expected: As `DiskStorage` takes it.

    Returns:
        The storage; None where sums stay on their layers' devices.

    Raises:
        StorageError: As `DiskStorage`.
    """
    if place == "disk":
        return DiskStorage(directory, expected)
    return HostStorage() if place == "host" else None


@dataclass(frozen=True, eq=False)
class _Region:
    """A part of the file."""

    offset: int
    capacity: int


@dataclass(frozen=True, eq=False)
class _Away:
    """A tensor that is stored: a meta tensor stands in its place."""

    stand_in: Tensor
    device: torch.device
    place: Any

    def fetched(self, storage: SumsStorage) -> Tensor:
        like = self.stand_in
        found = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.device)
        storage.get(_content(found), self.place)
        return found


@dataclass(frozen=True, eq=False)
class _Here:
    """A tensor that was fetched, and its version then."""

    tensor: Tensor
    version: int
    away: _Away


class OffloadedSums(Accumulator):
    """An accumulator whose tensors lie in a storage but while it takes tokens or is asked for its sums.

    Its arithmetic is that of the accumulator itself, on the same device, so its sums are too, bit by bit. Tensors are
    found as attributes of the accumulator and in its lists, tuples and dicts; one that shares its memory stays.
    """

    def __init__(self, accumulator: Accumulator, storage: SumsStorage) -> None:
        self._inner, self._storage = accumulator, storage
        self._away: list[_Away] = []
        self._send([])

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        here = self._fetch()
        self._inner.update(inputs, output_grads, example)
        self._send(here)

    def merge(self, other: Mapping[str, Tensor]) -> None:
        here = self._fetch()
        self._inner.merge(other)
        self._send(here)

    def end_pass(self, index: int, merged: FisherStatistics) -> None:
        here = self._fetch()
        self._inner.end_pass(index, merged)
        self._send(here)

    def statistics(self) -> dict[str, Tensor]:
        """The sums so far, in copies on their devices."""
        here = self._fetch()
        found = self._inner.statistics()
        # A sketch may tidy up before it answers; what it leaves as it was need not be written again.
        self._send(here, same={id(each.tensor) for each in here if each.tensor._version == each.version})
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedSums:
        here = self._fetch()
        twin = copy.deepcopy(self._inner, memo)
        self._send(here, same={id(each.tensor) for each in here})
        return OffloadedSums(twin, self._storage)

    def _fetch(self) -> list[_Here]:
        found = {id(away.stand_in): away.fetched(self._storage) for away in self._away}
        _replace_tensors(self._inner, lambda tensor: found.get(id(tensor), tensor))
        here = [_Here(found[id(away.stand_in)], found[id(away.stand_in)]._version, away) for away in self._away]
        self._away = []
        return here

    def _send(self, here: Iterable[_Here], same: Iterable[int] = ()) -> None:
        """Stores what can be: of tensors that were fetched in the places they had, but those that are the `same`."""
        known, same = {id(each.tensor): each.away for each in here}, set(same)
        stand_ins: dict[int, Tensor] = {}
        for tensor in _movable(self._inner, self._storage):
            old = known.get(id(tensor))
            if old is None or id(tensor) not in same:
                place = self._storage.put(_content(tensor), None if old is None else old.place)
                old = _Away(
                    torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"),
                    tensor.device,
                    place,
                )
            self._away.append(old)
            stand_ins[id(tensor)] = old.stand_in
        _replace_tensors(self._inner, lambda tensor: stand_ins.get(id(tensor), tensor))


def _content(tensor: Tensor) -> Tensor:
    """All bytes of a tensor without gaps, in the order of its memory, (bytes,), uint8."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _movable(accumulator: Accumulator, storage: SumsStorage) -> list[Tensor]:
    """The tensors of an accumulator that nothing else in it shares memory with, and that fill theirs."""
    found: dict[int, Tensor] = {}

    def look(tensor: Tensor) -> Tensor:
        found[id(tensor)] = tensor
        return tensor

    _replace_tensors(accumulator, look)
    plain = [each for each in found.values() if type(each) is Tensor and each.layout == torch.strided]
    owners: dict[int, int] = {}
    for tensor in plain:
        key = tensor.untyped_storage()._cdata
        owners[key] = owners.get(key, 0) + 1
    return [
        tensor
        for tensor in plain
        if not tensor.is_meta
        and 0 < tensor.nbytes == tensor.untyped_storage().nbytes()
        and owners[tensor.untyped_storage()._cdata] == 1
        and storage.takes(tensor)
    ]


def _replace_tensors(accumulator: Accumulator, new: Callable[[Tensor], Tensor]) -> None:
    """Puts `new` of every tensor in its place: attributes, and what is in lists, tuples and dicts among them."""
    attributes = vars(accumulator)
    attributes.update({name: _replaced(value, new) for name, value in attributes.items()})


# Not within the function above: one that calls itself there would keep the tensors until garbage is collected.
def _replaced(value: Any, new: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return new(value)
    if type(value) is tuple:
        return tuple(_replaced(each, new) for each in value)
    if isinstance(value, list):
        value[:] = [_replaced(each, new) for each in value]
    elif isinstance(value, dict):
        value.update({key: _replaced(each, new) for key, each in value.items()})
    return value
