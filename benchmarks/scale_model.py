"""Time and memory of a run for 7B to 405B on 1 to 512 GPUs, from measured costs and stated link speeds.

What is measured: seconds of Llama-2-7B's phases on one GPU (docs/performance.md). What is counted: the layers, the
plugin's own bytes of statistics, who solves which layer (`shares.owners_of`, the code of a run), and the bytes that
collectives move. What is assumed stands in `Assumptions`. Either every GPU holds the whole model and sums are added
once per pass, or FSDP2 shards it and sums go to their owners batch by batch: whichever is faster where it fits.

    python -m benchmarks.scale_model [--samples 256] [--token-total 50362] [--json FILE]

`benchmarks.scale_check` holds it against measured runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lora_da_core
from benchmarks.machine import machine
from lora_da_core.shares import owners_of
from lora_da_core.types import LayerSpec

GIB = 2**30
PROCESSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Shape:
    """A Llama: blocks, sizes, output features of keys and values, vocabulary."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    keys: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Weights of linear layers and of both ends."""
        return sum(spec.in_features * spec.out_features for spec in self.layers()) + 2 * self.vocabulary * self.hidden

    @property
    def block_parameters(self) -> int:
        """Weights of one block, which FSDP2 gathers at a time."""
        return sum(spec.in_features * spec.out_features for spec in self.layers()) // self.blocks

    def layers(self) -> list[LayerSpec]:
        """All linear layers but the head, rank 8."""
        sizes = {
            "q": (self.hidden, self.hidden),
            "k": (self.hidden, self.keys),
            "v": (self.hidden, self.keys),
            "o": (self.hidden, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }
        return [
            LayerSpec(f"{block}.{name}", "linear", *size, 8, 1.0)
            for block in range(self.blocks)
            for name, size in sizes.items()
        ]

    def leaders(self) -> dict[str, str]:
        """The first layer that reads the same input: q, k and v share one, gate and up another."""
        first = {"k": "q", "v": "q", "up": "gate"}
        names = (spec.name.split(".") for spec in self.layers())
        return {f"{block}.{name}": f"{block}.{first.get(name, name)}" for block, name in names}


SHAPES = (
    Shape("Llama-2-7B", 32, 4096, 11008, 4096, 32000),
    Shape("Llama-2-13B", 40, 5120, 13824, 5120, 32000),
    Shape("Llama-3-70B", 80, 8192, 28672, 1024, 128256),
    Shape("Llama-3.1-405B", 126, 16384, 53248, 1024, 128256),
)


@dataclass(frozen=True)
class Assumptions:
    """Of the machines; none of it is measured by this project.

    Attributes:
        gpu_bytes: Memory of one GPU that may be used.
        gpus_per_node: GPUs that fast links join.
        fast: Bytes per second and direction that a GPU moves inside a node.
        slow: Bytes per second that a GPU moves between nodes.
        latency: Seconds that a collective takes beside its bytes.
        batch_tokens: Tokens of a batch on one GPU; halved as often as memory asks for, down to one sample.
        search_tries: Losses that the line search asks for.
        overlap: Share of FSDP2's gathering that goes on behind arithmetic.
        activation_bytes: Bytes of activations that a token leaves in a block per hidden element: inputs and outputs of
            seven layers, two norms and attention, in bfloat16 (Korthikanti et al., arXiv 2205.05198, section 4.1).
        solver_matrices: Float64 matrices of a layer's input size that one solve holds at a time.
    """

    gpu_bytes: float = 72 * GIB
    gpus_per_node: int = 8
    fast: float = 450e9
    slow: float = 50e9
    latency: float = 30e-6
    batch_tokens: float = 3584
    search_tries: int = 10
    overlap: float = 0.0
    activation_bytes: float = 34.0
    solver_matrices: float = 4.0


@dataclass(frozen=True)
class Costs:
    """Seconds per unit of work, from one measured run of one process.

    Attributes:
        per_pass: Of one unit of `pass_work`.
        per_solve: Of one unit of `solve_work`.
        per_search: Of one unit of `search_work`.
    """

    per_pass: float
    per_solve: float
    per_search: float

    @classmethod
    def measured(cls, shape: Shape, workload: Workload, seconds: Mapping[str, float]) -> Costs:
        """From a run's phases.

        Args:
            shape: Its model.
            workload: Its data.
            seconds: `statistics`, `solve` and `scale`.

        Returns:
            The costs.
        """
        return cls(
            seconds["statistics"] / pass_work(shape, workload.tokens),
            seconds["solve"] / solve_work(shape.layers(), shape.leaders()),
            seconds["scale"] / search_work(shape, workload.search_tokens),
        )


@dataclass(frozen=True)
class Workload:
    """The data: samples, tokens of all of them, and tokens that the line search reads each time."""

    samples: int = 256
    tokens: int = 50_362

    @property
    def search_tokens(self) -> float:
        """Of 16 samples."""
        return self.tokens * min(16, self.samples) / self.samples


GPU_7B = (SHAPES[0], Workload(), {"statistics": 5.6, "solve": 19.6, "scale": 2.1})
"""`python -m benchmarks.gpu_7b` on one H200, 2026-11-26: the second date's `robust` row of docs/performance.md."""


def pass_work(shape: Shape, tokens: float) -> float:
    """Multiplications of a pass: forward, gradients of inputs, G, and Z once per shared input."""
    layers, leaders = shape.layers(), shape.leaders()
    products = 3 * sum(spec.in_features * spec.out_features for spec in layers)
    squares = sum(spec.in_features**2 for spec in layers if leaders[spec.name] == spec.name)
    return tokens * (products + squares + 2 * shape.vocabulary * shape.hidden)


def solve_work(layers: Sequence[LayerSpec], leaders: Mapping[str, str]) -> float:
    """The cost by which a run divides its solves: a factorisation per input, products per layer."""
    cubes = sum(spec.in_features**3 for spec in layers if leaders[spec.name] == spec.name)
    return cubes + sum(spec.in_features**2 * (spec.in_features + spec.out_features) for spec in layers)


def search_work(shape: Shape, tokens: float) -> float:
    """Multiplications of one forward pass of the line search."""
    return tokens * shape.parameters


@functools.cache
def statistics_bytes(shape: Shape, workload: Workload) -> dict[str, int]:
    """Bytes of every layer's sums, as the plugins state them; those of a shared input are its first reader's."""
    components = lora_da_core.build_pipeline().components
    found, leaders = {}, shape.leaders()
    for spec in shape.layers():
        shared, own = components.estimator.statistics_bytes(
            spec, samples=workload.samples, tokens=workload.tokens, itemsize=4
        )
        gradient = components.gradient.statistics_bytes(spec, itemsize=4)
        found[spec.name] = own + gradient + (shared if leaders[spec.name] == spec.name else 0)
    return found


@dataclass(frozen=True)
class Prediction:
    """Of one model on so many GPUs: seconds by phase and bytes by what takes them, of the busiest process.

    Attributes:
        kept: Bytes of statistics between batches, without what one batch adds apart.
    """

    shape: Shape
    processes: int
    sharded: bool
    seconds: Mapping[str, float]
    bytes: Mapping[str, float]
    kept: float
    fits: bool

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """The phase that takes longest."""
        return max(self.seconds, key=lambda phase: self.seconds[phase])

    @property
    def peak(self) -> float:
        """Bytes that are there at once."""
        return sum(self.bytes.values())


def predicted(shape: Shape, processes: int, workload: Workload, costs: Costs, machine: Assumptions) -> Prediction:
    """The fastest way that memory has room for; the smallest one where none fits.

    Args:
        shape: The model.
        processes: GPUs.
        workload: The data.
        costs: Seconds per unit of work.
        machine: The machines.

    Returns:
        The prediction.
    """
    ways: list[Prediction] = []
    one_sample = workload.tokens / workload.samples
    sizes = [float(machine.batch_tokens)]
    while sizes[-1] > one_sample:
        sizes.append(max(one_sample, sizes[-1] / 2))
    for sharded in (False, True)[: min(processes, 2)]:
        ways += [
            way_of(shape, processes, workload, costs, replace(machine, batch_tokens=size), sharded=sharded)
            for size in sizes
        ]
    fitting = [way for way in ways if way.fits]
    return min(fitting, key=lambda way: way.total) if fitting else min(ways, key=lambda way: way.peak)


def way_of(
    shape: Shape, processes: int, workload: Workload, costs: Costs, machine: Assumptions, *, sharded: bool
) -> Prediction:
    """Seconds and bytes with so many processes, in batches of `machine.batch_tokens`.

    Args:
        shape: The model.
        processes: How many.
        workload: The data.
        costs: Seconds per unit of work.
        machine: The machines.
        sharded: Whether FSDP2 shards the model; otherwise every process holds it whole.

    Returns:
        The prediction.
    """
    layers = shape.layers()
    owners, busiest = _division(shape, processes)
    sums = statistics_bytes(shape, workload)
    # A sample is on one process, so at least one takes a whole sample however many there are.
    share = max(workload.tokens / processes, workload.tokens / workload.samples)
    batches = math.ceil(share / machine.batch_tokens - 1e-9)
    weights = 2 * shape.parameters
    search = costs.per_search * search_work(shape, max(workload.search_tokens / processes, workload.search_tokens / 16))
    seconds = {
        "passes": costs.per_pass * pass_work(shape, share),
        "solves": costs.per_solve * busiest,
        "search": search,
    }
    kept = largest_share(sums, owners) if sharded else sum(sums.values())
    held: dict[str, float] = {}
    if sharded:
        moved = _transfer(machine, processes, sum(sums.values()), len(layers), times=1)
        # Gathered for the forward and the backward pass of every batch, and forward for every loss of the search.
        rounds = 2 * batches + machine.search_tries
        gathered = _transfer(machine, processes, weights, shape.blocks, times=1) * rounds
        seconds["sums to owners"] = batches * moved
        seconds["gathering weights"] = gathered * (1 - machine.overlap)
        held["weights"] = weights / processes + 2 * 2 * shape.block_parameters + 4 * shape.vocabulary * shape.hidden
        held["statistics"] = kept + max(sums.values())
    else:
        seconds["adding sums"] = _transfer(machine, processes, sum(sums.values()), len(layers), times=2)
        held["weights"], held["statistics"] = weights, kept
    activations = min(share, machine.batch_tokens) * shape.hidden * shape.blocks * machine.activation_bytes
    solver = 8 * machine.solver_matrices * max(spec.in_features for spec in layers) ** 2
    held["activations" if activations > solver else "solver"] = max(activations, solver)
    return Prediction(shape, processes, sharded, seconds, held, kept, sum(held.values()) <= machine.gpu_bytes)


@functools.cache
def _division(shape: Shape, processes: int) -> tuple[dict[str, int], float]:
    """Who solves which layer, and the work of the busiest process."""
    layers, leaders = shape.layers(), shape.leaders()
    owners = owners_of(layers, leaders, processes)
    shares: dict[int, list[LayerSpec]] = {}
    for spec in layers:
        shares.setdefault(owners[spec.name], []).append(spec)
    return owners, max(solve_work(share, leaders) for share in shares.values())


def largest_share(sums: Mapping[str, int], owners: Mapping[str, int]) -> int:
    """Bytes of the process that owns most."""
    totals: dict[int, int] = {}
    for name, size in sums.items():
        totals[owners[name]] = totals.get(owners[name], 0) + size
    return max(totals.values())


def _transfer(machine: Assumptions, processes: int, size: float, collectives: int, *, times: int) -> float:
    """Seconds of a ring that moves bytes past every process once (a reduction, a gathering) or twice (all-reduce)."""
    if processes == 1:
        return 0.0
    speed = machine.fast if processes <= machine.gpus_per_node else machine.slow
    return times * size * (processes - 1) / processes / speed + collectives * machine.latency


def table(workload: Workload, costs: Costs, machine: Assumptions) -> list[Prediction]:
    """All models on all numbers of GPUs."""
    return [predicted(shape, count, workload, costs, machine) for shape in SHAPES for count in PROCESSES]


def rows_of(predictions: Sequence[Prediction]) -> Iterator[str]:
    """A Markdown table."""
    yield "| model | GPUs | weights | seconds | of the longest phase | GiB per GPU | most of it | fits |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in predictions:
        longest, how = each.seconds[each.bottleneck], "sharded" if each.sharded else "whole"
        most = max(each.bytes, key=lambda what: each.bytes[what])
        yield (
            f"| {each.shape.name} | {each.processes} | {how} | {each.total:.1f} | {longest:.1f} {each.bottleneck} | "
            f"{each.peak / GIB:.0f} | {each.bytes[most] / GIB:.0f} {most} | {'yes' if each.fits else 'no'} |"
        )


def main() -> None:
    """Predicts."""
    options, assumptions = _options(), Assumptions()
    workload = Workload(options.samples, options.token_total)
    predictions = table(workload, Costs.measured(*GPU_7B), assumptions)
    print("\n".join(rows_of(predictions)))
    if options.json:
        figures = {"machine": machine(), "assumptions": asdict(assumptions), "rows": [asdict(p) for p in predictions]}
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--token-total", type=int, default=50_362)
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
