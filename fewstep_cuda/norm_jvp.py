"""Normalisations of transformers and U-Nets with what follows them, and their derivatives: contracts and references.

Every operator comes twice: `f` is differentiable by torch in both modes, `f_jvp` takes and gives tangents openly, with
None for what is constant.  Both may be differentiated backwards.  With P the projection that a norm's derivative is,

xhat = (x - mean x) r,  r = (mean (x - mean x)^2 + eps)^-1/2        P u = u - mean u - xhat mean(xhat u)
y = f(xhat a + c)       ty = f'(xhat a + c) (r (P tx) a + xhat ta + tc)

and without the means of x and u for RMSNorm.  f is the identity, SiLU or a rotary embedding.  Whatever scales and
shifts there are end up in a and c, which are small, so that torch differentiates that part itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewstep_cuda import dispatch

Kind = Literal["layer", "rms"]
Layout = Literal["interleaved", "half"]
"""Which two entries of a head a rotary embedding turns: 2i and 2i + 1, or i and i + D / 2.

diffusers: use_real_unbind_dim -1 (Flux, Wan) and -2 (CogView, Stable Audio, Lumina).
"""
Called = TypeVar("Called", bound=Callable[..., Any])
Tensors = Sequence[Any]
"""Tensors, and None for those that are left out."""


def _eager(function: Called) -> Called:
    """Not traced by torch.compile: it drops the jvp of an autograd.Function, and the tangent would be zero."""
    disable: Any = torch.compiler.disable
    return disable(function)


@_eager
def adaln(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Kind = "layer",
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Normalise the last axis and modulate it: y = (xhat weight + bias)(1 + scale) + shift.

    x: [B, ..., C], any float.  scale, shift: [B, C] or [B, 1, C], B = 1 for one for all.  weight, bias: [C].
    Computed in float32 or better, returned in x's shape and dtype; every input may carry a tangent or a graph.
    Under torch.compile it breaks the graph; fullgraph=True is refused.
    """
    op, primals = _adaln(x, scale, shift, weight, bias, norm, eps, backend)
    return _differentiable(op, primals).view(x.shape)


