"""What `lora-da init` loads of a model that is larger than its limit of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_da_core.cli_init_options import InitOptions
from lora_da_core.cli_options import memory_limit
from lora_da_core.data import Rows, TextOptions
from lora_da_core.pipeline import Pipeline

if TYPE_CHECKING:
    from peft import LoraConfig

    from lora_da_core.models import ModelShapes, Offload


def needed_offload(
    options: InitOptions,
    pipeline: Pipeline,
    lora: LoraConfig,
    rows: Rows,
    text: TextOptions,
    shapes: ModelShapes | None,
) -> Offload | None:
    """Plans with the model's shapes and the data's own lengths, before any weight is read.

    Args:
        options: The command's.
        pipeline: What will run.
        lora: The adapter's configuration.
        rows: The data set.
        text: How its rows become samples.
        shapes: The model's, where they are known already.

    Returns:
        How to load the model; None where it may be loaded whole.
    """
    from torch import distributed

    from lora_da_core import data, models
    from lora_da_core.budget import resident_within

    limit = memory_limit(options.max_memory)
    if limit is None:
        return None
    source, trusted = options.model, options.trust_remote_code
    if shapes is None:
        shapes = models.load_shapes(source, device=options.device, dtype=options.dtype, trust_remote_code=trusted)
    tokenizer, _ = models.load_tokenizer(source, trust_remote_code=trusted)
    samples = data.encode_text(rows, tokenizer, text, model_limit=shapes.max_positions).samples
    batches = data.batches(samples, pad_token_id=tokenizer.pad_token_id, batch_size=options.batch_size)
    alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
    resident = resident_within(pipeline, shapes.model, lora, batches, shapes.device, limit, by_block=alone)
    return None if resident is None else models.Offload(resident, options.offload_dir)
