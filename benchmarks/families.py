"""A realistic run of every family of text models: pre-trained, adapted to another task, trained on, reloaded.

Of each family a small model (two blocks of width 64) of transformers' own class learns to write the questions of
`examples/data/word_problems.jsonl`, letter by letter. Its adapter then learns to answer them, from PEFT's default
start and from ours, on the same batches, at the same rate. Losses, in nats per letter, are on questions that neither
training saw. At the end stock PEFT reloads the adapter: its logits must be those in memory, bit for bit on a CPU.

    python -m benchmarks.families [--families Llama,T5] [--pretraining 300] [--steps 80] [--seeds 0,1] [--device cuda]

Mamba's scan is a loop over the letters where its kernels are not installed, and takes most of the time then.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_da_core
from benchmarks.machine import write_json
from lora_da_core.batches import to_device
from lora_da_core.data import IGNORED

DATA = Path(__file__).resolve().parents[1] / "examples" / "data" / "word_problems.jsonl"
PAD, START, END, FIRST = 0, 1, 2, 3
HELD_OUT, BATCH, SAMPLES, RANK = 64, 16, 64, 4
RATES = {"pretraining": 3e-3, "adapter": 5e-3}
Batch = dict[str, Tensor]
Pairs = list[tuple[str, str]]

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Family:
    """What a family's configuration needs, and what its adapter is on."""

    settings: dict[str, Any]
    lora: dict[str, Any]
    head: str = "ForCausalLM"
    encoder: bool = False


DENSE: dict[str, Any] = {"target_modules": "all-linear"}
FUSED: dict[str, Any] = {"target_modules": ATTENTION, "target_parameters": STACKS}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
FAMILIES = {
    "Llama": Family(SIZES, DENSE),
    "Mistral": Family({**SIZES, "sliding_window": 64}, DENSE),
    "Qwen2": Family(SIZES, DENSE),
    "Qwen3": Family({**SIZES, "head_dim": 16}, DENSE),
    "Gemma": Family({**SIZES, "head_dim": 16}, DENSE),
    "Phi": Family(SIZES, DENSE),
    "GPT2": Family(GPT2, DENSE, "LMHeadModel"),
    "Mixtral": Family({**SIZES, "num_local_experts": 4}, FUSED),
    "Qwen2Moe": Family({**SIZES, **EXPERTS, "shared_expert_intermediate_size": 64}, FUSED),
    "Qwen3Moe": Family({**SIZES, **EXPERTS, "head_dim": 16}, FUSED),
    "T5": Family(T5, DENSE, "ForConditionalGeneration", encoder=True),
    "Mamba": Family(MAMBA, {"target_modules": ["in_proj", "x_proj"]}),
}


@dataclass(frozen=True)
class Letters:
    """Letters as token numbers."""

    known: str

    def numbers(self, text: str) -> list[int]:
        """One number for each letter."""
        return [FIRST + self.known.index(letter) for letter in text]

    def batch(self, pairs: Pairs, family: Family) -> Batch:
        """Right-padded; a decoder is given the first text, without labels, before the second."""
        given = [[START, *self.numbers(first)] for first, _ in pairs]
        wanted = [[*self.numbers(second), END] for _, second in pairs]
        if family.encoder:
            labels = wanted
        else:
            labels = [[IGNORED] * len(first) + second for first, second in zip(given, wanted, strict=True)]
            given = [first + second for first, second in zip(given, wanted, strict=True)]
        ids = _padded(given, PAD)
        lengths = torch.tensor([len(row) for row in given])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": _padded(labels, IGNORED)}


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def tasks(family: Family) -> tuple[Letters, Pairs, Pairs]:
    """The letters; what is learnt first: to write questions, or, with an encoder, their second half; then answering."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    letters = Letters("".join(sorted({letter for row in rows for text in row.values() for letter in text})))
    questions = [row["question"] for row in rows]
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in questions]
    first = halves if family.encoder else [("", text) for text in questions]
    return letters, first, [(row["question"] + "\n", row["answer"]) for row in rows]


def made(name: str, letters: Letters, seed: int) -> nn.Module:
    """A random model of the family."""
    family = FAMILIES[name]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=FIRST + len(letters.known), pad_token_id=PAD, bos_token_id=START, eos_token_id=END, **family.settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, name + family.head)(config)
    return model


def batches(letters: Letters, pairs: Pairs, family: Family, steps: int, seed: int) -> Iterator[Batch]:
    """Drawn without the held-out pairs, which are the first."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(HELD_OUT, len(pairs), (BATCH,), generator=draw).tolist()
        yield letters.batch([pairs[row] for row in rows], family)


