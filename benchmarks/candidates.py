r"""What else a start could be: candidates beside the library's own, at several rates and seeds, on validation rows.

    python -m benchmarks.candidates benchmarks/grids/gsm8k_search.toml --output runs/candidates.jsonl \
        --model "$(python examples/demo_model.py)" --data problems.jsonl [--only NAME …] [--processes 3]

Every candidate starts from the K-FAC solution of `robust` (or says which other) on the same samples, and is trained
with the same batches. The grid file gives the data's parts, seeds and rates; its held-out rows stay unread. One JSON
line per candidate, seed and rate; the table pairs everything with `default` by seed, each at its best rate.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from benchmarks.evidence import share_threads, use_fused_kernels
from lora_da_core import adapter, build_pipeline
from lora_da_core.ablation import read_grid, stacked
from lora_da_core.ablation.finetune import rate_factor, seeded
from lora_da_core.ablation.stacked import Member, finetune_together
from lora_da_core.ablation.workspace import Workspace
from lora_da_core.batches import spread
from lora_da_core.estimation import Estimates
from lora_da_core.omega import WeightStep
from lora_da_core.operators import LowRankMap
from lora_da_core.pipeline import Pipeline
from lora_da_core.probe import LowRankProbe
from lora_da_core.registry import Registry
from lora_da_core.scale import SURE
from lora_da_core.sizing import SEARCH_SAMPLES, Sizing
from lora_da_core.types import LoraFactors

RANK = 8
MOST_RANKS = 32
WARM_STEPS = 2

Steps = Mapping[str, WeightStep]
Factors = Mapping[str, LoraFactors]


class Bench:
    """The model and the data of one seed, and what is estimated from them, once each."""

    def __init__(self, space: Workspace, seed: int) -> None:
        self.space, self.seed = space, seed
        self.targets = adapter.resolve_targets(space.model, space.lora(RANK))
        self.specs = {spec.name: spec for spec in self.targets.specs}
        self.most_ranks = min(MOST_RANKS, *(min(s.in_features, s.out_features) for s in self.targets.specs))
        self.steps = cache(self._steps)

    @cache  # noqa: B019 - a bench lives as long as its process
    def estimates(self, estimator: Any) -> tuple[Pipeline, Estimates]:
        """Of a pipeline like `robust` with another estimator."""
        samples = self.space.run.samples
        draw = self.space.draw(samples, self.seed)
        config = replace(build_pipeline().config, samples=samples, seed=self.seed, population=self.space.population)
        name, options = estimator
        pipeline = build_pipeline((name, dict(options)), "lanczos", config=config)
        found = pipeline.estimate(self.space.model, [*draw.batches, *draw.unseen], self.space.lora(RANK))
        return pipeline, found

    def _steps(self, estimator: Any = ("kfac", ()), rank: int = RANK, **config: Any) -> dict[str, WeightStep]:
        """The solution at the size that the library's line search chose."""
        pipeline, found = self.estimates(estimator)
        changed = Pipeline(pipeline.registry, pipeline.components, replace(pipeline.config, **config))
        factors = changed.solve(found, self.space.lora(rank)).factors
        scaling = {
            spec.name: spec.scaling for spec in adapter.resolve_targets(self.space.model, self.space.lora(rank)).specs
        }
        steps = {}
        for name, pair in factors.items():
            right, mixed = torch.linalg.qr(pair.A.double().mT)
            steps[name] = WeightStep(scaling[name] * pair.B.double() @ mixed.mT, right)
        return steps

    def moment(self, name: str) -> Tensor:
        """Z of a layer, (in, in), float64."""
        statistics = self.estimates(("kfac", ()))[1].statistics.of_layer(name)
        return statistics.input["second_moment"].double() / statistics.tokens

    def gradient(self, name: str) -> Tensor:
        """G of a layer, (out, in), float64."""
        return self.estimates(("kfac", ()))[1].gradient(self.specs[name]).to_dense().double()

    def gains(self, name: str, step: WeightStep) -> Tensor:
        """What each direction of a step takes off the loss, to first order, (rank,)."""
        return -((self.gradient(name) @ step.right) * step.left).sum(0)

    def divided(self, steps: Steps, how: str = "sum", share: float = 1.0) -> Factors:
        """A and B such that A·x is `share` times a default LoRA's: in sum, row by row, or white."""
        factors = {}
        for name, step in steps.items():
            moment, rank = self.moment(name), step.right.shape[1]
            gram = step.right.mT @ moment @ step.right
            wanted = share * math.sqrt(float(moment.diagonal().mean()) / 3)
            if how == "sum":
                mix = torch.eye(rank).to(gram) * math.sqrt(rank / float(gram.trace()))
            elif how == "rows":
                mix = torch.diag(gram.diagonal().clamp(min=1e-6 * float(gram.trace())).rsqrt())
            else:
                gram.diagonal().add_(1e-4 * float(gram.trace()) / rank)
                mix = torch.linalg.inv(torch.linalg.cholesky(gram))
            a = wanted * mix @ step.right.mT
            b = step.left @ torch.linalg.inv(mix) / (wanted * self.specs[name].scaling)
            if how == "white":
                u, values, vh = torch.linalg.svd(b, full_matrices=False)
                a, b = vh @ a, u * values
            factors[name] = LoraFactors(a.float(), b.float())
        return factors

    def sized(self, direction: Steps) -> dict[str, WeightStep]:
        """A direction at the size of the library's line search."""
        found = self.estimates(("kfac", ()))[1]
        dtypes = dict.fromkeys(direction, torch.float32)
        return Sizing(found.task, found.unseen, dtypes, print).search({}, direction, SURE)[1]


