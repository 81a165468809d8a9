"""docs/reliability.md, fault by fault: what goes wrong, what is promised, and that it is kept.

Each row is provoked in a run of a tiny model; afterwards weights, hooks, modes, requires_grad, random states and files
must be as they were. A row that has a test of its own elsewhere names it.
"""

from __future__ import annotations

import ast
import logging
import random
import re
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import (
    AdapterError,
    ConvergenceError,
    DataError,
    LoraDAConfig,
    LoraDAError,
    LoraDAResult,
    ModelError,
    OptionError,
    PluginError,
    StorageError,
    TargetError,
    UnknownNameError,
    rounds,
    storage,
)
from lora_da_core.cache import MANIFEST_FILE, TENSORS_FILE
from lora_da_estimators.kfac import Kfac, KfacFisher
from lora_da_gradients.full import Full
from lora_da_objectives.causal_lm import CausalLM
from lora_da_solvers.eigh import Eigh
from lora_da_solvers.lanczos import Lanczos
from test_capture import BadGradient
from test_devices import with_a_stray_layer
from test_factorisations import GAVE_UP
from test_passes import make_mixtral
from test_registry import SOLVER, Site, site  # noqa: F401  # a fixture
from test_storage import REPORT

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
Batches = Any
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
FIXED = LoraDAConfig(gamma=64.0, damping=1.0)
LAYER = r"model\.layers\.\d\.self_attn\.[qv]_proj"
SHORTAGE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@dataclass
class Bench:
    """What a fault is provoked on."""

    patch: pytest.MonkeyPatch
    site: Site
    log: pytest.LogCaptureFixture
    directory: Path
    watch: Callable[[nn.Module], None]
    """Of every model that is run: it must be found again as it was then."""
    model: nn.Module = field(default_factory=lambda: make_tiny_llama().train())
    batches: Batches = field(default_factory=lambda: make_batches(make_samples()))

    def run(
        self,
        batches: Batches = None,
        *,
        model: nn.Module | None = None,
        lora: LoraConfig = LORA,
        config: LoraDAConfig = FIXED,
        cache: Path | None = None,
        **components: Any,
    ) -> LoraDAResult:
        pipeline = lora_da_core.build_pipeline(config=config, **components)
        data = self.batches if batches is None else batches
        if model is not None:
            self.watch(model)
        return pipeline.run(self.model if model is None else model, data, lora, cache_dir=cache)

    def replaced(self, name: str, change: Callable[[Tensor], Any]) -> list[dict[str, Any]]:
        """The batches with one of their tensors changed."""
        return [{**batch, name: change(batch[name])} for batch in self.batches]

    def files(self) -> list[Path]:
        found = [path.relative_to(self.directory) for path in self.directory.rglob("*") if path.is_file()]
        return [path for path in found if path.suffix != ".lock"]

    def warnings(self) -> str:
        return "\n".join(record.getMessage() for record in self.log.records)


@dataclass(frozen=True)
class Fault:
    """A row: what goes wrong, what is promised, how it is provoked, and the error that is then expected."""

    name: str
    promise: str
    provoke: Callable[[Bench], Any] | None = None
    error: type[BaseException] | None = None
    words: str = ""
    tests: tuple[str, ...] = ()
    """Further tests, `file::name`."""


def same(first: LoraDAResult, second: LoraDAResult) -> bool:
    pairs = zip(first.report.layers, second.report.layers, strict=True)
    return all((one.digest_A, one.digest_B) == (two.digest_A, two.digest_B) for one, two in pairs)


def close(first: LoraDAResult, second: LoraDAResult) -> None:
    """The same products up to rounding."""
    for name, pair in first.factors.items():
        other = second.factors[name]
        torch.testing.assert_close((pair.B @ pair.A).double(), (other.B @ other.A).double(), rtol=1e-3, atol=1e-6)


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any, **settings: Any) -> Any:
        raise error

    return function


