"""Peak memory of training: what the allocator handed out, and what the process took, in MiB.

    python -m eval.memory configs/fashion_unet_dmd2_gan.yaml method.num_steps=4 train.sharing=lora

Trains a few iterations of a recipe, with the settings given after it, in two child processes, without previews and
their evaluation.  One runs under torch's profiler: the highest running sum of its allocator events, from before the
teacher is loaded, is the peak of weights, gradients, optimiser states and activations.  The other runs plain; its
VmHWM (the largest resident set; Linux) holds Python, the code of torch and the allocator's gaps as well.  A GAN is made
to start at once, so that it is part of the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.training.trainer import Trainer

ITERATIONS = 6
"""Every optimiser has its state by then, and the rollout has had several lengths."""


def measure(recipe: Path, sets: Iterable[str] = ()) -> dict[str, float]:
    """{"allocated", "resident"} in MiB.  Raises subprocess.CalledProcessError if the training fails."""
    found = {}
    for what in CHILDREN:
        command = [sys.executable, "-m", "eval.memory", "--child", what, str(recipe), *sets]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[what] = json.loads(done.stdout.splitlines()[-1]) / 2**20
    return found


def allocated(recipe: Path, sets: list[str]) -> int:
    """The allocator's peak in bytes while training under the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            train(recipe, sets)
        recorded.export_chrome_trace(str(trace))
        return peak(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def peak(events: list[dict[str, Any]]) -> int:
    """The highest running sum of the allocator's events on the CPU, in bytes.  events: of a Chrome trace."""
    moves = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    held = most = 0
    for event in sorted(moves, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def resident(recipe: Path, sets: list[str]) -> int:
    """The process's own VmHWM in bytes after training."""
    train(recipe, sets)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def train(recipe: Path, sets: list[str]) -> None:
    """The first iterations of the recipe."""
    with prepared(recipe, sets) as trainer:
        for iteration in range(ITERATIONS):
            trainer.step(iteration)


@contextmanager
def prepared(recipe: Path, sets: Iterable[str]) -> Iterator[Trainer]:
    """The recipe's trainer on the CPU, to be stepped without the loop's logs and previews; its GAN starts at once."""
    from fewstep.api import load_teacher
    from fewstep.config import resolve
    from fewstep.training.launch import prepare

    config = resolve(config=recipe, given={"train": {"device": "cpu"}}, sets=list(sets))
    if getattr(config.objective, "gan_weight", 0):
        config = resolve(config=recipe, given={"train": {"device": "cpu"}}, sets=[*sets, "method.gan_start=0"])
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = prepare(config, Path(folder), lambda: load_teacher(config.teacher, **config.teacher_options))
        yield trainer


CHILDREN = {"allocated": allocated, "resident": resident}


def main() -> None:
    """Print both peaks; as a child, one of them in bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("sets", nargs="*", metavar="KEY=VALUE", help="settings, as of `fewstep distill --set`")
    parser.add_argument("--child", choices=[*CHILDREN], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.recipe, options.sets)))
    else:
        print(json.dumps(measure(options.recipe, options.sets)))


if __name__ == "__main__":
    main()
