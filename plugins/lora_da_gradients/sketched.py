"""The mean gradient as a sum of sketches, from which a low-rank approximation is rebuilt.

Tropp, Yurtsever, Udell & Cevher, "Practical Sketching Algorithms for Low-Rank Matrix Approximation" (SIAM J. Matrix
Anal. Appl. 38(4), 2017), algorithm 4 and theorem 4.3; the error's estimate is from the same authors' "Streaming
Low-Rank Matrix Approximation with an Application to Scientific Simulation" (SIAM J. Sci. Comput. 41(4), 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import Accumulator, GradientEstimator
from lora_da_core.operators import LinearMap, LowRankMap, add_product, holds_places, rows_product
from lora_da_core.types import LayerSpec
from lora_da_gradients._seeds import named_generator

CHECK_ROWS = 10
"""Rows of the sketch that estimates the error: its relative spread is about √(2/10)."""


@dataclass(frozen=True)
class SketchedGradientOptions:
    """Options of the sketched gradient.

    Attributes:
        size: Rank of the approximation; a gradient of this rank or less is exact.
        seed: Seed of the test matrices; the layer's name enters as well.
    """

    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size!r}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; it must be at least 0")


@dataclass(frozen=True)
class TestMatrices:
    """Standard Gaussian matrices: Ω (in, k) and, stacked, Ψ (2k + 1, out) and the check's Θ (10, out)."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    right: Tensor
    left: Tensor

    @classmethod
    def of(cls, spec: LayerSpec, options: SketchedGradientOptions) -> TestMatrices:
        """The matrices of one layer, float64 on the CPU."""
        generator = named_generator(options.seed, spec.name)
        size = rank_of(spec, options)
        right = torch.randn(spec.in_features, size, generator=generator, dtype=torch.float64)
        left = torch.randn(2 * size + 1 + CHECK_ROWS, spec.out_features, generator=generator, dtype=torch.float64)
        return cls(right, left)

    def to(self, device: torch.device, dtype: torch.dtype) -> TestMatrices:
        """The same matrices elsewhere."""
        return TestMatrices(self.right.to(device, dtype), self.left.to(device, dtype))


class GradientSketch(Accumulator):
    """GΩ (out, k) and [Ψ; Θ]G (2k + 11, in) of the summed gradient, token by token; G itself is never formed."""

    def __init__(self, matrices: TestMatrices) -> None:
        # Attributes of its own, which can lie elsewhere between updates.
        self.right, self.left = matrices.right, matrices.left
        self.range = self.right.new_zeros(self.left.shape[1], self.right.shape[1])
        self.corange = self.left.new_zeros(self.left.shape[0], self.right.shape[0])

    def update(self, inputs: Tensor, output_grads: Tensor | None, example: Tensor) -> None:
        if output_grads is None:
            raise TypeError("the sketched gradient needs output gradients")
        g = output_grads.to(self.range)
        x = inputs if holds_places(inputs) else inputs.to(self.range)
        self.range.addmm_(g.mT, rows_product(x, self.right))
        add_product(self.corange, g @ self.left.mT, x)

    def statistics(self) -> dict[str, Tensor]:
        return {"range": self.range, "corange": self.corange}


class SketchedGradient(GradientEstimator[SketchedGradientOptions]):
    """G ≈ Q (ΨQ)⁺ΨG, of rank `size`, with Q a basis of the columns of GΩ.

    With k = `size` the expected squared Frobenius error is at most (1 + k/k)·(1 + ϱ/(k − ϱ − 1)) times the sum of
    G's squared singular values after the ϱ-th, for every ϱ < k − 1: about four times the best error of half the rank.
    The error itself is estimated from ten further random rows, ΘG: `diagnostics` gives it, unbiased in its square.

    Sketches are linear, so shards add. A layer costs tokens·(in + out)·(3k + 11) multiplications in place of
    tokens·in·out, and as much memory as in + out vectors of length 3k + 11, test matrices included.
    """

    name = "sketched"
    api_version = 1
    Options = SketchedGradientOptions

    @property
    def exact(self) -> bool:
        return False

    @property
    def takes_one_hot(self) -> bool:
        return True

    def accumulator(self, spec: LayerSpec, *, device: torch.device, dtype: torch.dtype) -> Accumulator:
        return GradientSketch(TestMatrices.of(spec, self.options).to(device, dtype))

    def gradient(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> LinearMap:
        matrices = TestMatrices.of(spec, self.options)
        basis, coefficients = self._rebuilt(statistics, matrices, samples)
        dtype = statistics["range"].dtype
        return LowRankMap(basis.to(dtype), coefficients.mT.to(dtype).contiguous())

    def diagnostics(self, statistics: Mapping[str, Tensor], spec: LayerSpec, *, samples: int) -> dict[str, float]:
        """How good the approximation is.

        Args:
            statistics: As `gradient` takes them.
            spec: The layer.
            samples: As `gradient` takes it.

        Returns:
            `error`, an estimate of ‖G − Ĝ‖_F; `norm`, one of ‖G‖_F; `relative_error`, their quotient (0 for G = 0).
        """
        matrices = TestMatrices.of(spec, self.options)
        basis, coefficients = self._rebuilt(statistics, matrices, samples)
        check = statistics["corange"][-CHECK_ROWS:].double() / samples
        rows = matrices.left[-CHECK_ROWS:].to(check.device)
        error = float((check - (rows @ basis) @ coefficients).norm()) / CHECK_ROWS**0.5
        norm = float(check.norm()) / CHECK_ROWS**0.5
        return {"error": error, "norm": norm, "relative_error": error / norm if norm > 0 else 0.0}

    def statistics_bytes(self, spec: LayerSpec, *, itemsize: int) -> int:
        columns = 3 * rank_of(spec, self.options) + 1 + CHECK_ROWS
        return (spec.in_features + spec.out_features) * columns * itemsize

    def _rebuilt(self, statistics: Mapping[str, Tensor], matrices: TestMatrices, samples: int) -> tuple[Tensor, Tensor]:
        """Q (out, k) and (ΨQ)⁺ΨG (k, in), float64."""
        products = statistics["range"].double() / samples
        sketch = statistics["corange"][:-CHECK_ROWS].double() / samples
        basis = torch.linalg.qr(products).Q
        outer, triangle = torch.linalg.qr(matrices.left[:-CHECK_ROWS].to(basis.device) @ basis)
        return basis, torch.linalg.solve_triangular(triangle, outer.mT @ sketch, upper=True)


def rank_of(spec: LayerSpec, options: SketchedGradientOptions) -> int:
    """The rank of a layer's approximation: no more than its gradient can have.

    Args:
        spec: The layer.
        options: The options.

    Returns:
        k ≥ 1.
    """
    return min(options.size, spec.in_features, spec.out_features)


@hookimpl
def lora_da_gradient_estimators() -> list[type[GradientEstimator[Any]]]:
    """Offers `sketched`."""
    return [SketchedGradient]
