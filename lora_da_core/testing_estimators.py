"""What every Fisher estimator must fulfil, as checks on small layers whose Fisher can be written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora_da_core.interfaces import FisherEstimator, LayerFisher
from lora_da_core.operators import DenseMap, LowRankMap
from lora_da_core.testing_data import (
    EXACT,
    Check,
    Shard,
    Subject,
    Tokens,
    bitwise,
    checks_of,
    close,
    collect,
    consistent_map,
    declares_itself,
    dense_matrix,
    layer,
    orthonormal_tokens,
    random_tokens,
    require,
    same_bytes,
    undisturbed,
)
from lora_da_core.testing_one_hot import fisher_takes_places
from lora_da_core.types import DampingKind, FisherScale, FisherStatistics

DAMPINGS: tuple[tuple[float, DampingKind], ...] = ((0.01, "relative"), (0.02, "absolute"))
SCALES: tuple[FisherScale, ...] = ("token_mean", "sample")
SIZES = ((4, 5), (6, 3), (1, 2))
INVERSION = 1e-7
"""Relative error allowed to inverses: damping bounds the condition of J in all checks."""
SINGLE = 2e-3
"""Relative error allowed to sums in float32."""
SKETCH = 0.4
"""How far merged shards may lie from the whole, relative to it, where the estimator does not add."""


def checks(cls: type[FisherEstimator[Any]], options: Mapping[str, Any]) -> Iterator[Check]:
    """All checks of an estimator, as (name, callable).

    Args:
        cls: The estimator.
        options: Its options; a sketch must be large enough for the gradients of two samples.

    Returns:
        An iterator.
    """
    return checks_of(Subject(cls, options), _CHECKS)


def _fisher(
    subject: Subject,
    statistics: FisherStatistics,
    damping: float = 0.01,
    damping_kind: DampingKind = "relative",
    fisher_scale: FisherScale = "token_mean",
) -> LayerFisher:
    fisher = subject.make().fisher(statistics, damping=damping, damping_kind=damping_kind, fisher_scale=fisher_scale)
    require(isinstance(fisher, LayerFisher), f"fisher() returned {type(fisher).__name__}, which is no LayerFisher")
    result: LayerFisher = fisher
    return result


def _of(subject: Subject, tokens: Tokens, **settings: Any) -> LayerFisher:
    return _fisher(subject, collect(subject.make(), [[tokens]]), **settings)


def _matrix(subject: Subject, statistics: FisherStatistics, **settings: Any) -> Tensor:
    return dense_matrix(_fisher(subject, statistics, **settings).apply, statistics.spec)


def _matrix_of(subject: Subject, tokens: Tokens, **settings: Any) -> Tensor:
    return _matrix(subject, collect(subject.make(), [[tokens]]), **settings)


def _cases(subject: Subject) -> Iterator[tuple[LayerFisher, Tokens, str]]:
    for out_features, in_features in SIZES:
        for damping, kind in DAMPINGS:
            for scale in SCALES:
                tokens = random_tokens(0, out_features, in_features)
                fisher = _of(subject, tokens, damping=damping, damping_kind=kind, fisher_scale=scale)
                yield fisher, tokens, f"layer {out_features}×{in_features}, {kind} damping, {scale}"


def declares_what_it_needs(subject: Subject) -> None:
    """Properties have the types the core expects, and accumulators run without what is said not to be needed."""
    estimator: FisherEstimator[Any] = subject.make()
    require(isinstance(estimator.passes, int) and estimator.passes >= 1, f"passes is {estimator.passes!r}")
    require(isinstance(estimator.needs_output_grads, bool), "needs_output_grads is no bool")
    require(isinstance(estimator.additive, bool), "additive is no bool")
    require(estimator.labels in ("empirical", "sampled", "exact"), f"labels is {estimator.labels!r}")
    fisher = _of(subject, random_tokens(0))
    numbers = all(isinstance(value, (int, float)) and value == value for value in fisher.damping.values())
    require(numbers, f"LayerFisher.damping is {dict(fisher.damping)}; it must hold numbers")
    require(all(isinstance(text, str) for text in fisher.remedies), "LayerFisher.remedies must hold strings")


def fisher_is_symmetric_positive_definite(subject: Subject) -> None:
    """J and its inverse are symmetric and positive definite, for every damping and scale."""
    for fisher, tokens, case in _cases(subject):
        for name, product in (("apply", fisher.apply), ("solve", fisher.solve)):
            matrix = dense_matrix(product, tokens.spec)
            require(bool(matrix.isfinite().all()), f"{name} gives NaN or Inf ({case})")
            close(matrix.mT, matrix, f"{name} is not symmetric ({case})", INVERSION)
            least = float(torch.linalg.eigvalsh(0.5 * (matrix + matrix.mT))[0])
            require(least > 0, f"{name} is not positive definite: eigenvalue {least:.3g} ({case})")


def solve_is_the_inverse_of_apply(subject: Subject) -> None:
    """J⁻¹J = JJ⁻¹ = I."""
    for fisher, tokens, case in _cases(subject):
        gradient = tokens.gradient()
        close(fisher.apply(fisher.solve(gradient)), gradient, f"apply(solve(G)) is not G ({case})", INVERSION)
        close(fisher.solve(fisher.apply(gradient)), gradient, f"solve(apply(G)) is not G ({case})", INVERSION)
        inverse = torch.linalg.inv(dense_matrix(fisher.apply, tokens.spec))
        close(dense_matrix(fisher.solve, tokens.spec), inverse, f"solve is not J⁻¹ ({case})", INVERSION)


def variance_is_the_partial_trace(subject: Subject) -> None:
    """V = Σ_o (J⁻¹)[o, :, o, :], by all that an operator offers."""
    generator = torch.Generator().manual_seed(1)
    for fisher, tokens, case in _cases(subject):
        out, size = tokens.spec.out_features, tokens.spec.in_features
        inverse = dense_matrix(fisher.solve, tokens.spec).view(out, size, out, size)
        expected = torch.einsum("oioj->ij", inverse)
        variance = fisher.inverse_input_trace()
        require(variance.size == size, f"V has order {variance.size}, not {size} ({case})")
        block = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        close(variance.matmat(block.to(variance.dtype)), expected @ block, f"V·X ({case})", INVERSION)
        close(variance.to_dense(), expected, f"V, formed ({case})", INVERSION)
        close(variance.diagonal(), expected.diagonal(), f"V's diagonal ({case})", INVERSION)
        close(variance.trace(), expected.trace(), f"V's trace ({case})", INVERSION)
        precondition = variance.preconditioner(float(expected.trace()))
        if precondition is not None:
            shifted = expected + float(expected.trace()) * torch.eye(size, dtype=torch.float64)
            found = precondition(block.to(variance.dtype))
            close(found, torch.linalg.solve(shifted, block), f"V's preconditioner ({case})", INVERSION)


def step_is_the_solved_gradient(subject: Subject) -> None:
    """Δ_raw = −(J⁻¹G)ᵀ by matmat, rmatmat and formed, in V's dtype, for dense and low-rank gradients."""
    generator = torch.Generator().manual_seed(2)
    for fisher, tokens, case in _cases(subject):
        left = torch.randn(tokens.spec.out_features, 2, generator=generator, dtype=torch.float64)
        right = torch.randn(tokens.spec.in_features, 2, generator=generator, dtype=torch.float64)
        for gradient in (DenseMap(tokens.gradient()), LowRankMap(left, right)):
            step = fisher.step(gradient)
            consistent_map(step, -fisher.solve(gradient.to_dense()).mT, f"the step ({case})", INVERSION)
            variance = fisher.inverse_input_trace()
            agree = (step.dtype, step.device) == (variance.dtype, variance.device)
            require(agree, f"the step is in {step.dtype} and V in {variance.dtype}; they must agree ({case})")


