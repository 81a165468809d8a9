"""Plain records that rooms and plugins hand to each other. No behaviour beyond how they show themselves."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lora_da_core import summaries
from lora_da_core.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Batch = Mapping[str, Any]
"""One batch as the model takes it: tensors whose first dimension counts samples, `labels` among them."""

Balance = Literal["activation", "norm", "even"]
DampingKind = Literal["relative", "absolute"]
FisherScale = Literal["token_mean", "sample"]
LabelKind = Literal["empirical", "sampled", "exact"]
Frozen = Literal["none", "A"]
Offset = Literal["none", "base", "frozen_adapter"]
Pairing = Literal["same", "right_first", "left_first"]
RankUnit = Literal["rank", "parameter"]
Scale = Literal["auto", "fixed", "stable", "product", "unit"]
Spectrum = Literal["kept", "flat"]
StatisticsDevice = Literal["auto", "device", "host", "disk"]
TokenMask = Literal["labels", "attention"]
Unsupported = Literal["error", "default"]


@dataclass(frozen=True)
class StoredFactors:
    """Where an adapter keeps a layer's A and B.

    Attributes:
        name: Module name, or the parameter's, where a bare parameter is adapted; layers of one name, experts, are
            stored together.
        keys: Names of A and B in the adapter's file, below PEFT's prefix.
        shapes: Shapes of A and B as they are stored.
    """

    name: str
    keys: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class LayerSpec:
    """One adapted layer y = Wx, as PEFT will adapt it.

    Attributes:
        name: Module name in the base model, without PEFT's prefixes; of an expert `<module>.<parameter>.<number>`.
        kind: How the module stores its weight, e.g. `"linear"`.
        in_features: Size of x.
        out_features: Size of y.
        rank: PEFT's rank r for this layer, `rank_pattern` applied.
        scaling: PEFT's factor on B·A, `alpha_pattern` and rsLoRA applied.
        parameter: Name of the weight in its module.
        expert: Which expert of a stacked weight the layer is; None where the weight is its own.
        stored: How the adapter keeps its factors; None where as A (r, in) and B (out, r) of the module.
        one_hot: Whether every x is 1 in one place and 0 elsewhere, as an embedding's; accumulators are then given the
            places, (tokens,) int64, instead of (tokens, in).
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    parameter: str = "weight"
    expert: int | None = None
    stored: StoredFactors | None = None
    one_hot: bool = False


