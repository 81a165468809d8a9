"""Related initialisations as presets, against PEFT's own implementations and in closed form."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import OptionError
from lora_da_core.ablation.baselines import factors_of

RANK, ALPHA, EXACT = 4, 8, 8
TARGETS = ["q_proj", "v_proj", "down_proj"]
ANGLE = 1e-3


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, **settings})


def pipeline(preset: str, **changes: Any) -> Any:
    built = lora_da_core.build_pipeline(preset=preset, solver="eigh")
    built.config = replace(built.config, **changes)
    return built


def angle(one: Tensor, two: Tensor) -> float:
    """The largest angle between the row spaces."""
    bases = [torch.linalg.qr(each.double().mT)[0] for each in (one, two)]
    away = bases[0] - bases[1] @ (bases[1].mT @ bases[0])
    return float(torch.linalg.svdvals(away).max().clamp(max=1).asin())


def gradients(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
    """The mean over samples of the gradient of the sample's own loss, by autograd, one sample at a time."""
    found = {name: torch.zeros(0) for name in names}
    count = 0
    for batch in batches:
        for row in range(len(batch["labels"])):
            model.zero_grad()
            length = int(batch["attention_mask"][row].sum())
            model(**{key: value[row : row + 1, :length] for key, value in batch.items()}).loss.backward()
            count += 1
            for name in names:
                part = model.get_submodule(name).weight.grad.double()
                found[name] = part.clone() if not found[name].numel() else found[name] + part
    return {name: value / count for name, value in found.items()}


def data() -> list[dict[str, Tensor]]:
    return make_batches(make_samples(8))


# Against PEFT


