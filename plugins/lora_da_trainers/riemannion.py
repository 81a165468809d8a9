"""Riemannion: Muon on the manifold of matrices of fixed rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import TrainerPlugin
from lora_da_trainers._optimizer import PairOptimizer, check_rate, rate_of
from lora_da_trainers._pairs import Pair, balanced, lora_pairs

TINY = 1e-12
"""Singular values below this share of the largest are no direction to orthogonalise."""


@dataclass(frozen=True)
class LowRank:
    """left·rightᵀ, with left (out, k) and right (in, k)."""

    left: Tensor
    right: Tensor

    def plus(self, other: LowRank, factor: float = 1.0) -> LowRank:
        """Self + factor·other, of the sum of ranks."""
        return LowRank(torch.cat([self.left, factor * other.left], 1), torch.cat([self.right, other.right], 1))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Left vectors, singular values and right vectors, (out, k), (k,), (in, k)."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right)
        u, values, vh = torch.linalg.svd(r_left @ r_right.mT)
        return q_left @ u[:, : len(values)], values, q_right @ vh.mT[:, : len(values)]


def tangent(u: Tensor, v: Tensor, left_product: Tensor, right_product: Tensor) -> LowRank:
    """P_T(G) = UUᵀG + (I − UUᵀ)GVVᵀ, of rank 2r, from the products that it needs.

    Args:
        u: (out, r), orthonormal.
        v: (in, r), orthonormal.
        left_product: UᵀG, (r, in).
        right_product: GV, (out, r).

    Returns:
        The projection.
    """
    rest = right_product - u @ (u.mT @ right_product)
    return LowRank(torch.cat([u, rest], 1), torch.cat([left_product.mT, v], 1))


def orthogonalised(matrix: LowRank, rank: int) -> LowRank:
    """The matrix with its first singular values, at most `rank`, all set to 1."""
    u, values, v = matrix.svd()
    kept = values[:rank] > TINY * values[:1]
    return LowRank(u[:, :rank][:, kept], v[:, :rank][:, kept])


class RiemannionOptimizer(PairOptimizer):
    """M = β·P_T(M_before) + P_T(G); M̃ = P_T(Ortho_2r(M)); X ← truncSVD_r(X − η·M̃), X = scaling·B·A (arXiv 2507.12142).

    The two gradient products that P_T needs, UᵀG and GV, are the factors' own gradients divided by the triangles of
    their QR decompositions, so one ordinary backward pass gives both. X alone decides the step: replacing B by BQ and
    A by Q⁻¹A changes nothing. The momentum is kept as factors of rank 2r in `state_dict`.
    """

    def __init__(self, pairs: Mapping[str, Pair], lr: float, momentum: float = 0.9) -> None:
        """Checks the start.

        Args:
            pairs: The layers.
            lr: η > 0.
            momentum: β.
        """
        super().__init__(pairs, lr=lr, momentum=momentum)
        for group in self.param_groups:
            b, a = group["params"]
            balanced(b.detach(), a.detach())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every layer.

        Args:
            closure: Evaluates the loss and its gradients anew, or None.

        Returns:
            The closure's loss.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            b, a = group["params"]
            if b.grad is not None and a.grad is not None:
                self._step(b, a, group)
        return loss

    def _step(self, b: Tensor, a: Tensor, group: Mapping[str, Any]) -> None:
        assert b.grad is not None and a.grad is not None
        scaling, rank = group["scaling"], a.shape[0]
        u, triangle_b = torch.linalg.qr(b.double())
        v, triangle_a = torch.linalg.qr(a.double().mT)
        left_product = torch.linalg.solve(triangle_b.mT, a.grad.double() / scaling)
        right_product = torch.linalg.solve(triangle_a, b.grad.double() / scaling, left=False)
        moving = tangent(u, v, left_product, right_product)
        state = self.state[b]
        if group["momentum"] and "left" in state:
            before = LowRank(state["left"], state["right"])
            carried = tangent(u, v, (u.mT @ before.left) @ before.right.mT, before.left @ (before.right.mT @ v))
            left, values, right = moving.plus(carried, group["momentum"]).svd()
            # Both lie in one tangent space, so their sum has rank 2r again.
            moving = LowRank(left[:, : 2 * rank] * values[: 2 * rank], right[:, : 2 * rank])
        if group["momentum"]:
            state["left"], state["right"] = moving.left, moving.right
        flat = orthogonalised(moving, 2 * rank)
        step = tangent(u, v, (u.mT @ flat.left) @ flat.right.mT, flat.left @ (flat.right.mT @ v))
        point = LowRank(scaling * (u @ triangle_b @ triangle_a.mT), v)
        left, values, right = point.plus(step, -group["lr"]).svd()
        roots = (values[:rank] / scaling).sqrt()
        b.copy_(left[:, :rank] * roots)
        a.copy_((right[:, :rank] * roots).mT)


@dataclass(frozen=True)
class RiemannionOptions:
    """Options of Riemannion.

    Attributes:
        momentum: β, from 0 to below 1.
        lr: η where the trainer's schedule is at its peak; None takes the trainer's learning rate.
    """

    momentum: float = 0.9
    lr: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum!r}; it must be at least 0 and below 1")
        check_rate(self.lr)


class Riemannion(TrainerPlugin[RiemannionOptions]):
    """Trains with `RiemannionOptimizer`; start from a B·A of full rank, such as preset `loi`'s."""

    name = "riemannion"
    api_version = 1
    Options = RiemannionOptions

    def attach(self, trainer: Any) -> None:
        rate = rate_of(trainer, self.options.lr)
        trainer.optimizer = RiemannionOptimizer(lora_pairs(trainer.model), rate, self.options.momentum)


@hookimpl
def lora_da_trainer_plugins() -> list[type[TrainerPlugin[Any]]]:
    """Offers `riemannion`."""
    return [Riemannion]
