"""The benchmark of several processes, whole but small, on two processes of the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import distributed
from process_worlds import Worlds


def measure(output: Path) -> None:
    shape = ["--layers", "1", "--hidden", "64", "--intermediate", "96", "--vocabulary", "64", "--tokens", "16"]
    rest = ["--samples", "8", "--batch", "3", "--repetitions", "1", "--device", "cpu", "--output", str(output)]
    sys.argv = ["distributed", *shape, *rest]
    distributed.main()


def test_one_process_and_two_find_the_same_sums_and_factors(tmp_path: Path) -> None:
    worlds = Worlds()
    try:
        worlds.run(2, measure, tmp_path / "figures.json")
    finally:
        worlds.kill()
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["processes"] == 2 and found["sums"]["compared"] == 7 * 2 + 4
    assert found["sums"]["largest"] < 1e-5
    for differences in (found["factors"]["all"], found["factors"]["sharded"]):
        # bf16 weights: a forward pass over other batches rounds otherwise.
        assert differences["compared"] == 7 and differences["largest"] < 0.2
    one, both = found["rows"]["one"], found["rows"]["all"]
    assert found["speed_up"] == pytest.approx(one["seconds"] / both["seconds"])
    for row in (both, found["rows"]["sharded"]):
        assert len(row["peak_gib"]) == 2 and row["phases"]["statistics"] < row["seconds"]
