"""Norms, what follows them, and their derivatives in one pass; shapes and formulas in `fewstep_cuda.norm_jvp`.

Compiled for sm_80, sm_90 and sm_100, run in Triton's interpreter and tested on an H200.

Sums and outputs are computed in float32.  A program holds a row, or some heads, in registers; a group of GroupNorm does
not fit there and is read three times, mostly from the second-level cache.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from fewstep_cuda.norm_jvp import Norm

ROW = 8192
"""Entries that a row may have: 16384 spill from the registers of 16 warps."""
CHUNK = 2048
"""Entries of a group that a program reads at once."""
HEADS = 1024
"""Entries of all heads of a program."""
Dual = tuple[Tensor, Tensor | None]


@triton.jit
def adaln_kernel(
    X, A, C, TX, TA, TC, Y, TY,
    length, size, a_step, c_step, ta_step, tc_step, eps,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """One row.  steps: of a, c, ta, tc from one sample to the next."""
    row = tl.program_id(0).to(tl.int64)
    b, at = row // length, row * size
    i = tl.arange(0, BLOCK)
    held = i < size
    x = tl.load(X + at + i, held, 0.0).to(tl.float32)
    if CENTRED:
        x = tl.where(held, x - tl.sum(x) / size, 0.0)
    r = 1 / tl.sqrt_rn(tl.sum(x * x) / size + eps)
    xhat = x * r
    a = tl.load(A + b * a_step + i, held, 0.0)
    y = xhat * a + tl.load(C + b * c_step + i, held, 0.0)
    tl.store(Y + at + i, y.to(Y.dtype.element_ty), held)
    if DUAL:
        tx = tl.load(TX + at + i, held, 0.0).to(tl.float32)
        if CENTRED:
            tx = tl.where(held, tx - tl.sum(tx) / size, 0.0)
        txhat = r * (tx - xhat * (tl.sum(xhat * tx) / size))
        ty = txhat * a + xhat * tl.load(TA + b * ta_step + i, held, 0.0) + tl.load(TC + b * tc_step + i, held, 0.0)
        tl.store(TY + at + i, ty.to(TY.dtype.element_ty), held)


@triton.jit
def heads_kernel(
    X, A, C, TX, TA, TC, COS, SIN, Y, TY,
    rows, heads, length, size, xb, xh, xn, xd, tb, th, tn, td, yb, yh, yn, yd, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, DUAL: tl.constexpr, TURN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """ROWS heads.  Strides of x, tx and both outputs by B, H, N, D; a head's entries are read twice, the second time
    with the two of a pair exchanged, instead of moving them between threads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n, h, b = row % length, row // length % heads, row // length // heads
    i = tl.arange(0, BLOCK)
    if INTERLEAVED:
        j = i ^ 1
        sign = tl.where(i % 2 == 0, -1.0, 1.0)
    else:
        j = tl.where(i < size // 2, i + size // 2, i - size // 2)
        sign = tl.where(i < size // 2, -1.0, 1.0)
    held = (row < rows)[:, None] & (i < size)[None, :]
    from_x = (b * xb + h * xh + n * xn)[:, None]
    x = tl.load(X + from_x + (i * xd)[None, :], held, 0.0).to(tl.float32)
    m = tl.zeros([ROWS, 1], tl.float32)
    if CENTRED:
        m = tl.sum(x, 1, keep_dims=True) / size
    x = tl.where(held, x - m, 0.0)
    r = 1 / tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / size + eps)
    xhat = x * r
    a = tl.load(A + i, i < size, 0.0)[None, :]
    z = xhat * a + tl.load(C + i, i < size, 0.0)[None, :]
    to = (b * yb + h * yh + n * yn)[:, None] + (i * yd)[None, :]
    cos = tl.full([ROWS, BLOCK], 1.0, tl.float32)
    sin = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    other = xhat
    a_other = a
    if TURN:
        cos = tl.load(COS + (n * size)[:, None] + i[None, :], held, 0.0)
        sin = tl.load(SIN + (n * size)[:, None] + i[None, :], held, 0.0) * sign[None, :]
        other = (tl.load(X + from_x + (j * xd)[None, :], held, 0.0).to(tl.float32) - m) * r
        a_other = tl.load(A + j, i < size, 0.0)[None, :]
        z = z * cos + (other * a_other + tl.load(C + j, i < size, 0.0)[None, :]) * sin
    tl.store(Y + to, z.to(Y.dtype.element_ty), held)
    if DUAL:
        from_tx = (b * tb + h * th + n * tn)[:, None]
        tx = tl.load(TX + from_tx + (i * td)[None, :], held, 0.0).to(tl.float32)
        tm = tl.zeros([ROWS, 1], tl.float32)
        if CENTRED:
            tm = tl.sum(tx, 1, keep_dims=True) / size
        tx = tl.where(held, tx - tm, 0.0)
        k = tl.sum(xhat * tx, 1, keep_dims=True) / size
        ta = tl.load(TA + i, i < size, 0.0)[None, :]
        tz = r * (tx - xhat * k) * a + xhat * ta + tl.load(TC + i, i < size, 0.0)[None, :]
        if TURN:
            tx = tl.load(TX + from_tx + (j * td)[None, :], held, 0.0).to(tl.float32) - tm
            ta = tl.load(TA + j, i < size, 0.0)[None, :]
            t_other = r * (tx - other * k) * a_other + other * ta + tl.load(TC + j, i < size, 0.0)[None, :]
            tz = tz * cos + t_other * sin
        tl.store(TY + to, tz.to(TY.dtype.element_ty), held)


@triton.jit
def group_kernel(
    X, A, C, TX, TA, TC, Y, TY,
    groups, channels, space, a_step, c_step, ta_step, tc_step, eps,
    BLOCK: tl.constexpr, DUAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One group: means, then products about them, then outputs."""
    which = tl.program_id(0).to(tl.int64)
    b, g = which // groups, which % groups
    size = channels * space
    at = which * size
    offset = tl.arange(0, BLOCK)
    s = tl.zeros([BLOCK], tl.float32)
    ts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + offset
        s += tl.load(X + at + i, i < size, 0.0).to(tl.float32)
        if DUAL:
            ts += tl.load(TX + at + i, i < size, 0.0).to(tl.float32)
    m = tl.sum(s) / size
    tm = tl.sum(ts) / size
    p = tl.zeros([BLOCK], tl.float32)
    tp = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + offset
        u = tl.where(i < size, tl.load(X + at + i, i < size, 0.0).to(tl.float32) - m, 0.0)
        p += u * u
        if DUAL:
            tp += u * (tl.load(TX + at + i, i < size, 0.0).to(tl.float32) - tm)
    r = 1 / tl.sqrt_rn(tl.sum(p) / size + eps)
    k = r * r * (tl.sum(tp) / size)
    for start in range(0, size, BLOCK):
        i = start + offset
        held = i < size
        channel = g * channels + i // space
        xhat = (tl.load(X + at + i, held, 0.0).to(tl.float32) - m) * r
        a = tl.load(A + b * a_step + channel, held, 0.0)
        z = xhat * a + tl.load(C + b * c_step + channel, held, 0.0)
        sigmoid = 1 / (1 + tl.exp(-z))
        y = z
        if SILU:
            y = z * sigmoid
        tl.store(Y + at + i, y.to(Y.dtype.element_ty), held)
        if DUAL:
            txhat = (tl.load(TX + at + i, held, 0.0).to(tl.float32) - tm) * r - xhat * k
            ta = tl.load(TA + b * ta_step + channel, held, 0.0)
            tz = txhat * a + xhat * ta + tl.load(TC + b * tc_step + channel, held, 0.0)
            if SILU:
                tz = tz * sigmoid * (1 + z * (1 - sigmoid))
            tl.store(TY + at + i, tz.to(TY.dtype.element_ty), held)


@triton.jit
def gated_kernel(
    X, G, Y, TX, TG, TY, OUT, TOUT, total, length, size, step, tstep, BLOCK: tl.constexpr, DUAL: tl.constexpr
):
    """BLOCK entries of x + gate y."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = i < total
    b, c = i // (length * size), i % size
    gate = tl.load(G + b * step + c, held, 0.0)
    y = tl.load(Y + i, held, 0.0).to(tl.float32)
    out = tl.load(X + i, held, 0.0).to(tl.float32) + gate * y
    tl.store(OUT + i, out.to(OUT.dtype.element_ty), held)
    if DUAL:
        ty = tl.load(TY + i, held, 0.0).to(tl.float32)
        moved = tl.load(TG + b * tstep + c, held, 0.0) * y + gate * ty
        out = tl.load(TX + i, held, 0.0).to(tl.float32) + moved
        tl.store(TOUT + i, out.to(TOUT.dtype.element_ty), held)


def adaln(
    form: Norm, x: Tensor, a: Tensor, c: Tensor, _cos: Any, _sin: Any, tx: Any, ta: Any, tc: Any
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm or RMSNorm, scaled and shifted."""
    batch, length, size = x.shape
    if size > ROW:
        raise ValueError(f"the Triton kernel takes rows up to {ROW}, got {size}; use backend='reference'")
    x, a, c, tx, ta, tc = _dense(x, a, c, tx, ta, tc)
    y, ty = _outputs(x, tx)
    block, dual = triton.next_power_of_2(size), tx is not None
    _launch(
        adaln_kernel, batch * length, x,
        x, a, c, *(_or(t, x) for t in (tx, ta, tc)), y, _or(ty, y), length, size, *_steps(a, c, ta, tc),
        form.eps, BLOCK=block, CENTRED=form.centred, DUAL=dual, num_warps=warps(block),
    )  # fmt: skip
    return y, ty


def qk_norm_rope(
    form: Norm, x: Tensor, a: Tensor, c: Tensor, cos: Any, sin: Any, tx: Any, ta: Any, tc: Any
) -> tuple[Tensor, Tensor | None]:
    """A norm of each head and its turning, whatever the strides."""
    batch, heads, length, size = x.shape
    if size > HEADS:
        raise ValueError(f"the Triton kernel takes heads up to {HEADS}, got {size}; use backend='reference'")
    a, c, ta, tc, cos, sin = _dense(a, c, ta, tc, cos, sin)
    y, ty = _outputs(x, tx)
    block, dual = triton.next_power_of_2(size), tx is not None
    rows, total = HEADS // block, batch * heads * length
    _launch(
        heads_kernel, triton.cdiv(total, rows), x,
        x, a, c, *(_or(t, x) for t in (tx, ta, tc, cos, sin)), y, _or(ty, y), total, heads, length, size,
        *x.stride(), *_or(tx, x).stride(), *y.stride(), form.eps, ROWS=rows, BLOCK=block, CENTRED=form.centred,
        DUAL=dual, TURN=cos is not None, INTERLEAVED=form.interleaved, num_warps=4,
    )  # fmt: skip
    return y, ty


def group_norm_silu(
    form: Norm, x: Tensor, a: Tensor, c: Tensor, _cos: Any, _sin: Any, tx: Any, ta: Any, tc: Any
) -> tuple[Tensor, Tensor | None]:
    """GroupNorm, scaled and shifted, and SiLU."""
    batch, groups, channels, space = x.shape
    x, a, c, tx, ta, tc = _dense(x, a, c, tx, ta, tc)
    y, ty = _outputs(x, tx)
    block = min(CHUNK, triton.next_power_of_2(channels * space))
    _launch(
        group_kernel, batch * groups, x,
        x, a, c, *(_or(t, x) for t in (tx, ta, tc)), y, _or(ty, y), groups, channels, space,
        *_steps(a, c, ta, tc), form.eps, BLOCK=block, DUAL=tx is not None, SILU=form.silu, num_warps=8,
    )  # fmt: skip
    return y, ty


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, tx: Any, tgate: Any, ty: Any) -> tuple[Tensor, Tensor | None]:
    """x + gate y."""
    x, gate, y, tx, tgate, ty = _dense(x, gate, y, tx, tgate, ty)
    out, tout = _outputs(x, tx)
    _launch(
        gated_kernel, triton.cdiv(x.numel(), 1024), x,
        x, gate, y, *(_or(t, x) for t in (tx, tgate, ty)), out, _or(tout, out), x.numel(), *x.shape[1:],
        *_steps(gate, tgate), BLOCK=1024, DUAL=tx is not None, num_warps=4,
    )  # fmt: skip
    return out, tout


def warps(block: int) -> int:
    """Of a program that holds a row: 16 entries of x a thread, at most 16 warps."""
    return min(16, max(1, block // 512))


def _or(tensor: Any, other: Tensor) -> Tensor:
    """A pointer that is not used must still be one."""
    return other if tensor is None else tensor


def _launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **options: Any) -> None:
    """Where x is: Triton itself takes the current device."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **options)


def _dense(*tensors: Any) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _outputs(x: Tensor, tx: Any) -> Dual:
    y = torch.empty_like(x)
    return y, None if tx is None else torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device)


def _steps(*tensors: Any) -> list[int]:
    """From one sample's to the next; 0 if there is one for all."""
    return [0 if t is None or len(t) == 1 else t.stride(0) for t in tensors]
