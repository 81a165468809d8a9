"""What a component must fulfil that says it takes one-hot inputs: places mean the rows that they stand for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from lora_da_core.testing.data import Subject, Tokens, close, collect, dense_matrix, layer, random_tokens, require

ENTRIES = 6


def one_hot_tokens(seed: int) -> tuple[Tokens, Tokens]:
    """The same tokens twice.

    Args:
        seed: Of their numbers.

    Returns:
        Once as the places of ones, once as rows (tokens, in); some places are never seen.
    """
    tokens = random_tokens(seed, in_features=ENTRIES)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(ENTRIES - 2, (len(tokens.inputs),), generator=generator)
    spec = replace(layer(tokens.spec.out_features, ENTRIES), kind="embedding", one_hot=True)
    rows = functional.one_hot(places, ENTRIES).double()
    return replace(tokens, spec=spec, inputs=places), replace(tokens, inputs=rows)


def fisher_takes_places(subject: Subject) -> None:
    """Where one-hot inputs are taken, their places give the Fisher of the rows, with no more bytes than planned."""
    estimator = subject.make()
    require(isinstance(estimator.takes_one_hot, bool), "takes_one_hot is no bool")
    if not estimator.takes_one_hot:
        return
    found = [collect(subject.make(), [[tokens]]) for tokens in one_hot_tokens(21)]
    fishers = [
        subject.make().fisher(statistics, damping=0.01, damping_kind="relative", fisher_scale="token_mean")
        for statistics in found
    ]
    spec = found[1].spec
    for name in ("apply", "solve"):
        places, rows = (dense_matrix(getattr(fisher, name), spec) for fisher in fishers)
        close(places, rows, f"{name} of places", 1e-7)
    traces = [fisher.inverse_input_trace().to_dense() for fisher in fishers]
    close(traces[0], traces[1], "V of places", 1e-7)
    taken = sum(value.nbytes for side in (found[0].input, found[0].layer) for value in side.values())
    planned = sum(
        estimator.statistics_bytes(found[0].spec, samples=found[0].samples, tokens=found[0].tokens, itemsize=8)
    )
    require(planned >= taken, f"statistics of places take {taken} bytes, the plan says {planned}")


def gradient_takes_places(subject: Subject) -> None:
    """Where one-hot inputs are taken, their places give the gradient of the rows."""
    estimator = subject.make()
    require(isinstance(estimator.takes_one_hot, bool), "takes_one_hot is no bool")
    if estimator.forward_only or not estimator.takes_one_hot:
        return
    found = []
    for tokens in one_hot_tokens(22):
        taken = estimator.accumulator(tokens.spec, device=torch.device("cpu"), dtype=torch.float64)
        taken.update(tokens.inputs, tokens.output_grads, tokens.example)
        gradient = estimator.gradient(taken.statistics(), tokens.spec, samples=tokens.samples)
        found.append(gradient.to_dense())
    close(found[0], found[1], "G of places", 1e-7)
