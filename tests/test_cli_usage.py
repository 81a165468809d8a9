"""What `lora-da inspect --use` prints is what each program reads; `make servers` gives it to the programs."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from typer.testing import CliRunner

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import OptionError, StorageError
from lora_da_core.cli import app
from lora_da_core.cli_usage import PROGRAMS, usage

ODD = 'it\'s "an adapter": $HOME'
"""A name that every program's syntax would take for something else."""


def write(directory: Path, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lora = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8, "rank_pattern": {}, **changes}
    (directory / "adapter_config.json").write_text(json.dumps(lora))
    return directory


def read(program: str, text: str) -> Any:
    """What the program's syntax makes of the text."""
    if program in ("axolotl", "llama-factory"):
        return yaml.safe_load(text)
    if program == "unsloth":
        call: Any = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return shlex.split(text)


def test_every_program_reads_the_names_as_they_are(tmp_path: Path) -> None:
    base, where = tmp_path / f"base {ODD}", tmp_path / ODD
    base.mkdir()
    write(where, base_model_name_or_path=str(base))
    found = {program: read(program, usage(where, program)) for program in PROGRAMS}
    assert found == {
        "axolotl": {"base_model": str(base), "adapter": "lora", "lora_model_dir": str(where)},
        "llama-factory": {
            "model_name_or_path": str(base),
            "adapter_name_or_path": str(where),
            "finetuning_type": "lora",
            "create_new_adapter": False,
        },
        "ms-swift": ["swift", "sft", "--model", str(base), "--adapters", str(where)],
        "unsloth": {"model_name": str(where), "load_in_4bit": False},
        "vllm": [
            *("vllm", "serve", str(base), "--enable-lora", "--lora-modules", f"{ODD}={where}"),
            *("--max-lora-rank", "8"),
        ],
    }


@pytest.mark.parametrize(("ranks", "limit"), [({}, "8"), ({"q_proj": 9, "v_proj": 2}, "16"), ({"q_proj": 400}, "512")])
def test_vllm_is_told_a_rank_that_it_takes_and_all_layers_fit(
    ranks: dict[str, int], limit: str, tmp_path: Path
) -> None:
    assert read("vllm", usage(write(tmp_path, rank_pattern=ranks), "vllm"))[-1] == limit


def test_an_adapter_of_ours_with_shared_out_ranks(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    pipeline = lora_da_core.build_pipeline(allocator="greedy")
    model = make_tiny_llama()
    model.name_or_path = "some/base"
    tuned = lora_da_core.get_lora_da_model(model, lora, make_batches(make_samples(12), 6), pipeline=pipeline)
    tuned.save_pretrained(tmp_path)
    ranks = {value.shape[0] for name, value in tuned.named_parameters() if ".lora_A." in name}
    assert len(ranks) > 1 and 4 < max(ranks) <= 16
    assert read("vllm", usage(tmp_path, "vllm"))[-1] == ("8" if max(ranks) <= 8 else "16")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"peft_type": "LOHA"}, "holds no LoRA adapter"),
        ({"rank_pattern": [1]}, "holds no LoRA adapter"),
        ({"r": "8; rm"}, "they are to be whole numbers"),
        ({"rank_pattern": {"q_proj": 0}}, "they are to be whole numbers"),
    ],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_damaged_configuration_is_refused(program: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=says):
        usage(write(tmp_path, **changes), program)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"adapter_config.json does not exist"):
        usage(tmp_path, "vllm")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(StorageError, match="is no adapter's configuration"):
        usage(tmp_path, "vllm")


def test_nothing_that_a_terminal_obeys_is_printed(tmp_path: Path) -> None:
    write(tmp_path, base_model_name_or_path="base\x1b[2J\nevil: 1")
    for program in PROGRAMS:
        text = usage(tmp_path, program)
        assert "\x1b" not in text and "\nevil" not in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "no adapter with use_dora; serve it merged"),
        ({"modules_to_save": ["lm_head"]}, "no adapter with modules_to_save"),
        ({"r": 513}, "ranks up to 512, the largest here is 513"),
    ],
)
def test_what_vllm_does_not_serve_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=says):
        usage(write(tmp_path, **changes), "vllm")
    assert usage(tmp_path, "axolotl")


def test_the_command_prints_it_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path)
    outcome = CliRunner().invoke(app, ["inspect", str(tmp_path), "--use", "ms-swift"])
    assert (outcome.exit_code, outcome.output) == (0, f"{usage(tmp_path, 'ms-swift')}\n")
    for extra in (["--json"], ["--plot", str(tmp_path / "picture.png")]):
        refused = CliRunner().invoke(app, ["inspect", str(tmp_path), "--use", "vllm", *extra])
        assert refused.exit_code == 2 and "--use prints that alone" in " ".join(refused.output.split())
    unknown = CliRunner().invoke(app, ["inspect", str(tmp_path), "--use", "notepad"])
    assert unknown.exit_code == 2 and "choose one of axolotl, llama-factory, ms-swift, unsloth, vllm" in unknown.output
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
