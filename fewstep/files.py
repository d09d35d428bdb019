"""Files that a kill leaves whole: the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file atomically: a kill leaves the old one or the new one.

    shared: several processes may write it at once.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp" if shared else ".tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """fsync a file or folder; folders cannot be opened on Windows, where the rename is durable by itself."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
