"""Attention and its tangent in Triton, and the gradients through both outputs.

Compiled for sm_80, sm_90 and sm_100 (tests/ops/test_aot_attention_jvp.py), run in Triton's interpreter and tested on an
H200 with Triton 3.6.  None is tuned there.

Formulas: see fewstep_cuda/attention_jvp.py.  The forward keeps two accumulators, O += P v and G += H v + P tv, with
H = P (tS - mu) about the running mean, as cpu/attention_jvp.cpp.  The backward is two kernels without atomics: one
program per block of rows for gq and gtq, one per block of keys for gk, gtk, gv and gtv.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep_cuda.attention_jvp import Attended


class Tile(NamedTuple):
    """Rows and keys of a block, warps of a program, stages of the pipeline that loads."""

    rows: int
    keys: int
    warps: int
    stages: int


# By kernel, inputs and padded size of a head: the largest of some tiles that spills on none of the three
# architectures, or the one that spills least.  attention_resources.json has what they take; none is tuned on a device,
# and float32's from heads of 128 were hardly searched.
TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "forward": {
        "half": {
            16: Tile(64, 64, 4, 2),
            32: Tile(64, 64, 4, 2),
            64: Tile(64, 64, 4, 2),
            128: Tile(32, 32, 4, 2),
            256: Tile(16, 32, 4, 1),
        },
        "float32": {
            16: Tile(32, 32, 8, 1),
            32: Tile(32, 32, 8, 1),
            64: Tile(16, 32, 8, 1),
            128: Tile(16, 16, 8, 1),
            256: Tile(16, 16, 16, 1),
        },
    },
    "rows": {
        "half": {
            16: Tile(64, 64, 8, 1),
            32: Tile(64, 32, 8, 1),
            64: Tile(32, 32, 4, 1),
            128: Tile(16, 32, 8, 1),
            256: Tile(16, 16, 8, 1),
        },
        "float32": {
            16: Tile(32, 32, 8, 1),
            32: Tile(32, 32, 8, 1),
            64: Tile(16, 16, 8, 1),
            128: Tile(16, 16, 16, 1),
            256: Tile(16, 16, 16, 1),
        },
    },
    "keys": {
        "half": {
            16: Tile(64, 64, 8, 1),
            32: Tile(32, 64, 8, 1),
            64: Tile(32, 32, 4, 1),
            128: Tile(32, 16, 8, 1),
            256: Tile(16, 16, 8, 1),
        },
        "float32": {
            16: Tile(32, 16, 8, 1),
            32: Tile(16, 16, 4, 1),
            64: Tile(16, 16, 8, 1),
            128: Tile(16, 16, 16, 1),
            256: Tile(16, 16, 16, 1),
        },
    },
}
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows_of(X, b, h, sample, head, row, at, length, D: tl.constexpr, BD: tl.constexpr):
    """[len(at), BD] of a [B, H, length, D], zeros outside."""
    d = tl.arange(0, BD)
    base = X + b.to(tl.int64) * sample + h.to(tl.int64) * head
    return tl.load(base + at[:, None] * row + d[None, :], mask=(at[:, None] < length) & (d[None, :] < D), other=0.0)


@triton.jit
def _put_rows(X, value, b, h, sample, head, row, at, length, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    base = X + b.to(tl.int64) * sample + h.to(tl.int64) * head
    inside = (at[:, None] < length) & (d[None, :] < D)
    tl.store(base + at[:, None] * row + d[None, :], value.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _masked(s, MASK, b, h, i, j, n, m, mask_b, mask_h, mask_n, mask_m, MASKED: tl.constexpr, CAUSAL: tl.constexpr):
    """Scores in units of log 2, -inf where masked; i, j broadcast to s's rows and keys in either order."""
    inside = (i < n) & (j < m)
    s = tl.where(inside, s, float("-inf"))
    if MASKED != 0:
        at = MASK + b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h + i.to(tl.int64) * mask_n + j * mask_m
        if MASKED == 1:
            s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, float("-inf"))
        else:
            s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if CAUSAL:
        s = tl.where(j <= i, s, float("-inf"))
    return s


