"""Pure maths between a layer's Fisher and its factors: Δ, Ω, and eigenvectors to A and B (arXiv 2510.24561)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_da_core.factorisations import svd
from lora_da_core.interfaces import LayerFisher
from lora_da_core.operators import Dense, DenseMap, LinearMap, NegatedGram, Scaled, Sum, SymmetricOperator
from lora_da_core.types import Curvature, LoraFactors, Pairing, Spectrum

DENSE_STEP_ELEMENTS = 2**22
"""Up to this many elements Δ_raw is formed: fewer products per application than through the Fisher's factors."""

ACCELERATOR_STEP_ELEMENTS = 2**26
"""The same on an accelerator, where a skinny product takes long for what it computes and a square one does not."""

ACCELERATOR_OMEGA_ELEMENTS = 2**27
"""Up to this many elements Ω is stored on an accelerator, where Δ_raw is: one product an application, not three."""

DEFAULT_A_SCALE = 3.0**-0.5
"""RMS ratio between a default LoRA's A (uniform, ±1/√in) and an orthonormal one: both have r rows."""

A_SCALE_RANGE = 16.0
"""How far, as a factor, a layer's A may be from `DEFAULT_A_SCALE`: a basis that the inputs hardly touch says little."""

LEAST_SHARE = 1e-3
"""Least singular value of an evenly divided step that A sees, relative to the largest: a zero row would never train."""


class Omega(Sum):
    """σ²Ω = −αΔ_rawΔ_rawᵀ + (β/N)V, whose eigenvectors are Ω's; its values are σ² times Ω's."""

    def __init__(self, bias: SymmetricOperator | None, variance: SymmetricOperator | None) -> None:
        super().__init__([term for term in (bias, variance) if term is not None])
        self.variance = variance

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        """(βV/N + shift)⁻¹ where V offers it: the bias term has low rank and may be left out."""
        return None if self.variance is None else self.variance.preconditioner(shift)


class StoredOmega(Dense):
    """σ²Ω as a matrix; its preconditioner is that of its terms."""

    def __init__(self, matrix: Tensor, terms: Omega) -> None:
        super().__init__(matrix)
        self._terms = terms

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        return self._terms.preconditioner(shift)


def stored(operators: Sequence[Omega]) -> tuple[Dense, list[StoredOmega]]:
    """Several Ω of one order, dtype and device as one stored batch, and each of them as a part of it."""
    first = operators[0]
    whole = torch.empty(len(operators), first.size, first.size, dtype=first.dtype, device=first.device)
    for matrix, operator in zip(whole, operators, strict=True):
        matrix.copy_(operator.to_dense())
    return Dense(whole), [StoredOmega(matrix, terms) for matrix, terms in zip(whole, operators, strict=True)]


def forms_omega(rows: int, columns: int, device: torch.device) -> bool:
    """Whether Ω of a Δ_raw (rows, columns) on that device is stored for its products."""
    accelerated = device.type != "cpu"
    return accelerated and forms_step(rows, columns, device) and rows**2 <= ACCELERATOR_OMEGA_ELEMENTS


def forms_step(rows: int, columns: int, device: torch.device) -> bool:
    """Whether a Δ_raw (rows, columns) on that device is small enough to be stored for its products."""
    return rows * columns <= (DENSE_STEP_ELEMENTS if device.type == "cpu" else ACCELERATOR_STEP_ELEMENTS)


def formed(step: LinearMap) -> LinearMap:
    """Δ_raw as a stored matrix where it is small, as it came otherwise."""
    return DenseMap(step.to_dense()) if forms_step(*step.shape, step.device) else step


def omega(step: LinearMap, variance: SymmetricOperator, *, alpha: float, beta_over_n: float) -> Omega:
    """σ²Ω from Δ_raw (in, out) and V (in, in), maths of the paper's equation for Ω.

    Args:
        step: Δ_raw.
        variance: V, the partial trace of J⁻¹ over outputs.
        alpha: α ≥ 0.
        beta_over_n: β/N ≥ 0; not both may be 0.

    Returns:
        The operator, unformed.
    """
    bias = NegatedGram(step, alpha) if alpha else None
    return Omega(bias, Scaled(variance, beta_over_n) if beta_over_n else None)


@dataclass(frozen=True)
class Subspace:
    """A layer's solution before scaling.

    Attributes:
        basis: A0 (in, r), the bottom eigenvectors of Ω.
        projected: B0ᵀ = Δᵀ A0 (out, r), with Δ = Δ_raw/σ where Δ is normalised.
        scaling: PEFT's factor on B·A.
    """

    basis: Tensor
    projected: Tensor
    scaling: float


