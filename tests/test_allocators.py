"""Rank allocators against brute force, and through the pipeline to an adapter that stock PEFT reloads."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, OptionError, PluginError
from lora_da_core.allocation import Allocation
from lora_da_core.registry import Registry
from lora_da_core.testing import allocator_checks
from lora_da_core.types import Curvature, LayerSpec, LayerSpectrum

REGISTRY = Registry()
NAMES = ("uniform", "greedy", "parameter_budget", "sublora")


def allocator(name: str, **options: Any) -> Any:
    return REGISTRY.create("allocator", (name, options))


def kind(name: str) -> Any:
    return REGISTRY.resolve("allocator", name)


def spectrum(gains: list[float], scale: float = 1.0) -> LayerSpectrum:
    values = -torch.tensor(sorted(gains, reverse=True), dtype=torch.float64)
    return LayerSpectrum(values / scale, scale)


def total(spectra: dict[str, LayerSpectrum], ranks: dict[str, int]) -> float:
    return sum(float(each.gains[: ranks[name]].sum()) for name, each in spectra.items())


def best_by_force(spectra: dict[str, LayerSpectrum], costs: dict[str, int], budget: int, least: int = 1) -> float:
    choices = [range(least, len(each.values) + 1) for each in spectra.values()]
    found = (dict(zip(spectra, ranks, strict=True)) for ranks in itertools.product(*choices))
    return max(total(spectra, r) for r in found if sum(costs[name] * rank for name, rank in r.items()) <= budget)


INSTANCES = st.lists(
    st.tuples(
        st.lists(st.floats(-1.0, 10.0, allow_subnormal=False), min_size=1, max_size=5),
        st.integers(1, 9),
        st.floats(0.1, 10.0),
    ),
    min_size=1,
    max_size=4,
)


@given(INSTANCES, st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_greedy_is_the_best_of_all_allocations_of_a_rank_budget(instance: Any, spare: int) -> None:
    spectra = {f"l{place}": spectrum(gains, scale) for place, (gains, _, scale) in enumerate(instance)}
    costs = dict.fromkeys(spectra, 1)
    ranks = allocator("greedy").allocate(spectra, costs, len(spectra) + spare)
    assert sum(ranks.values()) <= len(spectra) + spare
    assert math.isclose(total(spectra, ranks), best_by_force(spectra, costs, len(spectra) + spare), abs_tol=1e-9)


@given(INSTANCES, st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_parameter_budget_is_the_best_of_all_allocations(instance: Any, spare: int) -> None:
    spectra = {f"l{place}": spectrum(gains, scale) for place, (gains, _, scale) in enumerate(instance)}
    costs = {f"l{place}": cost for place, (_, cost, _) in enumerate(instance)}
    budget = sum(costs.values()) + spare
    ranks = allocator("parameter_budget").allocate(spectra, costs, budget)
    assert sum(costs[name] * rank for name, rank in ranks.items()) <= budget
    assert math.isclose(total(spectra, ranks), best_by_force(spectra, costs, budget), abs_tol=1e-9)


def test_greedy_by_cost_can_be_beaten_by_the_program() -> None:
    """The instance on which taking the best gain per parameter is not optimal: it leaves 3 of 5 units unused."""
    spectra = {"cheap": spectrum([9.0, 2.1]), "dear": spectrum([9.0, 5.0])}
    costs = {"cheap": 2, "dear": 5}
    assert allocator("greedy").allocate(spectra, costs, 7 + 5) == {"cheap": 2, "dear": 1}
    assert allocator("parameter_budget").allocate(spectra, costs, 7 + 5) == {"cheap": 1, "dear": 2}


@pytest.mark.parametrize("seed", range(3))
def test_parameter_budget_is_what_a_solver_of_integer_programs_finds(seed: int) -> None:
    """At a size that brute force cannot reach: 24 layers, 12 directions each, widths of real layers; against HiGHS."""
    import numpy
    from scipy.optimize import Bounds, LinearConstraint, milp

    draw = numpy.random.default_rng(seed)
    costs = {f"l{place}": int(draw.choice([1152, 1536, 2304, 3072, 5632])) // 64 for place in range(24)}
    gains = {name: numpy.sort(draw.exponential(draw.uniform(0.2, 5.0), 12))[::-1] for name in costs}
    budget = 5 * sum(costs.values()) + int(draw.integers(0, 17))
    # One variable says whether a layer has its k-th direction; every layer has its first.
    weights = numpy.concatenate([gains[name] for name in costs])
    prices = numpy.repeat(list(costs.values()), 12).astype(float)
    least = numpy.tile([1.0, *[0.0] * 11], 24)
    best = milp(
        -weights, constraints=LinearConstraint(prices[None], ub=budget), bounds=Bounds(least, 1.0),
        integrality=numpy.ones(len(weights)), options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    assert best.status == 0
    spectra = {name: spectrum(values.tolist()) for name, values in gains.items()}
    ranks = allocator("parameter_budget").allocate(spectra, costs, budget)
    assert sum(costs[name] * rank for name, rank in ranks.items()) <= budget
    assert total(spectra, ranks) == pytest.approx(-best.fun, rel=1e-9)


def test_too_many_cells_round_costs_up_and_keep_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    spectra = {f"l{i}": spectrum(torch.rand(12, generator=generator).tolist()) for i in range(10)}
    costs = {f"l{i}": 97 + 13 * i for i in range(10)}
    budget = 6 * sum(costs.values())
    exact = allocator("parameter_budget").allocate(spectra, costs, budget)
    coarse = allocator("parameter_budget", cells=200).allocate(spectra, costs, budget)
    assert coarse != exact
    assert sum(costs[name] * rank for name, rank in coarse.items()) <= budget
    assert 0.9 * total(spectra, exact) < total(spectra, coarse) < total(spectra, exact)


def test_uniform_gives_every_layer_the_same_rank_up_to_its_size() -> None:
    spectra = {"small": spectrum([1.0, 1.0]), "large": spectrum([1.0] * 9), "other": spectrum([1.0] * 9)}
    costs = dict.fromkeys(spectra, 1)
    assert allocator("uniform").allocate(spectra, costs, 15) == {"small": 2, "large": 6, "other": 6}


# SubLoRA


def random_curvature(seed: int, size: int = 8) -> Curvature:
    """Directions of two kinds that are much alike within each, so that one makes another of its kind worth less."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, 12, generator=draw, dtype=torch.float64)
    kinds = torch.arange(size) % 2
    directions = centres[kinds] + 0.6 * torch.randn(size, 12, generator=draw, dtype=torch.float64)
    directions *= 0.5 + torch.rand(size, 1, generator=draw, dtype=torch.float64)
    hessian = directions @ directions.mT
    # Every marginal stays positive to the last, so that the objective is monotone.
    return Curvature(-hessian.clamp(min=0).sum(1) - 0.01, hessian)


def value(curvature: Curvature, chosen: tuple[int, ...], *, projected: bool) -> float:
    hessian = curvature.hessian
    if projected:
        diagonal = torch.diag(hessian.diagonal())
        hessian = diagonal + (hessian - diagonal).clamp(min=0)
    place = list(chosen)
    return float(-curvature.slopes[place].sum() - 0.5 * hessian[place][:, place].sum())


def is_submodular(curvature: Curvature, *, projected: bool) -> bool:
    """F(S + i) + F(S + j) ≥ F(S + i + j) + F(S) for all i, j and S of at most one: a quadratic F shows no more."""
    size = len(curvature.slopes)
    for i, j in itertools.combinations(range(size), 2):
        rest = [place for place in range(size) if place not in (i, j)]
        for count in range(2):
            for chosen in itertools.combinations(rest, count):
                f = [value(curvature, (*chosen, *more), projected=projected) for more in ((i,), (j,), (i, j), ())]
                if f[0] + f[1] < f[2] + f[3] - 1e-9:
                    return False
    return True


def test_the_projection_makes_the_objective_submodular() -> None:
    """Always; the Hessian as it is rarely is so by chance."""
    curvatures = [random_curvature(seed) for seed in range(10)]
    assert sum(is_submodular(curvature, projected=False) for curvature in curvatures) <= 1
    assert all(is_submodular(curvature, projected=True) for curvature in curvatures)


