"""Trainer plugins in a process that is killed, resumed in another one; and under TRL's trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from conftest import make_samples
from lora_da_core import StorageError
from lora_da_trainers.rac_lora import CHAIN_FILE
from test_trainer_plugins import REGISTRY, attached, same_bytes, start

PROGRAM = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from test_trainer_plugins import attached

class Kill(TrainerCallback):
    def __init__(self, event, step):
        setattr(self, event, lambda args, state, control, **rest: self.at(state, step))

    def at(self, state, step):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

root = Path(sys.argv[1])
for number, (case, event, step) in enumerate(CASES):
    child = os.fork()
    if child == 0:
        trainer, _ = attached(root / str(number), case, save_strategy="steps", save_steps=2)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, Kill(event, step))
        trainer.train()
        os._exit(0)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""
CASES = [
    ("odelora rk4", "on_step_end", 5),
    ("riemannion", "on_step_end", 5),
    ("rac_lora", "on_step_end", 5),
    ("rac_lora", "on_save", 4),
]
"""Who, and where it is killed: amid a step's stages, and between the model's file of a checkpoint and the chain's."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of runs whose processes were killed, one by one, in processes forked before torch did any work."""
    root = tmp_path_factory.mktemp("killed")
    program = PROGRAM.replace("CASES", repr(CASES))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status ")]
    assert [os.WTERMSIG(status) for status in statuses] == [signal.SIGKILL] * len(CASES)
    return root


@pytest.mark.parametrize("number", range(3))
def test_a_killed_run_goes_on_from_its_last_checkpoint(number: int, killed: Path, tmp_path: Path) -> None:
    case, directory = CASES[number][0], killed / str(number)
    unbroken, model = attached(tmp_path, case)
    unbroken.train()
    last = get_last_checkpoint(str(directory))
    assert last is not None and Path(last).name == "checkpoint-4"
    resumed, again = attached(directory, case)
    resumed.train(resume_from_checkpoint=last)
    assert resumed.state.global_step == 8
    assert same_bytes(again, model)


def test_a_chain_killed_while_it_saved_goes_on_from_the_checkpoint_before(killed: Path, tmp_path: Path) -> None:
    directory = killed / "3"
    last = Path(get_last_checkpoint(str(directory)) or "")
    assert last.name == "checkpoint-4" and not (last / CHAIN_FILE).exists()
    refused, _ = attached(directory, "rac_lora")
    with pytest.raises(StorageError, match="Resume from an earlier checkpoint"):
        refused.train(resume_from_checkpoint=str(last))
    unbroken, model = attached(tmp_path, "rac_lora")
    unbroken.train()
    resumed, again = attached(directory, "rac_lora")
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    assert same_bytes(again, model)


@pytest.mark.parametrize(
    ("name", "options", "rate"),
    [
        ("odelora", {"method": "rk2"}, 0.5),
        ("riemannion", {}, 0.05),
        ("rac_lora", {"every": 2, "sampled": "A", "restart": "data", "samples": 8}, 0.05),
    ],
)
def test_trls_trainer_takes_a_plugin(
    name: str, options: dict[str, object], rate: float, world: Path, tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer

    model = start(name)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in make_samples(24, vocab=8)]
    settings = SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=rate, logging_steps=1,
        save_strategy="no", report_to=[], seed=0, disable_tqdm=True, use_cpu=True, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    REGISTRY.create("trainer", (name, options)).attach(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and sum(losses[-2:]) / 2 < losses[0], losses
