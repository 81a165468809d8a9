"""Loading a causal language model with its tokenizer: from the hub, a directory or a GGUF file."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_da_core.errors import ModelError, OptionError
from lora_da_core.sources import asked_of_hub, is_kind, local_path, looks_like_path, missing, reason

_SUFFIXES = (".gguf",)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and its tokenizer.

    Attributes:
        model: The model, on its device.
        tokenizer: Its tokenizer, with a padding token.
        source: What it was loaded from, as given.
        notes: What was assumed, in plain sentences.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    notes: tuple[str, ...] = ()

    @property
    def max_positions(self) -> int | None:
        """Tokens the model takes at most; None where it does not say."""
        return _max_positions(self.model)


@dataclass(frozen=True)
class Offload:
    """How a model is loaded that is larger than memory, by accelerate.

    Attributes:
        resident_bytes: Weights that may stay on the device.
        directory: Where a folder is made for weights that cannot stay in the checkpoint's own files; None takes the
            system's place for temporary files. It goes when the model does.
    """

    resident_bytes: int
    directory: Path | None = None


def load_model(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    offload: Offload | None = None,
) -> LoadedModel:
    """Loads a causal language model.

    Args:
        source: A hub id, a directory as `save_pretrained` writes it, or a .gguf file, which is de-quantized.
        device: `"auto"` takes a GPU where there is one; otherwise a device as torch writes it.
        dtype: `"auto"` takes the checkpoint's on an accelerator and float32 on the CPU; otherwise one of
            `float32 bfloat16 float16 float64`.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        offload: What may stay on the device; the rest is kept in host memory, beside an accelerator, and on disk. None
            loads the whole model onto the device.

    Raises:
        ModelError: There is no such model, or it cannot be loaded.
        OptionError: The device or the dtype does not exist.
    """
    chosen = _device(device)
    precision = _dtype(dtype, chosen)
    location = _location(source, trust_remote_code)
    tokenizer, notes = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if offload is None:
        return LoadedModel(_place(_load(str(source), location, precision), chosen), tokenizer, str(source), notes)
    if "gguf_file" in location:
        raise ModelError(f"'{source}' is read as a whole and so cannot be offloaded; save it as a checkpoint first.")
    folder = tempfile.mkdtemp(prefix="lora-da-", dir=offload.directory)
    try:
        model = _load(str(source), {**location, **_offloaded(chosen, offload, folder)}, precision)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    away = [parameter.is_meta for parameter in model.parameters()]
    note = f"{sum(away)} of {len(away)} parameters are offloaded: they are read whenever they are used."
    return LoadedModel(model, tokenizer, str(source), (*notes, note))


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> tuple[Any, tuple[str, ...]]:
    """Loads a model's tokenizer.

    Args:
        source: As `load_model` takes it.
        trust_remote_code: As `load_model` takes it.

    Returns:
        The tokenizer, with a padding token, and what was assumed.
    """
    from transformers import AutoTokenizer

    location = _location(source, trust_remote_code)
    with _loading(str(source)):
        tokenizer = AutoTokenizer.from_pretrained(**location)
    return tokenizer, _ensure_padding(tokenizer, str(source))


def _offloaded(device: torch.device, offload: Offload, folder: str) -> dict[str, Any]:
    """What transformers' `from_pretrained` takes for an offloaded model."""
    from accelerate.utils import get_max_memory

    place: int | str = device.type if device.type in ("cpu", "mps") else device.index or 0
    memory = {place: offload.resident_bytes}
    if place != "cpu":
        memory["cpu"] = get_max_memory()["cpu"]
    return {"device_map": "auto", "max_memory": memory, "offload_folder": folder}


@dataclass(frozen=True)
class ModelShapes:
    """A model on the meta device: shapes without weights.

    Attributes:
        model: The model, in evaluation mode.
        device: Where it is meant to run; nothing is there yet.
        dtype: The precision it is meant to be loaded in.
        notes: What was assumed, in plain sentences.
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

    @property
    def max_positions(self) -> int | None:
        """Tokens the model takes at most; None where it does not say."""
        return _max_positions(self.model)


def load_shapes(
    source: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> ModelShapes:
    """Builds a causal language model from its configuration alone; a directory with a `config.json` will do.

    Args:
        source: As `load_model` takes it.
        device: As `load_model` takes it, but this machine need not have it.
        dtype: As `load_model` takes it.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Returns:
        The model as `load_model` would load it there, without weights.

    Raises:
        ModelError: There is no such configuration, or no model can be built from it.
        OptionError: There are no such device or dtype.
    """
    chosen = _device_type(device)
    precision = _dtype(dtype, chosen)
    location = _location(source, trust_remote_code)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(**location)
        if precision == "auto":
            precision = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=precision, trust_remote_code=trust_remote_code)
    except Exception as error:  # config, hub and the model's own code each raise their own; the answer is the same
        raise ModelError(
            f"the shapes of model '{source}' cannot be found: {reason(error)} Give a causal language model: a hub id, "
            "a directory with a config.json, or a .gguf file."
        ) from error
    assert isinstance(precision, torch.dtype)
    notes: tuple[str, ...] = ()
    if getattr(config, "quantization_config", None) is not None:
        name = str(precision).removeprefix("torch.")
        notes = (f"The checkpoint is quantized; its weights are counted in {name}, so the peak is too high.",)
    return ModelShapes(model.eval(), chosen, precision, notes)


def waits_for(source: str | Path) -> tuple[str, ...]:
    """What to say before a model or its shapes are looked for: what is waited for.

    Args:
        source: As `load_model` takes it.

    Returns:
        A sentence; none of a directory.
    """
    path = local_path(source)
    if path.suffix.lower() in _SUFFIXES and is_kind(path, "file"):
        return (f"reading the header of '{source}', which holds the vocabulary: this can take a quarter of a minute",)
    return asked_of_hub("model", source, _SUFFIXES)


def _location(source: str | Path, trust_remote_code: bool) -> dict[str, Any]:
    """What transformers' `from_pretrained` takes for a source."""
    if not str(source):
        raise ModelError("the model has no name; give a directory, a GGUF file, or the id of a model on the hub.")
    path = local_path(source)
    if is_kind(path, "file"):
        _check_gguf(path)
        location: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif is_kind(path, "directory"):
        _check_directory(path)
        location = {"pretrained_model_name_or_path": str(path)}
    elif looks_like_path(str(source), _SUFFIXES):
        raise ModelError(missing("model", source, _SUFFIXES))
    else:
        location = {"pretrained_model_name_or_path": str(source)}
    location["trust_remote_code"] = trust_remote_code
    return location


