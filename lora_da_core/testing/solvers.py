"""What every solver must fulfil, as checks against dense float64 eigenvalues on spectra that are hard in one way."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_core.interfaces import Solver
from lora_da_core.operators import Dense, SymmetricOperator
from lora_da_core.testing.data import Check, Subject, bitwise, checks_of, declares_itself, require, undisturbed
from lora_da_core.types import EigenResult

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
"""Residual relative to ‖Ω‖ that may count as converged, unless the solver's option `tolerance` is larger."""

_MEETING_SECONDS = 60.0
"""How long one of two solves waits for the other's first product."""


class Opaque(SymmetricOperator):
    """A matrix known by its products alone; counts them."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.products = 0

    @property
    def size(self) -> int:
        return self._matrix.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self._matrix.dtype

    @property
    def device(self) -> torch.device:
        return self._matrix.device

    @property
    def batch_shape(self) -> torch.Size:
        return self._matrix.shape[:-2]

    def matmat(self, block: Tensor) -> Tensor:
        shape = (*self.batch_shape, self.size, block.shape[-1])
        require(
            tuple(block.shape) == shape, f"the operator was given a block of shape {tuple(block.shape)}, not {shape}"
        )
        require(block.dtype == self.dtype, f"the operator is in {self.dtype} and was given {block.dtype}")
        self.products += 1
        return self._matrix @ block


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (…, size), the rank to ask for, and whether every solver must converge on them."""

    name: str
    eigenvalues: Tensor
    rank: int
    easy: bool = False

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """A symmetric matrix with these eigenvalues and random eigenvectors, the same one every time."""
        generator = torch.Generator().manual_seed(0)
        shape = (*self.eigenvalues.shape, self.eigenvalues.shape[-1])
        basis = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
        matrix = (basis * self.eigenvalues.unsqueeze(-2)) @ basis.mT
        symmetric: Tensor = 0.5 * (matrix + matrix.mT)
        return symmetric.to(dtype)


def _row(*parts: Tensor) -> Tensor:
    return torch.cat([part.double().reshape(-1) for part in parts])


