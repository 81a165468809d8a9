"""Other programs read what docs/integrations.md tells to write: their own parsers, and ms-swift and Unsloth train.

Run by hand, as the programs cannot all be installed beside each other. The command fetches them into `build/servers`:

    make servers
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig
from lora_da_core.cli_usage import VLLM_RANKS, usage

WHEELS = os.environ.get("LORA_DA_SERVER_WHEELS", "")
pytestmark = pytest.mark.skipif(
    not WHEELS, reason="needs other programs' wheels in LORA_DA_SERVER_WHEELS: make servers"
)

AXOLOTL = """
import yaml
from axolotl.utils.schemas.config import AxolotlInputConfig
found = AxolotlInputConfig(
    **yaml.safe_load(told), datasets=[{"path": "x", "type": "alpaca"}],
    micro_batch_size=1, gradient_accumulation_steps=1, learning_rate=1e-4, num_epochs=1,
)
answer = {
    "adapter": found.adapter, "base": found.base_model, "directory": found.lora_model_dir, "r": found.lora_r,
}
"""
LLAMA_FACTORY = """
import os
import yaml
os.environ["DISABLE_VERSION_CHECK"] = "1"
from llamafactory.hparams.parser import get_train_args
model, _, _, tuning, _ = get_train_args(dict(
    **yaml.safe_load(told), stage="sft", do_train=True, dataset="x", template="llama3", output_dir=given + "/out",
    use_cpu=True,
))
answer = {
    "base": model.model_name_or_path, "directories": model.adapter_name_or_path, "new": tuning.create_new_adapter,
    "type": tuning.finetuning_type,
}
"""
# The package itself takes a GPU's libraries; of its parser's two imports one is a type's name, the other a logger.
VLLM = """
import importlib.util, json, logging, sys, types
from pathlib import Path
for name in ("vllm", "vllm.config", "vllm.config.lora", "vllm.logger"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["vllm.config.lora"].LoRAConfig = object
log = logging.getLogger("vllm")
log.info_once = log.info
sys.modules["vllm.logger"].init_logger = lambda name: log
spec = importlib.util.spec_from_file_location("peft_helper", root / "vllm" / "lora" / "peft_helper.py")
module = importlib.util.module_from_spec(spec)
sys.modules["peft_helper"] = module
spec.loader.exec_module(module)
helper = module.PEFTHelper.from_dict(json.loads(Path(given, "adapter_config.json").read_text()))
arguments = told.split()
limits = types.SimpleNamespace(max_lora_rank=int(arguments[arguments.index("--max-lora-rank") + 1]))
try:
    helper.validate_legal(limits)
    refused = ""
except ValueError as error:
    refused = str(error)
names = json.loads(Path(given, "names.json").read_text())
settings = (root / "vllm" / "config" / "lora.py").read_text()
answer = {"refused": refused, "limits": settings, "layers": {name: helper.get_rank_and_scaling(name) for name in names}}
"""
SWIFT = """
import json, shlex
from pathlib import Path
from swift.pipelines import sft_main
answer = {}
for rate in ("0.0", "1e-2"):
    sft_main([
        *shlex.split(told)[2:], "--model_type", "llama", "--template", "dummy",
        "--dataset", given + "/data.jsonl", "--load_from_cache_file", "false", "--output_dir", given + "/" + rate,
        "--add_version", "false", "--max_steps", "3", "--save_steps", "3", "--logging_steps", "1",
        "--per_device_train_batch_size", "4", "--learning_rate", rate, "--lr_scheduler_type", "constant",
        "--use_cpu", "true", "--torch_dtype", "float32", "--report_to", "none", "--dataloader_num_workers", "0",
    ])
    lines = [json.loads(line) for line in Path(given, rate, "logging.jsonl").read_text().splitlines()]
    answer[rate] = [float(line["loss"]) for line in lines if "loss" in line]
"""
UNSLOTH = """
import torch
from unsloth import FastLanguageModel
from datasets import Dataset
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer
import lora_da_core

def trained(model, tokenizer, start):
    rows = [{"prompt": f"Q : w{n % 9} w{n % 7}", "completion": f"A : w{n % 5} w3 w3"} for n in range(40)]
    arguments = SFTConfig(
        output_dir=given + "/out", max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, max_length=32, disable_tqdm=True,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    start(trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

settings = {"max_seq_length": 64, "load_in_4bit": False, "dtype": torch.float32}
exec(told)
ours, held = load_file(given + "/adapter/adapter_model.safetensors"), model.state_dict()
answer = {"same": [bool(torch.equal(held[key.replace(".weight", ".default.weight")], ours[key])) for key in ours]}
answer["trainable"] = sum(parameter.requires_grad for parameter in model.parameters())
answer["saved"] = trained(model, tokenizer, lambda trainer: None)

def start(trainer):
    report = lora_da_core.init_before_training(trainer, samples=16)
    answer.update(samples=report.samples, scale=report.scale)

for name, prepare in (("default", lambda trainer: None), ("ours", start)):
    model, tokenizer = FastLanguageModel.from_pretrained(model_name=given + "/model", **settings)
    model = FastLanguageModel.get_peft_model(model, r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    answer[name] = trained(model, tokenizer, prepare)
model.save_pretrained(given + "/trained")
"""


def parsed(program: str, script: str, given: Path, tmp_path: Path, told: str) -> dict[str, object]:
    """What a program's parser makes of a directory and of what it is told of it, in a process of its own."""
    (wheel,) = Path(WHEELS).rglob(f"{program}-*.whl")
    root = tmp_path / program
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root, [name for name in archive.namelist() if not name.endswith(".so")])
    return answered(root, script, given, told)


def answered(root: Path, script: str, given: Path, told: str) -> dict[str, object]:
    """What a script says of a directory in a process that finds a program's modules in `root`."""
    head = f"from pathlib import Path\nimport sys\nroot, given, told = Path({str(root)!r}), {str(given)!r}, {told!r}\n"
    head += "sys.path.insert(0, str(root))\n"
    code = f"{head}{script}\nimport json\nprint('ANSWER' + json.dumps(answer))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in run.stdout.splitlines() if line.startswith("ANSWER")]
    assert lines, run.stderr[-3000:]
    found: dict[str, object] = json.loads(lines[0].removeprefix("ANSWER"))
    return found


BASE = "some/base"


def saved(directory: Path, **settings: object) -> dict[str, list[float]]:
    """Saves an adapter of ours; returns its layers' ranks and scalings as PEFT has them."""
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"})
    pipeline = lora_da_core.build_pipeline(**settings)  # type: ignore[arg-type]
    batches = make_batches(make_samples(12), 6)
    base = make_tiny_llama()
    base.name_or_path = BASE
    model = lora_da_core.get_lora_da_model(base, lora, batches, pipeline=pipeline)
    model.save_pretrained(directory, save_embedding_layers=False)
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    found = {name: [layer.r["default"], layer.scaling["default"]] for name, layer in layers.items()}
    (directory / "names.json").write_text(json.dumps(list(found)))
    return found


def test_axolotl_takes_the_directory(tmp_path: Path) -> None:
    saved(tmp_path)
    expected = {"adapter": "lora", "base": BASE, "directory": str(tmp_path), "r": None}
    assert parsed("axolotl", AXOLOTL, tmp_path, tmp_path, usage(tmp_path, "axolotl")) == expected


def test_llama_factory_takes_the_directory(tmp_path: Path) -> None:
    saved(tmp_path)
    expected = {"base": BASE, "directories": [str(tmp_path)], "new": False, "type": "lora"}
    assert parsed("llamafactory", LLAMA_FACTORY, tmp_path, tmp_path, usage(tmp_path, "llama-factory")) == expected


@pytest.mark.parametrize("allocator", ["none", "greedy"])
def test_vllm_reads_every_layers_rank_and_scaling(allocator: str, tmp_path: Path) -> None:
    layers = saved(tmp_path, allocator=allocator)
    assert len({rank for rank, _ in layers.values()}) > 1 or allocator == "none"
    found = parsed("vllm", VLLM, tmp_path, tmp_path, usage(tmp_path, "vllm"))
    assert found["refused"] == ""
    taken = re.search(r"^MaxLoRARanks = Literal\[(.*)\]$", found["limits"], re.MULTILINE)  # type: ignore[call-overload]
    assert taken is not None and tuple(map(int, taken[1].split(","))) == VLLM_RANKS
    for name, (rank, scaling) in found["layers"].items():  # type: ignore[attr-defined]
        assert rank == layers[name][0] and scaling == pytest.approx(layers[name][1], rel=1e-12)


def saved_of(world: Path, directory: Path) -> None:
    """In `directory`, a base as `model` and an adapter of ours on it as `adapter`."""
    (directory / "model").symlink_to(world / "model")
    base = AutoModelForCausalLM.from_pretrained(directory / "model")
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    batches = make_batches(make_samples(12, vocab=47), 6)
    # Of random labels the search would take no step, and a B of zeros would show less.
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(gamma=64.0))
    model = lora_da_core.get_lora_da_model(base, lora, batches, pipeline=pipeline)
    assert all(bool(value.any()) for name, value in model.named_parameters() if ".lora_" in name)
    model.save_pretrained(directory / "adapter")


def test_ms_swift_trains_from_our_start(world: Path, tmp_path: Path) -> None:
    saved_of(world, tmp_path)
    talk = [("user", "w1 w2 w3"), ("assistant", "w4 w5 w6")]
    row = json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]})
    (tmp_path / "data.jsonl").write_text(f"{row}\n" * 24)
    losses = answered(Path(WHEELS, "swift"), SWIFT, tmp_path, usage(tmp_path / "adapter", "ms-swift"))
    start, kept, moved = (
        load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "adapter", *(tmp_path / rate / "checkpoint-3" for rate in ("0.0", "1e-2")))
    )
    # At a rate of zero what it saves is what it loaded.
    assert start.keys() == kept.keys() == moved.keys() and len(start) == 14
    assert all(torch.equal(kept[key], value) and not torch.equal(moved[key], value) for key, value in start.items())
    still, falling = losses["0.0"], losses["1e-2"]
    assert len(set(still)) == 1 and falling[0] == still[0] and falling[-1] < falling[0]  # type: ignore[arg-type, index]


def test_unsloth_trains_from_our_start(world: Path, tmp_path: Path) -> None:
    saved_of(world, tmp_path)
    # The length and dtype are this test's own.
    told = usage(tmp_path / "adapter", "unsloth").replace("load_in_4bit=False", "**settings")
    found: Any = answered(Path(WHEELS, "unsloth"), UNSLOTH, tmp_path, told)
    assert found["same"] == [True] * 14 and found["trainable"] == 14
    assert len(found["saved"]) == len(found["ours"]) == 3 and all(map(math.isfinite, found["saved"] + found["ours"]))
    # Two of three labels are the same word in every row, so the search is sure of a step.
    assert found["samples"] == 16 and found["scale"]["multiplier"] > 0
    # The same first batch.
    assert found["ours"][0] < found["default"][0]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "trained").state_dict()
    trained = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert len(trained) == 4 and all(
        bool(value.any()) and torch.equal(reloaded[key.replace(".weight", ".default.weight")], value)
        for key, value in trained.items()
    )
