"""What every gradient estimator must fulfil: G = (1/n) Σ g xᵀ, exactly or as well as it declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_da_core.interfaces import GradientEstimator, LossProbe
from lora_da_core.operators import LinearMap
from lora_da_core.testing.data import (
    CPU,
    EXACT,
    Check,
    Subject,
    Tokens,
    bitwise,
    checks_of,
    close,
    consistent_map,
    declares_itself,
    merged,
    random_tokens,
    require,
    same_bytes,
    undisturbed,
)
from lora_da_core.testing.one_hot import gradient_takes_places
from lora_da_core.types import LayerSpec

ROUGH = 2.0
"""Error relative to ‖G‖ that an estimator which approximates may make."""
PROBE_RUNS = 200
"""Estimates that are averaged to see whether a forward-only gradient is unbiased."""
STANDARD_ERRORS = 5.0
"""How many standard errors the average may lie from the truth."""


def checks(cls: type[GradientEstimator[Any]], options: Mapping[str, Any]) -> Iterator[Check]:
    """All checks of a gradient estimator, as (name, callable).

    An estimator that approximates sets an attribute or property `exact = False`: it must then be exact where G has
    rank one, and its error must stay below twice the norm of G. One that puts another target in the gradient's place
    sets `follows_loss = False`; form and repeatability are all that is asked of it.

    Args:
        cls: The gradient estimator.
        options: Its options.

    Returns:
        An iterator.
    """
    subject = Subject(cls, options)
    made = subject.make()
    if not made.follows_loss:
        return checks_of(subject, _TARGET_CHECKS)
    return checks_of(subject, _FORWARD_CHECKS if made.forward_only else _BACKWARD_CHECKS)


def _accumulated(subject: Subject, batches: Sequence[Tokens], dtype: torch.dtype = torch.float64) -> Any:
    accumulator = subject.make().accumulator(batches[0].spec, device=CPU, dtype=dtype)
    for batch in batches:
        accumulator.update(batch.inputs, batch.output_grads, batch.example)
    return accumulator


def _gradient(subject: Subject, statistics: Mapping[str, Tensor], tokens: Tokens) -> LinearMap:
    found = subject.make().gradient(statistics, tokens.spec, samples=tokens.samples)
    require(isinstance(found, LinearMap), f"gradient() returned {type(found).__name__}, which is no LinearMap")
    result: LinearMap = found
    return result


def _of(subject: Subject, tokens: Tokens) -> Tensor:
    return _gradient(subject, _accumulated(subject, [tokens]).statistics(), tokens).to_dense()


def _is_exact(subject: Subject) -> bool:
    return bool(subject.make().exact)


def gradient_is_the_mean_over_samples(subject: Subject) -> None:
    """G = (1/n) Σ_n Σ_t g xᵀ, samples without tokens counted in n."""
    for tokens in (random_tokens(0), random_tokens(1, 6, 3), random_tokens(2, 1, 2)):
        for counted in (tokens, replace(tokens, samples=tokens.samples + 3)):
            found, expected = _of(subject, counted), counted.gradient()
            if _is_exact(subject):
                close(found, expected, "G is not (1/n) Σ g xᵀ")
            else:
                close(found, expected, "an approximate G is far off", ROUGH)


def rank_one_gradients_are_exact(subject: Subject) -> None:
    """A gradient of rank one is within reach of any approximation."""
    tokens = random_tokens(3).of_samples([1])
    close(_of(subject, tokens), tokens.gradient(), "G of a single token", 1e-6)
    copies = replace(tokens.reordered(torch.zeros(4, dtype=torch.int64)), example=torch.arange(4), samples=4)
    close(_of(subject, copies), tokens.gradient(), "G of four equal samples", 1e-6)


def products_agree(subject: Subject) -> None:
    """matmat, rmatmat, shape and dense form are of one (out, in) matrix."""
    tokens = random_tokens(4)
    found = _gradient(subject, _accumulated(subject, [tokens]).statistics(), tokens)
    consistent_map(found, found.to_dense(), "G")
    out_in = (tokens.spec.out_features, tokens.spec.in_features)
    require(tuple(found.shape) == out_in, f"G has shape {found.shape}, not (out, in) = {out_in}")


def batches_and_order_do_not_matter(subject: Subject) -> None:
    """Samples come in any number of calls, tokens in any order, and a call may be empty."""
    tokens = random_tokens(5)
    whole = _of(subject, tokens)
    nothing = replace(tokens.reordered(torch.arange(0)), samples=0)
    allowed = EXACT if _is_exact(subject) or subject.make().additive else ROUGH
    parts = [tokens.of_samples([0, 1]), nothing, tokens.of_samples([2]), tokens.of_samples([3, 4, 5, 6])]
    found = _gradient(subject, _accumulated(subject, parts).statistics(), tokens).to_dense()
    close(found, whole, "G from four batches", allowed)
    order = torch.randperm(len(tokens.inputs), generator=torch.Generator().manual_seed(0))
    close(_of(subject, tokens.reordered(order)), whole, "G from shuffled tokens", allowed)


def shards_merge_to_the_whole(subject: Subject) -> None:
    """Shards give the whole in any order: by addition where additive, and by `merge`."""
    tokens = random_tokens(6)
    whole, additive = _of(subject, tokens), subject.make().additive
    allowed = EXACT if additive or _is_exact(subject) else ROUGH
    shards = [tokens.of_samples(chosen) for chosen in ([0, 5], [2, 1], [6, 3, 4])]
    for order in (shards, shards[::-1]):
        for added in {additive, False}:
            statistics = merged([_accumulated(subject, [shard]) for shard in order], additive=added)
            how = "added" if added else "merged"
            close(_gradient(subject, statistics, tokens).to_dense(), whole, f"G from three shards, {how}", allowed)


def statistics_are_finite_and_keep_the_dtype(subject: Subject) -> None:
    """Sums are finite and no smaller than asked; bfloat16 tokens lose nothing on the way in; the plan covers them."""
    tokens = random_tokens(7)
    for dtype in (torch.float64, torch.float32):
        statistics = _accumulated(subject, [tokens.to(dtype)], dtype).statistics()
        for key, value in statistics.items():
            kept = not value.is_floating_point() or torch.promote_types(value.dtype, dtype) == value.dtype
            require(kept, f"statistic {key} is in {value.dtype}, the accumulator was asked for {dtype}")
            require(bool(value.isfinite().all()), f"statistic {key} is not finite")
        taken = sum(value.numel() * value.element_size() for value in statistics.values())
        planned = subject.make().statistics_bytes(tokens.spec, itemsize=torch.finfo(dtype).bits // 8)
        require(planned >= taken, f"statistics take {taken} bytes, the plan says {planned}")
    require(_of(subject, tokens).dtype == torch.float64, "float64 sums gave a gradient of a smaller dtype")
    half = tokens.to(torch.bfloat16)
    pair = [_accumulated(subject, [part], torch.float32).statistics() for part in (half, half.to(torch.float32))]
    found, expected = (_gradient(subject, statistics, tokens).to_dense() for statistics in pair)
    close(found, expected, "G from bfloat16 tokens in float32 sums", 1e-5)


def nothing_else_is_touched(subject: Subject) -> None:
    """Inputs and statistics stay as they are, two runs agree bit by bit, and so does a stored copy."""
    tokens = random_tokens(8)
    before = [bitwise(part) for part in (tokens.inputs, tokens.output_grads, tokens.example)]
    first, second = (dict(_accumulated(subject, [tokens]).statistics()) for _ in range(2))
    after = [bitwise(part) for part in (tokens.inputs, tokens.output_grads, tokens.example)]
    require(before == after, "update() wrote to a tensor it was given")
    same_bytes(first, second, "statistics of two runs")
    found = bitwise(_gradient(subject, first, tokens).to_dense())
    same_bytes(first, second, "statistics after gradient()")
    loaded = {key: value.clone() for key, value in first.items()}
    stored = bitwise(_gradient(subject, loaded, tokens).to_dense())
    require(found == stored, "statistics that were stored and loaded give another gradient")


def global_state_is_left_alone(subject: Subject) -> None:
    """Random numbers, if any, come from a generator of one's own."""
    undisturbed(lambda: _of(subject, random_tokens(9)))


