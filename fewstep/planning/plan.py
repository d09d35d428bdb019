"""A plan: the method's own iteration on tensors without numbers, and what it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fewstep.config import RunConfig
from fewstep.models.sharding import gathered
from fewstep.planning.device import Fused
from fewstep.planning.ledger import Category, Ledger, Peak
from fewstep.teachers.outline import outline, size_of
from fewstep.training import fsdp
from fewstep.training.options import TrainConfig
from fewstep.training.rehearsal import Rehearsal, rehearse
from fewstep.types import Turn

GIB = 2**30
SHARDED: tuple[Category, ...] = ("weights", "gradients", "optimiser", "ema")
OVERHEAD, FRAGMENTATION = 1.0, 0.08
"""Of a GPU beside tensors: GiB of CUDA's context, its libraries' code and workspaces; and the allocator's gaps.

On an H200 it was .75 GiB, and 2 to 7% of the tensors' peak (eval/results/plan_check.jsonl)."""

OFF = {"lpips": "method.distance=mse", "clip": "method.clip_weight=0", "black": "method.black_filter=false"}


@dataclass(frozen=True)
class Part:
    """One player's update.

    peak: bytes by category.  flops: of one update on one GPU.  calls: of networks, by role and micro-batch.
    share: of the iterations of a run that have it.
    """

    peak: Peak
    flops: float
    calls: dict[str, int]
    share: float


@dataclass(frozen=True)
class Plan:
    """What a distillation would take on each of its GPUs.

    size: pixels of a sample, (height, width) or (frames, height, width).  parameters, trained: numbers by role.  parts:
    by turn.
    gpus, sharded: FSDP divides weights, gradients and optimiser states among them.  gathered: bytes that it has whole.
    """

    config: RunConfig
    size: tuple[int, ...]
    micro_batch: int
    parameters: dict[str, int]
    trained: dict[str, int]
    parts: dict[Turn, Part]
    gpus: int = 1
    sharded: bool = False
    gathered: int = 0

    def bytes(self, turn: Turn) -> dict[Category, int]:
        """At the peak of a turn, by category, on one GPU."""
        held = self.parts[turn].peak.bytes
        if not self.sharded:
            return dict(held)
        parts: dict[Category, int] = {
            kind: size // self.gpus if kind in SHARDED else size for kind, size in held.items()
        }
        parts["gathered"] = self.gathered
        return parts

    @property
    def peak(self) -> int:
        """Bytes of tensors at the most."""
        return max(sum(self.bytes(turn).values()) for turn in self.parts)

    @property
    def needed(self) -> float:
        """GiB of a GPU's memory: the tensors' peak and what is beside them."""
        return self.peak / GIB * (1 + FRAGMENTATION) + OVERHEAD

    @property
    def flops(self) -> float:
        """Of a mean iteration, on one GPU."""
        return sum(part.share * part.flops for part in self.parts.values())


