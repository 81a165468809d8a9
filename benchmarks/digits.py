"""What `vit_digits` runs on: the digits, a small ViT that is pre-trained on half of them, and one step of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from lora_da_core.ablation.finetune import rate_factor

OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
PRETRAINING = {"epochs": 60, "batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.05, "seed": 0}
SHARES = (0.6, 0.15, 0.25)
"""Training, validation, held out."""

MAX_GRAD_NORM = 1.0

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Images:
    """Images (n, 1, 8, 8) and classes (n,)."""

    pixels: Tensor
    classes: Tensor

    def rows(self, rows: Tensor) -> Batch:
        """A batch of these rows."""
        return {"pixel_values": self.pixels[rows], "labels": self.classes[rows]}


@dataclass(frozen=True)
class Task:
    """The pre-trained weights and the three parts of the new digits."""

    weights: Mapping[str, Tensor]
    train: Images
    validation: Images
    held_out: Images


def digits(wanted: Sequence[int]) -> Images:
    """The digits of `wanted`, as classes from 0, in an order of their own that never changes."""
    data = load_digits()
    chosen = np.isin(data.target, wanted)
    pixels = torch.tensor(data.images[chosen], dtype=torch.float32).unsqueeze(1) / 8 - 1
    classes = torch.tensor(data.target[chosen], dtype=torch.long) - min(wanted)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    return Images(pixels[order], classes[order])


def parts(images: Images) -> tuple[Images, Images, Images]:
    """Training, validation and held-out part, the same in every run."""
    ends = [round(len(images.classes) * share) for share in np.cumsum(SHARES)]
    rows = torch.arange(len(images.classes)).tensor_split(ends[:2])
    return tuple(Images(images.pixels[part], images.classes[part]) for part in rows)  # type: ignore[return-value]


def vit() -> ViTForImageClassification:
    """A random ViT: four layers of width 64 on sixteen patches of 2×2 pixels and a class token."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def pretrained() -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights that know digits 0 to 4, and how well they know those they have not seen."""
    train, _, held_out = parts(digits(OLD))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PRETRAINING["seed"])
        model = vit().train()
        rate = PRETRAINING["learning_rate"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=PRETRAINING["weight_decay"])
        epochs, size = int(PRETRAINING["epochs"]), int(PRETRAINING["batch_size"])
        batches = [rows for _ in range(epochs) for rows in torch.randperm(len(train.classes)).split(size)]
        for step, rows in enumerate(batches):
            train_step(model, train.rows(rows), optimizer, rate * rate_factor(step, len(batches)))
    return model.state_dict(), evaluate(model, held_out)


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> dict[str, float]:
    """Mean loss in nats, and accuracy; the model is in training mode afterwards."""
    model.eval()
    logits = model(pixel_values=images.pixels).logits
    loss = nn.functional.cross_entropy(logits, images.classes)
    model.train()
    return {"loss": float(loss), "accuracy": float((logits.argmax(-1) == images.classes).float().mean())}


def fit_head(model: ViTForImageClassification, pixels: Tensor, classes: Tensor) -> None:
    """Makes the classifier a logistic regression on what the encoder gives of images (n, 1, 8, 8) of classes (n,)."""
    with torch.no_grad():
        features = model.vit(pixels).last_hidden_state[:, 0]
    optimizer = torch.optim.LBFGS(model.classifier.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.classifier(features), classes)
        loss = loss + 1e-3 * model.classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def train_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, rate: float) -> float:
    """One step of AdamW at a rate; the batch's mean loss before it."""
    (group,) = optimizer.param_groups
    group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss: Tensor = nn.functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
    optimizer.step()
    return float(loss.detach())
