"""What of PEFT's configuration the factors can serve, and what is refused by name before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_da_core.errors import OptionError, TargetError

if TYPE_CHECKING:
    from peft import LoraConfig

PLAIN_INITS = (True, False, "gaussian")
"""PEFT's own initialisations that leave the base weights alone, so that ours may replace what they wrote."""

REFUSED: Mapping[str, str] = {
    "layer_replication": "it builds a deeper model, of which only the wrapped copy could be run on the data",
    "megatron_config": "it adapts layers that are divided among devices",
    "alora_invocation_tokens": "aLoRA acts from its invocation tokens on, the statistics are of every token",
    "arrow_config": "Arrow routes between other adapters and has no factors of its own to start",
    "kasa_config": "KaSA truncates the base weights and has a diagonal between A and B",
    "monteclora_config": "MonteCLoRA adds noise to the factors",
    "use_bdlora": "BD-LoRA's factors are block-diagonal, ours are full",
    "use_qalora": "QA-LoRA pools the input before A",
    "velora_config": "VeLoRA replaces the backward pass of A",
}
"""Fields of `peft.LoraConfig` that are refused when they are set, with the reason."""

LORA_PREFIX = "lora_"


def check_config(peft_config: LoraConfig) -> None:
    """Refuses what the factors cannot serve.

    Args:
        peft_config: What is given as a LoRA configuration.

    Raises:
        OptionError: It is another tuner's, or starts the adapter in a way that changes the base or is another method's.
        TargetError: It asks for a variant of LoRA whose function is not W + scaling·B·A, or whose layers are not to
            be had.
    """
    kind = getattr(getattr(peft_config, "peft_type", None), "value", None)
    if kind != "LORA":
        raise OptionError(f"peft_config is a {type(peft_config).__name__}; only a LoraConfig can be initialised.")
    if peft_config.init_lora_weights not in PLAIN_INITS:
        raise OptionError(
            f"init_lora_weights={peft_config.init_lora_weights!r} is another initialisation; leave it at True."
        )
    for option, reason in REFUSED.items():
        # Fields differ between PEFT's versions.
        if getattr(peft_config, option, None):
            raise TargetError(f"{option} is not supported: {reason}. Leave it out.")


def check_adapter_name(name: str) -> None:
    """Refuses names that PEFT cannot use or cannot load again.

    Args:
        name: Of an adapter that is to be made.

    Raises:
        OptionError: The name is empty, holds a dot, or is part of PEFT's own prefix; or it is no name of a directory,
            which PEFT makes of it where it saves.
    """
    if not isinstance(name, str) or not name or "." in name or name in LORA_PREFIX:
        raise OptionError(
            f"adapter_name is {name!r}; PEFT takes names that are not empty, have no dot and are no part of "
            f"{LORA_PREFIX!r}."
        )
    if any(character in "/\\" or not character.isprintable() for character in name):
        raise OptionError(f"adapter_name is {name!r}; it is the name of a directory too, so it holds no / and no \\.")