def peft_lora_ga(batches: list[dict[str, Tensor]]) -> PeftModel:
    from peft import LoraGAConfig
    from peft.tuners.lora import preprocess_loraga

    model = make_tiny_llama()
    given = config(r=EXACT, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def step() -> None:
        # One sample at a time, so that every sample weighs the same.
        for batch in batches:
            for row in range(len(batch["labels"])):
                length = int(batch["attention_mask"][row].sum())
                model(**{key: value[row : row + 1, :length] for key, value in batch.items()}).loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_loraga(model, given, step)
        return get_peft_model(model, given)


def test_lora_ga_spans_what_peft_s_own_spans() -> None:
    """At a rank whose sketch of 4r columns is the whole gradient: PEFT's SVD is randomised, off by 6e-3 at rank 4."""
    batches = data()
    theirs = factors_of(peft_lora_ga(batches))
    ours = pipeline("lora_ga").run(make_tiny_llama(), batches, config(r=EXACT)).factors
    assert set(ours) == set(theirs)
    for name, pair in ours.items():
        assert angle(pair.A, theirs[name].A) <= ANGLE
        assert angle(pair.B.mT, theirs[name].B.mT) <= ANGLE
        size = pair.B.shape[0] ** 0.25 / math.sqrt(16)
        torch.testing.assert_close(pair.A @ pair.A.mT, size**2 * torch.eye(EXACT), rtol=0, atol=1e-5)
        torch.testing.assert_close(pair.B.mT @ pair.B, size**2 * torch.eye(EXACT), rtol=0, atol=1e-5)


def test_pissa_is_peft_s_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = factors_of(get_peft_model(make_tiny_llama(), config(init_lora_weights="pissa")))
    ours = pipeline("pissa").run(make_tiny_llama(), data(), config()).factors
    for name, pair in ours.items():
        assert angle(pair.A, theirs[name].A) <= ANGLE
        torch.testing.assert_close(pair.B @ pair.A, theirs[name].B @ theirs[name].A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(pair.A.norm(dim=1), theirs[name].A.norm(dim=1), rtol=1e-4, atol=0)


class Centred(nn.Module):
    """One layer, for inputs that come with their negatives: PEFT's EVA subtracts the mean, the paper does not."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.proj = nn.Linear(24, 16)
        self.config = {"model_type": "custom"}

    def forward(self, inputs: Tensor, labels: Tensor | None = None, **rest: Any) -> Any:
        return self.proj(inputs)


def test_eva_spans_what_peft_s_own_spans() -> None:
    draw = torch.Generator().manual_seed(0)
    # Four strong directions: PEFT's incremental SVD is randomised and no better than the spectrum is steep.
    strength = torch.cat([torch.tensor([3.0, 2.5, 2.0, 1.5]), torch.full((20,), 0.05)])
    half = torch.randn(8, 6, 24, generator=draw) * strength
    inputs = torch.cat([half, -half])
    batch = {"inputs": inputs, "labels": torch.zeros(16, 6, dtype=torch.long)}
    # PEFT reads the shape of this one.
    named = {**batch, "input_ids": batch["labels"]}
    given = LoraConfig(r=RANK, target_modules=["proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(Centred(), given)
        initialize_lora_eva_weights(theirs, [named] * 3, show_progress_bar=False)
    expected = factors_of(theirs)["proj"]

    def losses(model: nn.Module, each: dict[str, Tensor]) -> Tensor:
        return model(each["inputs"]).square().mean((1, 2))

    built = lora_da_core.build_pipeline(preset="eva", objective=losses)
    result = built.run(Centred(), [batch], LoraConfig(r=RANK, target_modules=["proj"]))
    ours = result.factors["proj"]
    assert angle(ours.A, expected.A) <= ANGLE
    assert not ours.B.any() and not expected.B.any()
    torch.testing.assert_close(ours.A @ ours.A.mT, torch.eye(RANK), rtol=0, atol=1e-5)


def test_eva_is_the_top_of_the_inputs_second_moment() -> None:
    """On a language model, against inputs caught by a hook; label tokens alone, without a backward pass."""
    batches, model = data(), make_tiny_llama(torch.float64)
    seen: list[Tensor] = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    handle.remove()
    masks = [torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1)) for batch in batches]
    rows = torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)])
    top = torch.linalg.svd(rows, full_matrices=False).Vh[:RANK]
    result = pipeline("eva").run(model, batches, config())
    assert angle(result.factors["model.layers.1.self_attn.q_proj"].A, top) <= 1e-6
    assert all(not pair.B.any() for pair in result.factors.values())


# Closed forms


def test_loi_holds_the_top_2r_singular_values_in_its_tangent_space() -> None:
    """‖P_T G‖² = Σ of the top 2r σ² at ΔW0 = αUVᵀ, α = 0.01/√r (arXiv 2507.12142)."""
    batches, model = data(), make_tiny_llama(torch.float64)
    result = pipeline("loi").run(model, batches, config())
    for name, gradient in gradients(model, batches, list(result.factors)).items():
        pair = result.factors[name]
        start = (ALPHA / RANK) * pair.B.double() @ pair.A.double()
        u, values, vh = torch.linalg.svd(start)
        torch.testing.assert_close(
            values[:RANK], torch.full((RANK,), 0.01 / math.sqrt(RANK)).double(), rtol=1e-5, atol=0
        )
        left, right = u[:, :RANK] @ u[:, :RANK].mT, vh[:RANK].mT @ vh[:RANK]
        tangent = left @ gradient + gradient @ right - left @ gradient @ right
        expected = torch.linalg.svdvals(gradient)[: 2 * RANK].square().sum()
        assert float(tangent.square().sum()) == pytest.approx(float(expected), rel=1e-6)


def test_spectral_start_follows_the_gradient_flow_s_solution() -> None:
    """s_i(t) = σ_i/(1 + (σ_i/α² − 1)e^{−2σ_i t}) on ½‖D − BA‖² from B = αU, A = αVᵀ (arXiv 2503.06982)."""
    from scipy.integrate import solve_ivp

    sigma, alpha = torch.tensor([2.0, 1.0, 0.5]).double().numpy(), 1e-3

    def flow(time: float, state: Any) -> Any:
        a, b = state[:3], state[3:]
        return [*(b * (sigma - a * b)), *(a * (sigma - a * b))]

    half_times = []
    for i, value in enumerate(sigma):
        closed = math.log(value / alpha**2 - 1) / (2 * value)
        path = solve_ivp(flow, (0, closed), [alpha] * 6, rtol=1e-10, atol=1e-12)
        assert path.y[i, -1] * path.y[3 + i, -1] == pytest.approx(value / 2, rel=1e-6)
        half_times.append(round(closed, 3))
    assert half_times == [3.627, 6.908, 13.122]
    batches, model = data(), make_tiny_llama(torch.float64)
    result = pipeline("spectral").run(model, batches, config())
    for name, gradient in gradients(model, batches, list(result.factors)).items():
        pair = result.factors[name]
        u, _, vh = torch.linalg.svd(-gradient)
        assert angle(pair.A, vh[:RANK]) <= 1e-6 and angle(pair.B.mT, u[:, :RANK].mT) <= 1e-6
        product = torch.linalg.svdvals(pair.B.double() @ pair.A.double())[:RANK]
        assert float(product.max() / product.min()) == pytest.approx(1, rel=1e-6)


def test_lora_fa_trains_b_alone_from_robust_s_start() -> None:
    batches = data()
    wrapped = lora_da_core.get_lora_da_model(make_tiny_llama(), config(), batches, pipeline=pipeline("lora_fa"))
    plain = lora_da_core.get_lora_da_model(make_tiny_llama(), config(), batches, pipeline=pipeline("robust"))
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in before.items())
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_B." in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        wrapped(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = wrapped.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name for name in changed if "lora_" in name} == changed == {n for n in before if ".lora_B." in n}


def test_peft_s_own_lora_fa_optimizer_trains_the_same_factors_from_our_a() -> None:
    from peft.optimizers import create_lorafa_optimizer

    batches = data()
    built = [
        lora_da_core.get_lora_da_model(make_tiny_llama(), config(), batches, pipeline=pipeline(preset))
        for preset in ("lora_fa", "robust")
    ]
    ours, theirs = built
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    optimizer = create_lorafa_optimizer(theirs, r=RANK, lora_alpha=ALPHA, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = theirs(**batches[0]).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {name for name, value in theirs.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in ours.named_parameters() if parameter.requires_grad}


# Offsets


@pytest.mark.parametrize("preset", ["lora_ga", "loi", "pissa", "lora_one"])
@pytest.mark.parametrize("offset", ["base", "frozen_adapter"])
def test_an_offset_starts_at_the_base_s_function(preset: str, offset: str) -> None:
    batches, model = data(), make_tiny_llama()
    before = model(**batches[0]).logits.detach()
    wrapped = lora_da_core.get_lora_da_model(model, config(), batches, pipeline=pipeline(preset, offset=offset)).eval()
    # The steps are not nothing.
    assert all(bool(value.any()) for name, value in wrapped.named_parameters() if ".lora_B.default." in name)
    torch.testing.assert_close(wrapped(**batches[0]).logits.detach(), before, rtol=1e-4, atol=1e-4)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trained and all(".default." in name for name in trained)


@pytest.mark.parametrize("preset", ["lora_ga", "loi", "pissa"])
def test_without_an_offset_the_report_says_that_the_function_changes(preset: str) -> None:
    batches, model = data(), make_tiny_llama()
    weights = copy.deepcopy(model.state_dict())
    report = pipeline(preset).run(model, batches, config()).report
    assert any("changes by scaling·B·A" in note for note in report.notes)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_frozen_offset_reloads_to_the_same_function_in_stock_peft(tmp_path: Path) -> None:
    batches = data()
    built = pipeline("lora_ga", offset="frozen_adapter")
    wrapped = lora_da_core.get_lora_da_model(make_tiny_llama(), config(), batches, pipeline=built).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * (1 if "lora_A" in name else -1))
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_tiny_llama(), tmp_path)
    again.load_adapter(tmp_path / "lora_da_offset", "lora_da_offset")
    again.base_model.set_adapter(["default", "lora_da_offset"])
    again.eval()
    with torch.no_grad():
        assert torch.equal(again(**batches[0]).logits, wrapped(**batches[0]).logits)


def test_an_offset_is_refused_where_it_cannot_be_had(world: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lora_da_core.cli import app

    arguments = ["init", "--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--rank", "2"]
    arguments += ["--output", str(tmp_path / "run"), "--preset", "lora_ga"]
    refused = CliRunner().invoke(app, [*arguments, "--offset", "base"])
    assert refused.exit_code == 2 and "cannot be saved as one adapter" in refused.output
    assert not (tmp_path / "run").exists()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    with pytest.raises(OptionError, match="DoRA"):
        pipeline("lora_ga", offset="base").run(make_tiny_llama(), data(), config(use_dora=True))


def test_an_offset_is_refused_where_it_would_change_more_than_the_layer() -> None:
    tied = make_tiny_llama(tie_word_embeddings=True)
    with pytest.raises(OptionError, match="shares its weights"):
        pipeline("pissa", offset="base").run(tied, data(), config(target_modules=["lm_head"]))
    built = pipeline("loi", offset="frozen_adapter")
    wrapped = lora_da_core.get_lora_da_model(make_tiny_llama(), config(), data(), pipeline=built)
    with pytest.raises(OptionError, match="already"):
        lora_da_core.initialize_lora_da_weights(wrapped, data(), pipeline=built)


def test_pissa_reads_weights_that_are_stored_transposed() -> None:
    import tiny_models

    def make() -> nn.Module:
        return tiny_models.causal("GPT2", torch.float32)

    given = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = factors_of(get_peft_model(make(), config(init_lora_weights="pissa", **given)))
        ours = pipeline("pissa").run(make(), [tiny_models.continued()], config(**given)).factors
    for name, pair in ours.items():
        torch.testing.assert_close(pair.B @ pair.A, theirs[name].B @ theirs[name].A, rtol=1e-4, atol=1e-5)


class Packed(nn.Linear):
    """Weights as bytes and a scale, as quantized layers keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=True)
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input.float(), self.weight.float() * self.scale, self.bias)


