"""The README's table of plans: DMD2 with one sample at a time, by teacher and sharing.

    python -m eval.plans

Prints a row for each, from configs alone: bf16 weights of the teacher, bf16 autocast, gradient checkpointing.
"""

from __future__ import annotations

import time

from fewstep.config import resolve
from fewstep.planning.plan import GIB, Plan, plan

TEACHERS = (
    *("sd15", "sd21", "sdxl", "dit-xl-2-256", "pixart-sigma", "sd3-medium", "sd35-large", "flux-dev", "sana"),
    *("cogview4", "qwen-image", "z-image", "wan2.1-1.3b", "wan2.2-a14b"),
)
SHARINGS = ("copies", "lora-fake", "lora")
COLUMNS = (
    *("teacher", "weights", "parameters that train", "weights GiB", "gradients", "optimiser", "activations at most"),
    *("peak", "a GPU needs", "TFLOPs / iteration", "planned in s"),
)


def row(made: Plan, seconds: float) -> str:
    """A line of the table: what is there at the higher peak of the turns, and activations when they are most."""
    turn = max(made.parts, key=lambda turn: sum(made.bytes(turn).values()))
    held, train = made.bytes(turn), made.config.train
    most = max(part.peak.activations for part in made.parts.values())
    figures = [*(held[kind] / GIB for kind in ("weights", "gradients", "optimiser")), most / GIB]
    cells = [f"{made.config.teacher}, {made.size[-1]}", train.sharing, f"{sum(made.trained.values()) / 1e6:,.0f}M"]
    cells += [f"{figure:.1f}" for figure in (*figures, made.peak / GIB, made.needed)]
    return f"| {' | '.join([*cells, f'{made.flops / 1e12:,.0f}', f'{seconds:.0f}'])} |"


def main() -> None:
    """Print the table."""
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for teacher in TEACHERS:
        for sharing in SHARINGS:
            train = {"batch_size": 1, "accumulate": 1, "precision": "bf16", "gradient_checkpointing": True}
            given = {"teacher": {"name": teacher, "dtype": "bf16"}, "method": {"name": "dmd2", "num_steps": 1}}
            started = time.perf_counter()
            made = plan(resolve(given={**given, "train": {**train, "sharing": sharing}}))
            print(row(made, time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
