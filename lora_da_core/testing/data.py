"""What the conformance checks share: data of a small layer, statistics of it in shards, dense matrices."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import isabstract
from typing import Any

import torch
from torch import Tensor

from lora_da_core.interfaces import API_VERSION, Accumulator, Component, FisherEstimator
from lora_da_core.operators import LinearMap
from lora_da_core.types import FisherStatistics, LayerSpec

CPU = torch.device("cpu")
EXACT = 1e-9
"""Relative error that rounding in float64 explains, whatever the order of the sums."""

Check = tuple[str, Callable[[], None]]
"""A check's name and the check, which raises AssertionError where the contract is broken."""


def require(condition: bool, message: str) -> None:
    """An assertion that `python -O` keeps.

    Args:
        condition: What must hold.
        message: What is wrong where it does not.

    Raises:
        AssertionError: It does not hold.
    """
    if not condition:
        raise AssertionError(message)


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = EXACT) -> None:
    """Requires equal shapes and ‖found − expected‖ ≤ tolerance·‖expected‖, in Frobenius norm."""
    require(found.shape == expected.shape, f"{what}: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}")
    found, expected = found.double(), expected.double()
    error, norm = float((found - expected).norm()), float(expected.norm())
    require(error <= tolerance * norm, f"{what}: off by {error:.3g} where the norm is {norm:.3g}")


@dataclass(frozen=True)
class Subject:
    """The class under test with one set of options; every check makes instances of its own."""

    cls: type[Component[Any]]
    given: Mapping[str, Any]

    def make(self) -> Any:
        """A fresh instance."""
        return self.cls(self.cls.Options(**self.given))


def checks_of(subject: Subject, functions: Sequence[Callable[[Subject], None]]) -> Iterator[Check]:
    """Binds check functions to a subject.

    Args:
        subject: The class under test.
        functions: Checks, named for what they require.

    Yields:
        (name, callable).
    """
    for function in functions:
        yield function.__name__, _bound(function, subject)


def _bound(function: Callable[[Subject], None], subject: Subject) -> Callable[[], None]:
    return lambda: function(subject)


def declares_itself(subject: Subject) -> None:
    """Name, version and documentation are there; options are frozen and survive a round trip through JSON."""
    cls, options = subject.cls, subject.make().options
    name = getattr(cls, "name", None)
    require(not isabstract(cls), f"methods are missing: {', '.join(sorted(getattr(cls, '__abstractmethods__', ())))}")
    require(isinstance(name, str) and bool(name) and ":" not in name, f"name is {name!r}")
    version = getattr(cls, "api_version", None)
    require(version == API_VERSION, f"api_version is {version!r}, this package has {API_VERSION}")
    require(bool((cls.__doc__ or "").strip()), "the class has no docstring")
    require(bool((cls.Options.__doc__ or "").strip()), "Options has no docstring")
    frozen = getattr(cls.Options, "__dataclass_params__", None)
    require(frozen is not None and frozen.frozen, "Options is not a frozen dataclass")
    stored = json.loads(json.dumps(asdict(options)))
    require(cls.Options(**stored) == options, f"options do not survive JSON: {options} became {stored}")


@dataclass(frozen=True)
class Tokens:
    """Tokens of some samples at one layer: x (tokens, in), g (tokens, out), and whose they are (tokens,)."""

    spec: LayerSpec
    inputs: Tensor
    output_grads: Tensor
    example: Tensor
    samples: int

    def of_samples(self, chosen: Sequence[int]) -> Tokens:
        """The tokens of these samples in this order, numbered anew from 0."""
        rows = [(self.example == index).nonzero().flatten() for index in chosen]
        example = torch.cat([torch.full_like(row, number) for number, row in enumerate(rows)])
        picked = torch.cat(rows)
        return replace(
            self,
            inputs=self.inputs[picked],
            output_grads=self.output_grads[picked],
            example=example,
            samples=len(chosen),
        )

    def reordered(self, order: Tensor) -> Tokens:
        """The same tokens in another order."""
        return replace(
            self, inputs=self.inputs[order], output_grads=self.output_grads[order], example=self.example[order]
        )

    def to(self, dtype: torch.dtype) -> Tokens:
        """The same tokens in another dtype."""
        return replace(self, inputs=self.inputs.to(dtype), output_grads=self.output_grads.to(dtype))

    def gradient(self) -> Tensor:
        """G = (1/n) Σ g xᵀ, (out, in), the definition."""
        return self.output_grads.mT @ self.inputs / self.samples