def default(bench: Bench) -> Factors:
    """A default LoRA."""
    with seeded(bench.seed, bench.space.device):
        return _stock(bench, dict.fromkeys(bench.specs, RANK))


def loss_optimal_b(bench: Bench) -> Factors:
    """B = −(AᵀZA)⁻¹AᵀGᵀY⁻¹ (K-FAC's quadratic model) for the library's A, damped a hundredth as much."""
    _, found = bench.estimates(("kfac", ()))
    direction = {}
    for name, step in bench.steps().items():
        statistics = found.statistics.of_layer(name)
        squares = statistics.layer["squares"].double() / statistics.tokens
        inner = step.right.mT @ bench.moment(name) @ step.right
        inner.diagonal().add_(0.1 * float(bench.moment(name).diagonal().mean()))
        left = -(bench.gradient(name) / (squares + 0.1 * squares.mean()).unsqueeze(1)) @ step.right
        left = torch.linalg.solve(inner, left.mT).mT
        direction[name] = WeightStep(left / torch.linalg.matrix_norm(left, 2), step.right)
    return bench.divided(bench.sized(direction))


def multipliers_by_kind(bench: Bench) -> Factors:
    """A multiplier for each kind of layer (q, k, v, …), by coordinate search on the loss of the search's samples."""
    _, found = bench.estimates(("kfac", ()))
    steps = dict(bench.steps())
    kinds = sorted({name.rsplit(".", 1)[-1] for name in steps})
    with LowRankProbe(found.task, spread(found.unseen, SEARCH_SAMPLES), print) as probe:

        def loss(trial: Steps) -> float:
            changes = {n: LowRankMap(s.left.float(), s.right.float()) for n, s in trial.items()}
            return float(probe.losses(changes).mean())

        best = loss(steps)
        for kind in kinds:
            for factor in (2.0, 0.5):
                improved = False
                while True:
                    trial = {n: replace(s, left=s.left * factor) if n.endswith(kind) else s for n, s in steps.items()}
                    value = loss(trial)
                    if not value < best:
                        break
                    best, steps, improved = value, trial, True
                if improved:
                    break
    return bench.divided(steps)


