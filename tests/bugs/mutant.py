"""What a bug is that is put in on purpose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """old, once in file, becomes new; then at least one case of every one of `tests` must fail."""

    name: str
    trap: str
    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
