"""ODELoRA: LoRA's factors follow the gradient flow of their product, by a Runge-Kutta method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_da_core import hookimpl
from lora_da_core.interfaces import TrainerPlugin
from lora_da_trainers._optimizer import PairOptimizer, check_rate, rate_of
from lora_da_trainers._pairs import Pair, balanced, lora_pairs

Method = Literal["euler", "rk2", "rk4"]

# Of each method: how far along the last stage's slope the next stage lies, and what each stage weighs in the step.
TABLEAUX: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {
    "euler": ((), (1.0,)),
    "rk2": ((0.5,), (0.0, 1.0)),
    "rk4": ((0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def velocity(b: Tensor, a: Tensor, grad_b: Tensor, grad_a: Tensor) -> tuple[Tensor, Tensor]:
    """(Ḃ, Ȧ) of the flow whose product BA follows −(G P_A + P_B G − P_B G P_A) and stays balanced.

    Ḃ = −(G − ½P_B G)Aᵀ(AAᵀ)⁻¹ + BX, Ȧ = −(BᵀB)⁻¹Bᵀ(G − ½G P_A) − XA, with SX + XS = ¼(K + Kᵀ), K = MS⁻¹ − S⁻¹M,
    M = BᵀGAᵀ, S = BᵀB = AAᵀ (arXiv 2602.07479, derived). G enters through its products GAᵀ and BᵀG alone, which are
    the factors' own gradients.

    Args:
        b: (out, r).
        a: (r, in).
        grad_b: GAᵀ, (out, r).
        grad_a: BᵀG, (r, in).

    Returns:
        Both, in the factors' dtype.
    """
    gram_b, gram_a = b.mT @ b, a @ a.mT
    m = b.mT @ grad_b
    values, q = torch.linalg.eigh(0.5 * (gram_b + gram_a))
    turned = q.mT @ m @ q
    k = turned / values - turned / values.unsqueeze(1)
    x = q @ (0.25 * (k + k.mT) / (values + values.unsqueeze(1))) @ q.mT
    half_b = grad_b - 0.5 * b @ torch.linalg.solve(gram_b, m)
    half_a = grad_a - 0.5 * torch.linalg.solve(gram_a, m, left=False) @ a
    return b @ x - torch.linalg.solve(gram_a, half_b, left=False), -torch.linalg.solve(gram_b, half_a) - x @ a


class OdeLoraOptimizer(PairOptimizer):
    """One Runge-Kutta step of length `lr` along the flow of every layer's product.

    Given a closure, `step` evaluates it once for each stage. Without one, as trainers call it, each call is one stage
    with whatever gradient there is: a step of `rk4` then takes four batches. The factors are kept in float64 between
    stages and are balanced once, at the start; `state_dict` holds all that a resumed run needs.
    """

    def __init__(self, pairs: Mapping[str, Pair], lr: float, method: Method = "euler") -> None:
        """Balances the factors.

        Args:
            pairs: The layers.
            lr: Step length h > 0.
            method: The Runge-Kutta method.
        """
        super().__init__(pairs, lr=lr, method=method)
        for group in self.param_groups:
            b, a = group["params"]
            root = group["scaling"] ** 0.5
            starts = balanced(root * b.detach(), root * a.detach())
            for parameter, value in zip((b, a), starts, strict=True):
                self.state[parameter] = {"start": value, "sum": torch.zeros_like(value), "stage": 0}
                parameter.data.copy_(value / root)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One stage with the gradients as they are, or all stages with the closure's.

        Args:
            closure: Evaluates the loss and its gradients anew.

        Returns:
            The closure's first loss.
        """
        if closure is None:
            self._stage()
            return None
        first: float | None = None
        for _ in TABLEAUX[self.param_groups[0]["method"]][1]:
            with torch.enable_grad():
                loss = closure()
            first = loss if first is None else first
            self._stage()
        return first

    def _stage(self) -> None:
        for group in self.param_groups:
            b, a = group["params"]
            if b.grad is None or a.grad is None:
                continue
            points, weights = TABLEAUX[group["method"]]
            root, stage = group["scaling"] ** 0.5, int(self.state[b]["stage"])
            # W = scaling·B·A is the product of the factors times the root, whose gradients are divided by it.
            slopes = velocity(root * b.double(), root * a.double(), b.grad.double() / root, a.grad.double() / root)
            for parameter, slope in zip((b, a), slopes, strict=True):
                state = self.state[parameter]
                state["sum"] += weights[stage] * slope
                if stage < len(points):
                    value = state["start"] + group["lr"] * points[stage] * slope
                else:
                    value = state["start"] = state["start"] + group["lr"] * state["sum"]
                    state["sum"] = torch.zeros_like(value)
                state["stage"] = (stage + 1) % len(weights)
                parameter.copy_(value / root)


@dataclass(frozen=True)
class OdeLoraOptions:
    """Options of ODELoRA.

    Attributes:
        method: The Runge-Kutta method; a trainer's step is one of its stages.
        lr: Step length where the trainer's schedule is at its peak; None takes the trainer's learning rate.
    """

    method: Method = "euler"
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(get_args(Method))}")
        check_rate(self.lr)


class OdeLora(TrainerPlugin[OdeLoraOptions]):
    """Trains with `OdeLoraOptimizer`; near a minimum of full rank the error shrinks alike in every direction."""

    name = "odelora"
    api_version = 1
    Options = OdeLoraOptions

    def attach(self, trainer: Any) -> None:
        rate = rate_of(trainer, self.options.lr)
        trainer.optimizer = OdeLoraOptimizer(lora_pairs(trainer.model), rate, self.options.method)


@hookimpl
def lora_da_trainer_plugins() -> list[type[TrainerPlugin[Any]]]:
    """Offers `odelora`."""
    return [OdeLora]
