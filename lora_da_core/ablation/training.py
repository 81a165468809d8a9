"""The fine-tunes of cells that are trained one by one: plainly, with a penalty, or with a trainer plugin."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_da_core.ablation.axes import NOTHING
from lora_da_core.ablation.finetune import Curve, finetune
from lora_da_core.ablation.grid_cell import Cell
from lora_da_core.ablation.trainer_finetune import finetune_by_trainer
from lora_da_core.ablation.workspace import Workspace
from lora_da_core.config import LoraDAConfig
from lora_da_core.interfaces import LayerFisher, TrainerPlugin
from lora_da_core.pipeline import build_pipeline
from lora_da_core.regularization import FISHER_DAMPING, penalty_from

BY_ITSELF = "Trained by itself: adapters with a penalty or a trainer plugin are not trained together."
"""Note of a cell in a grid whose other cells are trained together."""


@dataclass(frozen=True)
class Source:
    """What a regularizer is given: the Fisher of every layer on the source's data, and PEFT's factor on B·A."""

    fishers: Mapping[str, LayerFisher]
    scaling: Mapping[str, float]


class Training:
    """Trains cells; it keeps the source's Fishers of the last seed.

    Args:
        workspace: The model and the data.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._kept: tuple[Any, Mapping[str, LayerFisher]] = (None, {})

    def source(self, cell: Cell) -> Source | None:
        """What the cell's regularizer is given; to be asked before the model carries an adapter.

        Args:
            cell: The cell.

        Returns:
            None where it has no regularizer.
        """
        from lora_da_core import adapter

        if self.workspace.run.objective is not None:
            self.workspace.training(cell.seed)  # the base's own word on every pair
        if cell.regularizer[0] == NOTHING:
            return None
        space, key = self.workspace, (cell.seed, cell.source_fisher)
        if self._kept[0] != key:
            self._kept = (None, {})
            pipeline = build_pipeline(cell.source_fisher, config=LoraDAConfig(seed=cell.seed))
            estimates = pipeline.estimate(space.model, space.source(cell.seed), space.lora(1))
            self._kept = (key, pipeline.fishers(estimates, damping=FISHER_DAMPING))
        specs = adapter.resolve_targets(space.model, space.lora(cell.rank)).specs
        return Source(self._kept[1], {spec.name: spec.scaling for spec in specs})

    def curves(self, cell: Cell, model: nn.Module, source: Source | None) -> list[Curve]:
        """A fine-tune for every learning rate, each from the adapter as it is.

        Args:
            cell: The cell.
            model: A PeftModel. Its adapter is as training leaves it in the end; its base stays as it is, as a plugin
                that changes the base is given a copy of the whole.
            source: As `source` gives it for the cell.

        Returns:
            One curve for each rate.
        """
        space, settings = self.workspace, self.workspace.run.finetune
        assert settings is not None
        data, penalty = space.training(cell.seed), None
        if source is not None:
            regularizer = space.registry.create("regularizer", cell.regularizer)
            penalty = penalty_from(model, regularizer, source.scaling, source.fishers)
        plugin: TrainerPlugin[Any] | None = None
        if cell.trainer[0] != NOTHING:
            plugin = space.registry.create("trainer", cell.trainer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        start = [parameter.detach().clone() for parameter in trained]
        found = []
        for rate in settings.learning_rates:
            for parameter, value in zip(trained, start, strict=True):
                parameter.data.copy_(value)
            if plugin is None:
                found.append(finetune(model, data, settings, rate, penalty))
            else:
                own = copy.deepcopy(model) if plugin.changes_base else model
                found.append(finetune_by_trainer(own, data, settings, rate, plugin, penalty))
        return found
