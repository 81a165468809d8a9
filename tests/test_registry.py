"""Plugins as they are found in the wild: real distributions on the path, good and broken in every way we know."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_da_core import build_pipeline, list_plugins
from lora_da_core.errors import LoraDAError, OptionError, PluginError, UnknownNameError
from lora_da_core.registry import HOOK_OF_KIND, Registry

ALL_KINDS = {"allocator", "estimator", "gradient", "solver", "objective", "preset", "regularizer", "trainer"}

HEADER = """
from __future__ import annotations
from dataclasses import dataclass, replace
import torch
from lora_da_core import hookimpl
from lora_da_core.interfaces import FisherEstimator, Solver, NoOptions
from lora_da_core.operators import Dense, DenseMap, Diagonal
from lora_da_core.types import EigenResult
"""
SOLVER = """
class Plain(Solver[NoOptions]):
    '''Dense eigh.'''
    name = "{name}"
    api_version = 1
    def smallest(self, operator, rank, *, generator):
        values, vectors = torch.linalg.eigh(operator.to_dense())
        vectors = vectors[:, :rank]
        residuals = (operator.matmat(vectors) - vectors * values[:rank]).norm(dim=0)
        return EigenResult(values[:rank], vectors, residuals, torch.tensor(True), 2, torch.tensor(float("nan")))

@hookimpl
def lora_da_solvers():
    return [Plain]
"""


class Site:
    """A folder on the path into which distributions are installed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modules: list[str] = []

    def install(self, name: str, source: str, *, version: str = "1.2", module: str = "", entry: str = "") -> str:
        """Writes a module and its dist-info, as pip would; returns the module's name."""
        module = module or name.replace("-", "_")
        (self.path / f"{module}.py").write_text(HEADER + textwrap.dedent(source))
        info = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[lora_da_core]\n{entry or module} = {module}\n")
        (info / "RECORD").write_text(f"{module}.py,,\n{info.name}/METADATA,,\n{info.name}/entry_points.txt,,\n")
        self.modules.append(module)
        importlib.invalidate_caches()
        return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for variable in ("LORA_DA_STRICT_PLUGINS", "LORA_DA_BLOCK"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    made = Site(folder)
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)


def records(**wanted: str) -> list[dict[str, str]]:
    return [r for r in list_plugins() if all(r[key] == value for key, value in wanted.items())]


def record(**wanted: str) -> dict[str, str]:
    (found,) = records(**wanted)
    return found


