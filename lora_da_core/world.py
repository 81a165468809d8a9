"""What a run asks of the processes that share it, and the answers of a process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, what is done and what there is to do; 0 where nobody knows how much that is."""


class World:
    """A single process: what it would ask of others is already here."""

    rank = 0
    size = 1

    def exchange(self, phase: str, value: Any) -> list[Any]:
        """Every process's value, by rank; nobody goes on before all have given theirs.

        Args:
            phase: What for; all must be in the same.
            value: JSON-representable, and small.

        Returns:
            The values as JSON gives them back.
        """
        return [value]

    def agree(self, phase: str, values: Mapping[str, Any]) -> None:
        """Makes sure that all processes were told the same.

        Args:
            phase: What for.
            values: JSON-representable, by name.
        """

    def gather(self, phase: str, value: Any) -> list[Any]:
        """Every process's value, by rank.

        Args:
            phase: What for.
            value: Whatever can be pickled; its tensors on the CPU.

        Returns:
            The values.
        """
        return [value]

    def add(self, phase: str, tensors: Sequence[Tensor]) -> None:
        """Adds the processes' tensors, in place; all have them in the same order, shapes and dtypes.

        Args:
            phase: What for.
            tensors: Floating-point, on any devices.
        """

    def add_at(self, phase: str, tensors: Sequence[Tensor], owner: int) -> None:
        """Adds the processes' tensors, in place on one of them; what the others' hold afterwards is undefined.

        Nobody waits to see whether all are there: it is meant for processes that gather each other's weights anyway.

        Args:
            phase: What for.
            tensors: As `add` takes them.
            owner: The rank that gets the sums.
        """

    def broadcast(
        self, phase: str, values: Mapping[str, Tensor], source: int, device: torch.device
    ) -> dict[str, Tensor]:
        """One process's tensors.

        Args:
            phase: What for.
            values: The tensors of `source`; what the others give is not looked at.
            source: A rank.
            device: Where the others put those that are not on the host there.

        Returns:
            At the source the values themselves, elsewhere equal ones.
        """
        return dict(values)

    def equalise(self, phase: str, tensors: Sequence[Tensor]) -> None:
        """Overwrites the processes' tensors, of the same shapes, with rank 0's.

        Args:
            phase: What for.
            tensors: On any devices.
        """

    def watched(self, on_progress: Progress | None) -> Progress | None:
        """A progress function that also stops this process soon after another has failed.

        Args:
            on_progress: Told as well.

        Returns:
            The function.
        """
        return on_progress


ALONE = World()
