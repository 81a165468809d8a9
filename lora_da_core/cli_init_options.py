"""The options of `lora-da init`: what they mean, and what they become."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from lora_da_core.cli_config_file import file_defaults
from lora_da_core.cli_options import DTYPES, component_choice, one_of, path
from lora_da_core.config import ComponentChoice, LoraDAConfig, Preset
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

if TYPE_CHECKING:
    from peft import LoraConfig

    from lora_da_core.data import TextOptions
    from lora_da_core.pipeline import Pipeline

_DEFAULTS = LoraDAConfig()
_SETTINGS = frozenset(entry.name for entry in fields(LoraDAConfig)) - {"distributed"}
_NOT_RECORDED = frozenset({"config", "overwrite", "plot", "resume", "trust_remote_code"})


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Makes a file's values the defaults of the options that the command line does not give."""
    if file is not None and not context.resilient_parsing:
        known = {parameter.name: parameter.multiple for parameter in context.command.params if parameter.name}
        known.pop("config", None)
        context.default_map = file_defaults(file, known)
    return file


def _preset(panel: str, text: str, name: str, values: object = None) -> Any:
    """An option whose value is the preset's unless it is given."""
    default = getattr(_DEFAULTS, name)
    metavar = one_of(*get_args(values)) if values is not None else None
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
    output: Annotated[Path, _option(_IO, "Directory for the adapter and its report.", parser=path)]
    config: Annotated[
        Path | None,
        _option(
            _IO,
            "TOML file (or an earlier run's lora_da_config.json) with any of these options, named without the "
            "leading dashes; options given here win.",
            parser=path,
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
            parser=path,
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
        _option(
            _TEXT,
            "Samples per batch; it changes memory and speed, not the result.",
            show_default="256 tokens on a CPU, 2048 elsewhere",
        ),
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
            metavar=DTYPES,
        ),
    ] = "auto"
    max_memory: Annotated[
        str | None,
        _option(
            _RUN,
            "A limit such as 24GiB or 800MB; layers are divided into as many parts as it takes ('lora-da plan' tells "
            "how many), and what does not fit of the model's weights is offloaded.",
            metavar="SIZE",
            show_default="none",
        ),
    ] = None
    offload_dir: Annotated[
        Path | None,
        _option(
            _RUN,
            "Where statistics on disk go, and offloaded weights that cannot be read from the checkpoint's own files.",
            parser=path,
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


@dataclass(frozen=True)
class Request:
    """What a run of `init` is asked for, checked; nothing is loaded yet."""

    options: InitOptions
    pipeline: Pipeline
    text: TextOptions
    lora: LoraConfig
