"""The blocks of code in the repository's pages, and what a reader of them has at hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/README.md")])
}
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Path of the page in the repository.
        line: Line of its first line of text.
        language: What stands after the fence.
        text: The text, without the indentation of a list.
    """

    page: str
    line: int
    language: str
    text: str


def blocks(page: str, language: str | None = None) -> Iterator[Block]:
    """A page's blocks in order, all or those of one language."""
    source = PAGES[page].read_text(encoding="utf-8")
    for match in _BLOCK.finditer(source):
        if language in (None, match[2]):
            text = "".join(line.removeprefix(match[1]) for line in match[3].splitlines(keepends=True))
            yield Block(page, source[: match.start(3)].count("\n") + 1, match[2], text)


class Desk:
    """A folder with a tiny model for every name that a page gives to a model, and data for every name of data."""

    MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "meta-llama/Llama-2-7b-hf")
    EXPERTS = "Qwen/Qwen1.5-MoE-A2.7B"
    DEMO = "$(python examples/demo_model.py)"

    def __init__(self, folder: Path, world: Path) -> None:
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

        self.folder = folder
        tokenizer = AutoTokenizer.from_pretrained(world / "model")
        # bitsandbytes packs weights for the CPU in blocks of 32 rows; experts have at least PEFT's rank.
        shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        rest = {"num_key_value_heads": 2, "max_position_embeddings": 1024}
        dense = LlamaForCausalLM(LlamaConfig(**shape, **rest, intermediate_size=128))
        experts = Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **shape, **rest, intermediate_size=64, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
                shared_expert_intermediate_size=32,
            )
        )  # fmt: skip
        for name, model in (("dense", dense), ("experts", experts)):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        (folder / "train.jsonl").write_text((world / "data.jsonl").read_text())
        (folder / "grid.toml").write_text(
            '[run]\nmodel = "dense"\ndata = "train.jsonl"\nsamples = 8\nseeds = [0]\nreference = "none"\n'
            'target_modules = ["q_proj"]\n[grid]\nestimator = ["identity", "kfac"]\nrank = [2]\nscale = ["fixed"]\n'
        )

    def placed(self, text: str) -> str:
        """The text with the names of what lies here."""
        for name in (*self.MODELS, f'"{self.DEMO}"'):
            text = text.replace(name, "dense")
        text = text.replace(self.EXPERTS, "experts").replace("examples/data/word_problems.jsonl", "train.jsonl")
        return re.sub(r"examples/grids/\w+\.toml|GRID\.toml", "grid.toml", text)

    def given(self) -> dict[str, Any]:
        """What pages take for granted in Python: a model, batches, a configuration, a trainer."""
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

        import lora_da_core
        from lora_da_core import data

        tokenizer = AutoTokenizer.from_pretrained("dense")
        rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
        samples = data.encode_text(rows, tokenizer).samples[:24]
        batches = data.batches(samples, pad_token_id=tokenizer.pad_token_id)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

        def base() -> Any:
            return AutoModelForCausalLM.from_pretrained("dense")

        peft_model = lora_da_core.get_lora_da_model(base(), lora, batches)
        trainer = Trainer(
            peft_model,
            TrainingArguments(output_dir="runs/trainer", report_to=[], disable_tqdm=True, use_cpu=True),
            train_dataset=samples,
            data_collator=lambda some: data.batches(some, pad_token_id=tokenizer.pad_token_id)[0],
        )
        return {
            "lora_da_core": lora_da_core, "model": base(), "base": base(), "lora": lora, "lora_config": lora,
            "batches": batches, "source_batches": batches, "peft_model": peft_model, "trainer": trainer,
        }  # fmt: skip
