"""Embeddings: the dense Fisher of one-hot inputs, autograd's gradients, stock PEFT, and no squared vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, OptionError, TargetError, adapter, capture
from lora_da_core.capture import CaptureTask
from lora_da_core.interfaces import FisherEstimator, GradientEstimator
from lora_da_core.operators import DenseMap, LowRankMap
from lora_da_core.registry import Registry
from lora_da_core.running_sums import Statistics
from lora_da_core.testing.data import collect, dense_matrix
from lora_da_core.testing.one_hot import ENTRIES, one_hot_tokens
from tiny_models import PAD, VOCABULARY, bart, causal, continued, made, t5

Batches = list[dict[str, Tensor]]
WIDTH = 4


def taking_one_hot(kind: str) -> list[str]:
    registry = Registry()
    names = sorted(plugin["name"] for plugin in lora_da_core.list_plugins() if plugin["kind"] == kind)
    return [name for name in names if registry.create(kind, name).takes_one_hot]


def test_what_serves_embeddings() -> None:
    assert taking_one_hot("estimator") == ["diagonal", "identity", "kfac"]
    assert taking_one_hot("gradient") == ["full", "sketched"]


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("identity", {}),
    ("diagonal", {"per": "sample"}),
    ("diagonal", {"per": "token"}),
    ("kfac", {"output": "diagonal"}),
    ("kfac", {"output": "full"}),
    ("kfac", {"output": "identity"}),
]


@pytest.mark.parametrize(("damping", "kind"), [(0.01, "relative"), (0.02, "absolute")])
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_the_fisher_of_places_is_that_of_one_hot_rows(
    name: str, options: dict[str, Any], damping: float, kind: Any
) -> None:
    cls: type[FisherEstimator[Any]] = Registry().resolve("estimator", name)
    estimator = cls(cls.Options(**options))
    places, rows = one_hot_tokens(0)
    fishers = [
        estimator.fisher(collect(estimator, [[tokens]]), damping=damping, damping_kind=kind, fisher_scale="sample")
        for tokens in (places, rows)
    ]
    for product in ("apply", "solve"):
        found, expected = (dense_matrix(getattr(fisher, product), rows.spec) for fisher in fishers)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    traces = [fisher.inverse_input_trace().to_dense() for fisher in fishers]
    torch.testing.assert_close(*traces, rtol=1e-9, atol=1e-12)
    gradient = DenseMap(rows.gradient())
    torch.testing.assert_close(*(fisher.step(gradient).to_dense() for fisher in fishers), rtol=1e-9, atol=1e-12)


def test_kfacs_fisher_is_the_dense_kronecker_product() -> None:
    places, rows = one_hot_tokens(1)
    cls = Registry().resolve("estimator", "kfac")
    estimator, count = cls(cls.Options(output="full")), len(places.inputs)
    fisher = estimator.fisher(
        collect(estimator, [[places]]), damping=0.02, damping_kind="absolute", fisher_scale="token_mean"
    )
    z = rows.inputs.T @ rows.inputs / count + 0.02 * torch.eye(ENTRIES, dtype=torch.float64)
    y = rows.output_grads.T @ rows.output_grads / count + 0.02 * torch.eye(WIDTH, dtype=torch.float64)
    dense = torch.kron(y, z)
    torch.testing.assert_close(dense_matrix(fisher.apply, rows.spec), dense)
    inverse = torch.linalg.inv(dense).reshape(WIDTH, ENTRIES, WIDTH, ENTRIES)
    torch.testing.assert_close(fisher.inverse_input_trace().to_dense(), torch.einsum("oioj->ij", inverse))


@pytest.mark.parametrize("name", ["full", "sketched"])
def test_the_gradient_of_places_is_that_of_one_hot_rows(name: str) -> None:
    cls: type[GradientEstimator[Any]] = Registry().resolve("gradient", name)
    estimator = cls(cls.Options())
    for tokens in one_hot_tokens(0):
        taken = estimator.accumulator(tokens.spec, device=torch.device("cpu"), dtype=torch.float64)
        taken.update(tokens.inputs, tokens.output_grads, tokens.example)
        found = estimator.gradient(taken.statistics(), tokens.spec, samples=tokens.samples)
        torch.testing.assert_close(found.to_dense(), one_hot_tokens(0)[1].gradient(), rtol=1e-8, atol=1e-10)


def test_maps_applied_to_places() -> None:
    places, rows = one_hot_tokens(0)
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (WIDTH, ENTRIES))
    for found in (DenseMap(left @ right.T), LowRankMap(left, right)):
        torch.testing.assert_close(found.apply_to_rows(places.inputs), rows.inputs @ right @ left.T)


# Through models


def statistics_of(model: nn.Module, lora: LoraConfig, batches: Batches, objective: Any = "causal_lm") -> Statistics:
    parts = lora_da_core.build_pipeline(estimator=("kfac", {"output": "full"}), objective=objective).components
    targets = adapter.resolve_targets(model, lora)
    task = CaptureTask(
        model, targets.modules, targets.specs, parts.objective, parts.estimator, parts.gradient, "attention"
    )
    return capture.collect(task, batches, generator=torch.Generator().manual_seed(0))


def losses_of(model: nn.Module, batch: Any) -> Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    shift = 0 if model.config.is_encoder_decoder else 1
    logits, targets = logits[:, : logits.shape[1] - shift], batch["labels"][:, shift:]
    losses = functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=-100)
    return losses.sum(1) / (targets != -100).sum(1)


def llama() -> nn.Module:
    return make_tiny_llama(torch.float64)


def gemma3() -> nn.Module:
    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=PAD, sliding_window=8,
    )  # fmt: skip
    return made(lambda: transformers.Gemma3ForCausalLM(config))


def texts() -> Batches:
    return make_batches(make_samples(vocab=VOCABULARY), 6)


@pytest.mark.parametrize("create", [llama, gemma3, lambda: causal("GPT2")], ids=["llama", "gemma3, scaled", "gpt2"])
def test_the_gradient_is_autograds_and_z_counts_tokens(create: Any) -> None:
    model, batches = create(), texts()
    name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    found = statistics_of(model, LoraConfig(r=2, target_modules=[name.rpartition(".")[2]]), batches)
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(table.weight.detach().clone())  # of GPT-2 the output layer's as well
    model.eval()
    for batch in batches:
        losses_of(model, batch).sum().backward()
    taken = found.layers[name]
    assert taken.gradient is not None
    torch.testing.assert_close(taken.gradient.statistics()["gradient"].T, table.weight.grad, rtol=1e-9, atol=1e-12)
    attended = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    counts = found.of_layer(name).input["counts"]
    assert torch.equal(counts, torch.bincount(attended, minlength=len(counts)).double())
    assert taken.tokens == len(attended)


def test_padding_has_no_gradient() -> None:
    model, batches = llama(), texts()
    model.model.embed_tokens.padding_idx = 5
    lora = LoraConfig(r=2, target_modules=["embed_tokens"])
    found = statistics_of(model, lora, batches)
    gradient = found.layers["model.embed_tokens"].gradient
    assert gradient is not None and any(bool((batch["input_ids"] == 5).any()) for batch in batches)
    for batch in batches:
        losses_of(model, batch).sum().backward()
    expected = model.model.embed_tokens.weight.grad
    assert not bool(expected[5].any())
    torch.testing.assert_close(gradient.statistics()["gradient"].T, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("create", [llama, gemma3, t5, bart], ids=["llama", "gemma3", "t5", "bart"])
@pytest.mark.parametrize("setting", ["robust", "paper"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_start_as_intended_reload_and_merge(create: Any, setting: str, tmp_path: Path) -> None:
    model = create()
    batch = continued()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        batch = {**batch, "labels": batch["input_ids"].clamp(min=1)}
        inputs["decoder_input_ids"] = batch["labels"]
    pipeline = lora_da_core.build_pipeline(
        preset=setting, objective="seq2seq" if model.config.is_encoder_decoder else "causal_lm"
    )
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens"])
    peft_model = lora_da_core.get_lora_da_model(model, lora, [batch], pipeline=pipeline).eval()
    tables = {
        name: module for name, module in peft_model.get_base_model().named_modules() if isinstance(module, LoraLayer)
    }
    intended = create()
    for name, table in tables.items():
        a, b = table.lora_embedding_A["default"], table.lora_embedding_B["default"]
        assert a.shape == (2, table.get_base_layer().num_embeddings) and bool(b.any())
        inner = intended.get_submodule(name)
        inner.weight = nn.Parameter(inner.weight + table.scaling["default"] * (b @ a).T)  # no longer tied
    with torch.no_grad():
        expected = peft_model(**inputs).logits
        assert float((expected - create()(**inputs).logits).abs().max()) > 1e-6
        torch.testing.assert_close(intended(**inputs).logits, expected, rtol=1e-6, atol=1e-8)
        peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
        reloaded = PeftModel.from_pretrained(create(), tmp_path).eval()
        assert torch.equal(reloaded(**inputs).logits, expected)
        if not model.config.tie_word_embeddings:
            merged = reloaded.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-6, atol=1e-8)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {"lora_embedding_A", "lora_embedding_B"}
    assert len(saved) == 2 * len(tables) and tables


def test_the_step_lowers_the_loss_and_b_has_the_defaults_size() -> None:
    batches = texts()
    lora = LoraConfig(r=3, target_modules=["embed_tokens"])
    peft_model = lora_da_core.get_lora_da_model(llama(), lora, batches).eval()
    before, after = (
        float(torch.cat([losses_of(model, batch) for batch in batches]).mean()) for model in (llama(), peft_model)
    )
    assert after < before - 1e-3
    table = peft_model.get_submodule("base_model.model.model.embed_tokens")
    assert float(table.lora_embedding_B["default"].square().mean()) == pytest.approx(1.0, rel=1e-5)


def test_statistics_do_not_depend_on_batches() -> None:
    lora, samples = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]), make_samples(vocab=VOCABULARY)
    found = [statistics_of(llama(), lora, make_batches(samples, size)) for size in (1, 3, 12)]
    for other in found[1:]:
        for name, layer_ in found[0].layers.items():
            assert layer_.gradient is not None and other.layers[name].gradient is not None
            torch.testing.assert_close(
                other.layers[name].gradient.statistics(), layer_.gradient.statistics(), rtol=1e-10, atol=1e-13
            )
            torch.testing.assert_close(other.of_layer(name).input, found[0].of_layer(name).input)


@pytest.mark.parametrize("estimator", ["ekfac", "empirical", "sketched"])
def test_other_estimators_refuse_embeddings_before_any_work(estimator: str) -> None:
    pipeline = lora_da_core.build_pipeline(estimator=estimator)
    lora = LoraConfig(r=2, target_modules=["embed_tokens"])
    message = f"estimator '{estimator}' takes no one-hot inputs, which model.embed_tokens"
    with pytest.raises(OptionError, match=message):
        pipeline.run(llama(), unread(), lora)
    with pytest.raises(OptionError, match=message):
        lora_da_core.estimate_memory(llama(), lora, pipeline=pipeline)


def unread() -> Any:
    pytest.fail("batches were read")
    yield


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "is an Embedding with max_norm"),
        ({"scale_grad_by_freq": True}, "is an Embedding with scale_grad_by_freq"),
    ],
)
def test_tables_that_change_as_they_are_read_are_refused(options: dict[str, Any], message: str) -> None:
    model = made(lambda: nn.ModuleDict({"table": nn.Embedding(ENTRIES, WIDTH, **options)}))
    with pytest.raises(TargetError, match=message):
        adapter.resolve_targets(model, LoraConfig(r=2, target_modules=["table"]))


def test_positions_are_refused() -> None:
    with pytest.raises(
        TargetError, match="is a BartLearnedPositionalEmbedding, which does more than look its input up"
    ):
        adapter.resolve_targets(bart(), LoraConfig(r=2, target_modules=["embed_positions"]))


def test_a_large_vocabulary_is_never_squared() -> None:
    """The plan, the run and `auto`: 60,000 entries squared would take 27 GiB."""
    entries = 60_000
    model = made(lambda: Table(entries), torch.float32)
    lora = LoraConfig(r=2, target_modules=["embed"])
    batches = [{"ids": torch.arange(48).view(8, 6) * 31 % entries, "labels": torch.arange(8) % 3}]
    pipeline = lora_da_core.build_pipeline(objective=table_losses)
    result = pipeline.run(model, batches, lora)
    (report,) = result.report.layers
    assert report.converged and report.solver in ("lanczos", "davidson") and report.in_features == entries
    plans = {
        solver: lora_da_core.estimate_memory(
            model, lora, pipeline=lora_da_core.build_pipeline(solver=solver, objective=table_losses)
        ).peak_bytes
        for solver in ("auto", "eigh")
    }
    assert plans["auto"] < 2**31 < 8 * entries**2 <= plans["eigh"]
    registry = Registry()
    assert registry.choose_solver(entries, 8, "cpu", ["lanczos"]) == "davidson"
    with pytest.raises(OptionError):
        registry.choose_solver(entries, 8, "cpu", ["lanczos", "davidson"])


class Table(nn.Module):
    """A table of many vectors, and a head on their mean."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(entries, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)).mean(1))  # type: ignore[no-any-return]


