"""Trainer-side plugins: contraction rates, invariance, balance, real trainers, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import OptionError, StorageError
from lora_da_core.registry import Registry
from lora_da_trainers._pairs import Pair, balanced
from lora_da_trainers.odelora import OdeLora, OdeLoraOptimizer, velocity
from lora_da_trainers.rac_lora import CHAIN_FILE, Chain, RacLora, RacLoraOptions
from lora_da_trainers.riemannion import Riemannion, RiemannionOptimizer
from lora_da_trainers.testing import trainer_checks

REGISTRY = Registry()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(a: Tensor, b: Tensor, scaling: float = 1.0) -> Pair:
    base = nn.Linear(a.shape[1], b.shape[0], bias=False, dtype=a.dtype)
    base.weight.data.zero_()
    return Pair(nn.Parameter(a.clone()), nn.Parameter(b.clone()), scaling, base)


def product(one: Pair) -> Tensor:
    return (one.base.weight + one.scaling * one.B @ one.A).detach()


def quadratic(one: Pair, target: Tensor) -> Callable[[], float]:
    """½‖W − W*‖² and its gradients."""

    def closure() -> float:
        one.A.grad = one.B.grad = None
        loss = 0.5 * (one.base.weight + one.scaling * one.B @ one.A - target).square().sum()
        loss.backward()
        return float(loss.detach())

    return closure


def near(target: Tensor, rank: int, distance: float) -> tuple[Tensor, Tensor]:
    """A and B of a matrix of that rank near the target."""
    moved = target + distance * random(*target.shape, seed=9) * target.norm() / target.numel() ** 0.5
    u, values, vh = torch.linalg.svd(moved)
    return values[:rank, None].sqrt() * vh[:rank], u[:, :rank] * values[:rank].sqrt()


def conditioned(condition: float, rank: int = 3) -> Tensor:
    u, v = (torch.linalg.qr(random(8, rank, seed=seed))[0] for seed in (1, 2))
    return (u * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)) @ v.mT


# ODELoRA


@pytest.mark.parametrize("condition", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize(("method", "rate"), [("euler", 0.7), ("rk2", 0.745), ("rk4", 0.7408)])
def test_the_error_shrinks_at_the_method_s_rate_whatever_the_condition(
    method: Any, rate: float, condition: float
) -> None:
    """1 − h, 1 − h + h²/2 and e^{−h} to fourth order, at h = 0.3; plain gradient descent's depends on the condition."""
    target = conditioned(condition)
    one = pair(*near(target, 3, 1e-5 / condition), scaling=2.0)
    one.B.data /= 2.0
    optimizer = OdeLoraOptimizer({"layer": one}, 0.3, method)
    errors = []
    for _ in range(8):
        errors.append(float((product(one) - target).norm()))
        optimizer.step(quadratic(one, target))
    # The part of the first error outside the tangent space is not there any more after a step.
    assert errors[-1] / errors[-2] == pytest.approx(rate, abs=2e-4)


@pytest.mark.parametrize(("condition", "low", "high"), [(1.0, 0.699, 0.701), (30.0, 0.96, 0.98), (1000.0, 0.99, 1.0)])
def test_gradient_descent_on_the_factors_slows_down_with_the_condition(
    condition: float, low: float, high: float
) -> None:
    """What the flow is to be compared to: the same problems, start and step length."""
    target = conditioned(condition)
    one = pair(*near(target, 3, 1e-5 / condition))
    optimizer = torch.optim.SGD([one.A, one.B], lr=0.3)
    errors = []
    for _ in range(12):
        errors.append(float((product(one) - target).norm()))
        quadratic(one, target)()
        optimizer.step()
    assert low < errors[-1] / errors[-2] < high


def test_the_flow_is_the_riemannian_gradient_and_stays_balanced() -> None:
    target = random(6, 5, seed=3)
    b, a = balanced(random(6, 2, seed=4), random(2, 5, seed=5))
    gradient = b @ a - target
    velocity_b, velocity_a = velocity(b, a, gradient @ a.mT, b.mT @ gradient)
    p_b, p_a = b @ torch.linalg.solve(b.mT @ b, b.mT), a.mT @ torch.linalg.solve(a @ a.mT, a)
    expected = -(gradient @ p_a + p_b @ gradient - p_b @ gradient @ p_a)
    torch.testing.assert_close(velocity_b @ a + b @ velocity_a, expected)
    drift = velocity_b.mT @ b + b.mT @ velocity_b - velocity_a @ a.mT - a @ velocity_a.mT
    assert float(drift.abs().max()) < 1e-12


