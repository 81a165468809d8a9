"""The grid file: what is run, what is varied, and the cells that follow."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from lora_da_core.ablation.axes import (
    ABSENT,
    AUTOMATIC,
    AXES,
    BASELINES,
    CHOICES,
    COMPONENTS,
    CONFIG_AXES,
    NEEDED_MODULES,
    NOTHING,
    TRAINING,
    Choice,
    kind_of,
)
from lora_da_core.ablation.run_table import hint, known, run_settings
from lora_da_core.ablation.settings import RunSettings, whole
from lora_da_core.components import Components
from lora_da_core.config import NO_ALLOCATOR, LoraDAConfig, Preset
from lora_da_core.errors import OptionError
from lora_da_core.pipeline import DEFAULT_PRESET, Pipeline
from lora_da_core.registry import Registry
from lora_da_core.sources import read_settings_file

MOST_CELLS: Final = 100_000
"""Cells of the largest grid."""

_WITHOUT_GAMMA: Final = ("auto", "unit")
_OBJECTIVE: Final = "causal_lm"
_ID_LENGTH: Final = 16


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
        return _canonical({name: value for name, value in self.settings().items() if name not in trained})

    def group_key(self) -> str:
        """Cells with equal keys share their statistics."""
        data = [self.seed, self.samples, self.config.token_mask, self.config.rounds]
        return _canonical([*data, "baselines"] if self.baseline else [*data, self.estimator, self.gradient])


@dataclass(frozen=True)
class Group:
    """Cells that share their statistics; an estimation serves them all."""

    key: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """A checked grid.

    Attributes:
        run: What the cells have in common.
        cells: Every cell once, in the order of the file.
    """

    run: RunSettings
    cells: tuple[Cell, ...]

    def groups(self, without: Iterable[str] = ()) -> tuple[Group, ...]:
        """The cells in groups, those that share a data draw following each other.

        Args:
            without: Ids of cells to leave out.
        """
        done = set(without)
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.id not in done:
                found.setdefault(cell.group_key(), []).append(cell)
        return tuple(
            Group(key, _in_order(cells)) for key, cells in sorted(found.items(), key=lambda item: _data_key(item[1][0]))
        )


def _in_order(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Cells of one Ω, of one start and of one Fisher of the source follow each other, so that each is made once."""

    def keys(cell: Cell) -> tuple[str, int, str, str]:
        return omega_key(cell.config), cell.rank, cell.start_key(), _canonical(cell.source_fisher)

    first: dict[str, int] = {}
    for cell in cells:
        for key in keys(cell)[2:]:
            first.setdefault(key, len(first))
    return tuple(sorted(cells, key=lambda cell: (*keys(cell)[:2], *(first[key] for key in keys(cell)[2:]))))


def omega_key(config: LoraDAConfig) -> str:
    """What the reference's Ω depends on beside the data."""
    names = ("alpha", "beta", "population", "damping", "damping_kind", "fisher_scale")
    return _canonical([getattr(config, name) for name in names])