def _line(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


_separated = _row(torch.tensor([-5.0, -4.0, -3.0, -2.0]), _line(-0.1, 0.1, 36))
_powers = torch.logspace(0, -6, 48, dtype=torch.float64)

SPECTRA = (
    Spectrum("separated", _separated, 4, easy=True),
    Spectrum("evenly_spread", _line(-1, 1, 40), 5),
    Spectrum("power_law", -_powers, 6),
    Spectrum("positive", _powers[:30] + 0.5, 4),
    Spectrum("multiplicity_above_a_block", _row(torch.full((14,), -1.0), _line(-0.5, 0.8, 46)), 8),
    Spectrum("multiplicity_beside_others", _row(torch.full((6,), -2.0), _line(-1.3, -1.0, 6), _line(-0.5, 1, 48)), 8),
    Spectrum("zero", torch.zeros(30, dtype=torch.float64), 3, easy=True),
    Spectrum("identity", torch.ones(30, dtype=torch.float64), 3, easy=True),
    Spectrum("rank_deficient", _row(_line(-1, -0.2, 5), torch.zeros(35)), 8),
    Spectrum("whole", _line(-1, 1, 7), 7, easy=True),
    Spectrum("all_but_one", _line(-1, 1, 7), 6, easy=True),
    Spectrum("order_one", torch.tensor([-2.0], dtype=torch.float64), 1, easy=True),
    Spectrum("tiny", 1e-18 * _separated, 4, easy=True),
    Spectrum("huge", 1e12 * _separated, 4, easy=True),
    Spectrum("batch_of_scales", torch.tensor([[1.0], [1e-9], [1e6]], dtype=torch.float64) * _separated, 4, easy=True),
    Spectrum("batch_of_batches", _separated.expand(2, 2, 40), 3),
)


def checks(cls: type[Solver[Any]], options: Mapping[str, Any]) -> Iterator[Check]:
    """All checks of a solver, as (name, callable); one for each spectrum and dtype, and the general ones.

    Args:
        cls: The solver.
        options: Its options.

    Yields:
        (name, callable).
    """
    subject = Subject(cls, options)
    yield from checks_of(subject, _CHECKS)
    for spectrum in SPECTRA:
        for dtype in TOLERANCE:
            yield (
                f"solves_{spectrum.name}_in_{str(dtype).removeprefix('torch.')}",
                _spectrum_check(subject, spectrum, dtype),
            )


def _spectrum_check(subject: Subject, spectrum: Spectrum, dtype: torch.dtype) -> Any:
    return lambda: solves(subject, spectrum, dtype)


def solves(subject: Subject, spectrum: Spectrum, dtype: torch.dtype) -> None:
    """The answer has the right form, is honest about itself and, where it says so, right."""
    matrix = spectrum.matrix(dtype)
    operator = Opaque(matrix)
    result = _smallest(subject, operator, spectrum.rank)
    require(isinstance(result, EigenResult), f"smallest() returned {type(result).__name__}, which is no EigenResult")
    _well_formed(result, operator, spectrum.rank)
    _honest(result, matrix)
    tolerance = max(float(getattr(subject.make().options, "tolerance", 0.0)), TOLERANCE[dtype])
    _right(result, matrix, tolerance)
    if spectrum.easy:
        require(bool(result.converged.all()), "it did not converge, though every method does on this spectrum")


def _smallest(subject: Subject, operator: SymmetricOperator, rank: int, seed: int = 0) -> Any:
    generator = torch.Generator(operator.device).manual_seed(seed)
    return subject.make().smallest(operator, rank, generator=generator)


def _well_formed(result: EigenResult, operator: SymmetricOperator, rank: int) -> None:
    batch = tuple(operator.batch_shape)
    shapes = {
        "values": (result.values, (*batch, rank)),
        "vectors": (result.vectors, (*batch, operator.size, rank)),
        "residuals": (result.residuals, (*batch, rank)),
        "converged": (result.converged, batch),
        "next_value": (result.next_value, batch),
    }
    for name, (tensor, shape) in shapes.items():
        require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        require(tensor.device == operator.device, f"{name} is on {tensor.device}, not {operator.device}")
        dtype = torch.bool if name == "converged" else operator.dtype
        require(tensor.dtype == dtype, f"{name} is in {tensor.dtype}, not {dtype}")
        require(name == "next_value" or bool(tensor.isfinite().all()), f"{name} holds NaN or Inf")
    require(result.applies >= 1, f"applies is {result.applies}")
    require(bool((result.values.diff(dim=-1) >= 0).all()), f"values do not ascend: {result.values.tolist()}")
    vectors = result.vectors.double()
    skew = float((vectors.mT @ vectors - torch.eye(rank, dtype=torch.float64)).abs().max())
    allowed = 100 * torch.finfo(operator.dtype).eps
    require(skew <= allowed, f"vectors are not orthonormal: |UᵀU − I| is {skew:.3g}")
    largest = result.vectors.gather(-2, result.vectors.abs().argmax(-2, keepdim=True))
    require(bool((largest > 0).all()), "the largest entry of a vector is negative: signs are not canonical")


def _honest(result: EigenResult, matrix: Tensor) -> None:
    """Residuals are what they are said to be, recomputed in float64."""
    dense, vectors, values = matrix.double(), result.vectors.double(), result.values.double()
    residuals = (dense @ vectors - vectors * values.unsqueeze(-2)).norm(dim=-2)
    norm = _norm(matrix).unsqueeze(-1)
    slack = 100 * torch.finfo(matrix.dtype).eps * norm + 1e-3 * residuals
    honest = (residuals - result.residuals.double()).abs() <= slack
    told = f"told {result.residuals.tolist()}, found {residuals.tolist()}"
    require(bool(honest.all()), f"residuals are not true: {told}")


def _right(result: EigenResult, matrix: Tensor, tolerance: float) -> None:
    """Where converged: small residuals, the least eigenvalues and none left out; the next value is an upper bound."""
    expected, norm = torch.linalg.eigvalsh(matrix.double()), _norm(matrix)
    rank, good = result.values.shape[-1], result.converged
    bound = 2 * tolerance * norm.unsqueeze(-1)
    missed = f"is said of residuals {result.residuals.tolist()} where ‖Ω‖ is {norm.tolist()}"
    require(bool((result.residuals.double() <= bound)[good].all()), f"converged {missed}")
    right = ((result.values.double() - expected[..., :rank]).abs() <= bound)[good]
    told = f"found {result.values.tolist()}, the least are {expected[..., :rank].tolist()}"
    require(bool(right.all()), f"it says converged, but the values are not the least: {told}")
    known = ~result.next_value.isnan()
    above = result.next_value >= result.values[..., -1]
    require(bool(above[known].all()), "next_value is below the last value")
    if rank < matrix.shape[-1]:
        after = result.next_value.double() >= expected[..., rank] - bound[..., 0]
        require(bool(after[known & good].all()), "next_value is no upper bound of the eigenvalue after the last")
        below = result.next_value.double() <= expected[..., -1] + bound[..., 0]
        require(bool(below[known].all()), "next_value is above the largest eigenvalue, so it is no Ritz value")


def _norm(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.eigvalsh(matrix.double()).abs().amax(-1)
    return norm


def same_seed_gives_same_bytes(subject: Subject) -> None:
    """Chance comes from the generator given and from nothing else."""
    matrix = SPECTRA[1].matrix(torch.float64)
    first, second = (_smallest(subject, Opaque(matrix), 5, seed=3) for _ in range(2))
    for part in ("values", "vectors", "residuals", "converged", "next_value"):
        require(bitwise(getattr(first, part)) == bitwise(getattr(second, part)), f"{part} differ between two runs")


def any_seed_gives_the_same_space(subject: Subject) -> None:
    """The answer is the matrix's, not the generator's."""
    matrix = SPECTRA[0].matrix(torch.float64)
    spaces = [_smallest(subject, Opaque(matrix), 4, seed=seed).vectors for seed in (0, 1)]
    cosines = torch.linalg.svdvals(spaces[0].mT @ spaces[1])
    require(float(cosines.min()) > 1 - 1e-6, f"two seeds give spaces with cosines {cosines.tolist()}")


def global_state_is_left_alone(subject: Subject) -> None:
    """Random numbers come from the generator given."""
    undisturbed(lambda: _smallest(subject, Opaque(SPECTRA[1].matrix(torch.float64)), 5))


def stored_matrices_are_not_modified(subject: Subject) -> None:
    """The operator's matrix is the caller's."""
    matrix = SPECTRA[0].matrix(torch.float64)
    before = bitwise(matrix)
    _smallest(subject, Dense(matrix), 4)
    require(bitwise(matrix) == before, "the operator's matrix was modified")


def a_solver_holds_no_state(subject: Subject) -> None:
    """One instance solves many layers: an earlier problem leaves no trace."""
    solver = subject.make()
    matrix, other = SPECTRA[0].matrix(torch.float64), SPECTRA[1].matrix(torch.float64)
    results = []
    for before in ((), (other,)):
        for earlier in before:
            solver.smallest(Dense(earlier), 5, generator=torch.Generator().manual_seed(1))
        results.append(solver.smallest(Dense(matrix), 4, generator=torch.Generator().manual_seed(0)))
    require(bitwise(results[0].vectors) == bitwise(results[1].vectors), "an earlier problem changed the answer")


class _Meeting(Opaque):
    """A matrix whose first product waits for that of another one."""

    def __init__(self, matrix: Tensor, meeting: threading.Barrier) -> None:
        super().__init__(matrix)
        self._meeting = meeting

    def matmat(self, block: Tensor) -> Tensor:
        if not self.products:
            self._meeting.wait()
        return super().matmat(block)


def a_solver_serves_two_threads(subject: Subject) -> None:
    """One instance solves two batches at once, as on CUDA: neither answer leaks into the other."""
    solver, meeting = subject.make(), threading.Barrier(2, timeout=_MEETING_SECONDS)
    matrices = [spectrum.matrix(torch.float64) for spectrum in SPECTRA[:2]]

    def solved(operator: SymmetricOperator) -> Any:
        return solver.smallest(operator, 4, generator=torch.Generator().manual_seed(0))

    alone = [solved(Opaque(matrix)) for matrix in matrices]
    with ThreadPoolExecutor(2) as pool:
        together = [*pool.map(solved, [_Meeting(matrix, meeting) for matrix in matrices])]
    for first, second in zip(alone, together, strict=True):
        require(bitwise(first.vectors) == bitwise(second.vectors), "a solve in another thread changed the answer")


_CHECKS = (
    declares_itself,
    same_seed_gives_same_bytes,
    any_seed_gives_the_same_space,
    global_state_is_left_alone,
    stored_matrices_are_not_modified,
    a_solver_holds_no_state,
    a_solver_serves_two_threads,
)
