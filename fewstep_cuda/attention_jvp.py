"""Attention with its derivative along a direction, in one pass: contracts, derivatives and the eager reference.

Letters: B samples, Hq and Hk heads of queries and of keys (Hq = G Hk), N queries, M keys, D and Dv sizes of a head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad
from torch.nn import functional as F

from fewstep_cuda import dispatch
from fewstep_cuda.contract import eager

FORWARD, BACKWARD = "attention_jvp", "attention_jvp_backward"
LARGEST = 256
"""Size of a head."""


class Attended(NamedTuple):
    """What a kernel's forward answers; to and mu are None if it got no tangent."""

    o: Tensor  # [B, Hq, N, Dv]
    to: Tensor | None  # [B, Hq, N, Dv]
    lse: Tensor  # [B, Hq, N], float32 or better: log sum_j exp(s_j); +inf where all keys are masked, so that P is 0
    mu: Tensor | None  # [B, Hq, N], float32 or better: sum_j P_j ts_j


class Options(NamedTuple):
    """What is no tensor."""

    causal: bool
    scale: float
    backend: str | None


@eager
def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its derivative along (tq, tk, tv): the form with explicit tangents.

    S = scale q k^T + mask      P = softmax(S)      tS = scale (tq k^T + q tk^T)      mu = sum_j P tS
    o = P v      to = (P * (tS - mu)) v + P tv

    q, tq: [B, Hq, N, D]; k, tk: [B, Hk, M, D]; v, tv: [B, Hk, M, Dv], one dtype and device; Hq is a multiple of Hk.
    A tangent of None is constant and saves its products; at least one must be given.
    mask: broadcastable to [B, Hq, N, M], bool (True = attend) or float (added, and constant).  causal: query i attends
    to keys j <= i, besides the mask.  scale: default 1 / sqrt(D).  Where every key is masked, o = to = 0.
    Both outputs are differentiable in reverse mode, once.  Under torch.compile the call stays eager.
    Raises ValueError for wrong shapes, dtypes or backends, RuntimeError for inputs that carry forward-mode tangents.
    """
    inputs, tangents = (q, k, v), (tq, tk, tv)
    mask, options = _checked(inputs, tangents, mask, causal, scale, backend)
    if tq is None and tk is None and tv is None:
        raise ValueError("attention_jvp needs a tangent: tq, tk and tv are all None; attention is the plain operator")
    if any(x is not None and _unpacked(x)[1] is not None for x in (*inputs, *tangents)):
        raise RuntimeError("attention_jvp takes its tangents as arguments; for dual numbers there is attention")
    run: Callable[..., Any] = _Dual.forward if _bare() else _Dual.apply
    o, to, _, _ = run(*inputs, *tangents, mask, options)
    return o, to


@eager
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v for dual numbers: value and tangent come from one pass of `attention_jvp`.

    In place of scaled_dot_product_attention, which it is where there is no tangent and no backend is asked for, under
    torch.func.jvp and torch.autograd.forward_ad, whose tangents it reads; both value and tangent are differentiable
    in reverse mode, and the gradient once more in either mode (where it is SDPA, what SDPA allows).

    Arguments as `attention_jvp`.  Returns [B, Hq, N, Dv] in q's dtype; under autocast, in autocast's.
    Raises as `attention_jvp`; RuntimeError for a mask that has a derivative, and for third derivatives.
    """
    q, k, v = _autocast(q, k, v)
    mask, options = _checked((q, k, v), (None, None, None), mask, causal, scale, backend)
    primals, tangents = zip(*map(_unpacked, (q, k, v)))
    found: tuple[Tensor | None, ...] = (None, None, None)
    if any(t is not None for t in tangents):
        if _bare():
            o, to, _, _ = _Dual.forward(*primals, *tangents, mask, options)
            assert to is not None
            return forward_ad.make_dual(o, to)
        o, to, lse, _ = _Dual.apply(*primals, *tangents, mask, options)
        found = (o, lse, to)
    # Beneath a function transform there may be tangents of another level, which SDPA's fast kernels refuse.
    elif _automatic(backend) and peek_interpreter_stack() is None and not (causal and mask is not None):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, _additive(mask, q), is_causal=causal, scale=options.scale, enable_gqa=grouped
        )
    return _Attention.apply(q, k, v, mask, *found, options)[0]