def test_balance_drifts_with_the_method_s_order() -> None:
    """Over a fixed time, half the step leaves 1/2, 1/4 and 1/16 of the imbalance."""
    target = random(6, 5, seed=3)

    def drift(method: Any, steps: int) -> float:
        one = pair(random(2, 5, seed=5), random(6, 2, seed=4))
        optimizer = OdeLoraOptimizer({"layer": one}, 0.4 / steps, method)
        for _ in range(steps):
            optimizer.step(quadratic(one, target))
        return float((one.B.T @ one.B - one.A @ one.A.T).detach().norm())

    for method, order in (("euler", 1), ("rk2", 2), ("rk4", 4)):
        assert drift(method, 8) / drift(method, 16) == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("method", ["euler", "rk2", "rk4"])
def test_stages_without_a_closure_are_those_with_one(method: Any) -> None:
    target, ones = random(6, 5, seed=3), [pair(random(2, 5, seed=5), random(6, 2, seed=4), 3.0) for _ in range(2)]
    whole, staged = (OdeLoraOptimizer({"layer": one}, 0.1, method) for one in ones)
    for _ in range(3):
        whole.step(quadratic(ones[0], target))
        for _ in range({"euler": 1, "rk2": 2, "rk4": 4}[method]):
            quadratic(ones[1], target)()
            staged.step()
    assert torch.equal(product(ones[0]), product(ones[1]))


# Riemannion


def test_the_step_does_not_depend_on_the_gauge() -> None:
    target = random(7, 6, seed=3)
    a, b, q = random(3, 6, seed=4), random(7, 3, seed=5), random(3, 3, seed=6)
    ones = [pair(a, b, 1.5), pair(torch.linalg.solve(q, a), b @ q, 1.5)]
    optimizers = [RiemannionOptimizer({"layer": one}, 0.05, 0.9) for one in ones]
    for _ in range(5):
        torch.testing.assert_close(product(ones[0]), product(ones[1]), rtol=1e-9, atol=1e-10)
        for one, optimizer in zip(ones, optimizers, strict=True):
            quadratic(one, target)()
            optimizer.step()
    torch.testing.assert_close(ones[0].B.T @ ones[0].B, ones[0].A @ ones[0].A.T, rtol=1e-9, atol=1e-9)


def test_a_step_is_the_dense_formula() -> None:
    """M̃ = P_T(Ortho(P_T(G))) and the truncated SVD, by dense linear algebra; then momentum, once."""
    target, rank, rate, beta = random(7, 6, seed=3), 2, 0.1, 0.8
    one = pair(random(rank, 6, seed=4), random(7, rank, seed=5), 1.5)
    optimizer = RiemannionOptimizer({"layer": one}, rate, beta)
    x, moving = product(one), torch.zeros(7, 6, dtype=torch.float64)
    for _ in range(2):
        u, _, vh = torch.linalg.svd(x)
        left, right = u[:, :rank] @ u[:, :rank].mT, vh[:rank].mT @ vh[:rank]

        def project(g: Tensor, left: Tensor = left, right: Tensor = right) -> Tensor:
            return left @ g + g @ right - left @ g @ right

        moving = beta * project(moving) + project(x - target)
        um, _, vm = torch.linalg.svd(moving, full_matrices=False)
        step = project(um[:, : 2 * rank] @ vm[: 2 * rank])
        un, sn, vn = torch.linalg.svd(x - rate * step)
        x = (un[:, :rank] * sn[:rank]) @ vn[:rank]
        quadratic(one, target)()
        optimizer.step()
        torch.testing.assert_close(product(one), x, rtol=1e-9, atol=1e-10)


# RAC-LoRA


def chain_errors(links: int, *, fixed: bool, seed: int) -> list[float]:
    """Squared distances on ½‖W − W*‖², W (16, 16), rank 4, one exact step in each link."""
    target, one = random(16, 16, seed=100 + seed), pair(torch.zeros(4, 16).double(), torch.zeros(16, 4).double(), 2.0)
    chain = Chain({"layer": one}, RacLoraOptions(every=1, seed=seed))
    optimizer = torch.optim.SGD([one.A], lr=1 / one.scaling**2)
    errors = [float((product(one) - target).square().sum())]
    for link in range(links):
        if link == 0 or not fixed:
            chain.begin()
        else:
            chain.set(one, one.B.detach().clone())
        quadratic(one, target)()
        optimizer.step()
        chain.merge(optimizer)
        errors.append(float((one.base.weight.detach() - target).square().sum()))
    return errors


def test_a_link_leaves_1_minus_r_over_m_of_the_error() -> None:
    ratios = []
    for seed in range(40):
        errors = chain_errors(10, fixed=False, seed=seed)
        ratios.append((errors[-1] / errors[0]) ** 0.1)
    mean = sum(ratios) / len(ratios)
    assert mean == pytest.approx(0.75, abs=0.01), mean


