"""DMD2 on both embedded teachers: with and without its GAN, in 1, 2 and 4 steps, as copies and as LoRA roles.

    python -m eval.benchmark [NAME ...] [--out runs/benchmark] [--jobs 2]   train, evaluate, measure what is missing
    python -m eval.benchmark --table                                        print the table of the results so far

A run's name says what it is: fashion-unet-copies-gan-4.  Each is the commands that a user would type; it is resumed
if it was stopped and left alone once its result lies in eval/results/benchmark.  A change of a recipe does not delete
results: delete the files that it makes stale.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import running
from eval.memory import measure
from eval.running import ROOT
from fewstep.bar import bar

RESULTS = ROOT / "eval" / "results" / "benchmark"
COLUMNS = {"fmd": "FMD", "agreement": "agreement", "precision": "precision", "recall": "recall", "clip_score": "CLIP"}


@dataclass(frozen=True)
class Run:
    """One line of the table."""

    teacher: str
    sharing: str
    gan: bool
    num_steps: int

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        return f"{self.teacher}-{self.sharing}-{'gan' if self.gan else 'plain'}-{self.num_steps}"

    @property
    def recipe(self) -> str:
        """Relative to the project's root."""
        return f"configs/{self.teacher.replace('-', '_')}_dmd2_gan.yaml"

    @property
    def sets(self) -> list[str]:
        """What differs from the recipe, which is one step with copies and the GAN."""
        sets = [f"method.num_steps={self.num_steps}", f"train.sharing={self.sharing}"]
        if not self.gan:
            sets.append("method.gan_weight=0")
        if self.sharing == "lora":  # adapters of small rank move further per unit of rate than whole matrices
            sets += [f"train.{player}.lr={LORA_RATE}" for player in ("generator", "critic")]
        return sets


LORA_RATE = 1e-3
RUNS = tuple(
    Run(*made)
    for made in itertools.product(("fashion-dit", "fashion-unet"), ("copies", "lora"), (False, True), (1, 2, 4))
)


def main() -> int:
    """Make the missing results, or print the table; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {run.name: run for run in RUNS}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the processors")
    parser.add_argument("--table", action="store_true", help="print the table and do nothing else")
    options = parser.parse_args()
    if unknown := set(options.names) - names.keys():
        parser.error(f"not known: {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
    if options.table:
        print(table())
        return 0
    wanted = [run for run in map(names.__getitem__, options.names or names) if not result_of(run).is_file()]
    # For the children.  More threads than processors would wait for each other, many times longer than they work.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    failed = []
    with ThreadPoolExecutor(options.jobs) as pool, bar("benchmark", len(wanted), lines=True) as done:
        for run, code in zip(wanted, pool.map(lambda run: make(run, options.out / run.name), wanted)):
            done(1)
            if code:
                failed.append(run.name)
    if failed:
        print(f"failed: {', '.join(failed)}; see their logs in {options.out}", file=sys.stderr)
    return bool(failed)


def make(run: Run, folder: Path) -> int:
    """Train, evaluate and measure a run in child processes, and store its result.  Returns the first failure's code."""
    start = ["distill", "--config", run.recipe, *(word for value in run.sets for word in ("--set", value))]
    code, seconds = running.made(start, folder)
    if code:
        return code
    costs: dict[str, Any] = {"cpu_minutes": round(seconds / 60, 1)}
    costs["memory_mib"] = {name: round(value) for name, value in measure(ROOT / run.recipe, run.sets).items()}
    running.store(result_of(run), {"run": vars(run)} | running.result(start, folder) | costs)
    return 0


def result_of(run: Run) -> Path:
    """Where a run's result lies."""
    return RESULTS / f"{run.name}.json"


def table() -> str:
    """The results so far as a markdown table, each teacher's best stored figures above its students."""
    costs = ["minutes", "CPU minutes", "allocated MiB", "VmHWM MiB"]
    head = ["teacher", "weights", "GAN", "steps", *COLUMNS.values(), *costs]
    lines, teachers = [head, ["---"] * len(head)], set()
    for found in (json.loads(result_of(run).read_text("utf-8")) for run in RUNS if result_of(run).is_file()):
        run = Run(**found["run"])
        if run.teacher not in teachers:
            teachers.add(run.teacher)
            row = running.teachers_best(run.teacher)
            lines.append([f"{run.teacher}, CFG {row['cfg']:g}", "-", "-", str(row["steps"]), *_figures(row), *"----"])
        spent = [
            *(f"{found[name]:.1f}" for name in ("minutes", "cpu_minutes")),
            *map(str, found["memory_mib"].values()),
        ]
        told = ["", run.sharing, "yes" if run.gan else "no", str(run.num_steps)]
        lines.append([*told, *_figures(found["student"]["figures"], found["student"]["spread"]), *spent])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figures(figures: dict[str, float], spread: dict[str, float] | None = None) -> list[str]:
    cells = [f"{figures[name]:.3f}" if name in figures else "-" for name in COLUMNS]
    if spread:
        cells[0] += f" ± {spread['fmd']:.3f}"
    return cells


if __name__ == "__main__":
    sys.exit(main())
