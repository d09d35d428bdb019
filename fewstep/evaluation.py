"""How good a run's student is: teacher, untrained student and student measured by one protocol, in one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fewstep.api import load_student, untrained_student
from fewstep.environment import describe
from fewstep.sampling import cycled, sample_teacher


@dataclass(frozen=True)
class Row:
    """One measured model: sampling steps, number of samples, first seed, figures; stored = from the teacher's card."""

    model: str
    steps: int
    n: int
    seed: int
    figures: dict[str, float]
    guidance: float | None = None
    stored: bool = False


def evaluate_run(
    run: Path,
    *,
    n: int = 10_000,
    seed: int = 50_000_000,
    which: Literal["best", "last"] = "best",
    recompute_teacher: bool = False,
    console: Console | None = None,
) -> str:
    """Measure and write eval.md, eval.csv and eval.json into the run folder.  Returns the markdown table.

    Rows: the teacher (its stored figures unless `recompute_teacher`), the student before training, the student, each
    at the student's own step count.  Raises ValueError if this teacher has no way to be judged.
    """
    student = load_student(run, which=which)
    teacher, steps = student.teacher, student.sampler.num_steps
    judge = teacher.evaluation
    if judge is None:
        raise ValueError(f"teacher {teacher.card.name!r} brings no evaluation; look at `fewstep sample {run}`")
    prompts = cycled(teacher.prompts, 0, n)

    def measured(name: str, steps: int, make: Callable[..., Tensor], guidance: float | None = None) -> Row:
        with _bar(console) as bar:
            task = bar.add_task(f"{name}, {steps} step{'s' * (steps > 1)}", total=n)
            images = make(n, seed=seed, num_steps=steps, progress=lambda done: bar.advance(task, done))
        return Row(name, steps, n, seed, judge.measure(images, prompts), guidance)

    rows = [_stored(row) for row in _best_stored(judge.rows)] if not recompute_teacher else []
    if not rows:

        def of_teacher(n: int, **options: Any) -> Tensor:
            return sample_teacher(teacher, n, **options)

        rows = [measured("teacher", 50, of_teacher, teacher.guidance)]
    rows.append(measured("untrained student", steps, untrained_student(run, teacher=teacher).sample))
    rows.append(measured("student", steps, student.sample))
    _write(run, rows, judge.protocol_hash)
    return markdown(rows)


def markdown(rows: list[Row]) -> str:
    """The rows as a markdown table; figures that a row lacks are "-"."""
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    head = ["model", "steps", "CFG", "samples", *(name.upper() if name == "fmd" else name for name in names)]
    body = [
        [
            row.model + (" (stored)" if row.stored else ""),
            str(row.steps),
            "-" if row.guidance is None else f"{row.guidance:g}",
            str(row.n),
            *(f"{row.figures[name]:.4g}" if name in row.figures else "-" for name in names),
        ]
        for row in rows
    ]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _write(run: Path, rows: list[Row], protocol_hash: str) -> None:
    (run / "eval.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    record = {
        "rows": [asdict(row) for row in rows],
        "protocol_hash": protocol_hash,
        "environment": describe(),
        "training": json.loads((run / "environment.json").read_text(encoding="utf-8")),
    }
    (run / "eval.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    writer.writerow(["model", "steps", "cfg", "n", "seed", "stored", *names])
    for row in rows:
        figures = [row.figures.get(name, "") for name in names]
        writer.writerow([row.model, row.steps, row.guidance or "", row.n, row.seed, int(row.stored), *figures])
    (run / "eval.csv").write_text(table.getvalue(), encoding="utf-8")


def _best_stored(rows: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """The stored row with the most samples at the most steps; nothing if none is stored."""
    if not rows:
        return []
    steps = max(row["steps"] for row in rows)
    most = max(row["n"] for row in rows if row["steps"] == steps)
    return [min((r for r in rows if r["steps"] == steps and r["n"] == most), key=lambda r: r["fmd"])]


def _stored(row: dict[str, Any]) -> Row:
    figures = {name: row[name] for name in ("fmd", "agreement") if name in row}
    return Row("teacher", row["steps"], row["n"], row["seed"], figures, row["cfg"], stored=True)


def _bar(console: Console | None) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns, console=console or Console(stderr=True), disable=console is not None and not console.is_terminal
    )