@triton.jit
def forward_kernel(
    Q, K, V, TQ, TK, TV, MASK, OUT, TOUT, LSE, MU,
    scale, heads, share, n, m,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, tq_b, tq_h, tq_n, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    mask_b, mask_h, mask_n, mask_m, o_b, o_h, o_n, to_b, to_h, to_n,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: BM rows of one head.  share: heads of queries to one of keys; MASKED: 0 none, 1 bool, 2 additive."""
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    first = tl.program_id(0) * BM
    i = first + tl.arange(0, BM)
    q = _rows_of(Q, b, h, q_b, q_h, q_n, i, n, D, BD)
    if HAS_TQ:
        tq = _rows_of(TQ, b, h, tq_b, tq_h, tq_n, i, n, D, BD)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    mu = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BDV], tl.float32)
    g = tl.zeros([BM, BDV], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + BM)
    for start in range(0, end, BN):
        j = start + tl.arange(0, BN)
        k = _rows_of(K, b, h // share, k_b, k_h, k_n, j, m, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s = _masked(s, MASK, b, h, i[:, None], j[None, :], n, m, mask_b, mask_h, mask_n, mask_m, MASKED, CAUSAL)
        above = tl.maximum(top, tl.max(s, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        worth = tl.exp2(top - base)
        p = tl.exp2(s - base[:, None])
        top = above
        before = total * worth
        total = before + tl.sum(p, 1)
        v = _rows_of(V, b, h // share, v_b, v_h, v_n, j, m, DV, BDV)
        if HAS_TQ or HAS_TK:
            ts = tl.zeros([BM, BN], tl.float32)
            if HAS_TQ:
                ts = tl.dot(tq, tl.trans(k), ts, input_precision=PRECISION)
            if HAS_TK:
                tk = _rows_of(TK, b, h // share, tk_b, tk_h, tk_n, j, m, D, BD)
                ts = tl.dot(q, tl.trans(tk), ts, input_precision=PRECISION)
            # Where P is 0 the score's tangent must not matter, were it infinite.
            ts = tl.where(p > 0, ts * scale - mu[:, None], 0.0)
            step = tl.sum(p * ts, 1) / tl.where(total == 0, 1.0, total)
            mu += step
            # tS about the new mean: where P is 0, so is H.
            hv = p * (ts - step[:, None])
            g = (g - step[:, None] * o) * worth[:, None]
            g = tl.dot(hv.to(v.dtype), v, g, input_precision=PRECISION)
        elif HAS_TV:
            g = g * worth[:, None]
        p = p.to(v.dtype)
        if HAS_TV:
            tv = _rows_of(TV, b, h // share, tv_b, tv_h, tv_n, j, m, DV, BDV)
            g = tl.dot(p, tv, g, input_precision=PRECISION)
        o = tl.dot(p, v, o * worth[:, None], input_precision=PRECISION)
    empty = total == 0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    _put_rows(OUT, o * inverse[:, None], b, h, o_b, o_h, o_n, i, n, DV, BDV)
    at = tl.program_id(1).to(tl.int64) * n + i
    lse = tl.where(empty, float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
    tl.store(LSE + at, lse, mask=i < n)
    if HAS_TQ or HAS_TK or HAS_TV:
        _put_rows(TOUT, g * inverse[:, None], b, h, to_b, to_h, to_n, i, n, DV, BDV)
        tl.store(MU + at, mu, mask=i < n)


@triton.jit
def rows_kernel(
    Q, K, V, TQ, TK, TV, MASK, LSE, MU, GO, GT, FIRST, REST, GQ, GTQ,
    scale, heads, share, n, m,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, tq_b, tq_h, tq_n, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    mask_b, mask_h, mask_n, mask_m, go_b, go_h, go_n, gt_b, gt_h, gt_n, gq_b, gq_h, gq_n, gtq_b, gtq_h, gtq_n,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, HAS_GO: tl.constexpr, HAS_GT: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gq and gtq of BM rows of one head.  FIRST: sum_d gt o; REST: sum_d (gt to + go o), both [B, Hq, N]."""
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    first = tl.program_id(0) * BM
    i = first + tl.arange(0, BM)
    at = tl.program_id(1).to(tl.int64) * n + i
    # An lse of inf makes P 0: rows outside, and rows without keys.
    lse = tl.load(LSE + at, mask=i < n, other=float("inf")) * LOG2E
    rest = tl.load(REST + at, mask=i < n, other=0.0)
    q = _rows_of(Q, b, h, q_b, q_h, q_n, i, n, D, BD)
    gq = tl.zeros([BM, BD], tl.float32)
    if HAS_GO:
        go = _rows_of(GO, b, h, go_b, go_h, go_n, i, n, DV, BDV)
    if HAS_GT:
        gt = _rows_of(GT, b, h, gt_b, gt_h, gt_n, i, n, DV, BDV)
        first_sum = tl.load(FIRST + at, mask=i < n, other=0.0)
        mu = tl.load(MU + at, mask=i < n, other=0.0)
    if HAS_TQ:
        tq = _rows_of(TQ, b, h, tq_b, tq_h, tq_n, i, n, D, BD)
        gtq = tl.zeros([BM, BD], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, first + BM)
    for start in range(0, end, BN):
        j = start + tl.arange(0, BN)
        k = _rows_of(K, b, h // share, k_b, k_h, k_n, j, m, D, BD)
        v = _rows_of(V, b, h // share, v_b, v_h, v_n, j, m, DV, BDV)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s = _masked(s, MASK, b, h, i[:, None], j[None, :], n, m, mask_b, mask_h, mask_n, mask_m, MASKED, CAUSAL)
        p = tl.exp2(s - lse[:, None])
        inner = tl.zeros([BM, BN], tl.float32) - rest[:, None]
        if HAS_GO:
            inner = tl.dot(go, tl.trans(v), inner, input_precision=PRECISION)
        if HAS_GT:
            x = tl.dot(gt, tl.trans(v), input_precision=PRECISION) - first_sum[:, None]
            if HAS_TK:
                tk = _rows_of(TK, b, h // share, tk_b, tk_h, tk_n, j, m, D, BD)
            if HAS_TQ or HAS_TK:
                ts = tl.zeros([BM, BN], tl.float32)
                if HAS_TQ:
                    ts = tl.dot(tq, tl.trans(k), ts, input_precision=PRECISION)
                if HAS_TK:
                    ts = tl.dot(q, tl.trans(tk), ts, input_precision=PRECISION)
                inner += x * tl.where(p > 0, ts * scale - mu[:, None], 0.0)
            if HAS_TV:
                tv = _rows_of(TV, b, h // share, tv_b, tv_h, tv_n, j, m, DV, BDV)
                inner = tl.dot(gt, tl.trans(tv), inner, input_precision=PRECISION)
            gts = (p * x).to(k.dtype)
            if HAS_TK:
                gq = tl.dot(gts, tk, gq, input_precision=PRECISION)
            if HAS_TQ:
                gtq = tl.dot(gts, k, gtq, input_precision=PRECISION)
        gq = tl.dot((p * inner).to(k.dtype), k, gq, input_precision=PRECISION)
    _put_rows(GQ, gq * scale, b, h, gq_b, gq_h, gq_n, i, n, D, BD)
    if HAS_TQ:
        _put_rows(GTQ, gtq * scale, b, h, gtq_b, gtq_h, gtq_n, i, n, D, BD)


@triton.jit
def keys_kernel(
    Q, K, V, TQ, TK, TV, MASK, LSE, MU, GO, GT, FIRST, REST, GK, GV, GTK, GTV,
    scale, heads, share, n, m,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, tq_b, tq_h, tq_n, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    mask_b, mask_h, mask_n, mask_m, go_b, go_h, go_n, gt_b, gt_h, gt_n,
    gk_b, gk_h, gk_n, gv_b, gv_h, gv_n, gtk_b, gtk_h, gtk_n, gtv_b, gtv_h, gtv_n,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, HAS_GO: tl.constexpr, HAS_GT: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gk, gv, gtk and gtv of BN keys of one head of keys, over all heads of queries that share it.  Scores transposed:
    [keys, rows]."""
    groups = heads // share
    b, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    start = tl.program_id(0) * BN
    j = start + tl.arange(0, BN)
    k = _rows_of(K, b, group, k_b, k_h, k_n, j, m, D, BD)
    v = _rows_of(V, b, group, v_b, v_h, v_n, j, m, DV, BDV)
    gk = tl.zeros([BN, BD], tl.float32)
    gv = tl.zeros([BN, BDV], tl.float32)
    if HAS_TK:
        tk = _rows_of(TK, b, group, tk_b, tk_h, tk_n, j, m, D, BD)
        gtk = tl.zeros([BN, BD], tl.float32)
    if HAS_TV:
        tv = _rows_of(TV, b, group, tv_b, tv_h, tv_n, j, m, DV, BDV)
        gtv = tl.zeros([BN, BDV], tl.float32)
    begin = 0
    if CAUSAL:
        begin = start // BM * BM
    for one in range(0, share):
        h = group * share + one
        for first in range(begin, n, BM):
            i = first + tl.arange(0, BM)
            at = (b * heads + h).to(tl.int64) * n + i
            lse = tl.load(LSE + at, mask=i < n, other=float("inf")) * LOG2E
            rest = tl.load(REST + at, mask=i < n, other=0.0)
            q = _rows_of(Q, b, h, q_b, q_h, q_n, i, n, D, BD)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            s = _masked(s, MASK, b, h, i[None, :], j[:, None], n, m, mask_b, mask_h, mask_n, mask_m, MASKED, CAUSAL)
            p = tl.exp2(s - lse[None, :])
            inner = tl.zeros([BN, BM], tl.float32) - rest[None, :]
            if HAS_GO:
                go = _rows_of(GO, b, h, go_b, go_h, go_n, i, n, DV, BDV)
                inner = tl.dot(v, tl.trans(go), inner, input_precision=PRECISION)
                gv = tl.dot(p.to(v.dtype), go, gv, input_precision=PRECISION)
            if HAS_GT:
                gt = _rows_of(GT, b, h, gt_b, gt_h, gt_n, i, n, DV, BDV)
                first_sum = tl.load(FIRST + at, mask=i < n, other=0.0)
                x = tl.dot(v, tl.trans(gt), input_precision=PRECISION) - first_sum[None, :]
                if HAS_TQ:
                    tq = _rows_of(TQ, b, h, tq_b, tq_h, tq_n, i, n, D, BD)
                if HAS_TQ or HAS_TK:
                    mu = tl.load(MU + at, mask=i < n, other=0.0)
                    ts = tl.zeros([BN, BM], tl.float32)
                    if HAS_TQ:
                        ts = tl.dot(k, tl.trans(tq), ts, input_precision=PRECISION)
                    if HAS_TK:
                        ts = tl.dot(tk, tl.trans(q), ts, input_precision=PRECISION)
                    ts = tl.where(p > 0, ts * scale - mu[None, :], 0.0)
                    inner += x * ts
                    gv = tl.dot((p * ts).to(v.dtype), gt, gv, input_precision=PRECISION)
                if HAS_TV:
                    inner = tl.dot(tv, tl.trans(gt), inner, input_precision=PRECISION)
                    gtv = tl.dot(p.to(v.dtype), gt, gtv, input_precision=PRECISION)
                gts = (p * x).to(k.dtype)
                if HAS_TQ:
                    gk = tl.dot(gts, tq, gk, input_precision=PRECISION)
                if HAS_TK:
                    gtk = tl.dot(gts, q, gtk, input_precision=PRECISION)
            gk = tl.dot((p * inner).to(k.dtype), q, gk, input_precision=PRECISION)
    _put_rows(GK, gk * scale, b, group, gk_b, gk_h, gk_n, j, m, D, BD)
    _put_rows(GV, gv, b, group, gv_b, gv_h, gv_n, j, m, DV, BDV)
    if HAS_TK:
        _put_rows(GTK, gtk * scale, b, group, gtk_b, gtk_h, gtk_n, j, m, D, BD)
    if HAS_TV:
        _put_rows(GTV, gtv, b, group, gtv_b, gtv_h, gtv_n, j, m, DV, BDV)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Attended:
    """`reference` in one pass over the keys; products in the inputs' dtype (float32: IEEE), sums in float32."""
    q, k, v, tq, tk, tv = _in_rows(q, k, v, tq, tk, tv)
    o = torch.empty_like(q) if q.shape[3] == v.shape[3] and _dense(q) else q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    moving = not (tq is None and tk is None and tv is None)
    to, mu = (torch.empty_like(o), torch.empty_like(lse)) if moving else (None, None)
    tile, sizes = _tile("forward", q, v)
    hidden = _mask(mask, q, k)
    operands = (q, k, v, tq, tk, tv)
    with _device(q):
        launch: Any = forward_kernel[(triton.cdiv(q.shape[2], tile.rows), q.shape[0] * q.shape[1])]
        launch(
            *(_or(x, q) for x in operands), hidden, o, _or(to, o), lse, _or(mu, lse),
            *_lengths(q, k, scale), *_strides(*operands), *hidden.stride(), *_strides(o, to),
            *sizes, *_there(tq, tk, tv), _kind(mask), causal, _precision(q),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return Attended(o, to, lse, mu)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    o: Tensor,
    to: Tensor | None,
    lse: Tensor,
    mu: Tensor | None,
    go: Tensor | None,
    gt: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """`reference_backward`; products in the inputs' dtype, sums in float32."""
    q, k, v, tq, tk, tv, go, gt = _in_rows(q, k, v, tq, tk, tv, go, gt)
    first, rest = torch.zeros_like(lse), torch.zeros_like(lse)
    if gt is not None:
        assert to is not None
        first, rest = _along(gt, o), _along(gt, to)
    if go is not None:
        rest = rest + _along(go, o)
    operands = (q, k, v, tq, tk, tv)
    found: list[Any] = [None if x is None else x.new_empty(x.shape) for x in operands]
    gq, gk, gv, gtq, gtk, gtv = found
    hidden = _mask(mask, q, k)
    inputs = (*(_or(x, q) for x in operands), hidden, lse, _or(mu, lse), _or(go, o), _or(gt, o), first, rest)
    numbers = (*_lengths(q, k, scale), *_strides(*operands), *hidden.stride(), *_strides(go, gt))
    flags = (*_there(tq, tk, tv, go, gt), _kind(mask), causal, _precision(q))
    rows, row_sizes = _tile("rows", q, v)
    keys, key_sizes = _tile("keys", q, v)
    with _device(q):
        launch: Any = rows_kernel[(triton.cdiv(q.shape[2], rows.rows), q.shape[0] * q.shape[1])]
        launch(
            *inputs, gq, _or(gtq, gq), *numbers, *_strides(gq, gtq), *row_sizes, *flags,
            num_warps=rows.warps, num_stages=rows.stages,
        )  # fmt: skip
        launch = keys_kernel[(triton.cdiv(k.shape[2], keys.keys), k.shape[0] * k.shape[1])]
        launch(
            *inputs, gk, gv, _or(gtk, gk), _or(gtv, gv), *numbers, *_strides(gk, gv, gtk, gtv), *key_sizes, *flags,
            num_warps=keys.warps, num_stages=keys.stages,
        )  # fmt: skip
    return tuple(found)


def _tile(kernel: str, q: Tensor, v: Tensor) -> tuple[Tile, tuple[int, ...]]:
    """The tile, and D, DV, BD, BDV, BM, BN."""
    d, dv = q.shape[3], v.shape[3]
    bd, bdv = (max(16, triton.next_power_of_2(size)) for size in (d, dv))
    tile = TILES[kernel]["float32" if q.dtype == torch.float32 else "half"][max(bd, bdv)]
    if bd != bdv:  # in a tile of 64 rows, Hopper's wgmma by Triton 3.6 gave a G that was off by a third
        tile = tile._replace(rows=min(tile.rows, 32), keys=min(tile.keys, 32))
    return tile, (d, dv, bd, bdv, tile.rows, tile.keys)


def _lengths(q: Tensor, k: Tensor, scale: float) -> tuple[float, int, int, int, int]:
    return scale, q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2]


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def _mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """[B, Hq, N, M] by its strides; a stand-in of such a shape if there is none."""
    shape = (*q.shape[:3], k.shape[2])
    if mask is None:
        return q[:1, :1, :1, :1].expand(shape)
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask.to(torch.float32)).expand(shape)


def _kind(mask: Tensor | None) -> int:
    return 0 if mask is None else 1 if mask.dtype == torch.bool else 2


def _precision(q: Tensor) -> str:
    """Triton's default rounds float32 to TF32's ten bits."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _there(*tensors: Tensor | None) -> list[bool]:
    return [x is not None for x in tensors]


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is needed even where it is never followed."""
    return other if x is None else x


def _in_rows(*tensors: Tensor | None) -> list[Any]:
    return [x if x is None or x.stride(3) == 1 else x.contiguous() for x in tensors]


def _dense(x: Tensor) -> bool:
    """Whether empty_like keeps its strides, so that [B, N, H, D] seen as [B, H, N, D] stays so."""
    return torch.empty_like(x, device="meta").stride() == x.stride()


def _along(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() * b.float()).sum(-1)


def _device(q: Tensor) -> Any:
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
