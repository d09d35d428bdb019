"""Contenders for norms with what follows them, value and tangent.

torch.func.jvp of the composition, eager and compiled; the kernel in its explicit form, and through dual numbers, as in
a network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import fewstep_cuda as ops
from eval.bench_case import Call, Case, kernels

Operator = tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Any], list[Tensor]]
"""Plain composition, our function, its explicit dual form, and inputs."""


def adaln(batch: int, length: int, size: int) -> Operator:
    """LayerNorm without weights, modulated."""

    def plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (size,), eps=1e-6) * (1 + scale) + shift

    inputs = [torch.randn(batch, length, size), torch.randn(batch, 1, size), torch.randn(batch, 1, size)]
    return plain, ops.adaln, ops.adaln_jvp, inputs


def heads(batch: int, count: int, length: int, size: int) -> Operator:
    """RMSNorm of heads, turned."""
    angle = torch.outer(torch.arange(length), 1e-4 ** (torch.arange(size // 2) / (size // 2))).repeat_interleave(2, 1)
    cos, sin, weight = angle.cos(), angle.sin(), torch.randn(size)

    def plain(q: Tensor) -> Tensor:
        z = F.rms_norm(q, (size,), weight, 1e-6)
        turned = torch.stack((-z[..., 1::2], z[..., 0::2]), -1).flatten(-2)
        return z * cos + turned * sin

    def ours(q: Tensor, backend: str) -> Tensor:
        return ops.qk_norm_rope(q, cos, sin, weight=weight, backend=backend)

    def dual(q: Tensor, tq: Tensor, backend: str) -> Any:
        return ops.qk_norm_rope_jvp(q, cos, sin, tq, weight=weight, backend=backend)

    return plain, ours, dual, [torch.randn(batch, count, length, size)]


def group(batch: int, size: int, side: int) -> Operator:
    """GroupNorm in 32 groups and SiLU."""
    weight, bias = torch.randn(size), torch.randn(size)

    def plain(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-5))

    def ours(x: Tensor, backend: str) -> Tensor:
        return ops.group_norm_silu(x, 32, weight, bias, backend=backend)

    def dual(x: Tensor, tx: Tensor, backend: str) -> Any:
        return ops.group_norm_silu_jvp(x, 32, weight, bias, tx=tx, backend=backend)

    return plain, ours, dual, [torch.randn(batch, size, side, side)]


def gated(batch: int, length: int, size: int) -> Operator:
    """x + gate y."""

    def plain(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        return x + gate * y

    inputs = [torch.randn(batch, length, size), torch.randn(batch, 1, size), torch.randn(batch, length, size)]
    return plain, ops.gated_residual, ops.gated_residual_jvp, inputs


SHAPES: dict[tuple[str, str], tuple[Callable[..., Operator], tuple[int, ...]]] = {
    ("adaln", "2x256x1152"): (adaln, (2, 256, 1152)),
    ("adaln", "2x1024x1152"): (adaln, (2, 1024, 1152)),
    ("adaln", "1x4096x1536"): (adaln, (1, 4096, 1536)),
    ("qk_norm_rope", "2x16x1024x64"): (heads, (2, 16, 1024, 64)),
    ("group_norm_silu", "2x320x64x64"): (group, (2, 320, 64)),
    ("gated_residual", "2x1024x1152"): (gated, (2, 1024, 1152)),
}


def cases(device: str) -> list[Case]:
    """All of them."""
    return [_case(operator, name, device) for operator, name in SHAPES]


def _case(operator: str, name: str, device: str) -> Case:
    """moved: inputs and the output, each with its tangent."""
    make, sizes = SHAPES[operator, name]
    torch.manual_seed(0)
    with torch.device(device):
        plain, ours, openly, inputs = make(*sizes)
    tangents = [torch.randn_like(x) for x in inputs]

    def jvp(*both: Tensor) -> Any:
        return torch.func.jvp(plain, both[: len(inputs)], both[len(inputs) :])

    def dual(backend: str) -> Any:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents)]
            return forward_ad.unpack_dual(ours(*duals, backend=backend))

    def prepared(call: Call) -> Callable[[], Call]:
        return lambda: call

    torch._dynamo.reset()  # else the second shape is compiled for any, which forward mode does not always take
    compiled = torch.compile(jvp, dynamic=False)
    contenders = {
        "eager jvp": prepared(lambda: jvp(*inputs, *tangents)),
        "torch.compile jvp": prepared(lambda: compiled(*inputs, *tangents)),
    }
    for backend in kernels(operator, device):
        contenders[f"{backend} kernel"] = prepared(partial(openly, *inputs, *tangents, backend=backend))
        contenders[f"{backend} kernel, dual numbers"] = prepared(partial(dual, backend))
    moved = 2 * (sum(x.nbytes for x in inputs) + inputs[0].nbytes)
    return Case(operator, name, tuple(inputs[0].shape), moved, device, contenders)
