"""`attention_jvp.cpp` as a kernel: its arguments, and the backward pass, which is the chunked one."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewstep_cuda.attention_chunked import chunked_backward
from fewstep_cuda.attention_jvp import Attended
from fewstep_cuda.cpu.build import library

JOB = ctypes.c_int64 * (8 * 4 + 2 + 2 + 4 + 5 + 3)
"""What the source calls Job: addresses and sizes, all of 64 bits."""
NONE = (0, 0, 0, 0)


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
    """`reference` in one pass over the keys; no scores are kept.  float32; strides as they come, if D's is 1."""
    samples, heads, n, d = q.shape
    groups, m, dv = v.shape[1:]
    # What the addresses in the job point to must live until the call is over: each is bound to a name here.
    q, k, v, tq, tk, tv = _in_rows(q, k, v, tq, tk, tv)
    o, lse = _like(q, dv), q.new_empty(samples, heads, n)
    to, mu = (None, None) if tq is None and tk is None and tv is None else (_like(q, dv), torch.empty_like(lse))
    hidden = (0, 0, *NONE)
    if mask is not None:
        additive = mask.dtype != torch.bool
        mask = mask.to(torch.float32) if additive else mask
        hidden = (mask.data_ptr(), additive, *mask.expand(samples, heads, n, m).stride())
    operands = [value for x in (q, k, v, tq, tk, tv, o, to) for value in _operand(x)]
    statistics = (lse.data_ptr(), 0 if mu is None else mu.data_ptr())
    job = JOB(*operands, *statistics, *hidden, samples, heads, groups, n, m, d, dv, causal)
    if _function()(job, scale, torch.get_num_threads()):
        raise MemoryError("attention_jvp could not allocate its blocks")
    return Attended(o, to, lse, mu)


backward = chunked_backward


@cache
def _function() -> Any:
    function = library("attention_jvp").fewstep_attention_jvp
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_float, ctypes.c_int], ctypes.c_int
    return function


def _in_rows(*tensors: Tensor | None) -> list[Any]:
    return [x if x is None or x.stride(3) == 1 else x.contiguous() for x in tensors]


def _operand(x: Tensor | None) -> tuple[int, ...]:
    return NONE if x is None else (x.data_ptr(), *x.stride()[:3])


def _like(q: Tensor, size: int) -> Tensor:
    """An output in q's layout: [B, N, H, D] seen as [B, H, N, D] stays so, and is contiguous when seen back."""
    if q.stride(1) < q.stride(2):
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], size).transpose(1, 2)
    return q.new_empty(*q.shape[:3], size)
