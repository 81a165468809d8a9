"""Statistics kept between processes: used where nothing differs, never where anything does."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import queue
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import DataError, LoraDAConfig, LoraDAResult, OptionError, StorageError, cache_identity
from lora_da_core.cache import MANIFEST_FILE, TENSORS_FILE

Batches = list[dict[str, Tensor]]
FIXED = LoraDAConfig(gamma=64.0, damping=1.0)
BATCHES = 3
PASSES = BATCHES + 2
"""Forward passes of a run that stores statistics: a few samples are run twice before, to see whether they repeat."""


def lora(rank: int = 4, modules: Any = "all-linear") -> LoraConfig:
    return LoraConfig(r=rank, target_modules=modules, task_type="CAUSAL_LM")


def made_batches() -> Batches:
    return make_batches(make_samples())


def run(
    cache_dir: Path | None,
    *,
    model: nn.Module | None = None,
    batches: Batches | None = None,
    target: LoraConfig | None = None,
    config: LoraDAConfig = FIXED,
    **components: Any,
) -> tuple[LoraDAResult, int]:
    """The result, and how often the model ran."""
    model = make_tiny_llama() if model is None else model
    forwards: list[None] = []
    handle = model.register_forward_hook(lambda *_: forwards.append(None))
    pipeline = lora_da_core.build_pipeline(config=config, **components)
    with_batches = made_batches() if batches is None else batches
    result = pipeline.run(model, with_batches, target or lora(), cache_dir=cache_dir)
    handle.remove()
    return result, len(forwards)


def same_bytes(first: LoraDAResult, second: LoraDAResult) -> bool:
    """By the digests that the report takes of what was computed."""
    assert first.factors.keys() == second.factors.keys()
    return all(
        (mine.digest_A, mine.digest_B) == (theirs.digest_A, theirs.digest_B)
        for mine, theirs in zip(first.report.layers, second.report.layers, strict=True)
    )


def entries(cache_dir: Path) -> list[Path]:
    return sorted(path for path in cache_dir.iterdir() if len(path.name) == 64)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lora_da_core.cache"]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the statistics of one run; not to be written by tests."""
    cache_dir = tmp_path_factory.mktemp("cache")
    _, forwards = run(cache_dir)
    assert forwards == PASSES and len(entries(cache_dir)) == 1
    return cache_dir


