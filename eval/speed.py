"""What an iteration of training costs: seconds, and arithmetic in forward passes of the teacher.

    python -m eval.speed configs/fashion_dit_sid.yaml method.num_steps=4

Every stage of the method is stepped for whole cycles of its turns, after its critic's warm-up.  Arithmetic is what
torch's counter of FLOPs finds (products of matrices, convolutions, attention; derivatives and backward passes too),
divided by that of one call of the teacher, without guidance, on 64 images: whatever a method evaluates, and on however
many images, in one unit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from eval.memory import prepared

LEAST = 8
"""Iterations that are timed, and counted, at least: rollouts have several lengths."""
IMAGES = 64
"""Of the call of the teacher that is the unit of arithmetic."""


def measure(recipe: Path, sets: Iterable[str] = ()) -> dict[str, float]:
    """{"seconds", "forwards"} of a mean iteration, from a process of its own.

    Raises subprocess.CalledProcessError if the training fails.
    """
    command = [sys.executable, "-m", "eval.speed", str(recipe), *sets]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def here(recipe: Path, sets: Iterable[str]) -> dict[str, float]:
    """The same, in this process."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    seconds = flops = weight = 0.0
    with prepared(recipe, sets) as trainer:
        batch = trainer.data.batch(range(trainer.config.batch_size))
        x = torch.randn(len(batch), *batch.shape)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            trainer.trio.real_score(x, torch.full((len(x),), 0.5), batch.cond)
        one = counter.get_total_flops() * IMAGES / len(x)
        stages = trainer.stages
        for stage in range(len(stages)):
            trainer.progress.stage = stage
            trainer.begin(stage)
            start, length = stages.starts[stage], stages.ends[stage] - stages.starts[stage]
            turns = stages[stage].turns
            start += turns.critic_warmup
            several = turns.critic_per_generator * -(-LEAST // turns.critic_per_generator)
            for iteration in range(start, start + turns.critic_per_generator):
                trainer.step(iteration)
            begun = time.perf_counter()
            for iteration in range(start, start + several):
                trainer.step(iteration)
            seconds += length * (time.perf_counter() - begun) / several
            with FlopCounterMode(display=False) as counter:
                for iteration in range(start, start + several):
                    trainer.step(iteration)
            flops += length * counter.get_total_flops() / several
            weight += length
    return {"seconds": seconds / weight, "forwards": flops / weight / one if one else float("nan")}


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("sets", nargs="*", metavar="KEY=VALUE", help="settings, as of `fewstep distill --set`")
    options = parser.parse_args()
    print(json.dumps(here(options.recipe, options.sets)))


if __name__ == "__main__":
    main()