def damping_lowers_the_variance(subject: Subject) -> None:
    """More damping, smaller V."""
    statistics = collect(subject.make(), [[random_tokens(3)]])
    for kind in ("relative", "absolute"):
        traces = []
        for damping in (1e-3, 1e-2, 1e-1, 1.0):
            fisher = _fisher(subject, statistics, damping=damping, damping_kind=kind)
            traces.append(float(fisher.inverse_input_trace().trace()))
        falling = all(later < earlier for earlier, later in pairwise(traces))
        require(falling, f"V's trace does not fall as {kind} damping grows: {traces}")


def statistics_are_finite_and_keep_the_dtype(subject: Subject) -> None:
    """Sums are finite tensors, no smaller than the dtype asked for, and float64 reaches the results."""
    for dtype in (torch.float64, torch.float32):
        statistics = collect(subject.make(), [[random_tokens(0).to(dtype)]], dtype=dtype)
        for key, value in (*statistics.input.items(), *statistics.layer.items()):
            require(isinstance(value, Tensor), f"statistic {key} is no tensor")
            require(bool(value.isfinite().all()), f"statistic {key} is not finite")
            kept = not value.is_floating_point() or torch.promote_types(value.dtype, dtype) == value.dtype
            require(kept, f"statistic {key} is in {value.dtype}, the accumulator was asked for {dtype}")
            require(not value.requires_grad, f"statistic {key} carries an autograd graph")
    tokens = random_tokens(0)
    fisher = _of(subject, tokens)
    results = {"solve": fisher.solve(tokens.gradient()), "apply": fisher.apply(tokens.gradient())}
    results |= {"V": fisher.inverse_input_trace().to_dense()}
    for name, value in results.items():
        require(value.dtype == torch.float64, f"{name} is in {value.dtype}, though everything given was float64")


