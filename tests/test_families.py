"""The realistic runs of `benchmarks.families`, a few steps long: an encoder-decoder and fused experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.families import Setting


@pytest.mark.parametrize("name", ["T5", "Qwen3Moe"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_family_starts_below_its_base_trains_and_reloads(name: str, tmp_path: Path) -> None:
    found = families.compared(name, Setting(pretraining=2, steps=2), tmp_path)
    assert found["ours, end"] < found["start"] < found["base"]
    assert found["default, end"] < found["base"]
    assert found["reload"] == 0.0


def test_every_family_is_one_of_transformers_and_small() -> None:
    for name, family in families.FAMILIES.items():
        letters, first, second = families.tasks(family)
        assert len(first) == len(second) == 400
        batch = letters.batch(second[:3], family)
        assert batch["input_ids"].max() < families.FIRST + len(letters.known)
        size = sum(parameter.numel() for parameter in families.made(name, letters, 0).parameters())
        assert 50_000 < size < 600_000, (name, size)
