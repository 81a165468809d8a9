"""The whole path from batches to a stock PEFT adapter, and every way it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import AdapterError, LoraDAConfig, OptionError, adapter
from lora_da_core.probe import LowRankProbe

Watch = Callable[[nn.Module], None]
Batches = list[dict[str, torch.Tensor]]
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def loss_of(model: nn.Module, batches: Batches) -> float:
    objective = lora_da_core.build_pipeline().components.objective
    model.eval()
    with torch.no_grad():
        return float(torch.cat([objective.losses(model, batch) for batch in batches]).mean())


def test_one_call_gives_a_better_start_on_an_untouched_base(batches: Batches) -> None:
    model = make_tiny_llama()
    base = {name: value.clone() for name, value in model.named_parameters()}
    before = loss_of(model, batches)
    peft_model = lora_da_core.get_lora_da_model(model, LORA, batches)
    assert isinstance(peft_model, PeftModel)
    assert loss_of(peft_model, batches) < before
    with peft_model.disable_adapter():
        assert loss_of(peft_model, batches) == before
    for name, value in peft_model.get_base_model().named_parameters():
        if ".lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")])
            assert not value.requires_grad
        else:
            assert value.requires_grad


@pytest.mark.parametrize("preset", ["robust", "pissa", "lora_fa"])
def test_a_result_becomes_the_adapter_that_one_call_gives(batches: Batches, preset: str) -> None:
    pipeline = lora_da_core.build_pipeline(preset=preset)
    at_once = lora_da_core.get_lora_da_model(make_tiny_llama(), LORA, batches, pipeline=pipeline)
    base = make_tiny_llama()
    result = pipeline.run(base, batches, LORA)
    later = lora_da_core.get_lora_da_model(base, LORA, result=result)
    expected = dict(at_once.named_parameters())
    for name, value in later.named_parameters():
        assert torch.equal(value, expected[name]) and value.requires_grad == expected[name].requires_grad, name
    with pytest.raises(OptionError, match="either batches or result"):
        lora_da_core.get_lora_da_model(make_tiny_llama(), LORA, batches, result=result)
    with pytest.raises(OptionError, match="either batches or result"):
        lora_da_core.get_lora_da_model(make_tiny_llama(), LORA)
    with pytest.raises(OptionError, match="leave out pipeline"):
        lora_da_core.get_lora_da_model(make_tiny_llama(), LORA, result=result, pipeline=pipeline)


def _with_a_weight_changed() -> nn.Module:
    model = make_tiny_llama()
    model.lm_head.weight.data[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_with_a_weight_changed, "another base: its layers are in this model, but the base's weights differ"),
        (lambda: make_tiny_llama(hidden_size=64), "another base: its layers are in this model, but .* differ in shape"),
        (lambda: make_tiny_llama(torch.float64), "another base: its layers are in this model, but .* dtype"),
        (lambda: make_tiny_llama(num_hidden_layers=1), r"7 of its 14 layers are not in this model, .*layers\.1\."),
    ],
)
def test_a_result_of_another_base_is_refused(
    batches: Batches, model_unchanged: Watch, other: Callable[[], nn.Module], message: str
) -> None:
    result = lora_da_core.build_pipeline().run(make_tiny_llama(), batches, LORA)
    model = other()
    model_unchanged(model)
    with pytest.raises(AdapterError, match=message):
        lora_da_core.get_lora_da_model(model, LORA, result=result)
    assert not isinstance(model, PeftModel) and not any("lora" in name for name, _ in model.named_modules())


def test_a_result_of_other_layers_is_refused(batches: Batches, model_unchanged: Watch) -> None:
    model = make_tiny_llama()
    result = lora_da_core.build_pipeline().run(model, batches, LORA)
    model_unchanged(model)
    fewer = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(
        AdapterError, match=r"the factors do not fit adapter 'default': 0 .*24 given ones are not in it"
    ):
        lora_da_core.get_lora_da_model(model, fewer, result=result)


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_saved_adapter_reloads_exactly_and_merges(tmp_path: Path, batches: Batches, preset: str) -> None:
    model = make_tiny_llama()
    pipeline = lora_da_core.build_pipeline(preset=preset)
    peft_model = lora_da_core.get_lora_da_model(model, LORA, batches, pipeline=pipeline)
    peft_model.save_pretrained(tmp_path)
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    peft_model.eval()
    logits = peft_model(**inputs).logits
    reloaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path).eval()
    assert torch.equal(reloaded(**inputs).logits, logits)
    torch.testing.assert_close(reloaded.merge_and_unload()(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
    config = (tmp_path / "adapter_config.json").read_text()
    assert '"init_lora_weights": true' in config


def test_run_leaves_a_base_model_as_found(batches: Batches, model_unchanged: Watch) -> None:
    model = make_tiny_llama().train()
    model_unchanged(model)
    result = lora_da_core.build_pipeline().run(model, batches, LORA)
    assert len(result.factors) == 14
    for layer in result.report.layers:
        pair = result.factors[layer.name]
        assert pair.A.shape == (4, layer.in_features) and pair.B.shape == (layer.out_features, 4)
        assert layer.converged and layer.residual < 1e-5
        gram = pair.A @ pair.A.T
        torch.testing.assert_close(gram, torch.eye(4) * gram[0, 0], rtol=1e-4, atol=1e-5)


def test_same_inputs_give_the_same_bytes(batches: Batches) -> None:
    first, second = (lora_da_core.build_pipeline(solver="lanczos").run(make_tiny_llama(), batches, LORA) for _ in "12")
    for name, pair in first.factors.items():
        assert torch.equal(pair.A, second.factors[name].A) and torch.equal(pair.B, second.factors[name].B)


def test_peft_style_pair_initialises_in_place(batches: Batches) -> None:
    peft_model = get_peft_model(make_tiny_llama(), dataclasses.replace(LORA))
    state = lora_da_core.get_lora_da_state_dict(peft_model, batches)
    lora_da_core.initialize_lora_da_weights(peft_model, state_dict=state)
    written = get_peft_model_state_dict(peft_model)
    assert set(written) == set(state) and all(torch.equal(written[key], state[key]) for key in state)
    other = get_peft_model(make_tiny_llama(), dataclasses.replace(LORA))
    lora_da_core.initialize_lora_da_weights(other, batches)
    assert all(torch.equal(value, state[key]) for key, value in get_peft_model_state_dict(other).items())
    plain = lora_da_core.get_lora_da_state_dict(make_tiny_llama(), batches, LORA)
    for key, value in plain.items():
        torch.testing.assert_close(value, state[key], rtol=1e-4, atol=1e-6)


def test_a_second_adapter_under_its_own_name(batches: Batches) -> None:
    peft_model = get_peft_model(make_tiny_llama(), dataclasses.replace(LORA))
    first = {key: value.clone() for key, value in get_peft_model_state_dict(peft_model).items()}
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    lora_da_core.initialize_lora_da_weights(peft_model, batches, adapter_name="second")
    assert all(torch.equal(value, first[key]) for key, value in get_peft_model_state_dict(peft_model).items())
    written = get_peft_model_state_dict(peft_model, adapter_name="second")
    assert len(written) == 4 and all(bool(value.abs().sum() > 0) for value in written.values())


def test_rank_and_alpha_patterns_are_pefts_own(batches: Batches) -> None:
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4}
    )
    result = lora_da_core.build_pipeline().run(make_tiny_llama(), batches, lora)
    assert {pair.A.shape[0] for name, pair in result.factors.items() if name.endswith("q_proj")} == {2}
    assert {pair.A.shape[0] for name, pair in result.factors.items() if name.endswith("up_proj")} == {4}


def test_scale_does_not_depend_on_lora_alpha(batches: Batches) -> None:
    products = []
    for alpha in (1, 64):
        lora = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"])
        result = lora_da_core.build_pipeline().run(make_tiny_llama(), batches, lora)
        products.append({name: alpha / 4 * pair.B @ pair.A for name, pair in result.factors.items()})
    for name, product in products[0].items():
        torch.testing.assert_close(product, products[1][name])


def test_samples_cuts_the_data_and_a_generator_will_do() -> None:
    samples = make_samples(12)
    config = LoraDAConfig(samples=9, scale="fixed")
    pipeline = lora_da_core.build_pipeline(config=config)
    cut = pipeline.run(make_tiny_llama(torch.float64), make_batches(samples), LORA)
    nine = pipeline.run(make_tiny_llama(torch.float64), iter(make_batches(samples[:9], 3)), LORA)
    assert cut.report.samples == nine.report.samples == 9
    for name, pair in cut.factors.items():
        torch.testing.assert_close(pair.B @ pair.A, nine.factors[name].B @ nine.factors[name].A)


def test_low_cpu_mem_usage_leaves_nothing_on_meta(batches: Batches) -> None:
    peft_model = get_peft_model(make_tiny_llama(), dataclasses.replace(LORA), low_cpu_mem_usage=True)
    lora_da_core.initialize_lora_da_weights(peft_model, batches)
    assert not any(parameter.is_meta for parameter in peft_model.parameters())


def test_zero_gradient_layers_start_like_lora(batches: Batches) -> None:
    model = make_tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    result = lora_da_core.build_pipeline(config=LoraDAConfig(scale="fixed", damping=1.0, damping_kind="absolute")).run(
        model, batches, LORA
    )
    name = "model.layers.1.self_attn.q_proj"
    assert bool((result.factors[name].B == 0).all())
    assert any("gradient is zero" in remedy for remedy in dict_of(result)[name].remedies)


def dict_of(result: lora_da_core.LoraDAResult) -> dict[str, lora_da_core.LayerReport]:
    return {layer.name: layer for layer in result.report.layers}


EMPTY: list[dict[str, torch.Tensor]] = []
MASKED = [{"input_ids": torch.ones(3, 5, dtype=torch.long), "labels": torch.full((3, 5), -100)}]
SHORT = [{"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(1, 3, dtype=torch.long)}]


@pytest.mark.parametrize(
    ("data", "lora", "error", "message"),
    [
        (EMPTY, LORA, lora_da_core.DataError, "data set is empty"),
        (MASKED, LORA, lora_da_core.DataError, "all labels are masked in all 3 samples"),
        ([{"input_ids": torch.ones(1, 3, dtype=torch.long)}], LORA, lora_da_core.DataError, "batch 0 has no 'labels'"),
        (SHORT, LORA, lora_da_core.DataError, "2 tokens count for the Fisher, fewer than the rank 4"),
        ([{"input_ids": [[1, 2]], "labels": [[1, 2]]}], LORA, lora_da_core.DataError, "labels of batch 0 are a list"),
        ([{"labels": torch.ones(3, dtype=torch.long)}], LORA, lora_da_core.DataError, r"batch 0, of shape \(3,\)"),
        (None, LoraConfig(r=4, target_modules="["), lora_da_core.TargetError, "unterminated character set"),
        (None, LoraConfig(lora_alpha=0, target_modules=["q_proj"]), lora_da_core.TargetError, "scales layer .* by 0.0"),
        (None, LoraConfig(r=4, target_modules=["q_prj"]), lora_da_core.TargetError, "Closest: q_proj"),
        (
            None,
            LoraConfig(r=40, target_modules=["q_proj"]),
            lora_da_core.TargetError,
            r"rank 40 is above min\(in, out\)",
        ),
        (
            None,
            LoraConfig(r=4, target_modules=["q_proj"], use_qalora=True),
            lora_da_core.TargetError,
            "QA-LoRA pools",
        ),
        (None, LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1]), lora_da_core.TargetError, "aLoRA"),
        (None, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), lora_da_core.OptionError, "pissa"),
    ],
)
def test_bad_input_is_one_clear_error_and_the_model_is_as_found(
    batches: Batches,
    model_unchanged: Watch,
    data: Batches | None,
    lora: LoraConfig,
    error: type[Exception],
    message: str,
) -> None:
    model = make_tiny_llama()
    model_unchanged(model)
    with pytest.raises(error, match=message):
        lora_da_core.build_pipeline().run(model, batches if data is None else data, lora)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"damping": -1}, "damping is -1"),
        ({"gamma": 0}, "gamma is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": 2.5}, "samples is 2.5"),
        ({"population": 0}, "population is 0"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": 2**64}, r"below 2\*\*63"),
        ({"seed": None}, "seed is None"),
        ({"normalize": "no"}, "normalize is 'no'"),
        ({"token_mask": "prompt"}, "choose one of labels, attention"),
        ({"scale": "big"}, "choose one of auto, fixed"),
        ({"alpha": 0, "beta": 0}, "Ω would be zero"),
    ],
)
def test_config_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(lora_da_core.OptionError, match=message):
        LoraDAConfig(**values)


def test_writing_is_all_or_nothing(batches: Batches) -> None:
    peft_model = get_peft_model(make_tiny_llama(), dataclasses.replace(LORA))
    state = lora_da_core.get_lora_da_state_dict(peft_model, batches)
    before = {key: value.clone() for key, value in get_peft_model_state_dict(peft_model).items()}
    key = sorted(state)[3]
    for broken in (
        {k: v for k, v in state.items() if k != key},
        {**state, key: state[key][:1]},
        {**state, "base_model.model.nowhere.lora_A.weight": state[key]},
        {**state, key: torch.full_like(state[key], float("nan"))},
    ):
        with pytest.raises(lora_da_core.AdapterError):
            lora_da_core.initialize_lora_da_weights(peft_model, state_dict=broken)
        assert all(torch.equal(value, before[k]) for k, value in get_peft_model_state_dict(peft_model).items())


def test_unwrapped_again_when_the_factors_do_not_fit(batches: Batches, model_unchanged: Watch) -> None:
    model = make_tiny_llama()
    result = lora_da_core.build_pipeline().run(model, batches, LORA)
    fewer = dict(list(result.factors.items())[1:])
    with pytest.raises(lora_da_core.AdapterError, match="2 of its tensors are not given"):
        adapter.apply(model, LORA, fewer)
    assert not any("lora_" in name for name, _ in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batches_and_state_dict_exclude_each_other(batches: Batches) -> None:
    peft_model = get_peft_model(make_tiny_llama(), dataclasses.replace(LORA))
    with pytest.raises(lora_da_core.OptionError, match="either batches or state_dict"):
        lora_da_core.initialize_lora_da_weights(peft_model)


def test_unconverged_layers_are_mended_reported_or_refused(batches: Batches) -> None:
    hopeless = ("lanczos", {"max_applies": 2, "tolerance": 1e-15})

    def run(choice: str) -> lora_da_core.LoraDAResult:
        config = LoraDAConfig(scale="fixed", unconverged=choice)  # type: ignore[arg-type]
        model = make_tiny_llama(hidden_size=64, intermediate_size=96)
        return lora_da_core.build_pipeline(solver=hopeless, config=config).run(
            model, batches, LoraConfig(r=1, target_modules=["q_proj"])
        )

    mended = run("fallback").report.layers[0]
    assert mended.converged and mended.solver == "eigh" and "did not converge" in mended.remedies[-1]
    warned = run("warn").report.layers[0]
    assert not warned.converged and warned.solver == "lanczos"
    with pytest.raises(lora_da_core.ConvergenceError, match=r"q_proj.*residual"):
        run("error")


def test_import_stays_light() -> None:
    code = (
        "import sys, torch, time; start = time.perf_counter(); import lora_da_core; "
        "print(time.perf_counter() - start); "
        "print([m for m in ('transformers', 'peft', 'datasets', 'matplotlib', 'lora_da_solvers') if m in sys.modules])"
    )
    seconds, heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert heavy == "[]", heavy
    print(f"import lora_da_core took {seconds} s beyond torch")


def test_one_estimate_serves_every_solver_rank_damping_and_scale(batches: Batches) -> None:
    model, calls = make_tiny_llama(), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    base = lora_da_core.build_pipeline(solver="eigh", config=LoraDAConfig(scale="fixed"))
    estimates = base.estimate(model, batches, LORA)
    passes = len(calls)
    for values in ({"damping": 0.01}, {"beta": 3.0, "alpha": 0.5}, {"gamma": 4.0}, {}):
        config = LoraDAConfig(scale="fixed", **values)
        for rank in (2, 4):
            lora = dataclasses.replace(LORA, r=rank)
            pipeline = lora_da_core.build_pipeline(solver="lanczos", config=config)
            again = pipeline.solve(estimates, lora)
            assert len(calls) == passes
            fresh = pipeline.run(make_tiny_llama(), batches, lora)
            for name, pair in fresh.factors.items():
                assert torch.equal(pair.A, again.factors[name].A) and torch.equal(pair.B, again.factors[name].B)
    handle.remove()
    for other in (
        lora_da_core.build_pipeline(estimator="identity"),
        lora_da_core.build_pipeline(config=LoraDAConfig(token_mask="attention")),
    ):
        with pytest.raises(lora_da_core.OptionError, match="estimate again"):
            other.solve(estimates)
    with pytest.raises(lora_da_core.OptionError, match="other layers"):
        base.solve(estimates, LoraConfig(r=4, target_modules=["q_proj"]))


def test_the_scale_does_not_depend_on_batching_or_on_samples_without_labels() -> None:
    samples = make_samples(70)
    samples.sort(key=lambda sample: -len(sample["input_ids"]))
    found = []
    for size in (1, 9, 70):
        report = lora_da_core.build_pipeline().run(make_tiny_llama(torch.float64), make_batches(samples, size), LORA)
        found.append(torch.tensor(report.report.scale["tried"], dtype=torch.float64))
    for tried in found[1:]:
        torch.testing.assert_close(tried, found[0])
    masked = [sample for pair in zip(samples, samples, strict=True) for sample in pair]
    for place, sample in enumerate(masked):
        if place % 2 == 0:
            masked[place] = {**sample, "labels": torch.full_like(sample["labels"], -100)}
    report = lora_da_core.build_pipeline().run(make_tiny_llama(torch.float64), make_batches(masked, 1), LORA)
    torch.testing.assert_close(torch.tensor(report.report.scale["tried"], dtype=torch.float64), found[0])


def test_wrapping_leaves_the_global_generator_alone(batches: Batches) -> None:
    before = torch.random.get_rng_state()
    lora_da_core.get_lora_da_model(make_tiny_llama(), LORA, batches)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_wrapped_model_gives_its_own_configuration_and_its_base(batches: Batches, model_unchanged: Watch) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    with torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(make_tiny_llama(), lora)
    model_unchanged(peft_model)
    pipeline = lora_da_core.build_pipeline()
    report = pipeline.run(peft_model, batches, lora).report
    assert report.base == adapter.fingerprint(make_tiny_llama())
    assert {layer.name.rsplit(".", 1)[-1] for layer in report.layers} == {"q_proj", "lm_head"}
    with pytest.raises(lora_da_core.OptionError, match="r=4, the configuration 2; leave the configuration out"):
        pipeline.run(peft_model, batches, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(lora_da_core.TargetError, match="holds LoRA layers, but is no PeftModel"):
        pipeline.run(peft_model.get_base_model(), batches, lora)


def test_a_merged_adapter_is_refused_and_stays_merged(batches: Batches, model_unchanged: Watch) -> None:
    peft_model = lora_da_core.get_lora_da_model(make_tiny_llama(), LORA, batches)
    peft_model.merge_adapter()
    model_unchanged(peft_model)
    with pytest.raises(lora_da_core.TargetError, match="unmerge_adapter"):
        lora_da_core.build_pipeline().run(peft_model, batches)
    assert all(layer.merged for layer in peft_model.modules() if hasattr(layer, "merged"))


def test_a_probe_that_cannot_start_leaves_the_model_as_found(batches: Batches, model_unchanged: Watch) -> None:
    @contextlib.contextmanager
    def refuse() -> Iterator[None]:
        raise RuntimeError("no base here")
        yield

    model = make_tiny_llama().train()
    model_unchanged(model)
    task = dataclasses.replace(lora_da_core.build_pipeline().estimate(model, batches, LORA).task, base_only=refuse)
    probe = LowRankProbe(task, batches, print)
    with pytest.raises(RuntimeError, match="no base here"):
        probe.__enter__()
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_an_unconverged_spectral_norm_is_mended_reported_or_refused(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_da_core.operators import NegatedGram
    from lora_da_core.step_norm import Bracket
    from lora_da_solvers.lanczos import Lanczos

    honest = Lanczos.smallest
    # As where Ω's eigenvectors leave σ open, so that a solver is asked.
    monkeypatch.setattr(Bracket, "within", lambda self, tolerance: False)

    def lazy(self: Any, operator: Any, rank: int, *, generator: torch.Generator) -> Any:
        found = honest(self, operator, rank, generator=generator)
        if isinstance(operator, NegatedGram):
            found = dataclasses.replace(found, values=0.25 * found.values, converged=torch.zeros_like(found.converged))
        return found

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    expected = lora_da_core.build_pipeline(solver="eigh").run(make_tiny_llama(), batches, lora).report.layers[0]
    monkeypatch.setattr(Lanczos, "smallest", lazy)

    def run(choice: str) -> lora_da_core.LayerReport:
        config = LoraDAConfig(scale="fixed", unconverged=choice)  # type: ignore[arg-type]
        pipeline = lora_da_core.build_pipeline(solver="lanczos", config=config)
        return pipeline.run(make_tiny_llama(), batches, lora).report.layers[0]

    mended, warned = run("fallback"), run("warn")
    assert mended.sigma == pytest.approx(expected.sigma, rel=1e-6)
    assert mended.remedies == ("lanczos did not converge on σ; solved with eigh",)
    assert warned.sigma == pytest.approx(0.5 * expected.sigma, rel=1e-3)
    assert warned.remedies == ("lanczos did not converge on σ",)
    with pytest.raises(lora_da_core.ConvergenceError, match=r"on σ of .*q_proj"):
        run("error")


def test_a_configuration_of_another_type_is_refused_at_once() -> None:
    with pytest.raises(lora_da_core.OptionError, match="config is a dict"):
        lora_da_core.build_pipeline(config={"alpha": 1.0})  # type: ignore[arg-type]
    with pytest.raises(lora_da_core.UnknownNameError, match="unknown estimator ''"):
        lora_da_core.build_pipeline(estimator="")
