"""Several processes as one: the mean of their gradients, taken by ourselves after the backward pass.

DistributedDataParallel is not used.  It expects one forward and one backward per step and all parameters in each; a
trio runs the same network under several roles, with and without gradient, before one backward.  The price, not yet
measured on GPUs, is that communication does not overlap with the backward pass.  Sharded networks take the mean of
theirs within it (see `models.sharding`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET = 2**25
"""Elements that travel together: large enough for full bandwidth, small beside the gradients' own memory."""

KNOWN = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
"""What of accelerate's kinds of distribution the trainer knows."""


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every .grad by its mean over all processes; one that is missing on some processes counts as zero there.

    What has none on any stays without, as it would in one process: a zero would decay it and count as a step.
    parameters: the same ones in the same order on every process.  Those of sharded networks have their mean already.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if accelerator.num_processes == 1 or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=accelerator.device)
    anywhere = torch.as_tensor(accelerator.reduce(has, "sum")).tolist()
    for p, count in zip(parameters, anywhere, strict=True):
        if p.grad is None and count:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = mean(torch.cat([grad.flatten() for grad in bucket]), accelerator)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


@contextmanager
def failing_together(what: str, accelerator: Accelerator) -> Iterator[None]:
    """What one process does while the others wait at the end: an error there ends them all, not that one alone.

    Raises RuntimeError on the others, which would else wait for ever.
    """
    failed = True
    try:
        yield
        failed = False
    finally:  # the error itself goes on once all processes know
        if largest(failed, accelerator) and not failed:
            raise RuntimeError(f"{what} failed on another process")


def prepare(module: nn.Module, accelerator: Accelerator) -> None:
    """Autocast a network, in place, for the run's precision; no wrapper takes its place.

    Raises ValueError if accelerate is configured to wrap or compile networks, or to accumulate by itself.
    """
    kind, own = accelerator.distributed_type.value, accelerator.gradient_accumulation_steps
    if own != 1:
        raise ValueError(
            f"accelerate is set to {own} gradient accumulation steps; leave that at 1 and use train.accumulate, which "
            "counts micro-batches of batch_size"
        )
    # evaluation_mode leaves parallel wrappers out.
    if accelerator.prepare_model(module, evaluation_mode=True) is not module or kind not in KNOWN:
        raise ValueError(
            f"accelerate is configured for {kind} or torch.compile, which this version cannot train with; use a plain "
            "`accelerate config`: several processes, FSDP2 and mixed precision work"
        )


def mean(value: Tensor, accelerator: Accelerator) -> Tensor:
    """The mean over all processes."""
    made = accelerator.reduce(value, "mean")
    assert isinstance(made, Tensor)
    return made


def largest(value: int, accelerator: Accelerator) -> int:
    """The largest of all processes' values, the same on all."""
    if accelerator.num_processes == 1:
        return value
    mine = torch.tensor([value], device=accelerator.device)
    return int(torch.as_tensor(accelerator.gather(mine)).max())


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, at most BUCKET elements together (a larger one travels alone)."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or size + grad.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel()
    if bucket:
        yield bucket