@pytest.fixture
def copied(filled: Path, tmp_path: Path) -> Path:
    """A copy that tests may damage."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


# What is reused


@pytest.mark.parametrize(
    ("changed", "rank", "solver"),
    [
        ({}, 4, "eigh"),
        ({}, 4, "lanczos"),
        ({}, 2, "eigh"),
        ({"alpha": 0.5}, 4, "eigh"),
        ({"beta": 0.3}, 4, "eigh"),
        ({"damping": 0.1, "damping_kind": "absolute"}, 4, "eigh"),
        ({"population": 999}, 4, "eigh"),
        ({"gamma": 2.0}, 4, "eigh"),
        ({"normalize": False, "fisher_scale": "sample"}, 4, "eigh"),
        ({"seed": 5}, 4, "eigh"),
    ],
    ids=str,
)
def test_what_enters_later_needs_no_pass_and_gives_equal_bytes(
    filled: Path, changed: dict[str, Any], rank: int, solver: str
) -> None:
    settings: dict[str, Any] = {"config": dataclasses.replace(FIXED, **changed), "solver": solver, "target": lora(rank)}
    plain, forwards = run(None, **settings)
    assert forwards == PASSES
    stored, forwards = run(filled, **settings)
    assert forwards == 0 and same_bytes(plain, stored)
    assert (stored.report.loss, stored.report.label_tokens) == (plain.report.loss, plain.report.label_tokens)
    assert [layer.tokens for layer in stored.report.layers] == [layer.tokens for layer in plain.report.layers]
    assert any("read from the cache" in note for note in stored.report.notes)


def test_an_automatic_scale_runs_the_line_search_alone(filled: Path) -> None:
    config = dataclasses.replace(FIXED, gamma=None, scale="auto")
    plain, with_passes = run(None, config=config)
    stored, forwards = run(filled, config=config)
    assert forwards == with_passes - PASSES > 0 and same_bytes(plain, stored)


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [
        (("kfac", {"output": "full", "labels": "sampled"}), "full"),
        ("ekfac", "full"),
        ("diagonal", "sketched"),
        ("empirical", "full"),
        ("sketched", "full"),
        ("identity", "full"),
        (("kfac", {"output": "identity"}), ("zeroth_order", {"steps": 4, "probes": 2})),
    ],
    ids=str,
)
def test_every_estimators_sums_come_back_bit_by_bit(tmp_path: Path, estimator: Any, gradient: Any) -> None:
    parts = {"estimator": estimator, "gradient": gradient, "target": lora(2, ["q_proj", "k_proj", "down_proj"])}
    plain, _ = run(None, **parts)
    first, forwards = run(tmp_path, **parts)
    second, again = run(tmp_path, **parts)
    assert forwards > 0 and again == 0
    assert same_bytes(plain, first) and same_bytes(first, second)
    assert [layer.gradient for layer in second.report.layers] == [layer.gradient for layer in plain.report.layers]


def test_of_several_rounds_the_first_ones_statistics_are_kept(tmp_path: Path) -> None:
    config = dataclasses.replace(FIXED, gamma=None, scale="auto", rounds=2)
    plain, with_passes = run(None, config=config)
    run(tmp_path, config=config)
    stored, forwards = run(tmp_path, config=config)
    assert forwards == with_passes - PASSES and same_bytes(plain, stored)
    assert len(entries(tmp_path)) == 1


def test_a_wrapped_model_finds_its_bases_statistics(filled: Path) -> None:
    plain, _ = run(None)
    model = get_peft_model(make_tiny_llama(), lora())
    stored = lora_da_core.build_pipeline(config=FIXED).run(model, made_batches(), cache_dir=filled)
    assert any("read from the cache" in note for note in stored.report.notes) and same_bytes(plain, stored)


def test_too_few_tokens_for_a_new_rank_are_refused_and_the_entry_stays(tmp_path: Path) -> None:
    batches = make_batches(make_samples(1))
    rank = int((batches[0]["labels"] != -100).sum()) + 1
    run(tmp_path, batches=batches, target=lora(2))
    with pytest.raises(DataError, match=f"fewer than the rank {rank}"):
        run(tmp_path, batches=batches, target=lora(rank))
    assert run(tmp_path, batches=batches, target=lora(2))[1] == 0


# What is not


def nudged() -> dict[str, Any]:
    model = make_tiny_llama()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    return {"model": model}


def with_a_buffer() -> dict[str, Any]:
    model = make_tiny_llama()
    model.register_buffer("bias", torch.ones(1))
    return {"model": model}


def one_label_less() -> dict[str, Any]:
    batches = made_batches()
    batches[0]["labels"][0, int((batches[0]["labels"][0] != -100).nonzero()[0])] = -100
    return {"batches": batches}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (nudged, "weights"),
        (with_a_buffer, "model"),
        (lambda: {"model": make_tiny_llama(rope_theta=500.0)}, "model"),
        (one_label_less, "tokens"),
        (lambda: {"config": dataclasses.replace(FIXED, samples=11)}, "samples, tokens"),
        (lambda: {"target": lora(4, ["q_proj"])}, "layers"),
        (lambda: {"estimator": ("kfac", {"output": "full"})}, "estimator.options.output"),
        (lambda: {"estimator": "diagonal"}, "estimator.name"),
        (lambda: {"gradient": "sketched"}, "gradient.name"),
        (lambda: {"config": dataclasses.replace(FIXED, token_mask="attention")}, "token_mask"),
    ],
)
def test_whatever_differs_is_named_and_computed(
    copied: Path, caplog: pytest.LogCaptureFixture, change: Any, named: str
) -> None:
    plain, _ = run(None, **change())
    result, forwards = run(copied, **change())
    assert forwards > 0 and same_bytes(plain, result)
    (warning,) = warnings_of(caplog)
    assert "differs in" in warning and named in warning.partition("differs in ")[2]
    assert len(entries(copied)) == 2 and run(copied, **change())[1] == 0


def test_another_release_computes_again(
    copied: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = cache_identity.version
    monkeypatch.setattr(cache_identity, "version", lambda name: "99" if name == "torch" else known(name))
    assert run(copied)[1] == PASSES
    assert warnings_of(caplog)[0].endswith("differs in versions.torch")


def test_a_seed_counts_only_where_something_is_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn = {"estimator": ("kfac", {"labels": "sampled"})}
    run(tmp_path, **drawn)
    assert run(tmp_path, **drawn, config=dataclasses.replace(FIXED, seed=1))[1] > 0
    assert warnings_of(caplog)[0].endswith("differs in seed")


def test_layers_of_equal_sizes_are_told_apart_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, target=lora(4, ["q_proj"]))
    plain, _ = run(None, target=lora(4, ["o_proj"]))
    result, forwards = run(tmp_path, target=lora(4, ["o_proj"]))
    assert forwards == PASSES and same_bytes(plain, result)
    assert warnings_of(caplog)[0].endswith("differs in layers")


def test_what_has_nothing_in_common_is_not_named(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(copied, **nudged(), **one_label_less(), target=lora(4, ["q_proj"]), estimator="diagonal")
    assert warnings_of(caplog) == []


def test_an_objective_or_a_value_that_cannot_be_identified_is_refused_before_work(tmp_path: Path) -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("the model ran")

    with pytest.raises(OptionError, match="cache cannot identify"):
        run(tmp_path, objective=losses)
    with pytest.raises(DataError, match="batch 0 holds 'extra' of type object"):
        run(tmp_path, batches=[{**batch, "extra": object()} for batch in made_batches()])
    assert list(tmp_path.iterdir()) == []


# Damage


def cut(entry: Path) -> None:
    os.truncate(entry / TENSORS_FILE, (entry / TENSORS_FILE).stat().st_size // 2)


def emptied(entry: Path) -> None:
    os.truncate(entry / TENSORS_FILE, 0)


def without_manifest(entry: Path) -> None:
    (entry / MANIFEST_FILE).unlink()


def without_tensors(entry: Path) -> None:
    (entry / TENSORS_FILE).unlink()


def other_count(entry: Path) -> None:
    manifest = json.loads((entry / MANIFEST_FILE).read_text())
    manifest["counts"]["samples"] += 1
    (entry / MANIFEST_FILE).write_text(json.dumps(manifest))


def nested(entry: Path) -> None:
    (entry / MANIFEST_FILE).write_text("[" * 100_000)


def foreign(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("thesis")


DAMAGES = [cut, emptied, without_manifest, without_tensors, other_count, nested, foreign]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_moved_aside_and_computed_again(
    copied: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    plain, _ = run(None)
    (entry,) = entries(copied)
    for number in ("", ".1"):
        damage(entry)
        result, forwards = run(copied)
        assert forwards == PASSES and same_bytes(plain, result)
        assert (copied / f"{entry.name}{number}.quarantined").exists()
        assert "cannot be used and was moved to" in warnings_of(caplog)[-1]
    assert run(copied)[1] == 0


@pytest.mark.parametrize("file", [MANIFEST_FILE, TENSORS_FILE])
def test_no_flipped_bit_is_used(copied: Path, file: str) -> None:
    (entry,) = entries(copied)
    draw = random.Random(0)
    for _ in range(8):
        content = bytearray((entry / file).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (entry / file).write_bytes(content)
        before = len(list(copied.glob("*.quarantined")))
        assert run(copied, target=lora(4))[1] == PASSES
        assert len(list(copied.glob("*.quarantined"))) == before + 1


def test_an_entry_of_another_run_under_this_ones_name_is_not_used(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (ours,) = entries(copied)
    run(copied, **one_label_less())
    (theirs,) = set(entries(copied)) - {ours}
    shutil.rmtree(ours)
    theirs.rename(ours)
    caplog.clear()
    plain, _ = run(None)
    result, forwards = run(copied)
    assert forwards == PASSES and same_bytes(plain, result)
    assert "belongs to another run, with another tokens" in warnings_of(caplog)[0]


# Disks


def test_a_directory_that_cannot_be_written_is_one_error_before_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "below", Path("/proc/lora-da-cache")):
        model = make_tiny_llama()
        model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
        with pytest.raises(StorageError, match="|".join(["is a file", "cannot be made", "cannot be created"])):
            run(place, model=model)


def test_a_full_disk_costs_the_entry_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, _ = run(None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        result, _ = run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same_bytes(plain, result)
    assert "are not kept for later runs" in warnings_of(caplog)[0] and "File too large" in warnings_of(caplog)[0]
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert run(tmp_path)[1] == PASSES


# Processes


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_da_core.adapter", "transformers", "test_cache"])
    return context


def run_in_step(cache_dir: Path, barrier: Any, results: Any) -> None:
    logging.disable()
    barrier.wait(timeout=120)
    result, forwards = run(cache_dir)
    results.put((forwards, [(layer.digest_A, layer.digest_B) for layer in result.report.layers]))


def test_two_processes_at_once_compute_once(tmp_path: Path, processes: Any) -> None:
    barrier, results = processes.Barrier(2), processes.Queue()
    both = [processes.Process(target=run_in_step, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = [results.get(timeout=180) for _ in both]
    for process in both:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sorted(forwards for forwards, _ in found) == [0, PASSES]
    assert found[0][1] == found[1][1]
    assert len(entries(tmp_path)) == 1 and not list(tmp_path.glob(".*"))


def run_until_killed(cache_dir: Path, began: Any) -> None:
    def stop(phase: str, done: int, total: int | None) -> None:
        if phase == "statistics" and done == 1:
            began.set()
            signal.pause()

    lora_da_core.build_pipeline(config=FIXED).run(
        make_tiny_llama(), made_batches(), lora(), cache_dir=cache_dir, on_progress=stop
    )


def test_whoever_waits_for_a_process_that_is_killed_computes(tmp_path: Path, processes: Any) -> None:
    began, barrier, results = processes.Event(), processes.Barrier(2), processes.Queue()
    first = processes.Process(target=run_until_killed, args=(tmp_path, began))
    second = processes.Process(target=run_in_step, args=(tmp_path, barrier, results))
    first.start()
    assert began.wait(timeout=180), "it did not come to its passes"
    second.start()
    barrier.wait(timeout=120)
    with pytest.raises(queue.Empty):  # it waits for the one that has the lock, and stands still
        results.get(timeout=2)
    first.kill()
    first.join()
    forwards, digests = results.get(timeout=180)
    second.join(timeout=60)
    assert second.exitcode == 0 and forwards == PASSES
    assert digests == [(layer.digest_A, layer.digest_B) for layer in run(None)[0].report.layers]
    assert len(entries(tmp_path)) == 1 and not list(tmp_path.glob(".*"))


FLUSHES = 4
"""Of one write: two files, their directory, and, after the rename, the directory it lies in."""


def run_until_flush(cache_dir: Path, number: int) -> None:
    flush, done = os.fsync, []

    def killing(descriptor: int) -> None:
        done.append(descriptor)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = killing
    run(cache_dir)


def test_a_process_killed_while_it_writes_leaves_nothing_half(tmp_path: Path, processes: Any) -> None:
    plain, _ = run(None)
    for number in range(1, FLUSHES + 2):
        cache_dir = tmp_path / str(number)
        process = processes.Process(target=run_until_flush, args=(cache_dir, number))
        process.start()
        process.join(timeout=180)
        assert process.exitcode == (-signal.SIGKILL if number <= FLUSHES else 0)
        there = entries(cache_dir)
        assert bool(there) == (number >= FLUSHES)
        assert bool(list(cache_dir.glob(".*"))) == (number <= FLUSHES)
        result, forwards = run(cache_dir)
        assert forwards == (0 if there else PASSES) and same_bytes(plain, result)
        assert not list(cache_dir.glob("*.quarantined")) and not list(cache_dir.glob(".*"))
        assert run(cache_dir)[1] == 0