def read_grid(path: Path | str, *, registry: Registry | None = None, **changes: Any) -> Grid:
    """Reads and checks a grid file; no model and no data set is touched.

    Args:
        path: A TOML file with `[run]` and `[grid]` (or several `[[grid]]`, whose cells are joined).
        registry: The installed plugins.
        **changes: Fields of `RunSettings` that win over the file's.

    Returns:
        The grid.

    Raises:
        OptionError: The file cannot be read, or holds an unknown name or a value out of range.
    """
    try:
        content = read_settings_file(Path(path))
    except OSError as error:
        raise OptionError(f"grid {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise OptionError(f"grid {path} is not valid TOML: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(f"grid {path} holds no tables.")
    content["run"] = {**content.get("run", {}), **changes} if isinstance(content.get("run", {}), dict) else None
    return make_grid(content, registry=registry, where=str(path))


def make_grid(content: Mapping[str, Any], *, registry: Registry | None = None, where: str = "grid") -> Grid:
    """Checks a grid that is given as mappings, as the TOML file holds them.

    Args:
        content: `run` and `grid`.
        registry: The installed plugins.
        where: What error messages call it.

    Returns:
        The grid.

    Raises:
        OptionError: As `read_grid`.
    """
    known(where, content, ("run", "grid"))
    tables = content.get("grid")
    tables = [tables] if isinstance(tables, Mapping) else tables
    if not isinstance(content.get("run"), Mapping) or not isinstance(tables, list) or not tables:
        raise OptionError(f"{where}: a grid needs a [run] and a [grid] table (or several [[grid]]).")
    run = run_settings(f"{where} [run]", content["run"])
    plugins = registry or Registry()
    _check_reference(f"{where} [run]", plugins, run.reference)
    cells: dict[str, Cell] = {}
    for table in tables:
        for cell in _Expansion(f"{where} [grid]", run, plugins, table).cells():
            named = replace(cell, id=_identity(run, cell))
            cells.setdefault(named.id, named)
    return Grid(run, tuple(cells.values()))


def pipeline_of(registry: Registry, cell: Cell) -> Pipeline:
    """The pipeline of a LoRA-DA cell.

    Args:
        registry: The installed plugins.
        cell: A cell that is no baseline.

    Returns:
        The pipeline.
    """
    assert cell.estimator and cell.gradient and cell.solver and cell.allocator
    parts = Components(
        estimator=registry.create("estimator", cell.estimator),
        gradient=registry.create("gradient", cell.gradient),
        objective=registry.create("objective", _OBJECTIVE),
        solver=None if cell.solver[0] == AUTOMATIC["solver"] else registry.create("solver", cell.solver),
        allocator=None if cell.allocator[0] == NO_ALLOCATOR else registry.create("allocator", cell.allocator),
    )
    return Pipeline(registry, parts, cell.config)


class _Expansion:
    """One `[grid]` table to cells."""

    def __init__(self, where: str, run: RunSettings, registry: Registry, table: Any) -> None:
        self.where, self.run, self.registry = where, run, registry
        if not isinstance(table, Mapping):
            raise OptionError(f"{where} is {table!r}; it must be a table of lists.")
        known(where, table, AXES)
        self.axes = {name: _listed(where, name, values) for name, values in table.items()}
        self._choices: dict[str, Choice] = {}
        self._checked: set[str] = set()

    def cells(self) -> Iterator[Cell]:
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
        gamma = None if config.rule in ("auto", "unit") else config.fixed_gamma
        config = replace(config, gamma=gamma, scale=config.rule)
        samples = chosen.get("samples", self.run.samples)
        self._try(lambda: whole("samples", samples, 1))
        parts = {kind: self._choice(kind, chosen.get(kind, getattr(preset, kind))) for kind in COMPONENTS}
        estimator, gradient, solver, allocator = (parts[kind] for kind in COMPONENTS)
        cell = Cell(rank, seed, samples, config, estimator, gradient, solver, allocator, preset=name)
        together = _canonical(parts)
        if together not in self._checked:
            self._try(lambda: pipeline_of(self.registry, cell).components.check())
            self._checked.add(together)
        return cell

    def _choice(self, kind: str, value: Any) -> Choice:
        key = _canonical([kind, value])
        if key not in self._choices:
            self._choices[key] = self._try(lambda: self._resolved(kind, value))
        return self._choices[key]

    def _resolved(self, kind: str, value: Any) -> Choice:
        if isinstance(value, Mapping):
            options = dict(value)
            name = options.pop("name", None)
        else:
            name, options = value if isinstance(value, tuple) else (value, {})
        if not isinstance(name, str):
            raise OptionError(f'{kind} {value!r} has no name; write {{name = "…", option = …}}.')
        if name == AUTOMATIC.get(kind):
            if options:
                raise OptionError(f"{kind} {name!r} takes no options.")
            return name, {}
        return name, asdict(self.registry.create(kind_of(kind), (name, options)).options)

    def _try(self, work: Any) -> Any:
        try:
            return work()
        except OptionError as error:
            raise type(error)(f"{self.where}: {error}") from error


def _scaling(given: Mapping[str, Any]) -> dict[str, Any]:
    """γ applies to some scales alone."""
    return {name: value for name, value in given.items() if name != "gamma" or given["scale"] not in _WITHOUT_GAMMA}


def _identity(run: RunSettings, cell: Cell) -> str:
    settings = {name: value for name, value in cell.settings().items() if value not in ABSENT.get(name, ())}
    content = _canonical([run.identity(), settings])
    return hashlib.sha256(content.encode()).hexdigest()[:_ID_LENGTH]


def _data_key(cell: Cell) -> tuple[int, int, str, bool]:
    return cell.samples, cell.seed, cell.config.token_mask, cell.baseline is not None


def _check_reference(where: str, registry: Registry, name: str) -> None:
    if name not in ("auto", "none"):
        try:
            registry.create("estimator", name)
        except OptionError as error:
            raise OptionError(f"{where} reference: {error}") from error


def _listed(where: str, name: str, values: Any) -> list[Any]:
    if not isinstance(values, (list, tuple)):
        raise OptionError(f"{where}: {name} is {values!r}; write a list.")
    if not values:
        raise OptionError(f"{where}: {name} is an empty list; give at least one value, or leave it out.")
    return list(values)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
