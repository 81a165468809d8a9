"""Initialisations of LoRA on images: a small ViT, pre-trained on digits 0 to 4, learns digits 5 to 9.

The data are scikit-learn's 1,797 scanned digits (8×8 pixels), split once: training, validation, held out. Every linear
layer of the encoder gets an adapter. The classifier is new, has five outputs, and is trained with the adapter, at the
same rate, for all methods alike (`modules_to_save`); of one seed they share its start, their calibration samples and
the order of their batches. `--head random` starts it at random, `--head probe` at a logistic regression on the frozen
features of the training rows that no start reads, since the losses of rows that a head knows say little about others.

Writes one JSON line on the setting, then one per run (or per start that failed), with losses and accuracies at every
evaluated step. A method's learning rate is the one with the lowest mean validation loss at the end; the printed table
is of held-out losses.

    python -m benchmarks.vit_digits [--jobs 2] [--methods default,robust] [--seeds 0,1,2,3,4] [--steps 100]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from scipy import stats
from torch import nn
from transformers import ViTForImageClassification

import lora_da_core
from benchmarks.digits import (
    NEW,
    PRETRAINING,
    Batch,
    Task,
    digits,
    evaluate,
    fit_head,
    parts,
    pretrained,
    train_step,
    vit,
)
from benchmarks.machine import machine
from lora_da_core import adapter
from lora_da_core.ablation import baselines
from lora_da_core.ablation.finetune import rate_factor
from lora_da_core.sizing import SEARCH_SAMPLES


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    learning_rates: tuple[float, ...]
    eval_steps: tuple[int, ...]
    steps: int
    batch_size: int
    rank: int
    alpha: float
    samples: int
    head: str


@dataclass(frozen=True)
class Made:
    """An initialised model, and what its method has to say."""

    model: PeftModel
    details: dict[str, Any]


@dataclass(frozen=True)
class Calibration:
    """What an initialisation reads, and the few samples that follow, which are for sizing a step alone."""

    batches: Sequence[Batch]
    unseen: Sequence[Batch]


Maker = Callable[[nn.Module, Calibration, dict[str, Any]], Made]
"""From a model of its own, calibration samples and the LoRA configuration's arguments."""


def stock(name: str) -> Maker:
    """One of PEFT's initialisations, as a grid's baseline has it."""

    def make(model: nn.Module, data: Calibration, lora: dict[str, Any]) -> Made:
        settings = {key: value for key, value in lora.items() if key != "target_modules"}
        return Made(baselines.initialise(name, model, lora["target_modules"], data.batches, settings), {})

    return make


def eva(model: nn.Module, data: Calibration, lora: dict[str, Any]) -> Made:
    """PEFT's EVA at equal ranks; every token counts, as an image has no padding."""
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **lora)
    wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        wrapped, data.batches, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    return Made(wrapped, {})


def ours(preset: str, **components: Any) -> Maker:
    """A preset of lora-da-core, with components of its own where given."""

    def make(model: nn.Module, data: Calibration, lora: dict[str, Any]) -> Made:
        pipeline = lora_da_core.build_pipeline(preset=preset, objective="image_classification", **components)
        samples = sum(len(batch["labels"]) for batch in data.batches)
        pipeline.config = dataclasses.replace(pipeline.config, samples=samples)
        config = LoraConfig(**lora)
        result = pipeline.run(model, [*data.batches, *data.unseen], config)
        report = result.report
        details: dict[str, Any] = {
            "components": dict(report.components),
            "config": dict(report.config),
            "scale": dict(report.scale),
        }
        details |= {"seconds_by_phase": dict(report.seconds), "base_loss": report.loss, "notes": list(report.notes)}
        return Made(adapter.apply(model, config, result.factors), details)

    return make


METHODS: dict[str, Maker] = {
    "default": stock("default"),
    "pissa": stock("pissa"),
    "olora": stock("olora"),
    "eva": eva,
    "lora_ga": stock("lora_ga"),
    "paper": ours("paper"),
    "robust": ours("robust"),
    "lora_one": ours("lora_one"),
    "spectral": ours("spectral"),
    "identity": ours("robust", estimator="identity"),
}
"""What is compared; `identity` is LoRA-One's directions, divided between A and B as `robust` does it."""


