"""EKFAC: K-FAC's eigenbasis with second moments measured in it.

George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis" (NeurIPS 2018), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.factorisations import eigh
from lora_da_core.interfaces import Accumulator, FisherEstimator, LayerFisher, NoOptions
from lora_da_core.operators import SymmetricOperator
from lora_da_core.types import DampingKind, FisherScale, FisherStatistics, LayerSpec
from lora_da_estimators._factors import DiagonalFactor, FactorRequest, damp_diagonal, require_finite, require_tokens
from lora_da_estimators._samples import by_sample
from lora_da_estimators._sums import SECOND_MOMENT, SQUARES, required

BASIS = "basis"
"""Key of the eigenvectors of a second moment, as columns."""


class _BasisAccumulator(Accumulator):
    """Σ v vᵀ in the first pass; its eigenvectors from then on.

    The eigenvectors replace the sum, so that what was measured in them can never be read in another basis. Adding
    shards leaves their directions: the same basis in all of them.
    """

    def __init__(self, size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.total = torch.zeros(size, size, device=device, dtype=dtype)
        self.basis: Tensor | None = None

    def add(self, block: Tensor) -> None:
        """Add the outer products of the rows of `block` (tokens, size)."""
        block = block.to(self.total)
        self.total.addmm_(block.mT, block)

    def fix(self, basis: Tensor) -> None:
        """Take the eigenvectors of the merged sum and drop the own sum."""
        self.basis = basis
        self.total = self.total.new_zeros(0)

    def statistics(self) -> dict[str, Tensor]:
        return {SECOND_MOMENT: self.total} if self.basis is None else {BASIS: self.basis}


class InputBasis(_BasisAccumulator):
    """Σ x xᵀ, then its eigenvectors U_Z, (in, in); it ignores the tokens of the second pass."""

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        if self.basis is None:
            self.add(inputs)

    def end_pass(self, index: int, merged: FisherStatistics) -> None:
        if index == 0:
            self.fix(_input_basis(merged))


class EigenbasisSquares(_BasisAccumulator):
    """Σ g gᵀ, then its eigenvectors U_Y (out, out) and Σ_n (U_Yᵀ G_n U_Z)∘², (out, in)."""

    def __init__(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec.out_features, device=device, dtype=dtype)
        self.squares = torch.zeros(spec.out_features, spec.in_features, device=device, dtype=dtype)
        self.input_basis: Tensor | None = None

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        grads = required(output_grads)
        if self.basis is None or self.input_basis is None:
            self.add(grads)
            return
        x, g = inputs.to(self.squares) @ self.input_basis.to(self.squares), grads.to(self.squares) @ self.basis
        for inputs_of_one, grads_of_one in by_sample(x, g, example):
            rotated = grads_of_one.mT @ inputs_of_one
            self.squares.addcmul_(rotated, rotated)

    def end_pass(self, index: int, merged: FisherStatistics) -> None:
        if index == 0:
            self.input_basis = _input_basis(merged)
            self.fix(_eigenvectors(merged.layer[SECOND_MOMENT], merged.spec.name, "Σ g gᵀ"))
        else:
            self.input_basis = None

    def statistics(self) -> dict[str, Tensor]:
        found = super().statistics()
        if self.basis is not None:
            found[SQUARES] = self.squares
        return found


class EigenbasisOperator(SymmetricOperator):
    """U diag(values) Uᵀ with orthogonal U; shifted inverses cost no factorisation."""

    def __init__(self, basis: Tensor, values: Tensor) -> None:
        self.basis = basis
        self.values = values

    @property
    def size(self) -> int:
        return self.basis.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.basis.dtype

    @property
    def device(self) -> torch.device:
        return self.basis.device

    def matmat(self, block: Tensor) -> Tensor:
        return self.basis @ (self.values.unsqueeze(-1) * (self.basis.mT @ block))

    def diagonal(self) -> Tensor:
        return self.basis.square() @ self.values

    def trace(self) -> Tensor:
        return self.values.sum()

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        shifted = (self.values + shift).unsqueeze(-1)
        if not bool((shifted > 0).all()):
            return None
        return lambda block: self.basis @ ((self.basis.mT @ block) / shifted)


class EkfacFisher(LayerFisher):
    """J = (U_Y ⊗ U_Z) diag(s + λ) (U_Y ⊗ U_Z)ᵀ; results are float64."""

    def __init__(self, output_basis: Tensor, input_basis: Tensor, eigenvalues: DiagonalFactor) -> None:
        self.output_basis = output_basis
        self.input_basis = input_basis
        self.eigenvalues = eigenvalues.entries
        self.damping = {"lambda": eigenvalues.damping}
        self.remedies = eigenvalues.remedies

    def solve(self, gradient: Tensor) -> Tensor:
        return self._back(self._rotate(gradient) / self.eigenvalues)

    def apply(self, weights: Tensor) -> Tensor:
        return self._back(self._rotate(weights) * self.eigenvalues)

    def inverse_input_trace(self) -> SymmetricOperator:
        """V = U_Z diag(Σ_o 1/(s_oi + λ)) U_Zᵀ."""
        return EigenbasisOperator(self.input_basis, self.eigenvalues.reciprocal().sum(0))

    def _rotate(self, matrix: Tensor) -> Tensor:
        return self.output_basis.mT @ matrix.double() @ self.input_basis

    def _back(self, matrix: Tensor) -> Tensor:
        return self.output_basis @ matrix @ self.input_basis.mT


class Ekfac(FisherEstimator[NoOptions]):
    """Eigenvalue-corrected K-FAC; reads the data twice. Relative damping ρ is ρ times the mean of s."""

    name = "ekfac"
    api_version = 1

    @property
    def passes(self) -> int:
        return 2

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return InputBasis(spec.in_features, device=device, dtype=dtype)

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return EigenbasisSquares(spec, device=device, dtype=dtype)

    def fisher(
        self,
        statistics: FisherStatistics,
        *,
        damping: float,
        damping_kind: DampingKind,
        fisher_scale: FisherScale,
    ) -> EkfacFisher:
        """The damped Fisher; `fisher_scale` has no effect, as s is measured on whole samples."""
        require_tokens(statistics)
        key = (self.name, "orthonormal")
        if key not in statistics.shared:
            statistics.shared[key] = _orthonormal(statistics.input)
        request = FactorRequest(statistics.spec.name, "eigenvalues", "gradients", damping, damping_kind, exponent=1.0)
        eigenvalues = damp_diagonal(statistics.layer[SQUARES], statistics.samples, request)
        return EkfacFisher(_orthonormal(statistics.layer), statistics.shared[key], eigenvalues)

    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        layer = spec.out_features**2 + spec.out_features * spec.in_features
        return (spec.in_features**2 * itemsize, layer * itemsize)


def _input_basis(merged: FisherStatistics) -> Tensor:
    """U_Z of the merged sums, computed once for all layers that read the input."""
    key = (Ekfac.name, BASIS)
    if key not in merged.shared:
        merged.shared[key] = _eigenvectors(merged.input[SECOND_MOMENT], merged.spec.name, "Σ x xᵀ")
    basis: Tensor = merged.shared[key]
    return basis


def _eigenvectors(total: Tensor, layer: str, label: str) -> Tensor:
    require_finite(total, layer, label)
    matrix = total.double()
    vectors = eigh(0.5 * (matrix + matrix.mT), f"{label} of layer {layer!r}").vectors
    return vectors.to(total.dtype).contiguous()


def _orthonormal(statistics: Mapping[str, Tensor]) -> Tensor:
    """The stored basis in float64, orthonormal to float64's precision.

    One Newton–Schulz step, U(3I − UᵀU)/2, takes the rounding of a float32 basis away and moves it no further.
    """
    basis = statistics[BASIS].double()
    basis = basis / basis.square().sum(0).sqrt()
    return 1.5 * basis - 0.5 * basis @ (basis.mT @ basis)


@hookimpl
def lora_da_fisher_estimators() -> list[type[FisherEstimator[Any]]]:
    """Offer EKFAC."""
    return [Ekfac]