def layer(out_features: int, in_features: int) -> LayerSpec:
    """A layer of these sizes."""
    return LayerSpec("layer", "linear", in_features, out_features, 2, 1.0)


def random_tokens(
    seed: int, out_features: int = 4, in_features: int = 5, lengths: Sequence[int] = (3, 1, 4, 2, 3, 1, 2)
) -> Tokens:
    """Correlated inputs with a mean, and output gradients of unequal sizes, float64; `lengths` by sample."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = sum(lengths)
    inputs = normal(count, in_features) @ normal(in_features, in_features) + normal(in_features)
    grads = normal(count, out_features) * torch.linspace(0.5, 2.0, out_features, dtype=torch.float64)
    example = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Tokens(layer(out_features, in_features), inputs, grads, example, len(lengths))


def orthonormal_tokens(tokens_per_sample: int) -> Tokens:
    """Two samples of up to three tokens, unit vectors up to sign, so that Fisher traces are whole numbers."""
    unit = torch.eye(5, dtype=torch.float64)
    x = torch.stack([unit[[0, 3, 1]], -unit[[2, 1, 4]]])[:, :tokens_per_sample]
    g = torch.stack([-unit[[4, 0, 2]], unit[[1, 3, 0]]])[:, :tokens_per_sample]
    example = torch.arange(2).repeat_interleave(tokens_per_sample)
    return Tokens(layer(5, 5), x.flatten(0, 1), g.flatten(0, 1), example, 2)


@dataclass
class Shard:
    """The accumulators of one process."""

    input: Accumulator
    layer: Accumulator

    @classmethod
    def of(cls, estimator: FisherEstimator[Any], spec: LayerSpec, dtype: torch.dtype) -> Shard:
        """Fresh ones."""
        return cls(
            estimator.input_accumulator(spec, device=CPU, dtype=dtype),
            estimator.layer_accumulator(spec, device=CPU, dtype=dtype),
        )


def collect(
    estimator: FisherEstimator[Any],
    shards: Sequence[Sequence[Tokens]],
    *,
    dtype: torch.dtype = torch.float64,
    by_merge: bool = False,
    reuse_buffers: bool = False,
) -> FisherStatistics:
    """All passes of an estimator over batches that are spread over shards.

    Args:
        estimator: The estimator.
        shards: Batches by shard.
        dtype: Dtype of the sums.
        by_merge: Whether shards meet in `Accumulator.merge` even where their tensors may be added.
        reuse_buffers: Whether the tensors given to `update` are overwritten after each call.

    Returns:
        The merged statistics.
    """
    batches = [batch for shard in shards for batch in shard]
    spec, samples = batches[0].spec, sum(batch.samples for batch in batches)
    tokens = sum(len(batch.inputs) for batch in batches)
    workers = [Shard.of(estimator, spec, dtype) for _ in shards]
    for index in range(estimator.passes):
        for worker, shard in zip(workers, shards, strict=True):
            for batch in shard:
                inputs, grads = batch.inputs, batch.output_grads if estimator.needs_output_grads else None
                if reuse_buffers:
                    inputs, grads = inputs.clone(), None if grads is None else grads.clone()
                worker.input.update(inputs, None, batch.example)
                worker.layer.update(inputs, grads, batch.example)
                if reuse_buffers:
                    inputs.fill_(0.5)
                    if grads is not None:
                        grads.fill_(0.5)
        additive = estimator.additive and not by_merge
        found = [
            merged([getattr(worker, side) for worker in workers], additive=additive) for side in ("input", "layer")
        ]
        statistics = FisherStatistics(spec, found[0], found[1], samples=samples, tokens=tokens)
        for worker in workers:
            worker.input.end_pass(index, statistics)
            worker.layer.end_pass(index, statistics)
    if estimator.passes == 1:
        return statistics
    found = [merged([getattr(worker, side) for worker in workers], additive=additive) for side in ("input", "layer")]
    return FisherStatistics(spec, found[0], found[1], samples=samples, tokens=tokens)


def merged(accumulators: Sequence[Accumulator], *, additive: bool) -> dict[str, Tensor]:
    """The statistics of shards, added tensor by tensor or merged by the first; the accumulators stay as they are."""
    first = accumulators[0]
    if len(accumulators) == 1:
        return dict(first.statistics())
    if not additive:
        target = copy.deepcopy(first)
        for other in accumulators[1:]:
            target.merge(other.statistics())
        return dict(target.statistics())
    total = {key: value.clone() for key, value in first.statistics().items()}
    for other in accumulators[1:]:
        more = other.statistics()
        require(more.keys() == total.keys(), f"shards hold {sorted(more)} and {sorted(total)}: they cannot be added")
        for key, value in total.items():
            require(value.shape == more[key].shape, f"{key} has another shape in another shard: it cannot be added")
            value += more[key]
    return total


def dense_matrix(product: Callable[[Tensor], Tensor], spec: LayerSpec) -> Tensor:
    """The (out·in)×(out·in) matrix of a map of (out, in) matrices, row-major, float64."""
    order = spec.out_features * spec.in_features
    units = torch.eye(order, dtype=torch.float64).view(order, spec.out_features, spec.in_features)
    columns = [product(unit) for unit in units]
    for column in columns:
        require(column.shape == units[0].shape, f"an (out, in) matrix became one of shape {tuple(column.shape)}")
    return torch.stack([column.double().flatten() for column in columns], dim=1)


def consistent_map(found: LinearMap, expected: Tensor, what: str, tolerance: float = EXACT) -> None:
    """Requires that a linear map's products, shape and dense form are those of a matrix."""
    require(tuple(found.shape) == tuple(expected.shape), f"{what}: shape {found.shape}, not {tuple(expected.shape)}")
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in expected.shape)
    close(found.to_dense(), expected, f"{what}, formed", tolerance)
    close(found.matmat(right.to(found.dtype)), expected @ right, f"{what}, matmat", tolerance)
    close(found.rmatmat(left.to(found.dtype)), expected.mT @ left, f"{what}, rmatmat", tolerance)


