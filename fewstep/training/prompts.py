"""Prompt files."""

from __future__ import annotations

from pathlib import Path


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """One prompt a line, UTF-8; blank lines are skipped.

    Raises FileNotFoundError if there is no such file and ValueError if it holds no prompt or is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}; it holds one prompt per line, UTF-8")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one per line")
    return prompts