def first_only(function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Raises the first time."""
    left = [error]

    def replacing(*args: Any, **settings: Any) -> Any:
        if left:
            raise left.pop()
        return function(*args, **settings)

    return replacing


# Plugins


def broken_import(source: str) -> Callable[[Bench], None]:
    def provoke(bench: Bench) -> None:
        bench.site.install("acme-shampoo", source)
        listed = [entry for entry in lora_da_core.list_plugins() if entry["distribution"] == "acme-shampoo"]
        assert [entry["status"] for entry in listed] == ["failed"]
        assert bench.run().factors  # nothing else is harmed
        lora_da_core.build_pipeline(solver="shampoo")

    return provoke


def name_clash(bench: Bench) -> None:
    for name in ("acme-one", "acme-two"):
        bench.site.install(name, SOLVER.format(name="twin"))
    lora_da_core.build_pipeline(solver="twin")


def wrong_version(bench: Bench) -> None:
    bench.site.install("acme-future", SOLVER.format(name="future").replace("api_version = 1", "api_version = 99"))
    lora_da_core.build_pipeline(solver="future")


def raises_midway(bench: Bench) -> None:
    accumulator = Full.accumulator

    def spoiled(*args: Any, **settings: Any) -> Any:
        made, calls = accumulator(*args, **settings), iter(range(10))
        update = made.update
        made.update = lambda *sums: update(*sums) if next(calls) < 2 else 1 / 0
        return made

    bench.patch.setattr(Full, "accumulator", spoiled)
    bench.run()


def exits_midway(bench: Bench) -> None:
    def leaving(self: Any, model: nn.Module, batch: Any) -> Tensor:
        raise SystemExit(0)

    bench.patch.setattr(CausalLM, "losses", leaving)
    bench.run()


BRITTLE = """
@dataclass(frozen=True)
class Options:
    size: int = 1
    def __post_init__(self):
        {}[self.size]

""" + SOLVER.format(name="brittle").replace("NoOptions", "Options").replace(
    "api_version = 1", "api_version, Options = 1, Options"
)


def options_that_raise(bench: Bench) -> None:
    bench.site.install("acme-brittle", BRITTLE)
    lora_da_core.build_pipeline(solver="brittle")


def another_base(bench: Bench) -> None:
    result, other = bench.run(), make_tiny_llama()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    bench.watch(other)
    lora_da_core.get_lora_da_model(other, LORA, result=result)


def partly_matched(bench: Bench) -> None:
    found = bench.run(lora=LoraConfig(r=2, target_modules=["q_proj", "v_proj", "vproj"]))
    assert "no module has these names of target_modules: vproj" in found.report.notes
    assert same(found, bench.run())


def gives_step(change: Callable[[Tensor], Tensor]) -> Callable[[Bench], None]:
    """K-FAC whose J⁻¹G is changed, formed by the contract's default."""

    def provoke(bench: Bench) -> None:
        solve = KfacFisher.solve
        bench.patch.setattr(KfacFisher, "step", super(KfacFisher, KfacFisher).step)
        bench.patch.setattr(KfacFisher, "solve", lambda self, gradient: change(solve(self, gradient)))
        bench.run()

    return provoke


def vectors_not_orthonormal(bench: Bench) -> None:
    honest = Eigh.smallest

    def doubled(self: Any, operator: Any, rank: int, *, generator: torch.Generator) -> Any:
        found = honest(self, operator, rank, generator=generator)
        return replace(found, vectors=2 * found.vectors)

    bench.patch.setattr(Eigh, "smallest", doubled)
    bench.run(solver="eigh")


# Data


def one_shot(bench: Bench) -> None:
    assert same(bench.run(iter(bench.batches)), bench.run())


def some_masked(bench: Bench) -> None:
    masked = [dict(batch) for batch in bench.batches]
    masked[1]["labels"] = torch.full_like(masked[1]["labels"], -100)
    found = bench.run(masked)
    assert "4 of 12 samples have no labels and are left out (samples 4, 5, 6, 7)" in found.report.notes
    assert same(found, bench.run([bench.batches[0], bench.batches[2]]))


def no_mask(bench: Bench) -> None:
    bare = [{key: value for key, value in batch.items() if key != "attention_mask"} for batch in bench.batches]
    close(bench.run(bare), bench.run())


def bad_gradient(bench: Bench) -> None:
    handle = bench.model.model.layers[0].mlp.register_forward_hook(lambda m, a, output: BadGradient.apply(output))
    try:
        bench.run()
    finally:
        handle.remove()


def bad_loss(bench: Bench) -> None:
    handle = bench.model.model.layers[1].mlp.register_forward_hook(lambda m, a, output: output * float("nan"))
    try:
        bench.run()
    finally:
        handle.remove()


def shuffled(bench: Bench) -> None:
    rows = [{key: value[0] for key, value in batch.items()} for batch in make_batches(make_samples(), 1, 20)]
    rows = [{key: functional.pad(value, (0, 40 - len(value))) for key, value in row.items()} for row in rows]
    found = bench.run(DataLoader(rows, batch_size=4, shuffle=True))  # type: ignore[arg-type]
    assert any("the data began with other samples (a shuffling loader?)" in note for note in found.report.notes)
    still = bench.run(DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    assert not any("the data began" in note for note in still.report.notes)


class Noisy(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, 0.5, training=True)


def dropout_in_evaluation(bench: Bench) -> None:
    noisy = make_tiny_llama()
    noisy.model.norm = nn.Sequential(noisy.model.norm, Noisy())
    words = "something in the model is random in evaluation mode too"
    assert any(words in note for note in bench.run(model=noisy).report.notes)
    assert not any(words in note for note in bench.run().report.notes)


# Models


def spare_layer(bench: Bench) -> None:
    with torch.random.fork_rng(devices=[]):
        bench.model.add_module("spare", nn.Linear(4, 4))
    try:
        bench.run(lora=LoraConfig(r=2, target_modules=["q_proj", "spare"]))
    finally:
        del bench.model.spare


def unrouted(bench: Bench) -> None:
    lora = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    found = bench.run(model=make_mixtral(), lora=lora)
    left = [note for note in found.report.notes if note.startswith("left at PEFT's own initialisation")]
    assert len(left) == 2 and all("down_proj.3 (0 tokens that count were routed" in note for note in left)


def tied(bench: Bench) -> None:
    model = make_tiny_llama(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    found = bench.run(model=model, lora=LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert "lm_head" in found.factors
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, before)


def part_on_meta(bench: Bench) -> None:
    model = make_tiny_llama()
    model.model.layers[1].self_attn.q_proj.to("meta")
    bench.run(model=model)


def stray_layer(bench: Bench) -> None:
    bench.run(model=with_a_stray_layer())


def mixed_dtypes(bench: Bench) -> None:
    """A layer in float64 between layers in float32, which converts what it is given and what it returns."""
    model = make_tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj.double()
    layer.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    layer.register_forward_hook(lambda module, args, output: output.float())
    found = bench.run(model=model)
    pairs = {name: pair.A.dtype for name, pair in found.factors.items()}
    assert pairs.pop("model.layers.0.self_attn.q_proj") == torch.float64
    assert set(pairs.values()) == {torch.float32}
    close(found, bench.run())


# Numerics


def singular(bench: Bench) -> None:
    undamped = replace(FIXED, damping=0.0, damping_kind="absolute")
    found = bench.run(make_batches(make_samples(2)), config=undamped)
    for layer in found.report.layers:
        assert any("not positive definite at damping 0; raised to" in remedy for remedy in layer.remedies)
        assert layer.residual < 1e-6 and layer.converged


def unconverged(bench: Bench) -> None:
    model, lora = make_tiny_llama(hidden_size=64, intermediate_size=96), LoraConfig(r=1, target_modules=["q_proj"])
    found = bench.run(model=model, lora=lora, solver=("lanczos", {"max_applies": 2, "tolerance": 1e-15}))
    for layer in found.report.layers:
        assert layer.converged and layer.solver == "eigh"
        assert "lanczos did not converge; solved with eigh" in layer.remedies


def breaks_down(bench: Bench) -> None:
    bench.patch.setattr(Lanczos, "smallest", raising(GAVE_UP))
    found = bench.run(solver="lanczos")
    assert {layer.solver for layer in found.report.layers} == {"eigh"}
    assert all(f"lanczos broke down: {GAVE_UP}" in layer.remedies for layer in found.report.layers)


def nothing_converges(bench: Bench) -> None:
    bench.patch.setattr(Lanczos, "smallest", raising(GAVE_UP))
    bench.run(solver="lanczos", config=replace(FIXED, unconverged="error"))


# Memory


def shortage_once(bench: Bench) -> None:
    expected = bench.run()
    bench.patch.setattr(rounds, "estimate", first_only(rounds.estimate, SHORTAGE))
    found = bench.run()
    assert same(found, expected)
    assert any(note.startswith("memory ran out with 4 layers in a pass; started again") for note in found.report.notes)


def shortage_always(bench: Bench) -> None:
    bench.patch.setattr(rounds, "estimate", raising(SHORTAGE))
    bench.run()


def shortage_in(method: str) -> Callable[[Bench], None]:
    def provoke(bench: Bench) -> None:
        pipeline = lora_da_core.build_pipeline(config=FIXED)
        estimates = pipeline.estimate(bench.model, bench.batches, LORA)
        if method == "solve":
            bench.patch.setattr(Kfac, "fisher", raising(SHORTAGE))
            pipeline.solve(estimates)
        bench.patch.setattr(CausalLM, "losses", raising(MemoryError("2 GiB")))
        if method == "estimate":
            pipeline.estimate(bench.model, bench.batches, LORA)
        bench.run(cache=bench.directory / "cache")

    return provoke


def shortage_in_forward_passes(gradient: Any, config: LoraDAConfig) -> Callable[[Bench], None]:
    """No more than two samples fit into a forward pass that has no gradients."""

    def provoke(bench: Bench) -> None:
        model = make_tiny_llama(torch.float64)
        expected = bench.run(model=model, gradient=gradient, config=config)
        losses = CausalLM.losses

        def scarce(self: Any, model: nn.Module, batch: Any) -> Tensor:
            if not torch.is_grad_enabled() and len(batch["labels"]) > 2:
                raise SHORTAGE
            return losses(self, model, batch)

        bench.patch.setattr(CausalLM, "losses", scarce)
        found = bench.run(model=model, gradient=gradient, config=config)
        assert any("in a forward pass over 4 samples; halved that batch" in note for note in found.report.notes)
        close(found, expected)

    return provoke


# Storage


def full_disk(bench: Bench) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        storage.save_run(
            bench.directory / "run",
            lambda directory: (Path(directory) / "adapter_model.safetensors").write_bytes(bytes(8192)),
            REPORT,
            settings={},
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def cached(damage: Callable[[Path], None], words: str) -> Callable[[Bench], None]:
    """A stored entry is damaged; the run says so, computes again, and the damaged one is aside."""

    def provoke(bench: Bench) -> None:
        cache = bench.directory / "cache"
        expected = bench.run(cache=cache)
        (entry,) = (path for path in cache.iterdir() if path.is_dir())
        damage(entry)
        bench.log.clear()
        assert same(bench.run(cache=cache), expected)
        assert re.search(words, bench.warnings()), bench.warnings()
        assert (cache / f"{entry.name}.quarantined").exists()

    return provoke


def cut(entry: Path) -> None:
    content = (entry / TENSORS_FILE).read_bytes()
    (entry / TENSORS_FILE).write_bytes(content[: len(content) // 2])


def flipped(entry: Path) -> None:
    content = bytearray((entry / TENSORS_FILE).read_bytes())
    content[-5] ^= 4
    (entry / TENSORS_FILE).write_bytes(content)


def foreign(entry: Path) -> None:
    (entry / MANIFEST_FILE).write_text('{"identity": {}, "thesis": 1}')


def stale(bench: Bench) -> None:
    cache, other = bench.directory / "cache", make_tiny_llama()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    bench.run(cache=cache)
    bench.log.clear()
    assert same(bench.run(model=other, cache=cache), bench.run(model=other))
    assert re.search("no stored statistics fit; the nearest entry .* differs in weights", bench.warnings())


# Ends


def interrupted(bench: Bench) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("statistics", 2):
            raise KeyboardInterrupt

    lora_da_core.build_pipeline(config=FIXED).run(bench.model, bench.batches, LORA, on_progress=stop)


FAULTS = [
    Fault("unknown name", "an error that lists what is close and what could not be loaded",
          lambda bench: lora_da_core.build_pipeline(solver="lanczoz"), UnknownNameError,
          r"unknown solver 'lanczoz'\. Did you mean 'lanczos'\? Available: "),
    Fault("unknown option", "an error that names option and component, before a model is touched",
          lambda bench: lora_da_core.build_pipeline(estimator=("kfac", {"outptu": "full"})), OptionError,
          r"outptu.*Did you mean 'output'"),
    Fault("option of a wrong type", "the same",
          lambda bench: lora_da_core.build_pipeline(solver=("lanczos", {"tolerance": "small"})), OptionError,
          "tolerance is 'small'; it must be of type float"),
    Fault("option out of range", "the same", lambda bench: LoraDAConfig(damping=-1.0), OptionError,
          "damping is -1.0", ("tests/test_cli.py::test_wrong_use_is_one_line_and_status_2_before_anything_is_loaded",)),
    Fault("no model, no data", "an error that says what was given",
          lambda bench: lora_da_core.build_pipeline().run(3, bench.batches, LORA), OptionError,  # type: ignore[arg-type]
          "model is a int; give a torch.nn.Module"),
    Fault("data that is no data", "the same",
          lambda bench: lora_da_core.build_pipeline().run(bench.model, 3, LORA), DataError,  # type: ignore[arg-type]
          "the data is a int; give an iterable of batches"),
    Fault("a plugin cannot be imported", "it is listed with the reason, everything else works, and asking for a "
          "component that is not there names it", broken_import("import a_package_that_nobody_has"), UnknownNameError,
          r"1 plugin could not be loaded: acme-shampoo\S* 1\.2 — ModuleNotFoundError",
          ("tests/test_registry.py::test_a_broken_plugin_is_listed_with_its_reason_and_harms_no_other",)),
    Fault("a plugin exits when imported", "the same", broken_import("import sys; sys.exit('no licence')"),
          UnknownNameError, r"acme-shampoo\S* 1\.2 — SystemExit: no licence"),
    Fault("two plugins claim one name", "the name belongs to nobody; the error says how to name either", name_clash,
          OptionError, r"twin.*acme-(one|two):twin",
          ("tests/test_registry.py::test_a_name_claimed_twice_belongs_to_nobody",)),
    Fault("a plugin of another api_version", "it is listed as failed, and not used", wrong_version, UnknownNameError,
          "written for plugin API version 99; this lora-da-core has version 1"),
    Fault("a plugin raises mid-run", "an error that names plugin, distribution, layer and batch", raises_midway,
          PluginError, rf"gradient 'full' \(lora-da-core .*\) raised on layer {LAYER} in batch 2: ZeroDivisionError",
          ("tests/test_registry.py::test_a_faulty_estimator_is_named_and_the_model_is_as_found",
           "tests/test_registry.py::test_a_faulty_objective_is_named")),
    Fault("a plugin exits mid-run", "the same", exits_midway, PluginError,
          r"objective 'causal_lm' .* raised in batch 0: SystemExit"),
    Fault("a plugin's options raise", "an error that names plugin and distribution", options_that_raise, PluginError,
          r"solver 'brittle' \(acme-brittle 1\.2\) raised when its options were made: KeyError: 1"),
    Fault("a plugin returns a wrong shape", "an error that names plugin, layer and both shapes",
          gives_step(lambda step: step[:, :5]), PluginError,
          rf"estimator 'kfac' .* gave a step of shape \(5, \d+\) on {LAYER}, not \(32, \d+\)"),
    Fault("a plugin returns a wrong dtype", "an error that names plugin, layer and both dtypes",
          gives_step(lambda step: step.half()), PluginError,
          rf"gave a step in torch\.float16 on cpu and a V in torch\.float64 on cpu on {LAYER}; they must agree"),
    Fault("a plugin returns tensors on another device", "an error that names plugin, layer and both devices",
          gives_step(lambda step: step.to("meta")), PluginError,
          rf"on meta and a V in torch\.float64 on cpu on {LAYER}"),
    Fault("a plugin returns NaN", "an error that names plugin and layer",
          gives_step(lambda step: step * float("nan")), PluginError,
          rf"'kfac' .* gave a step with NaN or Inf on {LAYER}"),
    Fault("a solver returns what are no eigenvectors", "an error that names solver, layer and fault",
          vectors_not_orthonormal, PluginError, rf"solver 'eigh' .* broke its contract on {LAYER}: vectors are not",
          ("tests/test_registry.py::test_a_faulty_solver_is_named_and_the_model_is_as_found",)),
    Fault("empty data set", "an error before the model runs", lambda bench: bench.run([]), DataError,
          "the data set is empty: no batch was given"),
    Fault("data that can be read once", "it is read once, with the same result", one_shot),
    Fault("all labels masked in all samples", "an error before the model runs, with what to check",
          lambda bench: bench.run(bench.replaced("labels", lambda each: torch.full_like(each, -100))), DataError,
          "all labels are masked in all 12 samples.*Check the prompt template"),
    Fault("all labels masked in some samples", "they are left out and named; the result is that without them",
          some_masked),
    Fault("missing labels", "an error that names the batch",
          lambda bench: bench.run([bench.batches[0], {"input_ids": bench.batches[1]["input_ids"]}]), DataError,
          "batch 1 has no 'labels'; give every batch"),
    Fault("a loss that is None", "an error that names objective and batch",
          lambda bench: bench.run(objective=lambda model, batch: None), PluginError,  # type: ignore[arg-type,return-value]
          "returned losses of type .*NoneType.* in batch 0; it must be one loss per sample"),
    Fault("a loss of NaN or Inf", "an error that names batch, samples and the first module that is not finite",
          bad_loss, ModelError, r"the loss is not finite in batch 0 \(samples .*first module .* is model\.layers\.1"),
    Fault("a gradient of NaN or Inf", "an error that names batch and layer", bad_gradient, ModelError,
          r"gradient is not finite in batch 0",
          ("tests/test_capture.py::test_a_gradient_that_is_not_finite_names_batch_and_layer",)),
    Fault("token numbers outside the vocabulary", "an error that names objective and batch",
          lambda bench: bench.run(bench.replaced("input_ids", lambda each: each + 1000)), PluginError,
          "objective 'causal_lm' .* raised in batch 0: IndexError"),
    Fault("no attention mask", "padding on the right changes nothing: a causal model does not look there", no_mask),
    Fault("a shuffling loader", "the run goes on, and its report says that another reads other samples", shuffled),
    Fault("dropout that ignores eval()", "the run goes on, and its report says that it does not repeat",
          dropout_in_evaluation),
    Fault("rank above the layer's size", "an error that names layer, sizes and what to set",
          lambda bench: bench.run(lora=LoraConfig(r=40, target_modules=["q_proj"])), TargetError,
          rf"layer {LAYER} is 32 × 32: rank 40 is above min\(in, out\) = 32; choose a smaller rank"),
    Fault("fewer tokens than the rank", "an error that names layer, tokens and what to give",
          lambda bench: bench.run(make_batches(make_samples(1)), lora=LoraConfig(r=16, target_modules=["q_proj"])),
          DataError, rf"layer {LAYER}: \d+ tokens count for the Fisher, fewer than the rank 16\. Give more samples"),
    Fault("targets that match nothing", "an error that lists the layers there are",
          lambda bench: bench.run(lora=LoraConfig(r=2, target_modules=["nowhere"])), TargetError,
          r"target_modules \['nowhere'\] cannot be adapted\. Layers here: .*q_proj",
          ("tests/test_cli.py::test_targets_that_are_not_there_are_refused_before_weights_are_read",)),
    Fault("a target that matches nothing beside others", "it is named in the report", partly_matched),
    Fault("a layer that never runs", "an error that names it and how to leave it out", spare_layer, TargetError,
          "1 targeted layers never ran on this data, the first is spare.*exclude_modules"),
    Fault("an expert that no token reaches", "it starts at PEFT's default, and is named", unrouted,
          tests=("tests/test_passes.py::test_experts_in_several_passes_are_those_of_one",)),
    Fault("tied weights", "they are initialised apart and stay tied, bit by bit", tied),
    Fault("a quantized base", "it is initialised as its dequantized weights, and the report says so",
          tests=("tests/test_quantized.py::test_a_quantized_base_is_initialised_as_its_dequantized_weights",)),
    Fault("weights on the meta device", "an error that names the weight and how to load it", part_on_meta, ModelError,
          r"model\.layers\.1\.self_attn\.q_proj\.weight is on the meta device.*load the weights"),
    Fault("layers of several dtypes", "each is computed in the larger of float32 and its own", mixed_dtypes),
    Fault("layers on several devices, with hooks that move what passes", "the result is that of one device",
          tests=("tests/test_devices.py::test_layers_on_two_devices_give_what_one_gives",
                 "tests/test_offload.py::test_an_offloaded_model_gives_the_bytes_of_one_in_memory")),
    Fault("a layer on a device that nothing moves to", "an error that names a weight on each device, and the cure",
          stray_layer, ModelError, r"embed_tokens\.weight on .*q_proj\.weight on .*move it to one device with \.to\(\)",
          ("tests/test_devices.py::test_a_layer_that_nothing_moves_to_is_named",)),
    Fault("a singular factor", "its damping is raised until it can be factorised; remedies name factor and amount",
          singular, tests=("tests/test_factorisations.py::test_a_singular_factor_climbs_the_ladder",)),
    Fault("a solver that does not converge", "others are tried, the dense one last; remedies name them", unconverged,
          tests=("tests/test_pipeline.py::test_unconverged_layers_are_mended_reported_or_refused",)),
    Fault("LAPACK or cuSOLVER gives up", "the CPU and QR iteration are tried, other solvers, float64 on the CPU",
          breaks_down, tests=("tests/test_factorisations.py::test_the_last_rung_is_float64_on_the_cpu",)),
    Fault("nothing may be tried", "with unconverged='error', an error that names solver and layer", nothing_converges,
          ConvergenceError, rf"solver 'lanczos' did not converge on σ of {LAYER}.*unconverged='fallback'"),
    Fault("memory runs out in a pass", "the layers are halved, once, with a note; the bytes are the same",
          shortage_once, tests=("tests/test_passes.py::test_a_shortage_within_a_pass_leaves_the_model_as_found",)),
    Fault("memory runs out again", "an error that says what to make smaller", shortage_always, LoraDAError,
          r"memory ran out.*Give smaller batches.*layers_per_pass.*CUDA out of memory"),
    Fault("memory runs out in estimate", "the same", shortage_in("estimate"), LoraDAError,
          r"memory ran out while the statistics of all layers were taken and kept\. Give .*: MemoryError: 2 GiB"),
    Fault("memory runs out with a cache", "the same; the cache holds nothing half", shortage_in("cache"), LoraDAError,
          r"memory ran out while .*Give smaller .*: MemoryError: 2 GiB"),
    Fault("memory runs out in solve", "the same", shortage_in("solve"), LoraDAError,
          r"memory ran out while estimates were solved\. Estimate fewer layers"),
    Fault("memory runs out in the line search", "the batch is halved, with a note",
          shortage_in_forward_passes("full", LoraDAConfig(damping=1.0))),
    Fault("memory runs out in a forward-only gradient", "the batch is halved, with a note",
          shortage_in_forward_passes(("zeroth_order", {"steps": 4, "probes": 2}), FIXED)),
    Fault("Ctrl-C", "the model is as found", interrupted, KeyboardInterrupt),
    Fault("killed midway", "the output holds nothing or everything, and --resume ends with the same bytes",
          tests=("tests/test_crashes.py::test_a_killed_init_leaves_nothing_or_everything_and_goes_on",
                 "tests/test_crashes.py::test_init_killed_at_many_points",
                 "tests/test_crashes.py::test_an_earlier_run_is_never_lost",
                 "tests/test_cache.py::test_a_process_killed_while_it_writes_leaves_nothing_half")),
    Fault("killed within a grid", "no finished cell is repeated, and the results are the same",
          tests=("tests/test_crashes.py::test_a_killed_grid_goes_on_with_the_same_results",
                 "tests/test_ablation.py::test_a_killed_run_goes_on_where_it_was")),
    Fault("the disk is full", "an error that names the directory; nothing is left", full_disk, StorageError,
          "run cannot be written: .*File too large"),
    Fault("the disk is full under a cache", "a warning; the run goes on",
          tests=("tests/test_cache.py::test_a_full_disk_costs_the_entry_and_not_the_run",)),
    Fault("a directory that cannot be written", "an error that names it, before any work",
          lambda bench: bench.run(cache=Path("/proc/lora-da")), StorageError, "/proc/lora-da cannot be (created|made)",
          ("tests/test_cache.py::test_a_directory_that_cannot_be_written_is_one_error_before_work",)),
    Fault("a truncated cache entry", "it is moved aside, named, and computed again",
          cached(cut, "was moved to .*quarantined: statistics.safetensors is not as it was written")),
    Fault("a flipped bit in a cache entry", "the same",
          cached(flipped, "was moved to .*quarantined: statistics.safetensors is not as it was written"),
          tests=("tests/test_cache.py::test_no_flipped_bit_is_used",)),
    Fault("a foreign file in a cache", "the same", cached(foreign, "was moved to .*: manifest.json is not as it was")),
    Fault("a stale cache entry", "it is not used; what differs is named", stale,
          tests=("tests/test_cache.py::test_whatever_differs_is_named_and_computed",)),
    Fault("two runs on one cache", "one computes, the other waits and reads",
          tests=("tests/test_cache.py::test_two_processes_at_once_compute_once",
                 "tests/test_cache.py::test_whoever_waits_for_a_process_that_is_killed_computes")),
    Fault("ranks that disagree", "no rank begins; each names the rank and what differs",
          tests=("tests/test_rank_faults.py::test_ranks_that_were_told_different_things_do_not_begin",)),
    Fault("a rank raises, is killed or is late",
          "every other rank ends with an error that names it; nothing is written half",
          tests=("tests/test_rank_faults.py::test_a_fault_at_any_phase_is_named_by_every_other_rank",
                 "tests/test_rank_faults.py::test_a_rank_that_lives_but_does_not_come_is_named")),
    Fault("damaged settings of a run", "an error that names the directory",
          tests=("tests/test_fuzz_options.py::test_settings_of_a_run_that_were_changed_are_obeyed_or_refused",)),
    Fault("a result of another base", "an error that says what differs, before the model is wrapped", another_base,
          AdapterError, "computed on another base: its layers are in this model, but the base's weights differ",
          ("tests/test_pipeline.py::test_a_result_of_another_base_is_refused",)),
    Fault("a damaged report", "an error that names the file",
          tests=("tests/test_storage.py::test_a_damaged_report_is_refused",)),
    Fault("PEFT holds something else than was written", "the adapter is as it was before",
          tests=("tests/test_compatibility.py::test_a_failed_write_gives_everything_back",
                 "tests/test_pipeline.py::test_writing_is_all_or_nothing")),
]  # fmt: skip

PROVOKED = [fault for fault in FAULTS if fault.provoke is not None]


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch,
    site: Site,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    model_unchanged: Callable[[nn.Module], None],
) -> Iterator[Bench]:
    caplog.set_level(logging.WARNING)
    directory = tmp_path / "files"
    directory.mkdir()
    made = Bench(monkeypatch, site, caplog, directory, model_unchanged)
    for parameter in list(made.model.parameters())[:3]:
        parameter.requires_grad_(False)
    model_unchanged(made.model)
    yield made


def states() -> tuple[Any, ...]:
    arrays: Any = np.random.get_state()
    return random.getstate(), arrays[1].tobytes(), torch.random.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("fault", PROVOKED, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_is_met_as_promised(fault: Fault, bench: Bench) -> None:
    assert fault.provoke is not None
    before = states()
    if fault.error is None:
        fault.provoke(bench)
    else:
        with pytest.raises(fault.error) as caught:
            fault.provoke(bench)
        text = " ".join(str(caught.value).split())
        assert re.search(fault.words, text), text
        assert caught.type is fault.error or fault.error is not LoraDAError
        assert bench.files() == []
    assert all("cache" in path.parts for path in bench.files()), "files were left that nobody asked for"
    assert states() == before, "a global random state moved"


def test_random_states_are_as_found_though_everything_draws() -> None:
    """A loader that shuffles, augments by numpy and Python, and a model that draws noise."""

    def noisy(model: nn.Module, batch: Any) -> Tensor:
        random.random(), np.random.random(), torch.rand(1)
        return CausalLM(CausalLM.Options()).losses(model, batch)

    class Augmented:
        def __iter__(self) -> Iterator[Any]:
            random.random(), np.random.random(), torch.rand(1)
            yield from make_batches(make_samples())

    before = states()
    pipeline = lora_da_core.build_pipeline(objective=noisy, config=FIXED)
    data: Iterable[Any] = Augmented()
    estimates = pipeline.estimate(make_tiny_llama(), data, LORA)
    pipeline.solve(estimates)
    pipeline.run(make_tiny_llama(), data, LORA)
    assert states() == before


# The page


def table() -> str:
    rows = ["| fault | what happens | further tests |", "|---|---|---|"]
    rows += [f"| {fault.name} | {fault.promise} | {_listed(fault.tests)} |" for fault in FAULTS]
    return "\n".join(rows)


def _listed(tests: tuple[str, ...]) -> str:
    return ", ".join(f"`{each.removeprefix('tests/')}`" for each in tests)


def test_the_page_holds_this_table() -> None:
    assert table() in PAGE.read_text(), f"docs/reliability.md should hold:\n{table()}"


def test_every_fault_is_tested_here_or_where_it_says() -> None:
    assert len(FAULTS) >= 25 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert all(fault.provoke or fault.tests for fault in FAULTS)
    for file, _, name in (each.partition("::") for fault in FAULTS for each in fault.tests):
        functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert name in functions, f"{file} has no {name}"
