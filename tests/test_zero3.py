"""A model that DeepSpeed's ZeRO-3 shards among two processes, against one process on the whole model."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from peft import LoraConfig

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig
from process_worlds import Worlds

pytest.importorskip(
    "deepspeed", reason="DeepSpeed, which compiles an extension when it first runs, is not there: pip install deepspeed"
)

PIPELINES = {"kfac": "kfac", "ekfac": "ekfac"}


def run(model: Any, estimator: str) -> dict[str, Any]:
    pipeline = lora_da_core.build_pipeline(estimator, config=LoraDAConfig(gamma=64.0, damping=1.0))
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    result = pipeline.run(model, make_batches(make_samples(11)), lora)
    products = {name: (pair.B @ pair.A).numpy() for name, pair in result.factors.items()}
    return {"products": products, "base": result.report.base, "tokens": result.report.label_tokens}


def sharded() -> dict[str, Any]:
    # DeepSpeed asks a launcher's variables, not the process group.
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=size)
    import deepspeed

    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    deepspeed.init_distributed("gloo", verbose=False)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage, "bf16": {"enabled": False}}
    engine = deepspeed.initialize(model=make_tiny_llama(), config=settings)[0]
    found = {name: run(engine.module, estimator) for name, estimator in PIPELINES.items()}
    return {**found, "left": sum(parameter.numel() for parameter in engine.module.parameters())}


def test_zero3_gives_what_the_whole_model_gives() -> None:
    worlds = Worlds()
    try:
        ranks = worlds.run(2, sharded)
    finally:
        worlds.kill()
    for name, estimator in PIPELINES.items():
        expected = run(make_tiny_llama(), estimator)
        for found in ranks:
            assert found["left"] == 0, "parameters are empty again"
            assert found[name]["base"] == expected["base"]
            assert found[name]["tokens"] == expected["tokens"]
            for layer, product in expected["products"].items():
                assert np.abs(found[name]["products"][layer] - product).max() < 1e-4 * np.abs(product).max(), layer
