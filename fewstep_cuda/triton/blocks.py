"""What Triton's kernels of matching share.  Grid: blocks of a sample, samples.

Deterministic: no atomics.  A first pass leaves partial sums of each block in a buffer [terms, samples, blocks]; in the
second every program adds its sample's in the same order.  float32 whatever the inputs are.  Batch and length are
runtime integers; only whether 16 divides them makes another variant.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@triton.jit
def elements(size, BLOCK: tl.constexpr):
    """Where this block's elements are, and which of them are inside the sample."""
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(1).to(tl.int64) * size + within, within < size


@triton.jit
def read(given, at, inside):
    """Elements in float32; 0 outside."""
    return tl.load(given + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def line(term):
    """Which of [terms, samples] a term of this sample is."""
    return term * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def put(buffer, term, amount):
    """This block's number of a term."""
    tl.store(buffer + line(term) * tl.num_programs(0) + tl.program_id(0), amount)


@triton.jit
def total(buffer, term, PARTS: tl.constexpr):
    """The sum of a term's numbers of this sample, by every program in the same order."""
    blocks = tl.num_programs(0)
    start, lanes = buffer + line(term) * blocks, tl.arange(0, PARTS)
    found = tl.zeros([PARTS], dtype=tl.float32)
    for first in range(0, blocks, PARTS):
        found += tl.load(start + first + lanes, mask=first + lanes < blocks, other=0.0)
    return tl.sum(found, 0)


@triton.jit
def factor(partial, weight, term, size, floor, share, PARTS: tl.constexpr):
    """1 / (n share) of this sample, n = max(mean, floor) of what partial sums up to; its weight, 1 / n, is written."""
    n = tl.div_rn(total(partial, term, PARTS), size * 1.0)
    n = tl.where(n < floor, floor, n)  # NaN stays: no comparison holds for it
    n = n + 0.0 * n  # infinite -> NaN
    if tl.program_id(0) == 0:
        tl.store(weight + line(term), tl.div_rn(1.0, n))
    return tl.div_rn(1.0, n * share)


def run(kernel: Any, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """A kernel over the blocks of x's samples, on x's device.  Tensors go contiguous; outputs are it by making."""
    given = [value.contiguous() if isinstance(value, Tensor) else value for value in (x, *arguments)]
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[_grid(x)](*given, BLOCK=BLOCK, num_warps=WARPS, **constants)


def output(x: Tensor) -> Tensor:
    """Room for a result, float32, of x's shape."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def buffer(x: Tensor, terms: int = 1) -> Tensor:
    """[terms, samples, blocks]: one number for each term and block."""
    blocks, samples = _grid(x)
    return torch.empty(terms, samples, blocks, dtype=torch.float32, device=x.device)


def length(x: Tensor) -> int:
    """Elements of a sample."""
    return x.numel() // len(x)


def parts(partial: Tensor) -> int:
    """Lanes that add a sample's partial sums: few variants, and no long loop."""
    return 32 if partial.shape[-1] <= 32 else 1024


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(length(x), BLOCK), len(x)