def curvature_of_factors(seed: int) -> Curvature:
    """H_ij = σ_i σ_j (u_iᵀYu_j)(v_iᵀZv_j) of eight directions of one layer, as the full set's own optimum has it."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    y, z = (m @ m.mT for m in (random(12, 12), random(10, 10)))
    u, v = (torch.linalg.qr(random(size, 8))[0] for size in (12, 10))
    sizes = 0.2 + torch.rand(8, generator=draw, dtype=torch.float64)
    hessian = (u.mT @ y @ u) * (v.mT @ z @ v) * torch.outer(sizes, sizes)
    return Curvature(-hessian.sum(1), hessian)


def test_pruning_by_sublora_costs_little_more_than_the_best_set() -> None:
    """Twenty layers, 4 of 8 kept: no Hessian is submodular, every projected one is, and brute force does no better.

    The loss that pruning adds is ½·1ᵀH1 over what is pruned, since the full set is at its optimum.
    """
    more = []
    for seed in range(20):
        curvature = curvature_of_factors(seed)
        assert not is_submodular(curvature, projected=False) and is_submodular(curvature, projected=True)

        def added(kept: tuple[int, ...], hessian: torch.Tensor = curvature.hessian) -> float:
            pruned = [place for place in range(8) if place not in kept]
            return float(0.5 * hessian[pruned][:, pruned].sum())

        shown = LayerSpectrum(torch.zeros(8, dtype=torch.float64), 1.0, curvature)
        best = min(map(added, itertools.combinations(range(8), 4)))
        more.append(added(tuple(allocator("sublora").order(shown)[:4])) / best)
    assert statistics.median(more) <= 1.06, more


def family(seed: int, kinds: int, spread: float, scale: float) -> Curvature:
    """Eight directions around so many centres, of unequal sizes; with these slopes all marginals are positive."""
    draw = torch.Generator().manual_seed(seed)
    directions = spread * torch.randn(8, 12, generator=draw, dtype=torch.float64)
    if kinds:
        directions += torch.randn(kinds, 12, generator=draw, dtype=torch.float64)[torch.arange(8) % kinds]
    directions *= (scale * torch.rand(8, 1, generator=draw, dtype=torch.float64)).exp()
    hessian = directions @ directions.mT
    more = torch.rand(8, generator=draw, dtype=torch.float64) * hessian.diagonal()
    return Curvature(-hessian.clamp(min=0).sum(1) - more, hessian)


@pytest.mark.parametrize(("kinds", "spread"), [(0, 1.0), (2, 0.3), (2, 0.6), (2, 1.0), (4, 0.6)])
@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_sublora_keeps_its_guarantee_and_is_never_behind_the_first_order_choice(
    kinds: int, spread: float, scale: float
) -> None:
    """Against brute force over all sets of 4 of 8: without structure, with much and with little, ten draws each."""
    ahead = 0
    for seed in range(100, 110):
        curvature = family(seed, kinds, spread, scale)
        shown = LayerSpectrum(torch.zeros(8, dtype=torch.float64), 1.0, curvature)
        chosen = tuple(allocator("sublora").order(shown)[:4])
        by_slope = tuple(curvature.slopes.argsort()[:4].tolist())
        best = max(value(curvature, each, projected=True) for each in itertools.combinations(range(8), 4))
        second, first = (value(curvature, each, projected=True) for each in (chosen, by_slope))
        assert best * (1 - 1 / math.e) <= second <= best * (1 + 1e-12)
        assert second >= first * (1 - 1e-12)
        ahead += second > first * (1 + 1e-9)
    assert ahead >= 2


def test_sublora_is_greedy_where_directions_do_not_interact() -> None:
    """A diagonal Hessian makes it modular: exact, like the first-order greedy on gains −slope − ½H_ii."""
    draw = torch.Generator().manual_seed(3)
    spectra = {}
    for name in "abc":
        slopes = -2 - torch.rand(5, generator=draw, dtype=torch.float64)
        curvature = Curvature(slopes, torch.diag(torch.rand(5, generator=draw, dtype=torch.float64)))
        spectra[name] = LayerSpectrum(torch.zeros(5, dtype=torch.float64), 1.0, curvature)
    gains = {
        n: sorted((-s.curvature.slopes - 0.5 * s.curvature.hessian.diagonal()).tolist())[::-1]
        for n, s in spectra.items()
    }
    plain = {name: spectrum(values) for name, values in gains.items()}
    costs = dict.fromkeys(spectra, 1)
    found = allocator("sublora").allocate(spectra, costs, 8)
    assert found == allocator("greedy").allocate(plain, costs, 8)
    assert sum(found.values()) == 8


def test_sublora_without_curvature_says_so() -> None:
    with pytest.raises(ValueError, match="curvature"):
        allocator("sublora").allocate({"a": spectrum([1.0])}, {"a": 1}, 1)


# The conformance kit, and mutants it must reject


CHECKS = [(name, check_name, run) for name in NAMES for check_name, run in allocator_checks(kind(name))]


@pytest.mark.parametrize("check", [pytest.param(run, id=f"{name}-{check}") for name, check, run in CHECKS])
def test_contract(check: Any) -> None:
    check()


def mutant(**methods: Any) -> type[Any]:
    return type("Mutant", (kind("greedy"),), {"__doc__": "A greedy allocator with a fault.", **methods})


MUTANTS = {
    "ranks_stay_within_bounds_and_budget": mutant(
        allocate=lambda self, spectra, costs, budget: {name: len(each.values) for name, each in spectra.items()}
    ),
    "orders_are_permutations": mutant(order=lambda self, spectrum: [0] * len(spectrum.values)),
    "largest_ranks_reach_the_smallest": mutant(largest_rank=lambda self, spec: 0),
    "a_common_unit_of_weights_does_not_matter": mutant(
        allocate=lambda self, spectra, costs, budget: {
            name: 1 + (budget > sum(costs.values()) + 3 and each.scale > 3.5) for name, each in spectra.items()
        }
    ),
}


@pytest.mark.parametrize("check", sorted(MUTANTS))
def test_the_kit_rejects_a_mutant(check: str) -> None:
    with pytest.raises(AssertionError):
        dict(allocator_checks(MUTANTS[check]))[check]()


# Through the pipeline

TARGETS = ["q_proj", "k_proj", "down_proj"]


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})


def pipeline(name: str, **rest: Any) -> Any:
    return lora_da_core.build_pipeline(
        solver="eigh", allocator=(name, rest.pop("options", {})), config=LoraDAConfig(**rest)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_the_adapter_reloads_in_stock_peft(name: str, rslora: bool, tmp_path: Path) -> None:
    samples, given = make_samples(), config(use_rslora=rslora)
    batches = make_batches(samples)
    model = lora_da_core.get_lora_da_model(make_tiny_llama(), given, batches, pipeline=pipeline(name)).eval()
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    ranks = {n: m.lora_A["default"].weight.shape[0] for n, m in layers.items()}
    if name != "uniform":
        assert len(set(ranks.values())) > 1
    expected = 8 / math.sqrt(4) if rslora else 8 / 4
    assert all(math.isclose(m.scaling["default"], expected) for m in layers.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_tiny_llama(), tmp_path).eval()
    state, loaded = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    ids = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, again(**ids).logits)
    assert given.rank_pattern == {}


@pytest.mark.parametrize("scale", ["auto", "fixed"])
def test_a_layer_s_factors_are_those_of_a_run_at_its_rank(scale: Any) -> None:
    """Solving at the largest rank and cutting gives what solving at the allocated rank gives."""
    batches = make_batches(make_samples())
    found = pipeline("greedy", scale=scale).run(make_tiny_llama(), batches, config())
    fitted = lora_da_core.get_lora_da_config(config(), found)
    plain = lora_da_core.build_pipeline(solver="eigh", config=LoraDAConfig(scale=scale))
    direct = plain.run(make_tiny_llama(), batches, fitted)
    for layer in direct.report.layers:
        ours, theirs = found.factors[layer.name], direct.factors[layer.name]
        assert ours.A.shape == theirs.A.shape == (layer.rank, layer.in_features)
        assert torch.allclose(ours.B @ ours.A, theirs.B @ theirs.A, rtol=1e-4, atol=1e-7)
    assert [each.rank for each in found.report.layers] == [each.rank for each in direct.report.layers]
    assert found.report.layers[0].ritz_values == pytest.approx(direct.report.layers[0].ritz_values)
    assert found.report.layers[0].gap == pytest.approx(direct.report.layers[0].gap, rel=1e-6)


@pytest.mark.parametrize("name", ["greedy", "parameter_budget"])
def test_the_report_says_what_was_given(name: str) -> None:
    report = pipeline(name).run(make_tiny_llama(), make_batches(make_samples()), config()).report
    shared = report.allocation
    costs = {each.name: 1 if name == "greedy" else each.in_features + each.out_features for each in report.layers}
    assert shared["budget"] == 4 * sum(costs.values())
    assert shared["spent"] == sum(costs[layer] * rank for layer, rank in shared["ranks"].items()) <= shared["budget"]
    assert shared["gain"] >= shared["configured_gain"] > 0
    assert report.components["allocator"] == name
    assert report.options["allocator"]["minimum"] == 1


def test_rounds_keep_the_ranks_of_the_first() -> None:
    found = pipeline("greedy", rounds=2).run(make_tiny_llama(), make_batches(make_samples()), config())
    for layer in found.report.layers:
        assert found.factors[layer.name].B.shape == (layer.out_features, layer.rank)
        assert layer.rank == found.report.allocation["ranks"][layer.name]


@pytest.mark.parametrize("estimator", ["kfac", "empirical", "diagonal", "identity"])
def test_curvature_is_the_fisher_s_own(estimator: str) -> None:
    """The Hessian of the directions against a dense J, and the slopes against G."""
    from lora_da_core.solving import LayerSolver

    built = lora_da_core.build_pipeline(estimator, "eigh", allocator="sublora", config=LoraDAConfig(damping=0.1))
    model = make_tiny_llama(torch.float64)
    estimates = built.estimate(model, make_batches(make_samples()), config(target_modules=["k_proj"], r=3))
    spec = estimates.task.specs[0]
    parts = built.components
    solver = LayerSolver(built.registry, parts.estimator, parts.solver, built.config, curvature=True)
    prepared = solver.prepare(estimates.statistics.of_layer(spec.name), estimates.gradient(spec))
    (solution,) = solver.solve([prepared], 100)
    size = spec.in_features * spec.out_features
    units = torch.eye(size, dtype=torch.float64).view(size, spec.out_features, spec.in_features)
    dense = torch.stack([prepared.fisher.apply(unit).flatten() for unit in units])
    left, right = solution.subspace.projected * solution.divisor, solution.subspace.basis
    pairs = zip(left.T, right.T, strict=True)
    directions = torch.stack([torch.outer(column, row).flatten() for column, row in pairs])
    gradient = estimates.gradient(spec).to_dense().double().flatten()
    assert solution.curvature is not None
    assert torch.allclose(solution.curvature.hessian, directions @ dense @ directions.T, rtol=1e-8, atol=1e-14)
    assert torch.allclose(solution.curvature.slopes, directions @ gradient, rtol=1e-8, atol=1e-14)


# What is refused


def test_a_budget_below_the_smallest_ranks_is_refused_before_any_work() -> None:
    built = pipeline("greedy", options={"total": 3})
    with pytest.raises(OptionError, match=r"rank 1 for each of 6 layers takes 6 ranks, above the budget of 3"):
        built.estimate(make_tiny_llama(), (_ for _ in [1 / 1]), config())


def test_a_wrapped_model_and_a_state_dict_are_refused() -> None:
    wrapped = lora_da_core.get_lora_da_model(
        make_tiny_llama(), config(), make_batches(make_samples()), pipeline=lora_da_core.build_pipeline()
    )
    with pytest.raises(OptionError, match="has fixed"):
        pipeline("greedy").run(wrapped, make_batches(make_samples()))
    with pytest.raises(OptionError, match="get_lora_da_model"):
        lora_da_core.get_lora_da_state_dict(make_tiny_llama(), [], config(), pipeline=pipeline("greedy"))


@pytest.mark.parametrize(
    ("name", "options"),
    [("greedy", {"minimum": 0}), ("greedy", {"largest": 0.5}), ("uniform", {"per": "byte"}), ("greedy", {"total": 0})],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        allocator(name, **options)


BROKEN: dict[str, dict[str, Any]] = {
    "another layer": {"ranks": {"x": 1}, "says": "layers that are not"},
    "rank 0": {"ranks": {"a": 0, "b": 1}, "says": "rank 0"},
    "no integer": {"ranks": {"a": 1.5, "b": 1}, "says": "rank 1.5"},
    "too much": {"ranks": {"a": 2, "b": 2}, "says": "4 ranks of 3"},
    "order": {"ranks": {"a": 1, "b": 1}, "order": [0, 0], "says": "permutation"},
}
"""Answers an allocator may not give."""


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_an_answer_that_breaks_the_contract_is_refused(case: str) -> None:
    from lora_da_allocators.greedy import Greedy

    answer = BROKEN[case]

    class Bad(Greedy):
        def allocate(self, spectra: Any, costs: Any, budget: int) -> Any:
            return answer["ranks"]

        def order(self, spectrum: LayerSpectrum) -> Any:
            return answer.get("order", super().order(spectrum))

    specs = [LayerSpec(name, "linear", 6, 5, 1, 2.0) for name in "ab"]
    asked = Allocation(REGISTRY, Bad(Greedy.Options(total=3)), specs)
    assert [spec.rank for spec in asked.largest({"a": 100, "b": 100})] == [2, 2]
    with pytest.raises(PluginError, match=answer["says"]):
        asked.of(_solutions(specs, 2))


def _solutions(specs: list[LayerSpec], rank: int) -> Any:
    from lora_da_core.omega import Subspace
    from lora_da_core.solving import LayerSolution

    space = Subspace(torch.eye(6)[:, :rank], torch.ones(5, rank), 2.0)
    return {
        spec.name: LayerSolution(space, (-2.0, -1.0), 0.5, 0.0, True, 1.0, "eigh", 1, {}, (), 0.0) for spec in specs
    }


# On the command line and in a grid


def test_init_writes_an_adapter_with_its_ranks(world: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lora_da_core.cli import app

    arguments = ["init", "--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--rank", "2"]
    arguments += [
        "--output",
        str(tmp_path / "run"),
        "--allocator",
        "parameter_budget",
        "--allocator-option",
        "largest=3",
    ]
    done = CliRunner().invoke(app, [*arguments, "--damping", "0.1"])
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    report = json.loads((tmp_path / "run" / "lora_da_report.json").read_text())
    assert report["options"]["allocator"]["largest"] == 3
    assert sorted(saved["rank_pattern"].values()) == sorted(report["allocation"]["ranks"].values())
    assert len(set(saved["rank_pattern"].values())) > 1
    checked = CliRunner().invoke(app, ["verify", str(tmp_path / "run")])
    assert checked.exit_code == 0, checked.output
    wrong = CliRunner().invoke(app, [*arguments, "--overwrite", "--allocator", "none"])
    assert wrong.exit_code == 2 and "--allocator-option" in wrong.output


@pytest.mark.parametrize("together", [1, 8])
def test_a_grid_compares_allocators(world: Path, tmp_path: Path, together: int) -> None:
    from lora_da_core.ablation.grid import make_grid
    from lora_da_core.ablation.runner import run_grid

    content = {
        "run": {
            "model": str(world / "model"), "data": str(world / "data.jsonl"), "samples": 8, "reference": "kfac",
            "finetune": {
                "steps": 3, "learning_rates": [1e-2], "eval_steps": [0, 3], "batch_size": 4, "held_out": 8,
                "together": together,
            },
        },
        "grid": {"rank": [2], "allocator": ["none", "greedy", {"name": "uniform", "per": "parameter"}]},
    }  # fmt: skip
    grid = make_grid(content)
    plain = make_grid({**content, "grid": {"rank": [2]}})
    assert plain.cells[0].id == grid.cells[0].id
    records = run_grid(grid, tmp_path / "out")
    assert [record["status"] for record in records] == ["done"] * 3, records
    assert [record["allocator"] for record in records] == ["none", "greedy", "uniform"]
    losses = {record["allocator"]: record["curves"][0]["losses"] for record in records}
    # Equal parameters spread evenly are the configured ranks.
    assert losses["uniform"] == pytest.approx(losses["none"], rel=1e-6)
    assert losses["greedy"][-1] != losses["none"][-1]


def test_the_memory_plan_counts_the_ranks_that_layers_are_solved_at() -> None:
    def solve(built: Any) -> int:
        return lora_da_core.estimate_memory(make_tiny_llama(), config(), pipeline=built).phases()["solve"]

    assert solve(pipeline("greedy", options={"largest": 6})) > solve(pipeline("greedy", options={"largest": 1}))