def reference(
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
    """The specification of a kernel's forward, in plain torch: all scores at once, in float32 or better.

    mask: [B or 1, Hq or 1, N or 1, M or 1].  The rest: see `attention_jvp`.
    """
    dtype, heads = q.dtype, q.shape[1]
    q, k, v, tq, tk, tv = _alike(heads, q, k, v, tq, tk, tv)
    s = _scores(q, k, mask, causal, scale)
    lse = s.logsumexp(-1)
    empty = lse == -torch.inf
    lse, p = lse.masked_fill(empty, torch.inf), s.softmax(-1).masked_fill(empty[..., None], 0)
    o = p @ v
    if tq is None and tk is None and tv is None:
        return Attended(o.to(dtype), None, lse, None)
    ts = _moved_scores(q, k, tq, tk, scale).masked_fill(s == -torch.inf, 0)
    mu = (p * ts).sum(-1)
    to = (p * (ts - mu[..., None])) @ v
    if tv is not None:
        to = to + p @ tv
    return Attended(o.to(dtype), to.to(dtype), lse, mu)


def reference_backward(
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
    """The specification of a kernel's backward: (gq, gk, gv, gtq, gtk, gtv), None for a tangent that is None.

    X = gt v^T - sum_d gt o      gtS = P X      n = tS - mu
    gS = P (X n + gt tv^T + go v^T - sum_d (gt to + go o))
    gq = scale (gS k + gtS tk)      gk = scale (gS^T q + gtS^T tq)      gv = P^T go + (P n)^T gt
    gtq = scale gtS k      gtk = scale gtS^T q      gtv = P^T gt

    o, to, lse, mu: what the forward answered.  go, gt: gradients by o and to, None = 0; not both None.  gt needs to
    and mu.
    """
    given, heads = (q, k, v, tq, tk, tv), q.shape[1]
    q, k, v, tq, tk, tv = _alike(heads, *given)
    o, to, go, gt = _alike(heads, o, to, go, gt)
    s = _scores(q, k, mask, causal, scale)
    p = (s - lse[..., None]).exp()
    inner, gv = torch.zeros_like(s), torch.zeros_like(v)
    gts = gtv = None
    if go is not None:
        inner = inner + go @ v.mT - (go * o).sum(-1, keepdim=True)
        gv = gv + p.mT @ go
    if gt is not None:
        assert to is not None and mu is not None
        n = _moved_scores(q, k, tq, tk, scale).masked_fill(s == -torch.inf, 0) - mu[..., None]
        x = gt @ v.mT - (gt * o).sum(-1, keepdim=True)
        inner = inner + x * n - (gt * to).sum(-1, keepdim=True)
        if tv is not None:
            inner = inner + gt @ tv.mT
        gv, gts, gtv = gv + (p * n).mT @ gt, p * x, p.mT @ gt
    gs = p * inner
    gq, gk = scale * gs @ k, scale * gs.mT @ q
    gtq = gtk = None
    if gts is not None:
        gtq, gtk = scale * gts @ k, scale * gts.mT @ q
        gq = gq if tk is None else gq + scale * gts @ tk
        gk = gk if tq is None else gk + scale * gts.mT @ tq
    found = (gq, gk, gv, gtq, gtk, gtv)
    return tuple(None if x is None else _gradient(g, x) for g, x in zip(found, given))


class _Dual(torch.autograd.Function):
    """(q, k, v, tq, tk, tv) -> (o, to, lse, mu), differentiable once through o and to."""

    @staticmethod
    def forward(*inputs: Any) -> Attended:
        *tensors, mask, options = inputs
        run = dispatch.kernel(FORWARD, tensors, options.backend)
        return run(*tensors, mask, options.causal, options.scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Attended) -> None:
        ctx.options = inputs[-1]
        ctx.mark_non_differentiable(output[2], output[3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], *output)

    @staticmethod
    def backward(ctx: Any, go: Tensor | None, gt: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if go is None and gt is None:
            return (None,) * 8
        return (*_DualBackward.apply(*ctx.saved_tensors, go, gt, ctx.options), None, None)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "attention has no second derivative in forward mode (jvp of jvp); take one of them in reverse mode"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _folded(_Dual, info.batch_size, in_dims, inputs, mask=6)


class _DualBackward(torch.autograd.Function):
    """Gradients of `_Dual`; it has none of its own, and says so."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        q, k, v, tq, tk, tv, mask, o, to, lse, mu, go, gt, options = inputs
        moving = (tq, tk, tv) if gt is not None else (None, None, None)
        run = dispatch.kernel(BACKWARD, [x for x in (q, k, v, *moving, go, gt) if x is not None], options.backend)
        return run(q, k, v, *moving, mask, options.causal, options.scale, o, to, lse, mu, go, gt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("attention is differentiable once through its tangent, twice in all; this is one too many")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("attention is differentiable once through its tangent, twice in all; this is one too many")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _folded(_DualBackward, info.batch_size, in_dims, inputs, mask=6)


class _Attention(torch.autograd.Function):
    """(q, k, v) -> (o, lse) with a jvp; found: o, lse and tangent where the caller has computed them, or None."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, mask, o, lse, _, options = inputs
        if o is not None:
            # Copies: the tangent's graph has saved these, and the caller may change what it gets in place.
            return o.clone(), lse.clone()
        run = dispatch.kernel(FORWARD, [q, k, v], options.backend)
        found = run(q, k, v, None, None, None, mask, options.causal, options.scale)
        return found.o, found.lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, _, _, to, ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, *output)
        ctx.save_for_forward(q, k, v, mask, to)

    @staticmethod
    def backward(ctx: Any, go: Tensor | None, _: Any) -> tuple[Any, ...]:
        if go is None:
            return (None,) * 8
        return (*_Backward.apply(*ctx.saved_tensors, go, ctx.options), None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, *_: Any) -> tuple[Any, None]:
        q, k, v, mask, to = ctx.saved_tensors
        if to is None:
            _, to, _, _ = _Dual.apply(q, k, v, tq, tk, tv, mask, ctx.options)
        return to, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _folded(_Attention, info.batch_size, in_dims, inputs, mask=3)


class _Backward(torch.autograd.Function):
    """Gradients of `_Attention` by q, k, v, differentiable once more in both modes.

    With L = <go, o>, the gradient's derivative along t is that of <go, to(t)> + <tgo, o>: a dual pass and its backward.
    The same with t = c, the cotangents of the gradients, is its reverse mode; by go it is then to(c).
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, mask, o, lse, go, options = inputs
        run = dispatch.kernel(BACKWARD, [q, k, v, go], options.backend)
        none = (None, None, None)
        return run(q, k, v, *none, mask, options.causal, options.scale, o, None, lse, None, go, None)[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1])
        ctx.save_for_forward(*inputs[:-1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        if all(c is None for c in cotangents):
            return (None,) * 8
        q, k, v, mask, _, _, go = ctx.saved_tensors
        dual = _Dual.apply(q, k, v, *cotangents, mask, ctx.options)
        found = _DualBackward.apply(q, k, v, *cotangents, mask, *dual, None, go, ctx.options)
        return (*found[:3], None, None, None, dual[1], None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        q, k, v, mask, o, lse, go = ctx.saved_tensors
        moving, tgo = tangents[:3], tangents[6]
        if all(t is None for t in moving):
            return _Backward.apply(q, k, v, mask, o, lse, tgo, ctx.options)
        dual = _Dual.apply(q, k, v, *moving, mask, ctx.options)
        return _DualBackward.apply(q, k, v, *moving, mask, *dual, tgo, go, ctx.options)[:3]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _folded(_Backward, info.batch_size, in_dims, inputs, mask=3)


def _folded(function: Any, size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...], mask: int) -> Any:
    """A function of samples under vmap: its `size` copies become more samples."""
    shape = list(inputs[0].shape)
    if in_dims[0] is not None:
        shape.pop(in_dims[0])
    samples = shape[0]

    def fold(i: int, x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
        if i == mask:
            x = x.expand(size, samples, *x.shape[2:])
        return x.flatten(0, 1)

    found = function.apply(*(fold(i, x, dim) for i, (x, dim) in enumerate(zip(inputs, in_dims))))
    outputs = tuple(x.unflatten(0, (size, samples)) if isinstance(x, Tensor) else x for x in found)
    return outputs, tuple(0 if isinstance(x, Tensor) else None for x in outputs)


def _checked(
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    backend: str | None,
) -> tuple[Tensor | None, Options]:
    """The mask with four dimensions, and the options; ValueError or RuntimeError for what does not fit."""
    q, k, v = inputs
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if any(x.ndim != 4 or x.numel() == 0 for x in inputs):
        raise ValueError(
            f"attention needs q [B, Hq, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv], none empty; got {shapes}"
        )
    (batch, heads, rows, size), (_, groups, columns, value) = q.shape, v.shape
    if k.shape != (batch, groups, columns, size) or v.shape[0] != batch or heads % groups:
        raise ValueError(
            f"attention needs q [B, Hq, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv], Hq a multiple of Hk; got {shapes}"
        )
    if max(size, value) > LARGEST:
        raise ValueError(f"attention takes heads of at most {LARGEST}, got {size} and {value}; use more heads")
    for name, x, primal in zip(("q", "k", "v", "tq", "tk", "tv"), (*inputs, *tangents), (*inputs, *inputs)):
        if x is None:
            continue
        if x.dtype != q.dtype or x.device != q.device or not x.is_floating_point():
            raise ValueError(
                f"attention needs floats of one dtype and device: q is {q.dtype} on {q.device}, "
                f"{name} {x.dtype} on {x.device}; convert with .to(q)"
            )
        if x.shape != primal.shape:
            raise ValueError(f"{name} must have its primal's shape {list(primal.shape)}, got {list(x.shape)}")
    if mask is not None:
        full = (batch, heads, rows, columns)
        if mask.ndim > 4 or any(n not in (1, m) for n, m in zip(mask.shape[::-1], full[::-1])):
            raise ValueError(f"mask must be broadcastable to [B, Hq, N, M] = {list(full)}, got {list(mask.shape)}")
        if (mask.dtype != torch.bool and not mask.is_floating_point()) or mask.device != q.device:
            raise ValueError(f"mask must be bool or float on {q.device}, got {mask.dtype} on {mask.device}")
        if mask.requires_grad or _unpacked(mask)[1] is not None:
            raise RuntimeError("a mask is a constant of attention; this one requires a gradient or carries a tangent")
        mask = mask.view((1,) * (4 - mask.ndim) + mask.shape) if mask.ndim < 4 else mask
    return mask, Options(causal, size**-0.5 if scale is None else float(scale), backend)


def _unpacked(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal, and tangent if it has one at this level; one of an outer function transform comes to light further in."""
    inside = peek_interpreter_stack()
    if inside is not None and inside.key() != TransformType.Jvp:
        return x, None
    return forward_ad.unpack_dual(x)


def _bare() -> bool:
    """Whether nothing asks for a graph or transforms: then a Function would only take its time, 20 us."""
    return not torch.is_grad_enabled() and peek_interpreter_stack() is None


def _autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """What autocast makes of the inputs of SDPA: its own dtype, except of float64."""
    kind = inputs[0].device.type
    if not torch.is_autocast_enabled(kind) or any(x.dtype == torch.float64 for x in inputs):
        return inputs
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in inputs)


def _automatic(backend: str | None) -> bool:
    return (backend or os.environ.get("FEWSTEP_KERNELS") or dispatch.AUTO) == dispatch.AUTO


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask as SDPA takes it: bool, or float of q's dtype."""
    return mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)


def _alike(heads: int, *tensors: Tensor | None) -> list[Any]:
    """In float32 or better, each with all heads, the groups' repeated."""
    wide = [None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return [x if x is None else x.repeat_interleave(heads // x.shape[1], 1) for x in wide]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """[B, Hq, N, M], -inf where masked."""
    s = scale * q @ k.mT
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(s)
    return s.masked_fill(~torch.ones_like(s[0, 0], dtype=torch.bool).tril(), -torch.inf) if causal else s


def _moved_scores(q: Tensor, k: Tensor, tq: Tensor | None, tk: Tensor | None, scale: float) -> Tensor:
    ts = torch.zeros((), dtype=q.dtype, device=q.device).expand(*q.shape[:3], k.shape[2])
    ts = ts if tq is None else ts + scale * tq @ k.mT
    return ts if tk is None else ts + scale * q @ tk.mT


def _gradient(g: Tensor | None, x: Tensor) -> Tensor:
    """In x's dtype, summed over the queries' heads that share one of x's; zeros if there is none."""
    if g is None:
        return torch.zeros_like(x)
    return g.unflatten(1, (x.shape[1], -1)).sum(2).to(x.dtype)
