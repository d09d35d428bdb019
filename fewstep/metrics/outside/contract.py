"""What an adapter is asked and what it must answer: one JSON object each way, every part of the answer checked."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONTRACT = 1
"""Version; an adapter echoes that of the request, and another one is refused."""
KEYS = {"contract", "metric", "scores", "figures", "weights", "package", "seconds"}
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Item:
    """A picture or video: its file, relative to the folder with `/` between; its prompt; which one of that prompt it
    is; and what else its benchmark says of it.
    """

    file: str
    prompt: str
    index: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What an adapter reads from its standard input.

    metric: its name, which the answer repeats.  folder: where the items' files are.  device: auto, cpu or cuda.
    options: of the adapter, texts.
    """

    metric: str
    folder: Path
    items: Sequence[Item]
    device: str = "auto"
    options: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As it is sent."""
        told = {"contract": CONTRACT, "metric": self.metric, "folder": str(self.folder.resolve())}
        told |= {"items": [asdict(item) for item in self.items], "device": self.device, "options": dict(self.options)}
        return json.dumps(told)


@dataclass(frozen=True)
class Answer:
    """What an adapter wrote to its standard output.

    scores: of every file that was asked for, a finite number, or some by name (perhaps none, where a file counts for
    none of a benchmark's parts).  figures: of the whole folder, where the package makes them itself and not as a mean
    of the scores.  weights: SHA-256 by file, as far as known.  package: name and version.  seconds: of work.
    """

    scores: Mapping[str, float | Mapping[str, float]]
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None


def read_answer(text: str, request: Request) -> Answer:
    """Raises ValueError, with the first thing that is wrong, for anything but a whole answer to this request."""
    found = _parsed(text)
    if unknown := sorted(set(found) - KEYS):
        raise ValueError(f"its answer has the unknown key {unknown[0]!r}; allowed: {', '.join(sorted(KEYS))}")
    if missing := sorted({"contract", "metric", "scores", "seconds"} - set(found)):
        raise ValueError(f"its answer lacks {', '.join(missing)}")
    if found["contract"] != CONTRACT:
        raise ValueError(f"its answer is of contract {found['contract']!r}, and this is contract {CONTRACT}")
    if found["metric"] != request.metric:
        raise ValueError(f"its answer is of the metric {found['metric']!r}, and {request.metric!r} was asked for")
    scores, asked = _object(found["scores"], "scores"), {item.file for item in request.items}
    if unknown := sorted(set(scores) - asked):
        raise ValueError(f"it scored {unknown[0]!r}, which it was not asked for")
    if missing := sorted(asked - set(scores)):
        raise ValueError(f"it scored {len(scores)} of {len(asked)} files; {missing[0]!r} is missing")
    package = found.get("package")
    if package is not None and not isinstance(package, str):
        raise ValueError(f"its package is {package!r}; a text such as 'hpsv2 1.2.0' or null is wanted")
    return Answer(
        scores={file: _score(value, f"the score of {file!r}") for file, value in scores.items()},
        seconds=_number(found["seconds"], "seconds"),
        figures=_numbers(found.get("figures") or {}, "figures"),
        weights=_hashes(found.get("weights") or {}),
        package=package,
    )


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        shown = " ".join(text.split())[:80] or "nothing"
        raise ValueError(
            f"its standard output is no JSON ({error}) but begins {shown!r}: only the answer may be written there, all "
            "else to standard error"
        ) from error
    return _object(found, "answer")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python's parser would keep the last value of a key that is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its answer has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its {what} is {type(value).__name__} and not a JSON object")
    return value


def _number(value: Any, what: str) -> float:
    """JSON as Python reads it knows NaN, Infinity and integers beyond any float; true is a number to Python."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:  # NaN compares with nothing
        raise ValueError(f"{what} is {value!r:.80}, and a finite number is wanted")
    return float(value)


def _numbers(value: Any, what: str) -> dict[str, float]:
    return {name: _number(number, f"{what}.{name}") for name, number in _object(value, what).items()}


def _score(value: Any, what: str) -> float | dict[str, float]:
    return _numbers(value, what) if isinstance(value, dict) else _number(value, what)


def _hashes(value: Any) -> dict[str, str]:
    for file, digest in _object(value, "weights").items():
        if not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise ValueError(f"the weights {file!r} have {digest!r}, and a SHA-256 in 64 small digits is wanted")
    return value
