"""`lora-da init`: from its options to a saved adapter, also where an earlier run of the same options was ended."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from lora_da_core.cli_init_options import InitOptions, Request
from lora_da_core.cli_memory import needed_offload
from lora_da_core.cli_options import memory_limit, module_names, places_checked
from lora_da_core.errors import ModelError, OptionError, StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from peft import LoraConfig
    from rich.console import Console

    from lora_da_core.models import LoadedModel, ModelShapes
    from lora_da_core.pipeline import Pipeline
    from lora_da_core.types import Batch, RunReport
    from lora_da_core.world import World

NARROWEST = 80
"""Columns of a table on a terminal with fewer."""
MANY_LAYERS = 40
"""From here on `init` shows one line per kind of module instead of one per layer."""
PICTURE_FILE = "spectra.png"
_ELSEWHERE = frozenset({"cache-dir", "offload-dir", "statistics-device"})
"""Recorded options that change nothing of what is computed."""


@dataclass(frozen=True)
class Assembled:
    """What a run of `init` gives to its pipeline."""

    pipeline: Pipeline
    loaded: LoadedModel
    taken: Sequence[Batch]
    unseen: Sequence[Batch]
    lora: LoraConfig
    notes: tuple[str, ...]

    @property
    def batches(self) -> list[Batch]:
        """What is estimated from, and what follows it for the line search."""
        return [*self.taken, *self.unseen]


def init(options: InitOptions) -> None:
    """Compute an adapter's initial weights from data and save them as a stock PEFT adapter.

    Under torchrun or accelerate launch the processes share the work, and the first one writes.
    """
    from lora_da_core.distributed import joined, launched

    with launched(options.process_timeout) as device, joined(options.process_timeout) as world:
        if device is not None and options.device == "auto":
            options = replace(options, device=str(device))
        _init_in(world, options)


def _init_in(world: World, options: InitOptions) -> None:
    from lora_da_core import adapter, data, models, storage
    from lora_da_core.ablation.memory import PeakMemory
    from lora_da_core.cli_plan import forecast, outcome
    from lora_da_core.progress import note, shown_progress
    from lora_da_core.report import plot_spectra

    _check_places(options)
    request = requested(options)
    told: list[str] = []
    complete = options.resume and options.output.exists() and any(options.output.iterdir())
    # As rank 0 sees it: another process may look a moment later.
    if world.exchange("output", complete)[0]:
        report = finished_run(options)
    else:
        log = console(stderr=True, quiet=world.rank > 0)
        for sentence in (*data.waits_for(options.data), *models.waits_for(options.model)):
            note(log, sentence)
        parts = assembled(request)
        for sentence in parts.notes:
            note(log, sentence)
        model = parts.loaded.model
        kept = options.cache_dir or options.passes_dir
        # One process tells of the plan, so one makes it.
        told_of = (parts.pipeline, model, parts.lora, parts.taken, options.max_memory)
        planned = "" if world.rank else forecast(*told_of, alone=world.size == 1)
        device = next(model.parameters()).device
        with shown_progress(log) as on_progress, PeakMemory(device) as memory:
            result = parts.pipeline.run(
                model,
                parts.batches,
                parts.lora,
                on_progress=on_progress,
                cache_dir=kept,
                max_memory=options.max_memory,
                offload_dir=options.offload_dir,
                world=world,
            )
        if world.rank:
            return
        report = replace(result.report, notes=(*parts.notes, *result.report.notes))
        told = outcome(planned, memory.peak, report, cached=kept is not None)
        fitted = adapter.allocated_config(parts.lora, result.report.allocation)
        peft_model = adapter.apply(model, fitted, result.factors)
        storage.save_run(
            options.output,
            # The base's embeddings are not the adapter's to save, and asking whether they changed asks the hub.
            lambda directory: peft_model.save_pretrained(directory, save_embedding_layers=False),
            report,
            settings=options.recorded(),
            overwrite=options.overwrite,
        )
    if world.rank:
        return
    if options.passes_dir is not None:
        shutil.rmtree(options.passes_dir, ignore_errors=True)
    if options.plot:
        plot_spectra(report, options.output / PICTURE_FILE)
    show(report, brief=len(report.layers) >= MANY_LAYERS)
    for sentence in told:
        typer.echo(sentence)
    place = shlex.quote(str(options.output))
    typer.echo(f"saved to {options.output}; to read it: lora-da inspect {place}; to check it: lora-da verify {place}")


def requested(options: InitOptions) -> Request:
    """Checks everything that can be checked before anything is loaded.

    Args:
        options: The command's.

    Returns:
        What is to be run.

    Raises:
        OptionError: An option is wrong, or two do not go together.
    """
    from lora_da_core import adapter, data
    from lora_da_core.pipeline import build_pipeline
    from lora_da_core.registry import Registry
    from lora_da_core.sizing import SEARCH_SAMPLES

    if memory_limit(options.max_memory) is not None and options.layers_per_pass is not None:
        raise OptionError("--max-memory does not go with --layers-per-pass; leave one out.")
    if options.resume and options.cache_dir is not None:
        raise OptionError("--cache-dir keeps the passes already; leave out --resume.")
    preset = Registry().resolve("preset", options.preset)
    pipeline = build_pipeline(
        estimator=options.component("estimator", preset),
        gradient=options.component("gradient", preset),
        solver=options.component("solver", preset),
        allocator=options.component("allocator", preset),
        preset=options.preset,
        config=options.lora_da_config(preset),
    )
    if pipeline.config.offset != "none":
        raise OptionError(
            f"offset={pipeline.config.offset!r} cannot be saved as one adapter that stock PEFT reloads to the same "
            "function; leave it at 'none', or use get_lora_da_model and save the base or the second adapter with it."
        )
    text = data.TextOptions(
        prompt_template=options.prompt_template,
        max_length=options.max_length,
        samples=options.samples,
        seed=options.seed,
        beyond=SEARCH_SAMPLES,
    )
    if options.batch_size is not None and options.batch_size < 1:
        raise OptionError(f"batch_size is {options.batch_size}; it must be at least 1.")
    lora = adapter.lora_config(
        rank=options.rank,
        lora_alpha=options.lora_alpha,
        use_rslora=options.use_rslora,
        target_modules=module_names(options.target_modules),
        exclude_modules=None if options.exclude_modules is None else module_names(options.exclude_modules),
        task_type="CAUSAL_LM",
        base_model_name=options.model,
    )
    return Request(options, pipeline, text, lora)


def assembled(request: Request) -> Assembled:
    """Loads data and model and draws the samples.

    Args:
        request: From `requested`.

    Returns:
        What the pipeline is given.

    Raises:
        LoraDAError: The data or the model cannot be loaded.
    """
    from lora_da_core import data, models
    from lora_da_core.batches import batch_tokens_on
    from lora_da_core.placement import model_device

    options, pipeline = request.options, request.pipeline
    rows = data.load_rows(options.data, split=options.split)
    shapes = _checked_shapes(request)
    loaded = models.load_model(
        options.model,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        offload=needed_offload(request, rows, shapes),
    )
    samples = data.encode_text(rows, loaded.tokenizer, request.text, model_limit=loaded.max_positions)
    notes = [*loaded.notes, *samples.notes]
    if options.population is None:
        pipeline.config = replace(pipeline.config, population=samples.population)
        notes.append(f"N = {samples.population}, the rows of the data set; --population sets another.")
    pipeline.config = replace(pipeline.config, samples=len(samples.samples))
    batched = partial(
        data.batches,
        pad_token_id=loaded.tokenizer.pad_token_id,
        batch_size=options.batch_size,
        tokens_per_batch=batch_tokens_on(model_device(loaded.model)),
    )
    taken, unseen = batched(samples.samples), batched(samples.unseen)
    return Assembled(pipeline, loaded, taken, unseen, request.lora, tuple(notes))


def _checked_shapes(request: Request) -> ModelShapes | None:
    """The model's shapes, by which alone targets are refused, since its weights may take minutes; None without any."""
    from lora_da_core import adapter, models
    from lora_da_core.sources import is_unreachable

    options = request.options
    try:
        shapes = models.load_shapes(
            options.model, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
        )
    except ModelError as error:
        if is_unreachable(error):
            raise  # who asks again waits as long again
        return None  # loading the model says what is wrong, or does without
    adapter.resolve_targets(shapes.model, request.lora, unsupported=request.pipeline.config.unsupported)
    return shapes


