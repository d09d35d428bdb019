"""The first fifty iterations of every method on a tiny network in float64: losses and gradient norms.

python -m tests.golden.trajectories "REASON" [METHOD ...]      record again (`make golden REASON="..."`)

The record says that nothing has drifted, not that it is right: record again only for a change that is meant, with its
reason.  Sums in another order differ by 1e-16 and grow by training, so other machines agree to a tolerance only.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from fewstep.environment import describe
from fewstep.files import write_text
from fewstep.models.trio import Trio
from fewstep.objectives.base import METHODS, student_of
from fewstep.rng import Rng
from fewstep.teachers import Teacher, mixture
from fewstep.training.data import PromptData
from fewstep.training.optim import OptimConfig
from fewstep.training.options import TrainConfig
from fewstep.training.reals import RealData
from fewstep.training.tracking import Tracker
from fewstep.training.trainer import Trainer
from fewstep.types import Pair

RECORD = Path(__file__).with_name("trajectories.json")
STEPS, BATCH = 50, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "dmd2": {"num_steps": 2, "gan_weight": 0.1},
    "sid": {"num_steps": 2},
    "scm": {"warmup": 20, "weight": True},
    "tbcm": {"warmup": 20, "grid_steps": 4},
    "tmd": {"head_blocks": 1, "jvp": "exact", "gan_features": "fake"},
}
"""What differs from a method's defaults."""


class Pairs:
    """Pairs of noise and samples, for methods that regress on them: the noise through an affine map."""

    digest = "golden"

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def batch(self, sample_ids: Any, device: Any = "cpu") -> Pair:
        """As PairData's."""
        noise = Rng(7, 0, "pairs", sample_ids).randn("noise", self.teacher.shape)
        return Pair(noise, 0.5 * noise + 0.2, self.teacher.encode([self.teacher.prompts[i % 2] for i in sample_ids]))


def points() -> Teacher:
    """Two classes in three dimensions, and a student that has been fitted to nothing."""
    return mixture([[1.0, -0.5, 0.2], [-1.0, 0.5, 0.1]], [0.1, 0.3], classes=[0, 1], fit_steps=0)


def trajectory(
    method: str, steps: int = STEPS, *, dtype: torch.dtype = torch.float64, teacher: Teacher | None = None
) -> dict[str, list[list[float]]]:
    """For each player, its updates' sum of losses and gradient norm, one after the other.

    teacher: that of the record if none is given.  dtype: of the networks that train.
    """
    teacher = teacher or points()
    objective: Any = METHODS.get(method)(**SETTINGS.get(method, {}))
    optim = OptimConfig(lr=1e-3, warmup=2, schedule="cosine")
    config = TrainConfig(batch_size=BATCH, iterations=STEPS, device="cpu", generator=optim, critic=optim)
    trio = Trio.build(teacher.denoiser, objective.roles, init=teacher.student, student=student_of(objective, 1))
    brought = teacher.reals if "latents" in objective.needs else None
    reals = RealData(brought(), teacher.encode, 0) if brought is not None else None
    pairs: Any = Pairs(teacher) if "pairs" in objective.needs else None
    data = PromptData(teacher.prompts, teacher.encode, teacher.shape, 0, reals=reals, pairs=pairs)
    if "head" in objective.roles:
        trio.add_head(objective.features(trio), data.batch((0,)), seed=1)
    for network in (trio.generator, trio.fake_score, trio.head):
        if isinstance(network, nn.Module):
            network.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(file=io.StringIO())
        trainer = Recording(config, trio, objective, data, out=Path(folder), accelerator=Accelerator(cpu=True))
        trainer.tracker = Tracker(Path(folder), total=STEPS, start=0, console=quiet)
        for iteration in range(steps):
            trainer.step(iteration)
    return trainer.seen


class Recording(Trainer):
    """A trainer that notes each update's losses and gradient norm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[str, list[list[float]]] = {turn: [] for turn in self.players}
        self.total = 0.0
        plain = self.accelerator.backward

        def backward(loss: torch.Tensor) -> None:
            self.total += float(loss.detach())
            plain(loss)

        self.accelerator.backward = backward  # type: ignore[method-assign]

    def _descend(self, turn: Any, optimizer: Any, clip: float) -> bool:
        norm = torch.stack([p.grad.norm() for p in self.trio.weights(turn) if p.grad is not None]).norm()
        self.seen[turn].append([float(f"{value:.12g}") for value in (self.total, float(norm))])
        self.total = 0.0
        return super()._descend(turn, optimizer, clip)


def record(reason: str, methods: list[str]) -> None:
    """Write the record of these methods again, with the reason and the machine."""
    torch.set_num_threads(1)
    found = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    for method in methods:
        made = {"reason": reason, "date": date.today().isoformat(), "environment": describe()["packages"]}
        found[method] = made | {"trajectory": trajectory(method)}
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
    write_text(RECORD, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not sys.argv[1].strip():
        raise SystemExit('a record needs its reason: make golden REASON="why the numbers change"')
    import fewstep.config  # noqa: F401 - registers every method

    record(sys.argv[1], sys.argv[2:] or list(METHODS.names()))
