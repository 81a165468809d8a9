"""The examples run on a tiny model; what they print about themselves is checked."""

from __future__ import annotations

import ast
import importlib
import json
import math
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tiny_llama

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> object:
    """Imports a script by its name, as if it were run in its folder; random states are put back."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def found(name: str) -> ModuleType:
        return importlib.import_module(name)

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield found


def given(world: Path, output: Path, *rest: str) -> list[str]:
    return ["--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--output", str(output), *rest]


@pytest.mark.parametrize("name", ["sft_trl", "dpo_trl", "accelerate_loop"])
def test_training_ends_with_an_adapter_that_stock_peft_loads(
    name: str, example: object, world: Path, tmp_path: Path
) -> None:
    texts = [{"question": f"w{n % 9} w{n % 7}", "answer": f"w{n % 8} w3 w{n % 5}\nw{20 + n % 6}"} for n in range(48)]
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps(text) + "\n" for text in texts))
    options = given(world, tmp_path, "--data", str(source), "--steps", "3", "--samples", "16")
    losses = example(name).main(options)  # type: ignore[operator]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    if name == "dpo_trl":
        assert losses[0] < math.log(2) - 1e-3
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    state = PeftModel.from_pretrained(base, tmp_path).state_dict()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 14
    for key, value in saved.items():
        assert bool(value.any()) and torch.equal(state[key.replace(".weight", ".default.weight")], value)


def test_a_quantized_base_reloads_exactly(example: object, world: Path, tmp_path: Path) -> None:
    # bitsandbytes packs weights for the CPU in blocks of 32 rows.
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(tmp_path / "model")
    make_tiny_llama(vocab_size=47, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    rest = ["--model", str(tmp_path / "model")]
    assert example("quantized").main(given(world, tmp_path, *rest)) == 0.0  # type: ignore[operator]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 28 and all(bool(value.any()) for value in saved.values())


def test_the_merged_model_is_a_plain_one_and_another_than_the_base(
    example: object, world: Path, tmp_path: Path
) -> None:
    example("merge_and_generate").main(given(world, tmp_path, "--tokens", "3"))  # type: ignore[operator]
    assert not list(tmp_path.glob("adapter*"))
    merged, base = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path, world / "model"))
    assert merged.keys() == base.keys()
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed and all("proj" in key for key in changed)


def test_the_quickstart_ends_with_a_model_to_train(
    example: object, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = example("quickstart").main(given(world, tmp_path, "--samples", "16"))  # type: ignore[operator]
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 14 and all(bool(value.any()) for value in trained.values())
    assert (tmp_path / "spectra.png").stat().st_size > 10_000
    shown = capsys.readouterr()
    assert shown.out.startswith("Pipeline(estimator='kfac'") and "7, " in shown.out and "q_proj" in shown.out
    assert "statistics 1/" in shown.err and "solve 7/7 " in shown.err


@pytest.mark.parametrize("plugin", ["odelora", "riemannion", "rac_lora", "laplace"])
def test_a_trainer_s_plugin_trains(plugin: str, example: object, world: Path, tmp_path: Path) -> None:
    options = given(world, tmp_path, "--plugin", plugin, "--steps", "4", "--samples", "16")
    losses = example("train_with_plugin").main(options)  # type: ignore[operator]
    assert len(losses) == 4 and all(math.isfinite(float(loss)) for loss in losses)


def test_both_starts_are_trained_and_drawn(example: object, world: Path, tmp_path: Path) -> None:
    options = given(world, tmp_path, "--steps", "3", "--samples", "16")
    curves = example("finetune_trainer").main(options)  # type: ignore[operator]
    assert {name: len(losses) for name, losses in curves.items()} == {"default LoRA": 3, "LoRA-DA": 3}
    assert curves["LoRA-DA"][0] < curves["default LoRA"][0]
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "rest", "cells"),
    [("ablation_estimators", ["--seeds", "1"], 12), ("ablation_solvers", ["--ranks", "2", "4"], 12)],
)
def test_an_ablation_reports_every_cell(
    name: str, rest: list[str], cells: int, example: object, world: Path, tmp_path: Path
) -> None:
    example(name).main(given(world, tmp_path, "--layers", "0", "--samples", "8", *rest))  # type: ignore[operator]
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["status"] for record in records] == ["done"] * cells, [record["error"] for record in records]
    assert (tmp_path / "report.html").is_file()


def test_every_script_is_listed_short_and_says_what_it_is() -> None:
    page = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        source = path.read_text()
        assert f"`{path.name}`" in page, path.name
        assert len(source.splitlines()) <= 80, path.name
        head = ast.get_docstring(ast.parse(source))
        assert head is not None and len(head.split()) >= 12, path.name