BROKEN: dict[str, tuple[str, str]] = {
    "import-error": ("import a_package_that_nobody_has", "ModuleNotFoundError: No module named 'a_package_that"),
    "syntax-error": ("def broken(:\n    pass", "SyntaxError"),
    "exits": ("import sys; sys.exit('no licence key')", "SystemExit: no licence key"),
    "raises": ("raise RuntimeError('CUDA is\\nmissing')", "RuntimeError: CUDA is missing"),
    "unknown-hook": (
        "@hookimpl\ndef lora_da_solverz():\n    return []",
        "PluginValidationError: unknown hook 'lora_da_solverz'",
    ),
    "wrong-signature": (
        "@hookimpl\ndef lora_da_solvers(device):\n    return []",
        "PluginValidationError: Plugin 'wrong-signature:wrong_signature' for hook 'lora_da_solvers'",
    ),
    "half-registered": (
        SOLVER.format(name="half") + "\n@hookimpl\ndef lora_da_layer_finished(layer, rapport):\n    pass",
        "PluginValidationError",
    ),
}
BROKEN_COMPONENTS: dict[str, tuple[str, str]] = {
    "raises-when-called": (
        "@hookimpl\ndef lora_da_solvers():\n    raise OSError('no such file')",
        "OSError: no such file",
    ),
    "exits-when-called": ("@hookimpl\ndef lora_da_solvers():\n    raise SystemExit(3)", "SystemExit: 3"),
    "returns-nothing": ("@hookimpl\ndef lora_da_solvers():\n    pass", "TypeError: 'NoneType' object is not iterable"),
    "raises-midway": (
        "@hookimpl\ndef lora_da_solvers():\n    yield 1 / 0",
        "ZeroDivisionError: division by zero",
    ),
    "wrong-version": (
        SOLVER.format(name="future").replace("api_version = 1", "api_version = 99"),
        "written for plugin API version 99; this lora-da-core has version 1",
    ),
    "no-version": (
        SOLVER.format(name="timeless").replace("api_version = 1", "pass"),
        "written for plugin API version None",
    ),
    "abstract": (
        "class Empty(Solver):\n    name = 'empty'\n    api_version = 1\n"
        "@hookimpl\ndef lora_da_solvers():\n    return [Empty]",
        "methods are missing: smallest",
    ),
    "an-instance": (
        SOLVER.format(name="made").replace("[Plain]", "[Plain(NoOptions())]"),
        "is not a subclass of Solver",
    ),
    "another-kind": (
        SOLVER.format(name="misplaced").replace("lora_da_solvers", "lora_da_fisher_estimators"),
        "is not a subclass of FisherEstimator",
    ),
    "bad-name": (SOLVER.format(name="a:b"), "its name is 'a:b'"),
    "no-name": (SOLVER.format(name="x").replace('name = "x"', "pass"), "its name is None"),
    "thawed-options": (
        SOLVER.format(name="thawed").replace(
            "api_version = 1", "api_version = 1\n    @dataclass\n    class Options:\n        size: int = 1"
        ),
        "its Options is not a frozen dataclass",
    ),
    "twice": (
        SOLVER.format(name="twin") + "\nclass Other(Plain):\n    '''The same name.'''\n"
        "@hookimpl\ndef lora_da_solvers():\n    return [Plain, Other]",
        "twice offers another solver of this name already",
    ),
}


@pytest.mark.parametrize("name", [*BROKEN, *BROKEN_COMPONENTS])
def test_a_broken_plugin_is_listed_with_its_reason_and_harms_no_other(name: str, site: Site) -> None:
    before = records(distribution="lora-da-core")
    source, reason = (BROKEN | BROKEN_COMPONENTS)[name]
    site.install(name, source)
    site.install("good", SOLVER.format(name="good"))
    kind = "plugin" if name in BROKEN else None
    (found,) = [r for r in records(distribution=name) if r["status"] == "failed"]
    assert kind is None or found["kind"] == kind
    assert found["version"] == "1.2"
    assert reason in found["reason"] and "\n" not in found["reason"]
    assert records(distribution="lora-da-core") == before
    assert record(distribution="good")["status"] == "ok"
    assert Registry().create("solver", "good").name == "good"
    with pytest.raises(
        UnknownNameError, match=r"unknown solver 'nowhere'\. Available: .*good.*\. 1 plugin could not"
    ) as e:
        build_pipeline(solver="nowhere")
    assert name in str(e.value) and reason in str(e.value)
    assert str(e.value).endswith("Run 'lora-da plugins'.")


