"""What the processes of a run must agree on before they begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

from lora_da_core.cache_identity import described, flattened
from lora_da_core.capture import CaptureTask
from lora_da_core.components import Components
from lora_da_core.config import LoraDAConfig
from lora_da_core.types import Batch


def agree(task: CaptureTask, batches: Sequence[Batch], components: Components, config: LoraDAConfig) -> None:
    """Makes sure that all processes are about to do the same to the same model with the same data.

    Args:
        task: What this process would run.
        batches: All that it would read, not only its share.
        components: The pipeline's.
        config: The pipeline's.

    Raises:
        RankError: A process differs from rank 0; it and the differences are named.
    """
    from lora_da_core import adapter

    found = described(task, batches, seed=config.seed, base=adapter.fingerprint(task.model))
    rest = {name: value for name, value in found.items() if name not in ("layers", "tokens")}
    whole = {
        **rest,
        "data": found["tokens"],
        "config": asdict(config),
        "component": components.names(),
        "options": components.options(),
        "layer": {spec.name: [*asdict(spec).values()] for spec in task.specs},
    }
    whole["versions"] = {**found["versions"], "peft": version("peft")}
    task.world.agree("what to do", flattened(whole))