def float32_and_bfloat16_inputs_are_summed_in_the_asked_dtype(subject: Subject) -> None:
    """Float32 sums give J to single precision, and a bfloat16 model's tensors lose nothing on the way in."""
    tokens = random_tokens(4)
    single = collect(subject.make(), [[tokens.to(torch.float32)]], dtype=torch.float32)
    close(_matrix(subject, single), _matrix_of(subject, tokens), "J from float32 sums", SINGLE)
    rounded = tokens.to(torch.bfloat16)
    half = collect(subject.make(), [[rounded]], dtype=torch.float32)
    upcast = collect(subject.make(), [[rounded.to(torch.float32)]], dtype=torch.float32)
    close(_matrix(subject, half), _matrix(subject, upcast), "J from bfloat16 tokens in float32 sums", 1e-5)


def shared_scratch_names_what_it_depends_on(subject: Subject) -> None:
    """A value kept in `shared` for one damping, scale or layer is not taken for another."""
    tokens = random_tokens(5)
    narrow = replace(tokens, spec=layer(3, 5), output_grads=3 * tokens.output_grads[:, :3])
    scratch: dict[Any, Any] = {}
    for chosen in (tokens, narrow, tokens):
        fresh = collect(subject.make(), [[chosen]])
        for damping, kind in ((0.01, "relative"), (0.5, "relative"), (0.5, "absolute")):
            for scale in SCALES:
                settings: dict[str, Any] = {"damping": damping, "damping_kind": kind, "fisher_scale": scale}
                expected = _matrix(subject, replace(fresh, shared={}), **settings)
                found = _matrix(subject, replace(fresh, shared=scratch), **settings)
                close(found, expected, f"with a used `shared` ({settings}, out {chosen.spec.out_features})", EXACT)


def fisher_leaves_the_statistics_alone(subject: Subject) -> None:
    """Damping can be swept: neither `fisher` nor its results write to the sums."""
    tokens = random_tokens(6)
    statistics = collect(subject.make(), [[tokens]])
    before = {side: _copied(getattr(statistics, side)) for side in ("input", "layer")}
    for damping in (0.01, 1.0):
        fisher, gradient = _fisher(subject, statistics, damping=damping), tokens.gradient()
        kept = bitwise(gradient)
        fisher.solve(gradient)
        fisher.apply(gradient)
        fisher.step(DenseMap(gradient)).to_dense()
        fisher.inverse_input_trace().to_dense()
        require(bitwise(gradient) == kept, "the gradient was modified")
    for side, copied in before.items():
        same_bytes(getattr(statistics, side), copied, f"the {side} statistics after fisher()")


def batches_do_not_matter(subject: Subject) -> None:
    """Samples come in any number of calls; their numbers start anew in each and may have gaps."""
    tokens = random_tokens(7)
    whole = _matrix_of(subject, tokens)
    parts = [tokens.of_samples(chosen) for chosen in ([0, 1], [2], [3, 4, 5, 6])]
    close(_matrix(subject, collect(subject.make(), [parts])), whole, "J from three batches")
    gaps = replace(tokens, example=3 * tokens.example + 1)
    close(_matrix(subject, collect(subject.make(), [[gaps]])), whole, "J where sample numbers have gaps")


