"""Lines of text and objects of JSON, each mistake named by its file and place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FIELDS = ("text", "prompt", "caption")
"""Where a row of JSONL or parquet holds its text: in the first of these that it has."""


def lines_of(file: Path) -> Iterator[str]:
    """The lines between line feeds.  Raises ValueError that names the first byte that is not UTF-8."""
    at = 0
    with file.open("rb") as opened:
        for line in opened:
            yield decoded(line, file, at)
            at += len(line)


def decoded(data: bytes, where: Path | str, at: int = 0) -> str:
    """UTF-8 from byte `at` of a file.  Raises ValueError that names the first byte which is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text ({error.reason} at byte {at + error.start}); save it as UTF-8"
        ) from error


def json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object, after words for where it is; blank lines are skipped.  Raises ValueError as `parsed` does."""
    for number, line in enumerate(lines_of(file), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, parsed(line, where)


def parsed(text: str, where: str) -> dict[str, Any]:
    """An object of JSON; an empty one in the place of other values.  Raises ValueError for what is not JSON."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    return row if isinstance(row, dict) else {}


def text_of(row: Mapping[str, Any], where: str) -> str:
    """The text of an object.  Raises ValueError if it holds none."""
    found = next((row[name] for name in FIELDS if name in row), None)
    if not isinstance(found, str):
        raise ValueError(f'{where}: it must be an object with "text" or "prompt", a string: {{"text": "a red boot"}}')
    return found
