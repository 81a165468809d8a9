"""The options of `lora-da init`: what they mean, how a file gives them, and what they become."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from lora_da_core.config import NO_ALLOCATOR, ComponentChoice, LoraDAConfig, Preset
from lora_da_core.errors import OptionError
from lora_da_core.sources import read_settings_file
from lora_da_core.types import (
    Balance,
    DampingKind,
    FisherScale,
    Frozen,
    Offset,
    Pairing,
    Scale,
    Spectrum,
    StatisticsDevice,
    TokenMask,
    Unsupported,
)

OptionsT = TypeVar("OptionsT")

_DEFAULTS = LoraDAConfig()
_SETTINGS = frozenset(entry.name for entry in fields(LoraDAConfig)) - {"distributed"}
_NOT_RECORDED = frozenset({"config", "overwrite", "plot", "resume", "trust_remote_code"})


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes a file's values the defaults of the options that the command line does not give."""
    if path is not None and not context.resilient_parsing:
        known = {parameter.name: parameter.multiple for parameter in context.command.params if parameter.name}
        known.pop("config", None)
        context.default_map = _file_defaults(path, known)
    return path


def _preset(panel: str, text: str, name: str, values: object = None) -> Any:
    """An option whose value is the preset's unless it is given."""
    default = getattr(_DEFAULTS, name)
    metavar = "|".join(get_args(values)) if values is not None else None
    shown = "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
    return typer.Option(
        help=text, rich_help_panel=panel, metavar=metavar, show_default=f"the preset's; robust: {shown}"
    )


def _option(panel: str, text: str, *names: str, **rest: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **rest)


_IO, _LORA, _TEXT, _PARTS, _OMEGA, _FISHER, _RUN = (
    "Input and output",
    "LoRA",
    "Text",
    "Approximations",
    "LoRA-DA objective and scale",
    "Fisher",
    "Running",
)


