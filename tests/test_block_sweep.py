"""One sweep over blocks: the sums of one ordinary pass, and passes where a model does not run block by block."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional

import lora_da_core
import tiny_models
from conftest import assert_same, make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, adapter, block_sweep, capture, estimate_memory
from lora_da_core.block_sweep import BlockSweep
from lora_da_core.block_trial import PASSES_INSTEAD, fault, obstacle
from lora_da_core.blocks import find_blocks
from lora_da_core.budget import within, workload_of
from lora_da_core.capture import CaptureTask, SweepSettings
from lora_da_core.components import Setup
from lora_da_core.finish import Finish
from lora_da_core.memory import Plan, activations
from lora_da_core.memory.activations import BatchShape
from lora_da_core.memory.workload import Workload
from lora_da_core.preparation import job_of
from lora_da_core.world import ALONE
from test_memory import counted_flops

FIXED = LoraDAConfig(gamma=64.0)


def task_of(model: nn.Module, batches: Any, targets: Any = "all-linear", **parts: Any) -> CaptureTask:
    settings = {"r": 2, "target_modules": targets}
    settings.update(parts.pop("lora", {}))
    pipeline = lora_da_core.build_pipeline(config=FIXED, **parts)
    return pipeline.estimate(model, batches, LoraConfig(**settings)).task


def parts_of(task: CaptureTask, size: int = 1) -> list[list[str]]:
    """So many blocks in every part, the last first; what follows them goes with the last."""
    blocks = find_blocks(task.model, {spec.name: task.modules[spec.name] for spec in task.specs})
    assert blocks is not None
    count = len(blocks.modules)
    numbers = {spec.name: min(blocks.numbers.get(spec.name, count), count - 1) // size for spec in task.specs}
    return [[name for name in numbers if numbers[name] == each] for each in sorted(set(numbers.values()), reverse=True)]


def sums(statistics: Any) -> dict[str, dict[str, Tensor]]:
    return {
        name: {
            **{f"layer {key}": value for key, value in layer.fisher.statistics().items()},
            **{f"input {key}": value for key, value in layer.group.accumulator.statistics().items()},
            **{f"gradient {key}": value for key, value in layer.gradient.statistics().items()},
            "tokens": torch.tensor(layer.tokens),
        }
        for name, layer in statistics.layers.items()
        if layer.group is not None
    }


def swept(
    task: CaptureTask, batches: Any, parts: Sequence[Sequence[str]], skip: int = 0
) -> dict[str, dict[str, Tensor]]:
    sweep, found = BlockSweep(task, batches, parts), {}
    for part in parts[skip:]:
        own = dataclasses.replace(
            task,
            specs=[spec for spec in task.specs if spec.name in part],
            beside=[spec for spec in task.specs if spec.name not in part],
        )
        statistics = sweep.collect(own)
        found.update(sums(statistics))
        assert statistics.samples and statistics.label_tokens and statistics.loss_sum
    return found


def assert_equal_sums(task: CaptureTask, batches: Any, parts: Sequence[Sequence[str]]) -> None:
    assert fault(task, batches, parts) is None
    whole = capture.collect(task, batches, generator=torch.Generator())
    expected, found = sums(whole), swept(task, batches, parts)
    assert len(parts) > 1 and found.keys() == expected.keys()
    for name, each in expected.items():
        assert each.keys() == found[name].keys()
        for key, value in each.items():
            assert torch.equal(found[name][key], value), (name, key)


def small(config: Any, **settings: Any) -> Any:
    common = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return config(**{**common, **settings})


def causal(config: Any) -> nn.Module:
    return tiny_models.made(lambda: transformers.AutoModelForCausalLM.from_config(config), torch.float32)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: make_tiny_llama(num_hidden_layers=4),
    "gpt2": lambda: causal(transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
    "gemma": lambda: causal(small(transformers.Gemma2Config, head_dim=8, sliding_window=4)),
    "gemma3": lambda: causal(small(transformers.Gemma3TextConfig, head_dim=8, sliding_window=4)),
    "qwen2": lambda: causal(small(transformers.Qwen2Config)),
    "opt": lambda: causal(
        transformers.OPTConfig(
            vocab_size=61,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    ),
    "neox": lambda: causal(small(transformers.GPTNeoXConfig)),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_sums_are_those_of_one_pass(model: str, size: int) -> None:
    batches = make_batches(make_samples())
    task = task_of(MODELS[model](), batches)
    assert_equal_sums(task, batches, parts_of(task, size))


@pytest.mark.parametrize("settings", [SweepSettings("host"), SweepSettings("host", head_alone=True)], ids=str)
def test_hidden_states_on_the_host_and_a_head_by_itself_give_the_same(settings: SweepSettings) -> None:
    batches = make_batches(make_samples())
    task = dataclasses.replace(task_of(MODELS["llama"](), batches), sweep=settings)
    assert_equal_sums(task, batches, parts_of(task, 2))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe"])
def test_experts_are_swept(kind: str, implementation: str) -> None:
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    model = causal(small(getattr(transformers, f"{kind}Config"), num_local_experts=4, num_experts=4, **sizes))
    model.set_experts_implementation(implementation)  # type: ignore[operator]
    batches = make_batches(make_samples())
    lora = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    task = task_of(model, batches, ["q_proj", "o_proj"], lora=lora)
    assert any(spec.expert for spec in task.specs)
    assert_equal_sums(task, batches, parts_of(task))


def test_images_and_classes_are_swept() -> None:
    for model, batch, objective in (
        (tiny_models.vit(), tiny_models.images(), "image_classification"),
        (tiny_models.bert(), tiny_models.texts(), "sequence_classification"),
        (tiny_models.llama_classifier(), tiny_models.texts(), "sequence_classification"),
    ):
        batches = [{**batch, "labels": tiny_models.classes()}]
        task = task_of(model, batches, objective=objective)
        assert_equal_sums(task, batches, parts_of(task))


def test_a_head_that_is_adapted_goes_with_the_last_blocks_or_alone() -> None:
    batches = make_batches(make_samples())
    task = task_of(MODELS["llama"](), batches, ["q_proj", "down_proj", "lm_head"])
    together = parts_of(task)
    assert "lm_head" in together[0] and len(together[0]) == 3
    assert_equal_sums(task, batches, together)
    alone = [["lm_head"], [name for name in together[0] if name != "lm_head"], *together[1:]]
    assert_equal_sums(task, batches, alone)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_that_is_on_changes_nothing(reentrant: bool, model_unchanged: Any) -> None:
    model, batches = MODELS["llama"](), make_batches(make_samples())
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    task = task_of(model, batches)
    model_unchanged(model)
    assert_equal_sums(task, batches, parts_of(task))


def test_masked_samples_and_batches_without_labels_are_left_out() -> None:
    batches = make_batches(make_samples(16))
    batches[1]["labels"][:] = -100
    batches[2]["labels"][[0, 2]] = -100
    task = task_of(MODELS["llama"](), batches)
    assert_equal_sums(task, batches, parts_of(task))


def cached_loss(model: nn.Module, batch: Any) -> Tensor:
    """A loss of the user's own, whose model fills a cache of keys and values as it runs."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=True)
    logits = output.logits[:, :-1].transpose(1, 2)
    return functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").sum(1)


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma3"])
def test_an_objective_of_the_user_s_own_is_swept_with_a_cache(model: str) -> None:
    batches = make_batches(make_samples())
    task = task_of(MODELS[model](), batches, objective=cached_loss)
    assert_equal_sums(task, batches, parts_of(task))


