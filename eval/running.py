"""What the benchmarks share: a run made by the commands that a user would type, and its result as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from fewstep.files import write_text

ROOT = Path(__file__).parents[1]
SEEDS, SAMPLES = 3, 10_000
"""Sets of samples of a reported figure, and their size."""


def made(start: list[str], folder: Path, extra: Sequence[str] = ()) -> tuple[int, float]:
    """Train (or go on) and evaluate, in child processes that log beside the folder.

    start: the words of `fewstep distill` but for --out.  extra: words of `fewstep eval`.
    Returns the first failure's code, and the processor's seconds that training took, with what it resumed.
    """
    resumed = ["--resume"] if (folder / "config.yaml").is_file() else []
    judge = ["eval", str(folder), "--seeds", str(SEEDS), "--n", str(SAMPLES), "--no-untrained", *extra]
    folder.mkdir(parents=True, exist_ok=True)
    spent = folder.parent / f"{folder.name}.seconds"
    with (folder.parent / f"{folder.name}.log").open("a", encoding="utf-8") as log:
        code, seconds = child([*start, "--out", str(folder), *resumed], log)
        seconds += float(spent.read_text(encoding="utf-8")) if spent.is_file() else 0.0
        spent.write_text(f"{seconds}\n", encoding="utf-8")
        if not code and not (folder / "eval.json").is_file():
            code = child(judge, log)[0]
    return code, seconds


def child(words: Sequence[str], log: IO[str]) -> tuple[int, float]:
    """Run `fewstep WORDS`.  Returns its exit code and the seconds of processor time that it took, all threads together:
    unlike the wall's, they say little about what else the machine did."""
    command = [sys.executable, "-m", "fewstep.cli", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def result(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """What is kept of a finished run: how it was made, on what, and what came out."""
    judged = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    rows = {row["model"]: row for row in judged["rows"]}
    newest = sorted((folder / "checkpoints").glob("*/state.json"))[-1]
    seconds = json.loads(newest.read_text(encoding="utf-8"))["progress"]["seconds"]
    return {
        "command": " ".join(["fewstep", *command]),
        "iteration": judged["iteration"],
        "student": rows["student"],
        "minutes": round(seconds / 60, 1),
        "protocol_hash": judged["protocol_hash"],
        "training": judged["training"],
    }


def store(path: Path, found: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")


def teachers_best(teacher: str) -> dict[str, Any]:
    """The stored row of an embedded teacher of most steps and samples that has the least FMD."""
    path = ROOT / "fewstep" / "teachers" / "weights" / teacher / "teacher.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return max(rows, key=lambda row: (row["steps"], row["n"], -row["fmd"]))
