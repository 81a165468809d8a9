"""LoRA-DA on Llama-2-7B shapes against PEFT's LoRA-GA, in one process on one GPU.

Random bf16 weights, 256 samples of about 194 tokens, r = 8, all 224 linear layers, length-sorted batches of at most
3,584 tokens. All but `paper` are warmed up on two batches. Then rounds: each program once per round, until
`--repetitions` or `--time-limit`; medians are reported, and what is known is printed and written after every run. After
the first round: a profile of the solve, and the check of the presets by other code in float64 (`benchmarks.exact`): the
residual of every layer, the angle of some. With `--max-memory` the `robust` preset with a fixed scale runs within each
limit as well, once, and the plan's peak stands beside the measured one. `tolerant` is that preset with residuals of
1e-4 instead of what float32 products allow, `in_turn` solves no layers while others are prepared.

    python -m benchmarks.gpu_7b [--programs lora_ga,fixed,robust,paper,tolerant,in_turn] [--max-memory 24GiB,62GiB]
        [--checks fixed,paper] [--repetitions 3] [--time-limit 540] [--layers 32] [--samples 256] [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga

import lora_da_core
from benchmarks.exact import ExactOmega, orthonormal_rows
from benchmarks.llama_shapes import LINEAR, add_shape_options, random_llama
from benchmarks.machine import machine, write_json
from benchmarks.phases import SOLVE, timed, wait
from lora_da_core import solve_queue
from lora_da_core.budget import workload_of

GIB = 2**30
PROGRAMS = {
    "lora_ga": "peft lora_ga",
    "fixed": "lora_da robust, fixed scale",
    "robust": "lora_da robust",
    "paper": "lora_da paper",
    "tolerant": "lora_da robust, fixed scale, residual 1e-4",
    "in_turn": "lora_da robust, fixed scale, prepared and solved in turn",
}
USUAL = ("lora_ga", "fixed", "robust", "paper")
CHECKED = ("fixed", "paper")
WARMED_UP = ("lora_ga", "fixed", "robust")
"""Not `paper`: undamped, the inputs' moments of two batches are singular, and it would take longer than on all."""
REFERENCE = PROGRAMS["lora_ga"]


def main() -> None:
    """Measures and prints."""
    options = _options()
    deadline = time.monotonic() + options.time_limit
    model = random_llama(options, options.device)
    batches = _batches(options)
    # By name: PEFT's LoRA-GA does not know "all-linear".
    lora = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=list(LINEAR), task_type="CAUSAL_LM")
    pipelines = _pipelines()
    programs = _programs(model, lora, pipelines, options)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    figures: dict[str, Any] = {"layers": options.layers, "samples": options.samples, "tokens": tokens, "rows": {}}
    print(machine(), flush=True)
    limits = {}
    for limit in options.max_memory:
        limits[_limited(limit)] = _plan(model, batches, lora, pipelines["fixed"], limit)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for name in () if options.cold else WARMED_UP:
        if PROGRAMS[name] in programs:
            programs[PROGRAMS[name]](batches[-2:])
    if REFERENCE in programs and not options.cold:
        _restore(model, options)
    for number in range(options.repetitions):
        for name, program in programs.items():
            if number and (name in limits or name == PROGRAMS["in_turn"]):
                continue
            if number and time.monotonic() > deadline:
                print("time limit reached", flush=True)
                return
            runs[name].append(_measured(program, batches))
            if name == REFERENCE:
                _restore(model, options)
            figures["rows"][name] = _summary(runs[name])
            if REFERENCE in figures["rows"]:
                ratio = figures["rows"][name]["seconds"] / figures["rows"][REFERENCE]["seconds"]
                figures["rows"][name]["ratio_to_lora_ga"] = ratio
            if name in limits:
                figures["rows"][name]["plan"] = limits[name]
            print(f"{name}: {figures['rows'][name]}", flush=True)
            write_json(Path(options.output), figures)
        if number == 0:
            for key in options.checks:
                if key in options.programs:
                    figures[f"check {key}"] = _check(model, batches, lora, pipelines[key], options)
                    write_json(Path(options.output), figures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=3584, help="of a batch, padding included")
    parser.add_argument("--programs", type=lambda text: text.split(","), default=list(USUAL))
    parser.add_argument("--max-memory", type=lambda text: text.split(","), default=[])
    parser.add_argument(
        "--checks",
        type=lambda text: [key for key in text.split(",") if key],
        default=list(CHECKED),
        help="of these a profile, and a check in float64",
    )
    parser.add_argument("--cold", action="store_true", help="no warm-up: what a first run takes")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds; no further run starts after them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="runs/benchmarks/gpu_7b.json")
    return parser.parse_args()


