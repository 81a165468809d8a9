"""A pytest plugin for PEFT's own tests: every LoRA adapter that `get_peft_model` makes gets our start.

PEFT's custom models take a tensor `X` of nine rows of ten whole numbers, whatever they make of it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_da_core
from lora_da_core import LoraDAConfig, LoraDAError

COUNTS: Counter[str] = Counter()
X = torch.arange(90).view(9, 10)
CONFIG = LoraDAConfig(scale="fixed", gamma=1.0, token_mask="attention", unsupported="default")
DEFAULT_RANK, RANK = 8, 2
made_by_peft = peft.get_peft_model


def get_peft_model(model: nn.Module, peft_config: Any, *args: Any, **rest: Any) -> Any:
    """PEFT's function, and our factors in what it made; most of the layers are too small for the default rank."""
    if isinstance(peft_config, peft.LoraConfig) and peft_config.r == DEFAULT_RANK and not peft_config.rank_pattern:
        peft_config.r = RANK
    wrapped = made_by_peft(model, peft_config, *args, **rest)
    if isinstance(peft_config, peft.LoraConfig) and isinstance(wrapped, peft.PeftModel):
        name = rest.get("adapter_name", args[0] if args else "default")
        try:
            start(wrapped, name)
            COUNTS["started by us"] += 1
        except (LoraDAError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            # Not ours to start: a variant that is refused, or a model that takes something else than X.
            COUNTS[f"left to PEFT: {type(error).__name__}: {str(error)[:100]}"] += 1
    return wrapped


def start(model: Any, name: str) -> None:
    """Writes factors that come from the squared outputs."""
    inputs = X.to(next(model.parameters()).device)
    with torch.no_grad():
        rows = len(model.get_base_model()(inputs))

    def losses(base: nn.Module, batch: Any) -> Tensor:
        output: Tensor = base(inputs).float()
        # Of what the models end in, some is a log-softmax: the first column tells the rows apart.
        return output.flatten(1)[:, 0].square()

    pipeline = lora_da_core.build_pipeline(objective=losses, config=CONFIG)
    batches = [{"labels": torch.zeros(rows, dtype=torch.int64)}]
    lora_da_core.initialize_lora_da_weights(model, batches, adapter_name=name, pipeline=pipeline)


def pytest_configure() -> None:
    """Puts our function in the place of PEFT's before its tests import it."""
    peft.get_peft_model = get_peft_model


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many adapters were ours."""
    for what, count in COUNTS.most_common():
        terminalreporter.write_line(f"adapters {what}: {count}")
