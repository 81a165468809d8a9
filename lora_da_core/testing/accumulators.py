"""What every Fisher estimator's sums must fulfil, as checks on small layers; and the Fisher of small layers' tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_da_core.interfaces import LayerFisher
from lora_da_core.testing.data import (
    EXACT,
    Shard,
    Subject,
    Tokens,
    bitwise,
    close,
    collect,
    dense_matrix,
    orthonormal_tokens,
    random_tokens,
    require,
    same_bytes,
    undisturbed,
)
from lora_da_core.types import DampingKind, FisherScale, FisherStatistics

SCALES: tuple[FisherScale, ...] = ("token_mean", "sample")
SIZES = ((4, 5), (6, 3), (1, 2))
INVERSION = 1e-7
"""Relative error allowed to inverses: damping bounds the condition of J in all checks."""
SKETCH = 0.4
"""How far merged shards may lie from the whole, relative to it, where the estimator does not add."""


def fisher_from(
    subject: Subject,
    statistics: FisherStatistics,
    damping: float = 0.01,
    damping_kind: DampingKind = "relative",
    fisher_scale: FisherScale = "token_mean",
) -> LayerFisher:
    """The Fisher of statistics; what is none is refused."""
    fisher = subject.make().fisher(statistics, damping=damping, damping_kind=damping_kind, fisher_scale=fisher_scale)
    require(isinstance(fisher, LayerFisher), f"fisher() returned {type(fisher).__name__}, which is no LayerFisher")
    result: LayerFisher = fisher
    return result


def fisher_of(subject: Subject, tokens: Tokens, **settings: Any) -> LayerFisher:
    """The Fisher of tokens that come in one call."""
    return fisher_from(subject, collect(subject.make(), [[tokens]]), **settings)


def matrix_from(subject: Subject, statistics: FisherStatistics, **settings: Any) -> Tensor:
    """J of statistics, written out."""
    return dense_matrix(fisher_from(subject, statistics, **settings).apply, statistics.spec)


def matrix_of(subject: Subject, tokens: Tokens, **settings: Any) -> Tensor:
    """J of tokens that come in one call, written out."""
    return matrix_from(subject, collect(subject.make(), [[tokens]]), **settings)


def batches_do_not_matter(subject: Subject) -> None:
    """Samples come in any number of calls; their numbers start anew in each and may have gaps."""
    tokens = random_tokens(7)
    whole = matrix_of(subject, tokens)
    parts = [tokens.of_samples(chosen) for chosen in ([0, 1], [2], [3, 4, 5, 6])]
    close(matrix_from(subject, collect(subject.make(), [parts])), whole, "J from three batches")
    gaps = replace(tokens, example=3 * tokens.example + 1)
    close(matrix_from(subject, collect(subject.make(), [[gaps]])), whole, "J where sample numbers have gaps")


def shards_merge_to_the_whole(subject: Subject) -> None:
    """Shards give the whole in any order: by addition where additive, and by `merge`.

    An estimator that is not additive must be exact for two samples, and near the whole for more.
    """
    additive = subject.make().additive
    for chosen in [[0, 1, 2, 3, 4, 5, 6]] if additive else [[0, 2], [0, 1, 2, 3, 4, 5, 6]]:
        tokens = random_tokens(8).of_samples(chosen)
        whole = matrix_of(subject, tokens)
        allowed = EXACT if additive or len(chosen) == 2 else SKETCH
        halves = [[[0]], [[1]]] if len(chosen) == 2 else [[[0, 1], [5]], [[2]], [[6, 3, 4]]]
        shards = [[tokens.of_samples(batch) for batch in shard] for shard in halves]
        for order in (shards, shards[::-1]):
            for by_merge in {not additive, True}:
                statistics = collect(subject.make(), order, by_merge=by_merge)
                how = "merged" if by_merge else "added"
                found = matrix_from(subject, statistics)
                close(found, whole, f"J from {len(order)} shards of {len(chosen)} samples, {how}", allowed)
                close(found.mT, found, "merged J is not symmetric", INVERSION)
                require(float(torch.linalg.eigvalsh(found)[0]) > 0, "merged J is not positive definite")


def token_order_does_not_matter(subject: Subject) -> None:
    """Tokens of a call may come in any order, samples interleaved, as layers used twice deliver them."""
    tokens = random_tokens(9)
    whole = matrix_of(subject, tokens)
    order = torch.randperm(len(tokens.inputs), generator=torch.Generator().manual_seed(0))
    close(matrix_of(subject, tokens.reordered(order)), whole, "J from shuffled tokens")


def empty_batches_are_accepted(subject: Subject) -> None:
    """A batch of which no token passed the mask changes nothing but the number of samples."""
    tokens = random_tokens(10)
    nothing = replace(tokens.reordered(torch.arange(0)), samples=0)
    whole = matrix_of(subject, tokens)
    for batches in ([nothing, tokens], [tokens, nothing]):
        close(matrix_from(subject, collect(subject.make(), [batches])), whole, "J with an empty batch")


def inputs_are_not_modified(subject: Subject) -> None:
    """The tensors belong to the model's graph."""
    tokens = random_tokens(11)
    before = [bitwise(part) for part in (tokens.inputs, tokens.output_grads, tokens.example)]
    collect(subject.make(), [[tokens, tokens]])
    after = [bitwise(part) for part in (tokens.inputs, tokens.output_grads, tokens.example)]
    require(before == after, "update() wrote to a tensor it was given")