def test_a_factor_that_stays_stops_at_that_share() -> None:
    errors = [chain_errors(6, fixed=True, seed=seed) for seed in range(20)]
    shares = [each[-1] / each[0] for each in errors]
    assert sum(shares) / len(shares) == pytest.approx(0.75, abs=0.03)
    assert all(each[1] == pytest.approx(each[-1], rel=1e-9) for each in errors)


# With real trainers

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def trainer_of(directory: Path, model: PeftModel, **rest: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=4, report_to=[], seed=0, disable_tqdm=True, use_cpu=True,
        **{"max_steps": 8, "learning_rate": 0.05, "save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.0,
           "lr_scheduler_type": "constant", **rest},
    )  # fmt: skip
    samples = make_samples(40, vocab=8)
    return Trainer(model, arguments, train_dataset=samples, data_collator=lambda rows: make_batches(rows, len(rows))[0])


def start(plugin: str) -> PeftModel:
    batches = make_batches(make_samples(16, vocab=8))
    if plugin == "rac_lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return get_peft_model(make_tiny_llama(), LoraConfig(**LORA))
    return lora_da_core.get_lora_da_model(
        make_tiny_llama(), LoraConfig(**LORA), batches, pipeline=lora_da_core.build_pipeline(preset="lora_one")
    )


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "odelora euler": ("odelora", {"method": "euler"}, {"learning_rate": 0.5}),
    "odelora rk4": ("odelora", {"method": "rk4", "lr": 0.5}, {}),
    "riemannion": ("riemannion", {}, {}),
    "rac_lora": ("rac_lora", {"every": 3}, {}),
    "rac_lora A": ("rac_lora", {"every": 3, "sampled": "A"}, {}),
    "rac_lora data": ("rac_lora", {"every": 3, "sampled": "A", "restart": "data", "samples": 12}, {}),
}


def attached(directory: Path, case: str, **rest: Any) -> tuple[Trainer, PeftModel]:
    name, options, settings = CASES[case]
    model = start(name)
    trainer = trainer_of(directory, model, **settings, **rest)
    REGISTRY.create("trainer", (name, options)).attach(trainer)
    return trainer, model


def logits(model: PeftModel) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**make_batches(make_samples(4, vocab=8))[0]).logits
    return found


@pytest.mark.parametrize("case", sorted(CASES))
def test_transformers_trainer_learns_with_it(case: str, tmp_path: Path) -> None:
    trainer, _ = attached(tmp_path, case, max_steps=12)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.03, losses


def same_bytes(one: PeftModel, other: PeftModel) -> bool:
    """Whether two models agree in every weight, those of the base included."""
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][k]) for k, value in states[0].items()
    )


@pytest.mark.parametrize("case", ["odelora euler", "rac_lora A"])
def test_a_run_that_is_resumed_ends_where_an_unbroken_one_does(case: str, tmp_path: Path) -> None:
    """Eight steps, against five and three; the fifth is amid a link. The kit below and runs that are killed do more."""
    unbroken, model = attached(tmp_path / "a", case)
    unbroken.train()
    broken, _ = attached(tmp_path / "b", case, save_strategy="steps", save_steps=5)
    broken.train()
    resumed, again = attached(tmp_path / "b", case)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    assert resumed.state.global_step == 8
    assert same_bytes(again, model)


def test_a_chain_s_links_are_in_the_base(tmp_path: Path) -> None:
    trainer, model = attached(tmp_path, "rac_lora", max_steps=6)
    before = make_tiny_llama().state_dict()
    trainer.train()
    after = model.get_base_model().state_dict()
    adapted = {name for name in before if any(part in name for part in LORA["target_modules"])}
    here = {name: name.replace("_proj.", "_proj.base_layer.") if name in adapted else name for name in before}
    assert {name for name in before if not torch.equal(before[name], after[here[name]])} == adapted
    assert len(adapted) == 6


