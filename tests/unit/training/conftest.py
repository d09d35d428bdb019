"""A trainer small enough to take hundreds of steps a second."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from fewstep.models.trio import Trio
from fewstep.objectives.base import student_of
from fewstep.objectives.dmd2 import DMD2
from fewstep.teachers import mixture
from fewstep.teachers.points import PointNet
from fewstep.training.data import PromptData
from fewstep.training.options import TrainConfig
from fewstep.training.tracking import Tracker
from fewstep.training.trainer import Trainer


class WithDropout(PointNet):
    """Draws from torch's global generator in every forward."""

    def forward(self, x, t, label):
        return nn.functional.dropout(super().forward(x, t, label), 0.5, self.training)


@pytest.fixture
def trainer_of(tmp_path: Path) -> Callable[..., Trainer]:
    """trainer_of(objective, dropout=False, out=..., **train) -> a trainer whose `step` can be called without `run`."""

    def make(objective: Any = None, *, dropout: bool = False, out: Path = tmp_path / "run", **train: Any) -> Trainer:
        out.mkdir(exist_ok=True)
        objective = objective or DMD2(guidance=1.0)
        teacher = mixture([[1.0, -0.5], [-1.0, 0.5]], [0.1, 0.3], fit_steps=0)

        def student():
            denoiser = teacher.student()
            torch.manual_seed(0)
            denoiser.backbone.module = (WithDropout if dropout else PointNet)(2, 1, width=8)
            return denoiser

        own = student_of(objective, 0)
        trio = Trio.build(teacher.denoiser, objective.roles, init=student, student=own)
        data = PromptData(("",), teacher.encode, teacher.shape, 0)
        config = TrainConfig(**{"batch_size": 4, "iterations": 100, "device": "cpu", **train})
        console = Console(file=io.StringIO(), width=200)
        trainer = Trainer(config, trio, objective, data, out=out, accelerator=Accelerator(cpu=True), console=console)
        trainer.tracker = Tracker(out, total=config.iterations, start=0, console=console)
        return trainer

    return make
