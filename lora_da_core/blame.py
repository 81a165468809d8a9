"""Turns what a plugin's code raises into an error that says whose code it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lora_da_core.errors import LoraDAError, PluginError


@contextlib.contextmanager
def blamed(component: str, place: str = "") -> Iterator[None]:
    """Raises a `PluginError` in the place of whatever the block raises; our own errors and out-of-memory pass.

    Args:
        component: Kind, name and distribution.
        place: Where it happened, e.g. ` on layer x`.

    Raises:
        PluginError: The block raised something else.
    """
    try:
        yield
    except (LoraDAError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PluginError(f"{component} raised{place}: {type(error).__name__}: {error}") from error
