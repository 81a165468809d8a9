"""The command line, `lora-da`: init, plan, inspect, verify, plugins, ablate."""

from __future__ import annotations

import io
import json
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lora_da_core.ablation.command import AblateOptions, ablate
from lora_da_core.cli_options import InitOptions, command_of, module_names
from lora_da_core.cli_plan import PlanOptions, plan
from lora_da_core.errors import LoraDAError, OptionError, StorageError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lora_da_core.models import LoadedModel
    from lora_da_core.pipeline import Pipeline
    from lora_da_core.types import RunReport

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
MANY_LAYERS = 40
"""From here on `init` shows one line per kind of module instead of one per layer."""
PICTURE_FILE = "spectra.png"
LONGEST_SURPRISE = 500
"""Characters that are shown of an error that nobody foresaw."""
PROBE_TOKENS = 16
"""Tokens of the input that `verify` makes up where it is given no data."""


class OneLineErrors(TyperGroup):
    """Turns every error into one line on stderr and an exit code: 2 for wrong use, 1 for failure, 130 for Ctrl-C."""

    def main(  # type: ignore[override]  # older typers type their arguments differently
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **rest: Any
    ) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        given = list(sys.argv[1:] if args is None else args)
        if "--debug" in given:
            given = ["--debug", *(arg for arg in given if arg != "--debug")]
        rest["standalone_mode"] = False
        try:
            status = super().main(given, prog_name or "lora-da", **rest)
        except Exception as error:
            # typer's own errors: their class has moved between its versions, their interface has not.
            if not hasattr(error, "format_message"):
                raise
            _complain(f"{error.format_message().rstrip('.')}. See --help.")
            status = WRONG_USE
        sys.exit(status if isinstance(status, int) else DONE)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except LoraDAError as error:
            _trace(ctx)
            _complain(str(error))
            raise typer.Exit(WRONG_USE if isinstance(error, OptionError) else FAILED) from error
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if hasattr(error, "format_message"):
                raise
            _trace(ctx)
            _complain(_unexpected(error))
            raise typer.Exit(FAILED) from error


