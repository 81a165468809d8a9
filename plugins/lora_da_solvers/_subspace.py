"""A growing orthonormal basis with its products, and Rayleigh-Ritz on it: what every projection method shares."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da_core.errors import ConvergenceError
from lora_da_core.factorisations import eigh
from lora_da_core.operators import SymmetricOperator
from lora_da_solvers._ritz import residual_norms
from lora_da_solvers._tall import tall_product

_NORM_STEPS = 10
"""Products spent on an estimate of ‖Ω‖."""
_LEAST_PIVOT = {torch.float32: 1e-3, torch.float64: 1e-5}
"""Least pivot of a block with unit columns that its Gram matrix is trusted with, by dtype.

The orthogonality error of Cholesky QR is the dtype's rounding over the pivot, and of the Gram matrix over its square.
"""


_HOST_ORDER = 256
"""Largest order of a projected operator that is decomposed on the host.

Measured with one H100 and one CPU core: order 256 takes 5 ms on the host, 512 27 ms there and 6 ms on the device.
"""
_WORKERS = 4
"""Projected operators of a batch that the host decomposes beside each other.

Measured with four threads: 17 of order 104 take 7 ms so, 27 one after the other, 22 on an H200.
"""


@dataclass(frozen=True)
class RitzPairs:
    """Eigenpairs of the projected operator.

    Attributes:
        values: (…, m), ascending, float64, on the CPU.
        coefficients: (…, m, m), in the basis, in the operator's dtype and on its device.
    """

    values: Tensor
    coefficients: Tensor


def _workers_for(operator: SymmetricOperator) -> Executor | None:
    """Threads for the small eigenproblems of a batch on an accelerator; they end when nothing refers to them."""
    count = min(_WORKERS, torch.get_num_threads(), operator.batch_shape.numel())
    return ThreadPoolExecutor(count) if operator.device.type != "cpu" and count > 1 else None


def orthonormal(block: Tensor) -> Tensor:
    """An orthonormal basis of the columns of a full-rank block, (…, size, k)."""
    return _factorised(block)[0]


def _factorised(block: Tensor) -> tuple[Tensor, Tensor]:
    """Q of a QR decomposition, (…, size, k), and the diagonal of R in magnitude, (…, k).

    An accelerator takes a tall block's Householder reflections one after the other and a batch's matrices too, so
    there Cholesky QR is tried first; a block that it cannot be trusted with is left to Householder.
    """
    found = cholesky_qr(block) if _by_cholesky(block.device) else None
    if found is not None:
        return found
    basis, triangle = torch.linalg.qr(block)
    return basis, triangle.diagonal(dim1=-2, dim2=-1).abs()


def _by_cholesky(device: torch.device) -> bool:
    return device.type != "cpu"


def cholesky_qr(block: Tensor) -> tuple[Tensor, Tensor] | None:
    """QR by the Cholesky factor of the Gram matrix, which is formed in float64 whatever the block's dtype.

    Applied twice it is as orthogonal as Householder's (Yamamoto et al. 2015, ETNA 44, 306-326).

    Args:
        block: (…, size, k), float32 or float64.

    Returns:
        Q (…, size, k) and the diagonal of R (…, k); None where some matrix of the batch is too near to rank-deficient.
    """
    basis, pivots, norms = _by_gram_matrix(block)
    if not bool((pivots.amin(-1) >= _LEAST_PIVOT[block.dtype]).all()):
        return None
    return basis, pivots * norms


def _by_gram_matrix(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q (…, size, k), the diagonal of R for unit columns (…, k), and the columns' norms (…, k), without a check.

    A pivot of a block that has no factor, or is not finite, is below 0.
    """
    norms = torch.linalg.vector_norm(block, dim=-2).clamp_min(torch.finfo(block.dtype).tiny)
    scaled = block / norms.unsqueeze(-2)
    wide = scaled.double()
    root, info = torch.linalg.cholesky_ex(tall_product(wide, wide))
    eye = torch.eye(block.shape[-1], dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False)
    pivots = root.diagonal(dim1=-2, dim2=-1).masked_fill((info != 0).unsqueeze(-1), -1.0)
    return scaled @ inverse.mT.to(block.dtype), pivots.nan_to_num(-1.0).to(block.dtype), norms


