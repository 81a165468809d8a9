"""What all cells of a grid have in common, and its fine-tunes: frozen settings that refuse values out of range."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lora_da_core.errors import OptionError


@dataclass(frozen=True)
class FinetuneSettings:
    """A short fine-tune after each initialisation.

    Attributes:
        steps: Optimiser steps.
        learning_rates: Peak rates; each is a run of its own from the same start.
        eval_steps: Steps at which the held-out loss is taken, 0 (before training) to `steps`.
        batch_size: Samples per step.
        held_out: Rows kept out of the initialisation and the training, the same ones for every seed.
        validation: Rows of what is left that the loss is taken on instead, and that are not trained on either; the
            held-out rows then stay unread. 0 takes the loss on the held-out rows.
        together: Adapters trained at once, one for every cell and rate; 1 trains each by itself, as stock PEFT does.
        tokens_at_once: Tokens of all these adapters in one pass; more is faster and takes more memory.
        weight_decay: AdamW's.
        max_grad_norm: Norm that gradients are cut to.
    """

    steps: int
    learning_rates: tuple[float, ...]
    eval_steps: tuple[int, ...]
    batch_size: int = 8
    held_out: int = 64
    validation: int = 0
    together: int = 1
    tokens_at_once: int = 8192
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "held_out", "together", "tokens_at_once"):
            whole(name, getattr(self, name), 1)
        whole("validation", self.validation, 0)
        for name in ("weight_decay", "max_grad_norm"):
            number(name, getattr(self, name))
        if not self.learning_rates or not self.eval_steps:
            raise OptionError("learning_rates and eval_steps must each list at least one value.")
        for rate in self.learning_rates:
            if number("learning_rates", rate) == 0:
                raise OptionError("learning_rates holds 0; rates must be above 0.")
        for step in self.eval_steps:
            if whole("eval_steps", step, 0) > self.steps:
                raise OptionError(f"eval_steps holds {step}, beyond the {self.steps} steps.")
        if list(self.eval_steps) != sorted(set(self.eval_steps)):
            raise OptionError(f"eval_steps is {list(self.eval_steps)}; list each step once, ascending.")


@dataclass(frozen=True)
class SourceSettings:
    """What the model can do already and is not to forget: a data set beside the one that is trained on.

    Attributes:
        data: Data file, directory or hub id.
        split: Split of the data set.
        prompt_template: How a row is written.
        samples: Rows that a regularizer's Fisher is estimated from, drawn anew for every seed.
        held_out: Rows that the source's loss is taken on at the evaluated steps, the same ones for every seed.
    """

    data: str
    split: str = "train"
    prompt_template: str | None = None
    samples: int = 64
    held_out: int = 64

    def __post_init__(self) -> None:
        for name in ("data", "split"):
            text(name, getattr(self, name))
        if self.prompt_template is not None:
            text("prompt_template", self.prompt_template)
        for name in ("samples", "held_out"):
            whole(name, getattr(self, name), 1)


@dataclass(frozen=True)
class RunSettings:
    """What all cells of a grid have in common; the names mean what they mean to `lora-da init`.

    Attributes:
        model: Hub id, directory or .gguf file.
        data: Data file, directory or hub id.
        split: Split of the data set.
        samples: Samples an initialisation reads, unless the grid lists others.
        seeds: Every cell is run once per seed: of the draw of samples, of random numbers and of the batches' order.
        device: Where to run.
        dtype: Precision to load the model in.
        target_modules: Layers to adapt.
        exclude_modules: Layers to leave out.
        max_length: Tokens kept of a sample.
        prompt_template: How a row is written.
        batch_size: Samples per batch of the initialisation; None fills 256 tokens on a CPU, 2048 elsewhere.
        lora_alpha: LoRA's α.
        use_rslora: Scale by α/√r.
        reference: Fisher estimator that fidelity is measured against; `auto` takes the most exact one whose
            statistics fit into memory, `none` measures no fidelity.
        compare_to: What the report compares everything to: a baseline, or an estimator; None takes the first baseline.
        trust_remote_code: Whether code that comes with the model may run.
        objective: What fine-tunes train and held-out rows are judged by, and what initialisations differentiate unless
            the grid lists others: a name, or a mapping of it and options. None is the language model's own loss.
        finetune: A fine-tune after each initialisation, or None.
        source: Data that fine-tunes are not to forget, or None.
    """

    model: str
    data: str
    split: str = "train"
    samples: int = 64
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"
    dtype: str = "auto"
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    max_length: int | None = None
    prompt_template: str | None = None
    batch_size: int | None = None
    lora_alpha: float = 16.0
    use_rslora: bool = False
    reference: str = "auto"
    compare_to: str | None = None
    trust_remote_code: bool = False
    objective: str | Mapping[str, Any] | None = None
    finetune: FinetuneSettings | None = None
    source: SourceSettings | None = None

    def __post_init__(self) -> None:
        for name in ("model", "data", "split", "device", "dtype", "reference"):
            text(name, getattr(self, name))
        for name in ("prompt_template", "compare_to"):
            if getattr(self, name) is not None:
                text(name, getattr(self, name))
        for name, least in (("samples", 1), ("max_length", 2), ("batch_size", 1)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least)
        if not self.seeds:
            raise OptionError("seeds must list at least one seed.")
        for seed in self.seeds:
            whole("seeds", seed, 0)
        for name in ("use_rslora", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; write true or false.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            for part in value if isinstance(value, tuple) else () if value is None else (value,):
                text(name, part)
        if number("lora_alpha", self.lora_alpha) == 0:
            raise OptionError("lora_alpha is 0; it must be above 0.")
        if self.source is not None and self.finetune is None:
            raise OptionError("[run.source] says what a fine-tune may forget; give [run.finetune] too.")

    def identity(self) -> dict[str, Any]:
        """What a cell's result depends on; the rest only says which cells there are and how they are shown."""
        found = {name: value for name, value in asdict(self).items() if name not in ("seeds", "samples", "compare_to")}
        if self.finetune is not None:
            # How it is computed, not what.
            del found["finetune"]["together"], found["finetune"]["tokens_at_once"]
        for name in ("source", "objective"):
            if found[name] is None:
                del found[name]  # cells keep the names they had before there were these
        return found


def text(name: str, value: Any) -> None:
    """Refuses what is no text, or an empty one."""
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name} is {value!r}; it must be a text that is not empty.")


def whole(name: str, value: Any, least: int) -> int:
    """The value, or an OptionError that names it where it is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
    return value


def number(name: str, value: Any) -> float:
    """The value, or an OptionError that names it where it is no finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise OptionError(f"{name} is {value!r}; it must be a number of at least 0.")
    return float(value)
