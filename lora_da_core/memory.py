"""The plan of a run: bytes and passes, from shapes alone, before weights or data are touched."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_da_core.allocation import Allocation
from lora_da_core.display import html_table
from lora_da_core.errors import OptionError
from lora_da_core.memory_activations import Activations, BatchShape, guess, trace
from lora_da_core.memory_phases import Group, LayerBytes, Phases, PlanRow, by_phase, divided, statistics_of
from lora_da_core.memory_time import relative_time
from lora_da_core.memory_workspace import Tokens, WorkspaceProbe
from lora_da_core.operators import accumulation_dtype
from lora_da_core.placement import model_device, resident_bytes
from lora_da_core.sizing import SEARCH_SAMPLES
from lora_da_core.sources import reason
from lora_da_core.types import LayerSpec

if TYPE_CHECKING:
    from peft import LoraConfig

    from lora_da_core.pipeline import Pipeline

TOKENS_PER_BATCH = 2048
"""Tokens of a batch where no batch size is given, as `lora-da init` fills them."""

BATCH_TOKENS = {"cpu": 256, "cuda": 2048}
"""What a batch costs beside its tokens, in tokens: sums are read and written once a batch, and layers hooked.

On an H200 a batch of 1,024 tokens of a 7B model took as long as one of 3,584: the host's part decides there.
"""

_UNITS = {"B": 1, "KB": 10**3, **{f"{p}B": 1000**n for n, p in enumerate("kMGTP", 1)}}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGTP", 1)}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")


def parse_size(text: str) -> int:
    """Bytes of a size as people write it.

    >>> parse_size("24GiB"), parse_size("24GB"), parse_size("1.5 KiB")
    (25769803776, 24000000000, 1536)

    Args:
        text: A number and a unit.

    Raises:
        OptionError: It is something else, or zero.
    """
    match = _SIZE.fullmatch(text)
    size = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1 <= size < math.inf:
        raise OptionError(
            f"{text!r} is no size of memory; write a number above 0 and its unit, such as 24GiB (1024³ bytes), 24GB "
            "(1000³) or 800MB."
        )
    return int(size)


def size_text(size: int) -> str:
    """Bytes as people read them.

    >>> size_text(25769803776), size_text(1536), size_text(17)
    ('24.0 GiB', '1.5 KiB', '17 B')
    """
    power = min(4, int(math.log(size, 1024))) if size > 0 else 0
    return f"{size / 1024**power:.1f} {'KMGT'[power - 1]}iB" if power else f"{size} B"


@dataclass(frozen=True)
class Workload:
    """The data of a run, as far as memory depends on it.

    Attributes:
        samples: How many samples are read.
        max_length: Tokens of the longest one: batches are padded to it.
        tokens: Tokens of all samples together; None takes the longest for each.
        batch_size: Samples in a batch; None fills batches up to 2048 tokens, as `lora-da init` does.
        texts: Texts of a sample, each of at most `max_length` tokens: 2 where a chosen and a rejected one are compared.
    """

    samples: int = 64
    max_length: int = 1024
    tokens: int | None = None
    batch_size: int | None = None
    texts: int = 1

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("max_length", 2), ("tokens", 1), ("batch_size", 1), ("texts", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} is {value}; it must be at least {least}.")
        most = self.samples * self.texts * self.max_length
        if self.tokens is not None and self.tokens > most:
            raise OptionError(
                f"tokens is {self.tokens}, but {self.samples} samples of at most {self.texts * self.max_length} tokens "
                f"have {most}."
            )

    @property
    def total(self) -> int:
        """Tokens of all samples together."""
        return self.samples * self.texts * self.max_length if self.tokens is None else self.tokens

    @property
    def batch(self) -> BatchShape:
        """The largest batch."""
        most = max(1, TOKENS_PER_BATCH // (self.texts * self.max_length))
        size = most if self.batch_size is None else self.batch_size
        return BatchShape(min(size, self.samples), self.max_length, self.texts)

    @property
    def search(self) -> BatchShape:
        """The largest batch of the line search."""
        return replace(self.batch, samples=min(self.batch.samples, SEARCH_SAMPLES))


@dataclass(frozen=True, repr=False)
class Plan:
    """What a run will take; the process itself, its libraries above all, comes on top.

    Attributes:
        peak_bytes: Most bytes at a time: of the phase that takes most.
        passes: How often the data is read.
        seconds: Time of these passes at the throughput that was given; None where none was. A pass that taps some of
            the layers takes less than one that taps all.
        relative_time: What these passes take, in units of one over all layers.
        tokens: Tokens that each of them reads.
        weights: Bytes of the model.
        statistics_bytes: Statistics of all layers together.
        layers: How many layers are adapted.
        layers_per_pass: How many of them at most have their statistics taken in one pass.
        parts: The names of the layers of each pass.
        batch_size: Samples of the greatest length in a batch: the workload's, or fewer where the limit asks for it.
        batch_tokens: The tokens of such a batch.
        max_memory: The limit that was given.
        fits: Whether the peak is within the limit.
        rows: What the peak of every phase is made of.
        notes: What was assumed, and what to change where it does not fit.
    """

    peak_bytes: int
    passes: int
    seconds: float | None
    relative_time: float
    tokens: int
    weights: int
    statistics_bytes: int
    layers: int
    layers_per_pass: int
    parts: tuple[tuple[str, ...], ...]
    batch_size: int
    batch_tokens: int
    max_memory: int | None
    fits: bool
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        limit = (
            "" if self.max_memory is None else f" of {size_text(self.max_memory)}{'' if self.fits else ', too much'}"
        )
        return f"<Plan: {size_text(self.peak_bytes)}{limit}, {passes}, {self.layers} layers>"

    def _repr_html_(self) -> str:
        totals = [(phase, "together", size_text(total)) for phase, total in self.phases().items()]
        rows = [(row.phase, row.what, size_text(row.bytes)) for row in self.rows]
        notes = [("note", sentence, "") for sentence in self.notes]
        fits = "" if self.max_memory is None else f"of {size_text(self.max_memory)}{'' if self.fits else ': too much'}"
        peak = [("peak", fits, size_text(self.peak_bytes)), ("passes", "over the data", str(self.passes))]
        return html_table([*rows, *totals, *peak, *notes], ("phase", "what", "memory"))

    def phases(self) -> dict[str, int]:
        """Bytes by phase, in order."""
        return by_phase(self.rows)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def estimate_memory(
    model: nn.Module,
    peft_config: LoraConfig | None = None,
    *,
    pipeline: Pipeline,
    workload: Workload | None = None,
    device: str | torch.device | None = None,
    max_memory: int | str | None = None,
    throughput: float | None = None,
) -> Plan:
    """Plans a run from the model's shapes; neither its weights nor data are read, so it may be on the meta device.

    A batch runs forward and backward on fake tensors, which shows what it takes and which layers read one input, and
    the components run on small layers of random numbers, which shows what they take beside their statistics. Where
    the model cannot run on fake tensors, a rule takes the place of the former, and a note says so.

    Args:
        model: A base model, or a PeftModel that carries the adapter `default`.
        peft_config: The LoRA configuration; None takes the PeftModel's own.
        pipeline: The pipeline that will run.
        workload: The data; None takes 64 samples of 1024 tokens.
        device: Where it will run; None takes the model's device, for `meta` the CPU.
        max_memory: A limit in bytes, or a size such as `24GiB`; layers are then divided among passes over the data,
            and batches cut into smaller ones, as takes least time.
        throughput: Tokens per second of a pass over all layers, as measured on that device.

    Returns:
        The plan; with a limit that nothing meets, the smallest there is, with a note.

    Raises:
        OptionError: The limit or the throughput is no size or not above 0.
        TargetError: PEFT finds nothing to adapt.
        PluginError: A component raised on a small layer.
    """
    limit = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    for name, value in (("max_memory", limit), ("throughput", throughput)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise OptionError(f"{name} is {value}; it must be above 0.")
    found = _divided(model, peft_config, pipeline, workload or Workload(), _device_of(model, device), limit)
    layers, parts, rows = found.layers, found.parts, found.rows
    peak, fits = found.peak, found.fits(limit)
    each = pipeline.components.estimator.passes
    passes, units = each * len(parts), each * layers.relative_time(parts)
    return Plan(
        peak_bytes=peak,
        passes=passes,
        seconds=None if throughput is None else units * layers.workload.total / throughput,
        relative_time=units,
        tokens=layers.workload.total,
        weights=layers.phases.weights,
        statistics_bytes=statistics_of(layers.groups),
        layers=len(layers.specs),
        layers_per_pass=max(sum(map(len, part)) for part in parts),
        parts=tuple(tuple(layer.spec.name for group in part for layer in group) for part in parts),
        batch_size=layers.workload.batch.samples,
        batch_tokens=layers.workload.batch.samples * layers.workload.batch.tokens,
        max_memory=limit,
        fits=fits,
        rows=tuple(rows),
        notes=(*layers.notes, *(() if limit is None or fits else (_advice(rows, limit),))),
    )


def _device_of(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    found = model_device(model)
    return torch.device("cpu") if found.type == "meta" else found


def _divided(
    model: nn.Module,
    peft_config: LoraConfig | None,
    pipeline: Pipeline,
    workload: Workload,
    device: torch.device,
    limit: int | None,
) -> _Division:
    """The division of layers and batches that takes least time within the limit; without one, whole batches."""
    best: _Division | None = None
    size = workload.batch.samples
    while True:
        layers = _Layers(model, pipeline, replace(workload, batch_size=size), device)
        layers.read(peft_config)
        found = _Division(layers, *_passes(layers, limit))
        better = best is None or found.rank(limit) < best.rank(limit)
        # Smaller batches pay as long as they make fewer passes; once they do not, still smaller ones will not either.
        if best is not None and best.fits(limit) and not better:
            return best
        best = found if better or best is None else best
        if size == 1 or (found.fits(limit) and len(found.parts) == 1):
            return best
        size = -(-size // 2)


def _passes(layers: _Layers, limit: int | None) -> tuple[Sequence[Sequence[Group]], list[PlanRow]]:
    """The passes of the configuration, or the fewest that stay within the limit, or the most; and their rows."""
    most = layers.pipeline.config.layers_per_pass
    if limit is None and most != "auto" and most < len(layers.specs):
        parts = divided(layers.groups, most)
        return parts, layers.divisible_phases().rows(parts)
    parts, rows = [layers.groups], layers.phases.rows([layers.groups])
    if limit is None or max(by_phase(rows).values()) <= limit:
        return parts, rows
    phases, total = layers.divisible_phases(), len(layers.specs)
    for count in range(2, len(layers.groups) + 1):
        parts = divided(layers.groups, math.ceil(total / count))
        rows = phases.rows(parts)
        if max(by_phase(rows).values()) <= limit:
            return parts, rows
    parts = divided(layers.groups, 1)
    return parts, phases.rows(parts)


def _advice(rows: Sequence[PlanRow], limit: int) -> str:
    totals = by_phase(rows)
    phase = max(totals, key=lambda name: totals[name])
    largest = max((row for row in rows if row.phase == phase), key=lambda row: row.bytes)
    remedies = {
        "weights": "load the model in a smaller dtype, or take a larger device",
        "activations": "lower the batch size, the length of samples, or adapt fewer layers",
    }
    remedy = next((text for word, text in remedies.items() if largest.what.startswith(word)), "")
    return (
        f"phase '{phase}' takes {size_text(totals[phase])} even with the layers of one input per pass, above the limit "
        f"of {size_text(limit)}; most of it, {size_text(largest.bytes)}, is {largest.what}: "
        f"{remedy or 'take an estimator with smaller statistics, or leave large layers out with exclude_modules'}."
    )


class _Layers:
    """A model's layers with the bytes of each, and what does not depend on how they are divided."""

    def __init__(self, model: nn.Module, pipeline: Pipeline, workload: Workload, device: torch.device) -> None:
        self.model, self.pipeline, self.workload, self.device = model, pipeline, workload, device
        self.specs: tuple[LayerSpec, ...] = ()
        self.groups: Sequence[Group] = []
        self.notes: list[str] = []

    def read(self, peft_config: LoraConfig | None) -> None:
        """Finds the layers, what each takes, and who reads one input."""
        from lora_da_core import adapter

        lora = adapter.chosen_config(self.model, peft_config, "default")
        parts, config = self.pipeline.components, self.pipeline.config
        targets = adapter.resolve_targets(self.model, lora, unsupported=config.unsupported)
        self.specs = targets.specs
        parts.check_layers(self.specs)
        if parts.allocator is not None:
            # Layers are solved at the largest rank that they may get.
            tokens = {spec.name: self.workload.total for spec in targets.specs}
            self.specs = Allocation(self.pipeline.registry, parts.allocator, targets.specs).largest(tokens)
        self.notes += targets.notes
        probe = WorkspaceProbe(self.pipeline.registry, parts.estimator, parts.gradient, config, self.device)
        layers = {spec.name: self._layer(spec, targets.modules[spec.name], probe) for spec in self.specs}
        adapted = {id(module) for module in targets.modules.values()}
        self.beside = sum(
            math.prod(matrix.shape)
            for module in adapter.base_of(self.model).modules()
            if id(module) not in adapted and not isinstance(module, nn.Embedding)
            for matrix in module.parameters(recurse=False)
            if matrix.ndim > 1
        )
        self.phases = self._phases({name: layer.workspace.update for name, layer in layers.items()})
        grouped: dict[str, list[LayerBytes]] = {}
        for name, layer in layers.items():
            grouped.setdefault(self.phases.all_tapped.leaders.get(name, name), []).append(layer)
        self.groups = list(grouped.values())

    def divisible_phases(self) -> Phases:
        """The phases of runs in several passes."""
        first = self.groups[0][0]
        tapped = {first.spec.name: first.workspace.update}
        return replace(self.phases, one_tapped=self._traced(self.workload.batch, tapped, self._backward))

    def relative_time(self, parts: Sequence[Sequence[Group]]) -> float:
        """What a pass over each part takes together, in units of one over all layers."""
        return relative_time(parts, self.beside, backward=self._backward)

    @property
    def _backward(self) -> bool:
        parts = self.pipeline.components
        return parts.estimator.needs_output_grads or not parts.gradient.forward_only

    def _layer(self, spec: LayerSpec, module: nn.Module, probe: WorkspaceProbe) -> LayerBytes:
        parts, registry, workload = self.pipeline.components, self.pipeline.registry, self.workload
        weight = getattr(module, spec.parameter, None)
        # The weights of a quantized layer are no floating numbers; its inputs are.
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.bfloat16
        itemsize = accumulation_dtype(dtype).itemsize
        batch = workload.batch

        def statistics(samples: int, tokens: int) -> tuple[int, int]:
            return parts.estimator.statistics_bytes(spec, samples=samples, tokens=tokens, itemsize=itemsize)

        shared, own = statistics(workload.samples, workload.total)
        last = batch.samples * workload.total // workload.samples
        _, earlier = statistics(workload.samples - batch.samples, workload.total - last)
        gradient = parts.gradient.statistics_bytes(spec, itemsize=itemsize)
        solver = parts.solver or registry.create(
            "solver", registry.choose_solver(spec.in_features, spec.rank, self.device.type)
        )
        tokens = Tokens(batch.rows * batch.tokens, workload.total, workload.samples)
        return LayerBytes(
            spec=spec,
            input=shared,
            layer=own + gradient,
            earlier=earlier + gradient,
            solution=8 * spec.rank * (spec.in_features + spec.out_features),
            workspace=probe.workspace(spec, tokens, solver, dtype),
        )

    def _phases(self, updates: Mapping[str, int]) -> Phases:
        from lora_da_core.adapter import base_of

        config, batch, base = self.pipeline.config, self.workload.batch, base_of(self.model)
        forward_only = self.pipeline.components.gradient.forward_only
        return Phases(
            weights=resident_bytes(base),
            all_tapped=self._traced(batch, updates, self._backward),
            one_tapped=None,
            forward=self._traced(batch, {}, False) if forward_only else None,
            search=self._traced(self.workload.search, {}, False) if config.automatic_scale else None,
            rounds=config.rounds,
            device=self.device,
        )

    def _traced(self, batch: BatchShape, updates: Mapping[str, int], backward: bool) -> Activations:
        from lora_da_core import adapter

        base = adapter.base_of(self.model)
        try:
            with adapter.adapters_disabled(self.model):
                return trace(base, batch, updates, backward=backward)
        except Exception as error:  # the model's own code may raise anything where tensors have no values
            note = (
                "this model does not run on tensors without values "
                f"({type(error).__name__}: {reason(error).rstrip('.')}); activations are a rough guess from the sizes "
                "of its matrices, and no two layers are taken to share an input."
            )
            if note not in self.notes:
                self.notes.append(note)
            return guess(base, batch, updates, backward=backward)


@dataclass(frozen=True)
class _Division:
    """One way to divide a run, with the rows of its phases."""

    layers: _Layers
    parts: Sequence[Sequence[Group]]
    rows: list[PlanRow]

    @property
    def peak(self) -> int:
        return max(by_phase(self.rows).values())

    def fits(self, limit: int | None) -> bool:
        return limit is None or self.peak <= limit

    def rank(self, limit: int | None) -> tuple[bool, float]:
        """What fits before what does not; of the former the one that takes least time, of the latter least memory."""
        if not self.fits(limit):
            return True, self.peak
        batch, beside = self.layers.workload.batch, BATCH_TOKENS.get(self.layers.device.type, BATCH_TOKENS["cpu"])
        return False, self.layers.relative_time(self.parts) * (1 + beside / (batch.samples * batch.tokens))
