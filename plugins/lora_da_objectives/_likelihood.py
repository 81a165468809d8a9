"""Likelihoods of a batch's labels: per-sample losses, and the draws of a Fisher of the model's own labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from lora_da_core.errors import OptionError
from lora_da_core.types import LabelKind

IGNORED = -100
"""The label that no loss is taken of, as in transformers."""

ENUMERABLE = 512
"""Largest number of classes whose labels are enumerated: each label position costs one backward pass per class."""

_SAMPLED_ROWS = 256
"""Label positions whose float64 probabilities are held at once while labels are drawn."""


class Likelihood(ABC):
    """What the model says of the labels of one batch; labels are independent given the inputs."""

    targets: Tensor

    @property
    @abstractmethod
    def places(self) -> int:
        """The most labels that a sample has."""

    @property
    @abstractmethod
    def outcomes(self) -> int:
        """Terms that the expectation over one label has."""

    def losses(self) -> Tensor:
        """Per-sample losses (samples,) of the data's labels."""
        return self._losses_of(self.targets)

    @abstractmethod
    def _losses_of(self, labels: Tensor) -> Tensor:
        """Per-sample losses of labels shaped as the data's."""

    @abstractmethod
    def sampled_losses(self, generator: torch.Generator) -> Tensor:
        """Per-sample losses of labels drawn from the model, one uniform number each, in the order of the samples."""

    @abstractmethod
    def outcome_losses(self, place: int, outcome: int) -> Tensor:
        """What one outcome of each sample's label number `place` adds to its loss, weighted by its probability's root.

        The score has mean zero, so products between labels vanish in the expectation, and Σ g gᵀ over all places
        and outcomes is E[g gᵀ].
        """


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax over classes; a sample's loss is the mean over its labels.

    Attributes:
        scores: (labels, classes), the logits where labels are.
        targets: (labels,), the data's labels.
        counted: (samples, positions), bool, where labels are.
    """

    scores: Tensor
    targets: Tensor
    counted: Tensor

    @property
    def places(self) -> int:
        return int(self.counted.sum(1).max())

    @property
    def outcomes(self) -> int:
        return self.scores.shape[-1]

    def sampled_losses(self, generator: torch.Generator) -> Tensor:
        return self._losses_of(_sampled_classes(self.scores.detach(), generator))

    def outcome_losses(self, place: int, outcome: int) -> Tensor:
        log_p = functional.log_softmax(self.scores, dim=-1)[:, outcome]
        number = (self.counted.cumsum(1) - 1)[self.counted]
        return self._mean_by_sample(torch.where(number == place, _weighted(log_p), 0.0))

    def _losses_of(self, labels: Tensor) -> Tensor:
        return self._mean_by_sample(functional.cross_entropy(self.scores, labels, reduction="none"))

    def _mean_by_sample(self, token_losses: Tensor) -> Tensor:
        placed = token_losses.new_zeros(self.counted.shape).masked_scatter(self.counted, token_losses)
        return placed.sum(1) / self.counted.sum(1)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent yes-or-no labels (samples, labels): the mean binary cross-entropy of logits of that shape."""

    scores: Tensor
    targets: Tensor

    @property
    def places(self) -> int:
        return self.scores.shape[1]

    @property
    def outcomes(self) -> int:
        return 2

    def sampled_losses(self, generator: torch.Generator) -> Tensor:
        scores = self.scores.detach()
        drawn = _uniform(scores, generator) < torch.sigmoid(scores.double())
        return self._losses_of(drawn.to(scores.dtype))

    def outcome_losses(self, place: int, outcome: int) -> Tensor:
        score = self.scores[:, place]
        return _weighted(functional.logsigmoid(score if outcome else -score)) / self.places

    def _losses_of(self, labels: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(self.scores, labels, reduction="none").mean(1)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Real labels (samples, labels): the squared error is −log of a density N(score, 1/2), up to a constant."""

    scores: Tensor
    targets: Tensor

    @property
    def places(self) -> int:
        return self.scores.shape[1]

    @property
    def outcomes(self) -> int:
        return 1

    def sampled_losses(self, generator: torch.Generator) -> Tensor:
        scores = self.scores.detach()
        # Half a step above the uniform grid, so that 0 is never met; inversion, because normal numbers come in blocks.
        level = _uniform(scores, generator) + 2.0**-54
        return self._losses_of(scores + torch.erfinv(2 * level - 1).to(scores.dtype))

    def outcome_losses(self, place: int, outcome: int) -> Tensor:
        # ∂/∂score of the squared error is 2(score − label), of variance 2 where the label's is 1/2.
        return math.sqrt(2) * self.scores[:, place] / self.places

    def _losses_of(self, labels: Tensor) -> Tensor:
        return (self.scores - labels).square().mean(1)


def draws(
    likelihood: Callable[[], Likelihood], labels: LabelKind, generator: torch.Generator
) -> Iterator[Callable[[], Tensor]]:
    """Draws of the Fisher of the model's own likelihood (Kunstner et al. 2019, arXiv 1905.12558, section 2).

    `"sampled"` is one draw: every label is replaced by one drawn from the model. `"exact"` is one draw per label
    position and outcome.

    Args:
        likelihood: Runs the model on the batch, with a graph of its own.
        labels: `"sampled"` or `"exact"`.
        generator: Source of the labels, on the CPU.

    Yields:
        Functions that give per-sample losses (samples,).

    Raises:
        OptionError: `"exact"` with too many classes to enumerate, or labels of another kind.
    """
    if labels == "sampled":
        yield lambda: likelihood().sampled_losses(generator)
        return
    if labels != "exact":
        raise OptionError(f"labels is {labels!r}; labels drawn from the model are 'sampled' or 'exact'.")
    with torch.no_grad():
        seen = likelihood()
    if seen.outcomes > ENUMERABLE:
        raise OptionError(
            f"labels='exact' needs a backward pass for each of {seen.outcomes} classes at every label position; "
            f"at most {ENUMERABLE} classes are enumerated. Use labels='sampled'."
        )
    places, outcomes = seen.places, seen.outcomes
    del seen
    for place in range(places):
        for outcome in range(outcomes):
            yield partial(_outcome_losses, likelihood, place, outcome)


def _outcome_losses(likelihood: Callable[[], Likelihood], place: int, outcome: int) -> Tensor:
    return likelihood().outcome_losses(place, outcome)


def _weighted(log_p: Tensor) -> Tensor:
    """√p·(−log p); a class of probability 0 has an infinite −log p and no part in the expectation."""
    weight = (0.5 * log_p.detach()).exp()
    return torch.where(weight > 0, -weight * log_p, 0.0)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def _sampled_classes(scores: Tensor, generator: torch.Generator) -> Tensor:
    """One class per row of `scores` (labels, classes), drawn from its softmax by inversion."""
    uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64).to(scores.device)
    drawn = []
    for rows, level in zip(torch.split(scores, _SAMPLED_ROWS), torch.split(uniform, _SAMPLED_ROWS), strict=True):
        cumulative = torch.softmax(rows.double(), dim=-1).cumsum(-1)
        place = (level * cumulative[:, -1]).unsqueeze(-1)
        drawn.append(torch.searchsorted(cumulative, place, right=True).squeeze(-1))
    return torch.cat(drawn).clamp(max=scores.shape[-1] - 1)
