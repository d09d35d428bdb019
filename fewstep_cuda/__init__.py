"""Fused operators behind plain contracts. They know tensors, not diffusion, and import nothing but torch."""

from fewstep_cuda.attention_jvp import attention, attention_jvp
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
from fewstep_cuda.score_difference_two import score_difference_two
from fewstep_cuda.score_identity import score_identity
from fewstep_cuda.tangent_normalise import tangent_normalise

__all__ = [
    "adaln",
    "adaln_jvp",
    "attention",
    "attention_jvp",
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
    "score_difference_two",
    "score_identity",
    "tangent_normalise",
]
