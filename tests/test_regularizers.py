"""The Laplace penalty: closed forms, what it protects, and real trainers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, OptionError
from lora_da_core.interfaces import LayerFisher
from lora_da_core.operators import Diagonal, SymmetricOperator
from lora_da_core.registry import Registry
from lora_da_core.regularization import Penalty
from lora_da_core.testing import regularizer_checks
from lora_da_core.types import LoraFactors

REGISTRY = Registry()
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


class Given(LayerFisher):
    """A diagonal Fisher, or one of two factors, on (out, in) matrices."""

    def __init__(self, entries: Tensor | None = None, y: Tensor | None = None, z: Tensor | None = None) -> None:
        self.entries, self.y, self.z = entries, y, z

    def apply(self, weights: Tensor) -> Tensor:
        if self.entries is not None:
            return self.entries * weights.double()
        assert self.y is not None and self.z is not None
        return self.y @ weights.double() @ self.z

    def solve(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError

    def inverse_input_trace(self) -> SymmetricOperator:
        return Diagonal(torch.ones(1))


def penalty(a: Tensor, b: Tensor, fisher: LayerFisher, strength: float, scaling: float = 1.0) -> tuple[Penalty, Any]:
    pair = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    made = REGISTRY.create("regularizer", ("laplace", {"strength": strength}))
    start = {"layer": LoraFactors(a, b)}
    return Penalty(made, {"layer": pair}, start, {"layer": scaling}, {"layer": fisher}), pair


@pytest.mark.parametrize("strength", [0.0, 0.5, 10.0])
def test_a_quadratic_target_is_met_where_the_closed_form_says(strength: float) -> None:
    """½‖θ − t‖² + (λ/2) Σ F_i θ_i² is least at θ_i = t_i/(1 + λF_i), here with B = θ and A the identity."""
    draw = torch.Generator().manual_seed(0)
    f, target = torch.rand(5, 4, generator=draw).double() * 3, torch.randn(5, 4, generator=draw).double()
    term, (a, b) = penalty(torch.eye(4).double(), torch.zeros(5, 4).double(), Given(f), strength)
    a.requires_grad_(False)
    optimizer = torch.optim.LBFGS(
        [b], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-14
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (b - target).square().sum() + term()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(b.detach(), target / (1 + strength * f), rtol=1e-5, atol=1e-6)


def test_two_factors_give_the_blocks_of_the_chain_rule() -> None:
    """F_A = s²(B0ᵀYB0) ⊗ Z and F_B = s²Y ⊗ (A0ZA0ᵀ), dense; gradients by finite differences."""
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    a0, b0, s = random(2, 4), random(5, 2), 1.7
    y, z = (m @ m.mT for m in (random(5, 5), random(4, 4)))
    term, (a, b) = penalty(a0, b0, Given(y=y, z=z), 0.8, s)
    with torch.no_grad():
        a += random(2, 4)
        b += random(5, 2)
    da, db = (a - a0).detach().flatten(), (b - b0).detach().flatten()
    fa = s**2 * torch.kron(b0.mT @ y @ b0, z)
    fb = s**2 * torch.kron(y, a0 @ z @ a0.mT)
    assert float(term().detach()) == pytest.approx(0.4 * float(da @ fa @ da + db @ fb @ db), rel=1e-12)
    term.add_gradients()
    torch.testing.assert_close(a.grad, 0.8 * (fa @ da).view(2, 4))
    torch.testing.assert_close(b.grad, 0.8 * (fb @ db).view(5, 2))
    before = a.grad.clone()
    term.add_gradients()
    torch.testing.assert_close(a.grad, 2 * before)


def test_b_of_zero_leaves_a_free_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    batches = make_batches(make_samples())
    with torch.random.fork_rng(devices=[]):
        plain = get_peft_model(make_tiny_llama(), LoraConfig(**LORA))
    with caplog.at_level(logging.WARNING):
        term = lora_da_core.penalty_of(plain, "laplace", batches)
    assert "A is not protected" in caplog.text and "6 layers" in caplog.text
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_A" in name:
                parameter.add_(1.0)
    assert float(term().detach()) == 0
    caplog.clear()
    started = lora_da_core.get_lora_da_model(make_tiny_llama(), LoraConfig(**LORA), batches)
    with caplog.at_level(logging.WARNING):
        assert lora_da_core.penalty_of(started, "laplace", batches).doubts == ()
    assert "protected" not in caplog.text


def loss_on(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    model.eval()
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches) / len(batches)


@pytest.fixture(scope="module")
def taught() -> dict[str, Tensor]:
    """A tiny model that has learnt its first task: sequences that count up."""
    model = make_tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        for batch in task(1):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return model.state_dict()


def task(step: int) -> list[dict[str, Tensor]]:
    starts = torch.arange(24) * 5 % 61
    ids = (starts[:, None] + step * torch.arange(10)) % 61
    mask = torch.ones_like(ids)
    return [
        {"input_ids": ids[i : i + 8], "attention_mask": mask[i : i + 8], "labels": ids[i : i + 8].clone()}
        for i in range(0, 24, 8)
    ]


@pytest.mark.parametrize("estimator", ["diagonal", "kfac"])
def test_forgetting_falls_as_the_penalty_grows(estimator: str, taught: dict[str, Tensor]) -> None:
    """Count up, then count down: the loss on the first task after the second, over two seeds.

    The strengths and the start's size were chosen on these two tasks, so this shows the mechanism; what it is worth on
    real ones is for `benchmarks/forgetting.py` to say, whose settings were fixed before anything was trained.
    """
    source, target = task(1), task(-1)
    fresh = make_tiny_llama()
    fresh.load_state_dict(taught)
    before = loss_on(fresh, target)
    forgotten: dict[float, list[float]] = {}
    learnt: dict[float, list[float]] = {}
    for seed in (0, 1):
        for strength in (0.0, 1e5, 1e6):
            model = make_tiny_llama()
            model.load_state_dict(taught)
            # A start near the base, so that what is forgotten is forgotten in training.
            small = LoraDAConfig(seed=seed, samples=12 + 8 * seed, scale="product", gamma=10.0, balance="norm")
            pipeline = lora_da_core.build_pipeline(config=small)
            wrapped = lora_da_core.get_lora_da_model(model, LoraConfig(**LORA), target, pipeline=pipeline)
            fisher = lora_da_core.build_pipeline(estimator)
            term = lora_da_core.penalty_of(wrapped, ("laplace", {"strength": strength}), source, pipeline=fisher)
            optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
            wrapped.train()
            for step in range(24):
                optimizer.zero_grad()
                (wrapped(**target[step % len(target)]).loss + term()).backward()
                optimizer.step()
            forgotten.setdefault(strength, []).append(loss_on(wrapped, source))
            learnt.setdefault(strength, []).append(loss_on(wrapped, target))
    means = [sum(values) / len(values) for _, values in sorted(forgotten.items())]
    assert means == sorted(means, reverse=True), means
    assert means[0] - means[-1] > 0.2, means
    assert all(value < before - 1 for values in learnt.values() for value in values)


# The conformance kit, and mutants it must reject


@pytest.mark.parametrize(
    "check", [pytest.param(run, id=n) for n, run in regularizer_checks(REGISTRY.resolve("regularizer", "laplace"))]
)
def test_contract(check: Any) -> None:
    check()


class Offset(REGISTRY.resolve("regularizer", "laplace")):  # type: ignore[misc]
    """A penalty that is not 0 at the start."""

    def penalty(self, *arguments: Any) -> Tensor:
        return super().penalty(*arguments) + 1.0  # type: ignore[no-any-return]


class Cut(REGISTRY.resolve("regularizer", "laplace")):  # type: ignore[misc]
    """A penalty whose gradient is half of what it should be."""

    def penalty(self, *arguments: Any) -> Tensor:
        found = super().penalty(*arguments)
        return 0.5 * found + 0.5 * found.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("mutant", "check"), [(Offset, "nothing_is_asked_at_the_start"), (Cut, "gradients_are_those_of_the_penalty")]
)
def test_the_kit_rejects_a_mutant(mutant: Any, check: str) -> None:
    with pytest.raises(AssertionError):
        dict(regularizer_checks(mutant))[check]()


# Trainers


def arguments(directory: Path, **rest: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory), "max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": [], "seed": 0, "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant", "optim": "sgd", "weight_decay": 0.0, **rest,
    }  # fmt: skip


def started() -> PeftModel:
    return lora_da_core.get_lora_da_model(make_tiny_llama(), LoraConfig(**LORA), make_batches(make_samples()))


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return make_batches(rows, len(rows))[0]


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_transformers_trainer_steps_along_loss_and_penalty(tmp_path: Path) -> None:
    """Plain gradient descent: the second step differs from that without a penalty by rate times its gradient."""
    after = {}
    for strength in (0.0, 5.0):
        model = started()
        term = lora_da_core.penalty_of(model, ("laplace", {"strength": strength}), make_batches(make_samples(6)))
        trainer = Trainer(
            model, TrainingArguments(**arguments(tmp_path)), train_dataset=make_samples(24), data_collator=collate
        )
        seen: list[dict[str, Tensor]] = []
        step = term.add_gradients

        def spy(model: nn.Module = model, seen: list[Any] = seen, step: Any = step) -> float:
            before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            value = float(step())
            seen.append({n: p.grad - before[n] for n, p in model.named_parameters() if p.grad is not None})
            return value

        term.add_gradients = spy  # type: ignore[method-assign]
        lora_da_core.regularize_training(trainer, term)
        trainer.train()
        assert len(seen) == 2
        after[strength] = factors(model), seen
    moved, added = after[5.0]
    without, nothing = after[0.0]
    assert all(not value.any() for part in nothing for value in part.values())
    assert all(not value.any() for value in added[0].values())  # at the start the penalty is flat
    for name, value in moved.items():
        torch.testing.assert_close(value, without[name] - 1e-2 * added[1][name], rtol=1e-4, atol=1e-7)
    assert any(value.any() for value in added[1].values())


def test_trls_trainer_takes_it(tmp_path: Path, world: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = started()
    term = lora_da_core.penalty_of(model, ("laplace", {"strength": 1e6}), make_batches(make_samples(6)))
    free = started()
    rows = [{"input_ids": row["input_ids"].tolist()} for row in make_samples(24)]
    moved = []
    for each in (model, free):
        before = factors(each)
        settings = SFTConfig(**arguments(tmp_path, optim="adamw_torch", max_steps=4))
        tokenizer = AutoTokenizer.from_pretrained(world / "model")
        trainer = SFTTrainer(each, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        if each is model:
            lora_da_core.regularize_training(trainer, term)
        trainer.train()
        moved.append(sum(float((value - before[name]).abs().sum()) for name, value in factors(each).items()))
    assert moved[0] < 0.9 * moved[1]


def test_a_penalty_goes_on_from_where_it_began(tmp_path: Path) -> None:
    model, batches = started(), make_batches(make_samples(6))
    first = lora_da_core.penalty_of(model, "laplace", batches, cache_dir=tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    again = lora_da_core.penalty_of(model, "laplace", batches, cache_dir=tmp_path, start=first.start_state_dict())
    assert float(again().detach()) == float(first().detach()) > 0
    assert float(lora_da_core.penalty_of(model, "laplace", batches)().detach()) == 0
    with pytest.raises(OptionError, match="other layers"):
        lora_da_core.penalty_of(model, "laplace", batches, start={})


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="strength"):
        REGISTRY.create("regularizer", ("laplace", {"strength": -1.0}))
    trainer = type("T", (), {"args": type("A", (), {"fp16": True})()})()
    with pytest.raises(OptionError, match="fp16"):
        lora_da_core.regularize_training(trainer, penalty(torch.eye(2), torch.eye(2), Given(torch.ones(2, 2)), 1.0)[0])
