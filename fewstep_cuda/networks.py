"""Derivatives of networks as they are: torch's functions are answered by our operators where they meet a tangent.

diffusers, transformers and plain torch modules all end in `F.scaled_dot_product_attention`, `F.layer_norm`, `F.linear`
and the like.  A function mode sees these calls wherever they come from; no module, processor or registry is touched,
and what carries no tangent goes to torch untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from fewstep_cuda.attention_jvp import attention as fused
from fewstep_cuda.norm_jvp import adaln, group_norm_silu

Attention = Callable[..., Tensor]
"""(q, k, v, mask=, causal=, scale=) -> out, right in forward mode."""
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.matmul, Tensor.matmul, Tensor.__matmul__,
            torch.bmm, Tensor.bmm)  # fmt: skip
"""Of two arguments, linear in either."""
AFFINE = (F.linear, F.conv1d, F.conv2d, F.conv3d)
"""Of x, weight, bias and settings."""
SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__,
        torch.div, Tensor.div, Tensor.__truediv__)  # fmt: skip
"""Of two arguments, one of them constant: in differences and quotients the second."""


class FusedDuals(TorchFunctionMode):
    """Within it, dual numbers go through attention, norms and products with constants as one operator each.

    with forward_ad.dual_level(), FusedDuals(): ...

    attention, norms: value and tangent from one kernel.  Norms are off: of six networks four were slower with them, the
    others as fast (2 cores, one thread).
    products: what is linear in its one dual argument (linear, convolutions, matmul, x c, x / c, x + c) is applied to
    the tangent.  torch gives the constant a tangent of zeros that is never stored, but whose shape is found in Python:
    90 us for x + c, 170 for x c, 260 for a GroupNorm with weights, whatever their size.

    Right under torch.func.jvp (inside or around the transform), under dual numbers and where a graph is recorded, in
    which case products are left to torch.  Backward passes need no mode.  With torch.compile, around a compiled module
    or inside one, the derivative is right; whether the operators are used there has not been looked at.
    attention: (q, k, v, mask=, causal=, scale=) -> out; None = `fewstep_cuda.attention`.

    Raises NotImplementedError for attention with dropout on dual numbers.
    """

    def __init__(self, attention: Attention | None = None, *, norms: bool = False, products: bool = True) -> None:
        super().__init__()
        self._answers: dict[Any, Callable[..., Any]] = {
            F.scaled_dot_product_attention: partial(_attend, attention or fused)
        }
        if norms:
            self._answers |= {F.layer_norm: _layer_norm, F.group_norm: _group_norm, F.rms_norm: _rms_norm}
        if products:
            self._answers |= {func: partial(_product, func) for func in PRODUCTS}
            self._answers |= {func: partial(_affine, func) for func in AFFINE}
            self._answers |= {func: partial(_sum, func) for func in SUMS}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every function of torch; those that we do not answer go on."""
        answer, kwargs = self._answers.get(func), kwargs or {}
        if answer is not None and any(_tangent(v) is not None for v in (*args, *kwargs.values())):
            found = answer(*args, **kwargs)
            return func(*args, **kwargs) if found is None else found
        return func(*args, **kwargs)


def _tangent(value: Any) -> Tensor | None:
    return forward_ad.unpack_dual(value).tangent if isinstance(value, Tensor) and value.is_floating_point() else None


def _recorded(*values: Any) -> bool:
    """Whether a graph would hold the primals without their tangents, so that forward-over-reverse lost a part."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _product(func: Callable[..., Tensor], a: Any, b: Any, **settings: Any) -> Tensor | None:
    """a b, one of them constant.  None = let torch do it."""
    ta, tb = _tangent(a), _tangent(b)
    if settings or (ta is not None and tb is not None) or _recorded(a, b):
        return None
    if ta is not None:
        return _made(func(_primal(a), b), func(ta, b))
    return _made(func(a, _primal(b)), func(a, tb))


def _affine(
    func: Callable[..., Tensor], input: Any, weight: Any, bias: Any = None, *args: Any, **settings: Any
) -> Tensor | None:
    """Linear in the input, with constant weights."""
    tangent = _tangent(input)
    if tangent is None or any(_tangent(w) is not None for w in (weight, bias)) or _recorded(input, weight, bias):
        return None
    y = func(_primal(input), weight, bias, *args, **settings)
    return _made(y, func(tangent, weight, None, *args, **settings))


def _sum(func: Callable[..., Tensor], a: Any, b: Any, **settings: Any) -> Tensor | None:
    """a + b, a - b or a / b, one of a sum's and the second of the others constant."""
    if _tangent(a) is None and "add" in func.__name__:
        a, b = b, a
    tangent = _tangent(a)
    if settings or tangent is None or _tangent(b) is not None or _recorded(a, b):
        return None
    y = func(_primal(a), b)
    if "div" in func.__name__:
        return _made(y, func(tangent, b))
    # A copy: an operation in place on the sum would change the tangent of its argument.
    return _made(y, tangent.expand(y.shape).clone(memory_format=torch.contiguous_format))


def _primal(x: Tensor) -> Tensor:
    return forward_ad.unpack_dual(x).primal


def _made(y: Tensor, ty: Tensor) -> Tensor | None:
    """None for outputs of another dtype than their tangent's, which type promotion may give."""
    return forward_ad.make_dual(y, ty) if y.dtype == ty.dtype and y.is_floating_point() else None


def _attend(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """All forms of torch's arguments; leading axes beyond the heads' are folded into the batch."""
    if dropout_p:
        raise NotImplementedError(f"attention with dropout_p={dropout_p} has no derivative here; call module.eval()")
    if not enable_gqa and key.shape[-3:-2] != query.shape[-3:-2] and query.ndim > 3:
        key, value = (t.expand(*query.shape[:-2], *t.shape[-2:]) for t in (key, value))
    lead = query.shape[:-2]
    q, k, v = (_four(t, query.ndim) for t in (query, key, value))
    mask = attn_mask
    if mask is not None and mask.ndim > 2 and query.ndim != 4:
        mask = _four(mask.expand(*lead, *mask.shape[-2:]), query.ndim)
    out = attention(q, k, v, mask=mask, causal=is_causal, scale=scale)
    return out.reshape(*lead, *out.shape[-2:])


def _four(x: Tensor, axes: int) -> Tensor:
    """[..., H, N, D] as [B, H, N, D]; without heads, as one."""
    if axes == 4:
        return x
    return x[:, None] if axes == 3 else x.reshape(-1, *x.shape[-3:])


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if input.numel() == 0:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    flat, weight, bias = _rows(input, normalized_shape, weight, bias)
    return adaln(flat, weight=weight, bias=bias, eps=eps).view(input.shape)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if eps is None:
        eps = torch.finfo(input.dtype).eps
    if input.numel() == 0 or eps == 0:
        return F.rms_norm(input, normalized_shape, weight, eps)
    flat, weight, _ = _rows(input, normalized_shape, weight, None)
    return adaln(flat, weight=weight, norm="rms", eps=eps).view(input.shape)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if input.numel() == 0:
        return F.group_norm(input, num_groups, weight, bias, eps)
    return group_norm_silu(input, num_groups, weight, bias, silu=False, eps=eps)


def _rows(x: Tensor, shape: Any, *weights: Tensor | None) -> tuple[Any, ...]:
    """x as one sample of rows, [1, L, C], and the weights [C]."""
    size = math.prod(shape)
    return x.reshape(1, -1, size), *(None if w is None else w.reshape(size) for w in weights)
