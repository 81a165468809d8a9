import json
from collections.abc import Mapping, Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import estimation, models, rounds
from lora_da_core.budget import workload_of
from lora_da_core.errors import ModelError, OptionError, PluginError, TargetError
from lora_da_core.memory import estimate_memory
from lora_da_core.memory.activations import BatchShape, trace
from lora_da_core.memory.phases import LayerBytes, Phases, PlanRow, by_phase, divided
from lora_da_core.memory.workload import Workload, parse_size, size_text
from lora_da_core.memory.workspace import Tokens, Workspace, WorkspaceProbe
from lora_da_core.passes import divided_layers, input_groups
from lora_da_core.types import LayerSpec
from tiny_models import bert, t5, vit

SAMPLES, LENGTH, BATCH = 8, 32, 4
WORKLOAD = Workload(SAMPLES, LENGTH, batch_size=BATCH)
ESTIMATORS = (
    "kfac",
    ("kfac", {"output": "full"}),
    ("kfac", {"output": "identity"}),
    "ekfac",
    "diagonal",
    ("diagonal", {"per": "token"}),
    "identity",
    "empirical",
    ("empirical", {"storage": "rows"}),
    ("sketched", {"size": 3}),
    ("sketched", {"method": "nystrom", "size": 3}),
    ("sketched", {"method": "svd"}),
)


def llama(**overrides):
    return make_tiny_llama(**{"hidden_size": 64, "intermediate_size": 160, "vocab_size": 500, **overrides})


def lora(rank=4, **settings):
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


def pipeline(estimator="kfac", gradient="full", **settings):
    config = lora_da_core.LoraDAConfig(**{"scale": "fixed", "token_mask": "attention", **settings})
    return lora_da_core.build_pipeline(estimator, gradient=gradient, config=config)


def full_batches():
    """Samples of one length, every token a label: what a plan assumes."""
    ids = torch.randint(500, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(BATCH)]


def padded_batches():
    """Almost full ones: with padding attention takes a mask, as a plan assumes too."""
    batches = full_batches()
    for batch in batches:
        batch["attention_mask"][0, -1] = 0
    return batches


def plan_of(pipe, model=None, workload=WORKLOAD, **settings):
    return estimate_memory(model or llama(), lora(), pipeline=pipe, workload=workload, **settings)


def beyond_weights(plan):
    """Bytes by phase without the weights."""
    return by_phase([row for row in plan.rows if row.what != "weights"])


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("800MB", 800 * 10**6),
        ("1.5 MiB", 3 * 2**19),
        ("7kB", 7000),
        ("7KB", 7000),
        ("2TiB", 2**41),
        ("12B", 12),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "24", "GiB", "24gib", "24 G", "-1GiB", "1e3MB", "nanGiB", "24GiB ", "0GiB", "0.2B", "1,5GiB", "24GIB"]
)
def test_other_sizes_are_refused(text):
    with pytest.raises(OptionError, match="24GiB"):
        parse_size(text)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 2**20 - 1, 2**30, 5 * 2**40, 2**60])
def test_sizes_are_shown_in_few_characters(size):
    assert len(size_text(size)) <= 13
    assert size_text(0) == "0 B"


# Statistics


def storage_bytes(*objects):
    """Bytes of all storages that objects hold, whatever their attributes are called."""
    seen, sizes = set(), {}

    def walk(thing):
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            sizes[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
        elif isinstance(thing, Mapping):
            list(map(walk, thing.values()))
        elif isinstance(thing, Sequence) and not isinstance(thing, str):
            list(map(walk, thing))
        elif hasattr(thing, "__dict__") and id(thing) not in seen:
            seen.add(id(thing))
            walk(vars(thing))

    walk(objects)
    return sum(sizes.values())


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_statistics_bytes_are_those_that_a_run_allocates(estimator):
    model, pipe = llama(num_hidden_layers=1), pipeline(estimator)
    planned = plan_of(pipe, model).statistics_bytes
    layers = pipe.estimate(model, full_batches(), lora()).statistics.layers.values()
    held = storage_bytes([layer.fisher for layer in layers], [layer.gradient for layer in layers])
    inputs = {id(layer.group): layer.group.accumulator for layer in layers}
    assert planned == held + storage_bytes(list(inputs.values()))


def test_gradient_statistics_count_too():
    model, sketch = llama(), ("sketched", {"size": 5})
    difference = plan_of(pipeline("identity", sketch), model).statistics_bytes
    held = pipeline("identity", sketch).estimate(model, full_batches(), lora()).statistics.layers.values()
    assert difference == storage_bytes([layer.gradient for layer in held])


@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 4}], ids=["grouped", "equal"])
def test_layers_that_share_an_input_are_those_of_a_run(overrides):
    """With as many heads for keys as for queries all four of a block's attention layers have one shape."""
    model = llama(**overrides)
    layers = pipeline().estimate(model, full_batches(), lora()).statistics.layers
    leaders = trace(model, BatchShape(BATCH, LENGTH), dict.fromkeys(layers, 0), backward=True).leaders
    assert leaders == {name: layer.group.leader for name, layer in layers.items()}


