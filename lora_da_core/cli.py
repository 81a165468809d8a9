"""The command line, `lora-da`: init, plan, inspect, verify, plugins, ablate."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lora_da_core.ablation.command import AblateOptions, ablate
from lora_da_core.cli_init import NARROWEST, PICTURE_FILE, init, show, table_console
from lora_da_core.cli_init_options import InitOptions
from lora_da_core.cli_options import ExitCode, command_of, path
from lora_da_core.cli_plan import PlanOptions, plan
from lora_da_core.cli_verify import verify
from lora_da_core.errors import LoraDAError, OptionError

LONGEST_SURPRISE = 500
"""Characters that are shown of an error that nobody foresaw."""
QUIET = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers of libraries that warn, as they are imported, of what a user of this program cannot act on."""


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
        except (KeyboardInterrupt, typer.Abort):  # outside of a command, as typer's versions hand it on
            status = ExitCode.INTERRUPTED
        except Exception as error:
            # typer's own errors: their class has moved between its versions, their interface has not.
            if not hasattr(error, "format_message"):
                raise
            message = error.format_message().rstrip(".")
            _complain(f"{message}{_place_of(error)}{'' if message.endswith('?') else '.'} See --help.")
            status = ExitCode.WRONG_USE
        if status == ExitCode.INTERRUPTED:
            _complain("interrupted.")
        sys.exit(status if isinstance(status, int) else ExitCode.DONE)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except LoraDAError as error:
            _trace(ctx)
            _complain(str(error))
            raise typer.Exit(ExitCode.WRONG_USE if isinstance(error, OptionError) else ExitCode.FAILED) from error
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if hasattr(error, "format_message"):
                raise
            _trace(ctx)
            _complain(_unexpected(error))
            raise typer.Exit(ExitCode.FAILED) from error


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
    if shutil.get_terminal_size().columns < NARROWEST:
        # Read by typer where it prints help: in fewer columns it would cut names of options short.
        os.environ.setdefault("TERMINAL_WIDTH", str(NARROWEST))
    if not sys.warnoptions:
        # Libraries announce their own changes by it; a user of this program cannot act on them.
        warnings.simplefilter("ignore", FutureWarning)
    if "--debug" not in sys.argv:
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-da {version('lora-da-core')}")
        raise typer.Exit(ExitCode.DONE)


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
        raise typer.Exit(ExitCode.WRONG_USE)


# init


app.command("init")(command_of(InitOptions, init))


# plan


app.command("plan")(command_of(PlanOptions, plan))


# inspect


Directory = Annotated[Path, typer.Argument(parser=path, metavar="DIR", help="A directory that 'lora-da init' wrote.")]


@app.command("inspect")
def _inspect(
    directory: Directory,
    plot: Annotated[
        Path | None, typer.Option(parser=path, help="Where to save the picture.", show_default="DIR/spectra.png")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON; then a picture is saved only with --plot.")
    ] = False,
    use: Annotated[
        str | None,
        typer.Option(
            metavar="PROGRAM",
            help="Print what a program is told to start from DIR, or to serve it, and nothing else: axolotl, "
            "llama-factory, ms-swift, unsloth or vllm. DIR may be any saved LoRA adapter.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Show what a run found, layer by layer, and save a picture of its spectra."""
    from lora_da_core import storage
    from lora_da_core.report import plot_spectra

    if use is not None:
        from lora_da_core.cli_usage import usage

        if as_json or plot is not None:
            raise OptionError("--use prints that alone; leave --json and --plot out.")
        typer.echo(usage(directory, use))
        return
    report = storage.read_report(directory)
    picture = directory / PICTURE_FILE if plot is None else plot
    if not picture.parent.is_dir():
        raise OptionError(f"--plot {picture}: the folder {picture.parent} does not exist.")
    if as_json:
        typer.echo(json.dumps(storage.report_to_json(report), indent=1, ensure_ascii=False))
    else:
        show(report)
        for sentence in report.notes:
            typer.echo(f"note: {sentence}")
    if plot is not None or not as_json:
        plot_spectra(report, picture)
        typer.echo(f"picture saved to {picture}", err=as_json)


# verify


app.command("verify")(verify)


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
        table_console().print(plugin_table(records))


# ablate


app.command("ablate")(command_of(AblateOptions, ablate))


# What they share


def _place_of(error: Any) -> str:
    """Where a value that typer refuses stands, unless it is the command line."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or parameter is None:
        return ""
    source = context.get_parameter_source(parameter.name)
    return f" (in {context.params['config']})" if source is not None and source.name == "DEFAULT_MAP" else ""


def _unexpected(error: Exception) -> str:
    from lora_da_core.blame import is_out_of_memory

    if is_out_of_memory(error):
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
