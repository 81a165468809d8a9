"""Initialises an adapter from 64 samples, shows what was found, saves it and reloads it with stock PEFT.

This is all that LoRA-DA takes: a model, a LoRA configuration and batches with labels. The saved adapter is trained as
any other one is. Without --model and --data, the demo model and data.

    python examples/quickstart.py [--samples 64] [--model DIR] [--data FILE] [--output runs/quickstart]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo_model import demo_model
from peft import LoraConfig, PeftModel

import lora_da_core
from lora_da_core import data, models

HERE = Path(__file__).parent


def show(phase: str, done: int, total: int) -> None:
    """Tells how far a run is, on one line; a search does not know how much there is to do."""
    print(f"{phase} {done}/{total or '…'}   ", end="\r", flush=True, file=sys.stderr)


def main(arguments: list[str] | None = None) -> PeftModel:
    """Returns the reloaded model, ready to be trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "word_problems.jsonl")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args(arguments)
    loaded = models.load_model(options.model or demo_model(), device="cpu")
    text = data.TextOptions(samples=options.samples)
    samples = data.encode_text(data.load_rows(options.data), loaded.tokenizer, text).samples
    batches = data.batches(samples, pad_token_id=loaded.tokenizer.pad_token_id)

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    pipeline = lora_da_core.build_pipeline()  # the preset `robust`; estimator= and solver= take any plugin's name
    print(pipeline)
    result = pipeline.run(loaded.model, batches, lora, on_progress=show)
    print(result)
    print(result.to_pandas()[["rank", "sigma", "ritz_1", "residual", "converged"]].head())

    lora_da_core.get_lora_da_model(loaded.model, lora, result=result).save_pretrained(options.output)
    result.plot_spectra().savefig(options.output / "spectra.png")
    base = models.load_model(options.model or demo_model(), device="cpu").model
    return PeftModel.from_pretrained(base, options.output, is_trainable=True)


if __name__ == "__main__":
    main()
