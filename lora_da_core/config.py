"""The settings of a run and of a preset: frozen dataclasses that refuse values out of range."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from lora_da_core.errors import OptionError
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

ComponentChoice = str | tuple[str, dict[str, Any]]
"""A component by name, or (name, options)."""

PAPER_GAMMA = 1024.0
GAMMAS = {"stable": 16.0, "product": 100.0}
"""γ of scales that have another default: LoRA-GA's (arXiv 2407.05000), and that of LOI's norm 0.01 (2507.12142)."""

NO_ALLOCATOR = "none"
"""The rank allocator's name where there is none: every layer keeps the rank that the LoRA configuration gives it."""


@dataclass(frozen=True)
class LoraDAConfig:
    """Settings of Ω, its statistics and the scale of the factors (arXiv 2510.24561).

    Attributes:
        alpha: Weight α ≥ 0 of the bias term −αΔΔᵀ.
        beta: Weight β ≥ 0 of the variance term (β/N)V.
        population: N, the size of the training set; None takes the number of examples given or sampled.
        scale: How large the start is. `"auto"` sizes it by a line search on the samples; `"unit"` takes the step as it
            is, `"product"` such that scaling·B·A has the Frobenius norm 1/γ; all three divide it between A and B as
            `balance` says. `"fixed"` divides both factors by √γ, `"stable"` multiplies both by out^¼/√γ (LoRA-GA).
        gamma: γ > 0; with `scale="auto"` giving it means a fixed scale. None means 1024 where the scale is fixed, 16
            where it is stable, 100 for the product.
        balance: What A is scaled to, where the start is divided; B takes the rest of the step. `"activation"`: on the
            samples A·x is as large as a default LoRA's would be, layer by layer; `"norm"`: A has the norm of a default
            LoRA's; `"even"`: A and B share the square roots of the step's singular values.
        pairing: Which directions A and B take. `"same"`: those that belong together. The others solve for 2r directions
            and let A and B span different blocks of singular ones: `"right_first"` A the first r right ones and B the
            next r left ones (LoRA-GA), `"left_first"` B the first r left ones and A the next r right ones (LOI); their
            product is no step, so the scale may not be automatic.
        offset: Whether scaling·B·A is taken out again, so that the start computes what the base computes: not at all,
            from the base's weights in place (`"base"`), or by a second, frozen adapter (`"frozen_adapter"`).
        frozen: Whether A is frozen once it is written (LoRA-FA).
        spectrum: With an automatic scale, whether the step keeps its singular values (`"kept"`) or has them all alike
            (`"flat"`).
        rounds: With an automatic scale, how often everything is estimated, each further time where the earlier steps
            lead and on another part of the samples; the sum of the steps is cut to the rank.
        normalize: Whether Δ is divided by its spectral norm σ.
        token_mask: Which tokens enter the Fisher: those that predict a label, or all the attention mask keeps.
        damping: Damping ≥ 0 of the Fisher.
        damping_kind: `"relative"` to the Fisher's mean diagonal, or `"absolute"`.
        fisher_scale: Whether K-FAC's Y is the mean over tokens or the sum over a sample's tokens.
        layers_per_pass: How many layers at most have their statistics in memory at a time: each such part is estimated
            in passes of its own, solved and freed. Layers of one input stay together. `"auto"` takes all of them, or as
            many as a run's `max_memory` allows.
        statistics_device: Where sums lie while no layer adds to them or is solved: with its layer (`"device"`), in the
            host's memory, or on `"disk"`, in a file below a run's `offload_dir`. `"auto"` leaves them on the device;
            where a run's `max_memory` asks for less, it takes what costs least time by plan, more passes over the data
            or moving sums. The sums are the same bit by bit.
        samples: Number of samples to read; None reads every batch.
        seed: Seed of every random number.
        unconverged: What to do where a solver misses its tolerance: `"fallback"` to dense eigh, `"warn"` or
            `"error"`.
        unsupported: What to do where a targeted module cannot be initialised (convolutions, embeddings, a rank above
            the layer's sizes): `"error"`, or `"default"`, which leaves it at PEFT's own initialisation and lists it in
            the report's notes.
        distributed: Whether the processes of an initialised process group share a run (`"auto"`), every one being given
            the same model and data; or each makes the whole of its own (`"off"`).
        process_timeout: Seconds that a process waits for the others at most. One that gives no sign of life for a tenth
            of it, or for 30 s, counts as killed.
    """

    alpha: float = 1.0
    beta: float = 0.03
    population: int | None = None
    scale: Scale = "auto"
    gamma: float | None = None
    balance: Balance = "activation"
    pairing: Pairing = "same"
    offset: Offset = "none"
    frozen: Frozen = "none"
    spectrum: Spectrum = "kept"
    rounds: int = 1
    normalize: bool = True
    token_mask: TokenMask = "labels"
    damping: float = 100.0
    damping_kind: DampingKind = "relative"
    fisher_scale: FisherScale = "token_mean"
    layers_per_pass: int | Literal["auto"] = "auto"
    statistics_device: StatisticsDevice = "auto"
    samples: int | None = None
    seed: int = 0
    unconverged: Literal["fallback", "warn", "error"] = "fallback"
    unsupported: Unsupported = "error"
    distributed: Literal["auto", "off"] = "auto"
    process_timeout: float = 600.0

    _minimum: ClassVar[dict[str, float]] = {"alpha": 0, "beta": 0, "damping": 0}
    _whole: ClassVar[dict[str, int]] = {"seed": 0, "population": 1, "samples": 1, "rounds": 1}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            value, allowed = getattr(self, entry.name), get_args(hints[entry.name])
            if allowed and all(isinstance(choice, str) for choice in allowed) and value not in allowed:
                raise OptionError(f"{entry.name} is {value!r}; choose one of {', '.join(allowed)}.")
        for name, least in self._minimum.items():
            if not _is_number(getattr(self, name)) or getattr(self, name) < least:
                raise OptionError(f"{name} is {getattr(self, name)!r}; it must be a number of at least {least:g}.")
        for name, least in self._whole.items():
            value = getattr(self, name)
            if (value is not None or name in ("seed", "rounds")) and not _is_whole(value, least):
                raise OptionError(f"{name} is {value!r}; it must be a whole number of at least {least}, below 2**63.")
        if not _is_number(self.process_timeout) or self.process_timeout < 1:
            raise OptionError(f"process_timeout is {self.process_timeout!r}; it must be at least 1 second.")
        if self.layers_per_pass != "auto" and not _is_whole(self.layers_per_pass, 1):
            raise OptionError(f"layers_per_pass is {self.layers_per_pass!r}; it must be 'auto' or at least 1.")
        if self.gamma is not None and not (_is_number(self.gamma) and self.gamma > 0):
            raise OptionError(f"gamma is {self.gamma!r}; it must be a number above 0, or left out.")
        if not isinstance(self.normalize, bool):
            raise OptionError(f"normalize is {self.normalize!r}; it must be True or False.")
        if self.alpha == 0 and self.beta == 0:
            raise OptionError("alpha and beta are both 0: Ω would be zero. Give at least one of them.")

        if self.pairing != "same" and self.automatic_scale:
            raise OptionError(f"pairing is {self.pairing!r}: the product is no step to search along; give a scale.")
        if self.scale == "unit" and self.gamma is not None:
            raise OptionError("gamma is without meaning where scale='unit'; leave it out.")
        if self.rounds > 1 and not self.automatic_scale:
            raise OptionError(f"rounds is {self.rounds} with a fixed scale; only scale='auto' takes several rounds.")

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self.changed().items())
        return f"{type(self).__name__}({', '.join(given)})"

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        values = ((entry, getattr(self, entry.name)) for entry in fields(self))
        return {entry.name: value for entry, value in values if value != entry.default}

    @property
    def automatic_scale(self) -> bool:
        """Whether the scale comes from the data."""
        return self.scale == "auto" and self.gamma is None

    @property
    def fixed_gamma(self) -> float:
        """γ where the scale is fixed."""
        return GAMMAS.get(self.scale, PAPER_GAMMA) if self.gamma is None else self.gamma

    @property
    def rule(self) -> Scale:
        """The scale that is meant: a γ alone means a fixed one."""
        return "fixed" if self.scale == "auto" and self.gamma is not None else self.scale


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # NaN compares false; whole numbers have no bound of their own
    )


@dataclass(frozen=True)
class Preset:
    """A full pipeline setting under a name: components and configuration.

    Attributes:
        name: What `preset=` takes.
        summary: One sentence for listings.
        estimator: Fisher estimator.
        gradient: Gradient estimator.
        solver: Solver.
        config: Everything else.
        allocator: Rank allocator, or `"none"`.
        api_version: Version of the plugin contracts it was written for.
    """

    name: str
    summary: str
    estimator: ComponentChoice = "kfac"
    gradient: ComponentChoice = "full"
    solver: ComponentChoice = "auto"
    config: LoraDAConfig = field(default_factory=LoraDAConfig)
    allocator: ComponentChoice = NO_ALLOCATOR
    api_version: int = 1
