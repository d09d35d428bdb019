"""Launchers of score_difference.cu, on the current stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewstep_cuda.contract import together
from fewstep_cuda.cuda.build import library
from fewstep_cuda.score_difference import ScoreDifference, scales
from fewstep_cuda.score_difference_two import TwoDifferences
from fewstep_cuda.score_identity import ScoreIdentity
from fewstep_cuda.tangent_normalise import Norm

SPAN = 4096
"""Elements of a block; score_difference.cu has it too."""
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
P, I64, F64, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
SIGNATURES: dict[str, Sequence[Any]] = {
    "fs_score_difference": (INT, P, P, P, P, P, I64, I64, P),
    "fs_score_difference_from_raw": (INT, P, P, P, P, P, P, P, F64, P, P, I64, I64, P),
    "fs_scale": (P, P, P, P, I64, I64, F64, F64, F64, F64, P),
    "fs_score_difference_two": (INT, P, P, P, P, P, F64, P, P, P, P, I64, I64, F64, F64, F64, F64, P),
    "fs_score_identity": (INT, P, P, P, F64, P, P, P, P, P, P, I64, I64, F64, F64, F64, P),
    "fs_tangent_normalise": (INT, P, P, P, P, I64, I64, F64, F64, P),
}


def launch(x: Tensor, real_x0: Tensor, fake_x0: Tensor, floor: float) -> ScoreDifference:
    """`score_difference`."""
    kind, inputs = _alike(x, real_x0, fake_x0)
    gap, partial = _buffers(x)
    _call(x, "fs_score_difference", kind, *inputs, gap, partial, *_sizes(x))
    return _scaled(gap, partial, floor)


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
    kind, inputs = _alike(x, x_t, fake, cond, *([] if uncond is None else [uncond]))
    gap, partial = _buffers(x)
    levels = [c.to(gap).contiguous() for c in (p, q)]
    given = [*inputs, *([None] if uncond is None else []), *levels]
    _call(x, "fs_score_difference_from_raw", kind, *given, guidance, gap, partial, *_sizes(x))
    return _scaled(gap, partial, floor)


def launch_two(
    x: Tensor, real: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, strength: float, floor: float
) -> TwoDifferences:
    """`score_difference_two`."""
    kind, inputs = _alike(x, real, fake, cond, uncond)
    grad, partial = _buffers(x, 2)
    weight, value = grad.new_empty(2, len(x)), torch.empty_like(partial)
    outputs = grad, partial, weight, value, *_sizes(x)
    _call(x, "fs_score_difference_two", kind, *inputs, strength, *outputs, floor, *scales(x.numel()))
    return TwoDifferences(grad, weight, value.sum((1, 2)))


def launch_identity(x: Tensor, real_x0: Tensor, fake_x0: Tensor, alpha: float, floor: float) -> ScoreIdentity:
    """`score_identity`."""
    kind, inputs = _alike(x, real_x0, fake_x0)
    grad_x, partial = _buffers(x)
    grads = grad_x, torch.empty_like(grad_x), torch.empty_like(grad_x)
    weight, value = grad_x.new_empty(len(x)), torch.empty_like(partial)
    share, power, _ = scales(x.numel())
    outputs = *grads, partial, weight, value, *_sizes(x)
    _call(x, "fs_score_identity", kind, *inputs, alpha, *outputs, floor, share, power)
    return ScoreIdentity(value.sum(), weight, *grads)


def launch_normalise(g: Tensor, c: float, norm: Norm) -> tuple[Tensor, Tensor]:
    """`tangent_normalise`."""
    kind, (given,) = _alike(g)
    out, partial = _buffers(g)
    found, (batch, size) = out.new_empty(len(g)), _sizes(g)
    count = float(size if norm == "mean" else 1)
    _call(g, "fs_tangent_normalise", kind, given, out, partial, found, batch, size, count, c)
    return out, found


def _scaled(grad: Tensor, partial: Tensor, floor: float) -> ScoreDifference:
    """The second kernel, over the unscaled gap; it is used up."""
    weight, value = grad.new_empty(len(grad)), torch.empty_like(partial)
    _call(grad, "fs_scale", grad, partial, weight, value, *_sizes(grad), floor, *scales(grad.numel()))
    return ScoreDifference(grad, weight, value.sum())


def _call(x: Tensor, name: str, *arguments: Any) -> None:
    """Launch on x's device and current stream.  Tensors go as pointers.  Raises RuntimeError with CUDA's words."""
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        given = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        if told := _function(name, torch.cuda.get_device_capability())(*given, stream):
            raise RuntimeError(f"{name} was not launched: {told.decode()}")


@cache
def _function(name: str, capability: tuple[int, int]) -> Any:
    function = getattr(library("score_difference", 10 * capability[0] + capability[1]), name)
    function.argtypes, function.restype = SIGNATURES[name], ctypes.c_char_p
    return function


def _alike(*tensors: Tensor) -> tuple[int, list[Tensor]]:
    """All contiguous and of one dtype, which is widened if they differ; and its number."""
    alike = len({tensor.dtype for tensor in tensors}) == 1
    found = [tensor.contiguous() for tensor in (tensors if alike else together(*tensors))]
    return KINDS[found[0].dtype], found


def _buffers(x: Tensor, terms: int = 1) -> tuple[Tensor, Tensor]:
    """The output, and one number for each term and block: [terms, B, blocks]."""
    batch, size = _sizes(x)
    gap = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return gap, gap.new_empty(terms, batch, -(-size // SPAN))


def _sizes(x: Tensor) -> tuple[int, int]:
    return len(x), x.numel() // len(x)
