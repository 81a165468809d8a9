"""How large the core is, part by part: its lines, and those that are code, without blanks, comments and docstrings.

python .ci/code_size.py
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

CORE = Path(__file__).resolve().parents[1] / "lora_da_core"
PARTS = {
    "ablation": "grids of runs",
    "testing": "conformance kit",
    "cli progress": "command line",
    "memory live_bytes budget": "plan",
    "distributed world roll_call shares merging agreement custody placement sums_storage": "processes, offloading",
    "adapter": "PEFT",
    "cache storage sources data_files repeatability": "files",
    "data models templates report spectra summaries display": "data, models, tables",
    "scale sizing probe allocation": "line search, shared ranks",
    "trainer regularization preferences numerics": "trainers, verification",
}
"""What lies around the data flow, by the names of modules; the rest is the flow itself."""
FAMILIES = ("cache", "cli")
"""Parts whose modules begin alike."""
FLOW = "data flow and contracts"
_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def part_of(path: Path) -> str:
    """The part that a module belongs to."""
    room = path.relative_to(CORE).parts[0].removesuffix(".py")
    family = room.partition("_")[0]
    found = [part for names, part in PARTS.items() if {room, family if family in FAMILIES else room} & {*names.split()}]
    return found[0] if found else FLOW


def code_lines(source: str) -> int:
    """Lines that hold code."""
    texts = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    held = {line for token in tokens if token.type not in _NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    return len(held - texts)


def main() -> None:
    """Prints the table."""
    lines: Counter[str] = Counter()
    code: Counter[str] = Counter()
    for path in CORE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        lines[part_of(path)] += source.count("\n")
        code[part_of(path)] += code_lines(source)
    for part in (FLOW, *sorted(PARTS.values(), key=lambda name: -code[name])):
        print(f"{part:46} {lines[part]:6} {code[part]:6}")
    print(f"{'together':46} {lines.total():6} {code.total():6}")


if __name__ == "__main__":
    main()
