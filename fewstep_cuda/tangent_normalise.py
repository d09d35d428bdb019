"""A tangent bounded sample by sample: contract and eager reference."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from fewstep_cuda import dispatch
from fewstep_cuda.contract import check, check_positive, like, opaque, wide

Norm = Literal["sum", "mean"]
"""|g|: the root of the sum of squares (the paper's), or of their mean."""


@opaque
def tangent_normalise(
    g: Tensor, c: float = 0.1, *, norm: Norm = "sum", backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """g / (|g| + c), sample by sample, and |g|     [sCM, arXiv:2410.11081, section 4.2: tangent normalisation]

    g: [B, ...], any float dtype, widened to at least float32.  Returns g's shape and [B], without a graph.  A sample
    with a non-finite value is never repaired: where |g| is infinite both are NaN, not a silent zero.
    Raises ValueError for wrong shapes, dtypes, norms or backends, RuntimeError under forward-mode AD.
    """
    check("tangent_normalise", {"g": g})
    check_positive("c", c, "a tangent of zero would be divided by zero")
    if norm not in get_args(Norm):
        raise ValueError(f"norm {norm!r} is not known; allowed: {', '.join(get_args(Norm))}")
    return dispatch.kernel("tangent_normalise", [g], backend)(g, c, norm)


def reference(g: Tensor, c: float, norm: Norm) -> tuple[Tensor, Tensor]:
    """The specification of `tangent_normalise`, in plain torch."""
    g = wide(g)
    square = g.flatten(1).square()
    size = (square.sum(1) if norm == "sum" else square.mean(1)).sqrt()
    size = size + 0 * size  # infinite -> NaN
    return g / like(size + c, g), size
