"""Mutation tests with mutmut, in a copy: how many small changes of the mathematics do its tests notice?

`make mutation` changes omega, operators, estimators and solvers, one thing at a time. SAMPLE=140 tries that many,
drawn with SEED, so many of each part as `SHARES` says; without SAMPLE all are tried. ONLY="lora_da_solvers.lanczos …"
keeps to these files, of the same draw. RESUME=1 goes on where a run of the same tests was stopped. A table per file, in
Markdown, and the names of what survived come last; `mutmut show NAME`, called in the copy, shows a change.
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

from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"lora_da_core.omega": 1, "lora_da_core.operators": 1, "lora_da_estimators": 4, "lora_da_solvers": 4}
"""Parts of a sample; estimators and solvers are a dozen files each."""
MUTATED = ("lora_da_core/omega.py", "lora_da_core/operators.py", "lora_da_estimators/*.py", "lora_da_solvers/*.py")
TESTS = (
    "omega", "operators", "solvers", "solver_failures", "accelerator_arithmetic",
    "estimators", "estimators_oracle", "estimators_reference",
)  # fmt: skip
PLACES = "tests/test_embeddings.py::test_the_fisher_of_places_is_that_of_one_hot_rows"
"""Of the tests of embeddings the one that runs no model."""
SLOW = (
    "test_estimators_reference.py::test_sampled_labels_converge_to_the_dense_true_fisher_with_the_root_of_their_number",
    "test_solvers.py::test_exceptions_are_not_stale",
)
"""Left out: they take half of the time of all, and most changes are met by others."""
NOTICED = ("killed", "timeout", "segfault")
COLUMNS = ("noticed", "survived", "no tests", "other")


def laid_out(copy: Path) -> None:
    """All packages beside each other, as mutmut wants them, with the tests and their expected numbers."""
    packages = [ROOT / "lora_da_core", *sorted((ROOT / "plugins").glob("lora_da_*"))]
    copy.mkdir(parents=True, exist_ok=True)
    for source in (*packages, ROOT / "tests"):
        # Times are kept: of files that are as they were, mutmut makes no mutants again.
        shutil.rmtree(copy / source.name, ignore_errors=True)
        shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT.parent / "shared").is_dir() and not (copy / "shared").exists():
        (copy / "shared").symlink_to(ROOT.parent / "shared")
    # No shrinking: that an example fails is enough, and the same ones are tried for every mutant.
    arguments = ["-p", "no:cacheprovider", "-W", "ignore", "--show-capture=no", "--hypothesis-profile=mutation"]
    lists = {
        "source_paths": [package.name for package in packages],
        "only_mutate": MUTATED,
        "pytest_add_cli_args_test_selection": [*(f"tests/test_{name}.py" for name in TESTS), PLACES],
        "pytest_add_cli_args": [*arguments, *(f"--deselect=tests/{name}" for name in SLOW)],
        "also_copy": ["pytest.ini"],
    }
    text = "".join(f"{key} =\n" + "".join(f"    {value}\n" for value in values) for key, values in lists.items())
    (copy / "setup.cfg").write_text(f"[mutmut]\n{text}timeout_multiplier = 8.0\ntimeout_constant = 5.0\n")
    # The project's own settings put the unchanged sources first.
    (copy / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    real_model: not among these tests\n    nightly: nor these\n"
    )


def mutmut(copy: Path, *names: str) -> None:
    """Runs it on some mutants, or on all; what it has found out is kept where it is stopped midway."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
    subprocess.run(command, cwd=copy, env=environment, check=False)


def results(copy: Path) -> dict[str, str]:
    """What became of every mutant, in mutmut's words."""
    found: dict[str, str] = {}
    for path in sorted((copy / "mutants").rglob("*.meta")):
        codes: dict[str, int | None] = json.loads(path.read_text())["exit_code_by_key"]
        found |= {name: status_by_exit_code[code] for name, code in codes.items()}
    return found


def drawn(names: list[str], size: int, seed: int) -> list[str]:
    """So many of each part as `SHARES` says, or all that it has."""
    draw, chosen, whole = random.Random(seed), [], sum(SHARES.values())
    for part, share in SHARES.items():
        of_part = [name for name in names if name.startswith(part + ".")]
        chosen += draw.sample(of_part, min(len(of_part), round(size * share / whole)))
    return chosen


def of_files(names: list[str], files: list[str]) -> list[str]:
    """Those of some files, or all where none is named."""
    return [name for name in names if not files or name.rsplit(".", 1)[0] in files]


def table(outcomes: dict[str, str]) -> str:
    """One row per file: how many were tried, and what became of them."""
    counts: collections.defaultdict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, outcome in outcomes.items():
        column = "noticed" if outcome in NOTICED else outcome if outcome in COLUMNS else "other"
        counts[name.rsplit(".", 1)[0]][column] += 1
        counts["together"][column] += 1
    together = counts.pop("together")
    rows = [f"| file | tried | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for module, count in [*sorted(counts.items()), ("together", together)]:
        rows.append(f"| {module} | {count.total()} | {' | '.join(str(count[column]) for column in COLUMNS)} |")
    return "\n".join(rows)


def main() -> None:
    """Lay out, mutate, run, count."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--copy", type=Path, default=ROOT / "build" / "mutation")
    arguments.add_argument("--sample", type=int, help="mutants to try; all of them without it")
    arguments.add_argument("--seed", type=int, default=0, help="of the draw")
    arguments.add_argument("--only", action="append", default=[], help="a file, by its module's name; may be repeated")
    arguments.add_argument("--resume", action="store_true", help="try only what the copy holds no outcome of")
    arguments.add_argument("names", nargs="*", help="mutants to try, in the place of a sample")
    given = arguments.parse_args()
    laid_out(given.copy)
    names: list[str] = given.names
    if not names:
        if not results(given.copy) or not given.resume:
            mutmut(given.copy, "lora_da_solvers.eigh.*")  # makes the mutants, and finds which tests run which code
        names = sorted(results(given.copy))
        if given.sample is not None:
            names = drawn(names, given.sample, given.seed)
        names = of_files(names, given.only)
    before = results(given.copy) if given.resume else {}
    wanted = [name for name in names if before.get(name, "not checked") == "not checked"]
    if wanted:
        mutmut(given.copy, *wanted)
    found = {name: outcome for name, outcome in results(given.copy).items() if name in names}
    outcomes = {name: outcome for name, outcome in found.items() if outcome != "not checked"}
    for name, outcome in sorted(outcomes.items()):
        if outcome not in NOTICED:
            print(f"{outcome}: {name}")
    print(f"{table(outcomes)}\n\n{len(found) - len(outcomes)} were not tried")
    if not outcomes:
        sys.exit("mutmut tried nothing; what it said is above")


if __name__ == "__main__":
    main()
