"""The C++ kernels of this folder: which compiler makes them, with which flags, and why it may not."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from functools import cache
from pathlib import Path

import torch

from fewstep_cuda.build import Unavailable, built, loaded

HERE = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
VECTOR = {"AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
"""By what torch read from the processor (cpuid); others get the platform's baseline."""


@cache
def status() -> str:
    """ "ok", or why there can be no C++ kernels.  Compiles nothing: a compiler that fails is told by `library`."""
    if platform.system() not in ("Linux", "Darwin"):
        return f"the C++ kernels are not written for {platform.system()}"
    return "ok" if compiler() else "no C++ compiler (c++, g++ or clang++; $CXX names another)"


@cache
def compiler() -> str | None:
    """The C++ compiler's path; None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


@cache
def library(name: str) -> ctypes.CDLL:
    """The kernels of `fewstep_cuda/cpu/NAME.cpp`, compiled if this machine has not yet.

    Raises Unavailable with the compiler's last words if they cannot be made.
    """
    cxx = compiler()
    if cxx is None or status() != "ok":
        raise Unavailable(status())
    flags = VECTOR.get(torch.backends.cpu.get_cpu_capability(), ())
    return loaded(built([cxx, *FLAGS, *flags], HERE / f"{name}.cpp", headers()))


@cache
def failure(name: str) -> str:
    """Why `library` has nothing for this name, asked once; "" if it has."""
    try:
        library(name)
    except Unavailable as error:
        return str(error)
    return ""


def headers() -> list[Path]:
    """What the sources may include of ours."""
    return sorted(HERE.glob("*.h"))
