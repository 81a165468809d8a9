"""Runs the cells of a group: one estimation, then solve, compare and fine-tune cell by cell."""

from __future__ import annotations

import copy
import hashlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_da_core.ablation.fidelity import Reference, reference_name, reference_pipeline
from lora_da_core.ablation.finetune import seeded
from lora_da_core.ablation.grid import Group
from lora_da_core.ablation.grid_cell import Cell, pipeline_of
from lora_da_core.ablation.memory import PeakMemory
from lora_da_core.ablation.results import DONE, FAILED, Record
from lora_da_core.ablation.stacked import Member, finetune_together
from lora_da_core.ablation.training import BY_ITSELF, Source, Training
from lora_da_core.ablation.workspace import Workspace
from lora_da_core.components import Components
from lora_da_core.estimation import Estimates
from lora_da_core.sizing import SEARCH_SAMPLES
from lora_da_core.types import LoraDAResult, LoraFactors, Offset

logger = logging.getLogger(__name__)

RESULT_FIELDS: Mapping[str, Any] = {
    "error": None,
    "seconds": None,
    "phases": {},
    "reused": False,
    "spent": 0.0,
    "peak_bytes": None,
    "memory": {},
    "passes": None,
    "searched": None,
    "reference": None,
    "reference_error": None,
    "angle": None,
    "angle_max": None,
    "worst_layer": None,
    "objective_gap": None,
    "objective_gap_max": None,
    "applies": None,
    "not_converged": None,
    "remedied": None,
    "base_loss": None,
    "digest": None,
    "curves": [],
    "notes": [],
}
"""What every record has beside its settings; null where a cell did not get there."""


@dataclass(frozen=True)
class Shared:
    """A group's estimation: what it cost, and whether an earlier cell has paid for it."""

    estimates: Estimates
    memory: PeakMemory
    reused: bool


@dataclass(frozen=True)
class Start:
    """An initialisation and what its record says, for all cells that differ in their training alone."""

    key: str
    result: LoraDAResult
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Waiting:
    """A cell that is done but for its fine-tune, which it will have together with others."""

    cell: Cell
    group: Group
    record: Record
    factors: Mapping[str, LoraFactors]
    offset: Mapping[str, LoraFactors]


