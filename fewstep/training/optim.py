"""Optimiser and learning-rate schedule of one player."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule.  warmup counts this player's own updates; clip is the largest gradient norm.

    adamw8bit: moments of 8 bits, by bitsandbytes     [arXiv:2110.02861]
    """

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = 1e-5  # DMD2 table 6, SD1.5, where the ratio is 10; together with ratio 5 it is ours
    betas: tuple[float, float] = (0.9, 0.999)  # DMD2 appendix F
    eps: float = 1e-8
    weight_decay: float = 0.01  # DMD2 appendix F
    clip: float = 10.0  # DMD2 appendix F
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be a positive finite number, got {self.lr}")
        if not (0 <= self.eps < float("inf") and 0 <= self.weight_decay < float("inf")):
            raise ValueError(f"eps and weight_decay must be >= 0 and finite, got {self.eps} and {self.weight_decay}")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if not self.clip > 0:  # NaN too: it would make the weights NaN while the gradient norm stays finite
            raise ValueError(f"clip must be positive, got {self.clip}; use a large number to switch clipping off")
        if self.warmup < 0:
            raise ValueError(f"warmup must be >= 0 updates, got {self.warmup}")


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the given parameters, whatever requires_grad says at the moment."""
    make = torch.optim.AdamW if config.kind == "adamw" else import_module("bitsandbytes.optim").AdamW8bit
    return make(parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def learning_rate(config: OptimConfig, update: int, total: int) -> float:
    """The rate of a player's update number `update` (from 0) of `total`: a pure function, so it needs no saving."""
    rate = config.lr * min(1.0, (update + 1) / (config.warmup + 1))
    if config.schedule == "cosine":
        progress = min(1.0, update / max(1, total))
        rate *= 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi, dtype=torch.float64))))
    return rate
