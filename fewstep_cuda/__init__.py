"""Fused operators behind plain contracts. They know tensors, not diffusion, and import nothing but torch."""

from fewstep_cuda.dispatch import backends
from fewstep_cuda.score_difference import score_difference

__all__ = ["backends", "score_difference"]
