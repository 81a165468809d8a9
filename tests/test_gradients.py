"""Gradient estimators against the full gradient: sketches of it, and finite differences of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig
from lora_da_core.adapter import resolve_targets
from lora_da_core.capture import CaptureTask
from lora_da_core.interfaces import Accumulator, GradientEstimator, LossProbe, NoOptions
from lora_da_core.operators import LinearMap, LowRankMap
from lora_da_core.probe import LowRankProbe
from lora_da_core.testing import gradient_checks
from lora_da_core.types import LayerSpec
from lora_da_gradients._directions import direction
from lora_da_gradients.full import Full
from lora_da_gradients.sketched import CHECK_ROWS, SketchedGradient, SketchedGradientOptions
from lora_da_gradients.zeroth_order import ZerothOrder, ZerothOrderOptions

CPU = torch.device("cpu")


def layer(out_features: int, in_features: int, name: str = "model.layer") -> LayerSpec:
    return LayerSpec(name, "linear", in_features, out_features, rank=2, scaling=1.0)


def tokens_of(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens whose Σ g xᵀ is `gradient`: as many as it has singular values, of one sample."""
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    return right, (left * values).mT.contiguous(), torch.zeros(len(values), dtype=torch.int64)


def matrix(out_features: int, in_features: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (out_features, in_features)
    )
    return (left * values) @ right.mT


def accumulated(estimator: GradientEstimator[Any], gradient: Tensor, dtype: torch.dtype = torch.float64) -> Accumulator:
    found = estimator.accumulator(layer(*gradient.shape), device=CPU, dtype=dtype)
    found.update(*tokens_of(gradient))
    return found


def sketch(size: int, seed: int = 0) -> SketchedGradient:
    return SketchedGradient(SketchedGradientOptions(size=size, seed=seed))