@dataclass(frozen=True)
class FisherStatistics:
    """Everything a Fisher estimator gets back of one layer: sums, never means.

    Attributes:
        spec: The layer.
        input: Statistics of the input accumulator, which all layers that read the same input share.
        layer: Statistics of the layer accumulator.
        samples: Number of samples n that the sums run over.
        tokens: Number of tokens of this layer that passed the token mask.
        shared: Scratch space common to the layers that read the same input, so that a factorisation of an
            input statistic is computed once; keys must name every option the value depends on.
    """

    spec: LayerSpec
    input: Mapping[str, Tensor]
    layer: Mapping[str, Tensor]
    samples: int
    tokens: int
    shared: MutableMapping[Any, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class EigenResult:
    """The r smallest eigenpairs of a symmetric operator; leading batch dimensions allowed.

    Attributes:
        values: (…, r), ascending.
        vectors: (…, size, r), orthonormal columns, the largest entry of each positive.
        residuals: (…, r), ‖ΩU − UΛ‖ column by column, computed explicitly after the last step.
        converged: (…), bool, one per matrix.
        applies: Number of block products with the operator.
        next_value: (…), the Ritz estimate of the eigenvalue after the last (an upper bound), NaN where unknown.
        remedies: What had to be done beyond the method itself, in order; empty where nothing had to.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    applies: int
    next_value: Tensor
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curvature:
    """The second-order loss change of a layer's directions d_i = (Δ_rawᵀ v_i) v_iᵀ, v_i the eigenvectors of Ω.

    Keeping the directions of a set S changes the loss by about Σ slopes_i + ½ Σ hessian_ij, sums over S (derived).

    Attributes:
        slopes: (R,), ⟨G, d_i⟩, float64 on the CPU.
        hessian: (R, R), ⟨d_i, J d_j⟩ with the damped Fisher J, float64 on the CPU.
    """

    slopes: Tensor
    hessian: Tensor


@dataclass(frozen=True)
class LayerSpectrum:
    """What a rank allocator sees of one layer, solved at the largest rank R it may get.

    Attributes:
        values: (R,), the smallest eigenvalues of Ω, ascending, float64 on the CPU.
        scale: Squared weights that one unit of `values` stands for: σ², or 1 where Δ is not divided by σ.
        curvature: The directions' second-order loss change, for an allocator that asks for it.
    """

    values: Tensor
    scale: float
    curvature: Curvature | None = None

    @property
    def gains(self) -> Tensor:
        """What each direction takes off the expected squared error of the weights, max(0, −σ²λ_i), descending."""
        return (-self.scale * self.values).clamp(min=0.0)


@dataclass(frozen=True)
class LoraFactors:
    """LoRA's two factors as stored in the adapter, before PEFT's scaling.

    Attributes:
        A: (r, in); of a convolution (r, channels, height, width), of fused experts (experts·r, in), expert by expert.
        B: (out, r); of a convolution (out, r, 1, 1), of fused experts (out, r·experts), the experts of one row of A
            beside each other.
        keys: Names in the adapter's file, below PEFT's prefix; None where `<module>.lora_A.weight` and the like.
    """

    A: Tensor
    B: Tensor
    keys: tuple[str, str] | None = None


@dataclass(frozen=True)
class LayerReport:
    """What was found for one layer; every field is JSON-representable.

    Attributes:
        name: Module name.
        in_features: Size of the input.
        out_features: Size of the output.
        rank: Rank of the adapter.
        tokens: Tokens that entered the Fisher.
        sigma: ‖Δ_raw‖₂, the spectral norm of the unnormalised Fisher-gradient step.
        ritz_values: The r smallest eigenvalues of Ω, ascending; 2r where two blocks of directions are paired.
        gap: λ_{r+1} − λ_r of Ω, from the Ritz estimate of λ_{r+1}; NaN where the solver does not know it.
        residual: Largest ‖Ωu − λu‖ relative to the largest wanted |λ|, which is at most ‖Ω‖.
        converged: Whether the solver reached its tolerance.
        solver: Name of the solver that gave the result.
        applies: Block products with Ω.
        damping: Damping as used, by factor.
        remedies: What had to be done to factorise or converge, in order; empty where nothing had to.
        gradient: What the gradient estimator says of its own error; empty where it is exact.
        seconds: Time spent on this layer's solve.
        digest_A: SHA-256 of A's bytes as stored.
        digest_B: SHA-256 of B's bytes as stored.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    tokens: int
    sigma: float
    ritz_values: tuple[float, ...]
    gap: float
    residual: float
    converged: bool
    solver: str
    applies: int
    damping: Mapping[str, float]
    remedies: tuple[str, ...]
    gradient: Mapping[str, float]
    seconds: float
    digest_A: str
    digest_B: str


@dataclass(frozen=True, repr=False)
class RunReport:
    """What a whole run did; every field is JSON-representable.

    Attributes:
        layers: One report per initialised layer, in the model's order.
        components: Name of the component taken, by kind (`estimator`, `gradient`, `solver`, `objective`, at times
            `allocator`).
        options: Options of each component, by kind.
        config: The `LoraDAConfig` as a mapping, with what was left open filled in.
        samples: Samples that were read.
        label_tokens: Labels that their losses average over.
        loss: Mean per-sample loss of the untouched model on those samples.
        scale: How the factors were scaled: `gamma` of a fixed scale, or what the line search tried and chose.
        seconds: Wall time by phase: `statistics`, `gradient`, `solve`, `scale`.
        notes: Everything that was assumed, skipped or mended, in the order it happened.
        versions: Versions of this package, Python, torch, transformers and peft.
        base: Fingerprint of the base weights that the run saw.
        allocation: How ranks were shared out: `unit`, `budget`, `spent`, the `ranks` and the `scaling` by layer, and
            the `gain` of these ranks and of the configured ones; empty where no allocator was asked.
    """

    layers: tuple[LayerReport, ...]
    components: Mapping[str, str]
    options: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    samples: int
    label_tokens: int
    loss: float
    scale: Mapping[str, Any]
    seconds: Mapping[str, float]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    base: str
    allocation: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<RunReport: {summaries.in_brief(self)}>"

    def __str__(self) -> str:
        return "\n".join(f"{key}: {value}" for key, value in summaries.summary(self).items())

    def _repr_html_(self) -> str:
        return summaries.as_html(self)

    def plot_spectra(self) -> Figure:
        """A picture of every layer's spectrum and residual.

        Returns:
            A matplotlib figure, which a notebook shows; `savefig` writes it to a file.

        Raises:
            OptionError: There is no layer to draw, or matplotlib cannot be imported.
        """
        if not self.layers:
            raise OptionError("the report holds no layer, so there is no spectrum to draw.")
        try:
            from lora_da_core.spectra import spectra_figure
        except ImportError as error:
            raise OptionError(f"plot_spectra needs matplotlib ({error}): pip install matplotlib.") from error
        return spectra_figure(self)

    def to_pandas(self) -> DataFrame:
        """What was found, one row per layer.

        Returns:
            A table indexed by the layer's name, with the fields of `LayerReport` as columns: Ritz values as `ritz_1`,
            …, damping as `damping_<factor>`, the gradient's own error as `gradient_<name>`, remedies as one text.

        Raises:
            OptionError: pandas cannot be imported.
        """
        try:
            from pandas import DataFrame, Index
        except ImportError as error:
            raise OptionError(f"to_pandas needs pandas ({error}): pip install pandas.") from error
        return DataFrame(summaries.records(self.layers), Index([layer.name for layer in self.layers], name="name"))


@dataclass(frozen=True, repr=False)
class LoraDAResult:
    """The factors by name of the module, or of a fused experts' parameter, and the report of how they came about."""

    factors: Mapping[str, LoraFactors]
    report: RunReport

    def __repr__(self) -> str:
        return f"<LoraDAResult: {summaries.in_brief(self.report)}>"

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def plot_spectra(self) -> Figure:
        """As `RunReport.plot_spectra`."""
        return self.report.plot_spectra()

    def to_pandas(self) -> DataFrame:
        """As `RunReport.to_pandas`."""
        return self.report.to_pandas()
