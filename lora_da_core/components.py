"""The instances that a pipeline is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lora_da_core.errors import OptionError
from lora_da_core.functions import FunctionObjective
from lora_da_core.interfaces import FisherEstimator, GradientEstimator, Objective, RankAllocator, Solver
from lora_da_core.registry import Registry


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