class TestSketched:
    @pytest.mark.parametrize("shape", [(17, 11), (11, 17), (9, 9)])
    @pytest.mark.parametrize("rank", [1, 4])
    def test_a_gradient_of_low_rank_is_exact(self, shape: tuple[int, int], rank: int) -> None:
        gradient = matrix(*shape, torch.logspace(0, -3, rank, dtype=torch.float64))
        estimator, spec = sketch(4), layer(*shape)
        statistics = accumulated(estimator, gradient).statistics()
        found = estimator.gradient(statistics, spec, samples=2)
        assert isinstance(found, LowRankMap) and found.left.shape == (shape[0], 4)
        torch.testing.assert_close(found.to_dense(), gradient / 2, rtol=0, atol=1e-12)
        assert estimator.diagnostics(statistics, spec, samples=2)["relative_error"] < 1e-12

    def test_a_size_beyond_the_layer_is_exact_for_any_gradient(self) -> None:
        gradient = matrix(7, 5, torch.ones(5, dtype=torch.float64))
        found = sketch(64).gradient(accumulated(sketch(64), gradient).statistics(), layer(7, 5), samples=1)
        torch.testing.assert_close(found.to_dense(), gradient, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
    def test_the_mean_squared_error_keeps_the_bound(self, decay: float) -> None:
        """Theorem 4.3 of Tropp et al. 2017 bounds the expectation; the best rank bounds every error from below."""
        size, seeds = 8, 60
        values = torch.arange(1, 31, dtype=torch.float64) ** -decay
        gradient, spec = matrix(40, 30, values), layer(40, 30)
        tails = values.square().flip(0).cumsum(0).flip(0)
        cuts = range(size - 1)
        rows = 2 * size + 1
        bound = (1 + size / (rows - size - 1)) * min((1 + cut / (size - cut - 1)) * float(tails[cut]) for cut in cuts)
        errors, estimates = [], []
        for seed in range(seeds):
            estimator = sketch(size, seed)
            statistics = accumulated(estimator, gradient).statistics()
            found = estimator.gradient(statistics, spec, samples=1)
            errors.append(float((found.to_dense() - gradient).square().sum()))
            estimates.append(estimator.diagnostics(statistics, spec, samples=1)["error"] ** 2)
        squared, estimated = torch.tensor(errors), torch.tensor(estimates)
        assert float(tails[size]) * (1 - 1e-9) <= min(errors)
        assert float(squared.mean()) < bound
        # Unbiased, so over many seeds the estimates' mean is the errors' mean: within four standard errors.
        spread = float((estimated - squared).std()) / seeds**0.5
        assert abs(float((estimated - squared).mean())) < 4 * spread
        assert float((estimated / squared).min()) > 0.3 and float((estimated / squared).max()) < 3

    def test_the_estimated_norm_is_the_gradient_s(self) -> None:
        gradient = matrix(30, 20, torch.ones(20, dtype=torch.float64))
        statistics = accumulated(sketch(4), gradient).statistics()
        found = sketch(4).diagnostics(statistics, layer(30, 20), samples=1)
        assert found["norm"] == pytest.approx(20**0.5, rel=0.3)
        assert found["relative_error"] == pytest.approx(found["error"] / found["norm"])

    def test_shards_that_are_added_are_the_whole(self) -> None:
        gradient = matrix(12, 9, torch.ones(9, dtype=torch.float64))
        inputs, grads, example = tokens_of(gradient)
        whole, first, second = (sketch(3).accumulator(layer(12, 9), device=CPU, dtype=torch.float64) for _ in range(3))
        whole.update(inputs, grads, example)
        first.update(inputs[:4], grads[:4], example[:4])
        second.update(inputs[4:], grads[4:], example[4:])
        first.merge(second.statistics())
        for key, value in whole.statistics().items():
            torch.testing.assert_close(first.statistics()[key], value, rtol=1e-12, atol=1e-14)

    def test_layers_and_seeds_have_matrices_of_their_own(self) -> None:
        gradient = matrix(12, 9, torch.ones(9, dtype=torch.float64))
        inputs, grads, example = tokens_of(gradient)
        found = []
        for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
            accumulator = sketch(3, seed).accumulator(layer(12, 9, name), device=CPU, dtype=torch.float64)
            accumulator.update(inputs, grads, example)
            found.append(accumulator.statistics()["range"])
        assert torch.equal(found[0], found[1])
        assert not torch.allclose(found[0], found[2]) and not torch.allclose(found[0], found[3])

    @pytest.mark.parametrize("shape", [(60, 40), (40, 60), (5, 60)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_bytes_are_what_is_held(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        spec = layer(*shape)
        accumulator = sketch(6).accumulator(spec, device=CPU, dtype=dtype)
        held = [*accumulator.statistics().values(), accumulator.left, accumulator.right]
        stated = sketch(6).statistics_bytes(spec, itemsize=dtype.itemsize)
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) == stated
        assert stated == sum(shape) * (3 * min(6, *shape) + 1 + CHECK_ROWS) * dtype.itemsize

    def test_a_zero_gradient_stays_zero(self) -> None:
        estimator = sketch(3)
        statistics = estimator.accumulator(layer(6, 5), device=CPU, dtype=torch.float32).statistics()
        assert float(estimator.gradient(statistics, layer(6, 5), samples=3).to_dense().abs().max()) == 0.0
        assert estimator.diagnostics(statistics, layer(6, 5), samples=3)["relative_error"] == 0.0

    def test_the_pipeline_gives_the_full_gradient_s_adapter_where_the_rank_suffices(self) -> None:
        model, batches = make_tiny_llama(torch.float64, num_hidden_layers=1), make_batches(make_samples())
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        config = LoraDAConfig(scale="fixed")
        found = {
            gradient: lora_da_core.build_pipeline("kfac", "eigh", (gradient, options), config=config)
            .run(model, batches, lora)
            .factors
            for gradient, options in (("full", {}), ("sketched", {"size": 32}))
        }
        for name, expected in found["full"].items():
            product = found["sketched"][name].B @ found["sketched"][name].A
            torch.testing.assert_close(product, expected.B @ expected.A, rtol=1e-7, atol=1e-10)

    @pytest.mark.parametrize(("options", "message"), [({"size": 0}, "size is 0"), ({"seed": -1}, "seed is -1")])
    def test_options_out_of_range_are_refused(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(lora_da_core.OptionError, match=message):
            lora_da_core.build_pipeline(gradient=("sketched", options))

    def test_missing_output_gradients_are_refused(self) -> None:
        accumulator = sketch(2).accumulator(layer(3, 3), device=CPU, dtype=torch.float32)
        with pytest.raises(TypeError, match="needs output gradients"):
            accumulator.update(torch.ones(1, 3), None, torch.zeros(1, dtype=torch.int64))


class Polynomial(LossProbe):
    """Per-sample losses ⟨G, W⟩ + curvature·⟨H, W∘W⟩/2 + cubic·Σ W³/6 at W = 0, one layer, two equal samples."""

    def __init__(self, gradient: Tensor, hessian: Tensor | None = None, cubic: float = 0.0) -> None:
        self.gradient = gradient
        self.hessian = torch.zeros_like(gradient) if hessian is None else hessian
        self.cubic = cubic
        self.calls = 0

    def losses(self, changes: Mapping[str, LinearMap]) -> Tensor:
        self.calls += 1
        weight = sum((change.to_dense() for change in changes.values()), torch.zeros_like(self.gradient))
        loss = (self.gradient * weight).sum() + 0.5 * (self.hessian * weight.square()).sum()
        loss = loss + self.cubic * weight.pow(3).sum() / 6 + 1.0
        return torch.stack([loss, loss])

    def place(self, layer: str) -> tuple[torch.device, torch.dtype]:
        return CPU, self.gradient.dtype


def zeroth(**options: Any) -> ZerothOrder:
    return ZerothOrder(ZerothOrderOptions(**options))


def estimates(estimator: ZerothOrder, probe: Polynomial, count: int) -> tuple[Tensor, list[dict[str, float]]]:
    """G and diagnostics of independent runs."""
    spec = layer(*probe.gradient.shape)
    gradients, reports = [], []
    for seed in range(count):
        statistics = estimator.estimate(probe, [spec], generator=torch.Generator().manual_seed(seed))[spec.name]
        gradients.append(estimator.gradient(statistics, spec, samples=2).to_dense())
        reports.append(estimator.diagnostics(statistics, spec, samples=2))
    return torch.stack(gradients), reports


def scatter(gradients: Tensor) -> float:
    """E‖g − E g‖² over the first dimension."""
    return float((gradients - gradients.mean(0)).square().sum() / (len(gradients) - 1))


GRADIENT = matrix(4, 5, torch.tensor([1.0, 0.5], dtype=torch.float64), seed=2)


class TestDirections:
    @pytest.mark.parametrize("rank", [None, 1, 3, 9])
    def test_length_and_second_moment(self, rank: int | None) -> None:
        generator = torch.Generator().manual_seed(0)
        made = [direction(layer(3, 4), rank, generator, device=CPU, dtype=torch.float64) for _ in range(20000)]
        drawn = torch.stack([one.to_dense().flatten() for one in made])
        torch.testing.assert_close(
            drawn.square().sum(1), torch.full((20000,), 12.0, dtype=torch.float64), rtol=1e-6, atol=0
        )
        moment = drawn.mT @ drawn / len(drawn)
        # An entry's standard error is at most √(E u⁴/20000) < 0.02 for every rank here.
        assert float((moment - torch.eye(12, dtype=torch.float64)).abs().max()) < 0.08
        assert float(drawn.mean(0).abs().max()) < 0.04
        ranks = torch.linalg.matrix_rank(drawn[:5].view(5, 3, 4))
        assert set(ranks.tolist()) == {min(rank or 3, 3)}


class TestZerothOrder:
    @pytest.mark.parametrize("rank", [None, 1, 2])
    @pytest.mark.parametrize("difference", ["central", "forward"])
    def test_a_quadratic_loss_leaves_no_bias(self, rank: int | None, difference: str) -> None:
        generator = torch.Generator().manual_seed(1)
        hessian = torch.rand(4, 5, generator=generator, dtype=torch.float64)
        probe = Polynomial(GRADIENT, hessian)
        estimator = zeroth(steps=40, probes=1, mu=0.1, difference=difference, rank=rank)
        found, _ = estimates(estimator, probe, 100)
        error = float((found.mean(0) - GRADIENT).norm())
        assert error < 2 * (scatter(found) / 100) ** 0.5
        assert error < 0.3 * float(GRADIENT.norm())

    def test_the_bias_of_central_differences_falls_with_the_square_of_mu(self) -> None:
        """The same directions at every mu: what changes is the bias, (μ²/6)·D³f(u,u,u)·u, and nothing else."""
        biases = []
        straight, _ = estimates(zeroth(steps=8, probes=1, mu=1e-3), Polynomial(GRADIENT), 1)
        for mu in (0.05, 0.1, 0.2):
            found, _ = estimates(zeroth(steps=8, probes=1, mu=mu), Polynomial(GRADIENT, cubic=1.0), 1)
            biases.append(float((found - straight).norm()))
        assert biases[1] / biases[0] == pytest.approx(4.0, rel=1e-6)
        assert biases[2] / biases[1] == pytest.approx(4.0, rel=1e-6)

    def test_it_is_the_unit_sphere_s_estimator_times_the_number_of_weights(self) -> None:
        probe, spec = Polynomial(GRADIENT, torch.ones_like(GRADIENT)), layer(4, 5)
        estimator = zeroth(steps=1, probes=1, mu=1e-2, difference="forward", rank=None)
        found = estimator.gradient(
            estimator.estimate(probe, [spec], generator=torch.Generator().manual_seed(0))[spec.name], spec, samples=2
        ).to_dense()
        size, step = 20, 1e-2 * 20**0.5
        # The direction shows in the result up to its sign; one of the two must give back the result itself.
        candidates = []
        for unit in (found / found.norm(), -found / found.norm()):
            rise = step * float((GRADIENT * unit).sum()) + 0.5 * step**2
            candidates.append(size * rise / step * unit)
        assert min(float((found - candidate).norm()) for candidate in candidates) < 1e-6 * float(found.norm())

    @pytest.mark.parametrize(("beta1", "steps", "probes"), [(0.9, 60, 1), (0.5, 20, 2), (0.0, 5, 1), (1.0, 30, 2)])
    def test_variance_of_the_first_moment(self, beta1: float, steps: int, probes: int) -> None:
        """Var(m)/Var(g) = (1 − β1)/(1 + β1) once β1 to the steps is gone, 1/steps at β1 = 1; and it is reported."""
        runs = 300
        single, _ = estimates(zeroth(steps=1, probes=1), Polynomial(GRADIENT), runs)
        moment, reports = estimates(zeroth(steps=steps, probes=probes, beta1=beta1), Polynomial(GRADIENT), runs)
        expected = (1 / steps if beta1 == 1 else (1 - beta1) / (1 + beta1)) / probes
        assert scatter(moment) / scatter(single) == pytest.approx(expected, rel=0.2)
        assert scatter(single) == pytest.approx(19 * float(GRADIENT.square().sum()), rel=0.2)
        if beta1 > 0:
            stated = sum(report["variance"] for report in reports) / runs
            assert stated == pytest.approx(scatter(moment), rel=0.2)
            stated = sum(report["probe_variance"] for report in reports) / runs
            assert stated == pytest.approx(scatter(single), rel=0.2)
        else:
            assert all(report["variance"] != report["variance"] for report in reports)

    def test_the_first_moment_is_r_adazo_s_with_its_start_corrected(self) -> None:
        spec, beta1, steps = layer(4, 5), 0.8, 6
        estimator = zeroth(steps=steps, probes=1, beta1=beta1, rank=None)
        probe = Polynomial(GRADIENT)
        moment = torch.zeros_like(GRADIENT)
        # Single estimates one by one, from the same directions: all weight on the last of the first k steps.
        for count in range(1, steps + 1):
            last = zeroth(steps=count, probes=1, beta1=0.0, rank=None)
            statistics = last.estimate(probe, [spec], generator=torch.Generator().manual_seed(7))[spec.name]
            moment = beta1 * moment + (1 - beta1) * last.gradient(statistics, spec, samples=2).to_dense()
        statistics = estimator.estimate(probe, [spec], generator=torch.Generator().manual_seed(7))[spec.name]
        found = estimator.gradient(statistics, spec, samples=2).to_dense()
        torch.testing.assert_close(found, moment / (1 - beta1**steps), rtol=1e-9, atol=1e-12)

    def test_forward_passes_are_counted(self) -> None:
        for difference, expected in (("central", 24), ("forward", 13)):
            probe = Polynomial(GRADIENT)
            estimates(zeroth(steps=4, probes=3, difference=difference), probe, 1)
            assert probe.calls == expected

    def test_shards_with_one_generator_add(self) -> None:
        spec, estimator = layer(4, 5), zeroth(steps=3, probes=2)
        parts = [matrix(4, 5, torch.ones(4, dtype=torch.float64), seed) for seed in (0, 1)]

        def sums(gradient: Tensor) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(3)
            return estimator.estimate(Polynomial(gradient), [spec], generator=generator)[spec.name]

        first, second, both = sums(parts[0]), sums(parts[1]), sums(parts[0] + parts[1])
        for key, value in both.items():
            torch.testing.assert_close(first[key] + second[key], value, rtol=1e-9, atol=1e-12)

    def test_bytes_are_what_is_held(self) -> None:
        estimator, spec = zeroth(steps=3, probes=2), layer(4, 5)
        for dtype in (torch.float32, torch.float64):
            probe = Polynomial(GRADIENT.to(dtype))
            statistics = estimator.estimate(probe, [spec], generator=torch.Generator())[spec.name]
            held = sum(tensor.nbytes for tensor in statistics.values())
            assert estimator.statistics_bytes(spec, itemsize=dtype.itemsize) == held

    def test_a_loss_that_is_not_finite_is_refused(self) -> None:
        with pytest.raises(lora_da_core.ModelError, match="give a smaller mu"):
            estimates(zeroth(), Polynomial(GRADIENT * float("inf")), 1)

    def test_there_is_no_accumulator(self) -> None:
        with pytest.raises(TypeError, match=r"takes no tokens of model\.layer; call estimate"):
            zeroth().accumulator(layer(2, 2), device=CPU, dtype=torch.float32)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": 0}, "steps is 0"),
            ({"probes": 0}, "probes is 0"),
            ({"beta1": 1.5}, "beta1 is 1.5"),
            ({"mu": 0.0}, "mu is 0.0"),
            ({"rank": 0}, "rank is 0"),
            ({"difference": "backward"}, "choose one of central, forward"),
            ({"layers": "one"}, "choose one of together, in_turn"),
        ],
    )
    def test_options_out_of_range_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(lora_da_core.OptionError, match=message):
            lora_da_core.build_pipeline(gradient=("zeroth_order", options))


SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 13,
}


@pytest.fixture
def no_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever differentiates, or runs a module while a graph is being recorded, fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a backward pass was asked for")

    for owner, name in ((torch.autograd, "backward"), (torch.autograd, "grad"), (Tensor, "backward")):
        monkeypatch.setattr(owner, name, refuse)

    def look(module: nn.Module, args: Any) -> None:
        assert not torch.is_grad_enabled(), f"{type(module).__name__} ran with gradients enabled"

    monkeypatch.setattr(nn.modules.module, "_global_forward_pre_hooks", {0: look})


@pytest.mark.usefixtures("no_autograd")
def test_an_adapter_without_any_backward_pass() -> None:
    model, batches = make_tiny_llama(**SMALL), make_batches(make_samples(8, vocab=13))
    pipeline = lora_da_core.build_pipeline(
        ("kfac", {"output": "identity"}), gradient=("zeroth_order", {"steps": 8, "probes": 1})
    )
    peft_model = lora_da_core.get_lora_da_model(
        model, LoraConfig(r=2, target_modules="all-linear"), batches, pipeline=pipeline
    )
    factors = {name: p for name, p in peft_model.named_parameters() if "lora_" in name}
    assert len(factors) == 14
    for name, factor in factors.items():
        assert bool(factor.isfinite().all()), name
        assert "lora_B" in name or float(factor.detach().norm()) > 0.1


def test_the_guard_against_autograd_bites(no_autograd: None) -> None:
    model, batches = make_tiny_llama(**SMALL), make_batches(make_samples(8, vocab=13))
    with pytest.raises(lora_da_core.PluginError, match="with gradients enabled"):
        lora_da_core.build_pipeline("kfac").run(model, batches, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AssertionError, match="backward pass was asked for"):
        torch.ones(1, requires_grad=True).sum().backward()


def angles(targets: list[str], **options: Any) -> list[float]:
    """sin of the angle between A (rank 1) from finite differences and from the full gradient, layer by layer."""
    model, batches = make_tiny_llama(torch.float64, **SMALL), make_batches(make_samples(8, vocab=13), 8)
    bases = []
    for gradient in ("full", ("zeroth_order", {"probes": 1, "mu": 1e-4, **options})):
        pipeline = lora_da_core.build_pipeline(
            ("kfac", {"output": "identity"}), "eigh", gradient, config=LoraDAConfig(scale="fixed", beta=0.0)
        )
        factors = pipeline.run(model, batches, LoraConfig(r=1, target_modules=targets)).factors.values()
        bases.append([nn.functional.normalize(pair.A, dim=1) for pair in factors])
    cosines = [float((a @ b.mT).abs().clamp(max=1)) for a, b in zip(*bases, strict=True)]
    return [(1 - cosine**2) ** 0.5 for cosine in cosines]


@pytest.mark.parametrize("target", ["v_proj", "down_proj"])
def test_the_subspace_approaches_the_full_gradient_s(target: str) -> None:
    few, more, many = (angles([target], steps=steps)[0] for steps in (16, 128, 512))
    assert many < more < few
    assert many < 0.25


def test_layers_in_turn_spare_a_small_gradient_the_noise_of_a_large_one() -> None:
    """down_proj's gradient is a fifteenth of o_proj's; both ways take 1024 forward passes."""
    targets = ["o_proj", "down_proj"]
    together, in_turn = angles(targets, steps=512), angles(targets, steps=256, layers="in_turn")
    assert together[0] < 0.3 and together[1] > 0.9
    assert max(in_turn) < 0.5


def test_full_is_the_reference_here() -> None:
    gradient = matrix(6, 4, torch.ones(4, dtype=torch.float64))
    estimator = Full(NoOptions())
    found = estimator.gradient(accumulated(estimator, gradient).statistics(), layer(6, 4), samples=4)
    torch.testing.assert_close(found.to_dense(), gradient / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_probe_s_changes_are_at_least_float32(dtype: torch.dtype) -> None:
    model, batches = make_tiny_llama(dtype, **SMALL), make_batches(make_samples(4, vocab=13))
    parts = lora_da_core.build_pipeline(gradient="zeroth_order").components
    found = resolve_targets(model, LoraConfig(r=1, target_modules=["v_proj"]))
    task = CaptureTask(
        model, found.modules, found.specs, parts.objective, parts.estimator, parts.gradient, token_mask="labels"
    )
    (spec,) = found.specs
    with LowRankProbe(task, batches, print) as probe:
        device, chosen = probe.place(spec.name)
        change = direction(spec, 1, torch.Generator().manual_seed(0), device=device, dtype=chosen)
        assert not torch.equal(probe.losses({spec.name: change}), probe.losses({}))
    assert (device, chosen) == (CPU, torch.promote_types(dtype, torch.float32))


KIT = [
    pytest.param(check, id=f"{component.name}-{'-'.join(map(str, options.values()))}-{name}")
    for component, options in (
        (Full, {}),
        (SketchedGradient, {"size": 1}),
        (SketchedGradient, {"size": 2, "seed": 3}),
        (ZerothOrder, {"steps": 4, "probes": 2}),
        (ZerothOrder, {"steps": 8, "probes": 1, "beta1": 0.8, "difference": "forward", "rank": None}),
        (ZerothOrder, {"steps": 4, "probes": 2, "layers": "in_turn"}),
    )
    for name, check in gradient_checks(component, options=options)
]


@pytest.mark.parametrize("check", KIT)
def test_the_conformance_kit_finds_no_fault(check: Callable[[], None]) -> None:
    check()
