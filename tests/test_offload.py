"""Models that accelerate offloads to the host and to disk: the results of memory, weights there only in turn."""

import gc
import json
import shutil
import weakref
from typing import ClassVar

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lora_da_core
from conftest import make_tiny_llama
from lora_da_core import adapter, models
from lora_da_core.cli import app
from lora_da_core.errors import ModelError, OptionError
from lora_da_core.placement import largest_module_bytes, resident_bytes

CPU = torch.device("cpu")
MIXED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def offloaded(kind, folder, model=None):
    model = make_tiny_llama() if model is None else model
    if kind == "host":
        return cpu_offload(model, execution_device=CPU)
    if kind == "disk":
        return disk_offload(model, folder, execution_device=CPU)
    return dispatch_model(model, MIXED, main_device="cpu", offload_dir=folder)


def lora(**settings):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


def inputs(batches):
    return {key: value for key, value in batches[0].items() if key != "labels"}


def assert_same(found, expected):
    assert found.factors.keys() == expected.factors.keys()
    for name, pair in expected.factors.items():
        assert torch.equal(found.factors[name].A, pair.A), name
        assert torch.equal(found.factors[name].B, pair.B), name
    assert found.report.base == expected.report.base
    assert found.report.loss == expected.report.loss


def surroundings(model):
    return [
        (
            name,
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            module.__dict__.get("forward"),
        )
        for name, module in model.named_modules()
    ] + [(name, p.requires_grad, p.device, p.grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("kind", ["host", "disk", "mixed"])
def test_an_offloaded_model_gives_the_bytes_of_one_in_memory(kind, tmp_path, batches):
    pipeline = lora_da_core.build_pipeline()
    expected = pipeline.run(make_tiny_llama(), batches, lora())
    model = offloaded(kind, tmp_path)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.model.layers[0].train()
    before, digests = surroundings(model), adapter.base_digests(model)
    assert_same(pipeline.run(model, batches, lora()), expected)
    assert surroundings(model) == before
    assert adapter.base_digests(model) == digests == adapter.base_digests(make_tiny_llama())


@pytest.mark.parametrize(
    ("parts", "settings"),
    [
        ({"estimator": "ekfac"}, {}),
        ({"gradient": ("zeroth_order", {"steps": 1, "probes": 1}), "estimator": "identity"}, {}),
        ({"gradient": "weights", "estimator": "identity"}, {"scale": "stable"}),
        ({}, {"rounds": 2}),
    ],
    ids=str,
)
def test_so_do_other_ways_through_a_run(parts, settings, tmp_path, batches):
    config = lora_da_core.LoraDAConfig(**settings)
    pipeline = lora_da_core.build_pipeline(**parts, config=config)
    expected = pipeline.run(make_tiny_llama(), batches, lora())
    assert_same(pipeline.run(offloaded("disk", tmp_path), batches, lora()), expected)


def test_a_failing_run_leaves_an_offloaded_model_as_it_was(tmp_path, batches):
    model, calls = offloaded("disk", tmp_path), []
    before = surroundings(model)

    def losses(model, batch):
        calls.append(1)
        found = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.mean((1, 2))
        return found / (0.0 if len(calls) == 4 else 1.0)  # the first two look whether the model repeats

    with pytest.raises(ModelError, match="not finite"):
        lora_da_core.build_pipeline(objective=losses).run(model, batches, lora())
    assert surroundings(model) == before


class Watched(dict):
    """Weights as accelerate reads them, which notes how many bytes of them are alive at a time."""

    alive: ClassVar[dict[int, int]] = {}
    most = 0

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def __contains__(self, name):
        return name in self.weights

    def __getitem__(self, name):
        value = self.weights[name].clone()
        Watched.alive[id(value)] = value.nbytes
        weakref.finalize(value.untyped_storage(), Watched.alive.pop, id(value), None)
        Watched.most = max(Watched.most, sum(Watched.alive.values()))
        return value


def test_weights_are_in_memory_only_while_they_are_used(tmp_path, batches):
    model = offloaded("disk", tmp_path, make_tiny_llama(num_hidden_layers=8))
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "weights_map", None) is not None:
            hook.weights_map = Watched(hook.weights_map)
    Watched.alive, Watched.most = {}, 0
    lora_da_core.build_pipeline().run(model, batches, lora())
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert not Watched.alive
    # One module in the forward pass; in the backward pass one that is read again, and one that is still referred to.
    assert 0 < Watched.most <= 2 * largest_module_bytes(model) < total / 8
    assert resident_bytes(model) - largest_module_bytes(model) < total / 20  # what stays: buffers


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_of_an_offloaded_model_is_that_of_one_in_memory(settings, tmp_path, batches):
    plain = lora_da_core.get_lora_da_model(make_tiny_llama(), lora(**settings), batches)
    model = lora_da_core.get_lora_da_model(offloaded("mixed", tmp_path / "weights"), lora(**settings), batches)
    if not settings:  # PEFT's forward pass with DoRA reads the base's weights where they are not
        with torch.no_grad():
            assert torch.equal(model(**inputs(batches)).logits, plain(**inputs(batches)).logits)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**inputs(batches)).logits, plain(**inputs(batches)).logits)


