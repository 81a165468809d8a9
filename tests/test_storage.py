"""A run's directory is there completely or not at all."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lora_da_core import LayerReport, RunReport, StorageError, storage

LAYER = LayerReport(
    name="block",
    in_features=4,
    out_features=3,
    rank=2,
    tokens=10,
    sigma=0.5,
    ritz_values=(-1.0, -0.5),
    gap=float("nan"),
    residual=1e-9,
    converged=True,
    solver="eigh",
    applies=1,
    damping={"input": 0.1},
    remedies=("more damping",),
    gradient={},
    seconds=0.1,
    digest_A="a",
    digest_B="b",
)
REPORT = RunReport(
    layers=(LAYER,),
    components={"solver": "eigh"},
    options={"solver": {}},
    config={"alpha": 1.0},
    samples=3,
    label_tokens=9,
    loss=1.5,
    scale={"gamma": 1024.0},
    seconds={"solve": 0.1},
    notes=("a note",),
    versions={"torch": "2"},
    base="f",
)


def write_file(directory: str) -> None:
    (Path(directory) / "adapter_model.safetensors").write_bytes(b"weights")


def fail(directory: str) -> None:
    write_file(directory)
    raise OSError(28, "No space left on device")


def test_round_trip(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    storage.save_run(target, write_file, REPORT, settings={"model": "m"})
    found = storage.read_report(target)
    assert dataclasses.replace(found.layers[0], gap=0.0) == dataclasses.replace(LAYER, gap=0.0)
    assert found.layers[0].gap != found.layers[0].gap
    assert dataclasses.replace(found, layers=()) == dataclasses.replace(REPORT, layers=())
    assert storage.read_settings(target) == {"model": "m"}
    assert sorted(path.name for path in target.parent.iterdir()) == ["run"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"):
        storage.save_run(tmp_path / "run", fail, REPORT, settings={})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_earlier_run(tmp_path: Path) -> None:
    storage.save_run(tmp_path / "run", write_file, REPORT, settings={"run": 1})
    with pytest.raises(StorageError):
        storage.save_run(tmp_path / "run", fail, REPORT, settings={"run": 2}, overwrite=True)
    assert storage.read_settings(tmp_path / "run") == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_places_that_take_no_directory_are_refused_before_work(tmp_path: Path) -> None:
    """Permissions do not tell: root may write anywhere that the kernel lets it."""
    for place in (Path("/proc/lora-da"), Path("/proc/lora-da/run")):
        with pytest.raises(
            StorageError, match=rf"^{place} cannot be created: /proc is not writable; give another directory\.$"
        ):
            storage.check_output(place, overwrite=False)
    with pytest.raises(StorageError, match=r"^/proc/self/fd is not writable; give another directory"):
        storage.check_output(Path("/proc/self/fd"), overwrite=True)
    storage.check_output(tmp_path / "a" / "b", overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_to_nothing_is_refused_before_work(tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(StorageError, match=r"link is a link to what does not exist; give a directory\.$"):
        storage.check_output(tmp_path / "link", overwrite=True)


def test_overwriting_must_be_asked_for_and_only_replaces_runs(tmp_path: Path) -> None:
    storage.save_run(tmp_path / "run", write_file, REPORT, settings={"run": 1})
    with pytest.raises(StorageError, match="--overwrite"):
        storage.save_run(tmp_path / "run", write_file, REPORT, settings={"run": 2})
    storage.save_run(tmp_path / "run", write_file, REPORT, settings={"run": 2}, overwrite=True)
    assert storage.read_settings(tmp_path / "run") == {"run": 2}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="no earlier run"):
        storage.check_output(foreign, overwrite=True)
    with pytest.raises(StorageError, match="is a file"):
        storage.check_output(foreign / "thesis.txt", overwrite=True)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"layers": []}', "[" * 100_000], ids=["empty", "cut", "list", "fields", "deep"]
)
def test_a_damaged_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / storage.REPORT_FILE).write_text(text)
    with pytest.raises(StorageError):
        storage.read_report(tmp_path)


def test_a_missing_report_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="lora-da init"):
        storage.read_report(tmp_path)


def test_ctrl_c_between_the_two_renames_keeps_the_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.save_run(tmp_path / "run", write_file, REPORT, settings={"run": 1})
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.save_run(tmp_path / "run", write_file, REPORT, settings={"run": 2}, overwrite=True)
    assert storage.read_settings(tmp_path / "run") == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_under_safetensors_is_a_storage_error(tmp_path: Path) -> None:
    def full(directory: str) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        storage.save_run(tmp_path / "run", full, REPORT, settings={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("again", [False, True], ids=["new", "replacing"])
def test_everything_is_on_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """What a failing machine would lose, and a killed process would not: what was written but not flushed."""
    target, flush, rename, steps = tmp_path / "run", os.fsync, Path.rename, []
    if again:
        storage.save_run(target, write_file, REPORT, settings={})

    def flushed(descriptor: int) -> None:
        flush(descriptor)
        steps.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def renamed(self: Path, other: Path) -> Path:
        steps.append(("rename", self))
        return rename(self, other)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    storage.save_run(target, write_file, REPORT, settings={}, overwrite=again)
    (*before, (_, fresh), last) = steps
    there = {fresh, *(fresh / path.name for path in target.iterdir())}
    assert len(there) == 4 and there <= {path for kind, path in before if kind == "flush"}
    assert ([step for step in before if step[0] == "rename"] == [("rename", target)]) == again
    assert last == ("flush", tmp_path)
