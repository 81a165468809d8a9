"""One `[grid]` table of a grid file, checked, to the cells that its lists make."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from lora_da_core.ablation.axes import (
    AUTOMATIC,
    AXES,
    BASELINES,
    CAUSAL_LM,
    COMPONENTS,
    CONFIG_AXES,
    NEEDED_MODULES,
    NOTHING,
    TRAINING,
    Choice,
    choice_of,
)
from lora_da_core.ablation.grid_cell import Cell, canonical, pipeline_of
from lora_da_core.ablation.run_table import hint, known
from lora_da_core.ablation.settings import RunSettings, whole
from lora_da_core.config import Preset
from lora_da_core.errors import OptionError
from lora_da_core.pipeline import DEFAULT_PRESET
from lora_da_core.registry import Registry

MOST_CELLS: Final = 100_000
"""Cells of the largest grid."""

_WITHOUT_GAMMA: Final = ("auto", "unit")


class Expansion:
    """One `[grid]` table to cells.

    Args:
        where: What error messages call the table.
        run: What the cells have in common.
        registry: The installed plugins.
        table: Its content.

    Raises:
        OptionError: It is no table of lists, or a name is unknown.
    """

    def __init__(self, where: str, run: RunSettings, registry: Registry, table: Any) -> None:
        self.where, self.run, self.registry = where, run, registry
        if not isinstance(table, Mapping):
            raise OptionError(f"{where} is {table!r}; it must be a table of lists.")
        known(where, table, AXES)
        self.axes = {name: _listed(where, name, values) for name, values in table.items()}
        self._choices: dict[str, Choice] = {}
        self._checked: set[str] = set()

    def cells(self) -> Iterator[Cell]:
        """The cells of the table, without ids; each setting is checked before it is used."""
        ranks, baselines = self.axes.get("rank", [8]), self.axes.get("baseline", [])
        for rank in ranks:
            self._try(lambda rank=rank: whole("rank", rank, 1))
        for name in baselines:
            if name not in BASELINES:
                raise OptionError(f"{self.where}: unknown baseline {name!r}.{hint(str(name), BASELINES)}")
            module, package = NEEDED_MODULES.get(name, ("", ""))
            if module and importlib.util.find_spec(module) is None:
                raise OptionError(f"{self.where}: PEFT's {name!r} needs the package {package}: pip install {package}.")
        trainings = self._trainings()
        if not (baselines and set(self.axes) <= {"baseline", "rank", *TRAINING}):
            for cell, training in itertools.product(self._lora_da(ranks), trainings):
                yield replace(cell, **training)
        standard = self.registry.resolve("preset", DEFAULT_PRESET).config
        for name, training, rank, seed in itertools.product(baselines, trainings, ranks, self.run.seeds):
            yield Cell(rank, seed, self.run.samples, replace(standard, seed=seed), baseline=name, **training)

    def _trainings(self) -> list[dict[str, Any]]:
        """What the fine-tunes are changed by: the product of the axes, a Fisher only where there is a penalty."""
        usual = {name: [AUTOMATIC[name]] for name in TRAINING}
        usual["source_fisher"] = [self.registry.resolve("preset", DEFAULT_PRESET).estimator]
        listed = [self.axes.get(name, usual[name]) for name in TRAINING]
        found: list[dict[str, Any]] = []
        for values in itertools.product(*listed):
            chosen = {name: self._choice(name, value) for name, value in zip(TRAINING, values, strict=True)}
            if chosen["regularizer"][0] == NOTHING:
                chosen["source_fisher"] = (NOTHING, {})
            self._check_training(chosen)
            if chosen not in found:
                found.append(chosen)
        return found

    def _check_training(self, chosen: Mapping[str, Choice]) -> None:
        regularizer, fisher, trainer = (chosen[name][0] for name in TRAINING)
        if self.run.finetune is None and (regularizer, trainer) != (NOTHING, NOTHING):
            raise OptionError(f"{self.where}: a regularizer or trainer takes a fine-tune; give [run.finetune].")
        if regularizer == NOTHING:
            return
        if self.run.source is None:
            raise OptionError(
                f"{self.where}: regularizer {regularizer!r} takes the data that is not to be forgotten; "
                "give [run.source]."
            )
        if fisher == NOTHING:
            raise OptionError(f"{self.where}: regularizer {regularizer!r} takes a Fisher; source_fisher is 'none'.")
        if trainer != NOTHING and self.registry.create("trainer", chosen["trainer"]).changes_base:
            raise OptionError(
                f"{self.where}: trainer {trainer!r} changes the base's weights, from which regularizer "
                f"{regularizer!r} counts changes; list them in [[grid]] tables of their own."
            )

    def _lora_da(self, ranks: Sequence[Any]) -> Iterator[Cell]:
        axes = {name: values for name, values in self.axes.items() if name not in ("rank", "baseline", *TRAINING)}
        if "gamma" in axes and all(rule in _WITHOUT_GAMMA for rule in axes.setdefault("scale", ["fixed"])):
            raise OptionError(f"{self.where}: gamma is listed, but scale is never 'fixed', 'stable' or 'product'.")
        each = len(self.run.seeds) * len(ranks) * len(self._trainings())
        cells = math.prod(map(len, axes.values())) * each
        if cells > MOST_CELLS:
            raise OptionError(f"{self.where}: these lists make {cells} cells, more than {MOST_CELLS}; divide the grid.")
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            for seed, rank in itertools.product(self.run.seeds, ranks):
                yield self._cell(chosen, rank, seed)

    def _cell(self, chosen: Mapping[str, Any], rank: int, seed: int) -> Cell:
        name = chosen.get("preset", DEFAULT_PRESET)
        preset: Preset = self._try(lambda: self.registry.resolve("preset", name))
        given = {name: value for name, value in chosen.items() if name in CONFIG_AXES}
        config = self._try(lambda: replace(preset.config, **{**_scaling(given), "seed": seed, "samples": None}))
        gamma = None if config.rule in _WITHOUT_GAMMA else config.fixed_gamma
        config = replace(config, gamma=gamma, scale=config.rule)
        samples = chosen.get("samples", self.run.samples)
        self._try(lambda: whole("samples", samples, 1))
        usual = {"objective": self.run.objective or CAUSAL_LM}
        parts = {k: self._choice(k, chosen.get(k, usual.get(k) or getattr(preset, k, None))) for k in COMPONENTS}
        estimator, gradient, solver, allocator, objective = (parts[kind] for kind in COMPONENTS)
        cell = Cell(rank, seed, samples, config, estimator, gradient, solver, allocator, objective, preset=name)
        together = canonical(parts)
        if together not in self._checked:
            self._try(lambda: pipeline_of(self.registry, cell).components.check())
            self._checked.add(together)
        return cell

    def _choice(self, kind: str, value: Any) -> Choice:
        key = canonical([kind, value])
        if key not in self._choices:
            self._choices[key] = self._try(lambda: choice_of(self.registry, kind, value))
        return self._choices[key]

    def _try(self, work: Any) -> Any:
        try:
            return work()
        except OptionError as error:
            raise type(error)(f"{self.where}: {error}") from error


def _scaling(given: Mapping[str, Any]) -> dict[str, Any]:
    """γ applies to some scales alone."""
    return {name: value for name, value in given.items() if name != "gamma" or given["scale"] not in _WITHOUT_GAMMA}


def _listed(where: str, name: str, values: Any) -> list[Any]:
    if not isinstance(values, (list, tuple)):
        raise OptionError(f"{where}: {name} is {values!r}; write a list.")
    if not values:
        raise OptionError(f"{where}: {name} is an empty list; give at least one value, or leave it out.")
    return list(values)
