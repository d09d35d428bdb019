"""Launches `norm_jvp.cpp`; shapes in `fewstep_cuda.norm_jvp`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep_cuda.cpu.build import library

if TYPE_CHECKING:
    from fewstep_cuda.norm_jvp import Norm

HEAD = 1024
"""Entries that a head may have; the kernel keeps one on its stack."""
POINTER, INDEX, INT, REAL = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_double
ARGUMENTS = {
    "fs_adaln": [POINTER] * 8 + [INDEX] * 3 + [POINTER, INT, REAL, INT],
    "fs_group_norm_silu": [POINTER] * 8 + [INDEX] * 4 + [POINTER, INT, REAL, INT],
    "fs_qk_norm_rope": [POINTER] * 14 + [INT, INT, REAL, INT],
    "fs_gated_residual": [POINTER] * 8 + [INDEX] * 3 + [POINTER, INT],
}
Dual = tuple[Tensor, Tensor | None]


def adaln(
    form: Norm,
    x: Tensor,
    a: Tensor,
    c: Tensor,
    _cos: Tensor | None,
    _sin: Tensor | None,
    tx: Tensor | None,
    ta: Tensor | None,
    tc: Tensor | None,
) -> Dual:
    """LayerNorm or RMSNorm, scaled and shifted."""
    x, a, c, tx, ta, tc = _dense(x, a, c, tx, ta, tc)
    y, ty = _outputs(x, tx)
    steps = _steps(a, c, ta, tc)
    _call("fs_adaln", (x, a, c, tx, ta, tc, y, ty), *x.shape, steps, form.centred, form.eps)
    return y, ty


def group_norm_silu(
    form: Norm,
    x: Tensor,
    a: Tensor,
    c: Tensor,
    _cos: Tensor | None,
    _sin: Tensor | None,
    tx: Tensor | None,
    ta: Tensor | None,
    tc: Tensor | None,
) -> Dual:
    """GroupNorm, scaled and shifted, and SiLU."""
    x, a, c, tx, ta, tc = _dense(x, a, c, tx, ta, tc)
    y, ty = _outputs(x, tx)
    steps = _steps(a, c, ta, tc)
    _call("fs_group_norm_silu", (x, a, c, tx, ta, tc, y, ty), *x.shape, steps, form.silu, form.eps)
    return y, ty


def qk_norm_rope(
    form: Norm,
    x: Tensor,
    a: Tensor,
    c: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    tx: Tensor | None,
    ta: Tensor | None,
    tc: Tensor | None,
) -> Dual:
    """A norm of each head and its turning.  x and tx may have any strides as long as a head is dense."""
    if x.shape[-1] > HEAD:
        raise ValueError(f"the C++ kernel takes heads up to {HEAD}, got {x.shape[-1]}; use backend='reference'")
    a, c, ta, tc, cos, sin = _dense(a, c, ta, tc, cos, sin)
    x = x if x.stride(-1) == 1 else x.contiguous()
    tx = tx if tx is None or tx.stride(-1) == 1 else tx.contiguous()
    y = torch.empty_like(x)
    y = y if y.stride(-1) == 1 else torch.empty(x.shape)
    ty = None if tx is None else torch.empty_strided(y.shape, y.stride())
    steps = [_indices(t.stride()) for t in (x, x if tx is None else tx, y)]
    tensors = (x, a, c, tx, ta, tc, cos, sin, y, ty)
    _call("fs_qk_norm_rope", tensors, _indices(x.shape), *steps, form.interleaved, form.centred, form.eps)
    return y, ty


def gated_residual(
    x: Tensor, gate: Tensor, y: Tensor, tx: Tensor | None, tgate: Tensor | None, ty: Tensor | None
) -> Dual:
    """x + gate y."""
    x, gate, y, tx, tgate, ty = _dense(x, gate, y, tx, tgate, ty)
    out, tout = _outputs(x, tx)
    _call("fs_gated_residual", (x, gate, y, tx, tgate, ty, out, tout), *x.shape, _steps(gate, tgate))
    return out, tout


def _dense(*tensors: Tensor | None) -> list:
    return [None if t is None else t.contiguous() for t in tensors]


def _outputs(x: Tensor, tx: Tensor | None) -> Dual:
    return torch.empty_like(x), None if tx is None else torch.empty_like(x)


def _steps(*tensors: Tensor | None) -> ctypes.Array:
    """From one sample's to the next; 0 if there is one for all."""
    return _indices([0 if t is None or len(t) == 1 else t.stride(0) for t in tensors])


def _indices(values: Sequence[int]) -> ctypes.Array:
    return (INDEX * len(values))(*values)


def _call(name: str, tensors: Sequence[Tensor | None], *arguments: object) -> None:
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    _function(name)(*pointers, *arguments, torch.get_num_threads())


@cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    found = getattr(library("norm_jvp"), name)
    found.argtypes, found.restype = ARGUMENTS[name], None
    return found