def shards_merge_to_the_whole(subject: Subject) -> None:
    """Shards give the whole in any order: by addition where additive, and by `merge`.

    An estimator that is not additive must be exact for two samples, and near the whole for more.
    """
    additive = subject.make().additive
    for chosen in [[0, 1, 2, 3, 4, 5, 6]] if additive else [[0, 2], [0, 1, 2, 3, 4, 5, 6]]:
        tokens = random_tokens(8).of_samples(chosen)
        whole = _matrix_of(subject, tokens)
        allowed = EXACT if additive or len(chosen) == 2 else SKETCH
        halves = [[[0]], [[1]]] if len(chosen) == 2 else [[[0, 1], [5]], [[2]], [[6, 3, 4]]]
        shards = [[tokens.of_samples(batch) for batch in shard] for shard in halves]
        for order in (shards, shards[::-1]):
            for by_merge in {not additive, True}:
                statistics = collect(subject.make(), order, by_merge=by_merge)
                how = "merged" if by_merge else "added"
                found = _matrix(subject, statistics)
                close(found, whole, f"J from {len(order)} shards of {len(chosen)} samples, {how}", allowed)
                close(found.mT, found, "merged J is not symmetric", INVERSION)
                require(float(torch.linalg.eigvalsh(found)[0]) > 0, "merged J is not positive definite")


def token_order_does_not_matter(subject: Subject) -> None:
    """Tokens of a call may come in any order, samples interleaved, as layers used twice deliver them."""
    tokens = random_tokens(9)
    whole = _matrix_of(subject, tokens)
    order = torch.randperm(len(tokens.inputs), generator=torch.Generator().manual_seed(0))
    close(_matrix_of(subject, tokens.reordered(order)), whole, "J from shuffled tokens")


def empty_batches_are_accepted(subject: Subject) -> None:
    """A batch of which no token passed the mask changes nothing but the number of samples."""
    tokens = random_tokens(10)
    nothing = replace(tokens.reordered(torch.arange(0)), samples=0)
    whole = _matrix_of(subject, tokens)
    for batches in ([nothing, tokens], [tokens, nothing]):
        close(_matrix(subject, collect(subject.make(), [batches])), whole, "J with an empty batch")


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
    expected = _matrix(subject, collect(subject.make(), [[tokens, tokens]]))
    statistics = collect(subject.make(), [[tokens, tokens]], reuse_buffers=True)
    close(_matrix(subject, statistics), expected, "J after the caller reused its buffers")


def same_inputs_give_same_bytes(subject: Subject) -> None:
    """Nothing depends on chance or on an earlier use."""
    tokens = random_tokens(12)
    runs = [collect(subject.make(), [[tokens]]) for _ in range(2)]
    same_bytes(runs[0].input, runs[1].input, "input statistics of two runs")
    same_bytes(runs[0].layer, runs[1].layer, "layer statistics of two runs")
    solved = [bitwise(_fisher(subject, run).solve(tokens.gradient())) for run in runs]
    require(solved[0] == solved[1], "two runs solve differently")


def global_state_is_left_alone(subject: Subject) -> None:
    """Random numbers, if any, come from a generator of one's own."""
    undisturbed(lambda: _matrix_of(subject, random_tokens(13)))


def statistics_suffice(subject: Subject) -> None:
    """Stored and loaded statistics give the same Fisher through a new instance."""
    tokens = random_tokens(14)
    found = collect(subject.make(), [[tokens]])
    loaded = FisherStatistics(
        found.spec, _copied(found.input), _copied(found.layer), samples=found.samples, tokens=found.tokens
    )
    first, second = (_fisher(subject, statistics).solve(tokens.gradient()) for statistics in (found, loaded))
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
        once = _matrix_of(subject, tokens, fisher_scale=scale)
        twice = _matrix(subject, collect(subject.make(), [[tokens, tokens]]), fisher_scale=scale)
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
    return float(_matrix_of(subject, tokens, **settings).trace())


def _copied(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone().contiguous() for key, value in statistics.items()}


def _bytes(statistics: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in statistics.values())


_CHECKS = (
    declares_itself,
    declares_what_it_needs,
    fisher_is_symmetric_positive_definite,
    solve_is_the_inverse_of_apply,
    variance_is_the_partial_trace,
    step_is_the_solved_gradient,
    damping_lowers_the_variance,
    statistics_are_finite_and_keep_the_dtype,
    float32_and_bfloat16_inputs_are_summed_in_the_asked_dtype,
    shared_scratch_names_what_it_depends_on,
    fisher_leaves_the_statistics_alone,
    batches_do_not_matter,
    shards_merge_to_the_whole,
    token_order_does_not_matter,
    empty_batches_are_accepted,
    inputs_are_not_modified,
    later_changes_of_the_inputs_do_not_matter,
    same_inputs_give_same_bytes,
    global_state_is_left_alone,
    statistics_suffice,
    planned_bytes_cover_the_statistics,
    data_read_twice_change_nothing,
    sums_are_divided_by_the_right_count,
    fisher_takes_places,
)