# Peaks, against torch's own record of allocations


def recorded(work):
    """Most bytes and bytes left that the CPU's allocator handed out, by torch's profiler, and what `work` returned."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        outcome = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live, outcome


@pytest.mark.parametrize(
    ("estimator", "overrides"),
    [
        ("kfac", {}),
        ("kfac", {"vocab_size": 5000}),
        ("kfac", {"hidden_size": 128, "intermediate_size": 512}),
        (("kfac", {"output": "full"}), {"num_key_value_heads": 4}),
        ("ekfac", {}),
        ("diagonal", {}),
        ("identity", {"num_hidden_layers": 6}),
        ("empirical", {}),
        (("empirical", {"storage": "rows"}), {}),
        (("sketched", {"size": 3, "method": "nystrom"}), {}),
    ],
    ids=str,
)
def test_phases_take_what_is_planned(estimator, overrides):
    model, pipe, batches = llama(**overrides), pipeline(estimator), padded_batches()
    pipe.run(model, batches, lora())  # what is made once and stays
    peak, kept, estimates = recorded(lambda: pipe.estimate(model, batches, lora()))
    solving, _, _ = recorded(lambda: pipe.solve(estimates))
    phases = beyond_weights(plan_of(pipe, model))
    assert max(phases["statistics"], phases.get("between passes", 0)) == pytest.approx(peak, rel=0.05)
    assert phases["solve"] == pytest.approx(kept + solving, rel=0.05)


def test_eager_attention_is_seen():
    model, pipe, batches = llama(), pipeline(), padded_batches()
    model.set_attn_implementation("eager")
    pipe.run(model, batches, lora())
    peak, _, _ = recorded(lambda: pipe.estimate(model, batches, lora()))
    assert beyond_weights(plan_of(pipe, model))["statistics"] == pytest.approx(peak, rel=0.05)


def test_the_line_search_takes_what_is_planned():
    model, pipe, batches = llama(vocab_size=20000, num_hidden_layers=1), pipeline(scale="auto"), padded_batches()
    pipe.run(model, batches, lora())
    estimates = pipe.estimate(model, batches, lora())
    solving, _, _ = recorded(lambda: pipe.solve(estimates))
    plan = plan_of(pipe, model)
    phases = beyond_weights(plan)
    assert phases["scale"] > phases["solve"]
    assert phases["scale"] - plan.statistics_bytes == pytest.approx(solving, rel=0.15)


@pytest.mark.parametrize("estimator", ["kfac", ("kfac", {"output": "full"}), "diagonal", "ekfac"], ids=str)
def test_workspaces_of_small_layers_continue_to_larger_ones(estimator, monkeypatch):
    pipe, spec = pipeline(estimator), LayerSpec("layer", "linear", 288, 384, 2, 1.0)
    parts = pipe.components

    def found():
        probe = WorkspaceProbe(pipe.registry, parts.estimator, parts.gradient, pipe.config, torch.device("cpu"))
        solver = pipe.registry.create("solver", "lanczos")
        return probe.workspace(spec, Tokens(1600, 1600, 80), solver, torch.float32)

    measured = found()
    monkeypatch.setattr("lora_da_core.memory.workspace.INPUTS", 144)
    continued = found()
    assert continued.prepare == pytest.approx(measured.prepare, rel=0.03)
    assert continued.shared + continued.kept == pytest.approx(measured.shared + measured.kept, rel=0.03)


# Passes


def test_a_smaller_limit_means_more_passes():
    model, pipe = llama(num_hidden_layers=3), pipeline(scale="auto")
    whole = plan_of(pipe, model)
    least = plan_of(pipe, model, max_memory=1)
    assert (whole.passes, least.fits, least.layers_per_pass) == (1, False, 3)
    assert whole.batch_size == BATCH > least.batch_size
    plans = [
        plan_of(pipe, model, max_memory=int(least.peak_bytes + share * (whole.peak_bytes - least.peak_bytes)))
        for share in (0.0, 0.5, 1.0)
    ]
    assert all(plan.fits and plan.peak_bytes <= plan.max_memory for plan in plans)
    assert [plan.batch_size for plan in plans] == sorted(plan.batch_size for plan in plans)
    assert plans[0].passes > plans[2].passes == 1 and plans[2].batch_size == BATCH
    assert {plan.statistics_bytes for plan in plans} == {whole.statistics_bytes}


def test_smaller_batches_are_taken_where_they_make_fewer_passes():
    model, pipe = llama(num_hidden_layers=3, vocab_size=4000), pipeline()
    whole, single = plan_of(pipe, model), plan_of(pipe, model, workload=Workload(SAMPLES, LENGTH, batch_size=1))
    # Between what single samples and what whole batches take, both in one pass.
    limit = (whole.peak_bytes + single.peak_bytes) // 2
    found = plan_of(pipe, model, max_memory=limit)
    assert found.fits and found.passes == 1 and 1 <= found.batch_size < BATCH
    # Statistics that do not fit divide the layers whatever the batches are.
    heavy = llama(num_hidden_layers=6, hidden_size=256, intermediate_size=512, vocab_size=50)
    tight = plan_of(pipe, heavy, max_memory=int(0.6 * plan_of(pipe, heavy).peak_bytes), workload=Workload(8, 4))
    assert tight.fits and tight.passes > 1


def test_passes_of_the_estimator_count():
    assert plan_of(pipeline("ekfac")).passes == 2


def test_what_does_not_fit_is_named_with_a_remedy():
    plan = plan_of(pipeline(), max_memory="100KiB", workload=Workload(4, 400))
    assert not plan.fits and plan.batch_size == 1
    assert "above the limit of 100.0 KiB" in plan.notes[-1] and "is activations of a batch" in plan.notes[-1]
    assert "lower the batch size" in plan.notes[-1]
    heavy = plan_of(pipeline(), llama(vocab_size=20000), max_memory="100KiB", workload=Workload(1, 2))
    assert "is weights" in heavy.notes[-1] and "smaller dtype" in heavy.notes[-1]


def group(*sizes, shared=100):
    zero = {"update": 0, "end_pass": 0, "prepare": 0, "shared": 0, "solve": 0}
    return [
        LayerBytes(
            LayerSpec(f"{shared}.{place}", "linear", 8, 8, 2, 1.0), shared, size, 0, size, 1, Workspace(**zero, kept=0)
        )
        for place, size in enumerate(sizes)
    ]


def test_layers_of_one_input_stay_together():
    groups = [group(1, 1, 1), group(1), group(1, 1), group(1)]
    for most in range(1, 8):
        parts = divided(groups, most)
        assert [layers for part in parts for layers in part] == groups
        assert all(sum(map(len, part)) <= most or len(part) == 1 for part in parts)
    assert [len(part) for part in divided(groups, 4)] == [2, 2]


def phases_of(device, activations=None):
    return Phases(
        weights=0,
        all_tapped=activations or trace(llama(), BatchShape(1, 4), {}, backward=False),
        one_tapped=None,
        forward=None,
        search=None,
        rounds=1,
        device=torch.device(device),
    )


def solve_bytes(device, groups):
    rows = phases_of(device).rows([groups])
    return next((row.bytes for row in rows if row.phase == "solve" and row.what.startswith("Fishers")), 0)


def test_layers_wait_for_each_other_on_an_accelerator_alone():
    workspace = Workspace(update=0, end_pass=0, prepare=50, shared=10, kept=7, solve=3)
    spec = LayerSpec("x", "linear", 8, 8, 2, 1.0)
    groups = [[LayerBytes(spec, 0, 0, 0, 0, 0, workspace)] * 2 for _ in range(3)]
    # One after the other: the second layer of a group is prepared while the first one's share stays.
    assert solve_bytes("cpu", groups) == 50
    # The last of six is prepared while five wait, with what three groups share; then all are solved together.
    assert solve_bytes("cuda", groups) == max(5 * 7 + 3 * 10 + (50 - 10), 6 * 7 + 3 * 10 + 6 * 3)


def test_rows_of_the_heaviest_pass_are_shown():
    rows = phases_of("cpu").rows([[group(5)], [group(500)], [group(50)]])
    statistics = [row for row in rows if row.phase == "statistics" and row.what.startswith("statistics")]
    assert statistics == [PlanRow("statistics", "statistics of 1 layer", 600)]


def test_rounds_keep_their_statistics():
    one, three = (plan_of(pipeline(scale="auto", rounds=rounds)) for rounds in (1, 3))
    assert beyond_weights(three)["statistics"] - beyond_weights(one)["statistics"] == 2 * one.statistics_bytes


# Inputs


def test_time_needs_a_throughput():
    assert plan_of(pipeline()).seconds is None
    assert plan_of(pipeline("ekfac"), throughput=64.0).seconds == 2 * SAMPLES * LENGTH / 64.0


def counted_flops(monkeypatch):
    """A list to whose last number estimates from now on add what torch counts of their multiplications."""
    estimate, counted = rounds.estimate, []

    def in_place(total, left, right, **rest):
        return 2 * left[0] * left[1] * right[1]

    def watched(*arguments):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            found = estimate(*arguments)
        counted[-1] += counter.get_total_flops()
        return found

    monkeypatch.setattr(rounds, "estimate", watched)
    # Of few samples the look whether the model repeats is a large part.
    monkeypatch.setattr(estimation, "model_notes", lambda task, batches: [])
    return counted


@pytest.mark.parametrize("estimator", ["kfac", "identity", ("kfac", {"output": "identity"})], ids=str)
@pytest.mark.parametrize("layers_per_pass", [1, 5, 14])
def test_the_time_of_several_passes_goes_with_what_torch_counts(estimator, layers_per_pass, monkeypatch):
    gradient = "none" if estimator == ("kfac", {"output": "identity"}) else "full"
    settings = {"alpha": 0.0, "beta": 1.0} if gradient == "none" else {}
    model, batches = llama(hidden_size=128, intermediate_size=320), full_batches()
    counted = counted_flops(monkeypatch)
    for most in ("auto", layers_per_pass):
        counted.append(0)
        pipe = pipeline(estimator, gradient, layers_per_pass=most, **settings)
        pipe.run(model, batches, lora())
    plan = plan_of(pipe, model, throughput=100.0)
    assert plan.relative_time == pytest.approx(counted[1] / counted[0], rel=0.1)
    assert plan.seconds == pytest.approx(plan.relative_time * SAMPLES * LENGTH / 100.0)
    assert (plan.relative_time == 1.0) == (plan.passes == 1)


def test_a_plan_divides_layers_as_the_configuration_says():
    plan = plan_of(pipeline(layers_per_pass=5))
    model, parts = llama(), []
    task = pipeline().estimate(model, full_batches(), lora()).task
    parts = divided_layers(input_groups(task, full_batches()), 5)
    assert [list(part) for part in plan.parts] == parts and plan.passes == len(parts) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_memory": 0}, "max_memory is 0"),
        ({"max_memory": "lots"}, "no size of memory"),
        ({"throughput": 0.0}, "throughput is 0"),
        ({"max_memory": "12"}, r"^max_memory: .12. is no size of memory"),
        ({"throughput": float("nan")}, "throughput is nan"),
    ],
)
def test_wrong_limits_are_refused(settings, message):
    with pytest.raises(OptionError, match=message):
        plan_of(pipeline(), **settings)


def test_a_run_refuses_a_limit_without_a_unit_by_its_name_before_it_reads_anything():
    with pytest.raises(OptionError, match=r"^max_memory: '12' is no size of memory; write a number"):
        pipeline().run(llama(), iter(lambda: pytest.fail("data were read"), None), lora(), max_memory="12")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"max_length": 1}, "max_length is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"samples": 2, "max_length": 10, "tokens": 21}, "have 2 to 20 together"),
    ],
)
def test_wrong_workloads_are_refused(settings, message):
    with pytest.raises(OptionError, match=message):
        Workload(**settings)


def test_batches_are_filled_as_init_fills_them():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert Workload(256, 1024).on(cuda).batch == BatchShape(2, 1024)
    assert Workload(256, 100).on(cpu).batch == BatchShape(2, 100)
    assert Workload(256, 4096).on(cuda).batch == BatchShape(1, 4096)
    assert Workload(1, 100).on(cpu).batch == BatchShape(1, 100)
    assert Workload(9, 100, batch_size=7).on(cpu).batch == BatchShape(7, 100)
    with pytest.raises(OptionError, match="no batch_size"):
        _ = Workload(3, 100).batch
    assert Workload(256, 128, batch_size=64).search == BatchShape(16, 128)
    assert Workload(4, 128, batch_size=64).search == BatchShape(4, 128)


def test_preference_pairs_are_planned_as_two_texts() -> None:
    ids = torch.ones(3, 2, 9, dtype=torch.int64)
    pairs = [{"input_ids": ids, "labels": ids}, {"input_ids": ids[:1], "labels": ids[:1]}]
    found = workload_of(pairs)
    assert found == Workload(4, 9, tokens=72, batch_size=3, texts=2)
    assert found.batch == BatchShape(3, 9, 2) and found.batch.rows == 6 and found.total == 72
    assert Workload(256, 512, texts=2).on(torch.device("cuda")).batch == BatchShape(2, 512, 2)
    pipe = lora_da_core.build_pipeline(objective="dpo", config=lora_da_core.LoraDAConfig(scale="fixed"))
    plans = [plan_of(pipe, workload=load).phases() for load in (found, Workload(8, 9, batch_size=6))]
    # As many texts of one length take what they take as single samples, and less than half as many of twice the length.
    assert plans[0]["statistics"] == plans[1]["statistics"]
    batch = {"input_ids": ids, "labels": ids.clone()}
    result = pipe.run(llama(), [batch, batch], lora(), max_memory="1GiB")
    assert result.report.samples == 6


def test_the_model_stays_as_it_is(model_unchanged):
    model = llama()
    model_unchanged(model)
    model.train()
    model_unchanged(model)
    plan_of(pipeline("ekfac"), model, max_memory="1GiB")


def test_a_peft_model_is_planned_as_its_base():
    base = plan_of(pipeline())
    wrapped = get_peft_model(llama(), lora())
    plan = estimate_memory(wrapped, pipeline=pipeline(), workload=WORKLOAD)
    assert plan.statistics_bytes == base.statistics_bytes
    assert beyond_weights(plan) == beyond_weights(base)


@pytest.mark.parametrize(
    ("model", "modules"),
    [(bert(), ["query", "value"]), (t5(), ["q", "wi"]), (vit(), "all-linear")],
    ids=["encoder", "encoder-decoder", "images"],
)
def test_other_models_run_without_values_too(model, modules):
    plan = estimate_memory(
        model, LoraConfig(r=2, target_modules=modules), pipeline=pipeline(), workload=Workload(4, 8, batch_size=2)
    )
    assert plan.notes == ()
    assert plan.peak_bytes > plan.statistics_bytes


class Peeking(nn.Module):
    """A language model that looks at values in a way that tensors without values cannot answer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, input_ids, attention_mask=None):
        if input_ids.numpy().max() >= 50:
            raise ValueError("token out of range")
        hidden = self.embedding(input_ids)
        return (self.head(self.first(hidden) + self.second(hidden)),)