class Subspace:
    """Orthonormal vectors Q, their products ΩQ, and QᵀΩQ, which is computed and never inferred from a recurrence.

    Because the products are kept, residuals of Ritz pairs cost no product with the operator and stay true after
    restarts and after directions from outside were added. Everything carries the operator's batch dimensions.
    """

    def __init__(self, operator: SymmetricOperator, capacity: int, generator: torch.Generator) -> None:
        """Reserve room for `capacity` ≤ operator.size vectors."""
        shape = (*operator.batch_shape, operator.size, capacity)
        self.operator = operator
        self.capacity = capacity
        self.generator = generator
        self.filled = 0
        self.applies = 0
        self.norm = torch.zeros(operator.batch_shape, dtype=torch.float64)
        """Largest |Ritz value| seen, (…), on the CPU: the estimate of ‖Ω‖."""
        self._vectors = torch.empty(shape, dtype=operator.dtype, device=operator.device)
        self._products = torch.empty_like(self._vectors)
        self._projected = self._vectors.new_zeros((*operator.batch_shape, capacity, capacity))
        self._pairs: RitzPairs | None = None
        self._workers = _workers_for(operator)

    @property
    def vectors(self) -> Tensor:
        """Q, (…, size, filled)."""
        return self._vectors[..., : self.filled]

    @property
    def products(self) -> Tensor:
        """ΩQ, (…, size, filled)."""
        return self._products[..., : self.filled]

    def random_block(self, width: int) -> Tensor:
        """Gaussian columns, (…, size, width), not yet orthogonal to anything."""
        shape = (*self.operator.batch_shape, self.operator.size, width)
        return torch.randn(shape, dtype=self.operator.dtype, device=self.operator.device, generator=self.generator)

    def orthonormalise(self, block: Tensor) -> Tensor:
        """Orthonormal columns orthogonal to Q that span what `block` adds to it, (…, size, k).

        A column that adds nothing (it is zero, or lies in Q or in the columns before it up to rounding) is
        replaced by a random one, so the result always has k columns; this also is how an exhausted Krylov space
        goes on. Needs filled + k ≤ size.
        """
        found = self._quickly(block) if _by_cholesky(block.device) else None
        if found is not None:
            return found
        tiny = torch.finfo(block.dtype).tiny
        block = self._project_out(self._project_out(block / block.norm(dim=-2, keepdim=True).clamp_min(tiny)))
        basis, pivots = _factorised(block)
        lost = pivots <= torch.finfo(block.dtype).eps
        basis = torch.where(lost.unsqueeze(-2), self.random_block(block.shape[-1]), basis)
        # Remainders are kept down to rounding itself: in float32 they are all that is left to go on, long before
        # convergence. They are orthogonal to Q only up to rounding over their size, hence the second round.
        return orthonormal(self._project_out(basis))

    def _quickly(self, block: Tensor) -> Tensor | None:
        """The same in two rounds of projection and Cholesky QR with one wait for the device, for blocks that bear it.

        None where a block adds too little to Q, or its columns to each other: the first round then leaves more than
        the second can mend.
        """
        first, sound = self._round(block)
        second, still_sound = self._round(first)
        return second if bool((sound & still_sound).all()) else None

    def _round(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """One projection and Cholesky QR, (…, size, k), and which matrices' blocks it can be trusted with, (…)."""
        before = torch.linalg.vector_norm(block, dim=-2)
        block = self._project_out(block)
        basis, pivots, norms = _by_gram_matrix(block)
        kept = norms / before.clamp_min(torch.finfo(block.dtype).tiny)
        sound = (pivots.amin(-1) >= _LEAST_PIVOT[block.dtype]) & (kept.amin(-1) >= torch.finfo(block.dtype).eps ** 0.5)
        return basis, sound

    def _project_out(self, block: Tensor) -> Tensor:
        return block - self.vectors @ tall_product(self.vectors, block) if self.filled else block

    def append(self, block: Tensor) -> None:
        """Take in a block that is orthonormal and orthogonal to Q, at one product with the operator."""
        start, stop = self.filled, self.filled + block.shape[-1]
        self._vectors[..., start:stop] = block
        self._products[..., start:stop] = self.operator.matmat(block)
        self.filled = stop
        self.applies += 1
        coupling = tall_product(self.vectors, self._products[..., start:stop])
        self._projected[..., :stop, start:stop] = coupling
        self._projected[..., start:stop, :start] = coupling[..., :start, :].mT
        self._pairs = None

    def ritz(self) -> RitzPairs:
        """Eigenpairs of QᵀΩQ, in float64; on the host, where small matrices are solved fastest, up to `_HOST_ORDER`.

        Raises:
            ConvergenceError: Where a product was not finite.
        """
        if self._pairs is None:
            place = torch.device("cpu") if self.filled <= _HOST_ORDER else self.operator.device
            projected = self._projected[..., : self.filled, : self.filled].to(place, torch.float64)
            if not bool(torch.isfinite(projected).all()):
                raise ConvergenceError(
                    f"a product with the operator of order {self.operator.size} holds NaN or infinity; "
                    "check the gradients and the damping of the Fisher it was made from."
                )
            ritz = eigh(0.5 * (projected + projected.mT), "the Ritz matrix", self._workers)
            values, coefficients = ritz.values.cpu(), ritz.vectors
            self.norm = torch.maximum(self.norm, values.abs().amax(-1))
            self._pairs = RitzPairs(values, coefficients.to(self.operator.device, self.operator.dtype))
        return self._pairs

    def ritz_vectors(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` lowest Ritz vectors X and ΩX, each (…, size, count)."""
        coefficients = self.ritz().coefficients[..., :count]
        return self.vectors @ coefficients, self.products @ coefficients

    def residual_norms(self, count: int) -> Tensor:
        """‖Ωx − θx‖ of the `count` lowest Ritz pairs, (…, count), float64, on the CPU."""
        vectors, products = self.ritz_vectors(count)
        values = self.ritz().values[..., :count]
        return residual_norms(products, vectors, values.to(vectors.device)).cpu()

    def restart(self, keep: int) -> None:
        """Shrink to the `keep` lowest Ritz vectors; costs no product."""
        values = self.ritz().values[..., :keep]
        vectors, products = self.ritz_vectors(keep)
        self._replace(vectors, products)
        self._projected[..., :keep, :keep] = torch.diag_embed(values.to(vectors.device, vectors.dtype))

    def seed(self, vectors: Tensor, products: Tensor) -> None:
        """Start anew from orthonormal vectors (…, size, k) whose products are known."""
        self._replace(vectors, products)
        self._projected[..., : self.filled, : self.filled] = tall_product(vectors, products)

    def _replace(self, vectors: Tensor, products: Tensor) -> None:
        self.filled = vectors.shape[-1]
        self._vectors[..., : self.filled] = vectors
        self._products[..., : self.filled] = products
        self._pairs = None


def estimated_norm(operator: SymmetricOperator, generator: torch.Generator) -> tuple[Tensor, int]:
    """‖Ω‖ from below, (…), by a few Lanczos steps, and how many products that took; 0 for the zero matrix alone."""
    steps = min(_NORM_STEPS, operator.size)
    space = Subspace(operator, steps, generator)
    block = space.random_block(1)
    for _ in range(steps):
        space.append(space.orthonormalise(block))
        block = space.products[..., -1:]
    space.ritz()
    return space.norm, space.applies
