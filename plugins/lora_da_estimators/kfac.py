"""K-FAC: the Fisher as a Kronecker product of an output and an input factor.

Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (ICML 2015), section 3 for
the factors and section 6.3 for how damping is divided between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import Accumulator, FisherEstimator, LayerFisher
from lora_da_core.operators import LinearMap, Scaled, SymmetricOperator
from lora_da_core.types import DampingKind, FisherScale, FisherStatistics, LabelKind, LayerSpec
from lora_da_estimators._factors import (
    DampedFactor,
    DenseFactor,
    DiagonalFactor,
    FactorRequest,
    InverseOperator,
    damp_dense,
    damp_diagonal,
    require_tokens,
)
from lora_da_estimators._maps import converted
from lora_da_estimators._sums import (
    SECOND_MOMENT,
    SQUARES,
    InputSecondMoment,
    NoSums,
    OutputSecondMoment,
    OutputSquares,
)

OutputFactor = Literal["diagonal", "full", "identity"]


@dataclass(frozen=True)
class KfacOptions:
    """Options of K-FAC.

    Attributes:
        output: The output factor Y: `"diagonal"` of E[g gᵀ], the `"full"` matrix, or `"identity"`, which needs no
            backward pass.
        labels: Whose labels the output gradients come from.
    """

    output: OutputFactor = "diagonal"
    labels: LabelKind = "empirical"

    def __post_init__(self) -> None:
        if self.output not in get_args(OutputFactor):
            raise ValueError(f"output is {self.output!r}; choose one of {', '.join(get_args(OutputFactor))}")
        if self.labels not in get_args(LabelKind):
            raise ValueError(f"labels is {self.labels!r}; choose one of {', '.join(get_args(LabelKind))}")
        if self.output == "identity" and self.labels != "empirical":
            raise ValueError('labels has no effect with output="identity", which takes no gradients; leave it out')


def products_dtype(output: DampedFactor, inputs: DampedFactor) -> torch.dtype:
    """The dtype of products with both factors: the wider of theirs."""
    return torch.promote_types(output.dtype, inputs.dtype)


class KroneckerStep(LinearMap):
    """Δ_raw = −Z⁻¹ Gᵀ Y⁻¹, (in, out), as a product of three maps."""

    def __init__(self, gradient: LinearMap, output: DampedFactor, inputs: DampedFactor) -> None:
        self._dtype = products_dtype(output, inputs)
        self.gradient = converted(gradient, self._dtype)
        self.output = output
        self.inputs = inputs

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.gradient.shape
        return (columns, rows)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.gradient.device

    def matmat(self, block: Tensor) -> Tensor:
        return -self.inputs.solve(self.gradient.rmatmat(self.output.solve(block)))

    def rmatmat(self, block: Tensor) -> Tensor:
        return -self.output.solve(self.gradient.matmat(self.inputs.solve(block)))

    def to_dense(self) -> Tensor:
        return -self.inputs.solve(self.output.solve(self.gradient.to_dense()).mT)


class KfacFisher(LayerFisher):
    """J = Y_d ⊗ Z_d with damped factors.

    Matrices come back in float64; the operators of `step` and `inverse_input_trace` work in the factors' own dtype.
    """

    def __init__(self, output: DampedFactor, inputs: DenseFactor) -> None:
        self.output = output
        self.inputs = inputs
        self.damping = {"Z": inputs.damping, "Y": output.damping}
        self.remedies = inputs.remedies + output.remedies

    def solve(self, gradient: Tensor) -> Tensor:
        return self.inputs.solve(self.output.solve(gradient.double()).mT).mT

    def apply(self, weights: Tensor) -> Tensor:
        return self.inputs.multiply(self.output.multiply(weights.double()).mT).mT

    def inverse_input_trace(self) -> SymmetricOperator:
        """V = tr(Y_d⁻¹) Z_d⁻¹; layers that read one input share the inverse."""
        return Scaled(
            InverseOperator(self.inputs, products_dtype(self.output, self.inputs)), self.output.inverse_trace()
        )

    def step(self, gradient: LinearMap) -> LinearMap:
        return KroneckerStep(gradient, self.output, self.inputs)


class Kfac(FisherEstimator[KfacOptions]):
    """Kronecker-factored Fisher from Z = E[x xᵀ] and Y = E[g gᵀ]."""

    name = "kfac"
    api_version = 1
    Options = KfacOptions

    @property
    def needs_output_grads(self) -> bool:
        return self.options.output != "identity"

    @property
    def labels(self) -> LabelKind:
        return self.options.labels

    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return InputSecondMoment(spec.in_features, device=device, dtype=dtype)

    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        if self.options.output == "identity":
            return NoSums()
        kind = OutputSecondMoment if self.options.output == "full" else OutputSquares
        return kind(spec.out_features, device=device, dtype=dtype)

    def fisher(
        self,
        statistics: FisherStatistics,
        *,
        damping: float,
        damping_kind: DampingKind,
        fisher_scale: FisherScale,
    ) -> KfacFisher:
        """The damped Kronecker product.

        Absolute damping is added to each factor as it is. Relative damping ρ adds √ρ times the factor's mean
        diagonal, which is the division of λ = ρ·(tr Z/in)(tr Y/out) between factors of that paper. With an identity
        output factor Y is I, undamped, whatever the scale. A statistic that cannot be inverted is refused by layer:
        `DataError` where no token passed the mask or a factor is zero and undamped, `ModelError` where it is not
        finite.

        Args:
            statistics: Sums of the layer.
            damping: Damping ≥ 0.
            damping_kind: How it is meant.
            fisher_scale: Whether Y is the mean over tokens or the sum over a sample's tokens.

        Returns:
            The Fisher, factorised in float64.
        """
        spec = statistics.spec
        require_tokens(statistics)
        inputs = self._input_factor(statistics, damping, damping_kind)
        count = statistics.tokens if fisher_scale == "token_mean" else statistics.samples
        request = FactorRequest(spec.name, "output factor Y", "output gradients", damping, damping_kind)
        return KfacFisher(self._output_factor(statistics, inputs.inverse.device, count, request), inputs)

    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        output = {"identity": 0, "diagonal": spec.out_features, "full": spec.out_features**2}[self.options.output]
        return (spec.in_features**2 * itemsize, output * itemsize)

    def _output_factor(
        self, statistics: FisherStatistics, device: torch.device, count: int, request: FactorRequest
    ) -> DampedFactor:
        if self.options.output == "identity":
            ones = torch.ones(statistics.spec.out_features, dtype=torch.float64, device=device)
            return DiagonalFactor(ones, 0.0)
        if self.options.output == "full":
            return damp_dense(statistics.layer[SECOND_MOMENT], count, request)
        return damp_diagonal(statistics.layer[SQUARES], count, request)

    def _input_factor(self, statistics: FisherStatistics, damping: float, damping_kind: DampingKind) -> DenseFactor:
        key = (self.name, "Z", damping, damping_kind, statistics.tokens)
        if key not in statistics.shared:
            request = FactorRequest(statistics.spec.name, "input factor Z", "inputs", damping, damping_kind)
            statistics.shared[key] = damp_dense(statistics.input[SECOND_MOMENT], statistics.tokens, request)
        factor: DenseFactor = statistics.shared[key]
        return factor


@hookimpl
def lora_da_fisher_estimators() -> list[type[FisherEstimator[Any]]]:
    """Offer K-FAC."""
    return [Kfac]