@pytest.mark.parametrize("name", [*BROKEN, *BROKEN_COMPONENTS])
def test_strict_raises_and_names_the_plugin(name: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reason = (BROKEN | BROKEN_COMPONENTS)[name]
    site.install(name, source)
    monkeypatch.setenv("LORA_DA_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError) as caught:
        Registry()
    assert name in str(caught.value) and reason in str(caught.value)
    monkeypatch.setenv("LORA_DA_STRICT_PLUGINS", "0")
    assert "eigh" in Registry().names("solver")


def test_a_half_registered_plugin_answers_no_hook(site: Site) -> None:
    site.install("half-registered", BROKEN["half-registered"][0])
    registry = Registry()
    assert "half" not in registry.names("solver")
    assert registry.layer_finished("layer", None) == []


def test_a_name_claimed_twice_belongs_to_nobody(site: Site) -> None:
    site.install("acme", SOLVER.format(name="eigh"))
    site.install("zenith", SOLVER.format(name="eigh"), version="3.0")
    registry = Registry()
    with pytest.raises(UnknownNameError) as caught:
        registry.create("solver", "eigh")
    assert str(caught.value) == (
        "solver 'eigh' is claimed by 3 distributions. Say which: 'acme:eigh' or 'lora-da-core:eigh' or 'zenith:eigh'."
    )
    for distribution in ("acme", "zenith", "lora-da-core"):
        solver = registry.create("solver", f"{distribution}:eigh")
        assert registry.origin("solver", type(solver)).startswith(f"{distribution} ")
    for found in records(kind="solver", name="eigh"):
        assert found["status"] == "clash"
        assert f"use '{found['distribution']}:eigh'" in found["reason"]
    assert "eigh" not in registry.names("solver")
    assert build_pipeline(solver="lanczos").components.solver.name == "lanczos"


def test_a_unique_name_is_reached_with_its_distribution_too(site: Site) -> None:
    site.install("acme", SOLVER.format(name="plain"))
    assert type(Registry().create("solver", "acme:plain")).__module__ == "acme"
    with pytest.raises(UnknownNameError, match="unknown solver 'zenith:plain'"):
        Registry().create("solver", "zenith:plain")


@pytest.mark.parametrize("blocked", ["exits", "exits:exits", "other, exits"])
def test_blocking_works_before_import(blocked: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    module = site.install("exits", "raise RuntimeError('imported')")
    monkeypatch.setenv("LORA_DA_BLOCK", blocked)
    monkeypatch.setenv("LORA_DA_STRICT_PLUGINS", "1")
    found = record(distribution="exits")
    assert (found["status"], found["reason"]) == ("blocked", "listed in LORA_DA_BLOCK")
    assert module not in sys.modules


def test_our_own_plugins_can_be_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DA_BLOCK", "kfac,lora-da-core:lanczos")
    registry = Registry()
    assert "kfac" not in registry.names("estimator") and "lanczos" not in registry.names("solver")
    with pytest.raises(
        UnknownNameError, match=r"unknown estimator 'kfac'\. Did you mean 'ekfac'\?.*listed in LORA_DA_BLOCK"
    ):
        registry.create("estimator", "kfac")


def test_installing_twice_on_the_path_counts_once(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme", SOLVER.format(name="plain"))
    other = Site(tmp_path / "other")
    other.path.mkdir()
    other.install("acme", SOLVER.format(name="plain"))
    monkeypatch.syspath_prepend(str(other.path))
    assert record(distribution="acme")["status"] == "ok"


def test_command_line_lists_broken_plugins(site: Site) -> None:
    site.install("exits", BROKEN["exits"][0])
    code = "from lora_da_core.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plugins", "--json"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(site.path), "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = [item for item in json.loads(done.stdout) if item["distribution"] == "exits"]
    assert set(found) == {"kind", "name", "distribution", "version", "status", "reason"}
    assert found["status"] == "failed" and "no licence key" in found["reason"]


def test_every_kind_is_listed_once_per_component() -> None:
    found = records(distribution="lora-da-core")
    assert {r["kind"] for r in found} == ALL_KINDS == set(HOOK_OF_KIND)
    assert {r["status"] for r in found} == {"ok"}
    assert found == sorted(found, key=lambda r: (r["kind"], r["name"]))
    assert [asdict(r) for r in Registry().records() if r.distribution == "lora-da-core"] == found


# Names and options.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "lanczoz"}, r"^unknown solver 'lanczoz'\. Did you mean 'lanczos'\? Available: arpack, .*\.$"),
        ({"estimator": "k-fac"}, r"unknown estimator 'k-fac'\. Did you mean 'kfac'\?"),
        ({"gradient": "xyz"}, r"unknown gradient 'xyz'\. Available: full"),
        ({"objective": "casual_lm"}, r"Did you mean 'causal_lm'\?"),
        ({"preset": "papers"}, r"unknown preset 'papers'\. Did you mean 'paper'\?"),
        (
            {"estimator": ("kfac", {"ouput": "full"})},
            r"estimator 'kfac' has no option 'ouput'\. Did you mean 'output'\?",
        ),
        ({"estimator": ("kfac", {"zzz": 1})}, r"has no option 'zzz'\. Options: output, labels\."),
        ({"estimator": ("identity", {"zzz": 1})}, r"estimator 'identity' has no option 'zzz'\. Options: none\."),
        (
            {"estimator": ("kfac", {"output": "half"})},
            r"^estimator 'kfac': output is 'half'; choose one of diagonal.*[a-z]\.$",
        ),
        (
            {"solver": ("lanczos", {"tolerance": -1.0})},
            r"^solver 'lanczos': tolerance is -1\.0; give a number between 0 and 1\.$",
        ),
        ({"solver": ("lanczos", {"tolerance": "small"})}, r"solver 'lanczos': "),
        ({"solver": ("lanczos", 3)}, r"solver is \('lanczos', 3\); give a name, or \(name, \{option: value\}\)\."),
        ({"estimator": 7}, r"estimator is 7; give a name"),
    ],
)
def test_wrong_names_and_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build_pipeline(**arguments)


def test_a_name_and_options_may_come_as_a_list() -> None:
    """JSON and YAML know no tuples."""
    made = build_pipeline(estimator=["kfac", {"output": "full"}])  # type: ignore[arg-type]
    assert made.components.estimator.options.output == "full"


def test_a_component_that_raises_when_made(site: Site) -> None:
    source = SOLVER.format(name="fragile") + (
        "\ndef _init(self, options):\n    raise RuntimeError('no device')\nPlain.__init__ = _init\n"
    )
    site.install("fragile", source)
    message = r"solver 'fragile' \(fragile 1\.2\) raised when it was made: RuntimeError: no device"
    with pytest.raises(PluginError, match=message):
        build_pipeline(solver="fragile")


def test_a_component_that_drops_its_options(site: Site) -> None:
    site.install("careless", SOLVER.format(name="careless") + "\nPlain.__init__ = lambda self, options: None\n")
    with pytest.raises(PluginError, match=r"solver 'careless' \(careless 1\.2\) does not keep its options"):
        build_pipeline(solver="careless")


CHOOSER = "@hookimpl\ndef lora_da_choose_solver(size, rank):\n    {body}\n"


def test_a_third_party_chooses_the_solver(site: Site) -> None:
    site.install("chooser", CHOOSER.format(body="return 'arpack' if size == 77 else None"))
    assert Registry().choose_solver(77, 2, "cpu") == "arpack"
    assert Registry().choose_solver(78, 2, "cpu") == "eigh"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 'arpak'", r"lora_da_choose_solver of chooser:chooser chose 'arpak', which is not available"),
        ("raise KeyError(size)", r"lora_da_choose_solver of chooser:chooser: KeyError: 1"),
    ],
)
def test_a_chooser_that_fails_is_named(body: str, message: str, site: Site) -> None:
    site.install("chooser", CHOOSER.format(body=body))
    with pytest.raises(PluginError, match=message):
        build_pipeline(solver="auto")


