"""The processes of a run: the one room that speaks to torch.distributed.

A run inside an initialised process group is shared by its processes: every one is given the same model and data, reads
its share of the samples and solves its share of the layers. Nothing else in the package asks how many processes there
are; it asks its `World`, and a single process is a world of its own.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_da_core.errors import OptionError, RankError
from lora_da_core.roll_call import RollCall
from lora_da_core.world import ALONE, Progress, World

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BUCKET_BYTES = 2**24
"""Bytes of small tensors that are added in one collective; one of a sixteenth of that goes alone, where it lies."""

UNDER_WAY = 8
"""Collectives that are begun before the first of them is waited for."""

DIFFERENCES = 5
"""How many differences between two processes an error lists."""


class Joined(World):
    """The processes of a process group; see `joined`.

    Args:
        store: Where they meet.
        rank: This process.
        size: How many there are.
        timeout: As `joined` takes it.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size = rank, size
        self._roll_call = RollCall(store, rank, size, timeout, _abort)
        self._group: Any = None
        self._under_way = False

    @contextlib.contextmanager
    def session(self) -> Iterator[World]:
        """All come together, work and part; what one raises, all raise.

        Yields:
            This world.
        """
        ended = False
        try:
            self._roll_call.start()
            self._collective("start", self._connect)
            yield self
            self.exchange("end", None)
            ended = True
        except RankError:
            raise
        except BaseException as error:  # Ctrl-C among them: the others must not wait
            if self._roll_call.freed or _is_of_collective(error):
                # Another's fault perhaps, in a collective that gathers weights; then that is what to raise.
                self._roll_call.await_fault()
            self._roll_call.report(error)
            raise
        finally:
            if not ended:
                # At once: another process may be waiting inside a collective.
                self._close()
                if self._under_way:
                    _abort()
            self._roll_call.leave()
            if ended:
                self._close()

    def exchange(self, phase: str, value: Any) -> list[Any]:
        return self._roll_call.exchange(phase, value)

    def agree(self, phase: str, values: Mapping[str, Any]) -> None:
        """As in a single process's world.

        Args:
            phase: What for.
            values: JSON-representable, by name.

        Raises:
            RankError: A process was told otherwise than rank 0; it and the difference are named.
        """
        told = self.exchange(phase, values)
        for rank, theirs in enumerate(told):
            wrong = [name for name in sorted({*told[0], *theirs}) if theirs.get(name) != told[0].get(name)]
            if wrong:
                pairs = [(name, _brief(theirs.get(name)), _brief(told[0].get(name))) for name in wrong[:DIFFERENCES]]
                shown = "; ".join(f"its {name} is {mine}, rank 0's {other}" for name, mine, other in pairs)
                more = f"; and {len(wrong) - DIFFERENCES} more" if len(wrong) > DIFFERENCES else ""
                raise RankError(f"rank {rank} of {self.size} does not agree with rank 0 on {phase}: {shown}{more}.")

    def gather(self, phase: str, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        self._collective(phase, lambda: dist.all_gather_object(found, value, group=self._group))
        return found

    def add(self, phase: str, tensors: Sequence[Tensor]) -> None:
        self._collective(phase, lambda: self._add(phase, tensors))

    def add_at(self, phase: str, tensors: Sequence[Tensor], owner: int) -> None:
        self._explained(phase, lambda: self._add_at(tensors, owner))

    def broadcast(
        self, phase: str, values: Mapping[str, Tensor], source: int, device: torch.device
    ) -> dict[str, Tensor]:
        mine = {name: _outline(value) for name, value in values.items()} if self.rank == source else None
        outlines = self.exchange(phase, mine)[source]
        if self.rank == source:
            found = {name: value.contiguous() for name, value in values.items()}
        else:
            found = {name: _like(outline, device) for name, outline in outlines.items()}

        self._collective(phase, lambda: self._send(phase, list(found.values()), source))
        return found

    def equalise(self, phase: str, tensors: Sequence[Tensor]) -> None:
        whole = [value if value.is_contiguous() else value.contiguous() for value in tensors]
        self._collective(phase, lambda: self._send(phase, whole, 0))
        for value, sent in zip(tensors, whole, strict=True):
            if value is not sent:
                value.copy_(sent)

    def watched(self, on_progress: Progress | None) -> Progress:
        def progress(phase: str, done: int, total: int) -> None:
            self._roll_call.look(phase)
            if on_progress is not None:
                on_progress(phase, done, total)

        return progress

    def _connect(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._roll_call.timeout))

    def _group_of(self, value: Tensor) -> Any:
        """This run's own group, or for a GPU's tensors the process group itself, whose NCCL is set up already."""
        nccl = value.is_cuda and "nccl" in str(dist.get_backend_config())
        return None if nccl else self._group

    def _add_at(self, tensors: Sequence[Tensor], owner: int) -> None:
        parts = [(value, value.contiguous()) for value in tensors if value.numel()]
        works = [dist.reduce(part, owner, group=self._group_of(part), async_op=True) for _, part in parts]
        for work in works:
            work.wait()  # a GPU's own stream waits, not this process
        for value, part in parts:
            if part.data_ptr() != value.data_ptr():
                value.copy_(part)

    def _add(self, phase: str, tensors: Sequence[Tensor]) -> None:
        begun: deque[tuple[Any, Tensor, list[Tensor]]] = deque()
        for bucket in _buckets(tensors):
            in_place = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if in_place else torch.cat([value.flatten() for value in bucket])
            work = dist.all_reduce(flat, group=self._group_of(flat), async_op=True)
            begun.append((work, flat, [] if in_place else bucket))
            if len(begun) == UNDER_WAY:
                self._take(phase, *begun.popleft())
        for each in begun:
            self._take(phase, *each)

    def _take(self, phase: str, work: Any, flat: Tensor, bucket: Sequence[Tensor]) -> None:
        """Waits for one collective and brings its sums to where they belong."""
        self._finish(phase, [work])
        start = 0
        for value in bucket:
            value.copy_(flat[start : start + value.numel()].view(value.shape))
            start += value.numel()

    def _send(self, phase: str, tensors: Sequence[Tensor], source: int) -> None:
        sent = [value for value in tensors if value.numel()]
        works = [dist.broadcast(value, source, group=self._group_of(value), async_op=True) for value in sent]
        self._finish(phase, works)

    def _collective(self, phase: str, work: Callable[[], object]) -> None:
        # All are here before any begins, so that no collective waits for a process that is gone.
        self.exchange(phase, None)
        self._under_way = True
        self._explained(phase, work)
        self._under_way = False

    def _explained(self, phase: str, work: Callable[[], object]) -> None:
        try:
            work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._roll_call.explain(phase, error)

    def _finish(self, phase: str, works: Sequence[Any]) -> None:
        for work in works:
            self._roll_call.wait_for(work.is_completed, phase)
            work.wait()  # raises what went wrong, and lets a GPU's stream go on

    def _close(self) -> None:
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


