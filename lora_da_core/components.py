"""What a pipeline is made of: the instances, and what they run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_da_core.config import LoraDAConfig
from lora_da_core.errors import OptionError
from lora_da_core.function_objective import FunctionObjective
from lora_da_core.interfaces import FisherEstimator, GradientEstimator, Objective, RankAllocator, Solver
from lora_da_core.registry import Registry
from lora_da_core.types import LayerSpec


@dataclass(frozen=True)
class Components:
    """The instances a pipeline is made of; `solver` None chooses per layer, `allocator` None keeps the ranks."""

    estimator: FisherEstimator[Any]
    gradient: GradientEstimator[Any]
    objective: Objective[Any]
    solver: Solver[Any] | None
    allocator: RankAllocator[Any] | None = None

    def check(self) -> None:
        """Refuses components that do not go together.

        Raises:
            OptionError: The estimator draws labels and the objective cannot.
        """
        draws = type(self.objective).fisher_losses is not Objective.fisher_losses
        if self.estimator.labels != "empirical" and not draws:
            raise OptionError(
                f"estimator {self.estimator.name!r} asks for labels={self.estimator.labels!r}, which objective "
                f"{self.objective.name!r} cannot draw; use labels='empirical'."
            )

    def check_layers(self, specs: Sequence[LayerSpec]) -> None:
        """Refuses layers that a component cannot take, before any work.

        Args:
            specs: The layers.

        Raises:
            OptionError: One has one-hot inputs, and a component takes rows alone.
        """
        embedding = next((spec.name for spec in specs if spec.one_hot), None)
        takes_tokens: dict[str, FisherEstimator[Any] | GradientEstimator[Any]] = {"estimator": self.estimator}
        if not self.gradient.forward_only:
            takes_tokens["gradient"] = self.gradient
        for kind, component in takes_tokens.items():
            if embedding is not None and not component.takes_one_hot:
                raise OptionError(
                    f"{kind} {component.name!r} takes no one-hot inputs, which {embedding}, an embedding, has; choose "
                    f"another {kind}, or leave the layer out with exclude_modules."
                )

    def names(self) -> dict[str, str]:
        """Name by kind."""
        solver = "auto" if self.solver is None else self.solver.name
        named = {"estimator": self.estimator, "gradient": self.gradient, "objective": self.objective}
        found = {**{kind: component.name for kind, component in named.items()}, "solver": solver}
        return found if self.allocator is None else {**found, "allocator": self.allocator.name}

    def origins(self, registry: Registry) -> dict[str, str]:
        """Distribution and version by kind."""
        parts = {"estimator": self.estimator, "gradient": self.gradient, "objective": self.objective}
        found = {kind: registry.origin(kind, type(component)) for kind, component in parts.items()}
        if isinstance(self.objective, FunctionObjective):
            found["objective"] = f"a function of {self.objective.module}"
        return found

    def options(self) -> dict[str, dict[str, Any]]:
        """Options by kind."""
        parts = {"estimator": self.estimator, "gradient": self.gradient, "objective": self.objective}
        found = {kind: asdict(component.options) for kind, component in parts.items()}
        found["solver"] = {} if self.solver is None else asdict(self.solver.options)
        return found if self.allocator is None else {**found, "allocator": asdict(self.allocator.options)}


@dataclass(frozen=True)
class Setup:
    """All that a pipeline brings to a run, whatever the model and the data.

    Attributes:
        registry: The installed plugins.
        components: The instances.
        config: The settings.
    """

    registry: Registry
    components: Components
    config: LoraDAConfig
