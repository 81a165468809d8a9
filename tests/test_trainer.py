"""Real trainers: the adapter is initialised from their own data, and they train on as if nothing had been read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import OptionError, TargetError

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SAMPLES = make_samples(60, vocab=8)


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return make_batches(rows, len(rows))[0]


def make_trainer(directory: Path, seen: list[Any], *, wrapped: bool = True) -> Trainer:
    def watched(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        seen.append([row["input_ids"].tolist() for row in rows])
        return collate(rows)

    model = make_tiny_llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(model, LORA) if wrapped else model
    arguments = TrainingArguments(
        output_dir=str(directory), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], seed=0, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=SAMPLES, data_collator=watched)


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_transformers_trainer_starts_lower_and_sees_the_same_batches(tmp_path: Path) -> None:
    plain_batches: list[Any] = []
    ours_batches: list[Any] = []
    plain = losses(make_trainer(tmp_path, plain_batches))
    trainer = make_trainer(tmp_path, ours_batches)
    report = lora_da_core.init_before_training(trainer, samples=24)
    read = sum(len(rows) for rows in ours_batches)
    assert report.samples == 24 and 24 + 16 <= read <= 24 + 16 + 4  # accelerate looks one batch ahead
    assert report.config["population"] == len(SAMPLES)
    ours_batches.clear()
    ours = losses(trainer)
    assert ours_batches == plain_batches
    assert ours[0] < plain[0] - 0.05


def test_trls_trainer_trains_from_it(tmp_path: Path, world: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    rows = [
        {"prompt": f"Q : w{place % 9} w{place % 7}", "completion": f"A : w{place % 5} w3 w3"} for place in range(40)
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], seed=0, disable_tqdm=True, use_cpu=True, bf16=False, max_length=32,
        eos_token="</s>", pad_token="<pad>", gradient_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            str(world / "model"), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
    report = lora_da_core.init_before_training(trainer, samples=16)
    assert report.samples == 16 and len(report.layers) == 7
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert all(bool(parameter.any()) for parameter in moved)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(world / "model")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    inputs = tokenizer("Q : w1 w1", return_tensors="pt")
    assert reloaded.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_what_cannot_be_initialised_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="PeftModel is needed"):
        lora_da_core.init_before_training(make_trainer(tmp_path, [], wrapped=False))
    trainer = make_trainer(tmp_path, [])
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(OptionError, match="at step 4"):
        lora_da_core.init_before_training(trainer)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
