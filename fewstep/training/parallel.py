"""Several processes as one: the mean of their gradients, taken by ourselves after the backward pass.

DistributedDataParallel is not used.  It expects one forward and one backward per step and all parameters in each; a
trio runs the same network under several roles, with and without gradient, before one backward.  What it would save by
overlapping communication with the backward pass is small beside a distillation step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

BUCKET = 2**25
"""Elements that travel together: large enough for full bandwidth, small beside the gradients' own memory."""


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every .grad by its mean over all processes; one that is missing on a process counts as zero.

    parameters: the same ones in the same order on every process.
    """
    if accelerator.num_processes == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        mean = accelerator.reduce(torch.cat([grad.flatten() for grad in bucket]), "mean")
        assert isinstance(mean, Tensor)
        for grad, part in zip(bucket, mean.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, at most BUCKET elements together (a larger one travels alone)."""
    bucket: list[Tensor] = []
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) + grad.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket
