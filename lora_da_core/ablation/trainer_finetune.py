"""A fine-tune by transformers' Trainer, which a trainer plugin attaches to."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_da_core.ablation.finetune import (
    Curve,
    Recorder,
    TrainingData,
    curve_of,
    held_out_loss,
    rate_factor,
    training_loss,
)
from lora_da_core.ablation.settings import FinetuneSettings
from lora_da_core.blame import blamed
from lora_da_core.errors import OptionError
from lora_da_core.interfaces import TrainerPlugin
from lora_da_core.model_state import random_states_kept
from lora_da_core.regularization import regularize_training

if TYPE_CHECKING:
    from lora_da_core.regularization import Penalty


def finetune_by_trainer(
    model: nn.Module,
    data: TrainingData,
    settings: FinetuneSettings,
    learning_rate: float,
    plugin: TrainerPlugin[Any] | None = None,
    penalty: Penalty | None = None,
) -> Curve:
    """Trains as `finetune` does, step for step, but for what a plugin changes.

    Args:
        model: A PeftModel; the plugin may change its base.
        data: What it reads.
        settings: Steps, batch size and evaluations.
        learning_rate: The peak rate.
        plugin: Attached before training; None leaves the trainer its AdamW.
        penalty: Its gradient is added to that of the loss, after clipping.

    Returns:
        The held-out losses.

    Raises:
        OptionError: The trainer would train on another device, or on several.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    recorder = Recorder(settings, data, lambda rows: held_out_loss(model, rows, data.objective))
    recorder.begin()
    with random_states_kept(), tempfile.TemporaryDirectory() as directory:
        arguments = _arguments(settings, learning_rate, data.seed, device, directory)
        if arguments.device != device or arguments.n_gpu > 1:
            raise OptionError(
                f"transformers' Trainer would train on {max(arguments.n_gpu, 1)} devices from {arguments.device}, but "
                f"the model is on {device}; let that be the only visible one (CUDA_VISIBLE_DEVICES)."
            )
        trainer = _trainer(model, data, settings, arguments, recorder)
        if plugin is not None:
            with blamed(f"trainer {plugin.name!r}"):
                plugin.attach(trainer)
        if penalty is not None:
            regularize_training(trainer, penalty)
        trainer.train()
    model.eval()
    return curve_of(recorder, settings, learning_rate, time.perf_counter() - start)


def _trainer(
    model: nn.Module, data: TrainingData, settings: FinetuneSettings, arguments: Any, recorder: Recorder[float]
) -> Any:
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class Finetune(Trainer):  # type: ignore[misc]  # transformers is untyped here
        """The grid's batches, schedule and loss."""

        last_loss = math.nan

        def get_train_dataloader(self) -> DataLoader[Any]:
            batches = list(data.batches(settings.steps, settings.batch_size))
            return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: rate_factor(step, settings.steps)
            )
            return self.lr_scheduler

        def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *rest: Any, **more: Any) -> Tensor:
            loss = training_loss(model, inputs, data.objective)
            self.last_loss = float(loss.detach())
            return loss

    class Evaluate(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            recorder.step(state.global_step - 1, trainer.last_loss)
            trainer.model.train()

    trainer = Finetune(model, arguments, train_dataset=list(data.samples))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Evaluate())
    return trainer


def _arguments(
    settings: FinetuneSettings, learning_rate: float, seed: int, device: torch.device, directory: str
) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=directory,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        seed=seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
