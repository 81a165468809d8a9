"""Which layers have their statistics taken in one pass over the data, and what to do where memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_da_core.batches import labelled_part, take_rows, to_device
from lora_da_core.capture import CaptureTask
from lora_da_core.layer_kinds import KINDS, Call, watched
from lora_da_core.model_state import prepared
from lora_da_core.types import Batch

Names = Sequence[str]
"""Layers by name."""


def input_groups(task: CaptureTask, batches: Sequence[Batch]) -> list[Names]:
    """The layers that read one input tensor alike, found by running one sample of each batch until every layer has run.

    Args:
        task: The model and its layers.
        batches: The data.

    Returns:
        Groups in the order of their first layers; a layer that never ran stands alone.
    """
    leaders: dict[str, str] = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(prepared(task.model))
        stack.enter_context(task.base_only())
        for batch in batches:
            part = labelled_part(task.objective, batch)
            if part is None:
                continue
            sample = to_device(take_rows(part, torch.zeros(1, dtype=torch.int64)), task.device)
            _note_leaders(task, sample, leaders)
            if len(leaders) == len(task.specs):
                break
    groups: dict[str, list[str]] = {}
    for spec in task.specs:
        groups.setdefault(leaders.get(spec.name, spec.name), []).append(spec.name)
    return list(groups.values())


def _note_leaders(task: CaptureTask, sample: Batch, leaders: dict[str, str]) -> None:
    specs, ledger = {spec.name: spec for spec in task.specs}, task.ledger(sample)

    def look(call: Call) -> Tensor:
        kind, output = KINDS[specs[call.layer].kind], call.output
        reading = kind.reading(task.modules[call.layer])
        leaders.setdefault(call.layer, ledger.input_of(call.inputs, call.layer, reading).leader)
        return output

    with watched(task.modules, task.specs, look):
        task.objective.losses(task.model, sample)


def divided_layers(groups: Sequence[Names], layers_per_pass: int) -> list[Names]:
    """Whole groups in order, joined as long as a pass has room, one group at least.

    >>> divided_layers([["q", "k", "v"], ["o"], ["up"]], 2)
    [['q', 'k', 'v'], ['o', 'up']]

    Args:
        groups: From `input_groups`.
        layers_per_pass: At least 1.

    Returns:
        The layers of each pass.
    """
    parts: list[list[str]] = []
    for group in groups:
        if parts and len(parts[-1]) + len(group) <= layers_per_pass:
            parts[-1].extend(group)
        else:
            parts.append(list(group))
    return list(parts)


def halved(parts: Sequence[Names], groups: Sequence[Names]) -> list[Names]:
    """Every pass as two of about half its layers, where it has more than one group.

    Args:
        parts: The layers of each pass.
        groups: From `input_groups`; they stay whole.

    Returns:
        The layers of each pass.
    """
    found: list[Names] = []
    for part in parts:
        inside = [group for group in groups if group[0] in set(part)]
        found += divided_layers(inside, (len(part) + 1) // 2)
    return found
