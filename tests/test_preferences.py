"""The preference objectives against autograd, closed forms and TRL's own loss, and the layout of its batches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_da_core
from conftest import make_tiny_llama
from lora_da_core import DataError, LoraDAConfig, OptionError
from lora_da_core.interfaces import Objective
from lora_da_core.registry import Registry

Batch = dict[str, Tensor]
ROWS = [
    {
        "prompt_ids": [1 + place % 7, 3, 4],
        "chosen_ids": [5 + place % 9, 6, 7, 8][: 2 + place % 3],
        "rejected_ids": [9, 10 + place % 5, 11][: 1 + place % 3],
    }
    for place in range(12)
]


def objective(name: str, **options: Any) -> Objective[Any]:
    made: Objective[Any] = Registry().create("objective", (name, options))
    return made


def collated(rows: list[dict[str, list[int]]]) -> Batch:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch: Batch = DataCollatorForPreference(pad_token_id=0)(rows)
    return batch


def pairs(rows: list[dict[str, list[int]]] = ROWS) -> Any:
    return next(iter(lora_da_core.preference_batches([collated(rows)])))


def summed(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """log π(completion | prompt), one text alone and without padding."""
    ids = torch.tensor([prompt + completion])
    log_p = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return log_p[places, ids[0, len(prompt) :]].sum()


@pytest.mark.parametrize("average", [False, True])
def test_losses_are_the_formula_text_by_text(average: bool) -> None:
    model, reference = make_tiny_llama(torch.float64), make_tiny_llama(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    given = objective("rpo", average=average).complete(reference, pairs())
    expected_rpo, expected_dpo = [], []
    beta, eta = (0.5, 0.2) if average else (0.01, 0.005)
    with torch.no_grad():
        for row in ROWS:
            texts = (row["chosen_ids"], row["rejected_ids"])
            policy = [summed(model, row["prompt_ids"], text) for text in texts]
            base = [summed(reference, row["prompt_ids"], text) for text in texts]
            margin = policy[0] - base[0] - policy[1] + base[1]
            expected_dpo.append(-torch.log(torch.sigmoid(0.3 * margin)))
            if average:
                sizes = [len(text) for text in texts]
                margin = (policy[0] - base[0]) / sizes[0] - (policy[1] - base[1]) / sizes[1]
                policy = [policy[0] / sizes[0]]
            expected_rpo.append(-torch.log(torch.sigmoid(beta * margin)) - eta * policy[0])
        torch.testing.assert_close(
            objective("rpo", average=average).losses(model, given), torch.stack(expected_rpo), rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(
            objective("dpo", beta=0.3).losses(model, given), torch.stack(expected_dpo), rtol=1e-10, atol=1e-12
        )


class Given(torch.nn.Module):
    """A model whose next-token log-probabilities are a parameter, so that ∂L/∂log π can be read off."""

    def __init__(self, log_p: Tensor) -> None:
        super().__init__()
        self.log_p = torch.nn.Parameter(log_p)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        # Two classes; that of label 0 has log-probability log_p.
        first = self.log_p
        return (torch.stack([first, torch.log1p(-first.exp())], -1),)


@pytest.mark.parametrize(("name", "beta", "eta"), [("dpo", 0.1, 0.0), ("rpo", 0.01, 0.005), ("rpo", 2.0, 0.7)])
@pytest.mark.parametrize("at_start", [True, False])
def test_the_gradient_in_the_log_probabilities_is_exact(name: str, beta: float, eta: float, at_start: bool) -> None:
    log_p = torch.tensor([[-0.5, 0.0], [-1.2, 0.0], [-0.3, 0.0], [-0.9, 0.0]], dtype=torch.float64)
    log_p[:, 1] = -0.7
    model = Given(log_p)
    ids = torch.zeros(2, 2, 2, dtype=torch.int64)
    batch: Any = {"input_ids": ids, "labels": ids}
    margin = torch.zeros(2, dtype=torch.float64)
    if not at_start:
        references = torch.tensor([[-2.0, -0.1], [-0.2, -3.0]], dtype=torch.float64)
        batch |= {"ref_chosen_logps": references[:, 0], "ref_rejected_logps": references[:, 1]}
        ratio = log_p[:, 0].view(2, 2) - references
        margin = ratio[:, 0] - ratio[:, 1]
    options = {"beta": beta} if name == "dpo" else {"beta": beta, "eta": eta}
    objective(name, **options).losses(model, batch).sum().backward()
    found = model.log_p.grad[:, 0].view(2, 2)  # type: ignore[index]
    pull = beta * torch.sigmoid(-beta * margin)
    torch.testing.assert_close(found, torch.stack([-pull - eta, pull], 1), rtol=1e-12, atol=1e-14)
    if at_start:
        assert pull.tolist() == [beta / 2, beta / 2]


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_the_result_does_not_depend_on_batching(name: str) -> None:
    pipeline = lora_da_core.build_pipeline(objective=name, config=LoraDAConfig(damping=1e-2))
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = make_tiny_llama(torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole, cut = (
        pipeline.run(model, lora_da_core.preference_batches([collated(ROWS[i : i + k]) for i in range(0, 12, k)]), lora)
        for k in (12, 5)
    )
    assert whole.report.samples == 12
    for key, factors in whole.factors.items():
        product = factors.B @ factors.A
        assert float(product.norm()) > 0
        torch.testing.assert_close(product, cut.factors[key].B @ cut.factors[key].A, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_first_step_lowers_the_preference_loss() -> None:
    batches = lora_da_core.preference_batches([collated(ROWS)])
    pipeline = lora_da_core.build_pipeline(objective="dpo")
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    base = make_tiny_llama()
    given = objective("dpo").complete(base, pairs())
    model = lora_da_core.get_lora_da_model(base, lora, batches, pipeline=pipeline)
    with torch.no_grad():
        start = objective("dpo").losses(model, given).mean()
    assert float(start) < 0.693147 - 1e-3


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(OptionError, match="cannot draw"):
        lora_da_core.build_pipeline(objective="dpo", estimator=("kfac", {"labels": "sampled"}))
    with pytest.raises(OptionError, match="beta is 0"):
        objective("dpo", beta=0.0)
    with pytest.raises(OptionError, match="eta is -1"):
        objective("rpo", eta=-1.0)
    with pytest.raises(OptionError, match="beta is -1"):
        objective("rpo", beta=-1.0)
    batch = collated(ROWS[:2])
    for wrong, message in [
        ({**batch, "pixel_values": torch.zeros(2)}, "text alone"),
        ({key: value for key, value in batch.items() if key != "completion_mask"}, "text alone"),
        ({key: value[:3] for key, value in batch.items()}, "odd number"),
        ({key: value[:0] for key, value in batch.items()}, "is empty"),
    ]:
        with pytest.raises(DataError, match=message):
            list(lora_da_core.preference_batches([wrong]))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    flat = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    with pytest.raises(DataError, match="preference_batches makes them"):
        lora_da_core.build_pipeline(objective="dpo").run(make_tiny_llama(), [flat], lora)


def test_pairs_without_a_completion_are_left_out() -> None:
    rows = [*ROWS, {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": []}]
    counts = objective("dpo").label_counts(pairs(rows))
    assert counts[-1] == 0 and bool((counts[:-1] > 0).all())


def dpo_trainer(directory: Path, world: Path, **settings: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": f"Q : w{i % 9} w{i % 7}", "chosen": f" A : w{i % 5} w3 w3", "rejected": f" A : w{i % 4} w1"}
        for i in range(40)
    ]
    arguments = DPOConfig(
        output_dir=str(directory), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], seed=0, disable_tqdm=True, use_cpu=True, bf16=False, max_length=32,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DPOTrainer(
            model, args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(world / "model"),
            peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip


def test_trls_trainer_starts_lower(tmp_path: Path, world: Path) -> None:
    first = {}
    for name in ("plain", "ours"):
        trainer = dpo_trainer(tmp_path, world, beta=0.2)
        if name == "ours":
            report = lora_da_core.init_before_training(trainer, samples=16)
            assert report.components["objective"] == "dpo" and report.options["objective"] == {"beta": 0.2}
            assert report.samples == 16
        trainer.train()
        first[name] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    # TRL's own loss: log 2 where the policy is the reference.
    assert first["plain"] == pytest.approx(0.6931, abs=1e-3)
    assert first["ours"] < first["plain"] - 1e-3


@pytest.mark.parametrize(
    ("name", "options", "losses"),
    [
        ("dpo", {"beta": 0.3}, {"sigmoid": lambda tokens: 1.0}),
        # TRL averages the likelihood over tokens; RPO's own sums it.
        ("rpo", {"beta": 0.3, "eta": 0.4}, {"sigmoid": lambda tokens: 1.0, "sft": lambda tokens: 0.4 * tokens}),
        (
            "rpo",
            {"average": True, "beta": 0.3, "eta": 0.4},
            {"sigmoid_norm": lambda tokens: 1.0, "sft": lambda tokens: 0.4},
        ),
    ],
)
def test_losses_and_gradients_are_trls_own(
    name: str, options: dict[str, Any], losses: dict[str, Any], tmp_path: Path, world: Path
) -> None:
    """Away from the start, pair by pair, with an adapter on the model; TRL's losses as its trainer computes them."""
    trainer = dpo_trainer(tmp_path, world, beta=0.3, loss_type=list(losses))
    model = trainer.model.eval()
    draw = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    ours = objective(name, **options)
    distances = []
    for row in list(trainer.train_dataset)[:4]:
        batch = trainer.data_collator([row])
        trainer.loss_weights = [weight(int(batch["completion_mask"][0].sum())) for weight in losses.values()]
        expected = trainer.compute_loss(model, dict(batch))
        pair = next(iter(lora_da_core.preference_batches([batch])))
        with model.disable_adapter(), torch.no_grad():
            complete = ours.complete(model, pair)
        found = ours.losses(model, complete)
        assert found.shape == (1,)
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
        theirs = torch.autograd.grad(expected, trained)
        for gradient, reference in zip(torch.autograd.grad(found[0], trained), theirs, strict=True):
            assert float((gradient - reference).norm()) <= 1e-4 * float(reference.norm())
        distances.append(abs(float(expected.detach()) - 0.6931))
    assert max(distances) > 0.05  # not where every margin is zero


def test_another_preference_loss_needs_a_pipeline(tmp_path: Path, world: Path) -> None:
    trainer = dpo_trainer(tmp_path, world, loss_type=["hinge"])
    with pytest.raises(OptionError, match="loss_type is"):
        lora_da_core.init_before_training(trainer)
    report = lora_da_core.init_before_training(
        trainer, pipeline=lora_da_core.build_pipeline(objective="rpo"), samples=8
    )
    assert report.components["objective"] == "rpo"


def test_a_reference_that_is_given_is_kept() -> None:
    model = get_peft_model(make_tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    given = {**pairs(), "ref_chosen_logps": torch.full((12,), -3.0), "ref_rejected_logps": torch.full((12,), -4.0)}
    assert objective("dpo").complete(model, given) is given
