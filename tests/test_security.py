"""Nothing that is read may run code, write elsewhere, exhaust the machine, or leak the training text."""

from __future__ import annotations

import ast
import gzip
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from typer.testing import CliRunner

import lora_da_core
from conftest import make_tiny_llama
from lora_da_core import data, models, storage
from lora_da_core.cli import app

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("lora_da_core", "plugins", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "torch.save", "os.system", "os.popen", "tempfile.mktemp"}
CANARY = "wombatquince"


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[bytes, Path]:
    """A pickle, and the directory that is there once somebody has loaded it."""
    mark = tmp_path / "pickle-was-loaded"
    content = pickle.dumps(Bomb(mark))
    pickle.loads(content)  # it works
    assert mark.is_dir()
    mark.rmdir()
    return content, mark


def invoke(*arguments: str) -> Any:
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}).invoke(app, list(arguments))


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


INIT = ("init", "--model", "model", "--samples", "8", "--rank", "2", "--target-modules", "q_proj,v_proj")


# Code


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults_of(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        found += [f"imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in FORBIDDEN_CALLS:
            found.append(f"calls {name}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and value is True:
                found.append(f"passes {keyword.arg}=True")
            if keyword.arg == "weights_only" and value is False:
                found.append("passes weights_only=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_unpickles_evaluates_or_asks_a_shell(path: Path) -> None:
    assert faults_of(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from dill import loads", "torch.load(f)", "np.load(f, allow_pickle=True)", "eval(text)",
     "run(command, shell=True)", "load(f, weights_only=False)", "from_pretrained(x, trust_remote_code=True)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert faults_of(ast.parse(code))


# Pickles as cache, adapter, model and data


def test_a_pickle_in_the_cache_is_quarantined(here: Path, tmp_path: Path, bomb: tuple[bytes, Path]) -> None:
    content, mark = bomb
    arguments = (*INIT, "--data", "data.jsonl", "--cache-dir", str(tmp_path / "cache"))
    assert invoke(*arguments, "--output", str(tmp_path / "one")).exit_code == 0
    (entry,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    for name in ("statistics.safetensors", "manifest.json"):
        (entry / name).write_bytes(content)
        outcome = invoke(*arguments, "--output", str(tmp_path / f"after-{name}"))
        assert outcome.exit_code == 0 and "quarantined" in outcome.stderr
    assert not mark.exists()
    first, *others = (path.read_bytes() for path in sorted(tmp_path.glob("*/adapter_model.safetensors")))
    assert others == [first, first]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_pickle_as_an_adapter_is_refused(here: Path, tmp_path: Path, bomb: tuple[bytes, Path], name: str) -> None:
    content, mark = bomb
    target = tmp_path / "adapter"
    assert invoke(*INIT, "--data", "data.jsonl", "--output", str(target)).exit_code == 0
    (target / "adapter_model.safetensors").unlink()
    (target / name).write_bytes(content)
    outcome = invoke("verify", str(target))
    assert outcome.exit_code == 1 and outcome.stderr.startswith("error: ") and not mark.exists()


def test_a_pickle_as_a_checkpoint_is_refused(here: Path, tmp_path: Path, bomb: tuple[bytes, Path]) -> None:
    content, mark = bomb
    for path in (here / "model").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(lora_da_core.ModelError):
        models.load_model(tmp_path, device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["rows.pkl", "rows.jsonl", "rows.csv", "rows.parquet", "folder/rows.pkl", "folder/rows.pt"]
)
def test_a_pickle_as_data_is_refused(tmp_path: Path, bomb: tuple[bytes, Path], name: str) -> None:
    content, mark = bomb
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(lora_da_core.DataError):
        data.load_rows(path.parent if path.parent != tmp_path else path)
    assert not mark.exists()


# Code that comes with a model or a data set


CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({mark!r}).touch()
class Config(LlamaConfig):
    model_type = "stranger"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def with_code(base: Path, folder: Path, mark: Path) -> Path:
    """The model with a module of its own, as a stranger may publish it."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "stranger"
    config["auto_map"] = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "stranger.py").write_text(CODE.format(mark=str(mark)))
    return folder


def test_a_models_code_runs_only_when_the_command_line_asks(here: Path, tmp_path: Path) -> None:
    mark, settings, grid = tmp_path / "ran", tmp_path / "settings.json", tmp_path / "grid.toml"
    model = with_code(here / "model", tmp_path / "stranger", mark)
    init = ("init", "--model", str(model), "--data", "data.jsonl", "--samples", "8", "--rank", "2", "--output")
    outcome = invoke(*init, str(tmp_path / "out"))
    assert outcome.exit_code == 1 and not mark.exists()
    settings.write_text('{"trust-remote-code": true}')
    outcome = invoke(*init, str(tmp_path / "out"), "--config", str(settings))
    assert outcome.exit_code == 2 and "command line" in outcome.stderr and not mark.exists()
    grid.write_text(f'[run]\nmodel = "{model}"\ndata = "data.jsonl"\ntrust_remote_code = true\n[grid]\nrank = [2]\n')
    outcome = invoke("ablate", str(grid), "--output", str(tmp_path / "ablated"))
    assert outcome.exit_code == 2 and "--trust-remote-code" in outcome.stderr and not mark.exists()
    outcome = invoke(*init, str(tmp_path / "out"), "--trust-remote-code")
    assert mark.exists(), outcome.output


def test_a_data_sets_script_does_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(lora_da_core.DataError, match="script"):
        data.load_rows(folder)
    assert not (tmp_path / "ran").exists()


# Files elsewhere


@pytest.mark.parametrize("name", ["..", "../up", "/abs", "a/b", "", ".", "a\x00b"])
def test_an_adapters_name_cannot_leave_its_directory(name: str, batches: Any) -> None:
    with pytest.raises(lora_da_core.LoraDAError):
        lora_da_core.get_lora_da_model(
            make_tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), batches, adapter_name=name
        )


def test_a_picture_does_not_follow_a_link_out_of_an_adapters_directory(here: Path, tmp_path: Path) -> None:
    target, victim = tmp_path / "adapter", tmp_path / "precious"
    assert invoke(*INIT, "--data", "data.jsonl", "--output", str(target)).exit_code == 0
    victim.write_text("precious")
    (target / "spectra.png").symlink_to(victim)
    assert invoke("inspect", str(target)).exit_code == 0
    assert victim.read_text() == "precious" and (target / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_output_and_cache_do_not_write_through_links_that_were_put_there(here: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    cache = tmp_path / "cache"
    arguments = (*INIT, "--data", "data.jsonl", "--cache-dir", str(cache))
    assert invoke(*arguments, "--output", str(tmp_path / "one")).exit_code == 0
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    for path in entry.iterdir():
        path.unlink()
    entry.rmdir()
    entry.symlink_to(victim)
    lock = Path(f"{entry}.lock")
    lock.unlink(missing_ok=True)
    lock.symlink_to(victim / "precious")
    outcome = invoke(*arguments, "--output", str(tmp_path / "two"))
    assert (victim / "precious").read_text() == "precious" and len(list(victim.iterdir())) == 1, outcome.output
    assert outcome.exit_code == 1 and "cannot be locked" in outcome.stderr
    lock.unlink()
    assert invoke(*arguments, "--output", str(tmp_path / "two")).exit_code == 0
    assert (victim / "precious").read_text() == "precious" and len(list(victim.iterdir())) == 1


def test_a_report_cannot_steer_the_terminal(here: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    assert invoke(*INIT, "--data", "data.jsonl", "--output", str(target)).exit_code == 0
    content = json.loads((target / storage.REPORT_FILE).read_text())
    content["notes"].append("\x1b]0;title\x07\x1b[2J")
    content["layers"][0]["name"] = "\x1b[31mred\x1b[2J.q_proj"
    content["components"]["estimator"] = "\x1b[2J"
    (target / storage.REPORT_FILE).write_text(json.dumps(content))
    outcome = invoke("inspect", str(target))
    assert outcome.exit_code == 0 and "\x1b" not in outcome.output and "\x07" not in outcome.output


# Hostile sizes and depths


def archive(kind: str, path: Path) -> None:
    row = b'{"text": "a"}\n'
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("../up.jsonl", row)
    elif kind == "tar":
        with tarfile.open(path, "w") as file:
            entry = tarfile.TarInfo("../up.jsonl")
            entry.size = len(row)
            file.addfile(entry, io.BytesIO(row))
    else:
        path.write_bytes(gzip.compress(row * 2**16))


@pytest.mark.parametrize("before", [0, 2**24 - 20, 2**24 - 14, 2**24])
def test_text_that_is_not_utf_8_is_refused_where_it_stands(tmp_path: Path, before: int) -> None:
    path = tmp_path / "latin.jsonl"
    good = " " * before + '{"question": "caf\u00e9", "answer": "b"}\n'
    path.write_bytes(good.encode())
    assert len(data.load_rows(path)) == 1
    path.write_bytes(good.encode("latin-1"))
    with pytest.raises(lora_da_core.DataError, match=f"is not UTF-8 at byte {before + 17};"):
        data.load_rows(path)
    path.write_bytes(good.encode()[: before + 18])
    with pytest.raises(lora_da_core.DataError, match=f"is not UTF-8 at byte {before + 17};"):
        data.load_rows(path)


@pytest.mark.parametrize("kind", ["zip", "tar", "gzip"])
@pytest.mark.parametrize("name", ["rows.jsonl", "folder/rows.bin"])
def test_archives_are_not_unpacked(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    archive(kind, path)
    with pytest.raises(lora_da_core.DataError, match=f"is a {kind} archive"):
        data.load_rows(path.parent if "/" in name else path)


@pytest.mark.parametrize(
    "content",
    ['{"text": ' + "[" * 50000 + "]" * 50000 + "}", '{"a":' * 50000 + "1" + "}" * 50000, "[\n" * 50000, "[" * 50000],
    ids=["lists", "objects", "lines", "unclosed"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_without_end_is_refused_before_its_reader_crashes(tmp_path: Path, content: str, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text('{"text": "a"}\n' + content)
    with pytest.raises(lora_da_core.DataError, match="nested deeper than 256 levels"):
        data.load_rows(path)


def test_brackets_within_text_are_no_nesting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "[{" * 400}, {"text": 'say \\"["'}, {"text": "\\"}, {"text": "]}" * 400}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (1, 2, 3, 7, 2**24):
        monkeypatch.setattr("lora_da_core.data_files._CHUNK", size)
        assert [row["text"] for row in data.load_rows(path)] == [row["text"] for row in rows]  # type: ignore[attr-defined]


@pytest.mark.parametrize("allocation", [{"a": 1}, {"unit": "rank", "spent": None}, {"unit": 1}, 5])
def test_an_allocation_that_no_run_writes_is_refused(here: Path, tmp_path: Path, allocation: Any) -> None:
    target = tmp_path / "adapter"
    assert invoke(*INIT, "--data", "data.jsonl", "--output", str(target)).exit_code == 0
    content = {**json.loads((target / storage.REPORT_FILE).read_text()), "allocation": allocation}
    (target / storage.REPORT_FILE).write_text(json.dumps(content))
    outcome = invoke("inspect", str(target))
    assert outcome.exit_code == 1 and "this is not a lora-da report" in outcome.stderr


def test_a_report_without_end_is_refused(tmp_path: Path) -> None:
    for content in ("[" * 100000, '{"layers": ' + "[" * 100000, " " * 2**26 + "{}"):
        (tmp_path / storage.REPORT_FILE).write_text(content)
        with pytest.raises(lora_da_core.StorageError):
            storage.read_report(tmp_path)


# Training text


@pytest.fixture
def secret(here: Path, tmp_path: Path) -> Path:
    """The world's rows with the canary in every column of every row."""
    rows = [json.loads(line) for line in (here / "data.jsonl").read_text().splitlines()]
    path = tmp_path / "secret.jsonl"
    path.write_text(
        "".join(json.dumps({key: f"{CANARY} {text} {CANARY}" for key, text in row.items()}) + "\n" for row in rows)
    )
    return path


def files_with_canary(folder: Path) -> list[str]:
    marks = (CANARY.encode(), CANARY[:8].encode())
    return [str(path) for path in folder.rglob("*") if path.is_file() and any(m in path.read_bytes() for m in marks)]


def test_no_training_text_in_what_init_says_and_leaves(here: Path, tmp_path: Path, secret: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for place, extra in enumerate(([], ["--max-length", "4"], ["--debug", "--layers-per-pass", "1"])):
        cache = [] if "--layers-per-pass" in extra else ["--cache-dir", str(out / "cache")]
        outcome = invoke(*INIT, "--data", str(secret), "--output", str(out / str(place)), "--plot", *cache, *extra)
        assert CANARY not in outcome.output, outcome.output
        if outcome.exit_code == 0:
            for command in ("inspect", "verify"):
                assert CANARY not in invoke(command, str(out / str(place))).output
    assert (out / "0" / "adapter_config.json").exists() and files_with_canary(out) == []


def test_no_training_text_in_an_ablation(here: Path, tmp_path: Path, secret: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f'[run]\nmodel = "model"\ndata = "{secret}"\nsamples = 8\ntarget_modules = ["q_proj"]\n'
        "[grid]\nrank = [2, 100]\n"
        "[run.finetune]\nsteps = 2\nlearning_rates = [1e-3]\neval_steps = [0, 2]\nbatch_size = 2\nheld_out = 8\n"
    )
    outcome = invoke("ablate", str(grid), "--output", str(tmp_path / "out"))
    assert outcome.exit_code == 0 and CANARY not in outcome.output, outcome.output
    assert files_with_canary(tmp_path / "out") == []


@pytest.mark.parametrize(
    "rows",
    [
        '{"messages": [{"role": "assistant", "content": ["CANARY"]}]}',
        '{"messages": [{"from": "assistant", "value": "CANARY"}]}',
        '{"messages": ["CANARY"]}',
        '{"messages": [{"role": "user", "content": "CANARY"}]}',
        '{"question": {"CANARY": "CANARY"}, "answer": "a"}',
        '{"question": "CANARY", "answer": ["CANARY"]}',
        '{"other": "CANARY"}',
        '{"question": "CANARY", "answer": ""}',
        '{"question": "CANARY", "answer": "CANARY" oops}',
        '{"question": "CANARY"\n',
        "not JSON at all: CANARY",
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_no_training_text_in_errors(
    here: Path, tmp_path: Path, rows: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(rows.replace("CANARY", CANARY) + "\n", encoding="utf-8")
    with caplog.at_level(logging.DEBUG, logger="lora_da_core"):
        outcome = invoke(*INIT, "--data", str(path), "--output", str(tmp_path / "out"))
    assert outcome.exit_code in (1, 2) and outcome.stderr.startswith("error: ")
    if suffix == ".jsonl":  # a CSV's first line names columns, which errors may name
        assert CANARY not in outcome.output + caplog.text


def test_a_chat_templates_complaint_holds_no_training_text(here: Path, tmp_path: Path) -> None:
    loaded = models.load_model(here / "model", device="cpu")
    loaded.tokenizer.chat_template = "{{ raise_exception('no such role: ' + messages[0]['content']) }}"
    rows = [{"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": CANARY}]}]
    with pytest.raises(lora_da_core.DataError, match="chat template refuses") as caught:
        data.encode_text(rows, loaded.tokenizer)
    assert CANARY not in str(caught.value)


# Ctrl-C before anything runs


def test_modules_leave_the_process_alone_when_they_are_imported() -> None:
    code = (
        "import signal, threading, logging\nbefore = signal.getsignal(signal.SIGINT), threading.active_count()\n"
        "import lora_da_core, lora_da_core.cli\n"
        "assert (signal.getsignal(signal.SIGINT), threading.active_count()) == before\n"
        "assert not logging.getLogger('lora_da_core').handlers\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_factors_are_written_as_safetensors_alone(here: Path, tmp_path: Path) -> None:
    assert invoke(*INIT, "--data", "data.jsonl", "--output", str(tmp_path / "out")).exit_code == 0
    suffixes = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert suffixes <= {".json", ".safetensors", ".md"}, suffixes
