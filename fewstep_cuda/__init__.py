"""Fused operators behind plain contracts. They know tensors, not diffusion, and import nothing but torch."""

from fewstep_cuda.dispatch import backends, operators
from fewstep_cuda.norm_jvp import (
    adaln,
    adaln_jvp,
    gated_residual,
    gated_residual_jvp,
    group_norm_silu,
    group_norm_silu_jvp,
    linear_jvp,
    qk_norm_rope,
    qk_norm_rope_jvp,
)
from fewstep_cuda.score_difference import score_difference, score_difference_from_raw

__all__ = [
    "adaln",
    "adaln_jvp",
    "backends",
    "gated_residual",
    "gated_residual_jvp",
    "group_norm_silu",
    "group_norm_silu_jvp",
    "linear_jvp",
    "operators",
    "qk_norm_rope",
    "qk_norm_rope_jvp",
    "score_difference",
    "score_difference_from_raw",
]