@dataclass(frozen=True)
class InitOptions:
    """Everything `lora-da init` is told; None leaves the choice to the preset."""

    model: Annotated[str, _option(_IO, "Base model: hub id, directory, or .gguf file.")]
    data: Annotated[str, _option(_IO, "Data set: .jsonl, .json, .csv or .parquet file, directory, or hub id.")]
    output: Annotated[Path, _option(_IO, "Directory for the adapter and its report.")]
    config: Annotated[
        Path | None,
        _option(
            _IO,
            "TOML file (or an earlier run's lora_da_config.json) with any of these options, named without the "
            "leading dashes; options given here win.",
            is_eager=True,
            callback=_read_config,
        ),
    ] = None
    overwrite: Annotated[bool, _option(_IO, "Replace an earlier run in the output directory.", "--overwrite")] = False
    cache_dir: Annotated[
        Path | None,
        _option(
            _IO,
            "Directory that keeps statistics between runs: another run on the same model and data that changes only "
            "solver, rank, α, β, damping, N or scale makes no pass for them.",
            show_default="none",
        ),
    ] = None
    resume: Annotated[
        bool,
        _option(
            _IO,
            "Keep the statistics of every completed pass beside the output until it is written, and go on from those "
            "that an interrupted run with this option has left. A complete run of the same options is left as it is.",
            "--resume",
        ),
    ] = False
    plot: Annotated[bool, _option(_IO, "Also save spectra.png, the spectra and residuals.", "--plot")] = False

    rank: Annotated[int, _option(_LORA, "Rank r of the adapter.")] = 8
    lora_alpha: Annotated[float, _option(_LORA, "LoRA's α: B·A is multiplied by α/r.")] = 16.0
    use_rslora: Annotated[bool, _option(_LORA, "Multiply by α/√r instead of α/r.")] = False
    target_modules: Annotated[
        str, _option(_LORA, "Layers to adapt: 'all-linear', a comma-separated list of name endings, or a regex.")
    ] = "all-linear"
    exclude_modules: Annotated[
        str | None, _option(_LORA, "Layers to leave out: comma-separated list or regex.", show_default="none")
    ] = None
    unsupported: Annotated[
        str | None,
        _preset(
            _LORA,
            "Where a targeted layer cannot be initialised: stop, or leave it at PEFT's own initialisation.",
            "unsupported",
            Unsupported,
        ),
    ] = None

    samples: Annotated[int, _option(_TEXT, "Samples to draw from the data set, without replacement.")] = 64
    split: Annotated[str, _option(_TEXT, "Split of the data set; slices such as 'train[:1000]' work.")] = "train"
    prompt_template: Annotated[
        str | None,
        _option(
            _TEXT,
            "Format string with column names in braces, the answer last, e.g. 'Q: {question}\\nA: {answer}'.",
            show_default="from the columns",
        ),
    ] = None
    max_length: Annotated[
        int | None,
        _option(_TEXT, "Tokens kept of a sample.", show_default="1024 or the model's limit"),
    ] = None
    batch_size: Annotated[
        int | None,
        _option(_TEXT, "Samples per batch; it changes memory and speed, not the result.", show_default="2048 tokens"),
    ] = None

    preset: Annotated[
        str,
        _option(
            _PARTS, "Setting that fills whatever is not given: robust, paper, lora_one, lora_ga, …, or a plugin's."
        ),
    ] = "robust"
    estimator: Annotated[str | None, _option(_PARTS, "Fisher estimator.", show_default="the preset's")] = None
    estimator_option: Annotated[
        list[str] | None, _option(_PARTS, "Option of the estimator; repeatable.", metavar="KEY=VALUE")
    ] = None
    gradient: Annotated[str | None, _option(_PARTS, "Gradient estimator.", show_default="the preset's")] = None
    gradient_option: Annotated[
        list[str] | None, _option(_PARTS, "Option of the gradient estimator; repeatable.", metavar="KEY=VALUE")
    ] = None
    solver: Annotated[
        str | None, _option(_PARTS, "Eigen-solver; 'auto' chooses per layer.", show_default="the preset's")
    ] = None
    solver_option: Annotated[
        list[str] | None, _option(_PARTS, "Option of the solver; repeatable.", metavar="KEY=VALUE")
    ] = None
    allocator: Annotated[
        str | None,
        _option(
            _PARTS,
            "Rank allocator: shares the ranks out among the layers; 'none' keeps --rank everywhere.",
            show_default="the preset's; robust: none",
        ),
    ] = None
    allocator_option: Annotated[
        list[str] | None, _option(_PARTS, "Option of the allocator; repeatable.", metavar="KEY=VALUE")
    ] = None
    unconverged: Annotated[
        str | None,
        _preset(
            _PARTS,
            "Where a solver misses its tolerance: solve densely, go on with a warning, or stop.",
            "unconverged",
            get_type_hints(LoraDAConfig)["unconverged"],
        ),
    ] = None

    alpha: Annotated[float | None, _preset(_OMEGA, "Weight α ≥ 0 of the bias term −αΔΔᵀ.", "alpha")] = None
    beta: Annotated[float | None, _preset(_OMEGA, "Weight β ≥ 0 of the variance term (β/N)V.", "beta")] = None
    population: Annotated[
        int | None,
        _option(_OMEGA, "N, examples in the whole training set.", show_default="rows of the data set"),
    ] = None
    scale: Annotated[
        str | None,
        _preset(
            _OMEGA,
            "Size the start by a line search on the samples, by √γ, by LoRA-GA's or LOI's rule, or take it as it is.",
            "scale",
            Scale,
        ),
    ] = None
    gamma: Annotated[float | None, _preset(_OMEGA, "γ > 0 of a fixed scale; giving it fixes the scale.", "gamma")] = (
        None
    )
    balance: Annotated[
        str | None,
        _preset(
            _OMEGA,
            "What A is scaled to, scale=auto: a default LoRA's A·x, its norm, or half of the step.",
            "balance",
            Balance,
        ),
    ] = None
    pairing: Annotated[
        str | None,
        _preset(
            _OMEGA,
            "Whether A and B take directions that belong together, or two blocks of singular ones (LoRA-GA, LOI).",
            "pairing",
            Pairing,
        ),
    ] = None
    offset: Annotated[
        str | None, _preset(_OMEGA, "Where the start is taken out again; only 'none' can be saved.", "offset", Offset)
    ] = None
    frozen: Annotated[str | None, _preset(_OMEGA, "What is frozen in training (LoRA-FA: A).", "frozen", Frozen)] = None
    spectrum: Annotated[
        str | None,
        _preset(_OMEGA, "The step's singular values, scale=auto: as they are, or all alike.", "spectrum", Spectrum),
    ] = None
    rounds: Annotated[
        int | None,
        _preset(_OMEGA, "How often to estimate, each time where the step so far leads, scale=auto.", "rounds"),
    ] = None
    normalize: Annotated[bool | None, _preset(_OMEGA, "Divide Δ by its spectral norm σ, or not.", "normalize")] = None

    damping: Annotated[
        float | None,
        _preset(_FISHER, "Damping ≥ 0; relative: a multiple of the mean diagonal, absolute: in its units.", "damping"),
    ] = None
    damping_kind: Annotated[str | None, _preset(_FISHER, "How the damping is meant.", "damping_kind", DampingKind)] = (
        None
    )
    fisher_scale: Annotated[
        str | None,
        _preset(
            _FISHER, "K-FAC's output factor: mean over tokens, or sum over a sample's.", "fisher_scale", FisherScale
        ),
    ] = None
    token_mask: Annotated[
        str | None,
        _preset(
            _FISHER,
            "Tokens that count: those that predict a label, or all that are attended to.",
            "token_mask",
            TokenMask,
        ),
    ] = None

    device: Annotated[str, _option(_RUN, "Where to run: 'auto', 'cpu', 'cuda', 'cuda:1', …")] = "auto"
    dtype: Annotated[
        str,
        _option(
            _RUN,
            "Precision to load the model in; auto: the checkpoint's on a GPU, float32 on the CPU.",
            metavar="auto|float32|bfloat16|float16|float64",
        ),
    ] = "auto"
    max_memory: Annotated[
        str | None,
        _option(
            _RUN,
            "A limit such as 24GiB or 800MB; layers are divided among as many passes over the data as it takes "
            "('lora-da plan' tells how many), and what does not fit of the model's weights is offloaded.",
            metavar="SIZE",
            show_default="none",
        ),
    ] = None
    offload_dir: Annotated[
        Path | None,
        _option(
            _RUN,
            "Where statistics on disk go, and offloaded weights that cannot be read from the checkpoint's own files.",
            show_default="the system's temporary directory",
        ),
    ] = None
    statistics_device: Annotated[
        str | None,
        _preset(
            _RUN,
            "Where sums lie while no layer adds to them; auto: with their layers, or what --max-memory makes cheapest.",
            "statistics_device",
            StatisticsDevice,
        ),
    ] = None
    layers_per_pass: Annotated[
        int | None,
        _preset(
            _RUN,
            "How many layers at most have their statistics in memory at a time; each such part costs passes over the "
            "data of its own.",
            "layers_per_pass",
        ),
    ] = None
    process_timeout: Annotated[
        float,
        _option(
            _RUN,
            "Seconds that a process of a distributed run waits for the others; one that is silent for a tenth of it, "
            "or for 30 s, counts as killed.",
        ),
    ] = _DEFAULTS.process_timeout
    seed: Annotated[int, _option(_RUN, "Seed of every random number.")] = 0
    trust_remote_code: Annotated[bool, _option(_RUN, "Run code that comes with the model.", "--trust-remote-code")] = (
        False
    )

    @property
    def passes_dir(self) -> Path | None:
        """Where an interrupted run leaves its completed passes; None where it leaves none."""
        return self.output.with_name(f".{self.output.name}.passes") if self.resume else None

    def lora_da_config(self, preset: Preset) -> LoraDAConfig:
        """The preset's configuration with what was given put in its place.

        Args:
            preset: The preset that is named here.

        Returns:
            The configuration; `samples` stays open, as the draw is made before batching.
        """
        given = {name: getattr(self, name) for name in sorted(_SETTINGS - {"samples"})}
        return replace(preset.config, **{name: value for name, value in given.items() if value is not None})

    def component(self, kind: str, preset: Preset) -> ComponentChoice:
        """The component of a kind, as `component_choice` reads it."""
        return component_choice(self, kind, preset)

    def recorded(self) -> dict[str, Any]:
        """The options as JSON values, such that `--config` takes them again."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {
            name.replace("_", "-"): str(value) if isinstance(value, Path) else value
            for name, value in values.items()
            if name not in _NOT_RECORDED and value != []
        }


def component_choice(options: object, kind: str, preset: Preset) -> ComponentChoice:
    """The component of a kind, with its options: what was given, on top of the preset's.

    Args:
        options: Options with a field of that name, such as `estimator`, and one for its options, `estimator_option`.
        kind: `estimator`, `gradient`, `solver` or `allocator`.
        preset: The preset that is named there.

    Returns:
        What `build_pipeline` takes.

    Raises:
        OptionError: An option is not KEY=VALUE, or options are given for an automatic choice or for none.
    """
    choice: ComponentChoice = getattr(preset, kind)
    default, standing = (choice, {}) if isinstance(choice, str) else choice
    name: str = default if getattr(options, kind) is None else getattr(options, kind)
    given = _pairs(f"--{kind}-option", getattr(options, f"{kind}_option") or ())
    merged = {**(standing if name == default else {}), **given}
    if name in ("auto", NO_ALLOCATOR) and merged:
        raise OptionError(f"--{kind}-option needs --{kind}: {name!r} takes no options.")
    return (name, merged) if merged else name


def module_names(text: str) -> str | list[str]:
    """A comma-separated list of module names as a list; anything else is a regex, or PEFT's `all-linear`.

    >>> module_names("q_proj, v_proj"), module_names("q_proj,"), module_names(r".*[qk]"), module_names("all-linear")
    (['q_proj', 'v_proj'], ['q_proj'], '.*[qk]', 'all-linear')
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text == "all-linear" or not names or not all(name.replace("_", "").replace(".", "").isalnum() for name in names):
        return text
    return names


