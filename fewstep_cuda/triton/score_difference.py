"""Triton kernels of matching: partial sums of each block into a buffer, then a second pass that scales.

Deterministic: no atomics, and every program adds its sample's partial sums in the same order.  float32 whatever the
inputs are.  Batch and length are runtime integers; only whether 16 divides them makes another variant.
Compiled ahead of time for sm_80, 90 and 100 (RESOURCES.md) and run in the interpreter; not yet on a device.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep_cuda.score_difference import ScoreDifference, split
from fewstep_cuda.tangent_normalise import Norm

BLOCK = 4096
WARPS = 8


@triton.jit
def first_plain(x, real, fake, gap, partial, size, BLOCK: tl.constexpr):
    """gap = fake - real, and the block's sum of |x - real|.  Grid: blocks of a sample, samples."""
    block, sample = tl.program_id(0), tl.program_id(1)
    within = block * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = sample.to(tl.int64) * size + within
    r = tl.load(real + at, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(fake + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(gap + at, f - r, mask=inside)
    behind = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - r
    tl.store(partial + sample * tl.num_programs(0) + block, tl.sum(tl.abs(behind), 0))


@triton.jit
def first_raw(
    x, x_t, fake, cond, uncond, p, q, guidance, gap, partial, size, BLOCK: tl.constexpr, GUIDED: tl.constexpr
):
    """The same of what the networks answered: real = uncond + guidance (cond - uncond), x0 = p x_t + q raw."""
    block, sample = tl.program_id(0), tl.program_id(1)
    within = block * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = sample.to(tl.int64) * size + within
    a, b = tl.load(p + sample), tl.load(q + sample)
    real = tl.load(cond + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        u = tl.load(uncond + at, mask=inside, other=0.0).to(tl.float32)
        real = u + guidance * (real - u)
    f = tl.load(fake + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(gap + at, b * (f - real), mask=inside)
    # Where p is 0 x_t takes no part, and what is not finite in it must not.
    shift = tl.where(a == 0.0, 0.0, a * tl.load(x_t + at, mask=inside, other=0.0).to(tl.float32))
    behind = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - b * real - shift
    tl.store(partial + sample * tl.num_programs(0) + block, tl.sum(tl.abs(behind), 0))


@triton.jit
def squares(g, partial, size, BLOCK: tl.constexpr):
    """The block's sum of g^2."""
    block, sample = tl.program_id(0), tl.program_id(1)
    within = block * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(g + sample.to(tl.int64) * size + within, mask=within < size, other=0.0).to(tl.float32)
    tl.store(partial + sample * tl.num_programs(0) + block, tl.sum(given * given, 0))


@triton.jit
def total(partial, blocks, PARTS: tl.constexpr):
    """The sum of a sample's partial sums, by every program in the same order."""
    lanes = tl.arange(0, PARTS)
    found = tl.zeros([PARTS], dtype=tl.float32)
    for start in range(0, blocks, PARTS):
        found += tl.load(partial + start + lanes, mask=start + lanes < blocks, other=0.0)
    return tl.sum(found, 0)


@triton.jit
def scale(grad, partial, weight, value, size, floor, share, power, half, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """grad = gap / (n numel) in place, weight = 1 / n, and the block's share of 0.5 mean(g^2).

    numel = share / power, half = 0.5 share^2 / numel.
    """
    block, sample = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    n = tl.div_rn(total(partial + sample * blocks, blocks, PARTS), size * 1.0)
    n = tl.where(n < floor, floor, n)  # NaN stays: no comparison holds for it
    n = n + 0.0 * n  # infinite -> NaN
    factor = tl.div_rn(1.0, n * share)
    within = block * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = sample.to(tl.int64) * size + within
    g = tl.load(grad + at, mask=inside, other=0.0) * factor
    tl.store(grad + at, g * power, mask=inside)
    # A masked lane would be 0 * NaN.
    tl.store(value + sample * blocks + block, half * tl.sum(tl.where(inside, g * g, 0.0), 0))
    if block == 0:
        tl.store(weight + sample, tl.div_rn(1.0, n))


@triton.jit
def divide(g, out, partial, norm, size, count, c, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """out = g / (|g| + c), |g|^2 the sum of squares by count."""
    block, sample = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    root = tl.sqrt_rn(tl.div_rn(total(partial + sample * blocks, blocks, PARTS), count))
    root = root + 0.0 * root  # infinite -> NaN
    within = block * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = sample.to(tl.int64) * size + within
    given = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, tl.div_rn(given, root + c), mask=inside)
    if block == 0:
        tl.store(norm + sample, root)


def launch(x: Tensor, real_x0: Tensor, fake_x0: Tensor, floor: float) -> ScoreDifference:
    """`score_difference`."""
    grad, partial, size = _buffers(x)
    _run(first_plain, x, real_x0, fake_x0, grad, partial, size)
    return _scaled(grad, partial, size, floor)


def launch_from_raw(
    x: Tensor,
    x_t: Tensor,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    p: Tensor,
    q: Tensor,
    guidance: float,
    floor: float,
) -> ScoreDifference:
    """`score_difference_from_raw`.  p, q: [B], of x0 = p x_t + q raw."""
    grad, partial, size = _buffers(x)
    inputs = x, x_t, fake, cond, cond if uncond is None else uncond
    _run(first_raw, *inputs, p.to(grad), q.to(grad), float(guidance), grad, partial, size, GUIDED=uncond is not None)
    return _scaled(grad, partial, size, floor)


def launch_normalise(g: Tensor, c: float, norm: Norm) -> tuple[Tensor, Tensor]:
    """`tangent_normalise`."""
    out, partial, size = _buffers(g)
    found, count = out.new_empty(len(g)), float(size if norm == "mean" else 1)
    _run(squares, g, partial, size)
    _run(divide, g, out, partial, found, size, count, float(c), PARTS=_parts(partial))
    return out, found


def _scaled(grad: Tensor, partial: Tensor, size: int, floor: float) -> ScoreDifference:
    """The second pass, over the unscaled gap; it is used up."""
    share, power = split(grad.numel())
    weight, value = grad.new_empty(len(grad)), torch.empty_like(partial)
    scales = floor, share, power, 0.5 * share**2 / grad.numel()
    _run(scale, grad, partial, weight, value, size, *scales, PARTS=_parts(partial))
    return ScoreDifference(grad, weight, value.sum())


def _run(kernel: Any, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """A kernel over the blocks of x's samples, on x's device.  Tensors go contiguous; outputs are it by making."""
    given = [value.contiguous() if isinstance(value, Tensor) else value for value in (x, *arguments)]
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[_grid(x)](*given, BLOCK=BLOCK, num_warps=WARPS, **constants)


def _buffers(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """The output, one number for each block, and the length of a sample."""
    blocks, samples = _grid(x)
    grad = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return grad, grad.new_empty(samples, blocks), x.numel() // samples


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.numel() // len(x), BLOCK), len(x)


def _parts(partial: Tensor) -> int:
    """Lanes that add a sample's partial sums: few variants, and no long loop."""
    return 32 if partial.shape[1] <= 32 else 1024
