"""What `lora-da init` loads of a model that is larger than its limit of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_da_core.cli_init_options import Request
from lora_da_core.cli_options import memory_limit

if TYPE_CHECKING:
    from lora_da_core.data import Rows
    from lora_da_core.models import ModelShapes, Offload


def needed_offload(request: Request, rows: Rows, shapes: ModelShapes | None) -> Offload | None:
    """Plans with the model's shapes and the data's own lengths, before any weight is read.

    Args:
        request: What is asked for.
        rows: The data set.
        shapes: The model's, where they are known already.

    Returns:
        How to load the model; None where it may be loaded whole.
    """
    from torch import distributed

    from lora_da_core import data, models
    from lora_da_core.batches import batch_tokens_on
    from lora_da_core.budget import resident_within

    options = request.options
    limit = memory_limit(options.max_memory)
    if limit is None:
        return None
    source, trusted = options.model, options.trust_remote_code
    if shapes is None:
        shapes = models.load_shapes(source, device=options.device, dtype=options.dtype, trust_remote_code=trusted)
    tokenizer, _ = models.load_tokenizer(source, trust_remote_code=trusted)
    samples = data.encode_text(rows, tokenizer, request.text, model_limit=shapes.max_positions).samples
    batches = data.batches(
        samples,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=options.batch_size,
        tokens_per_batch=batch_tokens_on(shapes.device),
    )
    alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
    resident = resident_within(
        request.pipeline, shapes.model, request.lora, batches, shapes.device, limit, by_block=alone
    )
    return None if resident is None else models.Offload(resident, options.offload_dir)
