import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import lora_da_core.models
from lora_da_core import storage
from lora_da_core.cli import app
from lora_da_core.cli_init_options import InitOptions
from lora_da_core.cli_options import module_names
from lora_da_core.config import LoraDAConfig
from lora_da_core.errors import ModelError, OptionError
from lora_da_core.progress import LINES_PER_PHASE, Counts, LiveProgress, PlainProgress, shown_progress
from lora_da_core.registry import Registry

ROWS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a tiny model and a data set, in which the commands run."""
    root = tmp_path_factory.mktemp("world")
    words = ["<unk>", "<s>", "</s>", "<pad>", "Q", "A", ":", *(f"w{place}" for place in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **specials).save_pretrained(root / "model")
    shape = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(root / "model")
    draw = torch.Generator().manual_seed(1)
    texts = torch.randint(40, (ROWS, 12), generator=draw).tolist()
    rows = [
        {"question": " ".join(f"w{i}" for i in text[:5]), "answer": " ".join(f"w{i}" for i in text[5:])}
        for text in texts
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def finished(world):
    """A finished run."""
    outcome = run(world, *INIT, "--output", "finished", "--rank", "4", "--plot")
    assert outcome.exit_code == 0, outcome.output
    return world / "finished"


INIT = ("init", "--model", "model", "--data", "data.jsonl")


def run(world, *arguments, env=None):
    before = Path.cwd()
    os.chdir(world)
    try:
        return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "80", **(env or {})}).invoke(app, arguments)
    finally:
        os.chdir(before)


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(lora_da_core.models, "load_model", refuse)


# Wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init", "--data", "data.jsonl", "--output", "new"), "Missing option '--model'"),
        ((*INIT, "--output", "new", "--bogus", "1"), "--bogus"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("inspect",), "Missing argument"),
        ((*INIT, "--output", "new", "--rank", "eight"), "Invalid value for '--rank'"),
        ((*INIT, "--output", "new", "--rank", "0"), "rank is 0"),
        ((*INIT, "--output", "new", "--lora-alpha", "0"), "lora_alpha is 0"),
        ((*INIT, "--output", "new", "--lora-alpha", "nan"), "lora_alpha is nan"),
        ((*INIT, "--output", "new", "--seed", "9" * 30), "below 2**63"),
        ((*INIT, "--output", "new", "--target-modules", "["), "target_modules '[' is no regular expression"),
        ((*INIT, "--output", "new", "--target-modules", ""), "target_modules is empty; give 'all-linear'"),
        ((*INIT, "--output", "data.jsonl/new"), "data.jsonl is a file; give another directory"),
        ((*INIT, "--output", "new", "--exclude-modules", "("), "exclude_modules '(' is no regular expression"),
        ((*INIT, "--output", "new", "--estimator", ""), "unknown estimator ''"),
        ((*INIT, "--output", "model"), "model exists and is not empty"),
        ((*INIT, "--output", "data.jsonl"), "data.jsonl is a file"),
        ((*INIT, "--output", "new", "--cache-dir", "data.jsonl"), "data.jsonl is a file"),
        ((*INIT, "--output", "model", "--overwrite"), "holds no earlier run"),
        ((*INIT, "--output", "new", "--max-memory", "12"), "error: --max-memory: '12' is no size of memory"),
        ((*INIT, "--output", "new", "--max-memory", "1GiB", "--layers-per-pass", "2"), "leave one out"),
        ((*INIT, "--output", "new", "--resume", "--cache-dir", "c"), "leave out --resume"),
        ((*INIT, "--output", "new", "--process-timeout", "0"), "process_timeout is 0"),
        ((*INIT, "--output", "new", "--layers-per-pass", "0"), "layers_per_pass is 0"),
        ((*INIT, "--output", "new", "--solver", "lanczoz"), "Did you mean 'lanczos'?"),
        ((*INIT, "--output", "new", "--estimator", "kfacc"), "Did you mean 'kfac'?"),
        ((*INIT, "--output", "new", "--preset", "papr"), "Did you mean 'paper'?"),
        ((*INIT, "--output", "new", "--estimator-option", "outpt=full"), "Did you mean 'output'?"),
        ((*INIT, "--output", "new", "--estimator-option", "output"), "not KEY=VALUE"),
        ((*INIT, "--output", "new", "--estimator-option", "output=none"), "output is 'none'"),
        ((*INIT, "--output", "new", "--solver-option", "tolerance=1e-3"), "--solver-option needs --solver"),
        ((*INIT, "--output", "new", "--damping", "-1"), "damping is -1"),
        ((*INIT, "--output", "new", "--damping-kind", "big"), "choose one of relative, absolute"),
        ((*INIT, "--output", "new", "--alpha", "0", "--beta", "0"), "alpha and beta are both 0"),
        ((*INIT, "--output", "new", "--samples", "0"), "samples is 0"),
        ((*INIT, "--output", "new", "--max-length", "1"), "max_length is 1"),
        ((*INIT, "--output", "new", "--batch-size", "0"), "batch_size is 0"),
        ((*INIT, "--output", "new", "--config", "missing.toml"), "missing.toml cannot be read"),
        ((*INIT, "--output", "new", "--lora-alpha", "inf"), "must be a finite number above 0"),
        (("plan",), "Missing option '--model'"),
        (("plan", "--model", "model", "--max-memory", "24"), "--max-memory: '24' is no size of memory"),
        (("plan", "--model", "model", "--max-memory", "24gib"), "such as 24GiB"),
        (("plan", "--model", "model", "--throughput", "0"), "throughput is 0"),
        (("plan", "--model", "model", "--tokens", "1"), "have 64 to 4096 together"),
        (("plan", "--model", "model", "--estimator", "kfacc"), "Did you mean 'kfac'?"),
        (("plan", "--model", "model", "--solver-option", "tolerance=1e-3"), "--solver-option needs --solver"),
        (("plan", "--model", "model", "--rank", "0"), "rank is 0"),
        (("plan", "--model", "model", "--max-length", "65"), "takes 64 tokens at most"),
        (("plan", "--model", "model", "--batch-size", "0"), "batch_size is 0"),
        (("plan", "--model", "model", "--samples", "2", "--tokens", "1000"), "tokens is 1000"),
        (("plan", "--model", "model", "--device", "abacus"), "device 'abacus' is unknown"),
        (("plan", "--model", "model", "--dtype", "int8"), "dtype 'int8' is unknown"),
    ],
)
def test_wrong_use_is_one_line_and_status_2_before_anything_is_loaded(world, no_loading, arguments, message):
    outcome = run(world, *arguments)
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    assert message in outcome.stderr
    assert outcome.stdout == "" and not (world / "new").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('modle = "model"', "unknown option 'modle'. Did you mean 'model'?"),
        ('config = "other.toml"', "unknown option 'config'"),
        ("rank 4", "is not valid TOML"),
        ("rank = [4]", "'rank' takes one value, not a list"),
        ('token-mask = "all"', "choose one of labels, attention"),
        ("token-mask = 'labels'\ntoken_mask = 'labels'", "given twice"),
        ('rank = "four"', "Invalid value for '--rank'"),
        ("\ufeffrank = 0", "rank is 0"),
        ("cache-dir = ''", "Invalid value for '--cache-dir': the path is empty"),
    ],
)
def test_wrong_config_file_is_one_line_and_status_2(world, no_loading, tmp_path, content, message):
    path = tmp_path / "wrong.toml"
    path.write_text(content, encoding="utf-8")
    outcome = run(world, *INIT, "--output", "new", "--config", str(path))
    assert outcome.exit_code == 2
    assert message in outcome.stderr and outcome.stderr.count("\n") == 1
    assert "wrong.toml" in outcome.stderr or "token" in content or "rank = 0" in content


def test_nothing_given_shows_the_help_and_status_2(world):
    outcome = run(world)
    assert outcome.exit_code == 2 and "Commands" in outcome.stdout


# Failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init", "--model", "model", "--data", "missing.jsonl", "--output", "new"), "'missing.jsonl' does not exist"),
        ((*INIT, "--output", "new", "--target-modules", "qproj"), "Closest: q_proj"),
        ((*INIT, "--output", "new", "--rank", "9"), "rank 9 is above min(in, out)"),
        (("init", "--model", "", "--data", "data.jsonl", "--output", "new"), "the model has no name"),
        (("init", "--model", "model", "--data", "", "--output", "new"), "the data has no name"),
        (("init", "--model", "https://a.example/b", "--data", "data.jsonl", "--output", "new"), "is an address; give"),
        (("inspect", "missing"), "lora_da_report.json does not exist"),
        (("verify", "missing"), "lora_da_report.json does not exist"),
    ],
)
def test_failure_is_one_error_line_and_status_1(world, arguments, message):
    outcome = run(world, *arguments)
    assert outcome.exit_code == 1
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in outcome.output and not (world / "new").exists()


@pytest.mark.parametrize("targets", ["nosuch", ".*nosuch.*"])
def test_targets_that_are_not_there_are_refused_before_weights_are_read(world, no_loading, targets):
    outcome = run(world, *INIT, "--output", "new", "--target-modules", targets)
    assert outcome.exit_code == 1 and outcome.stderr.count("\n") == 1, outcome.output
    assert outcome.stderr.startswith(f"error: target_modules ['{targets}'] cannot be adapted.")
    assert "gate_proj" in outcome.stderr and not (world / "new").exists()


@pytest.mark.parametrize(
    ("targets", "closest"),
    [("Q_PROJ", "Closest: q_proj"), ("q_proj,norm", "PEFT says: Target module LlamaRMSNorm"), ("k_prj,norm", "k_proj")],
)
def test_names_are_suggested_for_those_that_are_not_there_alone(world, no_loading, targets, closest):
    outcome = run(world, *INIT, "--output", "new", "--target-modules", targets)
    assert outcome.exit_code == 1 and closest in outcome.stderr, outcome.output
    assert ("Closest" in outcome.stderr) == (targets != "q_proj,norm")


def test_targets_that_are_all_excluded_are_refused_by_the_name_of_what_excludes_them(world, no_loading):
    for targets, excluded in (("all-linear", ".*"), ("q_proj,v_proj", "v_proj,q_proj,up_proj")):
        chosen = ("--target-modules", targets, "--exclude-modules", excluded)
        outcome = run(world, *INIT, "--output", "new", *chosen)
        assert outcome.exit_code == 1 and outcome.stderr.count("\n") == 1, outcome.output
        assert outcome.stderr.startswith("error: exclude_modules ['") and "exclude fewer" in outcome.stderr
    outcome = run(world, *INIT, "--output", "new", "--target-modules", "nosuch", "--exclude-modules", ".*")
    assert outcome.stderr.startswith("error: target_modules ['nosuch'] cannot be adapted."), outcome.output


def test_a_target_that_is_not_there_beside_one_that_is_stands_in_the_notes(world):
    outcome = run(
        world, *INIT, "--output", "partly", "--rank", "2", "--samples", "8", "--target-modules", "q_proj,vproj"
    )
    assert outcome.exit_code == 0, outcome.output
    assert "no module has these names of target_modules: vproj" in " ".join(outcome.output.split())


@pytest.mark.parametrize("excluded", ["kproj", "kproj,v_proj", "[.]q_proj"])
def test_an_exclusion_that_fits_no_module_stands_in_the_notes(world, recwarn, excluded):
    chosen = ("--target-modules", "q_proj,v_proj", "--exclude-modules", excluded)
    outcome = run(world, *INIT, "--output", "kept", "--overwrite", "--rank", "2", "--samples", "8", *chosen)
    assert outcome.exit_code == 0, outcome.output
    missing = excluded.removesuffix(",v_proj")
    assert f"no module has these names of exclude_modules: {missing}" in " ".join(outcome.output.split())
    assert [str(each.message) for each in recwarn if "exclude_modules" in str(each.message)] == []


def test_debug_adds_the_traceback_wherever_it_stands(world):
    for arguments in (("--debug", "inspect", "missing"), ("inspect", "missing", "--debug")):
        outcome = run(world, *arguments)
        assert outcome.exit_code == 1
        assert "Traceback" in outcome.stderr and outcome.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted."),
        (ModelError("bad\x1b[31m\nmodel"), 1, "error: bad [31m model"),
        (RuntimeError("x" * 9000), 1, "(unexpected; --debug shows where)"),
        (torch.OutOfMemoryError("2 GiB"), 1, "error: out of memory; lower --batch-size"),
    ],
)
def test_whatever_is_raised_becomes_one_line(world, monkeypatch, raised, status, message):
    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr(lora_da_core.models, "load_model", fail)
    outcome = run(world, *INIT, "--output", "new")
    assert outcome.exit_code == status
    assert message in outcome.stderr and outcome.stderr.count("\n") == 1 and len(outcome.stderr) < 700
    assert not (world / "new").exists()


# init


def test_init_writes_an_adapter_that_stock_peft_loads(world, finished):
    assert {"adapter_config.json", "adapter_model.safetensors", "lora_da_report.json", "lora_da_config.json"} <= {
        path.name for path in finished.iterdir()
    }
    assert (finished / "spectra.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((finished / "adapter_config.json").read_text())
    assert stored["init_lora_weights"] is True and stored["r"] == 4
    assert stored["base_model_name_or_path"] == "model" and stored["task_type"] == "CAUSAL_LM"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "model"), finished)
    weights = load_file(finished / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2
    held = dict(loaded.named_parameters())
    for key, value in weights.items():
        name = key.removesuffix(".weight") + ".default.weight"
        assert torch.equal(held[name], value) and value.abs().max() > 0


def test_init_says_what_it_assumed_and_shows_the_report(world):
    outcome = run(
        world, *INIT, "--output", "shown", "--rank", "2", "--samples", "10", "--target-modules", "q_proj,v_proj"
    )
    assert outcome.exit_code == 0, outcome.output
    assert "note: columns question/answer" in outcome.stderr
    assert f"note: N = {ROWS}, the rows of the data set" in outcome.stderr
    assert "solve: 4/4" in outcome.stderr
    assert "10 samples" in outcome.stdout and "4 of 4 converged" in outcome.stdout
    assert outcome.stdout.splitlines()[-1] == (
        "saved to shown; to read it: lora-da inspect shown; to check it: lora-da verify shown"
    )
    report = storage.read_report(world / "shown")
    assert report.samples == 10 and report.config["population"] == ROWS
    assert any("N = 24" in sentence for sentence in report.notes)


def test_pipeline_warnings_are_shown_once_and_handlers_are_put_back(world):
    logger = logging.getLogger("lora_da_core")
    before = list(logger.handlers), logger.propagate
    outcome = run(world, *INIT, "--output", "few", "--rank", "1", "--samples", "3")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stderr.count("only 3 samples: the estimate is poor") == 1
    assert (list(logger.handlers), logger.propagate) == before


def test_options_reach_the_run_and_the_rest_stays_the_presets(world):
    outcome = run(
        world, *INIT, "--output", "options", "--preset", "paper", "--rank", "2", "--lora-alpha", "5", "--use-rslora",
        "--estimator-option", "output=full", "--solver", "eigh", "--beta", "0.5", "--no-normalize", "--population",
        "99", "--damping", "0.25", "--seed", "7", "--exclude-modules", "up_proj,down_proj",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    report = storage.read_report(world / "options")
    assert report.options["estimator"]["output"] == "full" and report.components["solver"] == "eigh"
    paper = Registry().resolve("preset", "paper").config
    given = {"beta": 0.5, "normalize": False, "population": 99, "damping": 0.25, "seed": 7, "samples": 24}
    expected = {entry.name: getattr(paper, entry.name) for entry in fields(paper)} | given
    assert dict(report.config) == expected
    stored = json.loads((world / "options" / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["use_rslora"]) == (2, 5.0, True)
    assert len(report.layers) == 10 and not any("up_proj" in layer.name for layer in report.layers)


def test_same_command_twice_gives_the_same_bytes_and_overwrite_replaces(world):
    command = (*INIT, "--output", "again", "--rank", "2", "--samples", "8")
    assert run(world, *command).exit_code == 0
    first = (world / "again" / "adapter_model.safetensors").read_bytes()
    assert run(world, *command).exit_code == 2
    (world / "again" / "left-over.txt").write_text("old")
    assert run(world, *command, "--overwrite").exit_code == 0
    assert (world / "again" / "adapter_model.safetensors").read_bytes() == first
    assert not (world / "again" / "left-over.txt").exists()


def test_init_keeps_within_a_limit_as_planned_and_gives_the_same_adapter(world):
    small = run(world, *INIT, "--output", "small", "--samples", "8", "--max-memory", "1KiB")
    assert small.exit_code == 2 and "the smallest that works" in small.stderr
    least = re.search(r"(\d+) bytes", small.stderr)
    assert least is not None
    limited = run(world, *INIT, "--output", "limited", "--samples", "8", "--max-memory", f"{least[1]}B")
    assert limited.exit_code == 0, limited.output
    assert "note: planned for a limit of" in limited.stderr
    assert run(world, *INIT, "--output", "whole", "--samples", "8").exit_code == 0
    # In smaller batches sums are added up in another order.
    limited, whole = (load_file(world / name / "adapter_model.safetensors") for name in ("limited", "whole"))
    assert limited.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(limited[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


def test_init_shows_the_plan_beside_the_outcome_and_what_a_plan_needs_to_tell_time(world):
    outcome = run(world, *INIT, "--output", "compared", "--samples", "8", "--solver", "eigh")
    assert outcome.exit_code == 0, outcome.output
    assert re.search(r"memory beyond the weights \(\S+ \wiB\): planned \S+ \w*B, measured \S+ \w*B", outcome.stdout)
    timed = re.search(r"1 pass over ([\d,]+) tokens in .*--throughput (\d+)", outcome.stdout)
    assert timed is not None
    tokens, throughput = int(timed[1].replace(",", "")), int(timed[2])
    report = storage.read_report(world / "compared")
    assert throughput == pytest.approx(tokens / report.seconds["statistics"], rel=0.01)


def test_a_second_init_reads_the_first_one_s_statistics(world):
    shared = ("--samples", "8", "--cache-dir", "kept")
    assert "statistics: " in run(world, *INIT, "--output", "first", "--rank", "2", *shared).stderr
    changed = ("--rank", "3", "--damping", "2", "--solver", "lanczos")
    again = run(world, *INIT, "--output", "reused", *changed, *shared)
    assert again.exit_code == 0, again.output
    assert "note: the statistics were read from the cache" in again.stderr and "statistics: " not in again.stderr
    assert run(world, *INIT, "--output", "plain", *changed, "--samples", "8").exit_code == 0
    adapters = [(world / name / "adapter_model.safetensors").read_bytes() for name in ("reused", "plain")]
    assert adapters[0] == adapters[1]


def test_an_interrupted_init_goes_on_where_it_was(world, monkeypatch):
    from lora_da_core import rounds

    def interrupted(*arguments):
        raise KeyboardInterrupt

    options = (*INIT, "--output", "resumed", "--rank", "2", "--samples", "8", "--resume")
    with monkeypatch.context() as patched:
        # The class itself also makes the plan.
        patched.setattr(rounds, "LayerSolver", type("Interrupted", (rounds.LayerSolver,), {"solve": interrupted}))
        assert run(world, *options).exit_code == 130
    assert (world / ".resumed.passes").is_dir() and not (world / "resumed").exists()
    again = run(world, *options)
    assert again.exit_code == 0, again.output
    assert "note: the statistics were read from the cache" in again.stderr and "statistics: " not in again.stderr
    assert not (world / ".resumed.passes").exists()
    assert run(world, *INIT, "--output", "at-once", "--rank", "2", "--samples", "8").exit_code == 0
    adapters = [(world / name / "adapter_model.safetensors").read_bytes() for name in ("resumed", "at-once")]
    assert adapters[0] == adapters[1]


def test_batch_size_does_not_change_the_result(world):
    for name, size in (("one", "1"), ("five", "5")):
        assert run(world, *INIT, "--output", name, "--rank", "2", "--batch-size", size).exit_code == 0
    one, five = (load_file(world / name / "adapter_model.safetensors") for name in ("one", "five"))
    for key, value in one.items():
        assert torch.allclose(value, five[key], atol=1e-3 * float(value.abs().max()))


def test_output_to_a_file_holds_no_control_characters(world):
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    command = [sys.executable, "-m", "lora_da_core.cli", *INIT, "--output", "piped", "--rank", "2"]
    with open(world / "log", "wb") as log:
        subprocess.run(
            command, cwd=world, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True, timeout=300
        )
    text = (world / "log").read_bytes().decode("utf-8")
    assert "saved to piped" in text
    # Before the report there is nothing of other libraries.
    told = re.compile(r"(note|warning): |(statistics|solve|scale|gradient): \d")
    assert not [line for line in re.split(r"\n +damping|\nlayer ", text)[0].splitlines() if not told.match(line)]
    assert [character for character in text if not character.isprintable() and character != "\n"] == []
    assert len([line for line in text.splitlines() if line.startswith("solve: ")]) <= LINES_PER_PHASE


# Config files


def test_config_file_gives_options_and_the_command_line_wins(world):
    (world / "run.toml").write_text(
        'model = "model"\ndata = "data.jsonl"\nrank = 3\ntarget-modules = ["q_proj", "k_proj"]\n'
        "damping = 2\nnormalize = false\nuse_rslora = true\n[estimator-option]\noutput = 'full'\n"
    )
    outcome = run(world, "init", "--config", "run.toml", "--output", "from-file", "--damping", "0.5")
    assert outcome.exit_code == 0, outcome.output
    report = storage.read_report(world / "from-file")
    assert {layer.rank for layer in report.layers} == {3} and len(report.layers) == 4
    assert report.config["damping"] == 0.5 and report.config["normalize"] is False
    assert report.options["estimator"]["output"] == "full"
    assert json.loads((world / "from-file" / "adapter_config.json").read_text())["use_rslora"] is True


def test_recorded_settings_repeat_the_run(world, finished):
    outcome = run(world, "init", "--config", "finished/lora_da_config.json", "--output", "repeated")
    assert outcome.exit_code == 0, outcome.output
    adapter = "adapter_model.safetensors"
    assert (world / "repeated" / adapter).read_bytes() == (finished / adapter).read_bytes()


# inspect


def test_inspect_shows_every_layer_and_saves_the_picture(world, finished):
    outcome = run(world, "inspect", "finished", "--plot", "picture.png")
    assert outcome.exit_code == 0, outcome.output
    assert len([line for line in outcome.stdout.splitlines() if "✓" in line]) == 14
    assert "14 of 14 converged" in outcome.stdout and "note: columns question/answer" in outcome.stdout
    assert (world / "picture.png").read_bytes() == (finished / "spectra.png").read_bytes()


def test_inspect_json_is_the_report(world, finished):
    (finished / "spectra.png").unlink()
    outcome = run(world, "inspect", "finished", "--json")
    assert outcome.exit_code == 0
    assert storage.report_from_json(json.loads(outcome.stdout)) == storage.read_report(finished)
    assert not (finished / "spectra.png").exists()
    assert run(world, "inspect", "finished").exit_code == 0
    assert (finished / "spectra.png").exists()


# verify


def test_verify_passes_on_what_init_wrote(world, finished):
    for extra in ((), ("--model", "model", "--data", "data.jsonl")):
        outcome = run(world, "verify", "finished", *extra)
        assert outcome.exit_code == 0, outcome.output
        assert outcome.stdout.count("✓") == len(outcome.stdout.splitlines()) >= 5


def test_verify_loads_the_model_in_the_run_s_precision(world):
    assert run(world, *INIT, "--output", "half", "--rank", "2", "--dtype", "bfloat16").exit_code == 0
    outcome = run(world, "verify", "half")
    assert outcome.exit_code == 0, outcome.output
    assert run(world, "verify", "half", "--dtype", "float32").exit_code == 1


def test_verify_fails_on_an_adapter_that_was_changed(world):
    assert run(world, *INIT, "--output", "changed", "--rank", "2", "--target-modules", "q_proj").exit_code == 0
    path = world / "changed" / "adapter_model.safetensors"
    weights = load_file(path)
    key = sorted(weights)[0]
    layer = key.removeprefix("base_model.model.").split(".lora_")[0]
    weights[key].view(-1)[0] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    outcome = run(world, "verify", "changed")
    assert outcome.exit_code == 1
    (wrong,) = [line for line in outcome.stdout.splitlines() if line.startswith("✗")]
    assert layer in wrong


def test_verify_names_a_missing_file_and_an_unknown_model(world):
    assert run(world, *INIT, "--output", "broken", "--rank", "2", "--target-modules", "q_proj").exit_code == 0
    settings = world / "broken" / "lora_da_config.json"
    settings.write_text("{}")
    outcome = run(world, "verify", "broken")
    assert outcome.exit_code == 2 and "give --model" in outcome.stderr
    (world / "broken" / "adapter_model.safetensors").unlink()
    outcome = run(world, "verify", "broken", "--model", "model")
    assert outcome.exit_code == 1 and "adapter_model.safetensors does not exist" in outcome.stderr


# plan


PLAN = ("plan", "--model", "configuration", "--device", "cpu", "--samples", "8", "--max-length", "32")


@pytest.fixture(scope="module")
def shapes(world):
    """A directory with a configuration and nothing else."""
    (world / "configuration").mkdir()
    (world / "configuration" / "config.json").write_text((world / "model" / "config.json").read_text())
    return world


def test_plan_needs_nothing_but_a_configuration(shapes, no_loading):
    outcome = run(shapes, *PLAN, "--batch-size", "4")
    assert outcome.exit_code == 0, outcome.output
    for part in ("activations of a batch", "together: the peak", "on cpu, in float32", "of all 14 layers"):
        assert part in outcome.stdout
    assert "1 pass over 256 tokens in batches of 4 × 32" in outcome.stdout
    assert "time unknown without --throughput" in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 120


def test_plan_as_json(shapes, no_loading):
    outcome = run(shapes, *PLAN, "--json", "--throughput", "100", "--estimator", "ekfac", "--max-memory", "1GB")
    assert outcome.exit_code == 0, outcome.output
    plan = json.loads(outcome.stdout)
    assert (plan["passes"], plan["seconds"], plan["fits"], plan["max_memory"]) == (2, 2 * 256 / 100, True, 10**9)
    assert (plan["layers"], plan["layers_per_pass"], plan["batch_size"]) == (14, 14, 8)
    phases = {}
    for row in plan["rows"]:
        assert set(row) == {"phase", "what", "bytes"}
        phases[row["phase"]] = phases.get(row["phase"], 0) + row["bytes"]
    assert plan["peak_bytes"] == max(phases.values()) > plan["statistics_bytes"] > 0
    assert json.loads(run(shapes, *PLAN, "--json").stdout)["seconds"] is None


def test_plan_divides_the_layers_under_a_limit(shapes):
    whole = json.loads(run(shapes, *PLAN, "--json").stdout)
    limit = whole["peak_bytes"] - 1
    divided = json.loads(run(shapes, *PLAN, "--json", "--max-memory", f"{limit}B").stdout)
    assert (divided["schedule"], divided["passes"]) == ("blocks", 1) and divided["peak_bytes"] <= limit
    assert divided["layers_per_pass"] < whole["layers_per_pass"] == 14
    told = run(shapes, *PLAN, "--max-memory", f"{limit}B").stdout
    assert f"in {len(divided['parts'])} parts of blocks that are run again, the last ones first" in told


def test_plan_that_does_not_fit_says_what_to_change_and_fails(shapes):
    outcome = run(shapes, *PLAN, "--max-memory", "10kB")
    assert outcome.exit_code == 1
    text = " ".join(outcome.stdout.split())
    assert "even with the layers of one input per pass, above the limit of 9.8 KiB" in text
    assert "leave large layers out with exclude_modules" in text
    assert json.loads(run(shapes, *PLAN, "--max-memory", "10kB", "--json").stdout)["fits"] is False


def test_plan_of_a_missing_model_is_one_error_line(shapes):
    outcome = run(shapes, "plan", "--model", "./nowhere")
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("error: model './nowhere' does not exist") and outcome.stderr.count("\n") == 1


def test_what_a_plan_waits_for_is_said_but_not_beside_json(world):
    (world / "large.gguf").write_bytes(b"not a model")
    told, silent = (run(world, "plan", "--model", "large.gguf", *more) for more in ((), ("--json",)))
    assert told.stderr.startswith("note: reading the header of 'large.gguf', which holds the vocabulary")
    assert silent.stderr.startswith("error: ") and silent.exit_code == told.exit_code == 1


def test_init_says_that_it_asks_the_hub_and_asks_once_where_there_is_no_network(world, monkeypatch):
    def refused(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refused)
    monkeypatch.setattr(lora_da_core.models, "load_model", lambda *args, **kwargs: pytest.fail("it was asked again"))
    outcome = run(world, "init", "--model", "some/model", "--data", "data.jsonl", "--output", "new")
    first, last = outcome.stderr.splitlines()
    assert outcome.exit_code == 1 and first.startswith("note: looking for model 'some/model' on the hub; ")
    assert "the network cannot be reached: Name or service not known." in last


# plugins, help, options


def test_plugins_as_table_and_json(world):
    outcome = run(world, "plugins", "--json")
    assert outcome.exit_code == 0
    records = json.loads(outcome.stdout)
    assert {"kind", "name", "distribution", "version", "status", "reason"} == set(records[0])
    assert ("estimator", "kfac", "ok") in {(entry["kind"], entry["name"], entry["status"]) for entry in records}
    table = run(world, "plugins").stdout
    assert all(entry["name"] in table for entry in records)


def test_plugins_shows_what_is_blocked(world):
    outcome = run(world, "plugins", env={"LORA_DA_BLOCK": "kfac"})
    assert outcome.exit_code == 0
    assert "blocked" in outcome.stdout and "LORA_DA_BLOCK" in outcome.stdout


def test_help_names_every_option_with_its_default(world):
    text = " ".join(run(world, "init", "--help", env={"COLUMNS": "240"}).stdout.split())
    for entry in fields(InitOptions):
        assert f"--{entry.name.replace('_', '-')}" in text
    defaults = Registry().resolve("preset", "robust").config
    for name in ("alpha", "beta", "damping"):
        assert f"robust: {getattr(defaults, name):g})" in text
    for name in ("scale", "normalize", "damping_kind", "fisher_scale", "token_mask", "unconverged"):
        assert f"robust: {getattr(defaults, name)})" in text


def test_every_setting_of_a_run_has_an_option():
    # Whether processes share a run is the launcher's choice.
    settings = {entry.name for entry in fields(LoraDAConfig)} - {"distributed"}
    assert settings <= {entry.name for entry in fields(InitOptions)}


def test_version(world):
    outcome = run(world, "--version")
    assert outcome.exit_code == 0 and outcome.stdout.startswith("lora-da ")


def test_help_imports_neither_peft_nor_transformers_nor_matplotlib():
    script = (
        "import sys\nfrom lora_da_core.cli import app\n"
        "try:\n    app(['init', '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "print([name for name in ('peft', 'transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert outcome.stdout.splitlines()[-1] == "[]"


def options(**changes):
    return InitOptions(**{"model": "m", "data": "d", "output": Path("o"), **changes})


def test_component_options_are_added_to_the_presets():
    paper = Registry().resolve("preset", "paper")
    name, standing = paper.estimator
    assert options().component("estimator", paper) == paper.estimator
    pairs = ["labels=sampled", "size=3", "ratio=1e-3", "on=True", "off=false", "none=null", "text=a=b"]
    values = {"labels": "sampled", "size": 3, "ratio": 1e-3, "on": True, "off": False, "none": None, "text": "a=b"}
    assert options(estimator_option=pairs).component("estimator", paper) == (name, {**standing, **values})
    assert options(estimator="identity").component("estimator", paper) == "identity"
    assert options(solver="eigh").component("solver", paper) == "eigh"
    with pytest.raises(OptionError, match="needs --solver"):
        options(solver_option=["a=1"]).component("solver", paper)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj,,", ["q_proj"]),
        ("", ""),
        ("q_proj, 0.self_attn.v_proj", ["q_proj", "0.self_attn.v_proj"]),
        (r".*\.(q|k)_proj", r".*\.(q|k)_proj"),
        ("model.layers.[01].*", "model.layers.[01].*"),
    ],
)
def test_module_names(text, expected):
    assert module_names(text) == expected


def test_metavars_list_the_choices(world):
    text = " ".join(run(world, "init", "--help", env={"COLUMNS": "240"}).stdout.split())
    for choices in (
        "labels | attention",
        "relative | absolute",
        "token_mean | sample",
        "fallback | warn | error",
        "auto | fixed",
    ):
        assert choices in text


# Progress


@pytest.mark.parametrize("total", [1, 7, 10, 210, 1001])
def test_plain_progress_writes_few_lines_and_the_last(total):
    lines, now = [], iter(range(10**6))
    progress = PlainProgress(lines.append, clock=lambda: next(now))
    for done in range(1, total + 1):
        progress("solve", done, total)
    assert 1 <= len(lines) <= LINES_PER_PHASE
    assert lines[-1].startswith(f"solve: {total}/{total}, ")


def test_plain_progress_estimates_the_time_left():
    lines, clock = [], {"now": 0.0}
    progress = PlainProgress(lines.append, clock=lambda: clock["now"])
    for done in range(1, 11):
        progress("solve", done, 10)
        clock["now"] += 2.0
    assert lines[4] == "solve: 5/10, about 10 s left"
    assert lines[-1] == "solve: 10/10, 18.0 s"


def test_plain_progress_without_a_total_stays_short():
    lines = []
    progress = PlainProgress(lines.append, clock=lambda: 0.0)
    for done in range(1, 5000):
        progress("scale", done, 0)
    counts = [f"{2**power} losses" for power in range(1, LINES_PER_PHASE)]
    assert lines == [f"scale: {count}, 0.0 s" for count in ("1 loss", *counts)]
    progress.close()
    assert lines[LINES_PER_PHASE:] == ["scale: 4999 losses, 0.0 s"]


def test_plain_progress_says_a_last_count_once():
    lines = []
    progress = PlainProgress(lines.append, clock=lambda: 0.0)
    for done in range(1, 5):
        progress("scale", done, 0)
    progress("solve", 1, 2)
    progress.close()
    assert lines == ["scale: 1 loss, 0.0 s", "scale: 2 losses, 0.0 s", "scale: 4 losses, 0.0 s", "solve: 1/2, 0.0 s"]


def test_a_bar_without_a_total_counts_and_does_not_ask():
    console = Console(width=100)
    bars = Progress(Counts(), console=console)
    live = LiveProgress(bars)
    for done, text in ((1, "1 loss"), (4, "4 losses")):
        live("scale", done, 0)
        with console.capture() as shown:
            console.print(bars)
        assert shown.get().strip() == text
    live.close()
    assert bars.finished
    with console.capture() as shown:
        console.print(bars)
    assert shown.get().strip() == "4 losses"


def test_terminal_gets_bars_with_counts(tmp_path):
    with open(tmp_path / "screen", "w", encoding="utf-8") as screen:
        console = Console(file=screen, force_terminal=True, width=100)
        with shown_progress(console) as on_progress:
            for done in range(1, 4):
                on_progress("statistics", done, 3)
            on_progress("scale", 1, 0)
            logging.getLogger("lora_da_core.pipeline").warning("a [sentence] with %s", "brackets")
    text = (tmp_path / "screen").read_text(encoding="utf-8")
    assert "3/3" in text and "1 loss" in text and "warning: a [sentence] with brackets" in text
