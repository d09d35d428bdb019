"""Attention's forward and backward in plain torch, some query rows at a time: memory linear in the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fewstep_cuda.attention_jvp import Attended

SCORES = 1 << 20
"""Scores that are held at a time.  4 MB in float32, about what one core's share of the caches holds."""


def chunked(
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
    """`reference`, in blocks of samples and rows."""
    wide = torch.promote_types(q.dtype, torch.float32)
    moving = not (tq is None and tk is None and tv is None)
    shape = (*q.shape[:3], v.shape[3])
    o, lse = q.new_empty(shape), q.new_empty(shape[:3], dtype=wide)
    to, mu = (torch.empty_like(o), torch.empty_like(lse)) if moving else (None, None)
    k, v, tk, tv = _widened(wide, k, v, tk, tv)
    for batch, rows in _blocks(q, k):
        # Heads that share keys are rows of one product: [b, Hk, G r, D].
        at = (batch, slice(None), rows)
        keys, values = k[batch], v[batch]
        sq = _grouped(q[at].to(wide) * scale, k)
        p = _scores(sq, keys, mask, causal, batch, rows, q.shape[1])
        top = p.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        empty = total == 0
        p.div_(total.masked_fill(empty, 1))
        o[at] = _ungrouped(p @ values, q)
        lse[at] = _ungrouped(total.log().add_(top).masked_fill_(empty, torch.inf), q)[..., 0]
        if to is None or mu is None:
            continue
        ts = _moved_scores(sq, keys, None if tq is None else _grouped(tq[at].to(wide) * scale, k), tk, batch)
        if ts is None:
            assert tv is not None
            to[at], mu[at] = _ungrouped(p @ tv[batch], q), 0
            continue
        mean = _weighted(p, ts)
        out = ts.sub_(mean).mul_(p) @ values
        to[at] = _ungrouped(out if tv is None else out.add_(p @ tv[batch]), q)
        mu[at] = _ungrouped(mean, q)[..., 0]
    return Attended(o, to, lse, mu)


def chunked_backward(
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
    """`reference_backward`, in blocks of samples and rows."""
    given, wide = (q, k, v, tq, tk, tv), torch.promote_types(q.dtype, torch.float32)
    gq, gtq = torch.empty_like(q), None if tq is None else torch.zeros_like(tq)
    gk, gv, gtk, gtv = (None if x is None else torch.zeros_like(x, dtype=wide) for x in (k, v, tk, tv))
    k, v, tk, tv = _widened(wide, k, v, tk, tv)
    assert gk is not None and gv is not None
    for batch, rows in _blocks(q, k):
        at = (batch, slice(None), rows)
        keys, values = k[batch], v[batch]
        block, out = _grouped(q[at].to(wide), k), _grouped(o[at].to(wide), k)
        sq = block * scale
        p = _scores(sq, keys, mask, causal, batch, rows, q.shape[1])
        p.sub_(_grouped(lse[at][..., None], k)).exp_()
        inner = x = None
        moved = None if tq is None else _grouped(tq[at].to(wide) * scale, k)
        if go is not None:
            g = _grouped(go[at].to(wide), k)
            inner = (g @ values.mT).sub_((g * out).sum(-1, keepdim=True))
            gv[batch] += p.mT @ g
        if gt is not None:
            assert to is not None and mu is not None
            g = _grouped(gt[at].to(wide), k)
            x = (g @ values.mT).sub_((g * out).sum(-1, keepdim=True))
            n = _moved_scores(sq, keys, moved, tk, batch)
            delta = (g * _grouped(to[at].to(wide), k)).sum(-1, keepdim=True)
            inner = -delta if inner is None else inner.sub_(delta)
            if tv is not None:
                inner = inner + g @ tv[batch].mT
            if n is not None:
                n.sub_(_grouped(mu[at][..., None], k))
                # Where masked P is 0, and what the scores would have been must not matter, were it infinite.
                n.masked_fill_(p == 0, 0)
                gv[batch] += (p * n).mT @ g
                inner = inner + n.mul_(x)
            if gtv is not None:
                gtv[batch] += p.mT @ g
        assert inner is not None
        gs = p * inner
        rows_gradient = gs @ keys
        gk[batch] += gs.mT @ sq
        if x is not None:
            gts = x.mul_(p)
            if moved is not None:
                gk[batch] += gts.mT @ moved
            if gtq is not None:
                gtq[at] = _ungrouped((gts @ keys).mul_(scale), q)
            if tk is not None and gtk is not None:
                rows_gradient += gts @ tk[batch]
                gtk[batch] += gts.mT @ sq
        gq[at] = _ungrouped(rows_gradient.mul_(scale), q)
    found = (gq, gk, gv, gtq, gtk, gtv)
    return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in zip(found, given))


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of query rows."""
    samples, heads, count, _ = q.shape
    row = heads * k.shape[2]
    rows = min(count, max(32, SCORES // row))
    several = max(1, SCORES // (row * rows))
    for start in range(0, samples, several):
        for first in range(0, count, rows):
            yield slice(start, start + several), slice(first, first + rows)


def _widened(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.to(dtype) for x in tensors]


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[b, Hq, r, D] -> [b, Hk, G r, D]."""
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _ungrouped(x: Tensor, q: Tensor) -> Tensor:
    """[b, Hk, G r, D] -> [b, Hq, r, D]."""
    return x.unflatten(2, (q.shape[1] // x.shape[1], -1)).flatten(1, 2)


def _scores(
    sq: Tensor, keys: Tensor, mask: Tensor | None, causal: bool, batch: slice, rows: slice, heads: int
) -> Tensor:
    """[b, Hk, G r, M], -inf where masked.  sq: scaled queries."""
    s = sq @ keys.mT
    if mask is None and not causal:
        return s
    groups, size = keys.shape[1], heads // keys.shape[1]
    view = s.view(s.shape[0], groups, size, -1, s.shape[-1])
    if mask is not None:
        mask = mask if mask.shape[0] == 1 else mask[batch]
        mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
        mask = mask.unflatten(1, (groups, size)) if mask.shape[1] > 1 else mask[:, :, None]
        if mask.dtype == torch.bool:
            view.masked_fill_(~mask, -torch.inf)
        else:
            view.add_(mask.to(s))
    if causal:
        i = torch.arange(rows.start, rows.start + view.shape[3], device=s.device)
        view.masked_fill_(torch.arange(s.shape[-1], device=s.device) > i[:, None], -torch.inf)
    return s


def _moved_scores(sq: Tensor, keys: Tensor, moved: Tensor | None, tk: Tensor | None, batch: slice) -> Tensor | None:
    """scale (tq k^T + q tk^T), None if it is constant 0.  moved: scaled tangents of the queries."""
    ts = None if moved is None else moved @ keys.mT
    if tk is None:
        return ts
    other = sq @ tk[batch].mT
    return other if ts is None else ts.add_(other)


def _weighted(p: Tensor, ts: Tensor) -> Tensor:
    """sum_j P tS.  What a masked key's score would be must not matter, were it infinite: 0 inf is no number."""
    return ts.masked_fill_(p == 0, 0).mul(p).sum(-1, keepdim=True)