def test_a_start_that_is_not_zero_is_the_chain_s_first_link(tmp_path: Path) -> None:
    """What a data-aware start has learnt goes into the base, and is there again when a run is resumed."""
    model, directory = start("odelora"), tmp_path / "run"
    before = logits(model)
    trainer = trainer_of(directory, model, max_steps=2, learning_rate=1e-12, save_strategy="steps", save_steps=1)
    REGISTRY.create("trainer", ("rac_lora", {})).attach(trainer)
    trainer.train()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    again = start("odelora")
    resumed = trainer_of(directory, again, max_steps=2, learning_rate=1e-12)
    REGISTRY.create("trainer", ("rac_lora", {})).attach(resumed)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-1"))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_its_links_or_with_others_is_refused(tmp_path: Path) -> None:
    broken, _ = attached(tmp_path, "rac_lora", save_strategy="steps", save_steps=5)
    broken.train()
    path = tmp_path / "checkpoint-5" / CHAIN_FILE
    links = load_file(path)
    assert not list(path.parent.glob(".*"))
    other = {key.replace("layers.1", "layers.7"): value for key, value in links.items()}
    spoilt: list[tuple[Callable[[], object], str]] = [
        (lambda: save_file(other, path), "other layers"),
        (lambda: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
        (path.unlink, "does not exist"),
    ]
    for spoil, message in spoilt:
        spoil()
        resumed, _ = attached(tmp_path, "rac_lora")
        with pytest.raises(StorageError, match=message):
            resumed.train(resume_from_checkpoint=str(path.parent))


def test_a_restart_from_data_on_several_processes_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, start("rac_lora"))
    several = SimpleNamespace(args=SimpleNamespace(world_size=2), model=trainer.model)
    with pytest.raises(OptionError, match="each of 2 processes"):
        REGISTRY.create("trainer", ("rac_lora", {"sampled": "A", "restart": "data"})).attach(several)
    REGISTRY.create("trainer", ("rac_lora", {"sampled": "A", "restart": "data"})).attach(trainer)


@pytest.mark.parametrize("name", ["odelora", "riemannion"])
def test_a_start_of_b_zero_is_refused(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, start("rac_lora"))
    with pytest.raises(OptionError, match="full rank"):
        REGISTRY.create("trainer", name).attach(trainer)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("odelora", {"method": "rk3"}), ("odelora", {"lr": 0.0}), ("riemannion", {"momentum": 1.0}),
        ("rac_lora", {"every": 0}), ("rac_lora", {"sampled": "C"}), ("rac_lora", {"restart": "data"}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{name!r}"):
        REGISTRY.create("trainer", (name, options))


# The conformance kit, and mutants it must reject

KIT: dict[str, tuple[Any, dict[str, Any], float]] = {
    "odelora": (OdeLora, {"method": "rk2"}, 0.1),
    "riemannion": (Riemannion, {}, 0.02),
    "rac_lora": (RacLora, {"every": 3}, 0.05),
    "rac_lora data": (RacLora, {"every": 3, "sampled": "A", "restart": "data", "samples": 16}, 0.05),
}


def kit() -> Iterator[Any]:
    for case, (cls, options, rate) in KIT.items():
        for name, check in trainer_checks(cls, options=options, learning_rate=rate):
            yield pytest.param(check, id=f"{case} {name}")


@pytest.mark.parametrize("check", list(kit()))
def test_contract(check: Callable[[], None]) -> None:
    check()


class Nameless(Riemannion):
    """A plugin that claims a version of the contracts that there is not."""

    api_version = 99


class Hasty(OdeLora):
    """A plugin that zeroes the adapter when it is attached."""

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(0.9)


class Seeding(Riemannion):
    """A plugin that draws from the process's generator."""

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        torch.rand(1)


class Upwards(Riemannion):
    """A plugin that climbs."""

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        for group in trainer.optimizer.param_groups:
            group["lr"] = -group["lr"]


class Secretive(RacLora):
    """A plugin that writes to the base and does not say so."""

    @property
    def changes_base(self) -> bool:
        return False


class Greedy(RacLora):
    """A plugin that trains the base, too."""

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        trainer.model.base_model.model.lm_head.weight.requires_grad_(True)


class Noisy(RacLora):
    """A plugin whose draws differ from run to run."""

    runs = 0

    def attach(self, trainer: Any) -> None:
        type(self).runs += 1
        type(self)(RacLoraOptions(every=3, seed=self.runs)).attach_plain(trainer)

    def attach_plain(self, trainer: Any) -> None:
        super().attach(trainer)


class Forgetful(Riemannion):
    """A plugin whose optimizer does not take its momentum from a checkpoint."""

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        trainer.optimizer.load_state_dict = lambda state: None


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (Nameless, "declares_itself"),
        (Hasty, "attaching_changes_nothing_yet"),
        (Seeding, "attaching_changes_nothing_yet"),
        (Upwards, "training_learns"),
        (Secretive, "the_base_changes_only_where_that_is_said"),
        (Greedy, "the_base_changes_only_where_that_is_said"),
        (Greedy, "nothing_else_is_trained"),
        (Noisy, "two_runs_agree"),
        (Forgetful, "a_resumed_run_ends_where_an_unbroken_one_does"),
    ],
)
def test_the_kit_rejects_a_mutant(mutant: Any, check: str) -> None:
    options = {"every": 3} if issubclass(mutant, RacLora) else {}
    with pytest.raises(AssertionError):
        dict(trainer_checks(mutant, options=options, learning_rate=0.02))[check]()
