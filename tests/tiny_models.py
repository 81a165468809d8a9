"""Random tiny models of transformers' own classes, and batches for them: what the objectives are tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 37
PAD = 0
LENGTHS = (7, 4, 6, 7, 5, 3)
"""Tokens of the samples; the batches are padded to more."""


def made(create: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose random weights come from a seed of its own; larger than transformers', so that losses differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create().to(dtype).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.3)
    return model


def bert(head: str = "SequenceClassification", **settings: Any) -> nn.Module:
    """A two-layer BERT with a head, MiniLM's architecture."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=PAD,
        **{"num_labels": 3, **settings},
    )
    return made(lambda: getattr(transformers, f"BertFor{head}")(config))


def llama_classifier(**settings: Any) -> nn.Module:
    """A two-layer Llama that classifies by its last token."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=PAD,
        **{"num_labels": 3, **settings},
    )
    return made(lambda: LlamaForSequenceClassification(config))


def vit(**settings: Any) -> nn.Module:
    """A two-layer ViT of 8×8 images in four patches, and a class token."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        **{"num_labels": 3, **settings},
    )
    return made(lambda: ViTForImageClassification(config))


def t5() -> nn.Module:
    """A T5 of two and two layers."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
    )
    return made(lambda: T5ForConditionalGeneration(config))


def bart() -> nn.Module:
    """A BART of one and one layer."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return made(lambda: BartForConditionalGeneration(config))


def generator() -> torch.Generator:
    """The data's own source of random numbers."""
    return torch.Generator().manual_seed(3)


def texts(extra_padding: int = 2) -> dict[str, Tensor]:
    """Token numbers of `LENGTHS`, right-padded."""
    width = max(LENGTHS) + extra_padding
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator())
    ids = nn.functional.pad(ids, (0, extra_padding), value=PAD)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def images() -> dict[str, Tensor]:
    """Noise."""
    return {"pixel_values": torch.randn(len(LENGTHS), 1, 8, 8, generator=generator(), dtype=torch.float64)}


def classes(count: int = 3) -> Tensor:
    """One class per sample."""
    return torch.arange(len(LENGTHS)) % count


def generated(count: int) -> Tensor:
    """Standard normal values, `count` per sample."""
    return torch.randn(len(LENGTHS), count, generator=generator(), dtype=torch.float64)


def tags(batch: dict[str, Tensor], count: int = 3) -> Tensor:
    """One class per token, masked on padding and on every third token."""
    shape = batch["input_ids"].shape
    labels = torch.randint(0, count, shape, generator=generator())
    return torch.where(batch["attention_mask"].bool() & (torch.arange(shape[1]) % 3 != 1), labels, -100)


def targets(extra_padding: int = 2) -> Tensor:
    """Target texts, one token shorter than the sources, masked on padding."""
    width = max(LENGTHS) - 1 + extra_padding
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator())
    ids = nn.functional.pad(ids, (0, extra_padding))[:, :width]
    return torch.where(torch.arange(width) < torch.tensor(LENGTHS)[:, None] - 1, ids, -100)


def single(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample without its padding."""
    length = LENGTHS[row]
    sample = {key: value[row : row + 1] for key, value in batch.items()}
    for key in ("input_ids", "attention_mask"):
        if key in sample:
            sample[key] = sample[key][:, :length]
    labels = sample["labels"]
    if "input_ids" in batch and labels.ndim == 2 and not labels.is_floating_point():
        kept = (labels[0] != -100).nonzero().flatten()
        same = batch["labels"].shape == batch["input_ids"].shape
        sample["labels"] = labels[:, : length if same else int(kept[-1]) + 1]
    return sample


CAUSAL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Phi": {},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2},
}
"""transformers' families of causal language models, with what their configurations need beside the common sizes."""


def causal(family: str, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """A two-layer language model of a family in `CAUSAL`."""
    import transformers

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": PAD,
    }
    common = {} if family == "GPT2" else sizes
    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": VOCABULARY, **common, **CAUSAL[family], **settings}
    )
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return made(lambda: getattr(transformers, name)(config), dtype)


def continued() -> dict[str, Tensor]:
    """`texts` whose own tokens are the labels, but for the first of each."""
    batch = texts()
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    return {**batch, "labels": labels}


def mamba() -> nn.Module:
    """A two-layer Mamba."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        conv_kernel=3,
        time_step_rank=2,
        pad_token_id=PAD,
    )
    return made(lambda: MambaForCausalLM(config))


def resnet() -> nn.Module:
    """A ResNet of two stages; no channel count is below 8."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return made(lambda: ResNetForImageClassification(config))


IMAGE = 1
"""Token that stands for a patch of an image in a text."""


def llava() -> nn.Module:
    """A Llava: a CLIP of two layers on 8×8 images in four patches, before a two-layer Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, num_channels=1, projection_dim=16, **sizes),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, **sizes
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return made(lambda: LlavaForConditionalGeneration(config))


def pictured() -> dict[str, Tensor]:
    """`continued` texts, each with an image of four patches before it."""
    batch = continued()
    patches = torch.full((len(LENGTHS), 4), IMAGE)
    return {
        **images(),
        "input_ids": torch.cat([patches, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(patches), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(patches, -100), batch["labels"]], 1),
    }
