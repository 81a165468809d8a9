r"""What a fine-tune on problems forgets of English prose, with and without LaLoRA's penalty, on one accelerator.

    python -m benchmarks.forgetting --output runs/forgetting \
        --model "$(python examples/demo_model.py)" --data problems.jsonl [--processes 5]

The target is the data (grade-school problems, for instance); the source, what the model could do before, are the help
texts of Python's language reference, which the standard library holds (`pydoc_data.topics`), in passages of about 900
characters. Every configuration is trained with five seeds, one process each, side by side. Prints losses on both and
the differences to LoRA-DA's start alone, paired by seed, and writes the ablation's usual report with a picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.evidence import run_seeds
from lora_da_core.ablation import read_grid, run_grid
from lora_da_core.ablation.comparison import configurations
from lora_da_core.ablation.downstream import at_best
from lora_da_core.ablation.forgetting import Forgotten, forgotten

GRID = Path(__file__).parent / "grids" / "forgetting.toml"
PASSAGE = 900
"""Characters of a passage, at least; it ends with a paragraph."""


def main() -> None:
    """Runs and reports."""
    options = _options()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    source = Path(options.source or output / ".source.jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages(topics())), encoding="utf-8")
    written = read_grid(options.grid)
    assert written.run.source is not None
    changes = {
        "model": options.model,
        "data": options.data,
        "source": {**asdict(written.run.source), "data": str(source)},
    }
    changes |= {"device": options.device} if options.device else {}
    seeds = options.seeds or list(written.run.seeds)
    start = time.perf_counter()
    run_seeds(options.grid, options.output, changes, seeds, options.processes, fused=False)
    grid = read_grid(options.grid, **changes, seeds=seeds)
    records = run_grid(grid, output)
    assert grid.run.finetune is not None
    found = configurations(records)
    rows = forgotten(at_best(found, grid.run.compare_to, grid.run.finetune.batch_size))
    bases = {row.base.name for row in rows if row.base is not None}
    print(table(rows, " or ".join(sorted(bases)) or "nothing"))
    failed = [record for record in records if record["status"] != "done"]
    print(f"{len(records)} cells, {len(failed)} failed, {time.perf_counter() - start:.0f} s")


def topics() -> Mapping[str, str]:
    """The help texts of Python's language reference, by topic."""
    from pydoc_data.topics import topics as found

    return dict(found)


def passages(texts: Mapping[str, str]) -> Iterator[str]:
    """Whole paragraphs of each text, joined until they are long enough; what is left at a text's end is dropped.

    Args:
        texts: By name.

    Yields:
        Passages of at least `PASSAGE` characters.
    """
    for name in sorted(texts):
        waiting = ""
        for paragraph in texts[name].split("\n\n"):
            waiting = f"{waiting}\n\n{paragraph}" if waiting else paragraph
            if len(waiting) >= PASSAGE:
                yield waiting
                waiting = ""


def table(rows: Sequence[Forgotten], base: str) -> str:
    """A Markdown table, what forgets least first.

    Args:
        rows: Configurations.
        base: What they are compared to.

    Returns:
        The table.
    """

    def shown(found: Any) -> str:
        return "–" if found is None else f"{found.mean:.4f} ± {found.half:.4f}"

    names = ("configuration", "seeds", "target loss", "source loss, start", "source loss, end")
    lines = [f"| {' | '.join([*names, f'target − {base}', f'source − {base}'])} |", "|---" * 7 + "|"]
    for row in rows:
        parts = (row.learnt, row.before, row.after, row.learnt_gap, row.after_gap)
        lines.append(f"| {row.configuration.name} | {row.after.count} | {' | '.join(map(shown, parts))} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--source", help="where the passages are written; part of what identifies a cell")
    parser.add_argument("--device")
    parser.add_argument("--grid", default=str(GRID))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--processes", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
