"""Models that DeepSpeed's ZeRO-3 shards among two processes of `accelerate launch`, against one on the whole model."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, TargetError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed, which compiles an extension when it first runs, is not there: pip install deepspeed",
)

PIPELINES: dict[str, str] = {"kfac": "kfac", "ekfac": "ekfac"}
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "bf16": {"enabled": False},
}


def run(model: Any, estimator: str) -> dict[str, Any]:
    pipeline = lora_da_core.build_pipeline(estimator, config=LoraDAConfig(gamma=64.0, damping=1.0))
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    result = pipeline.run(model, make_batches(make_samples(11)), lora)
    products = {name: (pair.B @ pair.A).numpy() for name, pair in result.factors.items()}
    return {
        "products": products,
        "base": result.report.base,
        "tokens": result.report.label_tokens,
        "left": sum(parameter.numel() for parameter in model.parameters()),
    }


def with_an_adapter(base: Any) -> list[Any]:
    """Logits of an adapter that the sharded base's factors were written into, of the base, of the adapter sharded."""
    import deepspeed

    batches = make_batches(make_samples(11))
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(gamma=64.0))
    state = lora_da_core.get_lora_da_state_dict(base, batches, lora, pipeline=pipeline)
    model = get_peft_model(make_tiny_llama(), lora)
    lora_da_core.initialize_lora_da_weights(model, state_dict=state)
    logits = [model.eval()(**batches[0]).logits.detach()]
    with model.disable_adapter():
        logits.append(model(**batches[0]).logits.detach())
    engine = deepspeed.initialize(model=model, config=SETTINGS)[0]
    logits.append(engine.module(**batches[0]).logits.detach())
    for attempt in (
        lambda: lora_da_core.initialize_lora_da_weights(engine.module, unread()),
        lambda: lora_da_core.initialize_lora_da_weights(engine.module, state_dict=state),
        lambda: lora_da_core.get_lora_da_state_dict(engine.module, unread()),
    ):
        with pytest.raises(TargetError, match="ZeRO-3 shards adapter 'default'"):
            attempt()
    return [each.numpy() for each in logits]


def unread() -> Iterator[Any]:
    raise AssertionError("the data was read before the adapter was refused")
    yield


def main(folder: Path) -> None:
    """One process of the launcher: a model that accelerate prepares, then one of DeepSpeed's own call."""
    import deepspeed
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    assert (accelerator.distributed_type.value, accelerator.num_processes) == ("DEEPSPEED", 2)
    prepared = accelerator.unwrap_model(accelerator.prepare(make_tiny_llama()))
    found = {f"accelerate {name}": run(prepared, estimator) for name, estimator in PIPELINES.items()}
    engine = deepspeed.initialize(model=make_tiny_llama(), config=SETTINGS)[0]
    found["deepspeed kfac"] = run(engine.module, "kfac")
    found["adapter"] = with_an_adapter(prepared)
    (folder / f"{accelerator.process_index}.pkl").write_bytes(pickle.dumps(found))


def test_zero3_gives_what_the_whole_model_gives(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    launcher = ["-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--deepspeed_config_file", str(tmp_path / "settings.json"), "--dynamo_backend", "no"]
    launcher += ["--main_process_port", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, __file__, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found = pickle.loads((tmp_path / f"{rank}.pkl").read_bytes())
        written, base, sharded = found.pop("adapter")
        np.testing.assert_allclose(sharded, written, rtol=1e-4, atol=1e-5)
        assert np.abs(written - base).max() > 1e-3
        assert found.keys() == {"accelerate kfac", "accelerate ekfac", "deepspeed kfac"}
        for name, mine in found.items():
            expected = run(make_tiny_llama(), PIPELINES[name.split()[1]])
            assert mine["left"] == 0, "parameters are empty again"
            assert (mine["base"], mine["tokens"]) == (expected["base"], expected["tokens"])
            for layer, product in expected["products"].items():
                assert np.abs(mine["products"][layer] - product).max() < 1e-4 * np.abs(product).max(), (name, layer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
