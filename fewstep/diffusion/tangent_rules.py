"""How tangents go through torch's functions: a rule for each, by its name; see `Tangents`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep_cuda import attention_jvp

if TYPE_CHECKING:
    from fewstep.diffusion.tangents import Tangents

LOST = (
    "torch drops derivatives silently behind custom ops without a jvp, detach, .data, .item, numpy, integer casts of "
    "the time and inference mode. Give the network a continuous time and functions of torch; where it has an "
    "autograd.Function of its own with a jvp, use mode='dual'; if the function is smooth and only its AD is broken, "
    "mode='central'."
)


class Lost(RuntimeError):
    """A function whose derivative would be lost without a word."""

    def __init__(self, what: str) -> None:
        super().__init__(f"forward-mode AD finds no derivative of {what}: {LOST}")


Rule = Callable[["Tangents", Any, Any, tuple[Any, ...], dict[str, Any]], Any]
"""(mode, function, result, its arguments) -> the result's tangent, like the result; None where it stands still."""


def dual(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The rule of functions that have none: dual numbers, in a second call of this one function."""
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):

        def lift(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(lift, x)) if type(x) in (tuple, list) else x
            tangent = mode.of(x)
            return x if tangent is None else forward_ad.make_dual(x.detach(), tangent.to(x))

        again = func(*map(lift, args), **{key: lift(value) for key, value in kwargs.items()})
        several = again if isinstance(again, (tuple, list)) else (again,)
        tangents = [forward_ad.unpack_dual(x).tangent if isinstance(x, Tensor) else None for x in several]
    if all(tangent is None for tangent in tangents):
        raise Lost(getattr(func, "__name__", str(func)))
    return tangents if several is again else tangents[0]


def linear_in_first(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Views, casts and sums: the same of the tangent."""
    tangent = mode.of(args[0])
    return None if tangent is None else func(tangent, *args[1:], **kwargs)


def joined(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """cat, stack: what stands still brings zeros."""
    tangents = [torch.zeros_like(x) if (t := mode.of(x)) is None else t for x in args[0]]
    return func(tangents, *args[1:], **kwargs)


def bilinear(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Products of matrices and of numbers: f(ta, b) + f(a, tb)."""
    a, b, *rest = args
    ta, tb = mode.of(a), mode.of(b)
    first = None if ta is None else func(ta, b, *rest, **kwargs)
    second = None if tb is None else func(a, tb, *rest, **kwargs)
    return second if first is None else first if second is None else first + second


def add(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """a + alpha b."""
    return _sum(mode, out, args, kwargs.get("alpha", 1))


def sub(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """a - alpha b."""
    return _sum(mode, out, args, -kwargs.get("alpha", 1))


def rsub(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """b - alpha a."""
    return _sum(mode, out, (args[1], args[0]), -kwargs.get("alpha", 1))


def _sum(mode: Tangents, out: Tensor, args: tuple[Any, ...], factor: float) -> Tensor | None:
    ta, tb = mode.of(args[0]), mode.of(args[1])
    if tb is None:
        return ta
    tb = tb if factor == 1 else factor * tb
    return tb if ta is None else ta + tb


def div(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """a / b."""
    if kwargs.get("rounding_mode") is not None:
        return None
    ta, tb = mode.of(args[0]), mode.of(args[1])
    change = ta if tb is None else -out * tb if ta is None else ta - out * tb
    return None if change is None else change / args[1]


def linear(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x W^T + b and convolutions, of weights that stand still."""
    weights = [*args[1:3], kwargs.get("weight"), kwargs.get("bias")]
    if any(mode.of(weight) is not None for weight in weights):
        return dual(mode, func, out, args, kwargs)
    args = (*args[:2], None, *args[3:]) if len(args) > 2 else args
    return linear_in_first(mode, func, out, args, kwargs | {"bias": None} if "bias" in kwargs else kwargs)


def by_slope(slope: Callable[[Tensor, Tensor], Any]) -> Rule:
    """The rule of a function of numbers.  slope: (x, y) -> dy/dx."""

    def rule(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tangent = mode.of(args[0])
        return None if tangent is None else slope(args[0], out) * tangent

    return rule


def silu(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x sigmoid(x)."""
    return torch.ops.aten.silu_backward(mode.of(args[0]), args[0])


def gelu(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x Phi(x), or its approximation by tanh."""
    return torch.ops.aten.gelu_backward(mode.of(args[0]), args[0], **kwargs)


def power(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x^n of a number n."""
    x, n = args
    if isinstance(n, Tensor):
        return dual(mode, func, out, args, kwargs)
    return mode.of(x) * (2 * x if n == 2 else n * x ** (n - 1))


def softmax(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """p (t - sum p t)."""
    axis = kwargs["dim"] if "dim" in kwargs else args[1]
    moved = out * mode.of(args[0])
    return moved - out * moved.sum(axis, keepdim=True)


def layer_norm(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """LayerNorm over the last axis."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args)) | kwargs
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    tangent = mode.of(x)
    if (
        tangent is None
        or len(given["normalized_shape"]) != 1
        or mode.of(weight) is not None
        or mode.of(bias) is not None
    ):
        return dual(mode, func, out, args, kwargs)
    moved = _normalised(x, tangent, given.get("eps", 1e-5))
    return moved if weight is None else moved * weight


def group_norm(mode: Tangents, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """GroupNorm: LayerNorm of each group."""
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args)) | kwargs
    x, groups, weight = given["input"], given["num_groups"], given.get("weight")
    tangent = mode.of(x)
    if tangent is None or mode.of(weight) is not None or mode.of(given.get("bias")) is not None:
        return dual(mode, func, out, args, kwargs)
    moved = _normalised(x.reshape(len(x), groups, -1), tangent.reshape(len(x), groups, -1), given.get("eps", 1e-5))
    moved = moved.view_as(x)
    return moved if weight is None else moved * weight.view(-1, *[1] * (x.ndim - 2))


def _normalised(x: Tensor, tangent: Tensor, eps: float) -> Tensor:
    """The tangent of (x - mean) / sqrt(var + eps) over the last axis: s (t' - y mean(y t')), t' = t - mean t."""
    y, _, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    change = tangent - tangent.mean(-1, keepdim=True)
    return scale.to(y.dtype) * torch.addcmul(change, y, (y * change).mean(-1, keepdim=True), value=-1)


def dropout(mode: Tangents, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Linear, with the mask that the value draws: the tangent draws the same random numbers again."""
    x, tangent = args[0], mode.of(args[0])
    before = _random_state(x)
    out = func(*args, **kwargs)
    if tangent is not None:
        with torch.no_grad():
            _set_random_state(x, before)
            mode.remember(out, func(tangent.clone(), *args[1:], **kwargs))
    return out


def attention(mode: Tangents, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attention by the operator that makes value and tangent in one pass.

    Where the value has a graph it is that of the network's own call: what it saves for the backward pass, or what a
    recomputation saves in its stead, has to be the same without tangents.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, args)) | kwargs
    inputs, mask = [given[name] for name in names[:3]], given.get("attn_mask")
    if given.get("dropout_p"):
        raise Lost("attention with dropout")
    apart = inputs[0].ndim != 4 or mode.of(mask) is not None  # what the operator does not take
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    out = func(*args, **kwargs) if apart or recorded else None
    with torch.no_grad():
        if apart:
            tangent = dual(mode, func, out, args, kwargs)
        else:
            how = {"mask": mask, "causal": given.get("is_causal", False), "scale": given.get("scale")}
            value, tangent = attention_jvp(*inputs, *map(mode.of, inputs), **how)
            out = value if out is None else out
    mode.remember(out, tangent)
    return out


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def _set_random_state(x: Tensor, state: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.set_rng_state(state, x.device)
    else:
        torch.set_rng_state(state)


VIEWS = """
T H mT mH view view_as reshape reshape_as permute transpose t swapaxes swapdims movedim moveaxis unsqueeze squeeze
flatten unflatten contiguous to float double half bfloat16 type type_as expand expand_as repeat repeat_interleave tile
chunk split split_with_sizes tensor_split unbind __getitem__ select narrow index_select gather roll flip clone neg
positive __neg__ sum mean cumsum diagonal tril triu unfold fold pixel_shuffle pixel_unshuffle broadcast_to real alias
interpolate view_as_complex view_as_real
"""
"""Linear in their first argument, which may be all that moves."""
RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS.split(), linear_in_first),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), joined),
    **dict.fromkeys(("mul", "multiply", "matmul", "bmm", "mm", "__matmul__"), bilinear),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), linear),
    "add": add,
    "sub": sub,
    "div": div,
    "true_divide": div,
    **dict.fromkeys(("rsub", "__rsub__"), rsub),
    **dict.fromkeys(("reciprocal", "__rdiv__", "__rtruediv__"), by_slope(lambda x, y: -y / x)),
    **dict.fromkeys(("pow", "__pow__"), power),
    "square": by_slope(lambda x, y: 2 * x),
    "sqrt": by_slope(lambda x, y: 0.5 / y),
    "rsqrt": by_slope(lambda x, y: -0.5 * y / x),
    "exp": by_slope(lambda x, y: y),
    "log": by_slope(lambda x, y: 1 / x),
    "sin": by_slope(lambda x, y: x.cos()),
    "cos": by_slope(lambda x, y: -x.sin()),
    "tanh": by_slope(lambda x, y: 1 - y.square()),
    "sigmoid": by_slope(lambda x, y: y * (1 - y)),
    "relu": by_slope(lambda x, y: x > 0),
    "silu": silu,
    "gelu": gelu,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
}
"""By the function's name, which methods and functions share."""
NAMED = {"other", "exponent", "mat2"}
"""Second arguments, which rules read by place."""
IN_PLACE = ("add", "sub", "mul", "div")
AT_ONCE: dict[str, Callable[[Tangents, Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    "dropout": dropout,
    "scaled_dot_product_attention": attention,
}
"""Functions whose value and tangent belong together."""
STILL = """
detach data grad requires_grad_ requires_grad register_hook retain_grad size dim numel stride storage_offset data_ptr
is_contiguous zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty
new_tensor sign round floor ceil trunc
""".split()  # noqa: SIM905
"""What asks about a tensor, makes another one like it, or stops the gradient as well."""
LOSING = {"item", "tolist", "numpy", "long", "int", "short", "char", "byte", "__int__", "__float__", "__index__"}