def test_observers_are_told_and_their_errors_logged(site: Site) -> None:
    site.install("bad-observer", "@hookimpl\ndef lora_da_layer_finished(layer):\n    raise ValueError(layer)")
    site.install(
        "observer", "seen = []\n@hookimpl\ndef lora_da_layer_finished(report, layer):\n    seen.append((layer, report))"
    )
    assert Registry().layer_finished("a.b", "report") == [
        "lora_da_layer_finished of bad-observer:bad_observer: ValueError: a.b"
    ]
    assert importlib.import_module("observer").seen == [("a.b", "report")]


# Faults while running.


ESTIMATOR = """
from lora_da_core.interfaces import Accumulator, LayerFisher

class Nothing(Accumulator):
    def update(self, inputs, output_grads, example):
        {update}
    def statistics(self):
        return {{}}
    def end_pass(self, index, merged):
        {end_pass}

class Fisher(LayerFisher):
    def __init__(self, spec):
        self.spec = spec
    def solve(self, gradient):
        return {solve}
    def apply(self, weights):
        return weights
    def inverse_input_trace(self):
        return {variance}

class Faulty(FisherEstimator[NoOptions]):
    '''Faulty.'''
    name = "faulty"
    api_version = 1
    def input_accumulator(self, spec, *, device, dtype):
        {make_input}
        return Nothing()
    def layer_accumulator(self, spec, *, device, dtype):
        {make_layer}
        return Nothing()
    def fisher(self, statistics, *, damping, damping_kind, fisher_scale):
        {fisher}
        return Fisher(statistics.spec)
    def statistics_bytes(self, spec, *, samples, tokens, itemsize):
        return (0, 0)

@hookimpl
def lora_da_fisher_estimators():
    return [Faulty]
"""
SOUND = {
    "update": "pass",
    "end_pass": "pass",
    "solve": "gradient",
    "variance": "Diagonal(torch.ones(self.spec.in_features))",
    "make_input": "pass",
    "make_layer": "pass",
    "fisher": "pass",
}
LAYER = r"model\.layers\.0\.self_attn\.[qv]_proj"
ANY_LAYER = r"model\.layers\.\d\.self_attn\.[qv]_proj"
NAMED = r"estimator 'faulty' \(faulty 1\.2\) "


