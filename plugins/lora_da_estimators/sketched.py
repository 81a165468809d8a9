"""Low-rank approximations of the empirical Fisher.

Frequent Directions: Ghashami, Liberty, Phillips & Woodruff, "Frequent Directions: Simple and Deterministic Matrix
Sketching" (SIAM J. Comput. 2016), section 2. Nyström from one pass: Tropp, Yurtsever, Udell & Cevher, "Fixed-Rank
Approximation of a Positive-Semidefinite Matrix from Streaming Data" (NeurIPS 2017), section 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.factorisations import eigh
from lora_da_core.interfaces import Accumulator, FisherEstimator
from lora_da_core.types import DampingKind, FisherScale, FisherStatistics, LayerSpec
from lora_da_estimators._directions import RowDirections
from lora_da_estimators._factors import require_finite
from lora_da_estimators._gradients import SampleGradients, stored_bytes
from lora_da_estimators._low_rank import (
    LowRankFisher,
    Spectrum,
    damped,
    empirical_spectrum,
    orthogonalised,
    request_of,
)
from lora_da_estimators._samples import by_sample
from lora_da_estimators._sums import NoSums, required

Method = Literal["frequent_directions", "nystrom", "svd"]
TRACE = "trace"
"""Key of Σ_n ‖G_n‖²."""


@dataclass(frozen=True)
class SketchedOptions:
    """Options of the sketched Fisher.

    Attributes:
        method: `"frequent_directions"` (one pass, a bound on the error), `"nystrom"` (one pass, shards add) or
            `"svd"` (keeps every gradient, then the best approximation there is).
        size: Rank of the approximation.
        seed: Seed of Nyström's probes; the layer's name enters as well.
        compensate: Whether half of what Frequent Directions shrank away is added to the diagonal, which halves the
            worst error.
    """

    method: Method = "frequent_directions"
    size: int = 32
    seed: int = 0
    compensate: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(get_args(Method))}")
        if self.size < 1:
            raise ValueError(f"size is {self.size!r}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; it must be at least 0")


class FrequentDirections(Accumulator):
    """A sketch B, (size, out, in), with 0 ⪯ Σ_n vec(G_n) vec(G_n)ᵀ − BᵀB ⪯ shift·I.

    The buffer holds twice the size; when full it shrinks to the size. Shards stack, shrink and add their shifts.
    """

    def __init__(self, spec: LayerSpec, size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.layer = spec.name
        self.size = size
        self.buffer = torch.zeros(2 * size, spec.out_features, spec.in_features, device=device, dtype=dtype)
        self.filled = 0
        self.shift = torch.zeros(1, device=device, dtype=torch.float64)
        self.trace = torch.zeros(1, device=device, dtype=torch.float64)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        x, g = inputs.to(self.buffer), required(output_grads).to(self.buffer)
        for inputs_of_one, grads_of_one in by_sample(x, g, example):
            gradient = grads_of_one.mT @ inputs_of_one
            self.trace += gradient.double().square().sum()
            self._append(gradient)

    def statistics(self) -> dict[str, Tensor]:
        if self.filled > self.size:
            self._shrink()
        return {"rows": self.buffer[: self.size], "shift": self.shift, TRACE: self.trace}

    def merge(self, other: Mapping[str, Tensor]) -> None:
        self.trace += other[TRACE].to(self.trace)
        self.shift += other["shift"].to(self.shift)
        for row in other["rows"].to(self.buffer):
            self._append(row)

    def _append(self, row: Tensor) -> None:
        self.buffer[self.filled] = row
        self.filled += 1
        if self.filled == len(self.buffer):
            self._shrink()

    def _shrink(self) -> None:
        held = self.buffer[: self.filled]
        gram = RowDirections(held).gram()
        require_finite(gram, self.layer, "the sketch of its gradients")
        mixing, energies, _ = orthogonalised(gram, "the sketch's Gram matrix")
        lost = energies[self.size]
        kept = energies[: self.size]
        # A direction weaker than rounding has no direction; its row becomes zero.
        strength = torch.where(kept > lost, ((kept - lost) / kept.clamp(min=torch.finfo(kept.dtype).tiny)).sqrt(), 0.0)
        weights = (mixing[:, : self.size] * strength).to(self.buffer)
        self.buffer[: self.size] = (weights.mT @ held.flatten(1)).view(-1, *held.shape[1:])
        self.buffer[self.size :] = 0
        self.filled = self.size
        self.shift += lost


class NystromProducts(Accumulator):
    """Σ_n vec(G_n) ⟨G_n, a_j b_jᵀ⟩ for probes a_j b_jᵀ of Gaussian vectors, (size, out, in)."""

    def __init__(self, spec: LayerSpec, options: SketchedOptions, *, device: torch.device, dtype: torch.dtype) -> None:
        left, right = probe_vectors(spec, options)
        self.total = torch.zeros(options.size, spec.out_features, spec.in_features, device=device, dtype=dtype)
        self.trace = torch.zeros(1, device=device, dtype=torch.float64)
        self.left, self.right = left.to(self.total), right.to(self.total)

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        x, g = inputs.to(self.total), required(output_grads).to(self.total)
        for inputs_of_one, grads_of_one in by_sample(x, g, example):
            gradient = grads_of_one.mT @ inputs_of_one
            self.trace += gradient.double().square().sum()
            # Two token products instead of one with a matrix of out·in·size numbers.
            weights = ((grads_of_one @ self.left) * (inputs_of_one @ self.right)).sum(0)
            self.total.flatten(1).addr_(weights, gradient.flatten())

    def statistics(self) -> dict[str, Tensor]:
        return {"products": self.total, TRACE: self.trace}


def probe_vectors(spec: LayerSpec, options: SketchedOptions) -> tuple[Tensor, Tensor]:
    """Nyström's probe vectors: (out, size) and (in, size) float64 on the CPU, the same for all shards of a layer."""
    digest = hashlib.sha256(f"{options.seed}:{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    left = torch.randn(spec.out_features, options.size, generator=generator, dtype=torch.float64)
    return left, torch.randn(spec.in_features, options.size, generator=generator, dtype=torch.float64)


class Sketched(FisherEstimator[SketchedOptions]):
    """A low-rank J plus λI; relative damping ρ is ρ times the mean diagonal of the Fisher that was sketched."""

    name = "sketched"
    api_version = 1
    Options = SketchedOptions

    @property
    def additive(self) -> bool:
        return self.options.method == "nystrom"

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return NoSums()

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        if self.options.method == "nystrom":
            return NystromProducts(spec, self.options, device=device, dtype=dtype)
        if self.options.method == "svd":
            return SampleGradients(spec, "auto", device=device, dtype=dtype)
        return FrequentDirections(spec, self.options.size, device=device, dtype=dtype)

    def fisher(
        self,
        statistics: FisherStatistics,
        *,
        damping: float,
        damping_kind: DampingKind,
        fisher_scale: FisherScale,
    ) -> LowRankFisher:
        """The damped Fisher; `fisher_scale` has no effect, as gradients are of whole samples."""
        request = request_of(statistics, damping, damping_kind)
        if self.options.method == "svd":
            return damped(empirical_spectrum(statistics, request, keep=self.options.size), statistics, request)
        if self.options.method == "nystrom":
            return damped(self._nystrom(statistics), statistics, request)
        shift = 0.5 * float(statistics.layer["shift"]) / statistics.samples if self.options.compensate else 0.0
        return damped(self._frequent_directions(statistics), statistics, request, extra=shift)

    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        if self.options.method == "svd":
            return (0, stored_bytes(spec, "auto", samples=samples, tokens=tokens, itemsize=itemsize))
        size, matrix = self.options.size, spec.out_features * spec.in_features
        if self.options.method == "nystrom":
            return (0, size * (matrix + spec.out_features + spec.in_features) * itemsize + 8)
        return (0, 2 * size * matrix * itemsize + 16)

    def _frequent_directions(self, statistics: FisherStatistics) -> Spectrum:
        rows, samples = RowDirections(statistics.layer["rows"]), statistics.samples
        require_finite(rows.rows, statistics.spec.name, "the sketch of its gradients")
        mixing, energies, remedies = orthogonalised(rows.gram() / samples, "the sketch's Gram matrix")
        trace = float(statistics.layer[TRACE]) / samples
        return Spectrum(rows, mixing / samples**0.5, energies, trace, rows.rows.dtype, remedies)

    def _nystrom(self, statistics: FisherStatistics) -> Spectrum:
        """J ≈ P C⁺ Pᵀ with P = JΩ and C = ΩᵀP; directions of C that are rounding noise are left out."""
        products, samples = RowDirections(statistics.layer["products"]), statistics.samples
        require_finite(products.rows, statistics.spec.name, "the sketch of its gradients")
        left, right = (vectors.to(products.device) for vectors in probe_vectors(statistics.spec, self.options))
        core = torch.einsum("oj,loj->jl", left, products.times(right)) / samples
        found = eigh(0.5 * (core + core.mT), "the sketch's core")
        values, vectors = found.values, found.vectors
        least = len(values) * torch.finfo(products.rows.dtype).eps * float(values[-1].clamp(min=0))
        strong = values > least
        roots = vectors[:, strong] / values[strong].sqrt() / samples
        mixing, energies, remedies = orthogonalised(roots.mT @ products.gram() @ roots, "the sketch's Gram matrix")
        trace = float(statistics.layer[TRACE]) / samples
        remedies = found.remedies + remedies
        return Spectrum(products, roots @ mixing, energies, trace, products.rows.dtype, remedies)


@hookimpl
def lora_da_fisher_estimators() -> list[type[FisherEstimator[Any]]]:
    """Offer the sketched Fisher."""
    return [Sketched]