def base_model(task: Task, settings: Settings, seed: int) -> ViTForImageClassification:
    """The pre-trained encoder with a new classifier, which knows none of the rows that a start reads."""
    model = vit()
    model.load_state_dict(task.weights)
    generator = torch.Generator().manual_seed(seed)
    model.classifier.weight.data.normal_(std=model.config.initializer_range, generator=generator)
    model.classifier.bias.data.zero_()
    if settings.head == "probe":
        others = shuffled(task, seed)[settings.samples + SEARCH_SAMPLES :]
        fit_head(model, task.train.pixels[others], task.train.classes[others])
    return model.eval()


def shuffled(task: Task, seed: int) -> torch.Tensor:
    """The training rows in a seed's order: a start reads the first of them."""
    return torch.randperm(len(task.train.classes), generator=torch.Generator().manual_seed(seed))


def compare(method: str, seed: int, settings: Settings, task: Task) -> list[dict[str, Any]]:
    """One method's start from one seed, trained at every rate."""
    torch.set_num_threads(1)
    model = base_model(task, settings, seed)
    lora = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": True,
        "target_modules": [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "classifier"],
        "modules_to_save": ["classifier"],
    }
    order = shuffled(task, seed)
    read, follow = order[: settings.samples], order[settings.samples : settings.samples + SEARCH_SAMPLES]
    calibration = Calibration(
        *([task.train.rows(rows) for rows in p.split(settings.batch_size)] for p in (read, follow))
    )
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT announces for which of its initialisations the base changes; each has a copy of its own.
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        made = METHODS[method](model, calibration, lora)
    seconds = time.perf_counter() - start
    shared = {"method": method, "seed": seed, "init_seconds": seconds, "details": made.details}
    return [
        {"kind": "run", **shared, "learning_rate": rate, **train(copy.deepcopy(made.model), task, settings, rate, seed)}
        for rate in settings.learning_rates
    ]


def train(model: nn.Module, task: Task, settings: Settings, rate: float, seed: int) -> dict[str, Any]:
    """Losses and accuracies at the evaluated steps; those from a divergence on are missing."""
    start = time.perf_counter()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    curves: dict[str, list[Any]] = {"steps": [], "validation": [], "held_out": [], "train_loss": []}
    generator, waiting, loss = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long), None
    diverged = False
    for step in range(settings.steps + 1):
        if step in settings.eval_steps:
            found = {part: evaluate(model, getattr(task, part)) for part in ("validation", "held_out")}
            diverged = not all(math.isfinite(point["loss"]) for point in found.values())
            if not diverged:
                for key, value in {"steps": step, "train_loss": loss, **found}.items():
                    curves[key].append(value)
        if diverged or step == settings.steps:
            break
        if len(waiting) < settings.batch_size:
            waiting = torch.cat([waiting, torch.randperm(len(task.train.classes), generator=generator)])
        rows, waiting = waiting[: settings.batch_size], waiting[settings.batch_size :]
        loss = train_step(model, task.train.rows(rows), optimizer, rate * rate_factor(step, settings.steps))
        diverged = not math.isfinite(loss)
        if diverged:
            break
    return {**curves, "diverged": diverged, "seconds": time.perf_counter() - start}


@dataclass(frozen=True)
class Outcome:
    """A method at its own best learning rate: held-out losses (seeds, steps), and those seeds."""

    method: str
    learning_rate: float
    seeds: list[int]
    losses: np.ndarray[Any, Any]

    def ends(self, seeds: Sequence[int]) -> np.ndarray[Any, Any]:
        """The last losses of some seeds."""
        return self.losses[[self.seeds.index(seed) for seed in seeds], -1]


