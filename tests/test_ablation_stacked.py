"""Adapters trained together against each one trained alone, by stock PEFT and torch's AdamW."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_da_core import adapter
from lora_da_core.ablation import baselines, make_grid, run_grid
from lora_da_core.ablation.finetune import TrainingData, finetune
from lora_da_core.ablation.settings import FinetuneSettings
from lora_da_core.ablation.stacked import Member, finetune_together
from lora_da_core.ablation.workspace import Workspace
from lora_da_core.data import IGNORED, batches
from lora_da_core.errors import AdapterError, OptionError
from lora_da_core.registry import Registry
from lora_da_core.types import LoraFactors

SETTINGS = FinetuneSettings(steps=5, learning_rates=(1e-2,), eval_steps=(0, 2, 5), batch_size=4, weight_decay=0.01)


def tiny_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        shape = LlamaConfig(
            vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(shape).eval().requires_grad_(False)


def random_samples(count, seed):
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(6, 14, (), generator=draw))
        ids = torch.randint(1, 29, (length,), generator=draw).tolist()
        samples.append({"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]})
    return samples


HELD_OUT = batches(random_samples(3, 100), pad_token_id=0, batch_size=2)


def training_data(seed):
    return TrainingData(random_samples(7, seed), HELD_OUT, 0, seed)


def lora(rank):
    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")


def random_factors(specs, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        spec.name: LoraFactors(
            torch.randn(rank, spec.in_features, generator=draw) * 0.1,
            torch.randn(spec.out_features, rank, generator=draw) * 0.1,
        )
        for spec in specs
    }


@pytest.mark.parametrize("tokens_at_once", [10_000, 40])
def test_each_member_trains_as_it_does_alone_with_stock_peft(tokens_at_once):
    settings = replace(SETTINGS, tokens_at_once=tokens_at_once)
    model = tiny_model()
    targets = adapter.resolve_targets(model, lora(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cases = [(4, 1e-2, 0), (2, 1e-2, 1), (4, 3e-2, 0)]
    members = [
        Member(random_factors(targets.specs, rank, place), training_data(seed), rate)
        for place, (rank, rate, seed) in enumerate(cases)
    ]
    together = finetune_together(model, targets.modules, targets.specs, members, settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    for member, curve, (rank, rate, _) in zip(members, together, cases, strict=True):
        wrapped = adapter.apply(tiny_model(), lora(rank), member.factors)
        alone = finetune(wrapped, member.data, SETTINGS, rate)
        assert curve.losses == pytest.approx(alone.losses, abs=2e-5)
        assert curve.train_losses == pytest.approx(alone.train_losses, abs=2e-5)
        assert curve.losses[0] != pytest.approx(curve.losses[-1], abs=1e-3)


def test_a_frozen_a_stays_and_the_rest_trains_as_it_does_alone():
    model = tiny_model()
    targets = adapter.resolve_targets(model, lora(4))
    start = random_factors(targets.specs, 4, 0)
    members = [Member(start, training_data(0), 1e-2, frozen="A"), Member(start, training_data(0), 1e-2)]
    together = finetune_together(model, targets.modules, targets.specs, members, SETTINGS)
    wrapped = adapter.apply(tiny_model(), lora(4), start)
    adapter.settle(wrapped, start, "default", offset="none", frozen="A")
    alone = finetune(wrapped, members[0].data, SETTINGS, 1e-2)
    assert together[0].losses == pytest.approx(alone.losses, abs=2e-5)
    assert together[0].losses[-1] != pytest.approx(together[1].losses[-1], abs=1e-4)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_what_an_initialisation_took_out_of_the_base_is_an_offset(name):
    data, model = training_data(0), tiny_model()
    targets = adapter.resolve_targets(model, lora(4))
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": False}
    wrapped = baselines.initialise(name, tiny_model(), list(targets.modules), [], settings)
    start = baselines.factors_of(wrapped)
    plain = get_peft_model(tiny_model(), lora(4))
    other = Member(baselines.factors_of(plain), data, 1e-2)
    members = [Member(start, data, 1e-2, baselines.offset_of(wrapped, model, start)), other]
    together = finetune_together(model, targets.modules, targets.specs, members, SETTINGS)
    alone = finetune(wrapped, data, SETTINGS, 1e-2)
    assert together[0].losses == pytest.approx(alone.losses, abs=5e-5)
    assert together[1].losses == pytest.approx(finetune(plain, data, SETTINGS, 1e-2).losses, abs=2e-5)


def test_an_offset_that_is_not_the_start_is_refused():
    model = tiny_model()
    wrapped = get_peft_model(tiny_model(), lora(4))
    wrapped.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight += 0.1
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj"):
        baselines.offset_of(wrapped, model, baselines.factors_of(wrapped))


def test_members_must_share_their_held_out_batches():
    model, data = tiny_model(), training_data(0)
    targets = adapter.resolve_targets(model, lora(4))
    start = random_factors(targets.specs, 4, 0)
    other = TrainingData(data.samples, batches(random_samples(3, 5), pad_token_id=0), 0, 1)
    with pytest.raises(OptionError, match="held-out"):
        finetune_together(
            model, targets.modules, targets.specs, [Member(start, data, 1e-2), Member(start, other, 1e-2)], SETTINGS
        )


def test_other_layers_than_linear_ones_are_refused(world, tmp_path):
    model = tiny_model()
    targets = adapter.resolve_targets(model, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    start, data = random_factors(targets.specs, 2, 0), training_data(0)
    message = "layer model.embed_tokens is of kind 'embedding'; only linear layers are trained together"
    with pytest.raises(OptionError, match=message):
        finetune_together(model, targets.modules, targets.specs, [Member(start, data, 1e-2)], SETTINGS)
    # In a grid before any cell is estimated.
    tune = {"steps": 3, "learning_rates": [1e-2], "eval_steps": [0, 3], "batch_size": 4, "held_out": 12, "together": 4}
    settings = {"model": str(world / "model"), "data": str(world / "data.jsonl"), "samples": 12, "device": "cpu"}
    settings |= {"reference": "none", "target_modules": ["embed_tokens", "q_proj"], "finetune": tune}
    with pytest.raises(OptionError, match=message):
        list(run_grid({"run": settings, "grid": [{"rank": [2]}]}, tmp_path / "out"))


def test_one_member_that_diverges_leaves_the_others_alone():
    model, data = tiny_model(), training_data(0)
    targets = adapter.resolve_targets(model, lora(4))
    start = random_factors(targets.specs, 4, 0)
    wild = {name: LoraFactors(pair.A * float("inf"), pair.B) for name, pair in start.items()}
    pair = finetune_together(
        model, targets.modules, targets.specs, [Member(start, data, 1e-2), Member(wild, data, 1e-2)], SETTINGS
    )
    alone = finetune_together(model, targets.modules, targets.specs, [Member(start, data, 1e-2)], SETTINGS)
    assert pair[0].losses == pytest.approx(alone[0].losses, abs=2e-5)
    assert all(loss != loss for loss in pair[1].losses)


class TestInAGrid:
    """The runner with adapters trained together gives what it gives when each is trained alone."""

    GRID: ClassVar = [
        {"baseline": ["default", "pissa"], "rank": [2, 3]},
        {"preset": ["robust", "lora_one"], "rank": [2]},
    ]

    def run(self, world, directory, **finetune):
        tune = {"steps": 3, "learning_rates": [1e-2, 3e-2], "eval_steps": [0, 3], "batch_size": 4, "held_out": 12}
        settings = {"model": str(world / "model"), "data": str(world / "data.jsonl"), "samples": 12, "device": "cpu"}
        settings |= {"reference": "none", "seeds": [0, 1], "finetune": {**tune, **finetune}}
        return run_grid({"run": settings, "grid": self.GRID}, directory)

    def test_together_and_alone_agree(self, world, tmp_path):
        alone = {record["cell"]: record for record in self.run(world, tmp_path / "alone")}
        together = {record["cell"]: record for record in self.run(world, tmp_path / "together", together=6)}
        assert together.keys() == alone.keys() and len(alone) == 12
        for cell, record in together.items():
            assert record["status"] == "done" and record["digest"] == alone[cell]["digest"]
            for ours, theirs in zip(record["curves"], alone[cell]["curves"], strict=True):
                assert ours["learning_rate"] == theirs["learning_rate"] and ours["steps"] == theirs["steps"]
                assert ours["losses"] == pytest.approx(theirs["losses"], abs=5e-5)

    def test_what_a_line_search_reads_is_recorded(self, world, tmp_path):
        for record in self.run(world, tmp_path / "out", together=6):
            if record["baseline"]:
                assert record["searched"] is None
            else:
                losses, rest = divmod(record["searched"], 16)
                assert rest == 0 and losses >= 4  # the base, two that bracket the best, and the best

    def test_what_fails_together_is_recorded_for_each(self, world, tmp_path, monkeypatch):
        def fail(*args):
            raise torch.OutOfMemoryError("too many")

        monkeypatch.setattr("lora_da_core.ablation.cells.finetune_together", fail)
        records = self.run(world, tmp_path / "out", together=6)
        assert {record["status"] for record in records} == {"failed"}
        assert all("too many" in record["error"] for record in records)

    def test_a_validation_part_leaves_the_held_out_rows_unread(self, world):
        tune = {"steps": 1, "learning_rates": [1e-2], "eval_steps": [0], "batch_size": 4, "held_out": 12}
        settings = {"model": str(world / "model"), "data": str(world / "data.jsonl"), "samples": 8, "device": "cpu"}

        def rows(**more):
            grid = make_grid({"run": {**settings, "finetune": {**tune, **more}}, "grid": {"rank": [2]}})
            space = Workspace(grid.run, Registry())
            parts = (space.rows, space.pool, space.kept_out)
            return [{part[place]["question"] for place in range(len(part))} for part in parts]

        everything, pool, held_out = rows()
        _, smaller, validation = rows(validation=10)
        assert len(held_out) == 12 and len(validation) == 10
        assert validation <= pool and not validation & held_out
        assert smaller == pool - validation and pool | held_out == everything
