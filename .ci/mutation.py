"""Mutation tests with mutmut, in a copy: how many small changes of the mathematics do its tests notice?

`make mutation` mutates omega, operators, estimators and solvers; SAMPLE=200 tries that many mutants, drawn with seed 0.
A first run without a sample tries all of them. What survived is listed; `mutmut show NAME` in the copy shows a change.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTATED = ("lora_da_core/omega.py", "lora_da_core/operators.py", "lora_da_estimators/*.py", "lora_da_solvers/*.py")
TESTS = (
    "omega", "operators", "solvers", "solver_failures", "accelerator_arithmetic",
    "estimators", "estimators_oracle", "estimators_reference",
)  # fmt: skip
OUTCOMES = {0: "survived", 1: "killed", 3: "killed", 5: "not tested", 33: "not tested", 34: "skipped", -24: "timed out"}
"""mutmut's exit codes; -24, 24, 36, 152 and 255 are all a timeout."""


def laid_out(copy: Path) -> None:
    """All packages beside each other, as mutmut wants them, with the tests and their expected numbers."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    packages = [ROOT / "lora_da_core", *sorted((ROOT / "plugins").glob("lora_da_*"))]
    for package in packages:
        shutil.copytree(package, copy / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT.parent / "shared").is_dir():
        (copy / "shared").symlink_to(ROOT.parent / "shared")
    lists = {
        "source_paths": [package.name for package in packages],
        "only_mutate": MUTATED,
        "pytest_add_cli_args_test_selection": [f"tests/test_{name}.py" for name in TESTS],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-p", "no:logging", "-W", "ignore"],
        "also_copy": ["pytest.ini"],
    }
    text = "".join(f"{key} =\n" + "".join(f"    {value}\n" for value in values) for key, values in lists.items())
    (copy / "setup.cfg").write_text(f"[mutmut]\n{text}timeout_multiplier = 8.0\ntimeout_constant = 10.0\n")
    # The project's own settings put the unchanged sources first.
    (copy / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    real_model: not among these tests\n    nightly: nor these\n"
    )


def mutmut(copy: Path, *names: str) -> None:
    """Runs it on some mutants, or on all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
    subprocess.run(command, cwd=copy, env=environment, check=False)


def results(copy: Path) -> dict[str, int | None]:
    """Exit code of every mutant; None where it was not tried."""
    found: dict[str, int | None] = {}
    for path in sorted((copy / "mutants").rglob("*.meta")):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def main() -> None:
    """Lay out, mutate, run, count."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--copy", type=Path, default=ROOT / "build" / "mutation")
    arguments.add_argument("--sample", type=int, help="mutants to try; all of them without it")
    given = arguments.parse_args()
    laid_out(given.copy)
    if given.sample is None:
        mutmut(given.copy)
    else:
        mutmut(given.copy, "lora_da_solvers.eigh.*")  # makes the mutants, and finds which tests run which code
        names = sorted(results(given.copy))
        mutmut(given.copy, *random.Random(0).sample(names, min(given.sample, len(names))))
    tried = {name: code for name, code in results(given.copy).items() if code is not None}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for name, code in tried.items():
        counts[name.rsplit(".", 1)[0], OUTCOMES.get(code, "timed out")] += 1
        if OUTCOMES.get(code) in ("survived", "not tested"):
            print(f"{OUTCOMES[code]}: {name}")
    for (module, outcome), count in sorted(counts.items()):
        print(f"{module:45} {outcome:10} {count}")


if __name__ == "__main__":
    main()