def command_of(options: type[OptionsT], body: Callable[[OptionsT], None]) -> Callable[..., None]:
    """A function with one parameter per field of `options`, as typer wants it, that calls `body` with an instance.

    Args:
        options: A dataclass whose fields are annotated with typer's options.
        body: What the command does; its docstring is the command's help.

    Returns:
        The function, to be given to `app.command`.
    """

    def command(**values: Any) -> None:
        body(options(**values))

    hints = get_type_hints(options, include_extras=True)
    signature = inspect.signature(options)
    parameters = [entry.replace(annotation=hints[entry.name]) for entry in signature.parameters.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints
    command.__doc__ = body.__doc__
    return command


def _pairs(option: str, texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"{option} {text!r} is not KEY=VALUE, e.g. output=full.")
        found[key.strip().replace("-", "_")] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    """Numbers, true, false and null as JSON reads them (any case for words), everything else as text."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "null") else text)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or brackets without end
        return text


def _file_defaults(path: Path, known: Mapping[str, bool]) -> dict[str, Any]:
    """A file's values by parameter name; `known` says of each parameter whether it is repeatable."""
    defaults: dict[str, Any] = {}
    for key, value in _parse_file(path).items():
        name = key.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0].replace('_', '-')!r}?" if close else ""
            raise OptionError(f"{path}: unknown option {key!r}.{hint} Run 'lora-da init --help' for all of them.")
        if name == "trust_remote_code":
            # A file that came with an adapter must not make a stranger's code run.
            if value is not False:
                raise OptionError(
                    f"{path}: {key!r} is taken from the command line alone; give --trust-remote-code there."
                )
            continue
        if name in defaults:
            raise OptionError(f"{path}: option {key!r} is given twice.")
        defaults[name] = _as_option(path, key, value, repeatable=known[name])
    return defaults


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        content = read_settings_file(path)
    except OSError as error:
        raise OptionError(f"--config {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise OptionError(
            f"--config {path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise OptionError(f"--config {path} holds no options by name.")
    return content


def _as_option(path: Path, key: str, value: Any, *, repeatable: bool) -> Any:
    if repeatable and isinstance(value, dict):
        return [f"{name}={_text(entry)}" for name, entry in value.items()]
    if repeatable:
        return [value] if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value) and key.endswith("modules"):
        return ",".join(value)
    if isinstance(value, (list, dict)):
        raise OptionError(f"{path}: option {key!r} takes one value, not a {type(value).__name__}.")
    return value


def _text(value: Any) -> str:
    """The value as `_value` reads it again; TOML's dates and times, which JSON has not, as text."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