def table_losses(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["ids"]), batch["labels"], reduction="none")


@pytest.mark.parametrize("gradient", ["none", ("zeroth_order", {"steps": 2}), ("smoothed", {"probes": 4})])
def test_gradients_without_tokens_serve_embeddings(gradient: Any) -> None:
    pipeline = lora_da_core.build_pipeline(gradient=gradient, config=LoraDAConfig(scale="unit"))
    model = llama()
    result = pipeline.run(model, texts(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    pair = result.factors["model.embed_tokens"]
    assert pair.A.shape == (2, model.config.vocab_size) and bool(pair.A.any())


def test_the_weights_of_a_table_are_decomposed_by_pissas_preset() -> None:
    model = llama()
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["embed_tokens"])
    result = lora_da_core.build_pipeline(preset="pissa").run(model, texts(), lora)
    pair = result.factors["model.embed_tokens"]
    u, values, vh = torch.linalg.svd(model.model.embed_tokens.weight.detach().T, full_matrices=False)
    torch.testing.assert_close(4 * pair.B @ pair.A, (u[:, :2] * values[:2]) @ vh[:2], rtol=1e-6, atol=1e-9)


def test_an_adapter_with_an_embedding_is_written_on_meta_and_its_a_can_be_frozen() -> None:
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    expected = lora_da_core.get_lora_da_model(llama(), lora, texts())
    hollow = get_peft_model(llama(), lora, low_cpu_mem_usage=True)
    lora_da_core.initialize_lora_da_weights(hollow, texts())
    for name, parameter in hollow.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))
    frozen = lora_da_core.build_pipeline(config=LoraDAConfig(frozen="A"))
    model = lora_da_core.get_lora_da_model(llama(), lora, texts(), pipeline=frozen)
    trained = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("lora_")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "embedding_B.default",
        "B.default.weight",
    }, trained