def same_bytes(first: Mapping[str, Tensor], second: Mapping[str, Tensor], what: str) -> None:
    """Requires bitwise equal tensors under equal keys."""
    require(first.keys() == second.keys(), f"{what}: {sorted(first)} against {sorted(second)}")
    for key, value in first.items():
        require(bitwise(value) == bitwise(second[key]), f"{what}: {key} differs")


def bitwise(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, bytes]:
    """A tensor's shape, dtype and bytes, NaN included."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return tuple(tensor.shape), tensor.dtype, bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def global_state() -> dict[str, Any]:
    """What no component may change: random states and defaults of the process."""
    numpy = sys.modules.get("numpy")
    return {
        "torch's global generator": bytes(torch.random.get_rng_state().tolist()),
        "the generator of `random`": random.getstate(),
        "numpy's global generator": None if numpy is None else str(numpy.random.get_state()),
        "torch's default dtype": torch.get_default_dtype(),
        "whether torch records gradients": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "whether torch is deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def undisturbed(work: Callable[[], object]) -> None:
    """Requires that a piece of work leaves the process's global state alone.

    The generators are moved on first, and put back in the end: work that seeds them must not meet its own seed.
    """
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    python_state, torch_state = random.getstate(), torch.random.get_rng_state()
    try:
        random.random()
        torch.rand(1)
        if numpy is not None:
            numpy.random.random()
        before = global_state()
        work()
        for part, value in global_state().items():
            require(value == before[part], f"{part} changed")
    finally:
        random.setstate(python_state)
        torch.random.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
