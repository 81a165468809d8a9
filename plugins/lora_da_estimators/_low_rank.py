"""The Fisher λI + Σ_i vec(E_i) vec(E_i)ᵀ, inverted by Woodbury's identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da_core.errors import OptionError
from lora_da_core.factorisations import eigh
from lora_da_core.interfaces import LayerFisher
from lora_da_core.operators import SymmetricOperator
from lora_da_core.types import DampingKind, FisherStatistics
from lora_da_estimators._directions import Directions
from lora_da_estimators._factors import FactorRequest, require_tokens
from lora_da_estimators._gradients import stored_directions

_NOTICEABLE = 1e-2
"""Share of the step that may be rounding before a notice says so."""


@dataclass(frozen=True)
class Spectrum:
    """Σ_i vec(E_i) vec(E_i)ᵀ with orthogonal E_i = Σ_j mixing_ji D_j.

    Attributes:
        directions: D_1 … D_k, each (out, in).
        mixing: (k, m), float64.
        energies: ‖E_i‖², (m,), float64.
        trace: Trace of the Fisher this stands for, which is what relative damping refers to.
        dtype: Dtype of the sums it comes from.
        remedies: What had to be done to find it.
    """

    directions: Directions
    mixing: Tensor
    energies: Tensor
    trace: float
    dtype: torch.dtype
    remedies: tuple[str, ...] = ()

    def precision_notice(self, shift: float) -> tuple[str, ...]:
        """What to tell where rounding of the gradient, which J⁻¹ multiplies by 1/λ, is no longer small."""
        # Along E_1 a gradient is divided by its energy, rounding outside the span by λ alone.
        strongest = float(self.energies[0]) if len(self.energies) else 0.0
        share = torch.finfo(self.dtype).eps * strongest / shift
        if share < _NOTICEABLE:
            return ()
        return (
            f"the Fisher: damping {shift:.3g} is {shift / strongest:.2g} of its strongest direction; rounding of "
            f"{str(self.dtype).removeprefix('torch.')} gradients may be {share:.2g} of the step",
        )


class LowRankFisher(LayerFisher):
    """J = λI + Σ_i vec(E_i) vec(E_i)ᵀ, λ > 0; results are float64."""

    def __init__(self, spectrum: Spectrum, shape: tuple[int, int], damping: dict[str, float]) -> None:
        self.directions = spectrum.directions
        self.shape = shape
        self.damping = damping
        self.shift = sum(damping.values())
        self.remedies = spectrum.remedies + spectrum.precision_notice(self.shift)
        self.weights = spectrum.mixing @ spectrum.mixing.mT
        self.kernel = (spectrum.mixing / (self.shift + spectrum.energies)) @ spectrum.mixing.mT

    def solve(self, gradient: Tensor) -> Tensor:
        wide = gradient.double()
        return (wide - self.directions.combine(self.kernel @ self.directions.inner(wide))) / self.shift

    def apply(self, weights: Tensor) -> Tensor:
        wide = weights.double()
        return self.shift * wide + self.directions.combine(self.weights @ self.directions.inner(wide))

    def inverse_input_trace(self) -> SymmetricOperator:
        return LowRankInverseTrace(self)


class LowRankInverseTrace(SymmetricOperator):
    """V = (out·I − Σ_jl kernel_jl D_jᵀ D_l)/λ, by products with the D_j."""

    _columns = 64

    def __init__(self, fisher: LowRankFisher) -> None:
        self.fisher = fisher

    @property
    def size(self) -> int:
        return self.fisher.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def device(self) -> torch.device:
        return self.fisher.directions.device

    def matmat(self, block: Tensor) -> Tensor:
        fisher = self.fisher
        parts = fisher.directions.times(block)
        mixed = (fisher.kernel @ parts.flatten(1)).view(parts.shape)
        return (fisher.shape[0] * block - fisher.directions.transposed_times(mixed)) / fisher.shift

    def to_dense(self) -> Tensor:
        # A few columns at a time: the product holds k·out numbers for each.
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        dense = torch.cat([self.matmat(columns) for columns in torch.split(eye, self._columns, dim=1)], 1)
        return 0.5 * (dense + dense.mT)


def orthogonalised(gram: Tensor, what: str, keep: int | None = None) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """What makes a set of matrices orthogonal.

    Args:
        gram: (k, k), their inner products, float64.
        what: What they are, for messages.
        keep: How many of the strongest combinations to keep; None keeps all.

    Returns:
        mixing (k, m), energies (m,) ≥ 0, descending, and what had to be done to find them.
    """
    found = eigh(0.5 * (gram + gram.mT), what)
    energies, vectors = found.values.flip(0).clamp(min=0), found.vectors.flip(1)
    return vectors[:, :keep], energies[:keep], found.remedies


def empirical_spectrum(statistics: FisherStatistics, request: FactorRequest, keep: int | None) -> Spectrum:
    """(1/n) Σ_n vec(G_n) vec(G_n)ᵀ from kept gradients, or its best approximation of rank `keep`."""
    directions = stored_directions(statistics.layer)
    gram = directions.gram() / statistics.samples
    request.check(gram)
    mixing, energies, remedies = orthogonalised(gram, f"{request.label}'s Gram matrix on layer {request.layer!r}", keep)
    dtype = statistics.layer["rows"].dtype
    return Spectrum(directions, mixing / statistics.samples**0.5, energies, float(gram.trace()), dtype, remedies)


def damped(
    spectrum: Spectrum, statistics: FisherStatistics, request: FactorRequest, extra: float = 0.0
) -> LowRankFisher:
    """The spectrum with λ, and `extra` where a sketch owes it, on the diagonal."""
    spec = statistics.spec
    request.check(spectrum.energies)
    amount = request.amount(spectrum.trace / (spec.out_features * spec.in_features))
    found = {"lambda": amount} | ({"shift": extra} if extra else {})
    return LowRankFisher(spectrum, (spec.out_features, spec.in_features), found)


def request_of(statistics: FisherStatistics, damping: float, damping_kind: DampingKind) -> FactorRequest:
    """The damping request of a Fisher with one λ.

    Args:
        statistics: Sums of the layer.
        damping: Damping > 0.
        damping_kind: How it is meant.

    Returns:
        The request.

    Raises:
        OptionError: The damping is zero: a Fisher of low rank has no inverse.
    """
    require_tokens(statistics)
    if damping <= 0:
        raise OptionError("damping is 0, but a Fisher of low rank has no inverse without; give damping above 0.")
    return FactorRequest(statistics.spec.name, "the Fisher", "gradients", damping, damping_kind, exponent=1.0)