def allocated(bench: Bench) -> dict[str, int]:
    """Ranks by layer: the largest first-order gains per parameter, for as many parameters as rank 8 everywhere."""
    steps = bench.steps(rank=bench.most_ranks)
    cost = {name: spec.in_features + spec.out_features for name, spec in bench.specs.items()}
    queue = []
    for name, step in steps.items():
        gains = bench.gains(name, step)
        for place, gain in enumerate(sorted(gains.tolist(), reverse=True)):
            heapq.heappush(queue, (-gain / cost[name], name, place))
    left = sum(RANK * each for each in cost.values()) - sum(cost.values())
    ranks = dict.fromkeys(steps, 1)
    while queue:
        _, name, place = heapq.heappop(queue)
        if place and cost[name] <= left:
            ranks[name] += 1
            left -= cost[name]
    return ranks


def allocated_ranks(bench: Bench) -> Factors:
    """`robust` with ranks by layer."""
    steps, ranks = bench.steps(rank=bench.most_ranks), allocated(bench)
    cut = {}
    for name, step in steps.items():
        gains = bench.gains(name, step)
        kept = gains.argsort(descending=True)[: ranks[name]]
        cut[name] = WeightStep(step.left[:, kept], step.right[:, kept])
    return bench.divided(bench.sized(cut))


def default_with_allocated_ranks(bench: Bench) -> Factors:
    """A default LoRA with those ranks."""
    ranks = allocated(bench)
    with seeded(bench.seed, bench.space.device):
        return _stock(bench, ranks)


def _stock(bench: Bench, ranks: Mapping[str, int]) -> dict[str, LoraFactors]:
    factors = {}
    for name, spec in bench.specs.items():
        a = torch.empty(ranks[name], spec.in_features, device=bench.space.device)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        factors[name] = LoraFactors(a, a.new_zeros(spec.out_features, ranks[name]))
    return factors


def _estimated(name: str, bench: Bench, /, **options: Any) -> Factors:
    return bench.divided(bench.steps((name, tuple(options.items()))))


CANDIDATES: dict[str, Callable[[Bench], Factors]] = {
    "default": default,
    "robust": lambda bench: bench.divided(bench.steps()),
    "A·x half": lambda bench: bench.divided(bench.steps(), share=0.5),
    "A·x twice": lambda bench: bench.divided(bench.steps(), share=2.0),
    "A·x row by row": lambda bench: bench.divided(bench.steps(), "rows"),
    "A·x white": lambda bench: bench.divided(bench.steps(), "white"),
    "A·x white, half": lambda bench: bench.divided(bench.steps(), "white", 0.5),
    "identity": lambda bench: _estimated("identity", bench),
    "identity, white": lambda bench: bench.divided(bench.steps(("identity", ())), "white"),
    "Y full": lambda bench: _estimated("kfac", bench, output="full"),
    "labels sampled": lambda bench: _estimated("kfac", bench, labels="sampled"),
    "ekfac": lambda bench: _estimated("ekfac", bench),
    "damping 1": lambda bench: bench.divided(bench.steps(damping=1.0)),
    "loss-optimal B": loss_optimal_b,
    "multipliers by kind": multipliers_by_kind,
    "allocated ranks": allocated_ranks,
    "default, allocated ranks": default_with_allocated_ranks,
    "AdamW warmed": lambda bench: bench.divided(bench.steps()),
    "default, AdamW warmed": default,
}

WARMED = {"AdamW warmed", "default, AdamW warmed"}
"""Those whose AdamW sees the first batches before it moves anything."""


def main() -> None:
    """Runs and tabulates."""
    options = _options()
    changes = {name: getattr(options, name) for name in ("model", "data", "device") if getattr(options, name)}
    seeds = read_grid(options.grid, **changes).run.seeds
    names = options.only or list(CANDIDATES)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    share_threads(options.processes)
    spawn = multiprocessing.get_context("spawn")
    work = partial(_one_seed, options.grid, changes, names, output, options.fused)
    with ProcessPoolExecutor(min(options.processes, len(seeds)), mp_context=spawn, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(work, seed) for seed in seeds]):
            done.result()
    print(table([json.loads(line) for line in output.read_text().splitlines()]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--output", required=True)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--device")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, metavar="NAME", help="names of candidates")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--no-fused", dest="fused", action="store_false", help="leave transformers' own kernels")
    return parser.parse_args()


