"""A short fine-tune of an adapter: AdamW, warm-up and cosine, held-out loss at given steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import torch
from torch import Tensor, nn

from lora_da_core.ablation.pairs import pair_batch
from lora_da_core.ablation.settings import FinetuneSettings
from lora_da_core.batches import to_device
from lora_da_core.data import IGNORED, batches
from lora_da_core.interfaces import Objective
from lora_da_core.types import Batch

if TYPE_CHECKING:
    from lora_da_core.regularization import Penalty

ValueT = TypeVar("ValueT")

WARM_UP: Final = 0.03
"""Share of the steps in which the rate rises."""


@dataclass(frozen=True)
class Curve:
    """One fine-tune.

    Attributes:
        learning_rate: The peak rate.
        steps: Steps at which the held-out loss was taken.
        losses: Held-out loss there, in nats per label token, or per pair; NaN once training has diverged.
        train_losses: Training loss of the step that follows (at the last: of the last step).
        seconds: Wall time, evaluation included.
        source_losses: Loss on the source's held-out rows at `steps`; empty where the grid names no source.
    """

    learning_rate: float
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    train_losses: tuple[float, ...]
    seconds: float
    source_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainingData:
    """What a fine-tune reads, and by what it is judged.

    Attributes:
        samples: Encoded training samples in the seed's order: `Sample`s, or `Pair`s for an objective of pairs.
        held_out: Batches that the loss is taken on.
        pad_token_id: What fills texts up.
        seed: Of the order.
        source: Batches of the source; empty without one.
        objective: What is trained, of pairs; None is the language model's own loss.
    """

    samples: Sequence[Any]
    held_out: Sequence[Batch]
    pad_token_id: int
    seed: int
    source: Sequence[Batch] = ()
    objective: Objective[Any] | None = None

    def draws(self, steps: int, batch_size: int) -> Iterator[list[Any]]:
        """The samples of each step: in their order, reshuffled by the seed for every further round.

        Args:
            steps: How many draws.
            batch_size: Samples in each; a round's end may fall within one.

        Yields:
            The samples; the same for the same seed, whatever is trained.
        """
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[Any] = []
        order = list(range(len(self.samples)))
        for _ in range(steps):
            while len(waiting) < batch_size:
                waiting.extend(self.samples[index] for index in order)
                order = torch.randperm(len(order), generator=generator).tolist()
            chosen, waiting = waiting[:batch_size], waiting[batch_size:]
            yield chosen

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]:
        """`draws` as padded batches.

        Args:
            steps: How many batches.
            batch_size: Samples in each.

        Yields:
            The batches.
        """
        for chosen in self.draws(steps, batch_size):
            if self.objective is None:
                yield batches(chosen, pad_token_id=self.pad_token_id, batch_size=batch_size)[0]
            else:
                yield pair_batch(chosen, self.pad_token_id)


def rate_factor(step: int, steps: int) -> float:
    """The rate of a step (from 0) relative to the peak: linear warm-up over 3 %, then a cosine to 0.

    >>> [round(rate_factor(step, 100), 2) for step in (0, 1, 2, 3, 51, 99)]
    [0.33, 0.67, 1.0, 1.0, 0.51, 0.0]
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Recorder(Generic[ValueT]):
    """The losses of a fine-tune, taken at the steps where they are wanted.

    Attributes:
        held_out: Losses on the held-out rows, by evaluation.
        source: Losses on the source's, likewise; empty without a source.
        trained: Training losses that belong to these evaluations.
    """

    def __init__(
        self, settings: FinetuneSettings, data: TrainingData, loss_of: Callable[[Sequence[Batch]], ValueT]
    ) -> None:
        """Keeps what it is given; nothing is evaluated yet.

        Args:
            settings: Steps and evaluations.
            data: Held-out rows, and the source's.
            loss_of: The loss on some batches as the model is now.
        """
        self._settings, self._data, self._loss_of = settings, data, loss_of
        self.held_out: list[ValueT] = []
        self.source: list[ValueT] = []
        self.trained: list[ValueT] = []

    def begin(self) -> None:
        """To be called before the first step."""
        self._evaluate(0)

    def step(self, number: int, loss: ValueT) -> None:
        """To be called after each step.

        Args:
            number: The step, from 0.
            loss: Its training loss.
        """
        wanted, last = self._settings.eval_steps, self._settings.steps
        if number in wanted:
            self.trained.append(loss)
        if number + 1 == last and last in wanted:
            self.trained.append(loss)
        self._evaluate(number + 1)

    def _evaluate(self, steps: int) -> None:
        if steps not in self._settings.eval_steps:
            return
        self.held_out.append(self._loss_of(self._data.held_out))
        if self._data.source:
            self.source.append(self._loss_of(self._data.source))


