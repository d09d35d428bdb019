"""Weights of published extractors: where they lie on this machine, and whether they are the published ones.

Nothing is downloaded. They are looked for in $FEWSTEP_WEIGHTS, then in $TORCH_HOME/hub/checkpoints (by default
~/.cache/torch/hub/checkpoints).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fewstep.metrics.features import file_sha256


def places() -> list[Path]:
    """Folders that are looked into, in order."""
    own = os.environ.get("FEWSTEP_WEIGHTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
    hub = Path(os.environ.get("TORCH_HOME") or cache) / "hub" / "checkpoints"
    return [*([Path(own)] if own else []), hub]


def find(names: Sequence[str], what: str) -> Path:
    """The first of these files or folders that is there.  Raises FileNotFoundError that says where it may lie."""
    for place in places():
        for name in names:
            if (place / name).exists():
                return place / name
    raise FileNotFoundError(
        f"no weights of {what}: none of {', '.join(names)} is in {' or '.join(map(str, places()))}. Put it there, set "
        "FEWSTEP_WEIGHTS to its folder, or give --weights; nothing is downloaded."
    )


def check_sha256(text: str) -> None:
    """Raises ValueError for what is no SHA-256, nor so much of one that no other file begins like it by chance."""
    if not re.fullmatch("[0-9a-f]{8,64}", text):
        raise ValueError(
            f"{text!r} is no SHA-256: give the 64 hexadecimal digits that the weights' publisher gives, or the first 8 "
            "or more, in small letters; leave it out where none is known"
        )


def begins(digest: str, known: Sequence[str]) -> bool:
    """Whether a file's SHA-256 begins as one of `known`, none of which may be shorter than `check_sha256` has it."""
    for text in known:
        check_sha256(text)
    return digest.startswith(tuple(known))


def verify(file: Path, known: Sequence[str], *, allow_unverified: bool) -> tuple[str, bool]:
    """SHA-256 of a file, and whether it begins as one of `known`, which are whole or the beginnings of hashes.

    Raises FileNotFoundError if there is no such file, ValueError if it is not verified and that is not allowed, or for
    what is no hash.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}")
    digest = file_sha256(file)
    verified = begins(digest, known)
    if not verified and not allow_unverified:
        wanted = f"should begin with {' or '.join(known)}" if known else "is not known here"
        raise ValueError(
            f"{file} has the SHA-256 {digest}, which {wanted}: these may not be the published weights. Get the file "
            "again, give --sha256 as its publisher does, or allow it with --unverified: then its figures are named so."
        )
    return digest, verified
