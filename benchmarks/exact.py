"""σ²Ω of K-FAC in float64 straight from the sums, by other code than the library's: what benchmarks check against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_core import LoraDAConfig
from lora_da_core.estimation import Estimates
from lora_da_core.types import LayerSpec


@dataclass(frozen=True)
class ExactOmega:
    """The parts of σ²Ω = −αΔΔᵀ + (β/N)V of one layer, Y diagonal.

    Attributes:
        root: Cholesky factor of the damped Z, (in, in), float64.
        output: The damped Y's diagonal, (out,), float64.
        gradient: G, (out, in).
        alpha: α.
        weight: (β/N)·tr Y⁻¹.
    """

    root: Tensor
    output: Tensor
    gradient: Tensor
    alpha: float
    weight: float

    @classmethod
    def of(cls, estimates: Estimates, spec: LayerSpec, config: LoraDAConfig) -> ExactOmega:
        """From a layer's sums.

        Args:
            estimates: Of a K-FAC pipeline with a diagonal Y.
            spec: The layer.
            config: α, β, N, damping.

        Returns:
            The operator.
        """
        found = estimates.statistics.of_layer(spec.name)
        moment = found.input["second_moment"].double() / found.tokens
        squares = found.layer["squares"].double() / found.tokens
        relative = config.damping_kind == "relative"
        for_inputs = config.damping**0.5 * float(moment.diagonal().mean()) if relative else config.damping
        for_outputs = config.damping**0.5 * float(squares.mean()) if relative else config.damping
        moment.diagonal().add_(for_inputs)
        output = squares + for_outputs
        population = config.population or estimates.statistics.samples
        return cls(
            torch.linalg.cholesky(moment),
            output,
            estimates.gradient(spec).to_dense().double(),
            config.alpha,
            config.beta / population * float((1 / output).sum()),
        )

    def times(self, block: Tensor) -> Tensor:
        """The product with (in, k)."""
        solved = torch.cholesky_solve(block, self.root)
        inner = (self.gradient @ solved) / self.output.square().unsqueeze(1)
        return -self.alpha * torch.cholesky_solve(self.gradient.mT @ inner, self.root) + self.weight * solved

    def residual(self, basis: Tensor) -> float:
        """‖ΩU − U(UᵀΩU)‖₂ relative to ‖Ω‖, of which a power iteration gives a bound from below.

        Args:
            basis: U, (in, r), orthonormal columns, float64.
        """
        product = self.times(basis)
        missed = torch.linalg.matrix_norm(product - basis @ (basis.mT @ product), 2)
        return float(missed / self.norm())

    def norm(self, steps: int = 12) -> Tensor:
        """‖Ω‖ from below."""
        generator = torch.Generator(self.root.device).manual_seed(0)
        block = torch.randn(len(self.root), 4, dtype=torch.float64, device=self.root.device, generator=generator)
        for _ in range(steps):
            block = self.times(torch.linalg.qr(block).Q)
        return torch.linalg.matrix_norm(block, 2)

    def angle(self, basis: Tensor) -> dict[str, float]:
        """Sine of the largest angle to the eigenvectors by dense eigh, and their gap relative to ‖Ω‖.

        Args:
            basis: U, (in, r), orthonormal columns, float64.
        """
        rank = basis.shape[1]
        dense = self.times(torch.eye(len(basis), dtype=basis.dtype, device=basis.device))
        values, vectors = torch.linalg.eigh(0.5 * (dense + dense.mT))
        wanted = vectors[:, :rank]
        sine = torch.linalg.matrix_norm(basis - wanted @ (wanted.mT @ basis), 2)
        norm = values.abs().max()
        excess = (basis * self.times(basis)).sum() - values[:rank].sum()
        return {
            "sine": float(sine),
            "gap": float((values[rank] - values[rank - 1]) / norm),
            "objective_excess": float(excess / values[:rank].sum().abs()),
        }


def orthonormal_rows(factor: Any) -> Tensor:
    """A's row space as orthonormal columns, (in, r), float64."""
    basis: Tensor = torch.linalg.qr(factor.A.double().mT).Q
    return basis