def plan(config: RunConfig, *, gpus: int = 1, sharded: bool = False, device: str = "cuda") -> Plan:
    """Run one iteration of a resolved configuration without numbers and see what it takes.

    That is the trainer's own iteration: the longest (rollouts go to their last step, in the last stage), once the
    optimisers have their states.  Two micro-batches stand for more.  VAE and text encoders are not in it.
    device: cuda, or cpu, which steps weight by weight.
    Raises ValueError or LookupError for what cannot be planned.
    """
    _check(config, gpus, sharded)
    options: dict[str, Any] = dict(config.teacher_options)
    teacher = outline(config.teacher, **options)
    micro = config.train.batch_size // (config.train.accumulate * gpus)
    repeats = min(2, config.train.accumulate)
    train = replace(
        config.train, batch_size=micro * repeats, accumulate=repeats, device="cpu", compile=False, attention="auto"
    )
    trainer = rehearse(replace(config, train=train, student=None), teacher)
    again, found = config.train.accumulate / repeats, {}
    for turn, peak, calls in _iteration(trainer, foreach=device == "cuda", sharded=sharded):
        each = {role: count // repeats for role, count in calls.items()}
        found[turn] = Part(peak, peak.flops * again, each, _share(trainer, turn))
    players = {role: player for networks in trainer.players.values() for role, player in networks.items()}
    return Plan(
        config,
        size_of(config.teacher, teacher.shape, **options),
        micro,
        {"teacher": _count(trainer.trio.real_score)},
        {role: sum(p.numel() for p in player.weights().values()) for role, player in players.items()},
        found,
        gpus,
        sharded,
        _gathered(trainer) if sharded else 0,
    )


def _gathered(trainer: Rehearsal) -> int:
    """Bytes that FSDP has whole on a GPU: the weights at work, those on their way, and gradients of what trains."""
    trained = [network for networks in trainer.players.values() for network in networks.values()]
    dtypes = fsdp.gathered([trainer.trio.real_score], trained, trainer.config.precision == "bf16")
    frozen = trainer.trio.real_score.networks()
    return max((2 if m in frozen else 3) * gathered(m, dtype) for m, dtype in dtypes.items())


def _iteration(trainer: Rehearsal, *, foreach: bool, sharded: bool) -> Iterator[tuple[Turn, Peak, Counter[str]]]:
    """Each player's update in turn: its peak and the calls of networks."""
    ledger, calls = Ledger(), Counter()
    # Of sharded networks autocast copies no weights: those that it would copy are gathered in its dtype.
    fused = Fused(lambda copy: ledger.claim([copy], "gathered")) if sharded else Fused()
    trio, last = trainer.trio, trainer.config.iterations - 1
    ledger.claim(_tensors(trainer.ema.denoiser), "ema")
    if trainer.offload is not None:  # its weights are made anew at each visit
        trio.real_score.register_forward_pre_hook(lambda *_: ledger.claim(_tensors(trio.real_score), "weights"))
    for network in (trio.real_score, *(n for networks in trainer.players.values() for n in networks.values())):
        if network is not trio.real_score or trainer.offload is None:
            ledger.claim(_tensors(network), "weights")
        for module in network.networks():
            module.register_forward_hook(lambda *_: fused.forget())  # autocast is around its forward
    for role in ("generator", "real_score", "fake_score"):
        network = getattr(trio, role)
        for module in network.networks() if network is not None else ():
            module.register_forward_hook(_counting(calls, role))
    with ledger, fused():
        for turn in trainer.players:
            _prepare(trainer, turn, ledger, foreach)
        for turn in trainer.players:
            calls.clear()
            seen: dict[str, Peak] = {}
            with ledger.part(seen, turn):
                trainer.update(turn, last)
            yield turn, seen[turn], calls


def _prepare(trainer: Rehearsal, turn: Turn, ledger: Ledger, foreach: bool) -> None:
    """Give a player's optimiser its states, and have the ledger told of gradients and of what the optimiser makes."""
    optimizer, weights = trainer.optimizers[turn], trainer.trio.weights(turn)
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    inner: Any = optimizer.optimizer  # type: ignore[attr-defined]  # accelerate's wrapper calls it
    inner.register_step_pre_hook(lambda *_: setattr(ledger, "making", "optimiser"))
    inner.register_step_post_hook(lambda *_: setattr(ledger, "making", "activations"))
    for p in weights:
        p.requires_grad_(True)
        p.register_post_accumulate_grad_hook(lambda p: ledger.claim([p.grad], "gradients"))
        p.requires_grad_(False)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _counting(calls: Counter[str], role: str) -> Callable[..., None]:
    def count(*_: Any) -> None:
        calls[role] += 1

    return count


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _share(trainer: Rehearsal, turn: Turn) -> float:
    stages = trainer.stages
    updates = sum(stages.planned(stage, turn) for stage in range(len(stages)))
    return updates / trainer.config.iterations


def _check(config: RunConfig, gpus: int, sharded: bool) -> None:
    if gpus < 1:
        raise ValueError(f"gpus must be >= 1, got {gpus}")
    if sharded and gpus == 1:
        raise ValueError("--fsdp divides weights among several GPUs; give --gpus too")
    if sharded:
        fsdp.check_request(config)
    train: TrainConfig = config.train
    if train.batch_size % (train.accumulate * gpus):
        raise ValueError(
            f"batch_size {train.batch_size} is not a multiple of accumulate x gpus = {train.accumulate} x {gpus}"
        )
    if looking := [need for need in OFF if need in config.objective.needs]:
        sets = " ".join(f"--set {OFF[need]}" for need in looking)
        raise ValueError(
            f"method {config.method!r} looks at decoded pictures ({', '.join(looking)}), and a plan holds no VAE; plan "
            f"it with {sets}, and add what the decoder takes"
        )