def test_parts_that_are_not_asked_for_pass_the_gradient_on() -> None:
    batches = make_batches(make_samples())
    task = task_of(MODELS["llama"](), batches)
    parts = parts_of(task)
    all_of_them = swept(task, batches, parts)
    for skip in (1, 3):
        later = swept(task, batches, parts, skip)
        assert len(later) == 7 * (4 - skip)
        for name, each in later.items():
            assert all(torch.equal(each[key], all_of_them[name][key]) for key in each), name


def test_layers_of_some_blocks_only() -> None:
    batches = make_batches(make_samples())
    task = task_of(MODELS["llama"](), batches, ["q_proj", "up_proj"], lora={"layers_to_transform": [1, 2]})
    assert_equal_sums(task, batches, parts_of(task))


# Models that do not run block by block


class Odd(nn.Module):
    """A language model of four blocks that does something between them."""

    def __init__(self, between: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)) for _ in range(4))
        self.head = nn.Linear(16, 61)
        self.between = between

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        hidden = second = self.embedding(input_ids)
        for number, block in enumerate(self.blocks):
            hidden = block(hidden)
            second = hidden if number == 0 else second
            hidden = self.between(number, hidden, second)
        return (self.head(hidden),)


def odd_loss(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["input_ids"])[0][:, :-1].transpose(1, 2)
    return functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").sum(1)