def _max_positions(model: nn.Module) -> int | None:
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@contextmanager
def _loading(source: str) -> Iterator[None]:
    try:
        with _progress_bars_off():
            yield
    except Exception as error:  # config, weights, tokenizer and hub each raise their own; the answer is the same
        raise ModelError(
            f"model '{source}' cannot be loaded: {reason(error)} Give a causal language model: a hub id, a "
            "directory that save_pretrained wrote, or a .gguf file."
        ) from error


def _load(source: str, location: dict[str, Any], dtype: torch.dtype | str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    plain = _dequantized() if "gguf_file" in location else {}
    model: Any
    with _loading(source):
        model, found = AutoModelForCausalLM.from_pretrained(**location, **plain, dtype=dtype, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"the checkpoint of '{source}' lacks {len(missing)} of the model's weights, the first is {missing[0]}; "
            "they would be random. Give a complete causal language model."
        )
    if plain:
        _forget_quantization(model)
        model.name_or_path = source  # PEFT writes it down, and transformers knows the folder alone
    loaded: nn.Module = model.eval()
    return loaded


@contextmanager
def _progress_bars_off() -> Iterator[None]:
    """Hides the bars of reading weights from disk; a download keeps its own."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    previous = logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    bar = getattr(gguf_reader, "tqdm", None)  # heeds no setting of the library
    if bar is not None:
        gguf_reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)
        if bar is not None:
            gguf_reader.tqdm = bar


def _dequantized() -> dict[str, Any]:
    """What asks for plain weights; releases that cannot keep GGUF blocks packed have nothing to ask."""
    import transformers

    options = getattr(transformers, "GgufConfig", None)
    return {} if options is None else {"quantization_config": options(dequantize=True)}


def _forget_quantization(model: Any) -> None:
    """The weights are plain now; what still calls them quantized would refuse training and saving."""
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def _ensure_padding(tokenizer: Any, source: str) -> tuple[str, ...]:
    if tokenizer.pad_token_id is not None:
        return ()
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of '{source}' has neither a padding nor an end-of-text token; set one.")
    tokenizer.pad_token = tokenizer.eos_token
    return (f"The tokenizer has no padding token: '{tokenizer.eos_token}' pads.",)


def _place(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        return model.to(device)
    except RuntimeError as error:  # out of memory, above all
        raise ModelError(f"the model does not fit on {device}: {reason(error)}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device(_accelerator() or "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise OptionError(f"device '{name}' cannot be used: {_refusal(error)} Take 'auto', or 'cpu'.") from error
    if device.type == "meta":
        raise OptionError("device 'meta' holds no values to compute with. Take 'auto', or 'cpu'.")
    return device


def _device_type(name: str) -> torch.device:
    """A device that need not be here: the kind of machine that a run is planned for."""
    if name == "auto":
        return torch.device(_accelerator() or "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device '{name}' is unknown: {_refusal(error)} Take 'auto', 'cpu' or 'cuda'.") from error
    if device.type == "meta":
        raise OptionError("device 'meta' holds no values to compute with. Take 'auto', 'cpu' or 'cuda'.")
    return device


def _refusal(error: Exception) -> str:
    """What torch says of a device, without the list of all the kinds that were ever thought of."""
    return "torch knows no such device." if "device string" in str(error) else reason(error)


def _accelerator() -> str | None:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in _DTYPES:
        raise OptionError(f"dtype '{name}' is unknown; choose one of auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _check_gguf(path: Path) -> None:
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"model '{path}' is a file, but not a .gguf file; give the directory of the checkpoint.")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading '{path}' takes the gguf package: pip install \"lora-da-core[gguf]\".")


def _check_directory(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"'{path}' is a PEFT adapter, not a model; give the base model that it adapts.")
    files = sorted(entry.name for entry in path.glob("*.gguf"))
    hint = f" Did you mean '{path / files[0]}'?" if files else " Give a directory that save_pretrained wrote."
    raise ModelError(f"directory '{path}' holds no config.json.{hint}")
