"""Triton kernels of matching: partial sums of each block into a buffer, then a second pass that scales.

Compiled ahead of time for sm_80, 90 and 100 (RESOURCES.md), run in the interpreter and tested on an H200.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fewstep_cuda.score_difference import ScoreDifference, scales
from fewstep_cuda.score_difference_two import TwoDifferences
from fewstep_cuda.score_identity import ScoreIdentity
from fewstep_cuda.tangent_normalise import Norm
from fewstep_cuda.triton.blocks import (
    buffer,
    elements,
    factor,
    length,
    output,
    parts,
    put,
    read,
    run,
    total,
)


@triton.jit
def first_plain(x, real, fake, gap, partial, size, BLOCK: tl.constexpr):
    """gap = fake - real, and the block's sum of |x - real|."""
    at, inside = elements(size, BLOCK)
    r = read(real, at, inside)
    tl.store(gap + at, read(fake, at, inside) - r, mask=inside)
    put(partial, 0, tl.sum(tl.abs(read(x, at, inside) - r), 0))


@triton.jit
def first_raw(
    x, x_t, fake, cond, uncond, p, q, guidance, gap, partial, size, BLOCK: tl.constexpr, GUIDED: tl.constexpr
):
    """The same of what the networks answered: real = uncond + guidance (cond - uncond), x0 = p x_t + q raw."""
    at, inside = elements(size, BLOCK)
    a, b = tl.load(p + tl.program_id(1)), tl.load(q + tl.program_id(1))
    real = read(cond, at, inside)
    if GUIDED:
        u = read(uncond, at, inside)
        real = u + guidance * (real - u)
    tl.store(gap + at, b * (read(fake, at, inside) - real), mask=inside)
    # Where p is 0 x_t takes no part, and what is not finite in it must not.
    shift = tl.where(a == 0.0, 0.0, a * read(x_t, at, inside))
    put(partial, 0, tl.sum(tl.abs(read(x, at, inside) - b * real - shift), 0))


