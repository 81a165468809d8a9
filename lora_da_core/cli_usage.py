"""What other programs are told to start from a saved adapter, or to serve it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_da_core.errors import OptionError, StorageError
from lora_da_core.storage import read_adapter_config

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank."""


@dataclass(frozen=True)
class SavedAdapter:
    """What a saved adapter's configuration says that other programs have to be told.

    Attributes:
        directory: Where it is, in full.
        base: The base model's directory, in full, or name.
        rank: The largest rank of a layer.
        merged_for_serving: What of it vLLM does not take (`use_dora`, `modules_to_save`), if anything.
    """

    directory: str
    base: str
    rank: int
    merged_for_serving: str


def saved_adapter(directory: Path) -> SavedAdapter:
    """Reads a saved adapter's configuration.

    Args:
        directory: A directory of a LoRA adapter that PEFT reads.

    Returns:
        What others are told.

    Raises:
        StorageError: There is no such configuration, or it is damaged, or it names no base.
    """
    config = read_adapter_config(directory)
    base, pattern = config.get("base_model_name_or_path"), config.get("rank_pattern") or {}
    if config.get("peft_type") != "LORA" or not isinstance(pattern, Mapping):
        raise StorageError(f"{directory} holds no LoRA adapter.")
    ranks = [config.get("r"), *pattern.values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise StorageError(f"{directory}: the ranks of its configuration are {ranks}; they are to be whole numbers.")
    if not isinstance(base, str) or not base:
        raise StorageError(f"{directory}: its configuration names no base model: base_model_name_or_path is empty.")
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    odd = next((name for name in ("use_dora", "modules_to_save") if config.get(name)), "")
    return SavedAdapter(str(directory.resolve()), base, max(ranks), odd)


def _axolotl(adapter: SavedAdapter) -> str:
    # A JSON text is a YAML text as well.
    return f"base_model: {_text(adapter.base)}\nadapter: lora\nlora_model_dir: {_text(adapter.directory)}"


def _llama_factory(adapter: SavedAdapter) -> str:
    paths = {"model_name_or_path": adapter.base, "adapter_name_or_path": adapter.directory}
    lines = [f"{name}: {_text(path)}" for name, path in paths.items()]
    # With true, the start is merged into the base and another adapter begins.
    return "\n".join([*lines, "finetuning_type: lora", "create_new_adapter: false"])


def _ms_swift(adapter: SavedAdapter) -> str:
    return shlex.join(["swift", "sft", "--model", adapter.base, "--adapters", adapter.directory])


def _unsloth(adapter: SavedAdapter) -> str:
    # It loads in 4 bits if not told otherwise.
    return (
        "from unsloth import FastLanguageModel\n\n"
        f"model, tokenizer = FastLanguageModel.from_pretrained(model_name={adapter.directory!r}, load_in_4bit=False)"
    )


def _vllm(adapter: SavedAdapter) -> str:
    if adapter.merged_for_serving:
        raise OptionError(f"vLLM takes no adapter with {adapter.merged_for_serving}; serve it merged.")
    limit = next((rank for rank in VLLM_RANKS if rank >= adapter.rank), None)
    if limit is None:
        raise OptionError(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, the largest here is {adapter.rank}; serve it merged."
        )
    module = f"{Path(adapter.directory).name}={adapter.directory}"
    command = ["vllm", "serve", adapter.base, "--enable-lora", "--lora-modules", module]
    return shlex.join([*command, "--max-lora-rank", str(limit)])


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


PROGRAMS: Mapping[str, Callable[[SavedAdapter], str]] = {
    "axolotl": _axolotl,
    "llama-factory": _llama_factory,
    "ms-swift": _ms_swift,
    "unsloth": _unsloth,
    "vllm": _vllm,
}
"""By name, what is put into a program's settings, script or command line."""


def usage(directory: Path, program: str) -> str:
    """What a program is told to start from a saved adapter, or to serve it.

    Args:
        directory: A directory of a LoRA adapter that PEFT reads.
        program: One of `PROGRAMS`.

    Returns:
        Lines of its settings file, a script or a command; all else that it asks for is to be added.

    Raises:
        OptionError: No such program is known, or it does not take this adapter.
        StorageError: As `saved_adapter`.
    """
    if program not in PROGRAMS:
        raise OptionError(f"no program {program!r} is known; choose one of {', '.join(PROGRAMS)}.")
    return PROGRAMS[program](saved_adapter(directory))
