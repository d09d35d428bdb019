"""The CUDA kernels of this folder: where nvcc is, with which flags it is called, and why it may not be."""

from __future__ import annotations

import ctypes
import os
import shutil
from functools import cache
from pathlib import Path

import torch

from fewstep_cuda.build import Unavailable, built, loaded
from fewstep_cuda.cpu.build import headers

HERE = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")


@cache
def status() -> str:
    """ "ok", or why the CUDA kernels cannot run here.  Compiles nothing: an nvcc that fails is told by `library`."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "ok" if compiler() else "no nvcc (on PATH, in $CUDA_HOME or /usr/local/cuda); auto takes the Triton kernels"


@cache
def compiler() -> str | None:
    """nvcc's path; None if there is none."""
    roots = [Path(root) for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    return next(filter(None, map(shutil.which, ["nvcc", *(str(root / "bin" / "nvcc") for root in roots)])), None)


def command(*architectures: int) -> list[str]:
    """nvcc and its flags for compute capabilities, as 90 for 9.0.  Raises Unavailable where there is no nvcc."""
    nvcc = compiler()
    if nvcc is None:
        raise Unavailable(status())
    return [nvcc, *FLAGS, *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures)]


@cache
def library(name: str, architecture: int) -> ctypes.CDLL:
    """The kernels of `fewstep_cuda/cuda/NAME.cu` for a compute capability, compiled if this machine has not yet.

    Raises Unavailable with the compiler's last words if they cannot be made.
    """
    return loaded(built(command(architecture), HERE / f"{name}.cu", headers()))


@cache
def failure(name: str) -> str:
    """Why `library` has nothing for this name and this device, asked once; "" if it has."""
    if status() != "ok":
        return status()
    major, minor = torch.cuda.get_device_capability()
    try:
        library(name, 10 * major + minor)
    except Unavailable as error:
        return str(error)
    return ""