def test_a_model_that_needs_values_is_guessed_with_a_note():
    plan = estimate_memory(
        Peeking(), LoraConfig(r=2, target_modules=["first", "second"]), pipeline=pipeline(), workload=WORKLOAD
    )
    assert len(plan.notes) == 1 and "rough guess" in plan.notes[0]
    # Nothing is known of who shares an input: two Z (16 × 16), two Y (16), two G, in float32.
    assert plan.statistics_bytes == 4 * (2 * 256 + 2 * 16 + 2 * 256)
    activations = next(row.bytes for row in plan.rows if row.what == "activations of a batch")
    assert activations > 4 * BATCH * LENGTH * (16 + 16 + 16 + 50)


def test_a_plugin_that_raises_is_named(monkeypatch):
    pipe = pipeline("diagonal")

    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(type(pipe.components.estimator), "layer_accumulator", fail)
    with pytest.raises(PluginError, match=r"estimator 'diagonal' .* raised .*boom"):
        plan_of(pipe)


def test_layers_left_at_their_own_initialisation_are_named():
    config, model = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]), llama()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(TargetError, match="embed_tokens"):
        estimate_memory(model, config, pipeline=pipeline(), workload=WORKLOAD)
    plan = estimate_memory(model, config, pipeline=pipeline(unsupported="default"), workload=WORKLOAD)
    assert plan.layers == 2 and "embed_tokens" in plan.notes[0]


