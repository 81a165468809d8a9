"""The model of time and memory against measured runs: what one process took predicts what several take.

torchrun --nproc-per-node W -m benchmarks.scale_check --measure FILE [--sharded] [--device cuda]
python -m benchmarks.scale_check FILE…    # of `--measure`, the first of one process; or one of benchmarks.distributed
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.fsdp import fully_shard

import lora_da_core
from benchmarks import distributed
from benchmarks.llama_shapes import LINEAR, random_llama
from benchmarks.machine import write_json
from benchmarks.scale_model import SHAPES, Assumptions, Costs, Prediction, Shape, Workload, way_of
from lora_da_core.distributed import launched

TIMEOUT = 600.0
PHASES = {"statistics": "passes", "solve": "solves", "scale": "search"}
"""What the model calls the phases of a run's report."""


@dataclass(frozen=True)
class Run:
    """A measured run: how many processes, seconds of the busiest one by phase and altogether, and its bytes.

    Attributes:
        processes: How many.
        sharded: Whether FSDP2 sharded the model.
        phases: Seconds by phase of the report.
        seconds: Of the whole run; processor seconds where processes shared cores, which waiting adds nothing to.
        held: Bytes.
    """

    processes: int
    sharded: bool
    phases: Mapping[str, float]
    seconds: float
    held: float

    @property
    def longest(self) -> str:
        """The phase that took longest, by the model's name."""
        return PHASES[max(PHASES, key=lambda phase: self.phases[phase])]


@dataclass(frozen=True)
class Comparison:
    """A measured run and what the run of one process predicts of it; seconds of communication are part of a phase."""

    run: Run
    seconds: float
    held: float
    way: Prediction

    @property
    def error(self) -> float:
        """Of the seconds, relative to what was measured."""
        return self.seconds / self.run.seconds - 1


def measured(records: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """What `--measure` wrote, in processor seconds and bytes of statistics.

    The links of the machine are not known, so what they take is not in the prediction.

    Args:
        records: Of the same work, the first of one process.

    Returns:
        In their order.
    """
    first = records[0]
    if len(first["ranks"]) != 1:
        raise SystemExit("the first record must be of one process.")
    shape, workload = Shape(**first["shape"]), Workload(**first["workload"])
    costs, found = Costs.measured(shape, workload, _processor(first["ranks"][0])), []
    for record in records:
        ranks = record["ranks"]
        busiest = max(ranks, key=lambda rank: rank["processor"])
        held = max(rank["statistics_bytes"] for rank in ranks)
        run = Run(len(ranks), record["sharded"], _processor(busiest), busiest["processor"], held)
        way = way_of(shape, run.processes, workload, costs, Assumptions(latency=0.0), sharded=run.sharded)
        found.append(Comparison(run, sum(way.seconds[phase] for phase in PHASES.values()), way.kept, way))
    return found


def _processor(rank: Mapping[str, Any]) -> dict[str, float]:
    """Processor seconds by phase: the whole run's, divided as its seconds are."""
    return {phase: rank["phases"][phase] * rank["processor"] / sum(rank["phases"].values()) for phase in PHASES}


def on_gpus(figures: Mapping[str, Any]) -> list[Comparison]:
    """What `benchmarks.distributed` wrote, in seconds and bytes of the peak, links as the model assumes them.

    Args:
        figures: Of Llama-2-7B's shapes.

    Returns:
        One process, all with whole models, all with a sharded one.
    """
    shape = replace(SHAPES[0], name="measured", blocks=figures["layers"])
    workload = Workload(figures["samples"], figures["tokens"])
    rows = figures["rows"]
    costs, found = Costs.measured(shape, workload, rows["one"]["phases"]), []
    for name, sharded in (("one", False), ("all", False), ("sharded", True)):
        row, count = rows[name], 1 if name == "one" else figures["processes"]
        run = Run(count, sharded, row["phases"], row["seconds"], max(row["peak_gib"]) * 2**30)
        way = way_of(shape, count, workload, costs, Assumptions(), sharded=sharded)
        found.append(Comparison(run, way.total, way.peak, way))
    return found


def rows_of(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """A Markdown table, measured beside predicted."""
    yield "| processes | seconds | predicted | passes | solves | search | bytes | longest phase |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in comparisons:
        run, way = each.run, each.way
        phases = " | ".join(f"{run.phases[phase]:.2f}, {way.seconds[name]:.2f}" for phase, name in PHASES.items())
        yield (
            f"| {run.processes}{', sharded' if run.sharded else ''} | {run.seconds:.2f} | {each.seconds:.2f} "
            f"({round(100 * each.error):+d} %) | {phases} | {_size(run.held)}, {_size(each.held)} | "
            f"{run.longest}, {way.bottleneck} |"
        )


def _size(held: float) -> str:
    return f"{held / 2**30:.1f} GiB" if held >= 2**30 else f"{held / 2**20:.1f} MiB"


# One measured run


def measure(options: argparse.Namespace) -> None:
    """One run in the processes of a launcher; rank 0 writes what each took."""
    with launched(TIMEOUT):
        figures = run_figures(options)
        if int(os.environ.get("RANK", "0")) == 0:
            write_json(Path(options.measure), figures)


def run_figures(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, processor seconds and bytes of one run, of all processes of the group there is, or of this one."""
    if options.device == "cpu":
        torch.set_num_threads(1)  # processes share the cores
    model, batches, shape = _model_and_data(options)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    pipeline = lora_da_core.build_pipeline()
    pipeline.run(model, batches[:1], lora)  # warms up
    started, processor = time.perf_counter(), time.process_time()
    estimates = pipeline.estimate(model, batches, lora)
    found = pipeline.solve(estimates)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    own = {
        "seconds": time.perf_counter() - started,
        "processor": time.process_time() - processor,
        "phases": dict(found.report.seconds),
        "statistics_bytes": _held(estimates),
        "weights_bytes": sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in model.parameters()),
    }
    told: list[Any] = [own]
    if dist.is_initialized():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, own)
    workload = Workload(found.report.samples, sum(int(batch["attention_mask"].sum()) for batch in batches))
    return {"shape": asdict(shape), "workload": asdict(workload), "sharded": options.sharded, "ranks": told}


def _model_and_data(options: argparse.Namespace) -> tuple[Any, list[Any], Shape]:
    sizes = argparse.Namespace(**{**vars(options), "batch": 8})
    device = torch.device(options.device)
    model, batches = random_llama(sizes, device), distributed._batches(sizes)
    shape = Shape("measured", options.layers, options.hidden, options.intermediate, options.hidden, options.vocabulary)
    if device.type == "cpu":
        model = model.float()
    if options.sharded:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    return model, batches, shape


def _held(estimates: Any) -> int:
    layers = estimates.statistics.layers.values()
    groups = {id(layer.group): layer.group for layer in layers}
    sums = [each.statistics() for layer in layers for each in (layer.fisher, layer.gradient)]
    sums += [group.accumulator.statistics() for group in groups.values()]
    return sum(value.nbytes for values in sums for value in values.values())


def main() -> None:
    """Measures or compares."""
    options = _options()
    if options.measure:
        measure(options)
        return
    records = [json.loads(Path(name).read_text()) for name in options.records]
    print("\n".join(rows_of(on_gpus(records[0]) if "rows" in records[0] else measured(records))))


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", metavar="FILE")
    parser.add_argument("--measure", metavar="FILE")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=128, help="of the longest sample that is measured")
    options = parser.parse_args(arguments)
    if bool(options.records) == bool(options.measure):
        parser.error("give either records or --measure.")
    return options


if __name__ == "__main__":
    main()
