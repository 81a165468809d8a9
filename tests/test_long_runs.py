"""Many runs in one process leave nothing behind; Ctrl-C leaves the model clean and the program with one line."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from peft import LoraConfig
from torch import nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from fuzzing import NIGHTLY

RUNS = 200 if settings.get_current_profile_name() == NIGHTLY else 20
WARM_UP = RUNS // 4
SLOPE = 2**16
"""Most bytes of resident memory that a run may add, by a line through all runs after the first quarter.

One leaked set of factors, batches or statistics of the model below would be several times that.
"""
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, which this system has not")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C through also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def held() -> dict[str, int]:
    """What a run may not add to: open files, threads, tensors and modules that something still refers to."""
    gc.collect()
    alive = gc.get_objects()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tensors": sum(isinstance(each, torch.Tensor) for each in alive),
        "modules": sum(isinstance(each, nn.Module) for each in alive),
    }


@linux
@pytest.mark.parametrize("solver", ["auto", "lanczos"])
def test_many_runs_leave_nothing_behind(solver: str, tmp_path: Path) -> None:
    model, batches = make_tiny_llama(), make_batches(make_samples())
    pipeline = lora_da_core.build_pipeline(solver=solver)
    before, memory = {}, []
    for number in range(RUNS):
        cache = tmp_path / str(number) if number % 2 else None
        peft_model = lora_da_core.get_lora_da_model(model, LORA, batches, pipeline=pipeline)
        model = peft_model.unload()
        del peft_model
        pipeline.run(model, batches, LORA, cache_dir=cache)
        assert hooks_of(model) == 0
        if number == WARM_UP:
            before = held()
        if number >= WARM_UP:
            gc.collect()
            memory.append(resident_bytes())
    assert held() == before
    slope = float(np.polyfit(range(len(memory)), memory, 1)[0])
    print(f"{RUNS} runs with {solver}: {slope / 1024:.1f} KiB of resident memory per run")
    assert slope < SLOPE, f"{slope / 1024:.0f} KiB per run"


# Ctrl-C in the library


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


class At:
    """Calls a function at the nth call, and never again."""

    def __init__(self, number: int, act: Callable[..., None]) -> None:
        self.left, self.act, self.done = number, act, False

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not self.done and self.left == 0:
            self.done = True
            self.act()
        self.left -= 1


@pytest.mark.parametrize("phase", ["statistics", "solve", "scale"])
def test_ctrl_c_at_any_phase_leaves_the_model_as_found(
    phase: str, batches: Any, model_unchanged: Callable[[nn.Module], None]
) -> None:
    model = make_tiny_llama().train()
    model_unchanged(model)
    pipeline = lora_da_core.build_pipeline()
    stop = At(0, interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(model, batches, LORA, on_progress=lambda name, done, total: stop() if name == phase else None)
    assert stop.done
    # It is as usable as before.
    assert pipeline.run(model, batches, LORA).factors


@pytest.mark.parametrize(
    ("where", "call"), [("forward", 0), ("forward", 3), ("forward", 9), ("backward", 0), ("backward", 4)]
)
def test_ctrl_c_within_the_model_leaves_it_as_found(
    where: str, call: int, batches: Any, model_unchanged: Callable[[nn.Module], None]
) -> None:
    model = make_tiny_llama()
    stop = At(call, interrupt)
    layer = model.model.layers[1].mlp.up_proj

    def forward(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        if where == "forward":
            stop()
        elif output.requires_grad:
            output.register_hook(lambda gradient: stop())

    handle = layer.register_forward_hook(forward)
    model_unchanged(model)
    pipeline = lora_da_core.build_pipeline(config=lora_da_core.LoraDAConfig(rounds=2))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(model, batches, LORA)
    assert stop.done and list(layer._forward_hooks) == [handle.id]


def test_ctrl_c_while_an_adapter_is_written_unwraps_the_model(
    batches: Any, model_unchanged: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_da_core import adapter

    model = make_tiny_llama()
    model_unchanged(model)
    monkeypatch.setattr(adapter, "settle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lora_da_core.get_lora_da_model(model, LORA, batches)


# Ctrl-C in the program, and what it writes into files

PROGRAM = (sys.executable, "-c", "from lora_da_core.cli import main; main()")


def started(world: Path, folder: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """The program with its output in files, as under nohup or in a batch system."""
    out, err = folder / "out.txt", folder / "err.txt"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        program = subprocess.Popen([*PROGRAM, *arguments], cwd=world, stdout=stdout, stderr=stderr)
    return program, out, err


def init(folder: Path, *more: str) -> tuple[str, ...]:
    return ("init", "--model", "model", "--data", "data.jsonl", "--output", str(folder / "adapter"), *more)


@pytest.mark.parametrize("moment", ["statistics: ", "solve: "])
def test_ctrl_c_ends_the_program_with_130_and_one_line(world: Path, tmp_path: Path, moment: str) -> None:
    # One sample a batch: enough lines of progress to be met in the middle of.
    program, out, err = started(
        world, tmp_path, *init(tmp_path, "--batch-size", "1", "--samples", "24", "--rounds", "2")
    )
    while moment not in err.read_text() and program.poll() is None:
        time.sleep(0.01)
    assert program.poll() is None, "it ended before it could be interrupted:\n" + err.read_text()
    program.send_signal(signal.SIGINT)
    assert program.wait() == 130
    lines = err.read_text().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == ["error: interrupted."]
    assert "Traceback" not in err.read_text() and out.read_text() == ""
    assert not (tmp_path / "adapter").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_ctrl_c_outside_of_a_command_is_one_line_too() -> None:
    code = (
        "import lora_da_core.cli as cli, signal\n"
        "def stop(*_): signal.raise_signal(signal.SIGINT)\n"
        "cli.OneLineErrors.make_context = stop\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "plugins"], capture_output=True, text=True, check=False)
    # click ends the terminal's line with the ^C first.
    assert (done.returncode, done.stderr.strip()) == (130, "error: interrupted.")


def test_what_the_program_writes_into_files_is_plain_text(world: Path, tmp_path: Path) -> None:
    program, out, err = started(world, tmp_path, *init(tmp_path, "--batch-size", "1", "--samples", "40"))
    assert program.wait() == 0, err.read_text()
    for path in (out, err):
        text = path.read_bytes().decode("utf-8")
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), "a carriage return or an escape sequence"
    ours = [line for line in err.read_text().splitlines() if re.match(r"(statistics|gradient|solve|scale): \d", line)]
    assert 3 <= len(ours) <= 40 and all(re.search(r"\d+(/\d+)?", line) for line in ours)
    assert out.read_text().splitlines()[-1].startswith("saved to ")
