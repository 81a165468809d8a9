"""The contracts a plugin fulfils. Abstract classes alone: no plugin is named here, none is privileged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from lora_da_core.operators import DenseMap, LinearMap, SymmetricOperator
from lora_da_core.types import (
    Batch,
    DampingKind,
    EigenResult,
    FisherScale,
    FisherStatistics,
    LabelKind,
    LayerSpec,
    LayerSpectrum,
    LoraFactors,
    RankUnit,
    TokenMask,
)

API_VERSION = 1
"""The version of these contracts; a plugin class states the one it was written for."""


@dataclass(frozen=True)
class NoOptions:
    """Options of a component that has none."""


OptionsT = TypeVar("OptionsT")


class Component(ABC, Generic[OptionsT]):
    """What all pluggable classes have in common.

    A class states `name`, `api_version` and `Options`, a frozen dataclass whose `__post_init__` raises
    `ValueError` for values out of range. `cls(options)` makes an instance.
    """

    name: ClassVar[str]
    api_version: ClassVar[int]
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(self, options: OptionsT) -> None:
        self.options = options


class Accumulator(ABC):
    """Running sums over tokens. Sums merge by addition, or by `merge` where the estimator is not additive.

    Between calls its tensors may be moved away and come back as others of the same values: attributes, and what is in
    lists, tuples and dicts among them. What other objects hold stays, and must not share memory with those.
    """

    @abstractmethod
    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        """Add tokens; all tokens and all uses of an example come in one call.

        Args:
            inputs: (tokens, in), the layer's inputs x; where `LayerSpec.one_hot` the places of their ones, (tokens,).
            output_grads: (tokens, out), gradients of the *per-sample* loss with respect to y; None for an
                estimator that needs none.
            example: (tokens,), int64, which sample of this call a token belongs to.
        """

    @abstractmethod
    def statistics(self) -> dict[str, Tensor]:
        """The sums so far. Tensors are live: copy before a further update if they must stay."""

    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Add another shard's statistics; the default adds tensor by tensor."""
        for key, value in self.statistics().items():
            value.add_(other[key].to(value.device, value.dtype))

    def end_pass(self, index: int, merged: FisherStatistics) -> None:  # noqa: B027 - most need no second pass
        """Called after pass `index` with the statistics merged over all shards, the input's included."""


class LayerFisher(ABC):
    """A damped Fisher information J of one layer, (out·in) × (out·in), behind the two things LoRA-DA needs."""

    damping: Mapping[str, float] = {}
    """The damping as used, by factor; for the report."""
    remedies: tuple[str, ...] = ()
    """What had to be done to factorise J, in order; empty where nothing had to."""

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """J⁻¹ vec(gradient), (out, in) to (out, in)."""

    @abstractmethod
    def apply(self, weights: Tensor) -> Tensor:
        """J vec(weights), (out, in) to (out, in)."""

    @abstractmethod
    def inverse_input_trace(self) -> SymmetricOperator:
        """V = Σ_o (J⁻¹)[o, :, o, :], the partial trace of J⁻¹ over outputs, of order `in`."""

    def step(self, gradient: LinearMap) -> LinearMap:
        """Δ_raw = −(J⁻¹G)ᵀ, (in, out), from G (out, in); override where it need not be formed."""
        return DenseMap(-self.solve(gradient.to_dense()).mT.contiguous())


class FisherEstimator(Component[OptionsT]):
    """Accumulates statistics of one layer and turns them into its Fisher."""

    @property
    def passes(self) -> int:
        """How often the data is read."""
        return 1

    @property
    def needs_output_grads(self) -> bool:
        """Whether a backward pass is needed."""
        return True

    @property
    def labels(self) -> LabelKind:
        """Whose labels the Fisher takes: the data's, the model's samples, or their exact expectation."""
        return "empirical"

    @property
    def additive(self) -> bool:
        """Whether shards merge by adding their tensors (otherwise by `Accumulator.merge`)."""
        return True

    @property
    def takes_one_hot(self) -> bool:
        """Whether its accumulators take layers with `LayerSpec.one_hot`; others are refused such layers by name."""
        return False

    @abstractmethod
    def input_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        """The accumulator of an input tensor; layers that read the same tensor share it. Called without grads."""

    @abstractmethod
    def layer_accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        """The accumulator of one layer."""

    @abstractmethod
    def fisher(
        self,
        statistics: FisherStatistics,
        *,
        damping: float,
        damping_kind: DampingKind,
        fisher_scale: FisherScale,
    ) -> LayerFisher:
        """The damped Fisher; damping enters here, so sweeping it needs no new pass."""

    @abstractmethod
    def statistics_bytes(self, spec: LayerSpec, *, samples: int, tokens: int, itemsize: int) -> tuple[int, int]:
        """Bytes of the (shared input, layer) statistics, before any is allocated.

        Args:
            spec: The layer.
            samples: Samples that will be read.
            tokens: Tokens that will pass the mask, over all samples.
            itemsize: Bytes of one element of the sums.
        """