def run(model: nn.Module, batches: list[dict[str, torch.Tensor]], **components: Any) -> Any:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return build_pipeline(**components).run(model, batches, lora)


def test_the_sound_estimator_runs(
    site: Site,
    tiny_llama: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    model_unchanged: Callable[[nn.Module], None],
) -> None:
    site.install("faulty", ESTIMATOR.format(**SOUND))
    model_unchanged(tiny_llama)
    assert len(run(tiny_llama, batches, estimator="faulty").factors) == 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"make_layer": "raise OSError('full')"}, NAMED + rf"raised on layer {LAYER}: OSError: full"),
        ({"make_input": "raise OSError('full')"}, NAMED + rf"raised on layer {ANY_LAYER} in batch 0: OSError: full"),
        ({"update": "raise KeyError('x')"}, NAMED + rf"raised on layer {ANY_LAYER} in batch 0: KeyError: 'x'"),
        ({"update": "inputs @ inputs"}, NAMED + rf"raised on layer {ANY_LAYER} in batch 0: RuntimeError: "),
        ({"end_pass": "merged.nothing"}, NAMED + rf"raised on layer {ANY_LAYER}: AttributeError: "),
        ({"fisher": "1 / 0"}, NAMED + rf"raised on layer {LAYER}: ZeroDivisionError: division by zero"),
        ({"fisher": "return None"}, NAMED + rf"raised on layer {LAYER}: AttributeError: "),
        (
            {"solve": "gradient.mT @ gradient"},
            NAMED + rf"gave a step of shape \(32, 32\) on {ANY_LAYER}, not \(32, 16\)",
        ),
        ({"solve": "gradient * float('nan')"}, NAMED + rf"gave a step with NaN or Inf on {LAYER}"),
        (
            {"solve": "gradient.double()"},
            NAMED + rf"gave a step in torch.float64 on cpu and a V in torch.float32 .*{LAYER}",
        ),
        ({"variance": "Diagonal(torch.ones(3))"}, NAMED + rf"gave a V of order 3 on {LAYER}, not 32"),
        ({"variance": "Diagonal(torch.full((32,), float('inf')))"}, NAMED + rf"gave a V with NaN or Inf on {LAYER}"),
        ({"variance": "Dense(torch.ones(5, 32).mT)"}, NAMED + r"(gave a V|raised)"),
        ({"variance": "1 / 0"}, NAMED + rf"raised on layer {LAYER}: ZeroDivisionError"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_faulty_estimator_is_named_and_the_model_is_as_found(
    fault: dict[str, str],
    message: str,
    site: Site,
    tiny_llama: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    model_unchanged: Callable[[nn.Module], None],
) -> None:
    site.install("faulty", ESTIMATOR.format(**SOUND | fault))
    model_unchanged(tiny_llama)
    with pytest.raises(PluginError, match=message):
        run(tiny_llama, batches, estimator="faulty")


SOLVER_FAULTS = {
    "raises": ("raise ValueError('too large')", r"raised on layer {layer}: ValueError: too large"),
    "no-result": ("return None", r"broke its contract on {layer}: it returned NoneType, not an EigenResult"),
    "transposed": (
        "return replace(found, vectors=found.vectors.mT.contiguous())",
        r"broke its contract on {layer}: values",
    ),
    "too-few": (
        "return replace(found, values=found.values[:-1])",
        r"broke its contract on {layer}: values \(\d,\) and",
    ),
    "dtype": (
        "return replace(found, vectors=found.vectors.half())",
        r"broke its contract on {layer}: vectors in torch.float16",
    ),
    "converged-shape": (
        "return replace(found, converged=found.converged.reshape(-1, 1).expand(-1, 2))",
        r"broke its contract on {layer}: converged of shape",
    ),
    "nan": (
        "return replace(found, values=found.values * float('nan'))",
        r"broke its contract on {layer}: NaN or Inf in values",
    ),
    "not-orthonormal": (
        "return replace(found, vectors=2 * found.vectors)",
        r"broke its contract on {layer}: vectors are not",
    ),
}


@pytest.mark.parametrize("fault", SOLVER_FAULTS)
def test_a_faulty_solver_is_named_and_the_model_is_as_found(
    fault: str,
    site: Site,
    tiny_llama: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    model_unchanged: Callable[[nn.Module], None],
) -> None:
    body, message = SOLVER_FAULTS[fault]
    source = f"""
    from lora_da_solvers.eigh import Eigh
    class Faulty(Eigh):
        '''Faulty.'''
        name = "faulty"
        def smallest(self, operator, rank, *, generator):
            found = super().smallest(operator, rank, generator=generator)
            {body}
    @hookimpl
    def lora_da_solvers():
        return [Faulty]
    """
    site.install("faulty", source)
    model_unchanged(tiny_llama)
    expected = r"solver 'faulty' \(faulty 1\.2\) " + message.format(layer=LAYER)
    with pytest.raises(PluginError, match=expected):
        run(tiny_llama, batches, solver="faulty")


def test_a_solver_that_runs_out_of_memory_is_named_when_fewer_layers_do_not_help(
    site: Site,
    tiny_llama: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    model_unchanged: Callable[[nn.Module], None],
) -> None:
    source = """
    from lora_da_solvers.eigh import Eigh
    class Faulty(Eigh):
        '''Faulty.'''
        name = "faulty"
        def smallest(self, operator, rank, *, generator):
            raise MemoryError("too large")
    @hookimpl
    def lora_da_solvers():
        return [Faulty]
    """
    site.install("faulty", source)
    model_unchanged(tiny_llama)
    expected = r"memory ran out again.*solver 'faulty' \(faulty 1\.2\) raised on layer .*: MemoryError: too large"
    with pytest.raises(LoraDAError, match=expected):
        run(tiny_llama, batches, solver="faulty")


def test_a_faulty_gradient_is_named(
    site: Site,
    tiny_llama: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    model_unchanged: Callable[[nn.Module], None],
) -> None:
    source = """
    from lora_da_gradients.full import Full
    from lora_da_core.interfaces import Accumulator
    class Broken(Accumulator):
        def update(self, inputs, output_grads, example):
            raise ValueError("no")
        def statistics(self):
            return {}
    class Faulty(Full):
        '''Faulty.'''
        name = "faulty"
        def accumulator(self, spec, *, device, dtype):
            return Broken()
    class Transposed(Full):
        '''Transposed.'''
        name = "transposed"
        def gradient(self, statistics, spec, *, samples):
            return DenseMap(super().gradient(statistics, spec, samples=samples).to_dense()[:, :5])
    class Infinite(Full):
        '''Infinite.'''
        name = "infinite"
        def gradient(self, statistics, spec, *, samples):
            return DenseMap(super().gradient(statistics, spec, samples=samples).to_dense() / 0.0)
    class Blind(Full):
        '''Blind.'''
        name = "blind"
        forward_only = True
        def estimate(self, probe, specs, *, generator):
            return 1 / 0
    @hookimpl
    def lora_da_gradient_estimators():
        return [Faulty, Transposed, Infinite, Blind]
    """
    site.install("faulty", source)
    model_unchanged(tiny_llama)
    with pytest.raises(
        PluginError, match=rf"gradient 'faulty' \(faulty 1\.2\) raised on layer {ANY_LAYER} in batch 0: V"
    ):
        run(tiny_llama, batches, gradient="faulty")
    with pytest.raises(
        PluginError, match=rf"'transposed' \(faulty 1\.2\) gave G of shape \(\d+, 5\) on layer {ANY_LAYER}"
    ):
        run(tiny_llama, batches, gradient="transposed")
    with pytest.raises(PluginError, match=rf"'infinite' \(faulty 1\.2\) gave G with NaN or Inf on layer {ANY_LAYER}"):
        run(tiny_llama, batches, gradient="infinite")
    with pytest.raises(PluginError, match=r"'blind' \(faulty 1\.2\) raised: ZeroDivisionError"):
        run(tiny_llama, batches, gradient="blind")


def test_a_faulty_objective_is_named(
    site: Site,
    tiny_llama: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    model_unchanged: Callable[[nn.Module], None],
) -> None:
    source = """
    from lora_da_objectives.causal_lm import CausalLM
    class Loss(CausalLM):
        '''Raises in the loss.'''
        name = "no-loss"
        def losses(self, model, batch):
            raise ValueError("no")
    class Mask(CausalLM):
        '''Raises in the mask.'''
        name = "no-mask"
        def token_mask(self, batch, spec, kind, tokens):
            raise ValueError("no")
    class Counts(CausalLM):
        '''Counts wrongly.'''
        name = "no-counts"
        def label_counts(self, batch):
            return super().label_counts(batch).sum()
    @hookimpl
    def lora_da_objectives():
        return [Loss, Mask, Counts]
    """
    site.install("faulty", source)
    model_unchanged(tiny_llama)
    for name, message in {
        "no-loss": r"objective 'no-loss' \(faulty 1\.2\) raised in batch 0: ValueError: no",
        "no-mask": rf"objective 'no-mask' \(faulty 1\.2\) raised on layer {ANY_LAYER} in batch 0: ValueError: no",
        "no-counts": "objective 'no-counts' counted labels of shape",
    }.items():
        with pytest.raises(PluginError, match=message):
            run(tiny_llama, batches, objective=name)


def test_a_preset_of_another_version_or_without_a_name_is_refused(site: Site) -> None:
    source = """
    from lora_da_core import Preset
    @hookimpl
    def lora_da_presets():
        return [Preset("future", "", api_version=2), Preset("", ""), Preset("good", "")]
    """
    site.install("presets-of-others", source)
    refused = records(kind="preset", status="failed")
    assert {r["name"] for r in refused} == {"future", ""}
    assert any("version 2" in r["reason"] for r in refused) and any("its name is ''" in r["reason"] for r in refused)
    assert record(kind="preset", name="good")["status"] == "ok"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("tolerance", "small", "tolerance is 'small'; it must be of type float"),
        ("max_applies", 1.5, "max_applies is 1.5; it must be of type int"),
        ("max_applies", True, "max_applies is True; it must be of type int"),
        ("block_size", "2", "block_size is '2'; it must be of type int or None"),
    ],
)
def test_options_of_the_wrong_type(option: str, value: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build_pipeline(solver=("lanczos", {option: value}))
    assert build_pipeline(solver=("lanczos", {"block_size": None, "tolerance": 1e-3})).components.solver is not None
