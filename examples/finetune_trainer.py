"""Fine-tunes SmolLM2-135M on the demo data with the Hugging Face Trainer, from LoRA's default and from LoRA-DA's start.

Both runs see the same batches, learning rate and seed; the loss curves go to runs/finetune/loss.png.

    python examples/finetune_trainer.py [--steps 30] [--samples 64] [--output runs/finetune]
"""

import argparse
from pathlib import Path

import torch
from demo_model import demo_model
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import lora_da_core
from lora_da_core import data, models

HERE = Path(__file__).parent
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def train(name: str, model: torch.nn.Module, samples: list, padding: int, options: argparse.Namespace) -> list[float]:
    """The training losses, step by step."""
    arguments = TrainingArguments(
        output_dir=str(options.output / name), max_steps=options.steps, per_device_train_batch_size=8,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], seed=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=samples, data_collator=lambda rows: collate(rows, padding))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def collate(rows: list, padding: int) -> dict[str, torch.Tensor]:
    """One right-padded batch."""
    return data.batches(rows, pad_token_id=padding, batch_size=len(rows))[0]


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Trains twice, draws both curves and returns them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "word_problems.jsonl")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"))
    options = parser.parse_args(arguments)
    rows = data.load_rows(options.data)
    curves = {}
    for name in ("default LoRA", "LoRA-DA"):
        loaded = models.load_model(options.model or demo_model(), device="cpu")
        padding = loaded.tokenizer.pad_token_id
        samples = data.encode_text(rows, loaded.tokenizer).samples
        torch.manual_seed(0)
        if name == "LoRA-DA":
            batches = data.batches(samples[: options.samples], pad_token_id=padding)
            peft_model = lora_da_core.get_lora_da_model(loaded.model, LoraConfig(**LORA), batches)
        else:
            peft_model = get_peft_model(loaded.model, LoraConfig(**LORA))
        curves[name] = train(name, peft_model, list(samples), padding, options)
        print(f"{name}: first loss {curves[name][0]:.3f}, last {curves[name][-1]:.3f}")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, label=name)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="SmolLM2-135M on the demo word problems")
    axes.legend()
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "loss.png", dpi=150)
    print(f"curves: {options.output / 'loss.png'}")
    return curves


if __name__ == "__main__":
    main()
