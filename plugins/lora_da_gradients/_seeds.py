"""Generators that belong to a name: the same seed and name give the same numbers, in any process."""

from __future__ import annotations

import hashlib

import torch


def named_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator whose state depends on the seed and all names alone.

    Args:
        seed: The seed.
        names: What the numbers are for, such as a layer's name and a probe's index.

    Returns:
        A generator of its own; no other one is touched.

    >>> first, again, other = (named_generator(3, "layer", index).initial_seed() for index in (0, 0, 1))
    >>> (first == again, first == other)
    (True, False)
    """
    text = "\0".join(map(str, (seed, *names)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
