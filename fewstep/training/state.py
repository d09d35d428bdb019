"""What a checkpoint holds of a trainer, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.models.sharding import whole
from fewstep.training import checkpoint
from fewstep.training.progress import Progress

if TYPE_CHECKING:
    from fewstep.training.trainer import Trainer


def capture(trainer: Trainer, unlogged: dict[str, Tensor]) -> checkpoint.Checkpoint:
    """Everything that a resumed run needs.  unlogged: means of what was collected since the last log line.

    Of sharded networks every process must ask; only the main one gets their tensors.
    """
    tensors: dict[str, dict[str, Tensor]] = {"ema": trainer.ema.denoiser.state(), "unlogged": unlogged}
    extra: dict[str, Any] = {}
    for turn, networks in trainer.players.items():
        tensors |= {role: network.state() for role, network in networks.items()}
        tensors[f"optimizer_{turn}"], extra[turn] = checkpoint.pack_optimizer(trainer.optimizers[turn])
    scaler = trainer.accelerator.scaler
    if trainer.sharded:
        tensors = {stem: _gathered(some, trainer.accelerator.is_main_process) for stem, some in tensors.items()}
    return checkpoint.Checkpoint(
        tensors,
        {
            "progress": vars(trainer.progress),
            "optimizers": extra,
            "ema_updates": trainer.ema.updates,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "stage_ends": trainer.stages.ends[:-1],
            "prompts": trainer.data.digest,
            "teacher": trainer.teacher_weights,
        },
    )


def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All of each, one after the other: on the CPU if it is to be kept, gone at once if not."""
    made = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            made[name] = full.cpu()
    return made


def restore(trainer: Trainer, folder: Path) -> None:
    """Put a checkpoint back.  Raises ValueError if it is damaged, or of another teacher, other data or other stages."""
    saved = checkpoint.read(folder)
    _check(trainer, folder, saved.state)
    trainer.progress = Progress(**saved.state["progress"])
    trainer.begin(trainer.progress.stage)
    trainer.sums = {k: list(v.to(trainer.accelerator.device)) for k, v in saved.tensors["unlogged"].items()}
    trainer.ema.denoiser.load(saved.tensors["ema"])
    trainer.ema.updates = saved.state["ema_updates"]
    for turn, networks in trainer.players.items():
        for role, network in networks.items():
            network.load(saved.tensors[role])
        tensors = saved.tensors[f"optimizer_{turn}"]
        checkpoint.unpack_optimizer(trainer.optimizers[turn], tensors, saved.state["optimizers"][turn])
    if trainer.accelerator.scaler is not None and saved.state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(saved.state["scaler"])


def _check(trainer: Trainer, folder: Path, state: Any) -> None:
    if state["prompts"] != trainer.data.digest:
        raise ValueError(
            f"{folder} was trained on other prompts or real samples; give the old ones, or start another run"
        )
    if state["teacher"] != trainer.teacher_weights:
        raise ValueError(f"{folder} was trained on other teacher weights; name their revision, or start another run")
    if state["progress"]["iteration"] > trainer.config.iterations:
        raise ValueError(
            f"iterations = {trainer.config.iterations}, but {folder} has done {state['progress']['iteration']}; "
            "a resumed run may only grow"
        )
    if tuple(state.get("stage_ends", ())) != trainer.stages.ends[:-1]:
        raise ValueError(
            f"iterations = {trainer.config.iterations} would move the ends of the stages that {folder} was trained "
            "in; give the old number"
        )
