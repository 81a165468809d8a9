"""The conformance kit, and what only this estimator promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lora_da_head_blocks import HeadBlocks

from lora_da_core.testing import estimator_checks, fisher_from_tensors


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(run, id=f"blocks={blocks}-{name}")
        for blocks in (1, 2, 8)
        for name, run in estimator_checks(HeadBlocks, options={"blocks": blocks})
    ],
)
def test_contract(check: Callable[[], None]) -> None:
    check()


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(40, 6, generator=generator, dtype=torch.float64), torch.arange(40) // 4


@pytest.mark.parametrize(("blocks", "output"), [(1, "full"), (6, "diagonal")])
def test_the_extremes_are_those_of_kfac(blocks: int, output: str) -> None:
    ours = fisher_from_tensors(HeadBlocks, *tokens(), options={"blocks": blocks}, damping=0.1)
    kfac = fisher_from_tensors("kfac", *tokens(), options={"output": output}, damping=0.1)
    gradient = tokens()[1].T @ tokens()[0]
    torch.testing.assert_close(ours.solve(gradient), kfac.solve(gradient), rtol=1e-9, atol=1e-12)


def test_outputs_of_different_blocks_do_not_mix() -> None:
    fisher = fisher_from_tensors(HeadBlocks, *tokens(), options={"blocks": 3})
    weights = torch.zeros(6, 5, dtype=torch.float64)
    weights[2] = 1.0
    changed = fisher.apply(weights).abs().sum(1) > 0
    assert changed.tolist() == [False, False, True, True, False, False]


def test_blocks_must_be_positive() -> None:
    with pytest.raises(ValueError, match="blocks is 0; it must be at least 1"):
        HeadBlocks.Options(blocks=0)
