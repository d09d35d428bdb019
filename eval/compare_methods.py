"""Every method on the embedded teachers in equal time: train, choose, evaluate, one table.

    python -m eval.compare_methods [NAME ...] [--minutes 20]     train and evaluate what is missing (make compare)
    python -m eval.compare_methods --table                       print the table of the results
    python -m eval.compare_methods --grid                        draw the students, same noise

A method's training gets --minutes of this machine's wall time, evaluations during it left out: its iterations are
counted by the time that one takes on all cores, measured first.  What a method needs beforehand (pairs) is set-up and
timed apart.  --plan only measures, for all names: then nothing else may run.  Afterwards the iterations are fixed, and
beside other work a run takes longer but comes to the same; two at a time, on one core each, are done sooner.
Runs are the commands that a user would type, resumed if they were stopped.  Each result is a line in
eval/results/compare.jsonl; the newest line of a name counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from eval import running, speed
from eval.memory import measure as measure_memory
from eval.running import ROOT
from fewstep.bar import bar

RESULTS = ROOT / "eval" / "results" / "compare.jsonl"
GRID = ROOT / "eval" / "results" / "compare.png"
CHOICE = 2000
"""Samples on which the checkpoint is chosen, of other seeds than the reported ones."""
EVALUATIONS = 8
"""How often a run looks at its student."""
PAIRS = {"n": 2000, "num_steps": 25}
"""Set-up of a method that regresses on the teacher's samples."""
BLOCKS = 6
"""Of fashion-dit, for what a flow head costs."""
COLUMNS = {
    "fmd": "FMD",
    "fmd_test": "FMD to test",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "clip_score": "CLIP",
}


@dataclass(frozen=True)
class Run:
    """One line of the table: a recipe and what differs from it."""

    teacher: str
    method: str
    sets: tuple[str, ...] = ()
    seed: int = 0
    recipe_name: str = ""

    @property
    def plan(self) -> str:
        """Of its plan, which runs of other seeds share."""
        return f"{self.teacher}-{self.method}"

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        return f"{self.plan}-seed{self.seed}" if self.seed else self.plan

    @property
    def recipe(self) -> str:
        """Relative to the project's root."""
        return f"configs/{self.recipe_name or f'{self.teacher}_{self.method}'.replace('-', '_')}.yaml"


GAN = {"fashion-dit": "fashion_dit_dmd2_gan_long", "fashion-unet": "fashion_unet_dmd2_gan"}
PLAIN = ("dmd", "decoupled_dmd", "phased_dmd", "sid", "swiftbrush", "boot", "scm", "tbcm", "meanflow", "tmd")
BEST = ("phased_dmd", "tmd")
"""The two methods of the lowest FMD at seed 0, which are trained from other seeds too."""
RUNS = (
    Run("fashion-dit", "dmd2", recipe_name=GAN["fashion-dit"]),
    *(Run("fashion-dit", method) for method in PLAIN),
    *(Run("fashion-dit", method, seed=seed) for method in BEST for seed in (1, 2)),
    Run("fashion-unet", "dmd2", recipe_name=GAN["fashion-unet"]),
    *(Run("fashion-unet", method) for method in ("sid", "swiftbrush")),
)


def main() -> int:
    """Make the missing results, or show those that there are; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {run.name: run for run in RUNS}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, for each run")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--plan", action="store_true", help="count the iterations and do nothing else")
    parser.add_argument("--table", action="store_true", help="print the table and do nothing else")
    parser.add_argument("--grid", action="store_true", help=f"draw {GRID.relative_to(ROOT)} and do nothing else")
    options = parser.parse_args()
    if unknown := set(options.names) - names.keys():
        parser.error(f"not known: {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
    if options.table:
        print(table())
    if options.grid:
        grid(options.out)
    if options.table or options.grid:
        return 0
    wanted = [run for run in map(names.__getitem__, options.names or names) if run.name not in results()]
    if options.plan:
        for run in wanted:
            print(run.name, *planned(run, options.out, options.minutes)["sets"])
        return 0
    failed = []
    with bar("compare", len(wanted), lines=True) as done:
        for run in wanted:
            if make(run, options.out, options.minutes):
                failed.append(run.name)
            done(1)
    if failed:
        print(f"failed: {', '.join(failed)}; see their logs in {options.out}", file=sys.stderr)
    return bool(failed)


def make(run: Run, out: Path, minutes: float) -> int:
    """Prepare, time, train, evaluate and measure a run, and store its result.  Returns the first failure's code."""
    folder, known = out / run.name, planned(run, out, minutes)
    start = ["distill", "--config", run.recipe, *(word for value in known["sets"] for word in ("--set", value))]
    code, seconds = running.made(start, folder)
    if code:
        return code
    memory = {name: round(value) for name, value in measure_memory(ROOT / run.recipe, known["sets"]).items()}
    found = asdict(run) | {
        "name": run.name,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "planned_minutes": minutes,
    }
    found |= running.result(start, folder) | known | {"cpu_minutes": round(seconds / 60, 1), "memory_mib": memory}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    return 0


def planned(run: Run, out: Path, minutes: float) -> dict[str, Any]:
    """A run's settings and what is told of it: {"sets", "networks", "seconds", "forwards", ...}.

    Measured once and kept: a resumed run, and one of another seed, has the same number of iterations.
    """
    path = out / f"{run.plan}.plan.json"
    if not path.is_file():
        running.store(path, measured(run, out, minutes))
    known = json.loads(path.read_text(encoding="utf-8"))
    return known | {"sets": [*known["sets"], f"train.seed={run.seed}"]}