def _batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Length-sorted random samples of 100 to 288 tokens; the first half of each is a prompt without labels."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 289, (options.samples,), generator=generator).sort().values.tolist()
    batches = []
    while lengths:
        # Sorted: as many of the shortest as fit with the last of them as the longest.
        fits = [count for count in range(1, len(lengths) + 1) if count * lengths[count - 1] <= options.batch_tokens]
        count = max(fits, default=1)
        chunk, lengths = lengths[:count], lengths[count:]
        ids = torch.randint(0, options.vocabulary, (len(chunk), max(chunk)), generator=generator)
        mask = torch.arange(max(chunk))[None] < torch.tensor(chunk)[:, None]
        prompt = torch.arange(max(chunk))[None] < torch.tensor(chunk)[:, None] // 2
        labels = ids.masked_fill(~mask | prompt, -100)
        batches.append({"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels})
    return batches


def _pipelines() -> dict[str, Any]:
    robust = lora_da_core.build_pipeline()
    fixed = lora_da_core.build_pipeline(config=dataclasses.replace(robust.config, scale="fixed"))
    tolerant = lora_da_core.build_pipeline(solver=("lanczos", {"tolerance": 1e-4}), config=fixed.config)
    paper = lora_da_core.build_pipeline(preset="paper")
    return {"fixed": fixed, "robust": robust, "paper": paper, "tolerant": tolerant}


def _limited(limit: str) -> str:
    return f"{PROGRAMS['fixed']}, within {limit}"


def _plan(model: Any, batches: Any, lora: LoraConfig, pipeline: Any, limit: str) -> dict[str, Any]:
    start = time.perf_counter()
    plan = lora_da_core.estimate_memory(model, lora, pipeline=pipeline, workload=workload_of(batches), max_memory=limit)
    found = {
        "peak_gib": plan.peak_bytes / GIB,
        "passes": plan.passes,
        "schedule": plan.schedule,
        "parts": len(plan.parts),
        "hidden_states": plan.hidden_states,
        "hidden_gib": plan.hidden_bytes / GIB,
        "waiting_gib": plan.waiting_bytes / GIB,
        "layers_per_pass": plan.layers_per_pass,
        "batch_size": plan.batch_size,
        "relative_time": plan.relative_time,
        "fits": plan.fits,
        "phases_gib": {phase: size / GIB for phase, size in plan.phases().items()},
        "rows_gib": [(row.phase, row.what, row.bytes / GIB) for row in plan.rows],
        "seconds_to_plan": time.perf_counter() - start,
    }
    print(f"plan within {limit}: {found}", flush=True)
    return found


def _programs(
    model: Any, lora: LoraConfig, pipelines: dict[str, Any], options: argparse.Namespace
) -> dict[str, Callable[[Any], Any]]:
    device = next(model.parameters()).device

    def lora_ga(batches: Any) -> None:
        config = dataclasses.replace(lora, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

        def step() -> None:
            for batch in batches:
                on_device = {key: value.to(device) for key, value in batch.items()}
                model(**on_device, use_cache=False).loss.backward()

        preprocess_loraga(model, config, step)
        get_peft_model(model, config).unload()

    def run_of(pipeline: Any, **more: Any) -> Callable[[Any], Any]:
        return lambda batches: pipeline.run(model, batches, lora, **more).report

    def in_turn(batches: Any) -> Any:
        with _in_turn():
            return run_of(pipelines["fixed"])(batches)

    programs = {
        "lora_ga": lora_ga,
        **{key: run_of(pipeline) for key, pipeline in pipelines.items()},
        "in_turn": in_turn,
    }
    chosen = {PROGRAMS[key]: programs[key] for key in options.programs}
    return chosen | {_limited(limit): run_of(pipelines["fixed"], max_memory=limit) for limit in options.max_memory}


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """Within it layers are prepared and solved in turn, so that each has a time of its own."""
    real = solve_queue.batches_beside
    solve_queue.batches_beside = lambda *_: 0
    try:
        yield
    finally:
        solve_queue.batches_beside = real


def _measured(program: Callable[[Any], Any], batches: Any) -> dict[str, Any]:
    _cleaned()
    wait()
    start = time.perf_counter()
    report = program(batches)
    wait()
    row: dict[str, Any] = {"seconds": time.perf_counter() - start, "peak_gib": _peak()}
    if report is not None:
        solvers = [layer.solver for layer in report.layers]
        row["phases"] = dict(report.seconds)
        row["converged"] = sum(layer.converged for layer in report.layers)
        row["residual"] = max(layer.residual for layer in report.layers)
        row["applies"] = statistics.median(layer.applies for layer in report.layers)
        row["solvers"] = {name: solvers.count(name) for name in sorted(set(solvers))}
        row["with_remedies"] = sum(bool(layer.remedies) for layer in report.layers)
    return row


def _restore(model: Any, options: argparse.Namespace) -> None:
    """The model as it was made: LoRA-GA takes its adapter out of the base's weights and leaves marks on modules."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.startswith("_peft_loraga")]:
            delattr(module, name)
    model.load_state_dict(random_llama(options, options.device).state_dict())


def _cleaned() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float | None:
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    return {**middle, "all_seconds": [run["seconds"] for run in runs]}


def _check(model: Any, batches: Any, lora: LoraConfig, pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """A profiled solve, and its subspaces by other code: residuals of all layers, angles of some."""
    _cleaned()
    estimates = pipeline.estimate(model, batches, lora)
    statistics_peak = _peak()
    with _in_turn(), timed(SOLVE) as spent:
        pipeline.solve(estimates)
    found: dict[str, Any] = {
        "seconds_and_calls": {label: entry for label, entry in spent.items() if entry[1]},
        "peak_gib_of_statistics": statistics_peak,
        "peak_gib": _peak(),
    }
    for label, (seconds, calls) in found["seconds_and_calls"].items():
        print(f"    {label:<40} {seconds:8.3f} s {calls:>6} calls", flush=True)
    result = pipeline.solve(estimates)
    _cleaned()
    residuals, angles = {}, {}
    for spec in estimates.task.specs:
        exact = ExactOmega.of(estimates, spec, pipeline.config)
        basis = orthonormal_rows(result.factors[spec.name])
        residuals[spec.name] = exact.residual(basis)
        if _sampled(spec.name, options.layers):
            angles[spec.name] = exact.angle(basis)
            print(f"    {spec.name}: residual {residuals[spec.name]:.1e}, {angles[spec.name]}", flush=True)
    worst = max(residuals, key=lambda name: residuals[name])
    print(f"    worst residual {residuals[worst]:.1e} ({worst}); peaks {statistics_peak}, {found['peak_gib']} GiB")
    return {**found, "worst_residual": residuals[worst], "worst_layer": worst, "angles": angles}


def _sampled(name: str, layers: int) -> bool:
    """Kinds of layers of order `hidden` in two blocks, and one of order `intermediate`, whose eigh takes longest."""
    first, last = "layers.0.", f"layers.{layers - 1}."
    kinds = ("q_proj", "o_proj", "gate_proj")
    return ((first in name or last in name) and name.endswith(kinds)) or (last in name and name.endswith("down_proj"))


if __name__ == "__main__":
    # A warning for each layer and try: the rows count them.
    logging.getLogger("lora_da_core").setLevel(logging.ERROR)
    main()
