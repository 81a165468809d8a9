"""Turns what a plugin's code raises into an error that says whose code it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lora_da_core.errors import LoraDAError, PluginError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the host.

    Args:
        error: Any error.

    Returns:
        True for torch's own error, Python's, and the RuntimeError that torch's allocator for the CPU raises.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)


def reason_of(error: BaseException) -> str:
    """What an error says, after whose code raised it where `blamed` let it pass.

    Args:
        error: Any error.

    Returns:
        One line or more.
    """
    whose = "".join(f"{note}: " for note in getattr(error, "__notes__", ())[:1])
    return f"{whose}{type(error).__name__}: {error}"


@contextlib.contextmanager
def shortage_named(during: str, cure: str) -> Iterator[None]:
    """Raises a `LoraDAError` in the place of an error that says that memory ran out; all others pass.

    Args:
        during: What was being done, e.g. `the estimates were solved`.
        cure: What to do about it, as sentences.

    Raises:
        LoraDAError: Memory ran out within the block.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise LoraDAError(f"memory ran out while {during}. {cure} {reason_of(error)}") from error


class blamed(contextlib.AbstractContextManager[None]):
    """Raises a `PluginError` in the place of whatever the block raises; our own errors and out-of-memory pass.

    A class, as it is entered several times for each layer and batch, where a generator takes three times as long.
    """

    def __init__(self, component: str, place: str = "") -> None:
        """Name who is to be blamed.

        Args:
            component: Kind, name and distribution.
            place: Where it happened, e.g. ` on layer x`.
        """
        self._component = component
        self._place = place

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A plugin that exits would end the run without a word, and with the status of its choice.
        if isinstance(error, LoraDAError) or not isinstance(error, (Exception, SystemExit)):
            return
        if is_out_of_memory(error):
            error.add_note(f"{self._component} raised{self._place}")
            return
        raise PluginError(f"{self._component} raised{self._place}: {type(error).__name__}: {error}") from error