@triton.jit
def scale(grad, partial, weight, value, size, floor, share, power, half, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """grad = gap / (n numel) in place, weight = 1 / n, and the block's share of 0.5 mean(g^2).

    numel = share / power, half = 0.5 share^2 / numel.
    """
    by = factor(partial, weight, 0, size, floor, share, PARTS)
    at, inside = elements(size, BLOCK)
    g = read(grad, at, inside) * by
    tl.store(grad + at, g * power, mask=inside)
    put(value, 0, half * tl.sum(g * g, 0))


@triton.jit
def apart(x, real, cond, partial, size, BLOCK: tl.constexpr, TWO: tl.constexpr):
    """The block's sum of |x - real|, and, where there are TWO terms, that of |x - cond|."""
    at, inside = elements(size, BLOCK)
    given = read(x, at, inside)
    put(partial, 0, tl.sum(tl.abs(given - read(real, at, inside)), 0))
    if TWO:
        put(partial, 1, tl.sum(tl.abs(given - read(cond, at, inside)), 0))


@triton.jit
def scale_two(
    real, fake, cond, uncond, grad, partial, weight, value, size, strength, floor, share, power, half,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """grad = ((fake - real) / n(real) + strength (uncond - cond) / n(cond)) / numel, and of each term what `scale` has.

    Both gaps are read again: to keep them for this pass would take two buffers, and more bytes.
    """
    dm = factor(partial, weight, 0, size, floor, share, PARTS)
    ca = strength * factor(partial, weight, 1, size, floor, share, PARTS)
    at, inside = elements(size, BLOCK)
    a = (read(fake, at, inside) - read(real, at, inside)) * dm
    b = (read(uncond, at, inside) - read(cond, at, inside)) * ca
    tl.store(grad + at, (a + b) * power, mask=inside)
    put(value, 0, half * tl.sum(a * a, 0))
    put(value, 1, half * tl.sum(b * b, 0))


@triton.jit
def scale_identity(
    x, real, fake, grad_x, grad_real, grad_fake, partial, weight, value, size, alpha, rest, floor, share, power,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The three gradients of mean(d m / n), d = real - fake, m = (real - x) - alpha d, and the block's share of it.

    rest = 1 - alpha.
    """
    by = factor(partial, weight, 0, size, floor, share, PARTS)
    at, inside = elements(size, BLOCK)
    r = read(real, at, inside)
    d = r - read(fake, at, inside)
    m = (r - read(x, at, inside)) - alpha * d
    d = d * by  # before it meets m: their product alone may leave float32
    put(value, 0, power * tl.sum(d * m, 0))
    m = m * by
    tl.store(grad_x + at, -d * power, mask=inside)
    tl.store(grad_real + at, (m + rest * d) * power, mask=inside)
    tl.store(grad_fake + at, (alpha * d - m) * power, mask=inside)


@triton.jit
def squares(g, partial, size, BLOCK: tl.constexpr):
    """The block's sum of g^2."""
    at, inside = elements(size, BLOCK)
    given = read(g, at, inside)
    put(partial, 0, tl.sum(given * given, 0))


@triton.jit
def divide(g, out, partial, norm, size, count, c, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """out = g / (|g| + c), |g|^2 the sum of squares by count."""
    root = tl.sqrt_rn(tl.div_rn(total(partial, 0, PARTS), count))
    root = root + 0.0 * root  # infinite -> NaN
    at, inside = elements(size, BLOCK)
    tl.store(out + at, tl.div_rn(read(g, at, inside), root + c), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(norm + tl.program_id(1), root)


def launch(x: Tensor, real_x0: Tensor, fake_x0: Tensor, floor: float) -> ScoreDifference:
    """`score_difference`."""
    grad, partial = output(x), buffer(x)
    run(first_plain, x, real_x0, fake_x0, grad, partial, length(x))
    return _scaled(grad, partial, floor)


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
    grad, partial = output(x), buffer(x)
    inputs = x, x_t, fake, cond, cond if uncond is None else uncond
    levels = p.to(grad), q.to(grad), float(guidance)
    run(first_raw, *inputs, *levels, grad, partial, length(x), GUIDED=uncond is not None)
    return _scaled(grad, partial, floor)


def launch_two(
    x: Tensor, real: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, strength: float, floor: float
) -> TwoDifferences:
    """`score_difference_two`."""
    grad, partial, value, size = output(x), buffer(x, 2), buffer(x, 2), length(x)
    weight = grad.new_empty(2, len(x))
    run(apart, x, real, cond, partial, size, TWO=True)
    outputs = grad, partial, weight, value, size
    run(scale_two, real, fake, cond, uncond, *outputs, float(strength), floor, *scales(x.numel()), PARTS=parts(partial))
    return TwoDifferences(grad, weight, value.sum((1, 2)))


def launch_identity(x: Tensor, real_x0: Tensor, fake_x0: Tensor, alpha: float, floor: float) -> ScoreIdentity:
    """`score_identity`."""
    grads, partial, value, size = [output(x) for _ in range(3)], buffer(x), buffer(x), length(x)
    weight = grads[0].new_empty(len(x))
    run(apart, x, real_x0, real_x0, partial, size, TWO=False)
    share, power, _ = scales(x.numel())
    settings = float(alpha), 1.0 - alpha, floor, share, power
    outputs = *grads, partial, weight, value, size
    run(scale_identity, x, real_x0, fake_x0, *outputs, *settings, PARTS=parts(partial))
    return ScoreIdentity(value.sum(), weight, *grads)


def launch_normalise(g: Tensor, c: float, norm: Norm) -> tuple[Tensor, Tensor]:
    """`tangent_normalise`."""
    out, partial, size = output(g), buffer(g), length(g)
    found, count = out.new_empty(len(g)), float(size if norm == "mean" else 1)
    run(squares, g, partial, size)
    run(divide, g, out, partial, found, size, count, float(c), PARTS=parts(partial))
    return out, found


def _scaled(grad: Tensor, partial: Tensor, floor: float) -> ScoreDifference:
    """The second pass, over the unscaled gap; it is used up."""
    weight, value = grad.new_empty(len(grad)), buffer(grad)
    run(scale, grad, partial, weight, value, length(grad), floor, *scales(grad.numel()), PARTS=parts(partial))
    return ScoreDifference(grad, weight, value.sum())
