"""Initialises an adapter for a base in 4 bits (bitsandbytes NF4), saves it, and checks that it reloads exactly.

The base stays packed: the statistics come from activations and output gradients, so only A and B are ever written.
Without --model, the demo model is first written out as a plain directory, which bitsandbytes quantizes as it is loaded.

    python examples/quantized.py [--samples 16] [--model DIR] [--data FILE] [--output runs/quantized]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo_model import demo_model
from merge_and_generate import HERE, LORA, plain
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import lora_da_core
from lora_da_core import data, models


def load(directory: Path) -> torch.nn.Module:
    """The base, quantized."""
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=packed, device_map="cpu", dtype=torch.float32
    )


def main(arguments: list[str] | None = None) -> float:
    """Saves the adapter and returns the largest change of a logit by reloading it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "word_problems.jsonl")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("runs/quantized"))
    options = parser.parse_args(arguments)
    base = options.model or options.output / "base"
    if options.model is None:
        demo = models.load_model(demo_model(), device="cpu")
        plain(demo.model).save_pretrained(base)
        demo.tokenizer.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = data.encode_text(data.load_rows(str(options.data)), tokenizer).samples[: options.samples]
    batches = data.batches(samples, pad_token_id=tokenizer.pad_token_id)
    adapted = lora_da_core.get_lora_da_model(load(base), LoraConfig(**LORA), batches).eval()
    adapted.save_pretrained(options.output / "adapter")
    reloaded = PeftModel.from_pretrained(load(base), options.output / "adapter").eval()
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    with torch.no_grad():
        ours, theirs = adapted(**inputs).logits, reloaded(**inputs).logits
        with adapted.disable_adapter():
            moved = float((adapted(**inputs).logits - ours).abs().max())
    change = float((ours - theirs).abs().max())
    print(
        f"the start moves logits by up to {moved:.3g}, reloading by {change:.3g}; adapter: {options.output / 'adapter'}"
    )
    return change


if __name__ == "__main__":
    main()