def test_packed_weights_are_read_by_what_they_do() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.proj = Packed(nn.Linear(20, 12))
            self.config = {"model_type": "custom"}

        def forward(self, inputs: Tensor, **rest: Any) -> Tensor:
            found: Tensor = self.proj(inputs)
            return found

    model = Model()
    dense = model.proj.weight.float() * model.proj.scale
    batch = {"inputs": torch.ones(8, 2, 20), "labels": torch.zeros(8, 2, dtype=torch.long)}
    built = lora_da_core.build_pipeline(
        preset="pissa", solver="eigh", objective=lambda m, b: m(b["inputs"]).mean((1, 2))
    )
    (pair,) = built.run(model, [batch], LoraConfig(r=3, lora_alpha=3, target_modules=["proj"])).factors.values()
    u, values, vh = torch.linalg.svd(dense)
    torch.testing.assert_close(pair.B @ pair.A, (u[:, :3] * values[:3]) @ vh[:3], rtol=1e-3, atol=1e-4)
    lora = LoraConfig(r=3, lora_alpha=3, target_modules=["proj"])
    built.config = replace(built.config, offset="base")
    with pytest.raises(OptionError, match="packed"):
        built.run(model, [batch], lora)
    built.config = replace(built.config, offset="frozen_adapter")
    inputs = torch.randn(4, 2, 20, generator=torch.Generator().manual_seed(1))
    expected = model(inputs)
    tuned = lora_da_core.get_lora_da_model(model, lora, [batch], pipeline=built).eval()
    assert tuned.active_adapters == ["default", "lora_da_offset"]
    torch.testing.assert_close(tuned(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"pairing": "right_first", "scale": "auto"}, "no step to search"), ({"scale": "unit", "gamma": 2.0}, "gamma")],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        lora_da_core.LoraDAConfig(**changes)