ODD_LAYERS = r"blocks\.\d\.[02]"


def odd_model(between: Callable[[int, Tensor, Tensor], Tensor]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Odd(between)


def odd_task(between: Callable[[int, Tensor, Tensor], Tensor], batches: Any) -> CaptureTask:
    return task_of(odd_model(between), batches, ODD_LAYERS, objective=odd_loss)


def plainly(number: int, hidden: Tensor, second: Tensor) -> Tensor:
    return hidden


def skipping(number: int, hidden: Tensor, second: Tensor) -> Tensor:
    return hidden.add_(second) if number == 2 else hidden


def scaling(number: int, hidden: Tensor, second: Tensor) -> Tensor:
    return hidden.mul_(0.5) if number == 1 else hidden


def copying(number: int, hidden: Tensor, second: Tensor) -> Tensor:
    return hidden.clone() if number == 1 else hidden


@pytest.mark.parametrize(
    ("between", "says"),
    [(skipping, "another gradient reaches"), (scaling, "another gradient"), (copying, "block 2 is not given")],
)
def test_what_happens_between_blocks_is_noticed(between: Any, says: str, model_unchanged: Any) -> None:
    batches = make_batches(make_samples())
    plain = odd_task(plainly, batches)
    assert_equal_sums(plain, batches, parts_of(plain))
    task = odd_task(between, batches)
    model_unchanged(task.model)
    assert says in (fault(task, batches, parts_of(task)) or "")


def test_other_uses_of_hidden_states_are_noticed() -> None:
    def regularised(model: nn.Module, batch: Any) -> Tensor:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        return cached_loss(model, batch) + output.hidden_states[2].square().mean((1, 2))

    def twice(model: nn.Module, batch: Any) -> Tensor:
        return cached_loss(model, batch) + cached_loss(model, batch)

    def measured(model: nn.Module, batch: Any) -> Tensor:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        logits = output.logits[:, :-1].transpose(1, 2)
        loss = functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").sum(1)
        return loss + 30 * output.hidden_states[2].square().mean((1, 2))

    batches = make_batches(make_samples())
    for objective, says in (
        (regularised, "block 0 ran where block 4 was to follow"),
        (twice, "block 0 ran where block 4 was to follow"),
        (measured, "another gradient reaches"),
    ):
        task = task_of(MODELS["llama"](), batches, objective=objective)
        assert says in (fault(task, batches, parts_of(task)) or "")


def test_an_encoder_decoder_is_not_swept() -> None:
    batches = [{**tiny_models.texts(), "labels": tiny_models.targets()}]
    task = task_of(tiny_models.t5(), batches, objective="seq2seq")
    assert "runs elsewhere than in its block" in (fault(task, batches, parts_of(task)) or "")


def test_a_decoder_whose_encoder_is_left_alone_is_swept() -> None:
    batches = [{**tiny_models.texts(), "labels": tiny_models.targets()}]
    task = task_of(tiny_models.t5(), batches, r"decoder\..*SelfAttention\.(q|k|v|o)", objective="seq2seq")
    assert_equal_sums(task, batches, parts_of(task))


def test_a_layer_that_runs_outside_its_block_too_is_noticed() -> None:
    batches = make_batches(make_samples())
    model: Any = odd_model(plainly)
    task = task_of(model, batches, ODD_LAYERS, objective=odd_loss)
    first = model.blocks[0]
    for again, says in (
        (first, "block 0 ran where block 4 was to follow"),
        (lambda hidden: first[0](hidden)[..., :16], "layer blocks.0.0 runs elsewhere than in its block"),
    ):

        def between(number: int, hidden: Tensor, second: Tensor, again: Any = again) -> Tensor:
            return hidden if number < 3 else hidden + again(hidden)

        model.between = between
        assert says in (fault(task, batches, parts_of(task)) or "")


def test_a_model_that_cannot_be_run_again_is_told(model_unchanged: Any) -> None:
    def failing(number: int, hidden: Tensor, second: Tensor) -> Tensor:
        if not hidden.requires_grad:
            raise RuntimeError("only in training")
        return hidden

    batches = make_batches(make_samples())
    model = odd_task(plainly, batches)
    model_unchanged(model.model)
    model.model.between = failing  # type: ignore[assignment]
    assert "RuntimeError" in (fault(model, batches, parts_of(model)) or "")


# Runs within a limit

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def four_blocks() -> nn.Module:
    return make_tiny_llama(num_hidden_layers=4, hidden_size=64, intermediate_size=160)


def limited(pipeline: Any, model: nn.Module, batches: Any, lora: LoraConfig = LORA) -> tuple[int, Plan]:
    """A limit that a sweep keeps with whole batches, and its plan."""

    def plan(limit: int | None = None) -> Plan:
        return estimate_memory(model, lora, pipeline=pipeline, workload=workload_of(batches), max_memory=limit)

    whole = plan()
    for percent in range(95, 20, -5):
        limit = whole.weights + (whole.peak_bytes - whole.weights) * percent // 100
        found = plan(limit)
        if found.schedule == "blocks" and len(found.parts) > 2 and found.batch_size == whole.batch_size:
            return limit, found
    raise AssertionError("no limit asks for parts of blocks")


@pytest.mark.parametrize("config", [FIXED, LoraDAConfig(), LoraDAConfig(rounds=2)], ids=["fixed", "auto", "rounds"])
def test_a_run_within_a_limit_gives_the_factors_of_one_pass(config: LoraDAConfig, model_unchanged: Any) -> None:
    model, batches = four_blocks(), make_batches(make_samples(), extra_padding=8)
    pipeline = lora_da_core.build_pipeline(config=config)
    limit, plan = limited(pipeline, model, batches)
    model_unchanged(model)
    found = pipeline.run(model, batches, LORA, max_memory=limit)
    (note,) = [note for note in found.report.notes if note.startswith("planned for a limit")]
    assert f"one sweep over the data of a round in {len(plan.parts)} parts of blocks" in note
    assert not any(note.startswith(PASSES_INSTEAD) for note in found.report.notes)
    assert_same(found, pipeline.run(model, batches, LORA))


def test_a_plan_of_a_sweep_says_so() -> None:
    pipeline = lora_da_core.build_pipeline(config=FIXED)
    limit, plan = limited(pipeline, four_blocks(), make_batches(make_samples(), extra_padding=8))
    assert plan.passes == 1 < len(plan.parts) and plan.peak_bytes <= limit
    assert 1 < plan.relative_time < 1.5 and plan.hidden_states == "device" and plan.hidden_bytes > 0
    told = plan.to_json()
    assert (told["schedule"], told["passes"]) == ("blocks", 1)
    blocks = [{name.split(".")[2] for name in part} for part in plan.parts]
    assert [number for part in blocks for number in sorted(part, reverse=True)] == ["3", "2", "1", "0"]
    assert f"{len(plan.parts)} parts" in repr(plan) and "parts of blocks" in plan._repr_html_()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"estimator": "ekfac"}, "makes 2 passes"),
        ({"estimator": ("kfac", {"labels": "sampled"})}, "draws labels"),
        ({"estimator": ("kfac", {"output": "identity"}), "gradient": "zeroth_order"}, "nothing is differentiated"),
    ],
)
def test_what_keeps_a_run_from_a_sweep_is_told(parts: dict[str, Any], says: str) -> None:
    pipeline = lora_da_core.build_pipeline(config=FIXED, **parts)
    model, workload = four_blocks(), workload_of(make_batches(make_samples()))
    plan = functools.partial(estimate_memory, model, LORA, pipeline=pipeline, workload=workload)
    whole = plan()
    found = plan(max_memory=whole.peak_bytes - whole.statistics_bytes // 3)
    assert found.schedule == "passes" and found.passes > pipeline.components.estimator.passes
    assert any(note.startswith(PASSES_INSTEAD) and says in note for note in found.notes)


def test_layers_before_the_blocks_keep_a_run_from_a_sweep() -> None:
    pipeline, batches = lora_da_core.build_pipeline(config=FIXED), make_batches(make_samples())
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj", "o_proj", "up_proj"])
    plan = functools.partial(estimate_memory, four_blocks(), lora, pipeline=pipeline, workload=workload_of(batches))
    whole = plan()
    found = plan(max_memory=whole.peak_bytes - whole.statistics_bytes // 3)
    assert found.schedule == "passes" and "in no list of blocks that can be run" in found.notes[-1]


def test_what_models_keep_a_run_from_a_sweep() -> None:
    parts = lora_da_core.build_pipeline(config=FIXED).components
    model = four_blocks()
    assert obstacle(model, parts.estimator, parts.gradient) is None
    assert "float16" in (obstacle(four_blocks().half(), parts.estimator, parts.gradient) or "")
    model.model.layers[1]._hf_hook = object()  # type: ignore[index,union-attr]
    assert "accelerate" in (obstacle(model, parts.estimator, parts.gradient) or "")


def test_an_encoder_decoder_within_a_limit_takes_passes() -> None:
    batches = [{**tiny_models.texts(), "labels": tiny_models.targets()}]
    pipeline = lora_da_core.build_pipeline(config=FIXED, objective="seq2seq")
    model, lora = tiny_models.t5(), LoraConfig(r=2, target_modules="all-linear")
    plan = functools.partial(estimate_memory, model, lora, pipeline=pipeline, workload=workload_of(batches))
    limit = plan(max_memory=1).peak_bytes
    found = pipeline.run(model, batches, lora, max_memory=limit)
    assert any("passes over the data of a round" in note for note in found.report.notes)
    one_by_one = [{key: value[row : row + 1] for key, value in batches[0].items()} for row in range(6)]
    assert_same(found, pipeline.run(model, one_by_one, lora))


def test_a_model_that_fails_the_trial_takes_passes_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = four_blocks(), make_batches(make_samples(), extra_padding=8)
    pipeline = lora_da_core.build_pipeline(config=FIXED)
    limit, _ = limited(pipeline, model, batches)
    with torch.random.fork_rng(devices=[]):
        expected = pipeline.run(model, batches, LORA)
    # A skip around two blocks that tensors without values do not show: a hook on what the blocks return.
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept[:] = [output]
        return output

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + kept.pop()

    handles = [
        model.model.layers[0].register_forward_hook(keep),  # type: ignore[index,union-attr]
        model.model.layers[2].register_forward_hook(add),  # type: ignore[index,union-attr]
    ]
    found = pipeline.run(model, batches, LORA, max_memory=limit)
    (note,) = [note for note in found.report.notes if note.startswith(PASSES_INSTEAD)]
    assert "block" in note
    for handle in handles:
        handle.remove()
    assert found.report.loss != expected.report.loss


def test_a_later_batch_that_runs_otherwise_takes_passes_with_a_note() -> None:
    batches = make_batches(make_samples())
    width = 7
    batches[2] = {key: value[:, :width] for key, value in batches[2].items()}
    assert all(batch["input_ids"].shape[1] != width for batch in batches[:2])

    def sometimes(number: int, hidden: Tensor, second: Tensor) -> Tensor:
        return hidden.clone() if number == 1 and hidden.shape[1] == width else hidden

    pipeline, lora = (
        lora_da_core.build_pipeline(config=FIXED, objective=odd_loss),
        LoraConfig(target_modules=ODD_LAYERS),
    )
    model = odd_model(sometimes)
    limit, _ = limited(pipeline, odd_model(plainly), batches, lora)
    found = pipeline.run(model, batches, lora, max_memory=limit)
    (note,) = [note for note in found.report.notes if note.startswith(PASSES_INSTEAD)]
    assert "block 2 is not given what block 1 returned" in note
    assert_same(found, pipeline.run(model, batches, lora))


def test_a_sweep_that_runs_out_of_memory_goes_on_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = four_blocks(), make_batches(make_samples(), extra_padding=8)
    pipeline = lora_da_core.build_pipeline(config=FIXED)
    limit, _ = limited(pipeline, model, batches)
    calls: list[int] = []
    advance = block_sweep.Sweep.advance

    def short(sweep: Any, task: CaptureTask, on_progress: Any) -> Any:
        # The trial passes over parts without layers.
        calls.append(len(task.specs))
        if len([size for size in calls if size]) == 2:
            raise MemoryError
        return advance(sweep, task, on_progress)

    monkeypatch.setattr(block_sweep.Sweep, "advance", short)
    found = pipeline.run(model, batches, LORA, max_memory=limit)
    assert any("memory ran out" in note for note in found.report.notes)
    assert len([size for size in calls if size]) == 2, "what is left takes passes"
    assert_same(found, pipeline.run(model, batches, LORA))


def test_an_interrupted_sweep_goes_on_from_its_completed_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = four_blocks(), make_batches(make_samples(), extra_padding=8)
    pipeline = lora_da_core.build_pipeline(config=FIXED)
    limit, plan = limited(pipeline, model, batches)
    taken: list[int] = []
    advance = block_sweep.Sweep.advance

    def interrupted(sweep: Any, task: CaptureTask, on_progress: Any) -> Any:
        if task.specs:
            taken.append(len(task.specs))
            if len(taken) == 3:
                raise KeyboardInterrupt
        return advance(sweep, task, on_progress)

    monkeypatch.setattr(block_sweep.Sweep, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(model, batches, LORA, max_memory=limit, cache_dir=tmp_path)
    resumed = pipeline.run(model, batches, LORA, max_memory=limit, cache_dir=tmp_path)
    assert taken == [len(part) for part in (*plan.parts[:3], *plan.parts[2:])]
    assert_same(resumed, pipeline.run(model, batches, LORA))


def test_errors_within_a_sweep_leave_the_model_as_found(monkeypatch: pytest.MonkeyPatch, model_unchanged: Any) -> None:
    model, batches = four_blocks(), make_batches(make_samples(), extra_padding=8)
    pipeline = lora_da_core.build_pipeline(config=FIXED)
    limit, _ = limited(pipeline, model, batches)
    model.train()
    model_unchanged(model)
    update, count = capture.Run._accumulate, itertools.count()

    def failing(*args: Any) -> None:
        if next(count) == 60:
            raise ValueError("in the second part")
        update(*args)

    monkeypatch.setattr(capture.Run, "_accumulate", failing)
    with pytest.raises(ValueError, match="second part"):
        pipeline.run(model, batches, LORA, max_memory=limit)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("settings", [{}, {"vocab_size": 5000}, {"hidden_size": 128, "num_hidden_layers": 6}], ids=str)
@pytest.mark.parametrize("share", [0.8, 0.55])
def test_a_sweep_takes_what_is_planned(settings: dict[str, Any], share: float) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 500, "num_hidden_layers": 5, **settings}
    model, pipeline, lora = make_tiny_llama(**shape), lora_da_core.build_pipeline(config=FIXED), LORA
    ids = torch.randint(500, (8, 32), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(4)]
    for batch in batches:
        batch["attention_mask"][0, -1] = 0  # with padding attention takes a mask, as a plan assumes
    planned = functools.partial(estimate_memory, model, lora, pipeline=pipeline, workload=workload_of(batches))
    whole = planned()
    plan = planned(max_memory=whole.weights + int(share * (whole.peak_bytes - whole.weights)))
    assert plan.schedule == "blocks" and len(plan.parts) > 1

    def run() -> None:
        setup = Setup(pipeline.registry, pipeline.components, pipeline.config)
        job = job_of(setup, model, batches, lora, "default", ALONE)
        Finish(setup, within(plan, job), None).result(plan.parts)

    run()  # what is made once and stays
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert plan.peak_bytes - plan.weights == pytest.approx(peak, rel=0.15)


def test_the_time_of_a_sweep_goes_with_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_llama(hidden_size=128, intermediate_size=320, num_hidden_layers=4, vocab_size=500)
    ids = torch.randint(500, (8, 32), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(4)]
    pipeline = lora_da_core.build_pipeline(config=dataclasses.replace(FIXED, token_mask="attention"))
    limit, plan = limited(pipeline, model, batches)
    counted = counted_flops(monkeypatch)
    for most in (None, limit):
        counted.append(0)
        pipeline.run(model, batches, LORA, max_memory=most)
    assert plan.relative_time == pytest.approx(counted[1] / counted[0], rel=0.05)


@pytest.mark.parametrize("model", MODELS)
def test_few_blocks_that_are_alike_tell_what_all_of_them_take(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MODELS[model]()
    targets = adapter.resolve_targets(whole, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    blocks = find_blocks(whole, targets.modules)
    assert blocks is not None and len(blocks.modules) == 4
    updates, shape = dict.fromkeys(targets.modules, 1000), BatchShape(3, 16)
    few = activations.trace(whole, shape, updates, backward=True, blocks=blocks)
    monkeypatch.setattr(activations, "_FEW", range(4))
    every = activations.trace(whole, shape, updates, backward=True, blocks=blocks)
    assert few == every and few.blocks is not None
    plain = activations.trace(whole, shape, updates, backward=True)
    assert (plain.peak, plain.leaders, plain.inputs) == (few.peak, few.leaders, few.inputs)


def test_a_7b_model_is_swept_within_24_gib_and_planned_quickly_enough_to_test() -> None:
    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    workload = Workload(256, 288, tokens=50_000, batch_size=12)
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(scale="fixed"))
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    plan = functools.partial(estimate_memory, model, lora, pipeline=pipeline, workload=workload, device="cuda")
    narrow, wide = plan(max_memory="24GiB"), plan(max_memory="62GiB")
    for found, hidden_states, parts in ((narrow, "host", range(6, 17)), (wide, "device", range(2, 4))):
        assert found.fits and found.schedule == "blocks" and found.statistics_device == "device"
        assert found.hidden_states == hidden_states and len(found.parts) in parts
        assert found.batch_size == 12
    assert wide.relative_time < narrow.relative_time < 1.4
    assert narrow.waiting_bytes < wide.waiting_bytes
