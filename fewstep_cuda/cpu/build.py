"""Compiling the C++ kernels: no torch headers, no build system, one shared library a source.

A library is named by a hash of all that it is made of (source, headers, flags, compiler), written beside its final
place and renamed, so that no process loads half of one; a lock keeps several from compiling the same one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
VECTOR = {"AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
"""By what torch read from the processor (cpuid); others get the platform's baseline."""
TIMEOUT = 300
"""Seconds that a compiler may take."""


class Unavailable(RuntimeError):
    """The kernels cannot be built or loaded here."""


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
    flags = (*FLAGS, *VECTOR.get(torch.backends.cpu.get_cpu_capability(), ()))
    path = cache_folder() / f"{name}-{_digest(cxx, flags, name)}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.is_file():
                _compile([cxx, *flags, str(HERE / f"{name}.cpp")], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} does not load: {error}; delete it to compile it anew") from error


@cache
def failure(name: str) -> str:
    """Why `library` has nothing for this name, asked once; "" if it has."""
    try:
        library(name)
    except Unavailable as error:
        return str(error)
    return ""


def cache_folder() -> Path:
    """Where libraries are kept: $FEWSTEP_CACHE or ~/.cache/fewstep, below kernels."""
    return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep") / "kernels"


def _digest(cxx: str, flags: tuple[str, ...], name: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False).stdout
    parts = [version, *flags, *(path.read_text(encoding="utf-8") for path in [HERE / f"{name}.cpp", *headers()])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def headers() -> list[Path]:
    """What the sources may include of ours."""
    return sorted(HERE.glob("*.h"))


def _compile(command: list[str], path: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".so")
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", temporary], capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            raise Unavailable(f"{command[0]} failed:\n{done.stderr[-2000:]}")
        os.replace(temporary, path)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took more than {TIMEOUT} s") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that ask for this lock; it goes with the process that holds it."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