@contextlib.contextmanager
def joined(timeout: float) -> Iterator[World]:
    """The world of the initialised process group, for one run; a single process's where there is none.

    Args:
        timeout: Seconds that a process waits for the others at most; one that gives no sign of life for a tenth of
            it, or for 30 s, counts as killed.

    Yields:
        The world. What one process raises within makes the others raise a `RankError` that names it.

    Raises:
        OptionError: This torch is too old.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield ALONE
        return
    # Not at the top: a torch without process groups has no such module.
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    rank, size, store = dist.get_rank(), dist.get_world_size(), _get_default_store()
    if not hasattr(store, "clone"):
        raise OptionError(
            f"torch {torch.__version__} is too old to share a run among {size} processes; take a newer one, or let "
            "each work by itself (distributed='off')."
        )
    # Every process counts its own runs, so that the keys of two runs never meet.
    number = store.add(f"lora_da/runs/{rank}", 1)
    with Joined(PrefixStore(f"lora_da/{number}", store), rank, size, timeout).session() as world:
        yield world


@contextlib.contextmanager
def launched(timeout: float) -> Iterator[torch.device | None]:
    """The process group of a launcher such as torchrun, by its environment variables; none where there is no launcher.

    Args:
        timeout: Seconds that a process waits for the others to start.

    Yields:
        The GPU that belongs to this process, where there are several processes and GPUs.

    Raises:
        OptionError: There are more processes on this machine than GPUs.
        RankError: Not all processes came.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield None
        return
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise OptionError(
                f"process {device.index} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs."
            )
        torch.cuda.set_device(device)
    backend = "gloo" if device is None else "cpu:gloo,cuda:nccl"
    # NCCL's watchdog would end a process whose neighbour has died before it can say whose fault it is.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:  # another process is missing, or an environment variable
        size = os.environ["WORLD_SIZE"]
        raise RankError(f"the {size} processes could not be brought together: {str(error).splitlines()[0]}") from error
    try:
        yield device
    except BaseException:
        _abort()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _abort() -> None:
    """Ends what is under way on GPUs, which would wait for a process that has failed; the process group is no more.

    gloo needs no such thing: there a process that ends takes its connections with it.
    """
    if dist.is_initialized() and "nccl" in str(dist.get_backend_config()):
        dist.distributed_c10d._abort_process_group()


def _is_of_collective(error: BaseException) -> bool:
    """Whether torch raised it, somewhere below, because a collective could not go on."""
    below = error.__cause__ or error.__context__
    own = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    if own and (isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))):
        return True
    return below is not None and _is_of_collective(below)


def _brief(value: Any) -> str:
    return textwrap.shorten(repr(value), 80)


def _outline(value: Tensor) -> list[Any]:
    return [list(value.shape), str(value.dtype).removeprefix("torch."), value.device.type == "cpu"]


def _like(outline: Sequence[Any], device: torch.device) -> Tensor:
    shape, dtype, on_host = outline
    return torch.empty(shape, dtype=getattr(torch, dtype), device="cpu" if on_host else device)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Small neighbours of one dtype and device together, large tensors alone."""
    bucket: list[Tensor] = []
    held = 0
    for value in tensors:
        if not value.numel():
            continue
        alone = value.nbytes >= BUCKET_BYTES // 16
        alike = bucket and (value.dtype, value.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (alone or not alike or held + value.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, held = [], 0
        if alone:
            yield [value]
            continue
        bucket.append(value)
        held += value.nbytes
    if bucket:
        yield bucket
