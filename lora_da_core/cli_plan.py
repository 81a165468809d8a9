"""`lora-da plan`: its options and what it prints."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_da_core.cli_options import DTYPES, ExitCode, component_choice, memory_limit, module_names
from lora_da_core.errors import LoraDAError, OptionError
from lora_da_core.types import StatisticsDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import LoraConfig
    from rich.table import Table
    from torch import nn

    from lora_da_core.memory import Plan
    from lora_da_core.memory.workload import Workload
    from lora_da_core.models import ModelShapes
    from lora_da_core.pipeline import Pipeline
    from lora_da_core.types import Batch, RunReport


def _option(text: str, *names: str, **rest: Any) -> Any:
    return typer.Option(*names, help=text, **rest)


@dataclass(frozen=True)
class PlanOptions:
    """Everything `lora-da plan` is told; None leaves the choice to the preset."""

    model: Annotated[
        str,
        _option("Base model: hub id, directory (a config.json in it is enough), or .gguf file.", show_default=False),
    ]
    rank: Annotated[int, _option("Rank r of the adapter.")] = 8
    target_modules: Annotated[
        str, _option("Layers to adapt: 'all-linear', a comma-separated list of name endings, or a regex.")
    ] = "all-linear"
    exclude_modules: Annotated[
        str | None, _option("Layers to leave out: comma-separated list or regex.", show_default="none")
    ] = None
    samples: Annotated[int, _option("Samples that are read.")] = 64
    max_length: Annotated[
        int | None, _option("Tokens of the longest sample.", show_default="1024 or the model's limit")
    ] = None
    tokens: Annotated[
        int | None, _option("Tokens of all samples together.", show_default="samples times the longest")
    ] = None
    batch_size: Annotated[
        int | None, _option("Samples per batch.", show_default="256 tokens on a CPU, 2048 elsewhere")
    ] = None
    preset: Annotated[str, _option("Setting that fills whatever is not given.")] = "robust"
    estimator: Annotated[str | None, _option("Fisher estimator.", show_default="the preset's")] = None
    estimator_option: Annotated[
        list[str] | None, _option("Option of the estimator; repeatable.", metavar="KEY=VALUE")
    ] = None
    gradient: Annotated[str | None, _option("Gradient estimator.", show_default="the preset's")] = None
    gradient_option: Annotated[
        list[str] | None, _option("Option of the gradient estimator; repeatable.", metavar="KEY=VALUE")
    ] = None
    solver: Annotated[str | None, _option("Eigen-solver; 'auto' chooses per layer.", show_default="the preset's")] = (
        None
    )
    solver_option: Annotated[list[str] | None, _option("Option of the solver; repeatable.", metavar="KEY=VALUE")] = None
    allocator: Annotated[str | None, _option("Rank allocator, or 'none'.", show_default="the preset's")] = None
    allocator_option: Annotated[
        list[str] | None, _option("Option of the allocator; repeatable.", metavar="KEY=VALUE")
    ] = None
    device: Annotated[
        str, _option("Where it will run: 'auto' (what is here), 'cpu', 'cuda', …; it need not be here.")
    ] = "auto"
    dtype: Annotated[
        str,
        _option(
            "Precision the model will be loaded in; auto: the checkpoint's on a GPU, float32 on the CPU.",
            metavar=DTYPES,
        ),
    ] = "auto"
    max_memory: Annotated[
        str | None,
        _option(
            "A limit such as 24GiB or 800MB; layers are divided into as many parts as it takes.",
            metavar="SIZE",
            show_default="none",
        ),
    ] = None
    statistics_device: Annotated[
        StatisticsDevice,
        _option(
            "Where sums lie while no layer adds to them; auto: with their layers, or what --max-memory makes cheapest."
        ),
    ] = "auto"
    throughput: Annotated[
        float | None,
        _option("Tokens per second of a pass, as measured; gives the passes' time.", show_default="time unknown"),
    ] = None
    trust_remote_code: Annotated[bool, _option("Run code that comes with the model.", "--trust-remote-code")] = False
    as_json: Annotated[bool, _option("Print the plan as JSON.", "--json")] = False


def plan(options: PlanOptions) -> None:
    """Say what a run would take, from the model's configuration alone: memory, passes and what they are made of."""
    from lora_da_core import adapter, models
    from lora_da_core.memory import estimate_memory
    from lora_da_core.progress import tell

    limit = memory_limit(options.max_memory)
    pipeline = _pipeline(options)
    lora = adapter.lora_config(
        rank=options.rank,
        lora_alpha=1.0,
        use_rslora=False,
        target_modules=module_names(options.target_modules),
        exclude_modules=None if options.exclude_modules is None else module_names(options.exclude_modules),
        task_type="CAUSAL_LM",
    )
    tell(() if options.as_json else models.waits_for(options.model))
    shapes = models.load_shapes(
        options.model, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    workload = _workload(options, shapes).on(shapes.device)
    found = estimate_memory(
        shapes.model,
        lora,
        pipeline=pipeline,
        workload=workload,
        device=shapes.device,
        max_memory=limit,
        throughput=options.throughput,
    )
    if options.as_json:
        typer.echo(json.dumps({**_setting(options, shapes, workload), **found.to_json()}, indent=1))
    else:
        _show(found, shapes, workload)
    if not found.fits:
        raise typer.Exit(ExitCode.FAILED)


def forecast(
    pipeline: Pipeline,
    model: nn.Module,
    lora: LoraConfig,
    batches: Sequence[Batch],
    max_memory: str | None,
    *,
    alone: bool = True,
) -> Plan | str:
    """The plan of a run that is about to begin.

    Args:
        pipeline: What will run.
        model: The loaded model.
        lora: The LoRA configuration.
        batches: What is estimated from.
        max_memory: The run's limit.
        alone: Whether no other process shares the run; only then blocks are run again.

    Returns:
        The plan, or why there is none: a run does not need one.
    """
    from lora_da_core.budget import host_memory, workload_of
    from lora_da_core.memory import estimate_memory
    from lora_da_core.world import ALONE

    try:
        workload = workload_of(batches)
        there = host_memory(ALONE)
        return estimate_memory(
            model,
            lora,
            pipeline=pipeline,
            workload=workload,
            max_memory=max_memory,
            host_memory=there,
            by_block=alone,
        )
    except LoraDAError as error:
        return str(error)


def outcome(planned: Plan | str, grown: int, report: RunReport, *, cached: bool) -> list[str]:
    """What a run was planned to take beside what it took, and what a plan needs to tell time.

    Args:
        planned: From `forecast`.
        grown: Most bytes that memory grew by during the run.
        report: Its report.
        cached: Whether statistics may have been read instead of taken.

    Returns:
        Sentences.
    """
    from lora_da_core.memory.workload import size_text

    if isinstance(planned, str):
        return [f"memory: {size_text(grown)} beyond the weights; there is no plan to compare: {planned}"]
    expected = planned.peak_bytes - planned.weights
    passes = report.seconds.get("statistics", 0.0)
    lines = [
        f"memory beyond the weights ({size_text(planned.weights)}): planned {size_text(expected)}, measured "
        f"{size_text(grown)} ({grown / expected - 1:+.0%})"
    ]
    if planned.offloaded_bytes:
        lines.append(f"{size_text(planned.offloaded_bytes)} of statistics lay on the {planned.statistics_device}")
    if passes > 0 and not cached:
        throughput = planned.tokens * planned.relative_time / passes
        lines.append(
            f"{_count(planned.passes, 'pass', 'passes')} over {planned.tokens:,} tokens in {passes:.1f} s: "
            f"'lora-da plan --throughput {throughput:.0f}' tells the time of other runs of this model here"
        )
    return lines


def _pipeline(options: PlanOptions) -> Pipeline:
    from lora_da_core.pipeline import build_pipeline
    from lora_da_core.registry import Registry

    preset = Registry().resolve("preset", options.preset)
    config = replace(preset.config, statistics_device=options.statistics_device)
    return build_pipeline(
        config=config,
        estimator=component_choice(options, "estimator", preset),
        gradient=component_choice(options, "gradient", preset),
        solver=component_choice(options, "solver", preset),
        allocator=component_choice(options, "allocator", preset),
        preset=options.preset,
    )


def _workload(options: PlanOptions, shapes: ModelShapes) -> Workload:
    from lora_da_core.memory.workload import Workload

    limit, longest = shapes.max_positions, options.max_length
    if longest is None:
        longest = min(Workload.max_length, limit or Workload.max_length)
    elif limit is not None and longest > limit:
        raise OptionError(f"max_length is {longest}, but the model takes {limit} tokens at most.")
    return Workload(options.samples, longest, options.tokens, options.batch_size)


def _setting(options: PlanOptions, shapes: ModelShapes, workload: Workload) -> dict[str, Any]:
    return {
        "model": options.model,
        "device": str(shapes.device),
        "dtype": str(shapes.dtype).removeprefix("torch."),
        "samples": workload.samples,
        "max_length": workload.max_length,
        "tokens": workload.total,
        "batch_size": workload.batch.samples,
    }


def _show(found: Plan, shapes: ModelShapes, workload: Workload) -> None:
    from rich.console import Console

    from lora_da_core.memory.workload import size_text

    console = Console(highlight=False)
    console.print(plan_table(found))
    console.print()
    batch = workload.batch
    lines = [
        f"peak {size_text(found.peak_bytes)} on {shapes.device}, in {str(shapes.dtype).removeprefix('torch.')}; "
        f"statistics of all {found.layers} layers {size_text(found.statistics_bytes)}, on the {_place(found)}",
        f"{_count(found.passes, 'pass', 'passes')} over {workload.total:,} tokens in batches of "
        f"{batch.samples} × {batch.tokens}, {_order(found)}",
        "time unknown without --throughput"
        if found.seconds is None
        else f"{found.seconds:.0f} s for the passes over the data",
        *(f"note: {sentence}" for sentence in (*shapes.notes, *found.notes)),
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _order(found: Plan) -> str:
    from lora_da_core.memory.workload import size_text

    if found.schedule == "passes":
        return f"at most {found.layers_per_pass} layers in each"
    return (
        f"in {len(found.parts)} parts of blocks that are run again, the last ones first, at most "
        f"{found.layers_per_pass} layers in each; {size_text(found.hidden_bytes)} of hidden states on the "
        f"{found.hidden_states}"
    )


def _place(found: Plan) -> str:
    from lora_da_core.memory.workload import size_text

    if not found.offloaded_bytes:
        return found.statistics_device
    return f"{found.statistics_device}: {size_text(found.offloaded_bytes)} at a time"


def plan_table(found: Plan) -> Table:
    """One row per entry of a plan, phase by phase, the heaviest phase marked."""
    from rich.table import Table

    from lora_da_core.memory.workload import size_text

    totals = found.phases()
    heaviest = max(totals, key=lambda phase: totals[phase])
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("phase", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("memory", justify="right", no_wrap=True)
    for phase, total in totals.items():
        for row in found.rows:
            if row.phase == phase:
                table.add_row(phase, row.what, size_text(row.bytes))
        table.add_row("", "together: the peak" if phase == heaviest else "together", size_text(total), style="bold")
    return table


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