class QuadraticProbe(LossProbe):
    """Losses ½‖(W + C)x − y‖² of some layers, whose gradients are known."""

    def __init__(self, out_features: Sequence[int], in_features: Sequence[int], samples: int = 6) -> None:
        generator = torch.Generator().manual_seed(21)
        self.specs = [
            LayerSpec(f"layer{index}", "linear", size, out, 1, 1.0)
            for index, (out, size) in enumerate(zip(out_features, in_features, strict=True))
        ]
        self.data: dict[str, tuple[Tensor, Tensor]] = {}
        for spec in self.specs:
            x = torch.randn(samples, spec.in_features, generator=generator, dtype=torch.float64)
            self.data[spec.name] = (
                x,
                torch.randn(samples, spec.out_features, generator=generator, dtype=torch.float64),
            )
        self.samples = samples
        self.calls = 0

    def losses(self, changes: Mapping[str, LinearMap]) -> Tensor:
        self.calls += 1
        total = torch.zeros(self.samples, dtype=torch.float64)
        require(changes.keys() <= self.data.keys(), f"changes of unknown layers: {sorted(changes)}")
        for spec in self.specs:
            x, misfit = self.data[spec.name]
            if spec.name in changes:
                shape = (spec.out_features, spec.in_features)
                found = tuple(changes[spec.name].shape)
                require(found == shape, f"the change of {spec.name} has shape {found}, not (out, in) = {shape}")
                misfit = misfit + changes[spec.name].matmat(x.mT.to(changes[spec.name].dtype)).mT
            total = total + 0.5 * misfit.square().sum(1)
        return total

    def place(self, layer: str) -> tuple[torch.device, torch.dtype]:
        return CPU, self.data[layer][0].dtype

    def weights(self, layer: str) -> Tensor:
        x, misfit = self.data[layer]
        return misfit.mT @ x

    def gradients(self) -> dict[str, Tensor]:
        """The true G of each layer, (out, in)."""
        return {name: misfit.mT @ x / self.samples for name, (x, misfit) in self.data.items()}


