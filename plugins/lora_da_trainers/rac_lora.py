"""RAC-LoRA: a chain of LoRA, each link merged into the weights before the next begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_da_core import hookimpl, initialize_lora_da_weights
from lora_da_core.errors import OptionError, StorageError
from lora_da_core.interfaces import TrainerPlugin
from lora_da_trainers._pairs import Pair, lora_pairs

CHAIN_FILE = "rac_lora.safetensors"
"""What a checkpoint holds beside the adapter: the links that were merged before."""

Factor = Literal["A", "B"]
Restart = Literal["random", "data"]


@dataclass(frozen=True)
class RacLoraOptions:
    """Options of the chain.

    Attributes:
        every: Steps of a link.
        sampled: The factor that is drawn and stays; the other starts from zero and is trained.
        restart: Whether it is drawn at random, or, for A alone, solved for on the trainer's data.
        samples: Samples that a restart from data reads.
        seed: Of what is drawn.
    """

    every: int = 100
    sampled: Factor = "B"
    restart: Restart = "random"
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")
        for name, allowed in (("sampled", get_args(Factor)), ("restart", get_args(Restart))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.restart == "data" and self.sampled == "B":
            raise ValueError("sampled is 'B' with restart='data'; only A can be solved for")


class Chain:
    """The links of one model's adapter: W ← W + scaling·B·A, then a new factor and a zero one.

    An adapter that is not zero when training begins is the first link, and done.

    With one step of gradient descent of the right rate in each link, and the sampled factor orthonormal, a link is
    W⁺ = W − γHG with H = B(BᵀB)⁺Bᵀ, whose mean has r/m as its least eigenvalue (arXiv 2410.08305): the error on a
    quadratic shrinks by 1 − r/m in each link, where a B that stays would stop at that share.
    """

    def __init__(self, pairs: Mapping[str, Pair], options: RacLoraOptions) -> None:
        """Checks that what is merged into can be changed.

        Args:
            pairs: The layers.
            options: Of the chain.

        Raises:
            OptionError: A weight is packed.
        """
        self.pairs, self.options = pairs, options
        self.generator = torch.Generator().manual_seed(options.seed)
        self.merged: list[dict[str, Tensor]] = []
        for name, pair in pairs.items():
            weight = pair.base.weight
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                raise OptionError(f"rac_lora merges into the base, but the weights of {name} are packed.")
            if weight.shape != (pair.B.shape[0], pair.A.shape[1]):
                raise OptionError(f"rac_lora merges into plain linear layers; {name} stores its weight otherwise.")

    def _roles(self, pair: Pair) -> tuple[nn.Parameter, nn.Parameter]:
        """The factor that is sampled and the one that is trained."""
        return (pair.B, pair.A) if self.options.sampled == "B" else (pair.A, pair.B)

    def freeze(self) -> None:
        """Has the optimizer train one factor alone."""
        for pair in self.pairs.values():
            sampled, trained = self._roles(pair)
            sampled.requires_grad_(False)
            trained.requires_grad_(True)

    def begin(self) -> None:
        """Draws a link's factor, orthonormal."""
        for pair in self.pairs.values():
            shape = self._roles(pair)[0].shape
            tall = (max(shape), min(shape))
            basis = torch.linalg.qr(torch.randn(tall, generator=self.generator, dtype=torch.float64))[0]
            self.set(pair, basis if shape == basis.shape else basis.mT)

    def set(self, pair: Pair, sampled: Tensor) -> None:
        """Starts a layer's link: the sampled factor as given, the other zero."""
        drawn, trained = self._roles(pair)
        drawn.data.copy_(sampled)
        trained.data.zero_()

    @property
    def empty(self) -> bool:
        """Whether the link adds nothing to the base."""
        return all(not pair.A.any() or not pair.B.any() for pair in self.pairs.values())

    def merge(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Ends the link: its product goes into the base's weights, and the optimizer forgets it.

        Args:
            optimizer: Holds moments of the factor that was trained.
        """
        link = {}
        for name, pair in self.pairs.items():
            link[f"{name}.A"], link[f"{name}.B"] = (part.detach().cpu().clone() for part in (pair.A, pair.B))
            _add(pair, pair.A, pair.B)
            for parameter in (pair.A, pair.B):
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
        self.merged.append(link)

    def state_dict(self) -> dict[str, Tensor]:
        """The links that were merged, and the generator's state: what a resumed run needs beside the adapter."""
        state = {f"{place}.{key}": value for place, link in enumerate(self.merged) for key, value in link.items()}
        # Safetensors refuses an empty file and takes contiguous tensors alone.
        return {"generator": self.generator.get_state(), **{key: value.contiguous() for key, value in state.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Merges earlier links into a base as it was before the first.

        Args:
            state: As `state_dict` gives it.

        Raises:
            StorageError: The links are those of other layers.
        """
        links: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key != "generator":
                place, name = key.split(".", 1)
                links.setdefault(int(place), {})[name] = value
        names = {f"{name}.{factor}" for name in self.pairs for factor in ("A", "B")}
        if any(set(link) != names for link in links.values()):
            raise StorageError("the links of the checkpoint are those of other layers; resume with the same adapter.")
        self.generator.set_state(state["generator"].to(torch.uint8).cpu())
        for _, link in sorted(links.items()):
            for name, pair in self.pairs.items():
                _add(pair, *(link[f"{name}.{factor}"].to(pair.A.device) for factor in ("A", "B")))
            self.merged.append(link)


@torch.no_grad()
def _add(pair: Pair, a: Tensor, b: Tensor) -> None:
    weight: Any = pair.base.weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(weight.to(exact) + pair.scaling * (b.to(exact) @ a.to(exact)))


class RacLora(TrainerPlugin[RacLoraOptions]):
    """Trains a chain of adapters, each merged into the base when it is done.

    The base's weights change, so the adapter that a trainer saves is the last link's alone; save the base with it. A
    checkpoint holds the links before, and a run that is resumed from a model as it was at first merges them again.
    """

    name = "rac_lora"
    api_version = 1
    Options = RacLoraOptions

    @property
    def changes_base(self) -> bool:
        return True

    def attach(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        processes = trainer.args.world_size
        if self.options.restart == "data" and processes > 1:
            raise OptionError(
                f"rac_lora with restart='data' would solve for another A on each of {processes} processes, as each "
                "reads its own part of the data; use restart='random'."
            )
        chain, options = Chain(lora_pairs(trainer.model), self.options), self.options
        chain.freeze()

        def begin() -> None:
            if options.restart == "data":
                _solve(trainer, chain)
            else:
                chain.begin()

        class Links(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
            def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.global_step:
                    chain.load_state_dict(_stored(args, state))
                    return
                if not chain.empty:
                    chain.merge()
                begin()

            def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.global_step % options.every == 0 and state.global_step < state.max_steps:
                    chain.merge(rest["optimizer"])
                    begin()

            def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.is_world_process_zero:
                    _store(chain.state_dict(), _checkpoint(args, state) / CHAIN_FILE)

        trainer.add_callback(Links())


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _store(state: dict[str, Tensor], path: Path) -> None:
    """Writes the file completely or not at all."""
    temporary = path.with_name(f".{path.name}")
    save_file(state, temporary)
    temporary.replace(path)


def _stored(args: Any, state: Any) -> dict[str, Tensor]:
    path = _checkpoint(args, state) / CHAIN_FILE
    if not path.is_file():
        raise StorageError(
            f"{path} does not exist: the run was no rac_lora's, or was ended while it saved. Resume from an earlier "
            "checkpoint, or from one of rac_lora."
        )
    try:
        found: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise StorageError(f"{path} is damaged ({error}). Resume from an earlier checkpoint.") from error
    return found


def _solve(trainer: Any, chain: Chain) -> None:
    """A from the data as the merged base sees it, B zero."""
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    with torch.random.fork_rng():
        initialize_lora_da_weights(model, list(_first(trainer.get_train_dataloader(), chain.options.samples)))
    for pair in chain.pairs.values():
        pair.B.data.zero_()


def _first(batches: Any, samples: int) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        if seen >= samples:
            return
        seen += len(batch["labels"])
        yield batch


@hookimpl
def lora_da_trainer_plugins() -> list[type[TrainerPlugin[Any]]]:
    """Offers `rac_lora`."""
    return [RacLora]
