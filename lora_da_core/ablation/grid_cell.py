"""One cell of a grid: its settings, what it shares with others, and its pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from lora_da_core.ablation.axes import AUTOMATIC, CAUSAL_LM, CHOICES, CONFIG_AXES, NOTHING, TRAINING, Choice
from lora_da_core.components import Components
from lora_da_core.config import NO_ALLOCATOR, LoraDAConfig
from lora_da_core.pipeline import DEFAULT_PRESET, Pipeline
from lora_da_core.registry import Registry


@dataclass(frozen=True)
class Cell:
    """One initialisation (and its fine-tunes): one line of the results.

    Attributes:
        rank: LoRA's r.
        seed: The seed.
        samples: Samples that are read.
        config: Settings of Ω; a baseline's are only those that its fidelity is measured by.
        estimator: Fisher estimator; None for a baseline.
        gradient: Gradient estimator; None for a baseline.
        solver: Solver, `("auto", {})` chooses per layer; None for a baseline.
        allocator: Rank allocator, `("none", {})` keeps `rank` everywhere; None for a baseline.
        objective: What is differentiated; None for a baseline.
        regularizer: Penalty of the fine-tune, `("none", {})` for none.
        source_fisher: Fisher estimator that the penalty is given, on the source's data; `("none", {})` without one.
        trainer: Trainer plugin of the fine-tune, `("none", {})` for AdamW.
        baseline: One of `BASELINES`, or None.
        preset: What filled the rest; it is not part of the identity.
        id: Hash of everything the result depends on.
    """

    rank: int
    seed: int
    samples: int
    config: LoraDAConfig
    estimator: Choice | None = None
    gradient: Choice | None = None
    solver: Choice | None = None
    allocator: Choice | None = None
    objective: Choice | None = None
    regularizer: Choice = (NOTHING, {})
    source_fisher: Choice = (NOTHING, {})
    trainer: Choice = (NOTHING, {})
    baseline: str | None = None
    preset: str = DEFAULT_PRESET
    id: str = field(default="", compare=False)

    def settings(self) -> dict[str, Any]:
        """The settings as flat JSON values, the same keys for every cell."""
        config = {name: getattr(self.config, name) for name in CONFIG_AXES}
        if self.baseline is not None:
            config = dict.fromkeys(config)
        parts: dict[str, Any] = {}
        for kind in CHOICES:
            choice: Choice | None = getattr(self, kind)
            parts[kind] = None if choice is None else choice[0]
            parts[f"{kind}_options"] = None if choice is None else choice[1]
        return {
            "baseline": self.baseline,
            **parts,
            "rank": self.rank,
            "samples": self.samples,
            "seed": self.seed,
            **config,
        }

    @property
    def plainly_trained(self) -> bool:
        """Whether the fine-tune is AdamW's alone, without penalty and plugin."""
        return all(getattr(self, name)[0] == NOTHING for name in TRAINING)

    def start_key(self) -> str:
        """Cells with equal keys start from the same factors: they differ in their training alone."""
        trained = {name for kind in TRAINING for name in (kind, f"{kind}_options")}
        return canonical({name: value for name, value in self.settings().items() if name not in trained})

    def group_key(self) -> str:
        """Cells with equal keys share their statistics."""
        data = [self.seed, self.samples, self.config.token_mask, self.config.rounds]
        parts = [self.estimator, self.gradient, *([self.objective] if self.objective != (CAUSAL_LM, {}) else [])]
        return canonical([*data, "baselines"] if self.baseline else [*data, *parts])


def omega_key(config: LoraDAConfig) -> str:
    """What the reference's Ω depends on beside the data."""
    names = ("alpha", "beta", "population", "damping", "damping_kind", "fisher_scale")
    return canonical([getattr(config, name) for name in names])


def pipeline_of(registry: Registry, cell: Cell) -> Pipeline:
    """The pipeline of a LoRA-DA cell.

    Args:
        registry: The installed plugins.
        cell: A cell that is no baseline.

    Returns:
        The pipeline.
    """
    assert cell.estimator and cell.gradient and cell.solver and cell.allocator and cell.objective
    parts = Components(
        estimator=registry.create("estimator", cell.estimator),
        gradient=registry.create("gradient", cell.gradient),
        objective=registry.create("objective", cell.objective),
        solver=None if cell.solver[0] == AUTOMATIC["solver"] else registry.create("solver", cell.solver),
        allocator=None if cell.allocator[0] == NO_ALLOCATOR else registry.create("allocator", cell.allocator),
    )
    return Pipeline(registry, parts, cell.config)


def canonical(value: Any) -> str:
    """A value as JSON, equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
