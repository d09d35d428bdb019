"""Compiling the C++ and CUDA kernels: no torch headers, no build system, one shared library a source.

A library is named by a hash of all that it is made of (source, headers, flags, compiler), written beside its final
place and renamed, so that no process loads half of one; a lock keeps several from compiling the same one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

TIMEOUT = 300
"""Seconds that a compiler may take."""


class Unavailable(RuntimeError):
    """The kernels cannot be built or loaded here."""


def built(command: Sequence[str], source: Path, headers: Iterable[Path] = ()) -> Path:
    """The library that `command SOURCE -o LIBRARY` makes, from the cache if this machine has made it before.

    command: the compiler and its flags.  headers: what the source may include of ours.
    Raises Unavailable with the compiler's last words if it cannot be made.
    """
    try:
        path = cache_folder() / f"{source.stem}-{_digest(command, [source, *headers])}.so"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.is_file():
                    _compile([*command, str(source)], path)
    except OSError as error:
        raise Unavailable(f"{source.name} was not compiled: {error}; $FEWSTEP_CACHE names another folder") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took more than {TIMEOUT} s over {source.name}") from error
    return path


def loaded(path: Path) -> ctypes.CDLL:
    """A library in this process.  Raises Unavailable, with the remedy, if it does not load."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} does not load: {error}; delete it to compile it anew") from error


def cache_folder() -> Path:
    """Where libraries are kept: $FEWSTEP_CACHE or ~/.cache/fewstep, below kernels."""
    return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep") / "kernels"


def _digest(command: Sequence[str], files: Iterable[Path]) -> str:
    asked = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    parts = [asked.stdout, *command, *(path.read_text(encoding="utf-8") for path in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".so")
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", temporary], capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            raise Unavailable(f"{command[0]} failed:\n{done.stderr[-2000:]}")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that ask for this lock; it goes with the process that holds it."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
