"""What the trainer is told: how long, on how much, how fast, how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.environment import check_device
from fewstep.models.adapters import LoRA
from fewstep.models.attention import Attention
from fewstep.models.trio import Sharing
from fewstep.training.boards import BOARDS, Board
from fewstep.training.embeddings import Where
from fewstep.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on what and how fast; every field may be given as --set train.NAME=VALUE.

    batch_size is the global batch of one optimiser step; `accumulate` splits it into that many micro-batches.
    """

    iterations: int = 600
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sharing: Sharing = "copies"
    offload_teacher: bool = False  # its weights are on the CPU and visit the GPU for its calls; with copies only
    lora: LoRA = LoRA()  # of the roles that are adapters
    gradient_checkpointing: bool = False
    attention: Attention = "auto"  # sdpa: torch's kernels; xformers: its own; auto: what the networks come with
    compile: bool = False  # networks by torch.compile, but for calls under hooks (a GAN's features, a second time)
    prompt_cache: Where = "auto"  # encoded prompts: in memory, on disk, or on disk if they take more than 1 GiB
    generator: OptimConfig = OptimConfig()
    critic: OptimConfig = OptimConfig()
    ema: float = 0.0  # decay of the averaged student, 0 = none; DMD2 uses none
    tensorboard: bool = False  # beside metrics.jsonl, into <out>/tensorboard
    trackers: tuple[Board, ...] = ()  # services that hear of the figures too: wandb, trackio
    log_every: int = 20
    evaluate_every: int = 200
    evaluate_samples: int = 1000  # behind the running figure by which the best checkpoint is chosen
    checkpoint_every: int = 200
    keep: int = 2

    def __post_init__(self) -> None:
        for name in (
            "iterations",
            "batch_size",
            "accumulate",
            "log_every",
            "evaluate_every",
            "evaluate_samples",
            "checkpoint_every",
            "keep",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        check_device(self.device)
        if unknown := [name for name in self.trackers if name not in BOARDS]:
            raise ValueError(f"trackers: {unknown[0]!r} is not known; allowed: {', '.join(BOARDS)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if self.offload_teacher and self.sharing != "copies":
            raise ValueError(
                f"offload_teacher has no use with sharing {self.sharing!r}, whose adapters are around the teacher's "
                "own weights; leave it out, or take --sharing copies"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