def subspace(vectors: Tensor, step: LinearMap, sigma: float, scaling: float) -> Subspace:
    """B0 = A0ᵀΔ, the Frobenius-optimal B for orthonormal A0.

    Args:
        vectors: A0, (in, r).
        step: Δ_raw, (in, out).
        sigma: σ > 0, or 1 where Δ is not normalised.
        scaling: PEFT's factor on B·A.

    Returns:
        The layer's solution.
    """
    return Subspace(vectors, step.rmatmat(vectors) / sigma, scaling)


def curvature_of(fisher: LayerFisher, gradient: LinearMap, basis: Tensor, projected: Tensor) -> Curvature:
    """Slopes and Hessian of the directions d_i = projected_i basis_iᵀ, (out, in); one product with J for each.

    Args:
        fisher: J of the layer.
        gradient: G, (out, in).
        basis: (in, r).
        projected: (out, r).

    Returns:
        Both on the CPU.
    """
    left, right = projected.double(), basis.double()
    slopes = (gradient.matmat(basis.to(gradient.dtype)).double() * left).sum(0)
    rows = []
    for place in range(left.shape[1]):
        product = fisher.apply(torch.outer(left[:, place], right[:, place])).double()
        rows.append((left * (product @ right)).sum(0))
    hessian = torch.stack(rows)
    return Curvature(slopes.cpu(), (0.5 * (hessian + hessian.mT)).cpu())


def fixed_factors(solution: Subspace, gamma: float, dtype: torch.dtype) -> LoraFactors:
    """A = A0ᵀ/√γ and B = B0ᵀ/√γ, as the original program scales them.

    Args:
        solution: The layer's solution.
        gamma: γ > 0.
        dtype: Dtype of the factors.

    Returns:
        A (r, in) and B (out, r).
    """
    root = gamma**-0.5
    return _factors(solution.basis.mT * root, solution.projected * root, dtype)


def stable_factors(solution: Subspace, gamma: float, dtype: torch.dtype) -> LoraFactors:
    """A = A0ᵀ and B = B0ᵀ, both times out^¼/√γ: outputs that neither vanish nor grow with width (arXiv 2407.05000).

    Args:
        solution: The layer's solution.
        gamma: γ > 0.
        dtype: Dtype of the factors.

    Returns:
        A (r, in) and B (out, r).
    """
    return fixed_factors(solution, gamma / math.sqrt(solution.projected.shape[0]), dtype)


def paired(solution: Subspace, pairing: Pairing) -> Subspace:
    """Lets A and B span different blocks of the singular directions of a solution of twice the rank.

    LoRA-GA (arXiv 2407.05000) takes the first r right and the next r left singular vectors of the gradient, LOI (arXiv
    2507.12142) the first r left and the next r right ones, which maximises the gradient's part in the tangent space of
    the fixed-rank manifold there.

    Args:
        solution: Of rank 2r.
        pairing: Which block comes first.

    Returns:
        Of rank r; the columns of `projected` have unit norm, and 0 where there is no direction.
    """
    left, vh = _directions(solution)
    right, rank = solution.basis @ vh.mT, solution.basis.shape[1] // 2
    first, second = slice(None, rank), slice(rank, None)
    if pairing == "right_first":
        return replace(solution, basis=right[:, first], projected=left[:, second])
    return replace(solution, basis=right[:, second], projected=left[:, first])


@dataclass(frozen=True)
class WeightStep:
    """A change of a layer's weights of low rank, left·rightᵀ.

    Attributes:
        left: (out, r).
        right: (in, r), orthonormal columns.
    """

    left: Tensor
    right: Tensor


def unit_step(solution: Subspace, spectrum: Spectrum) -> WeightStep:
    """The step (A0 B0)ᵀ, with its singular values or with all of them alike.

    A flat one is the spectral initialisation of gradient flow, arXiv 2503.06982, where the Fisher is the identity.

    Args:
        solution: The layer's solution.
        spectrum: `"kept"` or `"flat"`.

    Returns:
        The step; flat singular values are 1, and 0 where there was no step at all.
    """
    if spectrum == "kept":
        return WeightStep(solution.projected, solution.basis)
    left, vh = _directions(solution)
    return WeightStep(left @ vh, solution.basis)


def _directions(solution: Subspace) -> tuple[Tensor, Tensor]:
    """Of a step, the left singular vectors (out, r), 0 where there is none, and the right ones' Vᵀ (r, r)."""
    u, values, vh = svd(solution.projected, "a layer's step")
    present = values > torch.finfo(values.dtype).eps * len(u) * values[:1]
    return u * present, vh


def of_norm(step: WeightStep, norm: float) -> WeightStep:
    """The step with another Frobenius norm; a zero step stays zero."""
    size = float(step.left.norm())
    return replace(step, left=step.left * (norm / size)) if size > 0 else step