def finetune(
    model: nn.Module,
    data: TrainingData,
    settings: FinetuneSettings,
    learning_rate: float,
    penalty: Penalty | None = None,
) -> Curve:
    """Trains what is trainable; the caller puts the adapter back.

    Args:
        model: A PeftModel.
        data: What it reads.
        settings: Steps, batch size and evaluations.
        learning_rate: The peak rate.
        penalty: Its gradient is added to that of the loss, after clipping.

    Returns:
        The held-out losses.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay)
    recorder = Recorder(settings, data, lambda rows: held_out_loss(model, rows, data.objective))
    recorder.begin()
    with seeded(data.seed, device):
        for step, batch in enumerate(data.batches(settings.steps, settings.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate_factor(step, settings.steps)
            loss = training_loss(model.train(), to_device(batch, device), data.objective)
            recorder.step(step, _step(loss, optimizer, settings.max_grad_norm, penalty))
    model.eval()
    return curve_of(recorder, settings, learning_rate, time.perf_counter() - start)


def curve_of(recorder: Recorder[float], settings: FinetuneSettings, learning_rate: float, seconds: float) -> Curve:
    """What a recorder holds when its fine-tune is done.

    Args:
        recorder: Of one adapter.
        settings: Steps and evaluations.
        learning_rate: The peak rate.
        seconds: Wall time.

    Returns:
        The curve.
    """
    held_out, trained, source = (tuple(values) for values in (recorder.held_out, recorder.trained, recorder.source))
    return Curve(learning_rate, settings.eval_steps, held_out, trained, seconds, source)


def held_out_loss(model: nn.Module, held_out: Sequence[Batch], objective: Objective[Any] | None = None) -> float:
    """Mean loss over all label tokens, in nats; of an objective of pairs over all pairs.

    Args:
        model: A causal language model; it is left in evaluation mode.
        held_out: The batches.
        objective: Of pairs; None is the language model's own loss.

    Returns:
        The loss.
    """
    device, total, count = next(model.parameters()).device, 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in held_out:
            placed = to_device(batch, device)
            if objective is not None:
                losses = objective.losses(model, placed)
                total, count = total + float(losses.double().sum()), count + len(losses)
                continue
            labels = placed["labels"][:, 1:]
            logits: Tensor = model(input_ids=placed["input_ids"], attention_mask=placed["attention_mask"]).logits
            total += float(
                nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
            )
            count += int((labels != IGNORED).sum())
    return total / count


def training_loss(model: nn.Module, batch: Batch, objective: Objective[Any] | None) -> Tensor:
    """The loss of one step.

    Args:
        model: What is trained, in training mode.
        batch: On its device.
        objective: Of pairs; None is the language model's own loss.

    Returns:
        The mean, with its graph.
    """
    loss: Tensor = model(**batch).loss if objective is None else objective.losses(model, batch).mean()
    return loss


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, max_norm: float, penalty: Penalty | None) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    if penalty is not None:
        penalty.add_gradients()
    optimizer.step()
    return float(loss.detach())


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators, which PEFT and dropout draw from, and puts them back.

    Args:
        seed: The seed.
        device: Where the model runs.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
