"""`lora-da verify`: whether a saved adapter is what was computed, and how exact that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_da_core.cli_config_file import file_defaults
from lora_da_core.cli_init import assembled, requested
from lora_da_core.cli_init_options import InitOptions
from lora_da_core.cli_options import DTYPES, ExitCode, parsed, path
from lora_da_core.errors import OptionError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_da_core.models import LoadedModel
    from lora_da_core.numerics import LayerNumerics
    from lora_da_core.types import LoraFactors, RunReport

PROBE_TOKENS = 16
"""Tokens of the input that `verify` makes up where it is given no data."""


def verify(
    directory: Annotated[
        Path, typer.Argument(parser=path, metavar="DIR", help="A directory that 'lora-da init' wrote.")
    ],
    model: Annotated[str | None, typer.Option(help="The base model.", show_default="the run's")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Take the test input from this data set; with --numerics it is the run's.", show_default="none"
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data set.", show_default="train; the run's")] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Precision to load the model in.", metavar=DTYPES, show_default="the run's")
    ] = None,
    numerics: Annotated[
        bool,
        typer.Option(
            "--numerics",
            help="Also recompute every layer in float64 from the statistics: whether A's rows are orthogonal and "
            "eigenvectors, whether any others would be better, and what inverting the Fisher lost.",
        ),
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="With --numerics, a cache that holds the run's statistics.", show_default="the run's"
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Reload an adapter with stock PEFT and check that it is what was computed, on an untouched base."""
    from lora_da_core import adapter, models, storage
    from lora_da_core.data import waits_for
    from lora_da_core.progress import tell

    if cache_dir is not None and not numerics:
        raise OptionError("--cache-dir holds the statistics that --numerics reads; give both, or neither.")
    if split is not None and data is None and not numerics:
        raise OptionError("--split is a part of --data; give both, or neither.")
    report = storage.read_report(directory)
    for name in (storage.ADAPTER_CONFIG_FILE, storage.WEIGHTS_FILE):
        # Without its files PEFT would look for a repository of that name on the hub.
        if not (directory / name).is_file():
            raise StorageError(f"{directory / name} does not exist; run 'lora-da init' again.")
    _check_tensors(directory / storage.WEIGHTS_FILE)
    source = _recorded(directory, "model", "which model it belongs to") if model is None else model
    if dtype is None:
        dtype = _recorded(directory, "dtype", "in which precision its model was loaded")
    given = {"model": source, "data": data, "split": split, "device": device, "dtype": dtype, "cache_dir": cache_dir}
    options = _options_of(directory, {**given, "trust_remote_code": trust_remote_code}) if numerics else None
    tell((*(() if data is None else waits_for(data)), *models.waits_for(source)))
    rows = None if data is None else _first_rows(data, split or "train")
    loaded = models.load_model(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    checks = adapter.verify(directory, loaded.model, report, _probe_input(loaded, rows))
    lines = [(check.name, check.passed, check.detail) for check in checks]
    if options is not None:
        held = {
            name: pair for name, (_, pair) in adapter.held_factors(adapter.base_of(loaded.model), "default").items()
        }
        found = _recomputed(options, held, report)
        lines += _summary(found)
    for sentence, passed, detail in lines:
        typer.echo(f"{'✓' if passed else '✗'} {sentence} ({detail})")
    if options is not None:
        _show_remedies(found)
    if not all(passed for _, passed, _ in lines):
        raise typer.Exit(ExitCode.FAILED)


def _check_tensors(path: Path) -> None:
    """Refuses what is no safetensors file, or is cut short, before a model is loaded."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read: {error}; run 'lora-da init' again.") from error


def _options_of(directory: Path, given: Mapping[str, Any]) -> InitOptions:
    """What the run was told, with what is given here in its place."""
    from lora_da_core import storage

    repeatable = {entry.name: entry.name.endswith("_option") for entry in fields(InitOptions)}
    recorded = file_defaults(directory / storage.SETTINGS_FILE, repeatable)
    chosen = {**recorded, **{name: each for name, each in given.items() if each is not None}, "output": str(directory)}
    try:
        options = parsed(InitOptions, chosen)
    except OptionError as error:
        raise OptionError(f"{directory} does not say how it was made: {error}") from error
    # Statistics of all layers are wanted at once, and memory is planned for other work than this.
    return replace(options, max_memory=None, layers_per_pass=None, resume=False)


def _recomputed(options: InitOptions, held: Mapping[str, LoraFactors], report: RunReport) -> list[LayerNumerics]:
    from lora_da_core.numerics import recomputed

    parts = assembled(requested(options))
    cache = options.cache_dir
    if cache is not None and not cache.is_dir():
        raise OptionError(
            f"the cache {cache} does not exist; give where it is by --cache-dir, or an empty directory there, and the "
            "statistics are taken from the data again."
        )
    estimates = parts.pipeline.estimate(parts.loaded.model, parts.batches, parts.lora, cache_dir=cache)
    return recomputed(parts.pipeline, estimates, held, report)


def _summary(found: Sequence[LayerNumerics]) -> list[tuple[str, bool, str]]:
    """One line per figure: the worst layer's."""
    from lora_da_core.numerics import LIMIT

    sentences = {
        "orthogonality": "the rows of A are orthogonal",
        "residual": "they are eigenvectors of Ω, relative to ‖Ω‖",
        "excess": "no others have a better objective",
        "inversion": "the damped Fisher was inverted",
    }
    lines = []
    for figure, sentence in sentences.items():
        worst = max(found, key=lambda layer: abs(getattr(layer, figure)))
        value = getattr(worst, figure)
        lines.append((sentence, abs(value) <= LIMIT, f"at worst {value:.1e}, {worst.name}"))
    return lines


def _show_remedies(found: Sequence[LayerNumerics]) -> None:
    mended = [layer for layer in found if layer.remedies]
    worst = max(found, key=lambda layer: layer.condition)
    typer.echo(f"condition of V: {worst.condition:.1e} at most ({worst.name})")
    typer.echo(f"remedies in {len(mended)} of {len(found)} layers{':' if mended else ''}")
    for layer in mended:
        typer.echo(f"  {layer.name}: {'; '.join(layer.remedies)}")


def _recorded(directory: Path, option: str, meaning: str) -> str:
    from lora_da_core import storage

    value = storage.read_settings(directory).get(option)
    if not isinstance(value, str):
        raise OptionError(f"{directory} does not say {meaning}; give --{option}.")
    return value


def _first_rows(source: str, split: str) -> list[Any]:
    from lora_da_core.data import load_rows

    rows = load_rows(source, split=split)
    return [rows[index] for index in range(min(2, len(rows)))]


def _probe_input(loaded: LoadedModel, rows: list[Any] | None) -> dict[str, Tensor]:
    """An input without labels: the first rows, or made-up tokens."""
    import torch

    from lora_da_core import data

    device = next(loaded.model.parameters()).device
    if rows is None:
        vocabulary = int(loaded.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        tokens = (torch.arange(PROBE_TOKENS, device=device) * 7919 + 1) % vocabulary
        return {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens[None])}
    encoded = data.encode_text(rows, loaded.tokenizer, model_limit=loaded.max_positions)
    batch = data.batches(encoded.samples, pad_token_id=loaded.tokenizer.pad_token_id, batch_size=len(rows))[0]
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
