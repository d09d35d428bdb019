"""Fused operators behind plain contracts. They know tensors, not diffusion, and import nothing but torch."""

from fewstep_cuda.attention_jvp import attention, attention_jvp
from fewstep_cuda.dispatch import backends, operators
from fewstep_cuda.score_difference import score_difference, score_difference_from_raw

__all__ = ["attention", "attention_jvp", "backends", "operators", "score_difference", "score_difference_from_raw"]