def later_changes_of_the_inputs_do_not_matter(subject: Subject) -> None:
    """What is kept is a copy: the caller may reuse its buffers."""
    tokens = random_tokens(11)
    expected = matrix_from(subject, collect(subject.make(), [[tokens, tokens]]))
    statistics = collect(subject.make(), [[tokens, tokens]], reuse_buffers=True)
    close(matrix_from(subject, statistics), expected, "J after the caller reused its buffers")


def same_inputs_give_same_bytes(subject: Subject) -> None:
    """Nothing depends on chance or on an earlier use."""
    tokens = random_tokens(12)
    runs = [collect(subject.make(), [[tokens]]) for _ in range(2)]
    same_bytes(runs[0].input, runs[1].input, "input statistics of two runs")
    same_bytes(runs[0].layer, runs[1].layer, "layer statistics of two runs")
    solved = [bitwise(fisher_from(subject, run).solve(tokens.gradient())) for run in runs]
    require(solved[0] == solved[1], "two runs solve differently")


def global_state_is_left_alone(subject: Subject) -> None:
    """Random numbers, if any, come from a generator of one's own."""
    undisturbed(lambda: matrix_of(subject, random_tokens(13)))


def statistics_suffice(subject: Subject) -> None:
    """Stored and loaded statistics give the same Fisher through a new instance."""
    tokens = random_tokens(14)
    found = collect(subject.make(), [[tokens]])
    loaded = FisherStatistics(
        found.spec, copied(found.input), copied(found.layer), samples=found.samples, tokens=found.tokens
    )
    first, second = (fisher_from(subject, statistics).solve(tokens.gradient()) for statistics in (found, loaded))
    # A stored tensor comes back row-major, so products may round differently.
    close(second, first, "statistics that were stored and loaded give another Fisher", 1e-12)


def planned_bytes_cover_the_statistics(subject: Subject) -> None:
    """`statistics_bytes` is no less than what the statistics take."""
    for out_features, in_features in SIZES:
        tokens = random_tokens(15, out_features, in_features)
        estimator = subject.make()
        worker = Shard.of(estimator, tokens.spec, torch.float64)
        statistics = collect(estimator, [[tokens]])
        plan = estimator.statistics_bytes(tokens.spec, samples=tokens.samples, tokens=len(tokens.inputs), itemsize=8)
        sides = {"input": (worker.input, statistics.input), "layer": (worker.layer, statistics.layer)}
        for planned, (side, (fresh, found)) in zip(plan, sides.items(), strict=True):
            taken = max(_bytes(found), _bytes(fresh.statistics()))
            require(planned >= taken, f"{side} statistics take {taken} bytes, the plan says {planned}")


def data_read_twice_change_nothing(subject: Subject) -> None:
    """J is a mean: the same samples once more leave it as it was."""
    tokens = random_tokens(16).of_samples([0, 2])
    for scale in SCALES:
        once = matrix_of(subject, tokens, fisher_scale=scale)
        twice = matrix_from(subject, collect(subject.make(), [[tokens, tokens]]), fisher_scale=scale)
        close(twice, once, f"J of data read twice ({scale})", 1e-6)


def sums_are_divided_by_the_right_count(subject: Subject) -> None:
    """With T orthonormal tokens a sample, J is T times larger per sample than per token.

    `fisher_scale="sample"` asks for the former; `"token_mean"` may give either. A Fisher that does not depend on
    output gradients depends on no count either.
    """
    count = 3
    one, many = (orthonormal_tokens(tokens_per_sample) for tokens_per_sample in (1, count))
    doubled = replace(one, output_grads=2 * one.output_grads)
    growth = _trace(subject, doubled) / _trace(subject, one)
    allowed = {"token_mean": (1.0, float(count)), "sample": (float(count),)}
    if abs(growth - 1) < 1e-6:
        allowed = {"token_mean": (1.0,), "sample": (1.0,)}
    else:
        require(abs(growth - 4) < 1e-5, f"twice the output gradients make J {growth:.4g} times larger, not 4 times")
    for scale in SCALES:
        ratio = _trace(subject, many, fisher_scale=scale) / _trace(subject, one, fisher_scale=scale)
        good = any(abs(ratio - value) < 1e-5 for value in allowed[scale])
        require(good, f"{count} tokens a sample make J {ratio:.4g} times larger; {scale} allows {allowed[scale]}")


def _trace(subject: Subject, tokens: Tokens, **settings: Any) -> float:
    return float(matrix_of(subject, tokens, **settings).trace())


def copied(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics as they would come back from a file: contiguous tensors of their own."""
    return {key: value.detach().clone().contiguous() for key, value in statistics.items()}


def _bytes(statistics: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in statistics.values())
