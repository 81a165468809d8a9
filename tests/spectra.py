"""The spectra that every solver is tried on: operators whose smallest eigenpairs are hard in one named way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da_core.operators import Dense, SymmetricOperator


@dataclass(frozen=True)
class Spectrum:
    """A symmetric operator and the rank to ask for; `build(dtype)` makes it, the same one every time."""

    name: str
    rank: int
    build: Callable[[torch.dtype], SymmetricOperator]


class TopHeavy(Dense):
    """−ΔΔᵀ + cV that offers (cV + shift·I)⁻¹, as K-FAC's V does."""

    def __init__(self, negative: Tensor, variance: Tensor) -> None:
        super().__init__(variance - negative)
        self.variance = variance

    def preconditioner(self, shift: float) -> Callable[[Tensor], Tensor]:
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        factor = torch.linalg.cholesky(self.variance + shift * eye)
        return lambda block: torch.cholesky_solve(block, factor)


def symmetric_matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these eigenvalues (…, n) and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*eigenvalues.shape, eigenvalues.shape[-1])
    basis = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator)).Q
    matrix: Tensor = (basis * eigenvalues.unsqueeze(-2)) @ basis.mT
    return (matrix + matrix.mT) / 2


def _of(eigenvalues: Tensor) -> Callable[[torch.dtype], SymmetricOperator]:
    return lambda dtype: Dense(symmetric_matrix(eigenvalues).to(dtype))


def _powers(size: int, condition: float) -> Tensor:
    return torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)


def _float64(*parts: Tensor) -> Tensor:
    return torch.cat([part.to(torch.float64).reshape(-1) for part in parts])


def _top_heavy(dtype: torch.dtype) -> SymmetricOperator:
    size, depth = 200, 12
    generator = torch.Generator().manual_seed(3)
    variance = symmetric_matrix(3e4 * _powers(size, 1e6), seed=1)
    delta = torch.linalg.qr(torch.randn(3 * depth, depth, dtype=torch.float64, generator=generator)).Q
    delta = delta * torch.linspace(1.5, 0.8, depth, dtype=torch.float64)
    # Δ lies where V is small, or nothing would be left below zero.
    delta = torch.linalg.eigh(variance).eigenvectors[:, : 3 * depth] @ delta
    return TopHeavy((delta @ delta.mT).to(dtype), variance.to(dtype))


_multiple = _float64(torch.full((20,), -1.0), torch.linspace(-0.5, 0.8, 100))
_hidden = _float64(torch.full((6,), -2.0), -1 - 0.05 * torch.arange(6), torch.linspace(-0.5, 1, 88))

SPECTRA = {
    spectrum.name: spectrum
    for spectrum in (
        Spectrum("power_law", 8, _of(-_powers(120, 1e9))),
        Spectrum("power_law_positive", 4, _of(_powers(100, 1e9))),
        Spectrum(
            "clustered", 8, _of(_float64(-1 + 1e-6 * torch.arange(6), -0.9 + 1e-7 * torch.arange(6), torch.zeros(90)))
        ),
        Spectrum("multiple", 8, _of(_multiple)),
        Spectrum("hidden_copies", 8, _of(_hidden)),
        Spectrum("no_gap", 5, _of(torch.linspace(-1, 1, 90, dtype=torch.float64))),
        Spectrum("zero", 4, lambda dtype: Dense(torch.zeros(60, 60, dtype=dtype))),
        Spectrum("identity", 4, lambda dtype: Dense(torch.eye(60, dtype=dtype))),
        Spectrum("rank_deficient", 8, _of(_float64(-torch.arange(1, 6) / 5, torch.zeros(95)))),
        Spectrum("top_heavy", 8, _top_heavy),
        Spectrum("tiny_scale", 3, _of(-1e-18 * _powers(64, 1e3))),
        Spectrum("whole", 7, _of(torch.linspace(-1, 1, 7, dtype=torch.float64))),
        Spectrum("all_but_one", 6, _of(torch.linspace(-1, 1, 7, dtype=torch.float64))),
        Spectrum("order_one", 1, _of(torch.tensor([-2.0], dtype=torch.float64))),
        Spectrum(
            "batch_of_scales", 4, _of(torch.tensor([[1.0], [1e-12], [1e6]], dtype=torch.float64) * -_powers(72, 1e4))
        ),
        Spectrum("batch_of_batches", 3, _of(torch.linspace(-1, 1, 60, dtype=torch.float64).expand(2, 2, 60))),
    )
}
"""Every spectrum by name."""