class GroupRun:
    """Runs groups one after the other; it keeps the reference of the last data draw, and the last start.

    Args:
        workspace: The model and the data.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._reference: tuple[Any, Reference | None, str | None] = (None, None, None)
        self._training = Training(workspace)
        self._start: Start | None = None
        self._untrained: dict[str, tuple[Mapping[str, LoraFactors], Mapping[str, LoraFactors]]] = {}

    def records(self, *groups: Group) -> Iterator[Record]:
        """The cells of groups, each finished before the next begins; a failure is a record like any other.

        Cells that are fine-tuned together finish together.

        Args:
            *groups: The cells.

        Yields:
            One record per cell.
        """
        tune = self.workspace.run.finetune
        waiting: list[Waiting] = []
        for group in groups:
            for cell, record in self._group_records(group):
                if cell.id not in self._untrained:
                    yield record
                    continue
                waiting.append(Waiting(cell, group, record, *self._untrained.pop(cell.id)))
                name = cell.baseline or f"{cell.preset} {cell.estimator}"
                logger.info("%s (%s) took %.1f s, its fine-tune waits", name, cell.id, record["spent"])
                if tune is not None and len(waiting) * len(tune.learning_rates) >= tune.together:
                    yield from self._finetuned_together(waiting)
                    waiting = []
        if waiting:
            yield from self._finetuned_together(waiting)

    def _group_records(self, group: Group) -> Iterator[tuple[Cell, Record]]:
        cells = [self._with_population(cell) for cell in group.cells]
        if cells[0].baseline is not None:
            for cell in cells:
                yield cell, self._record(cell, group, lambda cell=cell: self._baseline(cell))  # type: ignore[misc]
            return
        start = time.perf_counter()
        try:
            estimates, memory = self._estimated(cells)
        except Exception as error:
            for cell in cells:
                yield cell, failed_record(cell, group, error, time.perf_counter() - start)
                start = time.perf_counter()
            return
        waited = time.perf_counter() - start
        for number, cell in enumerate(cells):
            shared = Shared(estimates, memory, reused=number > 0)
            record = self._record(cell, group, lambda cell=cell, shared=shared: self._solved(cell, shared))  # type: ignore[misc]
            if number == 0:
                record["spent"] += waited
            yield cell, record

    def _finetuned_together(self, waiting: Sequence[Waiting]) -> Iterator[Record]:
        from lora_da_core import adapter

        space, tune = self.workspace, self.workspace.run.finetune
        assert tune is not None
        start, rates = time.perf_counter(), tune.learning_rates
        try:
            targets = {
                rank: adapter.resolve_targets(space.model, space.lora(rank))
                for rank in sorted({each.cell.rank for each in waiting})
            }
            members = [
                Member(
                    each.factors,
                    space.training(each.cell.seed),
                    rate,
                    each.offset,
                    {spec.name: spec.scaling for spec in targets[each.cell.rank].specs},
                    each.cell.config.frozen,
                )
                for each in waiting
                for rate in rates
            ]
            some = next(iter(targets.values()))
            curves = finetune_together(space.model, some.modules, some.specs, members, tune)
        except Exception as error:
            for each in waiting:
                spent = each.record["spent"] + (time.perf_counter() - start) / len(waiting)
                yield failed_record(each.cell, each.group, error, spent)
            return
        share = (time.perf_counter() - start) / len(waiting)
        for place, each in enumerate(waiting):
            own = curves[place * len(rates) : (place + 1) * len(rates)]
            yield {**each.record, "curves": [asdict(curve) for curve in own], "spent": each.record["spent"] + share}

    def _with_population(self, cell: Cell) -> Cell:
        if cell.config.population is not None:
            return cell
        return replace(cell, config=replace(cell.config, population=self.workspace.population))

    def _record(self, cell: Cell, group: Group, work: Callable[[], dict[str, Any]]) -> Record:
        start = time.perf_counter()
        try:
            found = work()
        except Exception as error:
            return failed_record(cell, group, error, time.perf_counter() - start)
        return {**_head(cell, group, DONE), **found, "spent": time.perf_counter() - start}

    def _estimated(self, cells: list[Cell]) -> tuple[Estimates, PeakMemory]:
        cell, space = cells[0], self.workspace
        draw = space.draw(cell.samples, cell.seed, cell.objective)
        # The smallest rank: too few tokens for a larger one is that cell's failure alone.
        lora = space.lora(min(each.rank for each in cells))
        pipeline = pipeline_of(space.registry, cell)
        pipeline.config = replace(pipeline.config, samples=draw.samples)
        with PeakMemory(space.device) as memory:
            estimates = pipeline.estimate(space.model, [*draw.batches, *draw.unseen], lora)
        return estimates, memory

    def _solved(self, cell: Cell, shared: Shared) -> dict[str, Any]:
        from lora_da_core import adapter

        if self._start is None or self._start.key != cell.start_key():
            self._start = None
            self._start = self._made_start(cell, shared)
        result, space = self._start.result, self.workspace
        found = {**copy.deepcopy(dict(self._start.record)), "reused": shared.reused}
        if space.run.finetune is None:
            return found
        if self._waits(cell):
            self._untrained[cell.id] = (result.factors, {} if cell.config.offset == "none" else result.factors)
            return found
        fitted = adapter.allocated_config(space.lora(cell.rank), result.report.allocation)
        source = self._training.source(cell)
        # The base is every cell's, so what is to be taken out of it is taken out beside it.
        offset: Offset = "none" if cell.config.offset == "none" else "frozen_adapter"
        wrapped = adapter.apply(space.model, fitted, result.factors, offset=offset, frozen=cell.config.frozen)
        try:
            return self._finetuned(cell, found, wrapped, source)
        finally:
            wrapped.unload()

    def _made_start(self, cell: Cell, shared: Shared) -> Start:
        space, pipeline = self.workspace, pipeline_of(self.workspace.registry, cell)
        with PeakMemory(space.device) as memory:
            result = pipeline.solve(shared.estimates, space.lora(cell.rank))
        layers, phases = result.report.layers, dict(result.report.seconds)
        digests = "".join(layer.digest_A + layer.digest_B for layer in layers)
        record = {
            "seconds": sum(phases.values()),
            "phases": phases,
            "peak_bytes": max(shared.memory.peak, shared.memory.kept + memory.peak),
            "memory": {
                "estimate": shared.memory.peak,
                "statistics": shared.memory.kept,
                "solve": memory.peak,
            },
            "passes": pipeline.components.estimator.passes,
            "searched": _searched(result.report.scale, pipeline.config.balance),
            "applies": sum(layer.applies for layer in layers),
            "not_converged": sum(not layer.converged for layer in layers),
            "remedied": sum(bool(layer.remedies) for layer in layers),
            "base_loss": result.report.loss,
            "digest": hashlib.sha256(digests.encode()).hexdigest(),
            "notes": [*space.draw(cell.samples, cell.seed, cell.objective).notes, *result.report.notes],
        }
        record |= self._fidelity(cell, {name: pair.A for name, pair in result.factors.items()}, shared.estimates)
        return Start(cell.start_key(), result, record)

    def _baseline(self, cell: Cell) -> dict[str, Any]:
        from lora_da_core import adapter
        from lora_da_core.ablation import baselines

        assert cell.baseline is not None
        space = self.workspace
        draw, lora = space.draw(cell.samples, cell.seed), space.lora(cell.rank)
        names = [spec.name for spec in adapter.resolve_targets(space.model, lora).specs]
        fresh = copy.deepcopy(space.model)
        settings = {
            "r": cell.rank,
            "lora_alpha": space.run.lora_alpha,
            "use_rslora": space.run.use_rslora,
            "task_type": "CAUSAL_LM",
        }
        with seeded(cell.seed, space.device), PeakMemory(space.device) as memory:
            start = time.perf_counter()
            wrapped = baselines.initialise(cell.baseline, fresh, names, draw.batches, settings)
            seconds = time.perf_counter() - start
        found = {
            "seconds": seconds,
            "phases": {"initialise": seconds},
            "peak_bytes": memory.peak,
            "passes": baselines.PASSES[cell.baseline],
            "notes": list(draw.notes),
        }
        factors = baselines.factors_of(wrapped)
        found |= self._fidelity(cell, {name: pair.A for name, pair in factors.items()}, None)
        if space.run.finetune is None:
            return found
        if self._waits(cell):
            self._untrained[cell.id] = (factors, baselines.offset_of(wrapped, space.model, factors))
            return found
        return self._finetuned(cell, found, wrapped, self._training.source(cell))

    def _waits(self, cell: Cell) -> bool:
        """Whether the cell is fine-tuned together with others."""
        tune = self.workspace.run.finetune
        return tune is not None and tune.together > 1 and cell.plainly_trained

    def _finetuned(self, cell: Cell, found: dict[str, Any], model: nn.Module, source: Source | None) -> dict[str, Any]:
        tune = self.workspace.run.finetune
        curves = [asdict(curve) for curve in self._training.curves(cell, model, source)]
        note = [BY_ITSELF] if tune is not None and tune.together > 1 else []
        return {**found, "curves": curves, "notes": [*found["notes"], *note]}

    def _fidelity(self, cell: Cell, factors: Mapping[str, Tensor], estimates: Estimates | None) -> dict[str, Any]:
        if self.workspace.run.reference == "none":
            return {}
        start = time.perf_counter()
        reference, error = self._reference_of(cell, estimates)
        if reference is None:
            return {"reference_error": error}
        try:
            found = reference.fidelity(factors, cell.config)
        except Exception as fault:  # the cell itself is done; what its reference could not do must not lose it
            return {"reference_error": f"{type(fault).__name__}: {fault}"}
        return {**asdict(found), "fidelity_seconds": time.perf_counter() - start}

    def _reference_of(self, cell: Cell, estimates: Estimates | None) -> tuple[Reference | None, str | None]:
        key = (cell.samples, cell.seed, cell.config.token_mask, cell.objective)
        if self._reference[0] != key:
            self._reference = (None, None, None)
            try:
                self._reference = (key, self._made_reference(cell, estimates), None)
            except Exception as error:
                self._reference = (key, None, f"{type(error).__name__}: {error}")
        return self._reference[1:]

    def _made_reference(self, cell: Cell, estimates: Estimates | None) -> Reference:
        from lora_da_core import adapter

        space = self.workspace
        draw, lora = space.draw(cell.samples, cell.seed, cell.objective), space.lora(1)
        specs = adapter.resolve_targets(space.model, lora).specs
        name = reference_name(
            space.registry,
            space.run.reference,
            specs,
            samples=draw.samples,
            tokens=draw.tokens,
            device=space.device,
        )
        pipeline = reference_pipeline(space.registry, name, cell.config, cell.objective)
        if estimates is not None and _same_estimators(estimates, pipeline.components):
            return Reference(name, pipeline, estimates)
        return Reference(name, pipeline, pipeline.estimate(space.model, draw.batches, lora))


def failed_record(cell: Cell, group: Group, error: Exception | str, spent: float = 0.0) -> Record:
    """The record of a cell that failed.

    Args:
        cell: The cell.
        group: Its group.
        error: What happened.
        spent: Seconds until then.

    Returns:
        The record.
    """
    record = {**_head(cell, group, FAILED), "error": error, "spent": spent}
    if isinstance(error, Exception):
        record["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        where = traceback.extract_tb(error.__traceback__)[-1]
        record["notes"] = [f"raised in {where.name} ({Path(where.filename).name}, line {where.lineno})"]
    return record


def _head(cell: Cell, group: Group, status: str) -> Record:
    return {
        "cell": cell.id,
        "status": status,
        "preset": None if cell.baseline else cell.preset,
        "group": hashlib.sha256(group.key.encode()).hexdigest()[:8],
        **cell.settings(),
        **copy.deepcopy(dict(RESULT_FIELDS)),
    }


def _searched(scale: Mapping[str, Any], balance: str) -> int:
    """Samples that went forward through the model to size the step: every loss, the base's, and one look at A·x."""
    searches = [search for search in (*scale.get("earlier", ()), scale) if "tried" in search]
    looks = int(bool(searches) and balance == "activation")
    return SEARCH_SAMPLES * (looks + sum(1 + len(search["tried"]) for search in searches))


def _same_estimators(estimates: Estimates, parts: Components) -> bool:
    made = estimates.task
    pairs = ((made.estimator, parts.estimator), (made.gradient, parts.gradient))
    return all((a.name, a.options) == (b.name, b.options) for a, b in pairs)
