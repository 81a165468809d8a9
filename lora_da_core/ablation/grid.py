"""The grid file: what is run, what is varied, and the cells that follow, in groups that share statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from lora_da_core.ablation.axes import ABSENT
from lora_da_core.ablation.grid_cell import Cell, canonical, omega_key
from lora_da_core.ablation.grid_table import Expansion
from lora_da_core.ablation.run_table import known, run_settings, with_objective
from lora_da_core.ablation.settings import RunSettings
from lora_da_core.errors import OptionError
from lora_da_core.registry import Registry
from lora_da_core.sources import read_settings_file

_ID_LENGTH: Final = 16


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
        return omega_key(cell.config), cell.rank, cell.start_key(), canonical(cell.source_fisher)

    first: dict[str, int] = {}
    for cell in cells:
        for key in keys(cell)[2:]:
            first.setdefault(key, len(first))
    return tuple(sorted(cells, key=lambda cell: (*keys(cell)[:2], *(first[key] for key in keys(cell)[2:]))))


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
    plugins = registry or Registry()
    run = with_objective(f"{where} [run]", plugins, run_settings(f"{where} [run]", content["run"]))
    _check_reference(f"{where} [run]", plugins, run.reference)
    cells: dict[str, Cell] = {}
    for table in tables:
        for cell in Expansion(f"{where} [grid]", run, plugins, table).cells():
            named = replace(cell, id=_identity(run, cell))
            cells.setdefault(named.id, named)
    return Grid(run, tuple(cells.values()))


def _identity(run: RunSettings, cell: Cell) -> str:
    settings = {name: value for name, value in cell.settings().items() if value not in ABSENT.get(name, ())}
    content = canonical([run.identity(), settings])
    return hashlib.sha256(content.encode()).hexdigest()[:_ID_LENGTH]


def _data_key(cell: Cell) -> tuple[int, int, str, bool]:
    return cell.samples, cell.seed, cell.config.token_mask, cell.baseline is not None


def _check_reference(where: str, registry: Registry, name: str) -> None:
    if name not in ("auto", "none"):
        try:
            registry.create("estimator", name)
        except OptionError as error:
            raise OptionError(f"{where} reference: {error}") from error