def _estimated(subject: Subject, probe: QuadraticProbe, seed: int) -> dict[str, Tensor]:
    estimator: GradientEstimator[Any] = subject.make()
    sums = estimator.estimate(probe, probe.specs, generator=torch.Generator().manual_seed(seed))
    wanted = {spec.name for spec in probe.specs}
    require(sums.keys() == wanted, f"estimate() returned layers {sorted(sums)}, not {sorted(wanted)}")
    found = {}
    for spec in probe.specs:
        result = estimator.gradient(sums[spec.name], spec, samples=probe.samples)
        require(isinstance(result, LinearMap), f"gradient() returned {type(result).__name__}, which is no LinearMap")
        consistent_map(result, result.to_dense(), "G")
        found[spec.name] = result.to_dense().double()
    return found


def forward_gradient_is_right_on_average(subject: Subject) -> None:
    """On a quadratic loss the average over seeds approaches the gradient as fast as its scatter allows."""
    probe = QuadraticProbe((2, 1), (3, 2))
    runs = [_estimated(subject, probe, seed) for seed in range(PROBE_RUNS)]
    for name, expected in probe.gradients().items():
        draws = torch.stack([run[name] for run in runs])
        require(draws.shape[1:] == expected.shape, f"G of {name} has shape {tuple(draws.shape[1:])}")
        error = float((draws.mean(0) - expected).norm())
        scatter = float((draws.var(0).sum() / PROBE_RUNS).sqrt())
        allowed = STANDARD_ERRORS * scatter + 1e-3 * float(expected.norm())
        require(error <= allowed, f"the average of {name} is off by {error:.3g}; its scatter explains {allowed:.3g}")
        shares = (draws * expected).sum((1, 2)) / expected.square().sum()
        share, doubt = float(shares.mean()), STANDARD_ERRORS * float((shares.var() / PROBE_RUNS).sqrt())
        size = f"the average of {name} is {share:.3g} ± {doubt:.2g} times the gradient along it"
        require(abs(share - 1) <= doubt + 1e-3 and doubt < 0.7, f"{size}; it must be once, and surely so")


def forward_estimates_depend_on_the_generator_alone(subject: Subject) -> None:
    """Same seed, same bytes; the global state stays."""
    probe = QuadraticProbe((2, 1), (3, 2))
    first, second = (_estimated(subject, probe, 1) for _ in range(2))
    same_bytes(first, second, "two estimates with one seed")
    undisturbed(lambda: _estimated(subject, probe, 2))
    require(probe.calls > 0, "estimate() never asked the probe for losses")


def targets_depend_on_model_and_generator_alone(subject: Subject) -> None:
    """Finite, of the layer's shape, the same for the same seed, and nothing global is touched."""
    require(subject.make().forward_only, "an estimator that does not follow the loss must be forward-only")
    probe = QuadraticProbe((2, 1), (3, 2))
    first, second = (_estimated(subject, probe, 1) for _ in range(2))
    same_bytes(first, second, "two estimates with one seed")
    for spec in probe.specs:
        shape = (spec.out_features, spec.in_features)
        require(tuple(first[spec.name].shape) == shape, f"G of {spec.name} is not (out, in) = {shape}")
        require(bool(first[spec.name].isfinite().all()), f"G of {spec.name} is not finite")
    undisturbed(lambda: _estimated(subject, probe, 2))


_BACKWARD_CHECKS = (
    declares_itself,
    gradient_is_the_mean_over_samples,
    rank_one_gradients_are_exact,
    products_agree,
    batches_and_order_do_not_matter,
    shards_merge_to_the_whole,
    statistics_are_finite_and_keep_the_dtype,
    nothing_else_is_touched,
    global_state_is_left_alone,
    gradient_takes_places,
)
_FORWARD_CHECKS = (
    declares_itself,
    forward_gradient_is_right_on_average,
    forward_estimates_depend_on_the_generator_alone,
)
_TARGET_CHECKS = (declares_itself, targets_depend_on_model_and_generator_alone)