def placed(batch: Batch, model: nn.Module) -> Batch:
    """The batch where the model is."""
    return to_device(batch, next(model.parameters()).device)


def trained(model: nn.Module, data: Iterator[Batch], rate: float) -> None:
    """AdamW at a constant rate on what requires gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model.train()
    for batch in data:
        optimizer.zero_grad()
        model(**placed(batch, model)).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    model.eval()


@torch.no_grad()
def loss_of(model: nn.Module, batch: Batch) -> float:
    """Mean loss per letter."""
    return float(model.eval()(**placed(batch, model)).loss)


@dataclass(frozen=True)
class Setting:
    """How long a run is."""

    pretraining: int = 300
    steps: int = 80
    seed: int = 0
    device: str = "cpu"


def compared(name: str, setting: Setting, directory: Path) -> dict[str, float]:
    """Held-out losses of the base, at our start, and after training from both; and what reloading changes.

    Args:
        name: Of `FAMILIES`.
        setting: Steps and seed.
        directory: Where the adapter is saved.

    Returns:
        Losses, seconds of the initialisation, and the largest difference of the reloaded adapter's logits.
    """
    family = FAMILIES[name]
    letters, first, second = tasks(family)
    base = made(name, letters, setting.seed).to(setting.device)
    trained(base, batches(letters, first, family, setting.pretraining, setting.seed), RATES["pretraining"])
    held_out = letters.batch(second[:HELD_OUT], family)
    task_type = "SEQ_2_SEQ_LM" if family.encoder else "CAUSAL_LM"
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type=task_type, **family.lora)
    found = {"base": loss_of(base, held_out)}
    for start in ("default", "ours"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            model = get_peft_model(copy.deepcopy(base), copy.deepcopy(lora))
        if start == "ours":
            drawn = batches(letters, second, family, SAMPLES // BATCH, setting.seed + 1)
            data = [placed(batch, model) for batch in drawn]
            pipeline = lora_da_core.build_pipeline(objective="seq2seq" if family.encoder else "causal_lm")
            begin = time.perf_counter()
            lora_da_core.initialize_lora_da_weights(model, data, pipeline=pipeline)
            found["seconds"] = time.perf_counter() - begin
            found["start"] = loss_of(model, held_out)
        trained(model, batches(letters, second, family, setting.steps, setting.seed + 2), RATES["adapter"])
        found[f"{start}, end"] = loss_of(model, held_out)
    model.save_pretrained(str(directory))
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), directory)
    with torch.no_grad():
        inputs = placed(held_out, model)
        difference = reloaded.eval()(**inputs).logits - model(**inputs).logits
    found["reload"] = float(difference.abs().max())
    return found


def main() -> None:
    """Runs every family with every seed, prints their means and writes all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--pretraining", type=int, default=Setting.pretraining)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--device", default=Setting.device)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/families.json"))
    options = parser.parse_args()
    figures: dict[str, Any] = {"setting": {"pretraining": options.pretraining, "steps": options.steps}}
    keys = ("base", "start", "default, end", "ours, end", "reload")
    print(f"| family | {' | '.join(keys)} |")
    for name in options.families.split(","):
        runs = []
        for seed in map(int, options.seeds.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                setting = Setting(options.pretraining, options.steps, seed, options.device)
                runs.append(compared(name, setting, Path(folder)))
        figures[name] = runs
        print(
            f"| {name} | {' | '.join(f'{statistics.fmean(run[key] for run in runs):.3g}' for key in keys)} |",
            flush=True,
        )
        write_json(options.output, figures)


if __name__ == "__main__":
    main()