def measured(run: Run, out: Path, minutes: float) -> dict[str, Any]:
    """What any seed of a run needs beforehand, what it costs, and as many iterations as fit."""
    from fewstep.config import resolve

    sets, before = [*run.sets], 0.0
    if "pairs" in resolve(config=ROOT / run.recipe, sets=run.sets).objective.needs:
        pairs, before = paired(run, out)
        sets.append(f"pairs={pairs}")
    cost = speed.measure(ROOT / run.recipe, sets)
    iterations = max(1, int(60 * minutes / cost["seconds"]))
    every = max(1, iterations // EVALUATIONS)
    sets += [f"train.iterations={iterations}", f"train.evaluate_samples={CHOICE}"]
    sets += [f"train.{what}={every}" for what in ("evaluate_every", "checkpoint_every")]
    config = resolve(config=ROOT / run.recipe, sets=sets)
    roles = ["generator", *sorted(config.objective.roles)]
    needs = config.objective.needs
    told = {"data_free": "latents" not in needs, "networks": roles, "nfe": nfe(config.objective)}
    return {"sets": sets, "setup_minutes": round(before / 60, 1), **cost, **told}


def paired(run: Run, out: Path) -> tuple[Path, float]:
    """The teacher's pairs for a run, built if they are not there; where they lie, and the seconds that this took."""
    from fewstep.config import resolve

    guidance = resolve(config=ROOT / run.recipe).to_dict()["method"]["guidance"]
    folder, begun = out / f"pairs-{run.teacher}", datetime.now(timezone.utc)
    words = ["pairs", "--teacher", run.teacher, "--guidance", f"{guidance:g}", "--out", str(folder)]
    words += ["--n", str(PAIRS["n"]), "--num-steps", str(PAIRS["num_steps"])]
    subprocess.run([sys.executable, "-m", "fewstep.cli", *words], cwd=ROOT, check=True)
    return folder, (datetime.now(timezone.utc) - begun).total_seconds()


def nfe(objective: Any) -> float:
    """Network evaluations of a sample; a part of one where only a part of the network runs again."""
    head = getattr(objective, "evaluations", None)
    return round(head(BLOCKS), 2) if head else float(objective.sampler.num_steps)


def results() -> dict[str, dict[str, Any]]:
    """The newest result of each run, by name."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    return {found["name"]: found for found in map(json.loads, lines)}


def table() -> str:
    """The results so far as a markdown table, each teacher's best stored figures above its students."""
    costs = [
        "chosen at",
        "s / iteration",
        "forwards / iteration",
        "CPU minutes",
        "allocated MiB",
        "VmHWM MiB",
        "commit",
    ]
    head = ["teacher", "method", "data-free", "trained networks", "NFE", *COLUMNS.values(), *costs]
    lines, teachers, found = [head, ["---"] * len(head)], set(), results()
    for run in (run for run in RUNS if run.name in found):
        row = found[run.name]
        if run.teacher not in teachers:
            teachers.add(run.teacher)
            best = running.teachers_best(run.teacher)
            told = [f"{run.teacher}, CFG {best['cfg']:g}", "-", "-", "-", str(best["steps"])]
            lines.append([*told, *_figures(best), *["-"] * len(costs)])
        told = ["", run.name.removeprefix(f"{run.teacher}-"), "yes" if row["data_free"] else "no"]
        told += [", ".join(row["networks"]).replace("_", " "), f"{row['nfe']:g}"]
        (total,) = (value.rpartition("=")[2] for value in row["sets"] if value.startswith("train.iterations="))
        spent = [f"{row['iteration']} of {total}", f"{row['seconds']:.2f}", f"{row['forwards']:.1f}"]
        spent.append(f"{row['cpu_minutes']:.0f}")
        spent += [*map(str, row["memory_mib"].values()), f"{(row['training']['revision'] or '-')[:7]}, {row['date']}"]
        lines.append([*told, *_figures(row["student"]["figures"], row["student"]["spread"]), *spent])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figures(figures: dict[str, float], spread: dict[str, float] | None = None) -> list[str]:
    cells = [f"{figures[name]:.3f}" if name in figures else "-" for name in COLUMNS]
    for place, name in enumerate(COLUMNS):
        if spread and name in spread and name.startswith("fmd"):
            cells[place] += f" ± {spread[name]:.3f}"
    return cells


def grid(out: Path, seed: int = 90_000_000) -> None:
    """One picture: a row for each run whose folder is here, a column for each class, all from the same noise."""
    import torch

    from fewstep import pictures
    from fewstep.api import load_student
    from fewstep.sampling import sample_teacher
    from fewstep.training.preview import grid_prompts

    rows, names, made = [], [], {}
    for run in (run for run in RUNS if (out / run.name / "config.yaml").is_file() and not run.seed):
        student = load_student(out / run.name, device="cpu")
        prompts = grid_prompts(student.teacher.prompts)
        if run.teacher not in made:
            made[run.teacher] = sample_teacher(student.teacher, len(prompts), prompts, seed)
            rows.append(made[run.teacher])
            names.append(run.teacher)
        rows.append(student.sample(len(prompts), prompts, seed))
        names.append(run.name)
    if not rows:
        raise SystemExit(f"no runs in {out}; make them first")
    panel = pictures.panel(torch.cat(rows), len(rows[0]))
    pictures.save(pictures.side_by_side([("teachers and students, same noise", panel)], names), GRID)
    print(GRID.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
