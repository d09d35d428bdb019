"""Several processes that make one set of samples: each its share by index, gathered in order of index.

What a sample is made of depends on its index alone, and which others go through a network with it on the batch that its
index falls into.  Shares are whole batches, so any number of processes gives the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor
from torch import distributed as dist

from fewstep.environment import device_of

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long processes wait for the main one, which works the figures out, and for the slowest."""


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are; number 0 is the main one, which alone writes.

    group: of gloo, in which they gather; None is torch's own.  By itself a process is the main one of one.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def console(self, given: Console | None = None) -> Console:
        """The given one, by default the standard error's; a quiet one where this is not the main process."""
        return (given or Console(stderr=True)) if self.main else Console(quiet=True)

    def share(self, n: int, batch: int, rank: int | None = None) -> range:
        """Which of n samples a process makes: whole batches of those that all n fall into.

        Every process has as many batches, so that each calls a network as often as the others: the last shares begin
        earlier than where the one before ends, and what is there twice is gathered once.
        """
        batches = -(-n // batch)
        own = -(-batches // self.count)
        first = min((self.rank if rank is None else rank) * own, batches - own)
        return range(first * batch, min((first + own) * batch, n))

    def gather(self, n: int, batch: int, make: Callable[[range], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What all processes make of their shares, put together on the main one; the others get their own rows back.

        make: (share) -> tensors on the CPU, a row for each sample.  Raises ConnectionError where another process failed
        or is gone, instead of waiting for it.
        """
        own = self.share(n, batch)
        if self.count == 1:
            return make(own)
        failed = True
        try:
            rows = make(own)
            failed = False
        finally:  # an error of its own goes on once all know of it
            if self._any(failed) and not failed:
                raise ConnectionError("another process failed; its own message says why")
        return tuple(self._gathered(part, n, batch) for part in rows)

    def on_main(self, work: Callable[..., T], *arguments: Any) -> T:
        """What the main process gets from `work`, on all of them."""
        made = [work(*arguments) if self.main else None]
        if self.count > 1:
            with _told():
                dist.broadcast_object_list(made, 0, self.group)
        return made[0]  # type: ignore[return-value]

    def main_first(self, work: Callable[[], T]) -> T:
        """What each process gets from `work`, the others after the main one: what that downloads is there for them."""
        made = [work()] if self.main else []
        if self.count > 1:
            with _told():
                dist.barrier(self.group)
        return made[0] if made else work()

    def _any(self, value: bool) -> bool:
        flag = torch.tensor([int(value)])
        with _told():
            dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return bool(flag)

    def _gathered(self, rows: Tensor, n: int, batch: int) -> Tensor:
        """Shares travel in one size, the longest's: only the very last batch is shorter than others."""
        shares = [self.share(n, batch, rank) for rank in range(self.count)]
        sent = rows.new_zeros(max(map(len, shares)), *rows.shape[1:])
        sent[: len(rows)] = rows
        found = [torch.empty_like(sent) for _ in shares] if self.main else None
        with _told():
            dist.gather(sent, found, 0, self.group)
        if found is None:
            return rows
        whole = rows.new_empty(n, *rows.shape[1:])
        for share, part in zip(shares, found):
            whole[share.start : share.stop] = part[: len(share)]
        return whole


ALONE = Processes()


def processes_of_group() -> Processes:
    """Those of torch's process group, as a training has it, whatever backend that is of; else this one alone."""
    if not dist.is_initialized():
        return ALONE
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size(), group)


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Those that `accelerate launch` or torchrun started, each on the GPU of its number; else this one alone.

    Raises ValueError where a machine has more processes than GPUs to put them on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device_of(device).type == "cuda":
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= there:
            raise ValueError(f"process {place} of this machine has no GPU: there are {there}; start as many processes")
        torch.cuda.set_device(place)
    # What is gathered lies on the CPU, where figures are worked out: gloo whatever the device.
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()  # else gloo's threads may abort the process at its exit


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, of a connection that was closed
        raise ConnectionError(f"another process is gone: {error}") from error