def outcomes(records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Each method at the rate with the lowest mean validation loss at the end; divergence counts as infinite."""
    found = []
    for method in dict.fromkeys(record["method"] for record in records):
        by_rate: dict[float, list[Mapping[str, Any]]] = {}
        for record in sorted(records, key=lambda record: record["seed"]):
            if record["method"] == method:
                by_rate.setdefault(record["learning_rate"], []).append(record)
        ends = {rate: float(np.mean([_end(run) for run in runs])) for rate, runs in by_rate.items()}
        best = min(ends, key=lambda rate: ends[rate])
        if math.isfinite(ends[best]):
            losses = np.array([[point["loss"] for point in run["held_out"]] for run in by_rate[best]])
            found.append(Outcome(method, best, [run["seed"] for run in by_rate[best]], losses))
    return found


def _end(run: Mapping[str, Any]) -> float:
    return math.inf if run["diverged"] else float(run["validation"][-1]["loss"])


def table(records: Sequence[Mapping[str, Any]], steps: Sequence[int], reference: str = "default") -> str:
    """Mean held-out losses by step, and the paired difference from `reference` at the end with its 95 % interval."""
    found = outcomes(records)
    base = next((outcome for outcome in found if outcome.method == reference), None)
    lines = [f"{'method':<12}{'rate':>8}" + "".join(f"{f'step {step}':>10}" for step in steps) + f"   − {reference}"]
    for outcome in found:
        line = f"{outcome.method:<12}{outcome.learning_rate:>8.0e}"
        line += "".join(f"{mean:>10.4f}" for mean in outcome.losses.mean(0))
        if base is not None and base is not outcome:
            line += f"   {_paired(outcome, base)}"
        lines.append(line)
    return "\n".join(lines)


def _paired(outcome: Outcome, base: Outcome) -> str:
    both = [seed for seed in outcome.seeds if seed in base.seeds]
    differences = outcome.ends(both) - base.ends(both)
    if len(both) < 2:
        return "one seed: no interval" if both else "no common seed"
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{differences.mean():+.4f} ± {half:.4f}"


def main() -> None:
    """Pre-trains, runs everything, writes and prints."""
    options = _options()
    torch.set_num_threads(1)
    settings = Settings(
        learning_rates=options.learning_rates,
        eval_steps=tuple(sorted({step for step in options.eval_steps if step < options.steps} | {options.steps})),
        steps=options.steps,
        batch_size=options.batch_size,
        rank=options.rank,
        alpha=options.alpha,
        samples=options.samples,
        head=options.head,
    )
    start = time.perf_counter()
    weights, known = pretrained()
    task = Task(weights, *parts(digits(NEW)))
    sizes = [len(part.classes) for part in (task.train, task.validation, task.held_out)]
    print(f"pre-trained in {time.perf_counter() - start:.1f} s: {known}; new digits: {sizes}", flush=True)
    setting = {
        "kind": "setting",
        "machine": machine(),
        "settings": dataclasses.asdict(settings),
        "methods": options.methods,
        "seeds": options.seeds,
        "pretraining": {**PRETRAINING, **known},
        "split": dict(zip(("train", "validation", "held_out"), sizes, strict=True)),
        "data_sha256": hashlib.sha256(task.train.pixels.numpy().tobytes() + task.held_out.pixels.numpy().tobytes())
        .hexdigest(),
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w") as file:
        records = _run_all(options, settings, task, lambda record: _write(file, record), setting)
    if records:
        print(table(records, settings.eval_steps))
    print(f"{len(records)} runs in {time.perf_counter() - start:.0f} s: {options.output}")


def _run_all(
    options: argparse.Namespace,
    settings: Settings,
    task: Task,
    write: Callable[[Mapping[str, Any]], None],
    setting: Mapping[str, Any],
) -> list[dict[str, Any]]:
    write(setting)
    records: list[dict[str, Any]] = []
    pairs = [(method, seed) for seed in options.seeds for method in options.methods]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(compare, method, seed, settings, task): (method, seed) for method, seed in pairs}
        for number, done in enumerate(as_completed(running), start=1):
            method, seed = running[done]
            fault = done.exception()
            error = "" if fault is None else f"{type(fault).__name__}: {fault}"
            found = done.result() if fault is None else []
            for record in found or [{"kind": "failed", "method": method, "seed": seed, "error": error}]:
                write(record)
            records += found
            print(f"{number}/{len(pairs)} {method} seed {seed} {error}".rstrip(), flush=True)
    return records


def _write(file: Any, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, allow_nan=False) + "\n")
    file.flush()


def _numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(","))


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}; there are {', '.join(METHODS)}")
    return names


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=_names, default=list(METHODS))
    parser.add_argument("--seeds", type=_numbers(int), default=(0, 1, 2, 3, 4))
    parser.add_argument("--learning-rates", type=_numbers(float), default=(1e-3, 2e-3, 5e-3, 1e-2, 2e-2))
    parser.add_argument("--eval-steps", type=_numbers(int), default=(0, 3, 10, 30, 60))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=8)
    parser.add_argument("--samples", type=int, default=128, help="what a data-driven initialisation reads")
    parser.add_argument("--head", choices=("random", "probe"), default="random")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/vit_digits.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
