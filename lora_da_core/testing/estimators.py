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
from lora_da_core.testing.accumulators import (
    INVERSION,
    SCALES,
    SIZES,
    batches_do_not_matter,
    copied,
    data_read_twice_change_nothing,
    empty_batches_are_accepted,
    fisher_from,
    fisher_of,
    global_state_is_left_alone,
    inputs_are_not_modified,
    later_changes_of_the_inputs_do_not_matter,
    matrix_from,
    matrix_of,
    planned_bytes_cover_the_statistics,
    same_inputs_give_same_bytes,
    shards_merge_to_the_whole,
    statistics_suffice,
    sums_are_divided_by_the_right_count,
    token_order_does_not_matter,
)
from lora_da_core.testing.data import (
    EXACT,
    Check,
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
    random_tokens,
    require,
    same_bytes,
)
from lora_da_core.testing.one_hot import fisher_takes_places
from lora_da_core.types import DampingKind

DAMPINGS: tuple[tuple[float, DampingKind], ...] = ((0.01, "relative"), (0.02, "absolute"))
SINGLE = 2e-3
"""Relative error allowed to sums in float32."""


def checks(cls: type[FisherEstimator[Any]], options: Mapping[str, Any]) -> Iterator[Check]:
    """All checks of an estimator, as (name, callable).

    Args:
        cls: The estimator.
        options: Its options; a sketch must be large enough for the gradients of two samples.

    Returns:
        An iterator.
    """
    return checks_of(Subject(cls, options), _CHECKS)


def _cases(subject: Subject) -> Iterator[tuple[LayerFisher, Tokens, str]]:
    for out_features, in_features in SIZES:
        for damping, kind in DAMPINGS:
            for scale in SCALES:
                tokens = random_tokens(0, out_features, in_features)
                fisher = fisher_of(subject, tokens, damping=damping, damping_kind=kind, fisher_scale=scale)
                yield fisher, tokens, f"layer {out_features}×{in_features}, {kind} damping, {scale}"


def declares_what_it_needs(subject: Subject) -> None:
    """Properties have the types the core expects, and accumulators run without what is said not to be needed."""
    estimator: FisherEstimator[Any] = subject.make()
    require(isinstance(estimator.passes, int) and estimator.passes >= 1, f"passes is {estimator.passes!r}")
    require(isinstance(estimator.needs_output_grads, bool), "needs_output_grads is no bool")
    require(isinstance(estimator.additive, bool), "additive is no bool")
    require(estimator.labels in ("empirical", "sampled", "exact"), f"labels is {estimator.labels!r}")
    fisher = fisher_of(subject, random_tokens(0))
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
            fisher = fisher_from(subject, statistics, damping=damping, damping_kind=kind)
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
    fisher = fisher_of(subject, tokens)
    results = {"solve": fisher.solve(tokens.gradient()), "apply": fisher.apply(tokens.gradient())}
    results |= {"V": fisher.inverse_input_trace().to_dense()}
    for name, value in results.items():
        require(value.dtype == torch.float64, f"{name} is in {value.dtype}, though everything given was float64")


def float32_and_bfloat16_inputs_are_summed_in_the_asked_dtype(subject: Subject) -> None:
    """Float32 sums give J to single precision, and a bfloat16 model's tensors lose nothing on the way in."""
    tokens = random_tokens(4)
    single = collect(subject.make(), [[tokens.to(torch.float32)]], dtype=torch.float32)
    close(matrix_from(subject, single), matrix_of(subject, tokens), "J from float32 sums", SINGLE)
    rounded = tokens.to(torch.bfloat16)
    half = collect(subject.make(), [[rounded]], dtype=torch.float32)
    upcast = collect(subject.make(), [[rounded.to(torch.float32)]], dtype=torch.float32)
    close(matrix_from(subject, half), matrix_from(subject, upcast), "J from bfloat16 tokens in float32 sums", 1e-5)


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
                expected = matrix_from(subject, replace(fresh, shared={}), **settings)
                found = matrix_from(subject, replace(fresh, shared=scratch), **settings)
                close(found, expected, f"with a used `shared` ({settings}, out {chosen.spec.out_features})", EXACT)


def fisher_leaves_the_statistics_alone(subject: Subject) -> None:
    """Damping can be swept: neither `fisher` nor its results write to the sums."""
    tokens = random_tokens(6)
    statistics = collect(subject.make(), [[tokens]])
    before = {side: copied(getattr(statistics, side)) for side in ("input", "layer")}
    for damping in (0.01, 1.0):
        fisher, gradient = fisher_from(subject, statistics, damping=damping), tokens.gradient()
        kept = bitwise(gradient)
        fisher.solve(gradient)
        fisher.apply(gradient)
        fisher.step(DenseMap(gradient)).to_dense()
        fisher.inverse_input_trace().to_dense()
        require(bitwise(gradient) == kept, "the gradient was modified")
    for side, kept_side in before.items():
        same_bytes(getattr(statistics, side), kept_side, f"the {side} statistics after fisher()")


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