app = typer.Typer(
    cls=OneLineErrors,
    name="lora-da",
    help="Initialise LoRA adapters from data (LoRA-DA, arXiv 2510.24561).",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console entry point."""
    if not sys.stderr.isatty():
        # Read when these libraries are imported; their bars would fill a log file with carriage returns.
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    if not sys.warnoptions:
        # Libraries announce their own changes by it; a user of this program cannot act on them.
        warnings.simplefilter("ignore", FutureWarning)
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-da {version('lora-da-core')}")
        raise typer.Exit(DONE)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(WRONG_USE)


# init


def _init(options: InitOptions) -> None:
    """Compute an adapter's initial weights from data and save them as a stock PEFT adapter."""
    from lora_da_core import adapter, data, models, storage
    from lora_da_core.ablation.memory import PeakMemory
    from lora_da_core.cli_plan import forecast, outcome
    from lora_da_core.memory import parse_size
    from lora_da_core.progress import note, shown_progress
    from lora_da_core.report import plot_spectra
    from lora_da_core.sizing import SEARCH_SAMPLES

    try:
        storage.check_output(options.output, overwrite=options.overwrite)
        if options.cache_dir is not None:
            storage.check_writable(options.cache_dir)
    except StorageError as error:
        raise OptionError(str(error)) from error
    if options.max_memory is not None:
        parse_size(options.max_memory)
        if options.cache_dir is not None or options.layers_per_pass is not None:
            raise OptionError("--max-memory goes with neither --cache-dir nor --layers-per-pass; leave out the others.")
    pipeline = _pipeline(options)
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

    log = _console(stderr=True)
    rows = data.load_rows(options.data, split=options.split)
    loaded = models.load_model(
        options.model, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    samples = data.encode_text(rows, loaded.tokenizer, text, model_limit=loaded.max_positions)
    notes = [*loaded.notes, *samples.notes]
    if options.population is None:
        pipeline.config = replace(pipeline.config, population=samples.population)
        notes.append(f"N = {samples.population}, the rows of the data set; --population sets another.")
    for sentence in notes:
        note(log, sentence)
    pipeline.config = replace(pipeline.config, samples=len(samples.samples))
    taken, unseen = (
        data.batches(part, pad_token_id=loaded.tokenizer.pad_token_id, batch_size=options.batch_size)
        for part in (samples.samples, samples.unseen)
    )
    planned = forecast(pipeline, loaded.model, lora, taken, options.max_memory)
    with shown_progress(log) as on_progress, PeakMemory(next(loaded.model.parameters()).device) as memory:
        result = pipeline.run(
            loaded.model,
            [*taken, *unseen],
            lora,
            on_progress=on_progress,
            cache_dir=options.cache_dir,
            max_memory=options.max_memory,
        )
    report = replace(result.report, notes=(*notes, *result.report.notes))
    fitted = adapter.allocated_config(lora, result.report.allocation)
    peft_model = adapter.apply(loaded.model, fitted, result.factors)
    storage.save_run(
        options.output,
        # The base's embeddings are not the adapter's to save, and asking whether they changed asks the hub.
        lambda directory: peft_model.save_pretrained(directory, save_embedding_layers=False),
        report,
        settings=options.recorded(),
        overwrite=options.overwrite,
    )
    if options.plot:
        plot_spectra(report, options.output / PICTURE_FILE)
    _show(report, brief=len(report.layers) >= MANY_LAYERS)
    for sentence in outcome(planned, memory.peak, report, cached=options.cache_dir is not None):
        typer.echo(sentence)
    typer.echo(f"saved to {options.output}")


def _pipeline(options: InitOptions) -> Pipeline:
    from lora_da_core.pipeline import build_pipeline
    from lora_da_core.registry import Registry

    preset = Registry().resolve("preset", options.preset)
    return build_pipeline(
        estimator=options.component("estimator", preset),
        gradient=options.component("gradient", preset),
        solver=options.component("solver", preset),
        allocator=options.component("allocator", preset),
        preset=options.preset,
        config=options.lora_da_config(preset),
    )


app.command("init")(command_of(InitOptions, _init))


# plan


app.command("plan")(command_of(PlanOptions, plan))


# inspect


Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that 'lora-da init' wrote.")]


@app.command("inspect")
def _inspect(
    directory: Directory,
    plot: Annotated[
        Path | None, typer.Option(help="Where to save the picture.", show_default="DIR/spectra.png")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON; then a picture is saved only with --plot.")
    ] = False,
) -> None:
    """Show what a run found, layer by layer, and save a picture of its spectra."""
    from lora_da_core import storage
    from lora_da_core.report import plot_spectra

    report = storage.read_report(directory)
    if as_json:
        typer.echo(json.dumps(storage.report_to_json(report), indent=1, ensure_ascii=False))
    else:
        _show(report)
        for sentence in report.notes:
            typer.echo(f"note: {sentence}")
    if plot is not None or not as_json:
        picture = directory / PICTURE_FILE if plot is None else plot
        plot_spectra(report, picture)
        typer.echo(f"picture saved to {picture}", err=as_json)


# verify


@app.command("verify")
def _verify(
    directory: Directory,
    model: Annotated[str | None, typer.Option(help="The base model.", show_default="the run's")] = None,
    data: Annotated[str | None, typer.Option(help="Take the test input from this data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    device: Annotated[str, typer.Option(help="Where to run.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Precision to load the model in.", show_default="the run's")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Reload an adapter with stock PEFT and check that it is what was computed, on an untouched base."""
    from lora_da_core import adapter, models, storage

    report = storage.read_report(directory)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        # Without its files PEFT would look for a repository of that name on the hub.
        if not (directory / name).is_file():
            raise StorageError(f"{directory / name} does not exist; run 'lora-da init' again.")
    source = _recorded(directory, "model", "which model it belongs to") if model is None else model
    if dtype is None:
        dtype = _recorded(directory, "dtype", "in which precision its model was loaded")
    rows = None if data is None else _first_rows(data, split)
    loaded = models.load_model(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    checks = adapter.verify(directory, loaded.model, report, _probe_input(loaded, rows))
    for check in checks:
        typer.echo(f"{'✓' if check.passed else '✗'} {check.name} ({check.detail})")
    if not all(check.passed for check in checks):
        raise typer.Exit(FAILED)


def _recorded(directory: Path, option: str, meaning: str) -> str:
    from lora_da_core import storage

    value = storage.read_settings(directory).get(option)
    if not isinstance(value, str):
        raise OptionError(f"{directory} does not say {meaning}; give --{option}.")
    return value


def _first_rows(source: str, split: str) -> list[Any]:
    from lora_da_core.data import load_rows

    rows = load_rows(source, split=split)
    return [rows[index] for index in range(min(2, len(rows)))]


def _probe_input(loaded: LoadedModel, rows: list[Any] | None) -> dict[str, Tensor]:
    """An input without labels: the first rows, or made-up tokens."""
    import torch

    from lora_da_core import data

    device = next(loaded.model.parameters()).device
    if rows is None:
        vocabulary = int(loaded.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        tokens = (torch.arange(PROBE_TOKENS, device=device) * 7919 + 1) % vocabulary
        return {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens[None])}
    encoded = data.encode_text(rows, loaded.tokenizer, model_limit=loaded.max_positions)
    batch = data.batches(encoded.samples, pad_token_id=loaded.tokenizer.pad_token_id, batch_size=len(rows))[0]
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


# plugins


@app.command("plugins")
def _plugins(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False) -> None:
    """List every installed component, and every plugin that cannot be used, with the reason."""
    from lora_da_core.registry import list_plugins
    from lora_da_core.report import plugin_table

    records = list_plugins()
    if as_json:
        typer.echo(json.dumps(records, indent=1, ensure_ascii=False))
    else:
        _console().print(plugin_table(records))


# ablate


app.command("ablate")(command_of(AblateOptions, ablate))


# What they share


def _show(report: RunReport, *, brief: bool = False) -> None:
    from lora_da_core.report import WIDE, group_table, layer_table, totals

    console = _console()
    console.print(group_table(report) if brief else layer_table(report, wide=console.width >= WIDE))
    console.print()
    console.print(totals(report))
    if brief:
        console.print("'lora-da inspect' shows every layer.", markup=False, highlight=False)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _unexpected(error: Exception) -> str:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory; lower --batch-size, --max-length or --samples. {error}"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{textwrap.shorten(text, LONGEST_SURPRISE)} (unexpected; --debug shows where)"


def _trace(ctx: Any) -> None:
    if ctx.params.get("debug"):
        traceback.print_exc()


def _complain(message: str) -> None:
    text = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    typer.echo(f"error: {text}", err=True)


if __name__ == "__main__":
    main()
