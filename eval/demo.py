"""`make demo`: distil the embedded teacher, evaluate the student, draw the grid and the page, print the minutes.

    python -m eval.demo [--out runs/demo] [--samples 10000] [further `fewstep distill` options]

Each part is the command that a user would type.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

GRID_SEED = 70_000_000
PER_PROMPT = 4


def main() -> int:
    """Run the three parts; the exit code is that of the first part that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--samples", type=int, default=10_000)
    options, further = parser.parse_known_args()
    minutes = {"install": _install_minutes()}
    distill = ["distill", "--teacher", "fashion-dit", "--method", "dmd2", "--num-steps", "1"]
    parts = {
        "distillation": [*distill, "--out", str(options.out), "--overwrite", *further],
        "evaluation": ["eval", str(options.out), "--n", str(options.samples)],
    }
    for name, command in parts.items():
        print(f"\n$ fewstep {' '.join(command)}", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "fewstep.cli", *command]).returncode
        minutes[name] = (time.monotonic() - start) / 60
        if code:
            return code
    picture = draw(options.out)
    print("\nminutes: " + ", ".join(f"{name} {value:.1f}" for name, value in minutes.items()))
    print(picture)
    return subprocess.run([sys.executable, "-m", "fewstep.cli", "report", str(options.out)]).returncode


def draw(out: Path) -> Path:
    """Teacher in 50 steps | untrained in the student's steps | student, from the same noise; rows are prompts."""
    from fewstep import pictures
    from fewstep.bar import bar
    from fewstep.sampling import sample_teacher
    from fewstep.students import load_student, untrained_student
    from fewstep.training.preview import grid_prompts, titled_grid

    student = load_student(out)
    before = untrained_student(out, teacher=student.teacher)
    prompts = grid_prompts(student.teacher.prompts)
    rows = [prompt for prompt in prompts for _ in range(PER_PROMPT)]
    steps = f"{student.sampler.num_steps} step{'s' * (student.sampler.num_steps > 1)}"
    with bar("drawing", 3 * len(rows)) as done:
        panels = [
            ("teacher, 50 steps", sample_teacher(student.teacher, len(rows), rows, GRID_SEED, progress=done)),
            (f"untrained, {steps}", before.sample(len(rows), rows, GRID_SEED, progress=done)),
            (f"student, {steps}", student.sample(len(rows), rows, GRID_SEED, progress=done)),
        ]
    return pictures.save(titled_grid(panels, prompts, PER_PROMPT), out / "grid.png")


def _install_minutes() -> float:
    """What the Makefile measured; 0 if the set-up was there."""
    record = Path(sys.prefix) / ".install_seconds"
    return int(record.read_text()) / 60 if record.is_file() else 0.0


if __name__ == "__main__":
    sys.exit(main())
