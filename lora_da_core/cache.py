"""Statistics that outlive a process: stored under what they were made from, and used only where nothing differs."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_da_core import storage
from lora_da_core.cache_identity import MISSING, Identity, differing, digest_of
from lora_da_core.capture import CaptureTask
from lora_da_core.errors import StorageError
from lora_da_core.estimation import Estimates, check_tokens
from lora_da_core.interfaces import Accumulator
from lora_da_core.running_sums import InputGroup, LayerStatistics, Statistics, StoredSums, SumsByLayer
from lora_da_core.types import Batch

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
TENSORS_FILE = "statistics.safetensors"
LARGEST_MANIFEST = 2**26
"""Bytes of the largest manifest that is read."""
NEAR = 3
"""Most fields in which an entry may differ to be worth naming."""


class StatisticsCache:
    """A directory of statistics, one entry per identity, shared by any number of processes.

    An entry is a directory that appears complete, by a rename. One lock per identity makes a second process wait for
    the first instead of computing the same. What is damaged is moved aside, never used and never deleted.

    Args:
        directory: Where the entries are; made when needed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()

    def check(self) -> None:
        """Refuses a directory that cannot be written, before any work.

        Raises:
            StorageError: It is a file, or cannot be made or written.
        """
        storage.check_writable(self._directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"the cache {self._directory} cannot be made: {error}") from error

    def estimates(
        self, identity: Identity, task: CaptureTask, batches: Sequence[Batch], compute: Callable[[], Estimates]
    ) -> Estimates:
        """The stored estimates, or those that `compute` makes, which are then stored.

        Args:
            identity: Of what `compute` would make.
            task: What the estimates belong to from now on.
            batches: The batches that were or would be read.
            compute: Makes the estimates.

        Returns:
            The estimates. Where they cannot be stored, a warning says why, and the run goes on. Of the processes that
            share a run only rank 0 reads and writes, and sends what it has read.

        Raises:
            StorageError: The entry's lock cannot be had, or a damaged entry cannot be moved aside.
        """
        entry, world = self._directory / identity.key, task.world
        if world.rank:
            return _shared_out(None, task, batches) if world.exchange("cache", None)[0] else compute()
        with self._locked(entry):
            storage.settle_leftovers(entry)
            found = self._read(entry, identity, task, batches)
            world.exchange("cache", found is not None)
            if found is None:
                self._tell_nearest(identity)
                found = compute()
                self._store(entry, identity, found)
            elif world.size > 1:
                _shared_out(found, task, batches)
            return found

    @contextlib.contextmanager
    def _locked(self, entry: Path) -> Iterator[None]:
        lock = FileLock(f"{entry}.lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.warning("another run is making the same statistics; waiting for it")
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            raise StorageError(f"the cache {self._directory} cannot be locked: {error}") from error
        try:
            yield
        finally:
            lock.release()

    def _read(self, entry: Path, identity: Identity, task: CaptureTask, batches: Sequence[Batch]) -> Estimates | None:
        if not os.path.lexists(entry):
            return None
        start = time.perf_counter()
        try:
            manifest = _read_manifest(entry)
            wrong = differing(identity.fields, manifest["identity"])
            if wrong:
                raise StorageError(f"it belongs to another run, with another {', '.join(wrong)}")
            statistics, gradient_sums = _loaded(entry, manifest, task)
        except StorageError as fault:
            self._quarantine(entry, fault)
            return None
        notes = [f"the statistics were read from the cache (entry {entry.name[:12]})"]
        logger.info("%s", notes[0])
        few = check_tokens(task.specs, statistics)
        for note in few:
            logger.warning("%s", note)
        seconds = {"statistics": time.perf_counter() - start, "gradient": 0.0}
        return Estimates(task, batches, statistics, gradient_sums, (*notes, *few), seconds)

    def _quarantine(self, entry: Path, fault: StorageError) -> None:
        names = (f"{entry.name}{f'.{number}' if number else ''}.quarantined" for number in itertools.count())
        aside = next(path for path in map(entry.with_name, names) if not os.path.lexists(path))
        try:
            entry.rename(aside)
        except OSError as error:
            raise StorageError(f"{entry} cannot be used ({fault}) and cannot be moved aside: {error}") from error
        logger.warning("cache entry %s cannot be used and was moved to %s: %s", entry.name[:12], aside, fault)

    def _tell_nearest(self, identity: Identity) -> None:
        """Says in what the most similar entry differs, so that a miss that nobody expected can be explained."""
        nearest: tuple[int, list[str], str] | None = None
        for entry in self._directory.glob("[0-9a-f]" * len(identity.key)):
            try:
                fields = _read_manifest(entry)["identity"]
            except StorageError:  # whoever asks for that entry will quarantine it
                continue
            wrong = sum(fields.get(name, MISSING) != value for name, value in identity.fields.items())
            if wrong <= NEAR and (nearest is None or wrong < nearest[0]):
                nearest = wrong, differing(identity.fields, fields), entry.name[:12]
        if nearest is not None:
            _, names, name = nearest
            logger.warning("no stored statistics fit; the nearest entry %s differs in %s", name, ", ".join(names))

    def _store(self, entry: Path, identity: Identity, found: Estimates) -> None:
        try:
            storage.replace_directory(entry, lambda fresh: _write(fresh, identity, found))
        except StorageError as error:
            logger.warning("the statistics are not kept for later runs: %s", error)


# What an entry holds


def _write(directory: Path, identity: Identity, found: Estimates) -> None:
    """The tensors under numbers, and the manifest that says what each is and guards both files with SHA-256."""
    sums = found.statistics
    layers, tensors = [], []
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()

    def add(role: str, layer: str, values: Mapping[str, Tensor]) -> None:
        for key, value in values.items():
            beside_weights = value.device.type == found.task.device_of(layer).type
            tensors.append([role, layer, key, beside_weights])
            stored[str(len(stored))] = _storable(value, f"{key} of layer {layer}", storages)

    groups: dict[str, InputGroup] = {}
    for name, layer in sums.layers.items():
        if layer.group is None:  # an expert that no token was routed to
            continue
        groups[layer.group.leader] = layer.group
        layers.append([name, layer.group.leader, layer.tokens])
        add("layer", name, layer.fisher.statistics())
    for leader, group in groups.items():
        add("input", leader, group.accumulator.statistics())
    for name, values in found.gradient_sums.items():
        add("gradient", name, values)
    save_file(stored, directory / TENSORS_FILE)
    manifest = {
        "identity": identity.fields,
        "layers": layers,
        "tensors": tensors,
        "counts": sums.counts,
        "tensors_sha256": storage.file_digest(directory / TENSORS_FILE),
    }
    storage.write_json(directory / MANIFEST_FILE, {**manifest, "manifest_sha256": digest_of(manifest)})


def _storable(value: Tensor, what: str, storages: set[int]) -> Tensor:
    """The tensor on the CPU, contiguous, in memory that no other stored tensor uses: what safetensors asks for."""
    if value.layout != torch.strided:
        raise StorageError(f"{what} is not a dense tensor")
    stored = value.detach().cpu().contiguous()
    if stored.untyped_storage().data_ptr() in storages:
        stored = stored.clone()
    storages.add(stored.untyped_storage().data_ptr())
    return stored


def _read_manifest(entry: Path) -> dict[str, Any]:
    """The manifest of an entry.

    Raises:
        StorageError: There is none, or it is not as it was written.
    """
    path = entry / MANIFEST_FILE
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise StorageError(f"{MANIFEST_FILE} is larger than any that is written")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{MANIFEST_FILE} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise StorageError(f"{MANIFEST_FILE} is not a manifest of statistics")
    if manifest.pop("manifest_sha256", None) != digest_of(manifest):
        raise StorageError(f"{MANIFEST_FILE} is not as it was written")
    return manifest


def _loaded(
    entry: Path, manifest: Mapping[str, Any], task: CaptureTask
) -> tuple[Statistics, Mapping[str, Mapping[str, Tensor]]]:
    """The statistics and gradient sums of an entry, on the devices where they were, or where the task keeps them.

    Raises:
        StorageError: The tensors are missing, or not those that were written.
    """
    path = entry / TENSORS_FILE
    sums: dict[str, dict[str, Accumulator]] = {"input": {}, "layer": {}, "gradient": {}}
    try:
        if storage.file_digest(path) != manifest["tensors_sha256"]:
            raise StorageError(f"{TENSORS_FILE} is not as it was written")
        with safe_open(path, framework="pt") as file:
            numbered = enumerate(manifest["tensors"])
            for (role, layer), entries in itertools.groupby(numbered, lambda entry: (entry[1][0], entry[1][1])):
                values = {}
                for number, (_, _, key, beside_weights) in entries:
                    device = task.device_of(layer) if beside_weights else torch.device("cpu")
                    # Copies in torch's own memory: products of numbers read in place may round differently.
                    values[key] = file.get_tensor(str(number)).to(device, copy=True)
                sums[role][layer] = task.kept(StoredSums(values))
        statistics = _assembled(task, sums, manifest["layers"], manifest["counts"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{TENSORS_FILE} cannot be read: {type(error).__name__}: {error}") from error
    # An estimator may keep nothing of a layer.
    return statistics, SumsByLayer({name: sums["gradient"].get(name, StoredSums({})) for name in statistics.layers})


def _assembled(
    task: CaptureTask,
    sums: Mapping[str, Mapping[str, Accumulator]],
    described: Sequence[tuple[str, str, int]],
    counts: Mapping[str, Any],
) -> Statistics:
    """Statistics from sums by role and layer, and from each layer's name, first reader of its input, and tokens."""
    leaders = {leader for _, leader, _ in described}
    groups = {leader: InputGroup(leader, sums["input"].get(leader, StoredSums({}))) for leader in leaders}
    specs = {spec.name: spec for spec in task.specs}
    layers = {
        name: LayerStatistics(specs[name], sums["layer"].get(name, StoredSums({})), None, groups[leader], tokens)
        for name, leader, tokens in described
    }
    return Statistics(layers, **counts)


def _shared_out(found: Estimates | None, task: CaptureTask, batches: Sequence[Batch]) -> Estimates:
    """The estimates that rank 0 has read, sent to the other processes, which give None."""
    world, outline = task.world, None
    own: dict[str, Mapping[str, Mapping[str, Tensor]]] = {"input": {}, "layer": {}, "gradient": {}}
    if found is not None:
        sums = found.statistics
        leaders = sums.leaders()
        outline = {
            "layers": [[name, leaders[name], layer.tokens] for name, layer in sums.layers.items()],
            "counts": sums.counts,
            "notes": found.notes,
            "seconds": found.seconds,
        }
        own["layer"] = SumsByLayer({name: layer.fisher for name, layer in sums.layers.items()})
        own["gradient"] = found.gradient_sums
        groups = [layer.group for layer in sums.layers.values() if layer.group is not None]
        own["input"] = SumsByLayer({group.leader: group.accumulator for group in groups})
    told = world.exchange("stored statistics", outline)[0]
    names = [name for name, _, _ in told["layers"]]
    wanted = {"input": sorted({leader for _, leader, _ in told["layers"]}), "layer": names, "gradient": names}

    def sent(role: str, name: str) -> Accumulator:
        values = world.broadcast(f"{role} sums of {name}", own[role].get(name, {}), 0, task.device_of(name))
        return task.kept(StoredSums(values))

    taken = {role: {name: sent(role, name) for name in layers} for role, layers in wanted.items()}
    statistics = _assembled(task, taken, told["layers"], told["counts"])
    gradients = SumsByLayer(taken["gradient"])
    return Estimates(task, batches, statistics, gradients, tuple(told["notes"]), told["seconds"])
