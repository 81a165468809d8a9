"""Records as the cells of a grid leave them, made up: for tests of what is made of them."""

import json
from dataclasses import asdict

from lora_da_core.ablation import comparison
from lora_da_core.ablation.cells import RESULT_FIELDS

RUN = {"model": "m", "data": "d.jsonl", "samples": 64}


def record_of(estimator, seed, curves, *, baseline=None, rank=2, angle=0.5, **changes):
    """A finished cell; `curves` are losses by step, by learning rate."""
    made = dict.fromkeys(comparison._settings())
    made |= RESULT_FIELDS | {"estimator": None if baseline else estimator, "baseline": baseline, "rank": rank}
    made |= {"cell": f"{baseline or estimator}{rank}s{seed}", "status": "done", "seed": seed, "samples": 64}
    made |= {"seconds": 1.0, "spent": 1.0, "peak_bytes": 2**20, "angle": angle, "angle_max": 1.0, "passes": 1}
    made |= {"objective_gap": 0.1, "not_converged": 0, "reference": "r", "phases": {"scale": 0.25}}
    made["curves"] = [
        {"learning_rate": rate, "steps": list(losses), "losses": list(losses.values())}
        for rate, losses in curves.items()
    ]
    return made | changes


def final(loss, rate=1e-3):
    return {rate: {0: 9.0, 5: loss}}


def found_in(*records):
    return comparison.configurations(records)


def records_of(grid, **changes):
    """What the cells of a grid would leave, without fine-tunes."""
    return [
        record_of(cell.estimator, cell.seed, {}, preset=None if cell.baseline else cell.preset)
        | cell.settings()
        | {"cell": cell.id, **changes}
        for cell in grid.cells
    ]


def entry_of(grid):
    """What run.json says of a grid."""
    entry = {
        "versions": {"torch": "2"},
        "machine": {"device": "cpu", "threads": 1, "platform": "p"},
        "model": {"parameters": 1234567, "fingerprint": "ab" * 32},
        "data": {"rows": 10, "fingerprint": "cd" * 32},
        "run": asdict(grid.run),
        "cells": [{"cell": cell.id, **cell.settings()} for cell in grid.cells],
    }
    return json.loads(json.dumps(entry))
