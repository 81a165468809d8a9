"""Initialises an adapter, merges it into the weights, saves a plain transformers model, reloads it and generates.

A model that came from a GGUF file says so in its configuration, and transformers then refuses to save it. Its weights
are plain by then, so the entry is dropped and they are moved into a model made from the configuration alone.

    python examples/merge_and_generate.py [--samples 32] [--tokens 40] [--model DIR] [--data FILE] [--output DIR]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from demo_model import demo_model
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_da_core
from lora_da_core import data, models

HERE = Path(__file__).parent
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """A model of the same class, weights and settings that `save_pretrained` takes."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    made = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    made.load_state_dict(model.state_dict())
    made.generation_config = model.generation_config
    return made.eval()


def main(arguments: list[str] | None = None) -> str:
    """Saves the merged model and returns what it generates after the first question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "word_problems.jsonl")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/merged"))
    options = parser.parse_args(arguments)
    loaded = models.load_model(options.model or demo_model(), device="cpu")
    rows = data.load_rows(str(options.data))
    samples = data.encode_text(rows, loaded.tokenizer).samples[: options.samples]
    batches = data.batches(samples, pad_token_id=loaded.tokenizer.pad_token_id)
    adapted = lora_da_core.get_lora_da_model(loaded.model, LoraConfig(**LORA), batches)
    merged = plain(adapted.merge_and_unload())
    merged.save_pretrained(options.output)
    loaded.tokenizer.save_pretrained(options.output)
    model = AutoModelForCausalLM.from_pretrained(options.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.output)
    inputs = tokenizer(rows[0]["question"] + "\n", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        same = torch.equal(model(**inputs).logits, merged(**inputs).logits)
    tokens = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
    text: str = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{options.output}: {'the same' if same else 'OTHER'} logits after reloading; it generates:\n{text}")
    if not same:
        raise RuntimeError("the reloaded model computes something else")
    return text


if __name__ == "__main__":
    main()
