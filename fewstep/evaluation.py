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
from torch import Tensor

from fewstep.bar import bar
from fewstep.environment import describe, device_of
from fewstep.files import write_text
from fewstep.metrics.names import cell, title
from fewstep.metrics.suite import over_seeds
from fewstep.processes import ALONE, Processes
from fewstep.sampling import Student, at_a_time, check_count, cycled, sample_teacher
from fewstep.students import load_student, untrained_student
from fewstep.teachers.base import Evaluation


@dataclass(frozen=True)
class Row:
    """One measured model: sampling steps, number of samples, first seed, figures; stored = from the teacher's card.

    seeds: how many sets of n samples the figures are means over.  spread: their standard deviation, if more than one.
    """

    model: str
    steps: int
    n: int
    seed: int
    figures: dict[str, float]
    guidance: float | None = None
    stored: bool = False
    seeds: int = 1
    spread: dict[str, float] | None = None


def evaluate_run(
    run: Path,
    *,
    n: int = 10_000,
    seed: int = 50_000_000,
    seeds: int = 1,
    which: Literal["best", "last"] = "best",
    recompute_teacher: bool = False,
    untrained: bool = True,
    device: str = "auto",
    batch_size: int | None = None,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> str:
    """Measure and write eval.md, eval.csv and eval.json into the run folder.  Returns the markdown table.

    Rows: the teacher (its stored figures unless `recompute_teacher`), the student before training (unless told not to,
    which saves half of the time), the student, each at the student's own step count.  seeds: sets of n samples,
    numbered on from each other; more than one gives means and deviations.  device, batch_size: where images are made,
    and how many at a time, by default by their size.  processes: which make the images together; the main one measures
    and writes.
    Raises ValueError if this teacher has no way to be judged.
    """
    console = processes.console(console)
    student = load_student(run, which=which, device=device)
    teacher, steps = student.teacher, student.sampler.num_steps
    judge = teacher.evaluation
    if judge is None:
        raise ValueError(f"teacher {teacher.card.name!r} brings no evaluation; look at `fewstep sample {run}`")
    check_count("n", n)
    check_count("seeds", seeds)
    prompts, measure = cycled(teacher.prompts, 0, n), judge.full or judge.measure
    batch = at_a_time(teacher.shape) if batch_size is None else batch_size
    check_count("batch_size", batch)

    def measured(name: str, steps: int, make: Callable[..., Tensor], guidance: float | None = None) -> Row:
        figures = []
        what, total = f"{name}, {steps} step{'s' * (steps > 1)}", len(processes.share(n, batch)) * seeds
        with bar(what, total, console) as done:
            for first in range(seed, seed + n * seeds, n):

                def images(own: range, first: int = first) -> tuple[Tensor]:
                    own_prompts = prompts[own.start : own.stop]
                    options = {"num_steps": steps, "batch_size": batch, "progress": done}
                    return (make(len(own), own_prompts, first + own.start, **options),)

                figures.append(processes.on_main(measure, *processes.gather(n, batch, images), prompts))
        mean, spread = over_seeds(figures) if seeds > 1 else (figures[0], None)
        return Row(name, steps, n, seed, mean, guidance, seeds=seeds, spread=spread)

    best = None if recompute_teacher else _best_stored(judge, teacher.guidance, console)
    if best is not None:
        rows = [_stored(best)]
    else:

        def of_teacher(*asked: Any, **options: Any) -> Tensor:
            return sample_teacher(teacher.to(device_of(device)), *asked, **options)

        rows = [measured("teacher", 50, of_teacher, teacher.guidance)]
    if untrained:
        before = untrained_student(run, teacher=teacher, device=device)
        rows.append(measured("untrained student", steps, before.sample))
    rows.append(measured("student", steps, student.sample))
    if processes.main:
        _write(run, rows, student, which, judge.protocol_hash)
    return markdown(rows)


def markdown(rows: list[Row]) -> str:
    """The rows as a markdown table, with deviations over seeds where there are; figures that a row lacks are "-"."""
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    head = ["model", "steps", "CFG", "samples", *(title(name) for name in names)]
    body = [
        [
            row.model + (" (stored)" if row.stored else ""),
            str(row.steps),
            "-" if row.guidance is None else f"{row.guidance:g}",
            str(row.n) if row.seeds == 1 else f"{row.seeds} x {row.n}",
            *(cell(name, row.figures, row.spread) for name in names),
        ]
        for row in rows
    ]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _write(run: Path, rows: list[Row], student: Student, which: str, protocol_hash: str) -> None:
    (run / "eval.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    record = {
        "rows": [asdict(row) for row in rows],
        "which": which,
        "iteration": student.iteration,
        "protocol_hash": protocol_hash,
        "environment": describe(),
        "training": json.loads((run / "environment.json").read_text(encoding="utf-8")),
    }
    write_text(run / "eval.json", json.dumps(record, indent=1) + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    writer.writerow(["model", "steps", "cfg", "n", "seed", "seeds", "stored", *names])
    for row in rows:
        figures = [row.figures.get(name, "") for name in names]
        told = [row.model, row.steps, row.guidance or "", row.n, row.seed, row.seeds, int(row.stored)]
        writer.writerow([*told, *figures])
    (run / "eval.csv").write_text(table.getvalue(), encoding="utf-8")


def _best_stored(judge: Evaluation, guidance: float, console: Console) -> dict[str, Any] | None:
    """The stored row at the teacher's guidance of the most steps and then the most samples, if there is one.

    Figures of another protocol are none: they do not compare with those beside them.
    """
    if judge.rows and judge.rows_protocol != judge.protocol_hash:
        console.print(
            f"the teacher's stored rows are of protocol {judge.rows_protocol}, this evaluation is of "
            f"{judge.protocol_hash}: measuring the teacher anew",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return None
    rows = [row for row in judge.rows if row["cfg"] == guidance]
    return max(rows, key=lambda row: (row["steps"], row["n"]), default=None)


def _stored(row: dict[str, Any]) -> Row:
    figures = {name: value for name, value in row.items() if name not in ("steps", "cfg", "n", "seed", "seconds")}
    return Row("teacher", row["steps"], row["n"], row["seed"], figures, row["cfg"], stored=True)
