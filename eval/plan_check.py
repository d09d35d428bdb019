"""Plans of published teachers against what a GPU takes: peak memory, and the time of an update.

    python -m eval.plan_check [TEACHER:SHARING ...] [--method dmd2] [--batch-size 1]

Networks have their published sizes and random numbers, prompts are zeros: memory and time do not depend on either.
Text encoders and the VAE are not there, as in a plan.  A line of JSON for each goes to eval/results/plan_check.jsonl,
in place of its last one.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from eval.bench_ops import RESULTS, environment, keep
from fewstep.config import RunConfig, resolve
from fewstep.planning.plan import GIB, Plan, plan
from fewstep.teachers.outline import outline
from fewstep.training.launch import prepare
from fewstep.training.trainer import Trainer

CASES = ("sd15:copies", "sdxl:lora", "sdxl:lora-fake", "flux-dev:lora", "wan2.1-1.3b:lora")
"""By default."""
UPDATES = 3
"""Of each player that are timed, after one that is not."""


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="TEACHER:SHARING", help=f"by default {', '.join(CASES)}")
    parser.add_argument("--method", default="dmd2")
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this compares plans with a GPU, and there is none here")
    for case in options.cases or CASES:
        teacher, _, sharing = case.partition(":")
        config = configured(teacher, sharing or "lora", options.method, options.batch_size)
        made = plan(config)
        name = f"{options.method} {teacher} {config.train.sharing}, batch {config.train.batch_size}"
        row = {"operator": name} | planned(made)
        try:
            row |= measured(config, made)
        except torch.OutOfMemoryError as error:
            row |= {"out_of_memory": str(error)[:200]}
        print(row, flush=True)
        keep(RESULTS / "plan_check.jsonl", [row | environment("cuda")])
        gc.collect()
        torch.cuda.empty_cache()


def configured(teacher: str, sharing: str, method: str, batch_size: int = 1) -> RunConfig:
    """The teacher in bf16, autocast, gradient checkpointing, as in the README's table."""
    train = {"batch_size": batch_size, "accumulate": 1, "precision": "bf16", "gradient_checkpointing": True}
    given = {"teacher": {"name": teacher, "dtype": "bf16"}, "method": {"name": method, "num_steps": 1}}
    return resolve(given={**given, "train": {**train, "sharing": sharing}})


def planned(made: Plan) -> dict[str, Any]:
    """What the plan says."""
    return {"size": list(made.size), "planned_gib": _gib(made.peak), "planned_need_gib": round(made.needed, 2)}


def measured(config: RunConfig, made: Plan) -> dict[str, Any]:
    """Peaks by the allocator, by what it reserved and by the driver; milliseconds and TFLOP/s of each update."""
    before = torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    teacher = outline(config.teacher, device="cuda", **config.teacher_options)
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = prepare(config, Path(folder) / "run", teacher)
        trainer.tracker = SimpleNamespace(say=print)  # type: ignore[assignment]  # there is no loop around the updates
        for turn in trainer.players:
            _timed(trainer, turn, 0)
        torch.cuda.reset_peak_memory_stats()
        told: dict[str, Any] = {}
        for turn in trainer.players:
            seconds = min(_timed(trainer, turn, at) for at in range(1, UPDATES + 1))
            told |= {f"{turn}_ms": round(1e3 * seconds, 1)}
            told |= {f"{turn}_tflops": round(made.parts[turn].flops / seconds / 1e12, 1)}
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    used = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
    told |= {"allocated_gib": _gib(peak), "reserved_gib": _gib(reserved), "driver_gib": _gib(used)}
    told |= {
        "planned_by_allocated": round(made.peak / peak, 3),
        "beside_tensors_gib": _gib(used - torch.cuda.memory_reserved()),
    }
    return told | {"free_before_gib": _gib(before), "skipped": trainer.progress.skipped}


def _timed(trainer: Trainer, turn: Any, iteration: int) -> float:
    """Seconds of one update."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    trainer.update(turn, iteration)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _gib(size: float) -> float:
    return round(size / GIB, 2)


if __name__ == "__main__":
    main()