def test_pairing_needs_twice_the_rank_and_no_allocator() -> None:
    with pytest.raises(OptionError, match=r"takes 2·12 of its directions"):
        pipeline("lora_ga").run(make_tiny_llama(), data(), config(r=12))
    built = lora_da_core.build_pipeline(preset="lora_ga", allocator="greedy")
    with pytest.raises(OptionError, match="do not go together"):
        built.run(make_tiny_llama(), data(), config())


def test_a_grid_runs_offsets_and_frozen_factors_alone_and_together(world: Path, tmp_path: Path) -> None:
    from lora_da_core.ablation.grid import make_grid
    from lora_da_core.ablation.runner import run_grid

    def curves(together: int) -> dict[tuple[str, str], list[float]]:
        content = {
            "run": {
                "model": str(world / "model"), "data": str(world / "data.jsonl"), "samples": 8, "reference": "none",
                "finetune": {
                    "steps": 3, "learning_rates": [1e-2], "eval_steps": [0, 3], "batch_size": 4, "held_out": 8,
                    "together": together,
                },
            },
            "grid": [
                {"rank": [2], "preset": ["lora_ga"], "offset": ["none", "frozen_adapter"]},
                {"rank": [2], "preset": ["lora_fa", "eva", "robust"]},
            ],
        }  # fmt: skip
        records = run_grid(make_grid(content), tmp_path / str(together))
        return {(each["preset"], each["offset"]): each["curves"][0]["losses"] for each in records}

    alone, joined = (curves(together) for together in (1, 8))
    for key, losses in alone.items():
        assert losses == pytest.approx(joined[key], abs=2e-5)
    plain, taken_out = alone["lora_ga", "none"], alone["lora_ga", "frozen_adapter"]
    frozen, eva, robust = (alone[preset, "none"] for preset in ("lora_fa", "eva", "robust"))
    # EVA's B is zero, so it starts at the base's own loss, as an offset does.
    assert taken_out[0] == pytest.approx(eva[0], abs=1e-5) and plain[0] != pytest.approx(eva[0], abs=1e-5)
    assert frozen[0] == robust[0] and frozen[-1] != robust[-1]


def test_a_failure_while_the_start_is_settled_leaves_the_model_as_found(
    monkeypatch: pytest.MonkeyPatch, model_unchanged: Any
) -> None:
    from lora_da_core.adapter import start as adapter_start

    def fail(*arguments: Any, **rest: Any) -> None:
        raise RuntimeError("no room")

    model = make_tiny_llama()
    model_unchanged(model)
    monkeypatch.setattr(adapter_start, "set_peft_model_state_dict", fail)
    with pytest.raises(RuntimeError, match="no room"):
        lora_da_core.get_lora_da_model(model, config(), data(), pipeline=pipeline("loi", offset="frozen_adapter"))