class StepLine:
    """The steps first + t·second, each cut to the rank of `second`: the nearest of that rank (Frobenius)."""

    def __init__(self, first: WeightStep, second: WeightStep) -> None:
        self._ranks = first.left.shape[-1], second.left.shape[-1]
        self._left, left = torch.linalg.qr(torch.cat([first.left, second.left], 1).double())
        self._right, right = torch.linalg.qr(torch.cat([first.right, second.right], 1).double())
        # Of the order of the rank: an accelerator would wait for each, so these are decomposed on the host.
        self._cores = left.cpu(), right.cpu()

    def at(self, multiplier: float) -> WeightStep:
        """The step at t = `multiplier`."""
        (before, rank), (left, right) = self._ranks, self._cores
        weights = torch.cat([left.new_ones(before), left.new_full((rank,), multiplier)])
        u, values, vh = svd((left * weights) @ right.mT, "a sum of steps", full_matrices=True)
        kept = min(rank, len(values))
        scaled = left.new_zeros(len(u), rank)
        scaled[:, :kept] = u[:, :kept] * values[:kept]
        return WeightStep(self._left @ scaled.to(self._left), self._right @ vh.mT[:, :rank].to(self._right))


def activation_scale(inputs: float, coordinates: float, in_features: int, rank: int) -> float:
    """The factor on an orthonormal basis that makes A·x as large as a default LoRA's (derived).

    A default A has independent entries of variance 1/(3·in), so E‖A x‖² = r‖x‖²/(3·in). An update of B by Adam moves
    the outputs in proportion to ‖A x‖, so keeping that keeps LoRA's own learning rate.

    Args:
        inputs: Σ‖x‖² over tokens.
        coordinates: Σ‖rightᵀx‖² over the same tokens.
        in_features: Size of x.
        rank: r.

    Returns:
        The factor, within `A_SCALE_RANGE` of `DEFAULT_A_SCALE`.
    """
    if not inputs > 0:
        return DEFAULT_A_SCALE
    ratio = rank * inputs / (in_features * coordinates) if coordinates > 0 else A_SCALE_RANGE**2
    return DEFAULT_A_SCALE * min(max(math.sqrt(ratio), 1 / A_SCALE_RANGE), A_SCALE_RANGE)


def embedding_scale(step: WeightStep, scaling: float) -> float:
    """The factor on an orthonormal basis of one-hot inputs that makes B as large as an embedding's default (derived).

    There PEFT starts with A zero and B standard normal, so A is what is trained: a step of A by Adam moves a token's
    vector in proportion to B, and ‖B‖_F² = out·r keeps LoRA's own learning rate.

    Args:
        step: The step in weights.
        scaling: PEFT's factor on B·A.

    Returns:
        The factor; `DEFAULT_A_SCALE` for a zero step, whose B is zero and has to be the one that is trained.
    """
    size = float(step.left.norm())
    return size / (scaling * math.sqrt(step.left.numel())) if size > 0 else DEFAULT_A_SCALE


def balanced_factors(step: WeightStep, scaling: float, a_scale: float, dtype: torch.dtype) -> LoraFactors:
    """A = a_scale·rightᵀ, and B such that PEFT's scaling·B·A is the step.

    The size of A acts as a multiplier on B's learning rate.

    Args:
        step: The step in weights.
        scaling: PEFT's factor on B·A.
        a_scale: Norm of each of A's rows.
        dtype: Dtype of the factors.

    Returns:
        A (r, in) and B (out, r).
    """
    return _factors(step.right.mT * a_scale, step.left / (scaling * a_scale), dtype)


def evenly_divided_factors(step: WeightStep, scaling: float, dtype: torch.dtype) -> LoraFactors:
    """A = √S Vᵀ and B = U √S from the singular values S of step/scaling, LoRA-One's division of a step.

    Args:
        step: The step in weights; where it is zero, A is divided as `balanced_factors` does by default.
        scaling: PEFT's factor on B·A.
        dtype: Dtype of the factors.

    Returns:
        A (r, in) and B (out, r).
    """
    u, values, vh = svd(step.left.double() / scaling, "a layer's step")
    if not bool(values.any()) or len(values) < step.right.shape[1]:
        return balanced_factors(step, scaling, DEFAULT_A_SCALE, dtype)
    roots = values.clamp(min=LEAST_SHARE * float(values[0])).sqrt()
    return _factors(roots.unsqueeze(1) * (vh @ step.right.double().mT), u * (values / roots), dtype)


def _factors(a: Tensor, b: Tensor, dtype: torch.dtype) -> LoraFactors:
    return LoraFactors(a.to(dtype).contiguous(), b.to(dtype).contiguous())
