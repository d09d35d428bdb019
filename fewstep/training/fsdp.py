"""FSDP, if accelerate is launched for it: what it is asked of, which networks it divides, and what it cannot."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from fewstep.config import RunConfig
from fewstep.models.adapters import adapted
from fewstep.models.denoiser import Denoiser, Player
from fewstep.models.sharding import shard
from fewstep.teachers.pipelines import pipeline_class
from fewstep.types import Batch

SWITCH = "ACCELERATE_USE_FSDP"
"""Of the environment: "true" where `accelerate launch` was given a file for FSDP."""

FOLLOWED = (
    ("FSDP_VERSION", ("2",), "give fsdp_version: 2, as configs/accelerate/fsdp2.yaml does"),
    ("FSDP_OFFLOAD_PARAMS", ("false",), "weights stay on the device, so leave it out"),
    ("FSDP_RESHARD_AFTER_FORWARD", ("true", "full_shard"), "weights are gathered for a call alone, so give true"),
    ("FSDP_ACTIVATION_CHECKPOINTING", ("false",), "leave it out and give --gradient-checkpointing"),
)
"""What the file may say besides, the values that are followed here, and what to do about others."""


def asked() -> bool:
    """Whether accelerate was launched for FSDP."""
    return os.environ.get(SWITCH, "").lower() == "true"


def divides(accelerator: Accelerator) -> bool:
    """Whether each process is to hold a part of every network."""
    return asked() and accelerator.num_processes > 1


def place(others: Sequence[Player], trained: Sequence[Player], accelerator: Accelerator) -> None:
    """Bring networks to the process's device, whole, or of each this process's part."""
    if not divides(accelerator):
        for network in (*others, *trained):
            network.to(accelerator.device)
        return
    shard(gathered(others, trained, accelerator.mixed_precision == "bf16"), accelerator.device)
    for buffer in (b for network in (*others, *trained) for b in network.buffers()):
        buffer.data = buffer.data.to(accelerator.device)


def gathered(others: Iterable[Player], trained: Iterable[Player], bf16: bool) -> dict[nn.Module, torch.dtype | None]:
    """All bare networks, each with the dtype that its weights are gathered in, None for their own.

    bf16: the run's precision.  What trains in full is then gathered in bf16: autocast would cast what is gathered, and
    keep the copies of all weights until the backward pass.
    """
    dtypes: dict[nn.Module, torch.dtype | None] = {m: None for network in others for m in network.networks()}
    for network in trained:
        casts = bf16 and isinstance(network, Denoiser)  # a GAN's head computes in float32
        dtypes |= {m: torch.bfloat16 if casts and not adapted(m) else None for m in network.networks()}
    return dtypes


def check_launch() -> None:
    """That what accelerate was told of FSDP is what happens here.  Raises ValueError."""
    for name, allowed, remedy in FOLLOWED:
        if (value := os.environ.get(name, allowed[0]).lower()) not in allowed:
            raise ValueError(f"accelerate is configured for FSDP with {name.lower()}: {value}; {remedy}")


def check_request(config: RunConfig) -> None:
    """That a run can be divided.  Raises ValueError."""
    train, needs = config.train, config.objective.needs
    if found := needs & {"jvp", "blocks"}:
        why = {
            "jvp": "takes derivatives through the network's own operations, which gathering weights interrupts",
            "blocks": "runs a network's blocks apart, and its own forward alone gathers their weights",
        }
        raise ValueError(
            f"method {config.method!r} {why[min(found)]}, so it cannot train under FSDP; take "
            "configs/accelerate/ddp.yaml, or another method, as dmd2 or sid"
        )
    if pipeline_class(config.teacher, config.teacher_options.get("source")) == "DiTPipeline":
        raise ValueError(
            f"teacher {config.teacher!r} cannot be divided: its network uses a block's weights outside the block; take "
            "configs/accelerate/ddp.yaml"
        )
    eight = [name for name in ("generator", "critic") if getattr(train, name).kind == "adamw8bit"]
    for refused, name, remedy in (
        (train.precision == "fp16", "precision 'fp16'", "give bf16"),
        (train.compile, "train.compile", "leave it out"),
        (train.offload_teacher, "train.offload_teacher", "leave it out, each process holds but a part of the teacher"),
        (bool(eight), f"train.{(*eight, '')[0]}.kind = 'adamw8bit'", "give adamw, each process holds but a part of it"),
    ):
        if refused:
            raise ValueError(f"{name} does not go with FSDP; {remedy}")


def check_batch(batch: Batch) -> None:
    """That every process calls the networks equally often.  batch: any one.  Raises ValueError."""
    told = [batch.cond, *(more.cond for more in (batch.real, batch.pair) if more is not None)]
    if any("length" in cond.tensors for cond in told):
        raise ValueError(
            "prompts of different padded lengths take one call of this network each, and under FSDP all processes must "
            "make as many; give prompts (and a negative prompt) of one padded length, or take "
            "configs/accelerate/ddp.yaml"
        )