class LossProbe(ABC):
    """Evaluates the loss with low-rank changes to layers; no weight is touched."""

    @abstractmethod
    def losses(self, changes: Mapping[str, LinearMap]) -> Tensor:
        """Per-sample losses (n,) where each named layer computes (W + change)·x, change (out, in)."""

    @abstractmethod
    def place(self, layer: str) -> tuple[torch.device, torch.dtype]:
        """Where a layer's changes must lie, and the dtype that suits them."""

    def weights(self, layer: str) -> Tensor:
        """W of a layer, (out, in), as it is or as it acts where it is stored otherwise; to be read, never written.

        Args:
            layer: Its name.

        Raises:
            TypeError: This probe has no weights to show.
        """
        raise TypeError(f"this probe does not show the weights of {layer}")


class GradientEstimator(Component[OptionsT]):
    """Estimates the mean gradient G (out, in) of one layer.

    A backward estimator overrides `accumulator` and `gradient`; one that needs forward passes alone sets
    `forward_only` and overrides `estimate`.
    """

    @property
    def forward_only(self) -> bool:
        """Whether the estimate comes from a `LossProbe` instead of a backward pass."""
        return False

    @property
    def follows_loss(self) -> bool:
        """Whether G is the loss's gradient, or an estimate of it; not, where another target takes its place."""
        return True

    @property
    def exact(self) -> bool:
        """Whether G is exact; an approximation must still be exact where G has rank one."""
        return True

    @property
    def additive(self) -> bool:
        """Whether shards merge by adding their tensors (otherwise by `Accumulator.merge`)."""
        return True

    @property
    def takes_one_hot(self) -> bool:
        """Whether its accumulator takes layers with `LayerSpec.one_hot`; one that takes no tokens is not asked."""
        return False

    def accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        """The accumulator of one layer; it sees every token, whatever the token mask."""
        raise TypeError(f"gradient estimator {self.name!r} takes no tokens of {spec.name}; call estimate()")

    @abstractmethod
    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        """G = (1/n) Σ_n G_n, (out, in), from the accumulator's sums."""

    def diagnostics(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> dict[str, float]:
        """How good the estimate of this layer is, for the report; an exact estimator has nothing to say."""
        return {}

    @abstractmethod
    def statistics_bytes(self, spec: LayerSpec, *, itemsize: int) -> int:
        """Bytes of one layer's statistics."""

    def estimate(
        self, probe: LossProbe, specs: Sequence[LayerSpec], *, generator: torch.Generator
    ) -> dict[str, dict[str, Tensor]]:
        """Statistics by layer from forward passes alone, to be given to `gradient`."""
        raise TypeError(f"gradient estimator {self.name!r} is not forward-only")


class Solver(Component[OptionsT]):
    """Finds the smallest eigenpairs of a symmetric operator. It does not know what LoRA is.

    On CUDA one instance is asked in several threads at once, on a stream of each: what belongs to a call is not kept
    on `self`, and no other stream is used.
    """

    @abstractmethod
    def smallest(self, operator: SymmetricOperator, rank: int, *, generator: torch.Generator) -> EigenResult:
        """The `rank` smallest eigenpairs.

        Args:
            operator: The operator; products in its own dtype.
            rank: 1 ≤ rank ≤ operator.size.
            generator: Source of all random numbers, on the operator's device.
        """


class Objective(Component[OptionsT]):
    """The loss that is differentiated, sample by sample."""

    @property
    def takes_pairs(self) -> bool:
        """Whether a sample is a pair of texts, chosen and rejected, as `preference_batches` lays them out."""
        return False

    masks_by_layer: ClassVar[bool] = True
    """Whether `token_mask` may differ between layers that see equally many tokens; if not, it is asked once for all."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Per-sample losses (samples,), each the mean over that sample's own label tokens."""

    def complete(self, model: nn.Module, batch: Batch) -> Batch:
        """Adds what only the model at its start can say, such as a reference's log-probabilities; asked once per batch.

        Args:
            model: The base function, in evaluation mode, without a graph.
            batch: On the model's device.

        Returns:
            The batch, what was added having one row per sample; as it is where nothing is missing.
        """
        return batch

    @abstractmethod
    def label_counts(self, batch: Batch) -> Tensor:
        """How many labels each sample's loss averages over, (samples,); 0 says there is nothing to learn."""

    def draw_counts(self, batch: Batch) -> Tensor:
        """How many numbers a sampled draw of `fisher_losses` takes from its generator, sample by sample.

        In the order of the samples, by `torch.rand` in float64: processes that share the samples then draw what one
        process would.

        Args:
            batch: The batch.

        Returns:
            (samples,), int64; by default one for every label.
        """
        return self.label_counts(batch)

    @abstractmethod
    def token_mask(self, batch: Batch, spec: LayerSpec, kind: TokenMask, tokens: int) -> Tensor:
        """Which of the layer's tokens count for the Fisher.

        Args:
            batch: The batch, every sample with a label.
            spec: The layer.
            kind: Those that predict a label, or all that the attention mask keeps.
            tokens: How many tokens of each sample the layer has just seen: those of the text, the patches of an
                image, those of one side of an encoder-decoder, or 1 where samples are pooled.

        Returns:
            bool (samples, tokens); another shape says that the layer's tokens are not known, and is refused.
        """

    def fisher_losses(
        self, model: nn.Module, batch: Batch, labels: LabelKind, *, generator: torch.Generator
    ) -> Iterator[Callable[[], Tensor]]:
        """Draws of the model-label Fisher: each call gives per-sample losses to differentiate once.

        The sum over draws of g gᵀ must be the statistic asked for (a draw of an expectation is weighted by the
        root of its probability). Only objectives with a likelihood can offer it.
        """
        raise TypeError(f"objective {self.name!r} cannot draw labels from the model")


class RankAllocator(Component[OptionsT]):
    """Shares a budget of ranks among layers that were solved at the largest rank each may get."""

    @property
    def unit(self) -> RankUnit:
        """What a rank costs: one, or its layer's in + out parameters."""
        return "rank"

    @property
    def budget(self) -> int | None:
        """The whole budget, in units; None for what the configured ranks come to."""
        return None

    @property
    def smallest_rank(self) -> int:
        """The rank that every layer gets at least; PEFT knows no rank 0."""
        return 1

    def largest_rank(self, spec: LayerSpec) -> int:
        """The rank that a layer is solved at; the core lowers it to what the layer's sizes and tokens allow.

        Args:
            spec: The layer, at its configured rank.
        """
        return 4 * spec.rank

    @property
    def needs_curvature(self) -> bool:
        """Whether `LayerSpectrum.curvature` is wanted; it takes one product with J for every direction."""
        return False

    @abstractmethod
    def allocate(
        self, spectra: Mapping[str, LayerSpectrum], costs: Mapping[str, int], budget: int
    ) -> Mapping[str, int]:
        """The rank of every layer.

        Args:
            spectra: By layer, at least `smallest_rank` values each.
            costs: What one rank costs, by layer, in units.
            budget: Units to spend at most; `smallest_rank` everywhere fits.

        Returns:
            Ranks between `smallest_rank` and the number of values, by layer.
        """

    def order(self, spectrum: LayerSpectrum) -> Sequence[int]:
        """Which directions of a layer are kept first; a layer of rank r keeps the first r of these.

        Args:
            spectrum: The layer's.

        Returns:
            A permutation of its directions; by default the smallest eigenvalues come first.
        """
        return range(len(spectrum.values))


class Regularizer(Component[OptionsT]):
    """A penalty on the factors of an adapter in training, from the Fisher of data that it must not forget."""

    @abstractmethod
    def penalty(
        self,
        factors: Mapping[str, LoraFactors],
        start: Mapping[str, LoraFactors],
        scaling: Mapping[str, float],
        fishers: Mapping[str, LayerFisher],
    ) -> Tensor:
        """The penalty, a scalar that can be differentiated with respect to the factors.

        Args:
            factors: A and B of every layer as they are now.
            start: As they were when training began.
            scaling: PEFT's factor on B·A by layer.
            fishers: The Fisher of every layer's weights.
        """

    def doubts(self, start: Mapping[str, LoraFactors]) -> Sequence[str]:
        """What a penalty from this start leaves open, one sentence each.

        Args:
            start: A and B of every layer when training begins.

        Returns:
            Nothing where all is well.
        """
        return ()


class TrainerPlugin(Component[OptionsT]):
    """Changes how a trainer trains: an optimizer, or a callback."""

    @property
    def changes_base(self) -> bool:
        """Whether training writes to the base's weights; nothing may then be counted from where it began."""
        return False

    @abstractmethod
    def attach(self, trainer: Any) -> None:
        """Makes a trainer use it; to be called between making the trainer and `trainer.train()`.

        Args:
            trainer: transformers' Trainer, or one that is derived from it, with a PeftModel.
        """
