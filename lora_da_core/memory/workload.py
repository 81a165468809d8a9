"""What a plan is told: sizes of memory as people write them, and the data as far as memory depends on it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from lora_da_core.batches import batch_tokens_on
from lora_da_core.errors import OptionError
from lora_da_core.memory.activations import BatchShape
from lora_da_core.sizing import SEARCH_SAMPLES

_UNITS = {"B": 1, "KB": 10**3, **{f"{p}B": 1000**n for n, p in enumerate("kMGTP", 1)}}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGTP", 1)}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")


def parse_size(text: str) -> int:
    """Bytes of a size as people write it.

    >>> parse_size("24GiB"), parse_size("24GB"), parse_size("1.5 KiB")
    (25769803776, 24000000000, 1536)

    Args:
        text: A number and a unit.

    Raises:
        OptionError: It is something else, or zero.
    """
    match = _SIZE.fullmatch(text)
    size = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1 <= size < math.inf:
        raise OptionError(
            f"{text!r} is no size of memory; write a number above 0 and its unit, such as 24GiB (1024³ bytes), 24GB "
            "(1000³) or 800MB."
        )
    return int(size)


def limit_in_bytes(max_memory: int | str | None) -> int | None:
    """A limit as an argument `max_memory` gives it.

    Args:
        max_memory: Bytes, or a size such as `24GiB`.

    Returns:
        Bytes; None where there is no limit.

    Raises:
        OptionError: It is no size; the message names the argument.
    """
    try:
        return parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    except OptionError as error:
        raise OptionError(f"max_memory: {error}") from error


def size_text(size: int) -> str:
    """Bytes as people read them.

    >>> size_text(25769803776), size_text(1536), size_text(17)
    ('24.0 GiB', '1.5 KiB', '17 B')
    """
    power = min(4, int(math.log(size, 1024))) if size > 0 else 0
    return f"{size / 1024**power:.1f} {'KMGT'[power - 1]}iB" if power else f"{size} B"


@dataclass(frozen=True)
class Workload:
    """The data of a run, as far as memory depends on it.

    Attributes:
        samples: How many samples are read.
        max_length: Tokens of the longest one: batches are padded to it.
        tokens: Tokens of all samples together; None takes the longest for each.
        batch_size: Samples in a batch; None fills batches up to 256 tokens on a CPU and 2048 elsewhere, as
            `lora-da init` does.
        texts: Texts of a sample, each of at most `max_length` tokens: 2 where a chosen and a rejected one are compared.
    """

    samples: int = 64
    max_length: int = 1024
    tokens: int | None = None
    batch_size: int | None = None
    texts: int = 1

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("max_length", 2), ("tokens", 1), ("batch_size", 1), ("texts", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} is {value}; it must be at least {least}.")
        least, most = self.samples * self.texts, self.samples * self.texts * self.max_length
        if self.tokens is not None and not least <= self.tokens <= most:
            raise OptionError(
                f"tokens is {self.tokens}, but {self.samples} samples of at most {self.texts * self.max_length} tokens "
                f"have {least} to {most} together."
            )

    @property
    def total(self) -> int:
        """Tokens of all samples together."""
        return self.samples * self.texts * self.max_length if self.tokens is None else self.tokens

    def on(self, device: torch.device) -> Workload:
        """The same with a size of batches, where there is none, that suits a device."""
        if self.batch_size is not None:
            return self
        return replace(self, batch_size=max(1, batch_tokens_on(device) // (self.texts * self.max_length)))

    @property
    def batch(self) -> BatchShape:
        """The largest batch, where a size is known.

        Raises:
            OptionError: None is; see `on`.
        """
        if self.batch_size is None:
            raise OptionError("the workload has no batch_size; `on` gives it that of a device.")
        return BatchShape(min(self.batch_size, self.samples), self.max_length, self.texts)

    @property
    def search(self) -> BatchShape:
        """The largest batch of the line search."""
        return replace(self.batch, samples=min(self.batch.samples, SEARCH_SAMPLES))
