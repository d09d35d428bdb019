"""What a run's folder says of the run, read without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fewstep.advice import ranking

QUIET = 180.0
"""Seconds after its last figures that a run is taken for one that goes on."""


@dataclass(frozen=True)
class Record:
    """One run.

    config, environment: as it wrote them.  rows: those of metrics.jsonl, in order.  previews: the grids, by iteration.
    evaluation: eval.json, if `fewstep eval` was run.  age: seconds since the last figure.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    previews: dict[int, Path]
    evaluation: dict[str, Any] | None
    age: float

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    @property
    def title(self) -> str:
        """Teacher, method and steps."""
        method = self.config["method"]
        steps = method.get("num_steps", 1)
        return f"{self.config['teacher']['name']} by {method['name']}, {steps} step{'s' * (steps != 1)}"

    @property
    def iteration(self) -> int:
        """How far it is."""
        return self.rows[-1]["iteration"] if self.rows else 0

    @property
    def iterations(self) -> int:
        """How far it is to go."""
        return int(self.config["train"]["iterations"])

    @property
    def status(self) -> str:
        """Finished, running or stopped, in words."""
        if self.iteration >= self.iterations:
            return f"finished: {self.iterations} iterations in {_clock(self.seconds)}"
        state = "running" if self.age < QUIET else "stopped; --resume goes on"
        return f"{state}: iteration {self.iteration} of {self.iterations} after {_clock(self.seconds)}"

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return float(self.rows[-1].get("seconds", 0.0)) if self.rows else 0.0

    @cached_property
    def series(self) -> dict[str, tuple[list[int], list[float]]]:
        """Name of a figure -> its iterations and values, in the order of their first appearance."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for row in self.rows:
            for name, value in row.items():
                if name not in ("iteration", "seconds") and isinstance(value, int | float):
                    iterations, values = found.setdefault(name, ([], []))
                    iterations.append(row["iteration"])
                    values.append(float(value))
        return found

    @cached_property
    def metric(self) -> str | None:
        """The figure that ranks checkpoints."""
        return ranking(self.rows)

    @property
    def best(self) -> tuple[int, float] | None:
        """Iteration and figure of the best evaluation so far."""
        if self.metric is None:
            return None
        iterations, values = self.series[self.metric]
        value, iteration = min(zip(values, iterations))
        return iteration, value


def read(folder: Path) -> Record:
    """Raises ValueError for a folder that is no run's, or whose files do not parse."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise ValueError(
            f"{folder} is no run's folder: it has no config.yaml; `fewstep list runs` shows those there are"
        )
    metrics = folder / "metrics.jsonl"
    try:
        told = yaml.safe_load(config.read_text(encoding="utf-8"))
        _ = told["teacher"]["name"], told["method"]["name"], int(told["train"]["iterations"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config} is not the configuration of a run: {type(error).__name__} {error}") from error
    return Record(
        folder,
        told,
        _json(folder / "environment.json") or {},
        tuple(_lines(metrics)),
        {int(path.stem): path for path in sorted((folder / "previews").glob("*.png")) if path.stem.isdigit()},
        _json(folder / "eval.json"),
        time.time() - metrics.stat().st_mtime if metrics.is_file() else float("inf"),
    )


def read_all(folders: Sequence[Path]) -> list[Record]:
    """Several, told apart by name.  Raises ValueError as `read`, and for a folder that is named twice."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is named twice; name each once")
    return [read(folder) for folder in folders]


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not parse: {error}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a run that goes on may be writing the last one."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