@pytest.mark.parametrize("kind", ["disk", "mixed"])
def test_an_adapter_is_verified_on_an_offloaded_model(kind, tmp_path, batches):
    result = lora_da_core.build_pipeline().run(make_tiny_llama(), batches, lora())
    saved = tmp_path / "adapter"
    adapter.apply(make_tiny_llama(), lora(), result.factors).save_pretrained(saved)
    checks = adapter.verify(saved, offloaded(kind, tmp_path / "one"), result.report, inputs(batches))
    assert [check.name for check in checks if not check.passed] == []
    state = load_file(saved / "adapter_model.safetensors")
    next(iter(state.values())).add_(1e-6)
    save_file(state, saved / "adapter_model.safetensors")
    checks = adapter.verify(saved, offloaded(kind, tmp_path / "two"), result.report, inputs(batches))
    assert [check.name for check in checks if not check.passed] == ["every A and B equals what was computed"]


def test_the_offset_adapter_of_an_offloaded_model_takes_the_start_out_again(tmp_path, batches):
    model = offloaded("disk", tmp_path)
    with torch.no_grad():
        before = model(**inputs(batches)).logits
    pipeline = lora_da_core.build_pipeline(config=lora_da_core.LoraDAConfig(offset="frozen_adapter"))
    model = lora_da_core.get_lora_da_model(model, lora(), batches, pipeline=pipeline)
    with torch.no_grad():
        assert torch.allclose(model(**inputs(batches)).logits, before, atol=1e-5)
        model.set_adapter("default")
        assert not torch.allclose(model(**inputs(batches)).logits, before, atol=1e-3)


def test_an_offset_in_weights_that_are_offloaded_is_refused(tmp_path, batches):
    pipeline = lora_da_core.build_pipeline(config=lora_da_core.LoraDAConfig(offset="base"))
    with pytest.raises(OptionError, match="offloaded"):
        pipeline.run(offloaded("disk", tmp_path), batches, lora())


# Loading


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    """A model most of whose bytes are weights, with a tokenizer."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    shutil.copytree(world / "model", folder)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "vocab_size": 47}
    make_tiny_llama(**shape).save_pretrained(folder)
    return folder


def test_a_checkpoint_is_read_in_place(checkpoint, tmp_path):
    found = models.load_model(checkpoint, device="cpu", offload=models.Offload(0, tmp_path))
    (folder,) = tmp_path.iterdir()
    assert list(folder.iterdir()) == []
    assert all(parameter.is_meta for parameter in found.model.parameters())
    del found
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_part_of_a_model_stays(checkpoint, tmp_path):
    whole = models.load_model(checkpoint, device="cpu").model
    half = sum(parameter.nbytes for parameter in whole.parameters()) // 2
    model = models.load_model(checkpoint, device="cpu", offload=models.Offload(half, tmp_path)).model
    kept = sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)
    assert 0 < kept <= half
    assert adapter.fingerprint(model) == adapter.fingerprint(whole)


def test_a_model_that_exceeds_the_limit_completes_and_equals_the_run_in_memory(checkpoint, world, tmp_path):
    weights = resident_bytes(models.load_shapes(checkpoint, device="cpu").model)
    common = ["init", "--model", str(checkpoint), "--data", str(world / "data.jsonl"), "--samples", "8"]
    common += ["--device", "cpu", "--batch-size", "2", "--target-modules", "q_proj,v_proj"]
    limits = {
        "free": [],
        "some": ["--max-memory", f"{int(1.2 * weights)}B"],
        "less": ["--max-memory", f"{int(0.85 * weights)}B"],
    }
    found, notes = {}, {}
    for name, more in limits.items():
        done = CliRunner().invoke(app, [*common, "--output", str(tmp_path / name), *more])
        assert done.exit_code == 0, done.output
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
        notes[name] = " ".join(json.loads((tmp_path / name / "lora_da_report.json").read_text())["notes"])
        assert found[name].keys() == found["free"].keys()
        for key, value in found[name].items():
            # A limit may cut batches, and sums are then added up in another order.
            most = float(found["free"][key].abs().max())
            torch.testing.assert_close(value, found["free"][key], rtol=1e-3, atol=1e-4 * most)
    assert "offloaded" not in notes["free"]
    assert all(
        "planned for a limit" in notes[name] and "parameters are offloaded" in notes[name] for name in ("some", "less")
    )


def test_a_limit_that_not_even_offloading_meets_is_an_error(checkpoint, world, tmp_path):
    arguments = ["init", "--model", str(checkpoint), "--data", str(world / "data.jsonl"), "--device", "cpu"]
    arguments += ["--samples", "4", "--batch-size", "2", "--target-modules", "q_proj"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "run"), "--max-memory", "100kB"])
    assert done.exit_code == 2
    assert "the smallest that works" in done.output
    assert not (tmp_path / "run").exists()