# Going on


def _check_places(options: InitOptions) -> None:
    from lora_da_core import storage

    if options.resume and options.overwrite:
        raise OptionError("--resume keeps what is there and --overwrite replaces it; leave out one of them.")
    with places_checked():
        if options.resume:
            storage.check_writable(options.output)
            storage.settle_leftovers(options.output)
        else:
            storage.check_output(options.output, overwrite=options.overwrite)
        for directory in (options.cache_dir, options.offload_dir):
            if directory is not None:
                storage.check_writable(directory)


def finished_run(options: InitOptions) -> RunReport:
    """The report of the run that the output directory holds, if it is this one.

    Args:
        options: The command's.

    Returns:
        Its report.

    Raises:
        OptionError: The directory holds something else, or a run of other options.
    """
    from lora_da_core import storage

    try:
        report, recorded = storage.read_report(options.output), storage.read_settings(options.output)
    except StorageError as error:
        raise OptionError(f"--resume finds no run of lora-da in {options.output}: {error}") from error
    names = _differing(recorded, options.recorded())
    if names:
        raise OptionError(
            f"{options.output} holds a run with another {', '.join(names)}; give another directory, or --overwrite "
            "instead of --resume."
        )
    typer.echo("the run is complete already", err=True)
    return report


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    names = sorted({*first, *second} - _ELSEWHERE)
    return [name for name in names if first.get(name) != second.get(name)]


# What is shown


def show(report: RunReport, *, brief: bool = False) -> None:
    """Prints a report as a table.

    Args:
        report: The report.
        brief: One line per kind of module instead of one per layer.
    """
    from lora_da_core.report import WIDE, group_table, layer_table, totals

    out = table_console()
    out.print(group_table(report) if brief else layer_table(report, wide=out.width >= WIDE))
    out.print()
    out.print(totals(report))


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that adds no highlights of its own."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, quiet=quiet)


def table_console() -> Console:
    """A console for tables: a narrow terminal wraps their lines, and nothing of a row is cut off."""
    wide_enough = console()
    wide_enough.width = max(wide_enough.width, NARROWEST)
    return wide_enough