@_eager
def adaln_jvp(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    tx: Tensor | None = None,
    tscale: Tensor | None = None,
    tshift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Kind = "layer",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`adaln` and its derivative along (tx, tscale, tshift), each of its primal's shape, or None for a constant.

    ty = r (P tx) weight (1 + scale) + (xhat weight + bias) tscale + tshift
    Returns y and ty in x's shape and dtype; ty is None if all tangents are.
    """
    op, primals = _adaln(x, scale, shift, weight, bias, norm, eps, backend)
    _check_tangents("adaln_jvp", {"x": (x, tx), "scale": (scale, tscale), "shift": (shift, tshift)})
    ta, tc = _moved(primals[1], weight, bias, tscale, tshift)
    y, ty = _openly(op, primals, [None if tx is None else tx.reshape(primals[0].shape), ta, tc])
    return y.view(x.shape), None if ty is None else ty.view(x.shape)


@_eager
def qk_norm_rope(
    q: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Kind = "rms",
    layout: Layout = "interleaved",
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Normalise each head of queries or keys and turn it by its position: y = z cos + turned(z) sin, z = xhat weight.

    turned(z): the pair (u, v) becomes (-v, u); `Layout` says what is a pair.

    q: [B, H, N, D], any strides, any float.  cos, sin: [N, D], each angle twice, without derivative; None = no turning.
    weight, bias: [D].  Precision, tangents and torch.compile: see `adaln`.
    """
    return _differentiable(*_qk(q, cos, sin, weight, bias, norm, layout, eps, backend))


@_eager
def qk_norm_rope_jvp(
    q: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    tq: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Kind = "rms",
    layout: Layout = "interleaved",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`qk_norm_rope` and its derivative along tq [B, H, N, D]: turning is linear, so ty turns the norm's derivative."""
    op, primals = _qk(q, cos, sin, weight, bias, norm, layout, eps, backend)
    _check_tangents("qk_norm_rope_jvp", {"q": (q, tq)})
    return _openly(op, primals, [tq, None, None])


@_eager
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    silu: bool = True,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm, modulation if there is one, and SiLU: y = z sigmoid(z), z = (xhat weight + bias)(1 + scale) + shift.

    x: [B, C, *spatial], any float; groups divides C.  weight, bias: [C].  scale, shift: [B, C] (a U-Net's time).
    silu=False: y = z.  Precision, tangents and torch.compile: see `adaln`.
    """
    op, primals = _group(x, groups, weight, bias, scale, shift, silu, eps, backend)
    return _differentiable(op, primals).view(x.shape)


@_eager
def group_norm_silu_jvp(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    tx: Tensor | None = None,
    tscale: Tensor | None = None,
    tshift: Tensor | None = None,
    *,
    silu: bool = True,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`group_norm_silu` and its derivative: ty = s (1 + z (1 - s)) tz, s = sigmoid(z), tz as in `adaln_jvp`."""
    op, primals = _group(x, groups, weight, bias, scale, shift, silu, eps, backend)
    _check_tangents("group_norm_silu_jvp", {"x": (x, tx), "scale": (scale, tscale), "shift": (shift, tshift)})
    ta, tc = (
        None if t is None else t.reshape(-1, *primals[1].shape[1:])
        for t in _moved(primals[1].flatten(1), weight, bias, tscale, tshift)
    )
    y, ty = _openly(op, primals, [None if tx is None else tx.reshape(primals[0].shape), ta, tc])
    return y.view(x.shape), None if ty is None else ty.view(x.shape)


@_eager
def gated_residual(x: Tensor, gate: Tensor, y: Tensor, *, backend: str | None = None) -> Tensor:
    """x + gate y.

    x, y: [B, ..., C] of one dtype.  gate: [B, C] or [B, 1, C], B = 1 for one for all.  Computed in float32 or better,
    returned in x's shape and dtype.  Tangents and torch.compile: see `adaln`.
    """
    op, primals = _gated(x, gate, y, backend)
    return _differentiable(op, primals).view(x.shape)


@_eager
def gated_residual_jvp(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    tx: Tensor | None = None,
    tgate: Tensor | None = None,
    ty: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`gated_residual` and its derivative tx + tgate y + gate ty."""
    op, primals = _gated(x, gate, y, backend)
    _check_tangents("gated_residual_jvp", {"x": (x, tx), "gate": (gate, tgate), "y": (y, ty)})
    tangents = [None if t is None else t.reshape(p.shape).to(p.dtype) for t, p in zip((tx, tgate, ty), primals)]
    out, tout = _openly(op, primals, tangents)
    return out.view(x.shape), None if tout is None else tout.view(x.shape)


def linear_jvp(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tx: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x W^T + b and tx W^T as one product of [x; tx], which reads the weights once.

    Nothing but torch, so it has no backends, traces under torch.compile, and torch differentiates it in both modes.
    x, tx: [..., K].  weight: [N, K], bias: [N], without tangents of their own.  Returns y, ty: [..., N].
    """
    if tx is None:
        return torch.nn.functional.linear(x, weight, bias), None
    _check_tangents("linear_jvp", {"x": (x, tx)})
    y, ty = torch.nn.functional.linear(torch.stack((x, tx)), weight).unbind()
    return y if bias is None else y + bias, ty


@dataclass(frozen=True)
class Norm:
    """A normalisation as kernels see it, and the specification of what they compute.

    x: [B, L, C] with a, c [B or 1, 1, C]; [B, H, N, D] with a, c [1, 1, 1, D], cos, sin [N, D] or None;
    [B, G, C / G, S] with a, c [B or 1, G, C / G, 1].  The last `axes` axes are normalised together.
    x and tx are of one dtype, the rest is in float32 or better.
    """

    kernel: Callable[..., tuple[Tensor, Tensor | None]]
    centred: bool
    eps: float
    axes: int = 1
    silu: bool = False
    interleaved: bool = False

    def run(self, primals: Tensors, tangents: Tensors | None) -> tuple[Tensor, Tensor | None]:
        """y and ty of x's shape and dtype; ty is None without tangents, which otherwise are there for x, a and c."""
        return self.kernel(self, *primals, *(tangents or (None,) * 3))

    def mean(self, u: Tensor) -> Tensor:
        """Over the normalised axes, which stay."""
        return u.mean(tuple(range(-self.axes, 0)), keepdim=True)

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """xhat and r."""
        x = x - self.mean(x) if self.centred else x
        r = (self.mean(x.square()) + self.eps).rsqrt()
        return x * r, r

    def projected(self, u: Tensor, xhat: Tensor) -> Tensor:
        """P u; P is symmetric."""
        u = u - self.mean(u) if self.centred else u
        return u - xhat * self.mean(xhat * u)

    def turned(self, z: Tensor) -> Tensor:
        """Every pair (u, v) as (-v, u); the transpose is the negative."""
        if self.interleaved:
            u, v = z.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((-v, u), -1).flatten(-2)
        u, v = z.chunk(2, -1)
        return torch.cat((-v, u), -1)

    def gradients(self, primals: Tensors, tangents: Tensors | None, gy: Any, gty: Any) -> list[Any]:
        """Of <gy, y> + <gty, ty> by x, a, c and, if there are tangents, tx, ta, tc.

        With u = gz a + gtz ta and w = gtz a, where gz, gtz are those by z = xhat a + c and tz:
        gtx = r P w      gx = r (P u - xhat mean(w txhat) - mean(xhat tx) gtx - mean(w xhat) txhat)
        """
        x, a, c, cos, sin = primals
        wide: list[Any] = [None if t is None else _wide(t) for t in (x, gy, gty, *(tangents or (None,)))]
        xhat, r = self.normalised(wide[0])
        z, tz, txhat = xhat * a + c, None, xhat
        if tangents is not None:
            txhat = r * self.projected(wide[3], xhat)
            tz = txhat * a + xhat * tangents[1] + tangents[2]
        gz, gtz = self._before(z, tz, wide[1], wide[2], cos, sin)
        if tangents is None:
            return _fitted((r * self.projected(gz * a, xhat), gz * xhat, gz), (x, a, c))
        w = gtz * a
        gtx = r * self.projected(w, xhat)
        gx = r * self.projected(gz * a + gtz * tangents[1], xhat) - r * (
            xhat * self.mean(w * txhat) + self.mean(xhat * wide[3]) * gtx + self.mean(w * xhat) * txhat
        )
        found = (gx, gz * xhat + gtz * txhat, gz, gtx, gtz * xhat, gtz)
        return _fitted(found, (x, a, c, *tangents))

    def _before(self, z: Tensor, tz: Any, gy: Any, gty: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        """Gradients by z and tz from those behind SiLU or the turning."""
        if self.silu:
            s = z.sigmoid()
            slope = s * (1 + z * (1 - s))
            if gty is None:
                return slope * gy, None
            return slope * gy + s * (1 - s) * (2 + z * (1 - 2 * s)) * tz * gty, slope * gty
        if cos is None:
            return gy, gty
        back = [None if g is None else g * cos - self.turned(g * sin) for g in (gy, gty)]
        return back[0], back[1]


def reference(
    form: Norm, x: Tensor, a: Tensor, c: Tensor, cos: Any, sin: Any, tx: Any, ta: Any, tc: Any
) -> tuple[Tensor, Tensor | None]:
    """The specification of the three norms, in plain torch; shapes in `Norm`."""
    xhat, r = form.normalised(_wide(x))
    z, tz = xhat * a + c, None
    if tx is not None:
        tz = r * form.projected(_wide(tx), xhat) * a + xhat * ta + tc
    if form.silu:
        s = z.sigmoid()
        tz = None if tz is None else s * (1 + z * (1 - s)) * tz
        z = z * s
    elif cos is not None:
        z = z * cos + form.turned(z) * sin
        tz = None if tz is None else tz * cos + form.turned(tz) * sin
    return z.to(x.dtype), None if tz is None else tz.to(x.dtype)


@dataclass(frozen=True)
class Gated:
    """x + gate y as kernels see it.  x, y: [B, L, C]; gate: [B or 1, 1, C] in float32 or better."""

    kernel: Callable[..., tuple[Tensor, Tensor | None]]

    def run(self, primals: Tensors, tangents: Tensors | None) -> tuple[Tensor, Tensor | None]:
        """See `Norm`."""
        return self.kernel(*primals, *(tangents or (None,) * 3))

    def gradients(self, primals: Tensors, tangents: Tensors | None, gy: Any, gty: Any) -> list[Any]:
        """By x, gate, y and their tangents."""
        _, gate, y = (_wide(t) for t in primals)
        gy = _wide(gy)
        if tangents is None:
            return _fitted((gy, gy * y, gy * gate), primals)
        (_, tgate, ty), gty = (_wide(t) for t in tangents), _wide(gty)
        found = (gy, gy * y + gty * ty, gy * gate + gty * tgate, gty, gty * y, gty * gate)
        return _fitted(found, (*primals, *tangents))


def gated_reference(x: Tensor, gate: Tensor, y: Tensor, tx: Any, tgate: Any, ty: Any) -> tuple[Tensor, Tensor | None]:
    """The specification of `gated_residual`; shapes in `Gated`."""
    out = (_wide(x) + gate * _wide(y)).to(x.dtype)
    if tx is None:
        return out, None
    return out, (_wide(tx) + tgate * _wide(y) + gate * _wide(ty)).to(x.dtype)


class _Primal(torch.autograd.Function):
    """y = f(primals)."""

    @staticmethod
    def forward(op: Any, *primals: Any) -> Any:
        return op.run(primals, None)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        primals = ctx.saved_tensors
        found = ctx.op.gradients(primals, None, grads[0], None)
        return None, *found, *[None] * (len(primals) - len(found))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _openly(ctx.op, ctx.saved_tensors, tangents[1:4])[1]


class _Dual(torch.autograd.Function):
    """y, ty = f(primals), f'(primals) tangents.  It has no jvp, so that torch refuses a second forward derivative."""

    @staticmethod
    def forward(op: Any, *inputs: Any) -> Any:
        return op.run(inputs[:-3], inputs[-3:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        primals, tangents = ctx.saved_tensors[:-3], ctx.saved_tensors[-3:]
        found = ctx.op.gradients(primals, tangents, *grads)
        return None, *found[:3], *[None] * (len(primals) - 3), *found[3:]


def _openly(op: Norm | Gated, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor | None]:
    """y and ty.  tangents: of the first three primals, None = constant."""
    if all(tangent is None for tangent in tangents):
        return _Primal.apply(op, *primals), None
    return _Dual.apply(op, *primals, *_filled(primals, tangents))


def _filled(primals: Tensors, tangents: Tensors) -> list[Tensor]:
    """Tangents of the first three primals, in their dtypes, zeros for constants."""
    return [torch.zeros_like(p) if t is None else t.to(p.dtype) for p, t in zip(primals, tangents)]


def _differentiable(op: Norm | Gated, primals: Tensors) -> Tensor:
    """f of primals that may carry tangents and graphs."""
    if not (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in primals)):
        # One kernel gives y and ty, where Function.jvp would have to compute y again.  Not where a graph is recorded:
        # it would hold primals without their tangents, and forward-over-reverse would silently lose its second part.
        parts = [None if p is None else forward_ad.unpack_dual(p) for p in primals]
        tangents = [None if p is None else p.tangent for p in parts[:3]]
        if any(tangent is not None for tangent in tangents):
            plain = [None if p is None else p.primal for p in parts]
            # Nothing is left to differentiate outside functorch, and Function.apply takes as long as a small kernel.
            run = _openly if torch._C._are_functorch_transforms_active() else _at_once
            return forward_ad.make_dual(*run(op, plain, tangents))
    return _Primal.apply(op, *primals)


def _at_once(op: Norm | Gated, primals: Tensors, tangents: Tensors) -> tuple[Any, Any]:
    """`_openly` without a graph."""
    return op.run(primals, _filled(primals, tangents))


def _adaln(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    backend: str | None,
) -> tuple[Norm, list[Any]]:
    _check("adaln", x, 2, norm, eps)
    size = x.shape[-1]
    a, c = _affine("adaln", x, size, weight, bias, scale, shift)
    kernel = dispatch.kernel("adaln", [x], backend)
    return Norm(kernel, norm == "layer", eps), [x.reshape(len(x), -1, size), a[:, None], c[:, None], None, None]


def _qk(
    q: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    layout: str,
    eps: float,
    backend: str | None,
) -> tuple[Norm, list[Any]]:
    _check("qk_norm_rope", q, 1, norm, eps)
    if q.ndim != 4:
        raise ValueError(f"qk_norm_rope needs q [B, H, N, D], got {list(q.shape)}; split the heads before it")
    if layout not in get_args(Layout):
        raise ValueError(f"layout {layout!r} is not known; allowed: {', '.join(get_args(Layout))}")
    length, size = q.shape[-2:]
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together: one of them is None")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        if table.shape != (length, size) or size % 2:
            raise ValueError(f"{name} must be [N, D] = [{length}, {size}] with D even, got {list(table.shape)}")
        if forward_ad.unpack_dual(table).tangent is not None or table.requires_grad:
            raise RuntimeError(f"{name} carries a derivative, and positions have none here; detach it")
    cos, sin = (None if table is None else table.to(_wide_dtype(q)) for table in (cos, sin))
    a, c = (t[0].view(1, 1, 1, size) for t in _affine("qk_norm_rope", q, size, weight, bias, None, None))
    kernel = dispatch.kernel("qk_norm_rope", [q], backend)
    return Norm(kernel, norm == "layer", eps, interleaved=layout == "interleaved"), [q, a, c, cos, sin]


def _group(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    eps: float,
    backend: str | None,
) -> tuple[Norm, list[Any]]:
    _check("group_norm_silu", x, 2, "layer", eps)
    size = x.shape[1]
    if groups < 1 or size % groups:
        raise ValueError(f"groups={groups} does not divide the {size} channels")
    a, c = _affine("group_norm_silu", x, size, weight, bias, scale, shift)
    kernel = dispatch.kernel("group_norm_silu", [x], backend)
    shape = (groups, size // groups)
    primals = [x.reshape(len(x), *shape, -1), a.view(-1, *shape, 1), c.view(-1, *shape, 1), None, None]
    return Norm(kernel, True, eps, axes=2, silu=silu), primals


def _gated(x: Tensor, gate: Tensor, y: Tensor, backend: str | None) -> tuple[Gated, list[Any]]:
    _check("gated_residual", x, 2, "layer", 1.0)
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"gated_residual needs x and y alike, got {list(x.shape)} {x.dtype} on {x.device} and "
            f"{list(y.shape)} {y.dtype} on {y.device}"
        )
    size = x.shape[-1]
    gate = _modulator("gated_residual", "gate", x, size, gate)[:, None]
    kernel = dispatch.kernel("gated_residual", [x, y], backend)
    return Gated(kernel), [x.reshape(len(x), -1, size), gate, y.reshape(len(x), -1, size)]


def _affine(
    operator: str,
    x: Tensor,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """a = weight (1 + scale) and c = bias (1 + scale) + shift, [B or 1, size] in x's wide dtype."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (size,):
            raise ValueError(f"{operator} needs {name} [{size}], got {list(value.shape)}")
    plain = {"dtype": _wide_dtype(x), "device": x.device}
    a = torch.ones(1, size, **plain) if scale is None else 1 + _modulator(operator, "scale", x, size, scale)
    c = torch.zeros(1, size, **plain) if shift is None else _modulator(operator, "shift", x, size, shift)
    if bias is not None:
        c = c + a * bias.to(**plain)
    return (a if weight is None else a * weight.to(**plain)), c


def _moved(
    a: Tensor, weight: Tensor | None, bias: Tensor | None, tscale: Tensor | None, tshift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Tangents of a and c, in a's dtype and of their shapes [B or 1, (1,) size]."""
    ta, tc = (None if t is None else t.to(a.dtype).reshape(len(t), *a.shape[1:]) for t in (tscale, tshift))
    if ta is not None and bias is not None:
        tc = ta * bias if tc is None else ta * bias + tc
    if ta is not None and weight is not None:
        ta = ta * weight
    return ta, tc


def _modulator(operator: str, name: str, x: Tensor, size: int, value: Tensor) -> Tensor:
    """[B or 1, size] in x's wide dtype."""
    if value.shape not in {(b, *one, size) for b in (len(x), 1) for one in ((), (1,))}:
        wanted = f"[{len(x)}, {size}], [{len(x)}, 1, {size}] or one for the whole batch"
        raise ValueError(f"{operator} needs {name} {wanted}, got {list(value.shape)}")
    return value.reshape(len(value), size).to(_wide_dtype(x))


def _check(operator: str, x: Tensor, least: int, norm: str, eps: float) -> None:
    if x.ndim < least or x.numel() == 0:
        raise ValueError(f"{operator} needs a non-empty tensor of {least} axes or more, got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{operator} needs floats, got {x.dtype}")
    if norm not in get_args(Kind):
        raise ValueError(f"norm {norm!r} is not known; allowed: {', '.join(get_args(Kind))}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}: a constant row would divide by zero")


def _check_tangents(operator: str, pairs: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
    for name, (primal, tangent) in pairs.items():
        if tangent is not None and (primal is None or tangent.shape != primal.shape):
            shape = None if primal is None else list(primal.shape)
            raise ValueError(f"{operator}: t{name} must have {name}'s shape {shape}, got {list(tangent.shape)}")


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Any) -> Tensor:
    return x.to(_wide_dtype(x))


def _fitted(found: Tensors, like: Tensors) -> list[Tensor]:
    """Gradients summed to their inputs' shapes, in their dtypes."""
    return [g.sum_to_size(t.shape).to(t.dtype) for g, t in zip(found, like, strict=True)]
