"""Gradients of both turns before any optimiser, in float64; run as a script it is one rank of a process group."""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.models.adapters import LoRA
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns
from fewstep.objectives.dmd2 import DMD2
from fewstep.processes import processes_of_group
from fewstep.teachers import mixture
from fewstep.training.data import PromptData
from fewstep.training.options import TrainConfig
from fewstep.training.parallel import average_gradients
from fewstep.training.preview import Preview
from fewstep.training.progress import Interrupted
from fewstep.training.reals import RealData
from fewstep.training.trainer import Trainer
from fewstep.types import Turn

ITERATIONS = 3
MEANS, COVS = [[1.0, -0.5, 0.2], [-1.0, 0.5, 0.1]], [0.1, 0.3]
Steps = list[int]
"""The step index of every rollout, in order."""


@dataclass(frozen=True, kw_only=True)
class Watched(DMD2):
    """DMD2 that notes which step each rollout trained."""

    steps: Any = None

    def rollout(self, trio, batch, rng):
        made = super().rollout(trio, batch, rng)
        self.steps.append(made.step)
        return made


class Gradients(Trainer):
    """A trainer that keeps each turn's gradient and never steps, so that all iterations see the same weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[str, Tensor] = {}

    def _descend(self, turn: Turn, optimizer: Any, clip: float) -> None:
        average_gradients(self.trio.weights(turn), self.accelerator)
        for role, network in self.players[turn].items():
            for name, p in network.weights().items():
                assert p.grad is not None
                self.seen[f"{self.progress.iteration}.{turn}.{role}.{name}"] = p.grad.clone()
        optimizer.zero_grad(set_to_none=True)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "gan": ({"gan_weight": 0.5, "gan_critic_weight": 1.0, "r1_weight": 0.1}, {}),
    "lora": ({"gan_weight": 0.5, "gan_critic_weight": 1.0}, {"sharing": "lora", "lora": LoRA(rank=2)}),
}
"""Settings of the method and of the trainer."""

CASES = [(1, "plain"), (4, "plain"), (2, "gan"), (1, "lora")]
"""Steps and variant of what is compared."""


def make(cls: type[Trainer], out: Path, num_steps: int, variant: str = "plain", **train: Any) -> tuple[Any, Steps]:
    """A trainer of a float64 trio around a two-class mixture, and the list that collects step indices."""
    teacher = mixture(MEANS, COVS, classes=[0, 1], fit_steps=0)
    steps: Steps = []
    method, more = VARIANTS[variant]
    objective = Watched(num_steps=num_steps, guidance=2.0, turns=Turns(critic_per_generator=1), steps=steps, **method)
    config = TrainConfig(batch_size=8, device="cpu", **train, **more)
    trio = Trio.build(teacher.denoiser, objective.roles, sharing=config.sharing, lora=config.lora, init=teacher.student)
    trio.generator.double(), trio.critic().double()
    with torch.no_grad():  # a fake score that differs from the generator, or its gradient would be special
        for role, shift in ((trio.critic(), 0), (trio.generator, 1000 * (variant == "lora"))):
            for i, p in enumerate(role.weights().values()):
                if role is not trio.generator or shift:
                    p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(shift + i), dtype=p.dtype)
    reals = RealData(teacher.reals(), teacher.encode, 0) if objective.needs else None
    data = PromptData(teacher.prompts, teacher.encode, teacher.shape, 0, reals=reals)
    if "head" in objective.roles:
        trio.add_head(objective.features(trio), data.batch((0,)), seed=1)
        trio.discriminator().double()
    return cls(config, trio, objective, data, out=out, accelerator=Accelerator(cpu=True)), steps


def gradients(
    out: Path, num_steps: int, accumulate: int = 1, variant: str = "plain"
) -> tuple[dict[str, Tensor], Steps]:
    """Every parameter's gradient at each turn of ITERATIONS iterations, and all step indices."""
    trainer, steps = make(Gradients, out, num_steps, variant, accumulate=accumulate)
    for iteration in range(ITERATIONS):
        trainer.progress.iteration = iteration
        trainer.step(iteration)
    return trainer.seen, steps


def relative_error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest over parameters of |a - b| / |b| (norms); infinite if one of them does not train at all."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in a)


class Judge:
    """A monitor by which the student is best the first time."""

    def evaluate(self, student: Any, iteration: int) -> dict[str, float]:
        return {"rank": float(iteration)}


def stopped(out: Path) -> str:
    """Train until SIGTERM, which only the last rank gets: the reason this rank stopped for."""
    trainer, _ = make(Trainer, out, 1, "gan", checkpoint_every=100, evaluate_every=2, log_every=1, iterations=100)
    trainer.monitor, step = Judge(), trainer.step

    def signalled(iteration: int) -> None:
        step(iteration)
        if iteration == 4 and trainer.accelerator.process_index:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.step = signalled
    try:
        trainer.run()
    except Interrupted as stop:
        return str(stop)
    return "not stopped"


def failed(out: Path) -> str:
    """What each process says when the main one cannot write its checkpoint."""
    trainer, _ = make(Trainer, out / "full", 1)
    if trainer.accelerator.is_main_process:
        (out / "full").mkdir()
        (out / "full" / "checkpoints").write_text("a file where the folder should be")
    try:
        trainer.save()
    except (OSError, RuntimeError) as error:
        return type(error).__name__
    return "saved"


def previewed(out: Path) -> dict[str, float]:
    """The figures of a student that has learned nothing, from more samples than are made at a time."""
    trainer, _ = make(Trainer, out, 2)
    teacher = mixture(MEANS, COVS, classes=[0, 1], fit_steps=0)
    group, sampler = processes_of_group(), trainer.objective.sampler
    return Preview(teacher, out, sampler, 700, 2, processes=group).evaluate(trainer.trio.generator.float(), 1)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for n, kind in CASES:
        seen, step_indices = gradients(folder, n, variant=kind)
        torch.save((seen, step_indices), folder / f"gradients-{kind}{n}.{rank}.pt")
    (folder / f"stopped.{rank}.json").write_text(json.dumps(stopped(folder)))
    (folder / f"failed.{rank}.json").write_text(json.dumps(failed(folder)))
    (folder / f"preview.{rank}.json").write_text(json.dumps(previewed(folder)))
    torch.distributed.destroy_process_group()