def test_targets_are_pefts_own():
    with pytest.raises(TargetError, match="nowhere"):
        estimate_memory(llama(), LoraConfig(r=2, target_modules=["nowhere"]), pipeline=pipeline())


# Seventy billion parameters


@pytest.fixture
def seventy_billion(tmp_path):
    """A directory that holds nothing but a configuration of Llama-3-70B's shapes."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    return tmp_path


def test_seventy_billion_parameters_are_planned_from_a_configuration(seventy_billion):
    shapes = models.load_shapes(seventy_billion, device="cuda")
    parameters = list(shapes.model.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    plan = estimate_memory(shapes.model, lora(8), pipeline=pipeline(), device=shapes.device)
    h, m, kv = 8192, 28672, 1024
    inputs = 3 * h * h + m * m
    matrices, outputs = 2 * h * h + 2 * h * kv + 3 * h * m, 2 * h + 2 * kv + 2 * m + h
    assert plan.layers == 560
    assert plan.statistics_bytes == 80 * 4 * (inputs + matrices + outputs)
    weights = next(row.bytes for row in plan.rows if row.what == "weights")
    assert weights == pytest.approx(2 * sum(parameter.numel() for parameter in parameters), rel=1e-6)
    assert weights + plan.statistics_bytes < plan.peak_bytes < 1.3 * (weights + plan.statistics_bytes)
    assert (plan.fits, plan.passes, plan.notes) == (True, 1, ())


def test_shapes_are_those_of_the_model_itself(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    shapes = models.load_shapes(tmp_path, device="cpu")
    expected = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    assert {name: (tuple(p.shape), p.dtype) for name, p in shapes.model.named_parameters()} == expected
    assert (shapes.max_positions, shapes.notes) == (64, ())


def test_the_device_need_not_be_here(tmp_path):
    LlamaConfig(num_hidden_layers=1, hidden_size=32, dtype="float16").save_pretrained(tmp_path)
    assert models.load_shapes(tmp_path, device="cuda").dtype == torch.float16
    assert models.load_shapes(tmp_path, device="cpu").dtype == torch.float32
    assert models.load_shapes(tmp_path, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(OptionError, match="unknown"):
        models.load_shapes(tmp_path, device="gpu!")
    with pytest.raises(OptionError, match="meta"):
        models.load_shapes(tmp_path, device="meta")


def test_a_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        models.load_shapes(tmp_path)


def test_quantized_checkpoints_get_a_note(tmp_path):
    config = LlamaConfig(num_hidden_layers=1, hidden_size=32).to_dict()
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "quantized" in models.load_shapes(tmp_path, device="cpu").notes[0]


def test_a_limit_is_refused_where_zero3_shards_the_model():
    model = make_tiny_llama()
    next(model.parameters()).ds_id = 0  # DeepSpeed's mark of a parameter that it keeps in parts
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(OptionError, match="ZeRO-3 shards; give layers_per_pass"):
        lora_da_core.build_pipeline().run(model, make_batches(make_samples()), lora, max_memory="1GiB")
