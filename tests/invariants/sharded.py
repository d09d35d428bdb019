"""Runs whose networks lie in parts on two processes; run as a script it is one of those."""

import json
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fewstep.config import RunConfig, resolve
from fewstep.models.sharding import held, units
from fewstep.teachers import mixture
from fewstep.teachers.base import Reals, Teacher
from fewstep.teachers.pipelines import load_teacher
from fewstep.training.launch import prepare
from fewstep.training.preview import Preview
from fewstep.training.progress import Interrupted
from fewstep.training.trainer import Trainer

ITERATIONS, STOP = 3, 2
SMOOTH = {"lr": 0.01, "eps": 1.0, "clip": 0.1}
"""With such an eps an update is smooth in the gradient; else AdamW's first is its sign, which rounding may change."""


@dataclass(frozen=True)
class Case:
    """teacher: "mixture", whose three numbers no two processes share evenly, or "sd3", a folder in miniature."""

    teacher: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


def toy(_: Path) -> Teacher:
    """Points of three numbers."""
    return mixture([[1.0, -0.5, 0.2], [-1.0, 0.5, 0.1]], [0.1, 0.3], classes=[0, 1], fit_steps=2)


def sd3(pipeline: Path) -> Teacher:
    """The miniature, and real samples for it."""
    teacher = load_teacher(str(pipeline))
    latents = torch.randn(4, *teacher.shape, generator=torch.Generator().manual_seed(0))
    return replace(teacher, reals=lambda: Reals(latents, ("class 0", "class 1") * 2))


TEACHERS = {"mixture": toy, "sd3": sd3}
EVEN = {"turns": {"critic_per_generator": 1}}
GAN = {**EVEN, "gan_weight": 0.5, "gan_critic_weight": 1.0}
LORA = {"sharing": "lora", "lora": {"rank": 4}}
CASES = {
    "dmd2": Case("mixture", "dmd2", {**GAN, "num_steps": 2}, {"accumulate": 2}),
    "dmd2-teacher-features": Case("sd3", "dmd2", {**GAN, "gan_features": "teacher", "guidance": 2.0}),
    "dmd2-lora": Case("sd3", "dmd2", {**EVEN, "guidance": 2.0}, LORA),
    "dmd2-lora-fake": Case("mixture", "dmd2", GAN, {**LORA, "sharing": "lora-fake"}),
    "dmd2-checkpointed": Case("sd3", "dmd2", EVEN, {"gradient_checkpointing": True}),
    "dmd2-bf16": Case("sd3", "dmd2", {**EVEN, "guidance": 2.0}, {"precision": "bf16"}),
    "sid": Case("sd3", "sid"),
    "sid-lora": Case("mixture", "sid", {}, LORA),
    "phased_dmd": Case("mixture", "phased_dmd", {"phases": 2}),
    "boot": Case("mixture", "boot"),
}
RESUMED = ("dmd2", "dmd2-lora")


def config_of(name: str, pipeline: Path) -> RunConfig:
    """The case's settings.  pipeline: where the miniature lies."""
    case, prompts = CASES[name], pipeline.parent / "prompts.txt"
    train = {"iterations": ITERATIONS, "batch_size": 4, "device": "cpu", "ema": 0.5, "evaluate_samples": 8}
    train |= {"checkpoint_every": STOP, "generator": SMOOTH, "critic": SMOOTH, **case.train}
    given = {
        "teacher": {"name": "mixture" if case.teacher == "mixture" else str(pipeline)},
        "method": {"name": case.method, **case.options},
        "train": train,
        "prompts": str(prompts),
    }
    return resolve(given=given)


def trainer_of(name: str, out: Path, pipeline: Path, *, resume: bool = False) -> Trainer:
    """The case's trainer on the CPU, its run at `out`."""
    teacher = TEACHERS[CASES[name].teacher](pipeline)
    trainer = prepare(config_of(name, pipeline), out, teacher, resume=resume)[0]
    assert isinstance(trainer.monitor, Preview)
    trainer.monitor.teacher_steps = 2
    return trainer


def networks_of(trainer: Trainer) -> list[nn.Module]:
    """All that it holds."""
    players = [network for networks in trainer.players.values() for network in networks.values()]
    return [trainer.trio.real_score, trainer.ema.denoiser, *players]


def held_by(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """Bytes of weights and of the optimisers' moments that this process holds, and that there are."""
    weights = list({id(p): p for network in networks_of(trainer) for p in network.parameters()}.values())
    states = [s for optimizer in trainer.optimizers.values() for s in optimizer.state.values()]
    moments = [value for state in states for value in state.values() if value.ndim]
    return {
        kind: (held(tensors), sum(t.numel() * t.itemsize for t in tensors))
        for kind, tensors in (("weights", weights), ("optimiser", moments))
    }


def watch_gathered(trainer: Trainer) -> list[int]:
    """Collects how many bytes of weights are whole while a unit runs."""
    networks, seen = networks_of(trainer), [0]

    def look(*_: Any) -> None:
        found = {id(p): p for network in networks for p in network.parameters() if not isinstance(p, DTensor)}
        seen.append(sum(p.numel() * p.itemsize for p in found.values()))

    for network in (trainer.trio.generator, trainer.trio.real_score):
        for module in network.networks():
            for unit in units(module):
                unit.register_forward_pre_hook(look)  # after FSDP's own
    return seen


def stopped(trainer: Trainer) -> str:
    """Train until SIGTERM, which the last process alone gets: the reason this one stopped for."""
    step = trainer.step

    def signalled(iteration: int) -> None:
        step(iteration)
        if iteration + 1 == STOP and trainer.accelerator.process_index:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.step = signalled
    try:
        trainer.run()
    except Interrupted as stop:
        return str(stop)
    return "not stopped"


def main(folder: Path, pipeline: Path) -> dict[str, Any]:
    """All cases; what this process saw of them."""
    told: dict[str, Any] = {}
    for name in CASES:
        trainer = trainer_of(name, folder / name, pipeline)
        gathered = watch_gathered(trainer)
        trainer.run()
        told[name] = {**held_by(trainer), "gathered": max(gathered)}
    for name in RESUMED:
        told[name]["stopped"] = stopped(trainer_of(name, folder / f"{name}-again", pipeline))
        for run in (f"{name}-again", f"{name}-one"):  # the latter was begun by one process
            trainer_of(name, folder / run, pipeline, resume=True).run()
    return told


if __name__ == "__main__":
    made = main(Path(sys.argv[1]), Path(sys.argv[2]))
    (Path(sys.argv[1]) / f"told.{os.environ['RANK']}.json").write_text(json.dumps(made))
    torch.distributed.destroy_process_group()