def _one_seed(grid: str, changes: dict[str, Any], names: list[str], output: Path, fused: bool, seed: int) -> None:
    if fused and torch.cuda.is_available():
        use_fused_kernels()
    run = read_grid(grid, **changes).run
    tune = run.finetune
    if tune is None or not tune.validation:
        raise SystemExit("the grid needs [run.finetune] with validation rows")
    begin = time.perf_counter()

    def tell(done: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f}] seed {seed}: {done}", flush=True)

    bench = Bench(Workspace(run, Registry()), seed)
    tell("loaded")
    size = max(1, tune.together // len(tune.learning_rates))
    # Warm steps belong to all of a stack.
    for alike in ([n for n in names if n not in WARMED], [n for n in names if n in WARMED]):
        for first in range(0, len(alike), size):
            starts = {}
            for name in alike[first : first + size]:
                starts[name] = CANDIDATES[name](bench)
                tell(f"made {name}")
            lines = _trained(bench, starts, tune)
            with output.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            tell("trained")


def _trained(bench: Bench, starts: Mapping[str, Factors], tune: Any) -> list[dict[str, Any]]:
    data, warm = bench.space.training(bench.seed), WARM_STEPS if set(starts) <= WARMED else 0
    factor = stacked.rate_factor
    if warm:
        # The steps before the first see the first batches at rate 0, which fills AdamW's moments and moves nothing.
        tune = replace(tune, steps=tune.steps + warm, eval_steps=tuple(s + warm for s in tune.eval_steps))
        stacked.rate_factor = lambda step, steps: rate_factor(step - warm, steps - warm) if step >= warm else 0.0
    members = [Member(factors, data, rate) for factors in starts.values() for rate in tune.learning_rates]
    try:
        curves = finetune_together(bench.space.model, bench.targets.modules, bench.targets.specs, members, tune)
    finally:
        stacked.rate_factor = factor
    names = [name for name in starts for _ in tune.learning_rates]
    return [
        {"candidate": name, "seed": bench.seed, "rate": curve.learning_rate, "losses": list(curve.losses)}
        for name, curve in zip(names, curves, strict=True)
    ]


def table(lines: list[dict[str, Any]]) -> str:
    """Mean losses at each candidate's best rate (by the last step), and the paired difference to `default`."""
    found: dict[str, dict[float, dict[int, list[float]]]] = {}
    for line in lines:
        found.setdefault(line["candidate"], {}).setdefault(line["rate"], {})[line["seed"]] = line["losses"]
    means = {
        name: {rate: torch.tensor(list(seeds.values())).mean(0).tolist() for rate, seeds in rates.items()}
        for name, rates in found.items()
    }
    best = {name: min(rates, key=lambda rate: rates[rate][-1]) for name, rates in means.items()}
    rows = []
    for name in sorted(found, key=lambda name: means[name][best[name]][-1]):
        losses = " ".join(f"{value:.4f}" for value in means[name][best[name]])
        ends = " ".join(f"{rate:g}:{values[-1]:.4f}" for rate, values in sorted(means[name].items()))
        paired = ""
        if "default" in found and name != "default":
            ours, theirs = found[name][best[name]], found["default"][best["default"]]
            both = [ours[seed][-1] - theirs[seed][-1] for seed in ours if seed in theirs]
            if len(both) > 1:
                half = stats.t.ppf(0.975, len(both) - 1) * stats.tstd(both) / math.sqrt(len(both))
                paired = f"{sum(both) / len(both):+.4f} ± {half:.4f}"
        rows.append(f"{name:26} {best[name]:<7g} {losses}   {paired:18} {ends}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
