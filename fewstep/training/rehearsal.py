"""The trainer on the meta device: every step as it is, on tensors that have shapes and no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import Optimizer

from fewstep.config import RunConfig
from fewstep.rng import Rng
from fewstep.teachers.base import Teacher
from fewstep.training.data import PromptData
from fewstep.training.launch import build_trio
from fewstep.training.optim import OptimConfig, build_optimizer
from fewstep.training.reals import RealData
from fewstep.training.trainer import Trainer
from fewstep.types import Pair

META = torch.device("meta")


class Weightless(Accelerator):
    """An accelerator whose device is meta; its autocast's switch is the CPU's, see `planning.device`."""

    @property
    def device(self) -> torch.device:
        """Where networks and batches are."""
        return META


class Longest(Rng):
    """Random numbers by which every rollout goes to its last step."""

    def shared_int(self, stream: str, high: int) -> int:
        """The largest that there is."""
        super().shared_int(stream, high)
        return high - 1


class Adam8bit(Optimizer):
    """What bitsandbytes' AdamW8bit holds, as of its version 0.44: see its `init_state`."""

    BLOCK, SMALL = 256, 4096  # weights that share a scale; tensors of fewer weights keep moments of float32

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make the state."""
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            dtype = torch.uint8 if p.numel() >= self.SMALL else torch.float32
            for name in ("1", "2") if p not in self.state else ():
                self.state[p][f"state{name}"] = torch.zeros_like(p, dtype=dtype)
                if dtype == torch.uint8:
                    self.state[p][f"absmax{name}"] = p.new_zeros(-(-p.numel() // self.BLOCK), dtype=torch.float32)


def _outlined(parameters: Iterable[nn.Parameter], config: OptimConfig) -> Optimizer:
    return Adam8bit(parameters, {}) if config.kind == "adamw8bit" else build_optimizer(parameters, config)


class Rehearsal(Trainer):
    """A trainer whose iterations are the longest ones."""

    rng: ClassVar[type[Rng]] = Longest
    optimizer: ClassVar[Callable[..., Optimizer]] = staticmethod(_outlined)


def rehearse(config: RunConfig, teacher: Teacher) -> Rehearsal:
    """The trainer of a run on a teacher without numbers (see `teachers.outline`), in its last stage.

    Steps of it are to be taken within a `planning.Ledger`.
    Raises ValueError as `launch.prepare` for settings that do not fit together.
    """
    # accelerate keeps one state per process; see `launch`.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "no" if config.train.precision == "fp32" else "bf16"  # fp16 takes the same memory
    accelerator = Weightless(cpu=True, mixed_precision=precision)
    needs, seed = config.objective.needs, config.train.seed
    assert teacher.reals is not None
    reals = RealData(teacher.reals(), teacher.encode, seed) if "latents" in needs else None
    pairs: Any = _pairs(teacher) if "pairs" in needs else None
    data = PromptData(("",), teacher.encode, teacher.shape, seed, reals, pairs)
    trio = build_trio(config, teacher, data)
    trainer = Rehearsal(config.train, trio, config.objective, data, out=Path(), accelerator=accelerator)
    if (last := len(trainer.stages) - 1) > 0:
        trainer.progress.enter(last)
        trainer.begin(last)
    return trainer


def _pairs(teacher: Teacher) -> SimpleNamespace:
    """As much of `PairData` as a batch takes."""

    def batch(sample_ids: Sequence[int], device: torch.device) -> Pair:
        x0 = torch.zeros(len(sample_ids), *teacher.shape, device=device)
        return Pair(torch.zeros_like(x0), x0, teacher.encode([""] * len(sample_ids)).to(device))

    return SimpleNamespace(digest="", batch=batch)
