"""Plain CUDA kernels, without torch's headers: compiled by nvcc on first use, loaded by ctypes."""

from __future__ import annotations

import shutil
from functools import cache

import torch


@cache
def status() -> str:
    """ "ok", or why the CUDA kernels cannot run here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "ok" if shutil.which("nvcc") else "no nvcc; auto takes the Triton kernels"
