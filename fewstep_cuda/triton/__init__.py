"""Triton kernels for NVIDIA GPUs.  TRITON_INTERPRET=1 runs them on the CPU, slowly, for tests."""

from __future__ import annotations

import importlib.util

import torch

from fewstep_cuda.dispatch import interpreted


def status() -> str:
    """ "ok", or why Triton's kernels cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux)"
    return "ok" if interpreted() or torch.cuda.is_available() else "no CUDA device"
