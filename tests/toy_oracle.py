"""Feeds tensors through an estimator's accumulators as capture does, and loads the toy layers' expected numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_da_core.interfaces import Accumulator, FisherEstimator, LayerFisher
from lora_da_core.types import FisherStatistics, LayerSpec

CASES = ("a", "b")
PARAMETER_SETS = ("authors", "strong_var", "paper")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tokens:
    """The counted tokens of a layer: x (tokens, in), draws of g (tokens, out), and whose they are (tokens,)."""

    x: Tensor
    g: Tensor
    example: Tensor
    draws: tuple[Tensor, ...] = ()

    @property
    def samples(self) -> int:
        return int(self.example.max()) + 1

    @property
    def spec(self) -> LayerSpec:
        return LayerSpec("model.layer", "linear", self.x.shape[1], self.g.shape[1], rank=2, scaling=1.0)

    def gradients(self) -> Tensor:
        """G_n, (samples, out, in)."""
        return torch.stack([self.g[self.example == n].T @ self.x[self.example == n] for n in range(self.samples)])

    def part(self, samples: Sequence[int]) -> Tokens:
        """Some of the samples; `example` counts within the part, as it does within a batch."""
        keep = torch.cat([(self.example == n).nonzero().squeeze(1) for n in samples])
        renumbered = {n: index for index, n in enumerate(samples)}
        example = torch.tensor([renumbered[int(n)] for n in self.example[keep]])
        return Tokens(self.x[keep], self.g[keep], example, tuple(draw[keep] for draw in self.draws))

    def to(self, dtype: torch.dtype) -> Tokens:
        return Tokens(self.x.to(dtype), self.g.to(dtype), self.example, tuple(draw.to(dtype) for draw in self.draws))


@dataclass
class Shard:
    """The two accumulators of one layer in one process."""

    input: Accumulator
    layer: Accumulator

    @classmethod
    def of(cls, estimator: FisherEstimator[Any], spec: LayerSpec, dtype: torch.dtype) -> Shard:
        place = {"device": CPU, "dtype": dtype}
        return cls(estimator.input_accumulator(spec, **place), estimator.layer_accumulator(spec, **place))

    def update(self, tokens: Tokens) -> None:
        self.input.update(tokens.x, None, tokens.example)
        for grads in tokens.draws or (tokens.g,):
            self.layer.update(tokens.x, grads, tokens.example)

    def merge(self, other: Shard) -> None:
        self.input.merge({key: value.clone() for key, value in other.input.statistics().items()})
        self.layer.merge({key: value.clone() for key, value in other.layer.statistics().items()})


def collect(
    estimator: FisherEstimator[Any],
    tokens: Tokens,
    *,
    batches: Sequence[Sequence[int]] | None = None,
    shards: Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> FisherStatistics:
    """Runs all passes; samples split into shards that are merged in order, or into batches of one process."""
    spec = tokens.spec
    if shards is None:
        parts, workers = batches or [range(tokens.samples)], [Shard.of(estimator, spec, dtype)]
        owner = [0] * len(parts)
    else:
        parts, workers = shards, [Shard.of(estimator, spec, dtype) for _ in shards]
        owner = list(range(len(shards)))
    for index in range(estimator.passes):
        for worker, part in zip(owner, parts, strict=True):
            workers[worker].update(tokens.part(list(part)))
        merged = merge_all(estimator, workers, tokens)
        for worker in workers:
            worker.input.end_pass(index, merged)
            worker.layer.end_pass(index, merged)
    return merged if estimator.passes == 1 else merge_all(estimator, workers, tokens)


def merge_all(estimator: FisherEstimator[Any], workers: Sequence[Shard], tokens: Tokens) -> FisherStatistics:
    """All shards' statistics: added where the estimator is additive, else merged into the first."""
    first = workers[0]
    found = [dict(first.input.statistics()), dict(first.layer.statistics())]
    if len(workers) > 1 and estimator.additive:
        found = [{key: value.clone() for key, value in side.items()} for side in found]
        for worker in workers[1:]:
            for side, more in zip(found, (worker.input.statistics(), worker.layer.statistics()), strict=True):
                for key in side:
                    side[key] += more[key]
    elif len(workers) > 1:
        for worker in workers[1:]:
            first.merge(worker)
        found = [dict(first.input.statistics()), dict(first.layer.statistics())]
    return FisherStatistics(tokens.spec, found[0], found[1], samples=tokens.samples, tokens=len(tokens.x))


def fisher_of(
    estimator: FisherEstimator[Any],
    tokens: Tokens,
    *,
    damping: float,
    damping_kind: str = "relative",
    fisher_scale: str = "token_mean",
    **how: Any,
) -> LayerFisher:
    """The Fisher of the tokens."""
    statistics = collect(estimator, tokens, **how)
    return estimator.fisher(statistics, damping=damping, damping_kind=damping_kind, fisher_scale=fisher_scale)


def make(estimator: type[FisherEstimator[Any]], **options: Any) -> FisherEstimator[Any]:
    return estimator(estimator.Options(**options))


def dense(fisher: LayerFisher, spec: LayerSpec) -> Tensor:
    """J, (out·in, out·in), row-major, from products with unit matrices."""
    size = spec.out_features * spec.in_features
    units = torch.eye(size, dtype=torch.float64).view(size, spec.out_features, spec.in_features)
    return torch.stack([fisher.apply(unit).flatten() for unit in units], dim=1)


def random_tokens(
    generator: torch.Generator, *, out_features: int, in_features: int, samples: int, length: int = 4
) -> Tokens:
    """Samples of 1 to `length` tokens whose coordinates differ in scale."""
    lengths = torch.randint(1, length + 1, (samples,), generator=generator)
    example = torch.arange(samples).repeat_interleave(lengths)
    scales_in = torch.logspace(0, -1, in_features, dtype=torch.float64)
    scales_out = torch.logspace(-1, 0, out_features, dtype=torch.float64)
    x = torch.randn(len(example), in_features, generator=generator, dtype=torch.float64) * scales_in
    g = torch.randn(len(example), out_features, generator=generator, dtype=torch.float64) * scales_out
    return Tokens(x, g, example)


@dataclass(frozen=True)
class Case:
    """One toy layer: its tokens, its mean gradient, and expected numbers by name."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, Tensor]
    params: dict[str, dict[str, Any]]

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    @property
    def tokens(self) -> Tokens:
        mask = self["mask"]
        return Tokens(self["X"][mask], self["g"][mask], mask.nonzero()[:, 0])

    @property
    def expected_label_tokens(self) -> Tokens:
        """All classes as labels, each gradient weighted by the root of its probability."""
        mask, tokens = self["mask"], self.tokens
        probabilities = torch.softmax(self["X"] @ self["W"].T, dim=-1)[mask]
        length = mask.sum(1)[tokens.example].double()
        classes = torch.eye(self.meta["out"], dtype=torch.float64)
        draws = tuple(
            probabilities[:, label, None].sqrt() * (probabilities - classes[label]) / length[:, None]
            for label in range(self.meta["out"])
        )
        return Tokens(tokens.x, tokens.g, tokens.example, draws)


@cache
def load(folder: Path, name: str) -> Case:
    """The case of that name."""
    meta = json.loads((folder / "toy_oracle.json").read_text())
    with np.load(folder / "toy_oracle.npz") as archive:
        arrays = {
            key.removeprefix(f"{name}/"): torch.from_numpy(archive[key])
            for key in archive.files
            if key.startswith(f"{name}/")
        }
    return Case(name, meta["cases"][name], arrays, meta["params"])
