"""How far to go along a direction, and how to divide the way between A and B, from losses on a few samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_da_core.batches import labelled_part, padded_together, spread
from lora_da_core.capture import CaptureTask, Progress
from lora_da_core.omega import (
    DEFAULT_A_SCALE,
    StepLine,
    WeightStep,
    activation_scale,
    balanced_factors,
    embedding_scale,
    evenly_divided_factors,
)
from lora_da_core.operators import LinearMap, LowRankMap
from lora_da_core.probe import LowRankProbe
from lora_da_core.scale import LineSearch, line_search
from lora_da_core.types import Balance, Batch, LoraFactors

SEARCH_SAMPLES = 16
"""Samples that a line search reads."""

Steps = Mapping[str, WeightStep]
"""A step per layer."""


class Sizing:
    """Forward passes over a few evenly spaced samples.

    Args:
        task: What is run; its own changes are left out, since steps are counted from the base.
        batches: Where the samples come from.
        dtypes: Dtype of every layer's factors.
        note: Told where memory ran out and batches were halved.
        on_progress: Told of every loss.
    """

    def __init__(
        self,
        task: CaptureTask,
        batches: Sequence[Batch],
        dtypes: Mapping[str, torch.dtype],
        note: Callable[[str], None],
        on_progress: Progress | None = None,
    ) -> None:
        parts = [labelled_part(task.objective, batch) for batch in batches]
        chosen = spread([part for part in parts if part is not None], SEARCH_SAMPLES)
        if task.device.type != "cpu":
            # No more tokens at once than a pass with gradients had room for.
            chosen = padded_together(chosen, max(part["labels"].numel() for part in parts if part is not None))
        self._probe = LowRankProbe(replace(task, changes={}), chosen, note)
        self._specs = {spec.name: spec for spec in task.specs}
        self._dtypes, self._on_progress = dtypes, on_progress

    def search(self, current: Steps, direction: Steps, margin: float) -> tuple[LineSearch, dict[str, WeightStep]]:
        """The best step current + t·direction, one t for all layers.

        Args:
            current: Where the search starts; nothing of a layer that starts at the base.
            direction: Where it goes.
            margin: By how many standard errors the mean loss of the samples must fall.

        Returns:
            The search, and the steps at its multiplier, each of the direction's rank.
        """
        lines = {name: self._line(current.get(name), step) for name, step in direction.items()}
        tries = 0
        with self._probe as probe:

            def losses(multiplier: float) -> Tensor:
                nonlocal tries
                tries += 1
                if self._on_progress is not None:
                    self._on_progress("scale", tries, 0)
                at_base = not multiplier and not current
                return probe.losses({} if at_base else self.changes(_at(lines, multiplier)))

            found = line_search(losses, margin)
        return found, _at(lines, found.multiplier)

    def changes(self, steps: Steps) -> dict[str, LinearMap]:
        """The steps as changes of the layers' weights, in the dtype of their factors."""
        return {
            n: LowRankMap(step.left.to(self._dtypes[n]), step.right.to(self._dtypes[n])) for n, step in steps.items()
        }

    def divided(self, steps: Steps, balance: Balance) -> dict[str, LoraFactors]:
        """The steps as factors.

        Args:
            steps: The steps.
            balance: As in `LoraDAConfig`.

        Returns:
            A and B of every layer, as the adapter stores them.
        """
        scaling = {name: self._specs[name].scaling for name in steps}
        if balance == "even":
            return {n: evenly_divided_factors(step, scaling[n], self._dtypes[n]) for n, step in steps.items()}
        sizes = self._activation_scales(steps) if balance == "activation" else dict.fromkeys(steps, DEFAULT_A_SCALE)
        return {n: balanced_factors(step, scaling[n], sizes[n], self._dtypes[n]) for n, step in steps.items()}

    def _activation_scales(self, steps: Steps) -> dict[str, float]:
        tables = {name: step for name, step in steps.items() if self._specs[name].one_hot}
        others = {name: step for name, step in steps.items() if name not in tables}
        with self._probe as probe:
            energies = probe.energies({name: step.right.to(self._dtypes[name]) for name, step in others.items()})
        found = {name: embedding_scale(step, self._specs[name].scaling) for name, step in tables.items()}
        for name, step in others.items():
            found[name] = activation_scale(*energies[name], self._specs[name].in_features, step.right.shape[1])
        return found

    @staticmethod
    def _line(current: WeightStep | None, direction: WeightStep) -> Callable[[float], WeightStep]:
        if current is None:
            return lambda multiplier: replace(direction, left=direction.left * multiplier)
        return StepLine(current, direction).at


def _at(lines: Mapping[str, Callable[[float], WeightStep]], multiplier: float) -> dict[str, WeightStep]:
    return {name: line(multiplier) for name, line in lines.items()}
