"""Launchers of score_difference.cpp: contiguous float32 in, new tensors out, torch's number of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewstep_cuda.cpu.build import library
from fewstep_cuda.score_difference import ScoreDifference, split
from fewstep_cuda.score_difference_two import TwoDifferences
from fewstep_cuda.score_identity import ScoreIdentity
from fewstep_cuda.tangent_normalise import Norm

P, I64, F64, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
MATCHING = (P, P, P, I64, I64, F64, F64, F64, INT)
"""grad, weight, value, batch, size, floor, share, power, threads."""
SIGNATURES: dict[str, Sequence[Any]] = {
    "fs_score_difference": (P, P, P, *MATCHING),
    "fs_score_difference_from_raw": (P, P, P, P, P, P, P, F64, *MATCHING),
    "fs_score_difference_two": (P, P, P, P, P, F64, *MATCHING),
    "fs_score_identity": (P, P, P, F64, P, P, *MATCHING),
    "fs_tangent_normalise": (P, F64, INT, P, P, I64, I64, INT),
}


def launch(x: Tensor, real_x0: Tensor, fake_x0: Tensor, floor: float) -> ScoreDifference:
    """`score_difference`."""
    inputs = _contiguous(x, real_x0, fake_x0)
    answer = ScoreDifference(*_outputs(x))
    _function("fs_score_difference")(*_pointers(*inputs, *answer), *_sizes(x), floor, *_scales(x))
    return answer


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
    inputs = _contiguous(x, x_t, fake, cond, *([] if uncond is None else [uncond]))
    per_sample = _contiguous(p.to(x), q.to(x))
    answer = ScoreDifference(*_outputs(x))
    given = [*_pointers(*inputs), *([None] if uncond is None else []), *_pointers(*per_sample)]
    _function("fs_score_difference_from_raw")(*given, guidance, *_pointers(*answer), *_sizes(x), floor, *_scales(x))
    return answer


def launch_two(
    x: Tensor, real: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, strength: float, floor: float
) -> TwoDifferences:
    """`score_difference_two`."""
    inputs = _contiguous(x, real, fake, cond, uncond)
    answer = TwoDifferences(_empty(x), x.new_empty(2, len(x)), x.new_empty(2))
    given = [*_pointers(*inputs), strength, *_pointers(*answer)]
    _function("fs_score_difference_two")(*given, *_sizes(x), floor, *_scales(x))
    return answer


def launch_identity(x: Tensor, real_x0: Tensor, fake_x0: Tensor, alpha: float, floor: float) -> ScoreIdentity:
    """`score_identity`."""
    inputs = _contiguous(x, real_x0, fake_x0)
    answer = ScoreIdentity(x.new_empty(()), x.new_empty(x.shape[0]), *(_empty(x) for _ in range(3)))
    given = [*_pointers(*inputs), alpha, *_pointers(*answer)]
    _function("fs_score_identity")(*given, *_sizes(x), floor, *_scales(x))
    return answer


def launch_normalise(g: Tensor, c: float, norm: Norm) -> tuple[Tensor, Tensor]:
    """`tangent_normalise`."""
    (given,), out, size = _contiguous(g), _empty(g), g.new_empty(len(g))
    pointers, threads = _pointers(out, size), torch.get_num_threads()
    _function("fs_tangent_normalise")(given.data_ptr(), c, norm == "mean", *pointers, *_sizes(g), threads)
    return out, size


@cache
def _function(name: str) -> Any:
    function = getattr(library("score_difference"), name)
    function.argtypes, function.restype = SIGNATURES[name], None
    return function


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad, weight, value."""
    return _empty(x), x.new_empty(x.shape[0]), x.new_empty(())


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _sizes(x: Tensor) -> tuple[int, int]:
    batch = x.shape[0]  # len(x) is a Python function of torch's
    return batch, x.numel() // batch


def _scales(x: Tensor) -> tuple[float, float, int]:
    """share, power and the number of threads."""
    return *split(x.numel()), torch.get_num_threads()
