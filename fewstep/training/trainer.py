"""The one loop: turns, backward, clip, step, EMA, log, checkpoint.  Objectives never see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from fewstep.models import sharding
from fewstep.models.denoiser import Denoiser, uncompiled
from fewstep.models.ema import EMA
from fewstep.models.offload import Offload
from fewstep.models.trio import Trio
from fewstep.objectives.base import Objective
from fewstep.objectives.terms import shares
from fewstep.rng import Rng, key
from fewstep.training import checkpoint, fsdp, parallel
from fewstep.training.boards import open_board
from fewstep.training.data import PromptData
from fewstep.training.optim import build_optimizer, learning_rate
from fewstep.training.options import TrainConfig
from fewstep.training.progress import PATIENCE, Diverged, Interrupted, Progress
from fewstep.training.signals import stop_signals
from fewstep.training.stages import Stages
from fewstep.training.state import capture, restore
from fewstep.training.tracking import Tracker
from fewstep.types import Loss, Turn

__all__ = ["Diverged", "Interrupted", "Monitor", "Progress", "Trainer"]


class Monitor(Protocol):
    """Judges the averaged student at a cadence, on all processes: pictures and a cheap figure."""

    def evaluate(self, student: Denoiser, iteration: int) -> dict[str, float]:
        """Figures to log, the main process's; "rank", if present, orders checkpoints (lower is better)."""
        ...


class Trainer:
    """Trains a trio on an objective.

    out: the run folder.  monitor: judges the student every `evaluate_every` iterations.
    """

    rng: ClassVar[type[Rng]] = Rng
    optimizer: ClassVar[Callable[..., Optimizer]] = staticmethod(build_optimizer)

    def __init__(
        self,
        config: TrainConfig,
        trio: Trio,
        objective: Objective,
        data: PromptData,
        *,
        out: Path,
        accelerator: Accelerator,
        monitor: Monitor | None = None,
        console: Console | None = None,
    ) -> None:
        ranks = accelerator.num_processes
        if config.batch_size % (config.accumulate * ranks):
            raise ValueError(
                f"batch_size {config.batch_size} is not a multiple of accumulate x processes = "
                f"{config.accumulate} x {ranks}"
            )
        self.config, self.trio, self.data = config, trio, data
        self.stages = Stages(objective, config.iterations)
        self.out, self.accelerator, self.monitor = out, accelerator, monitor
        self.sharded = fsdp.divides(accelerator)
        self.console = console or Console(stderr=True)
        self.progress = Progress()
        self.ema = EMA(trio.generator, config.ema)
        self.sums: dict[str, list[Tensor]] = {}
        self._prepare()
        self.begin(0)

    # -- one run ------------------------------------------------------------------------------------------------

    def run(self) -> Progress:
        """Train to the last iteration.

        Raises Interrupted after a SIGINT or SIGTERM was answered with a checkpoint, Diverged if 20 steps in a row
        had non-finite gradients.
        """
        start, total = self.progress.iteration, self.config.iterations
        main = self.accelerator.is_main_process
        console = self.console if main else Console(quiet=True)
        more: dict[str, Any] = {"seconds": self.progress.seconds, "tensorboard": self.config.tensorboard, "main": main}
        if main and self.config.trackers:
            more["boards"] = [open_board(name, self.out, asdict(self.config)) for name in self.config.trackers]
        tracker = Tracker(self.out, total=total, start=start, console=console, **more)
        with tracker as self.tracker, stop_signals() as caught:
            for iteration in range(start, total):
                self.step(iteration)
                self.progress.iteration = iteration + 1
                self.tracker.advance(iteration + 1)
                saved = self._cadence(iteration + 1)
                if signum := self._agree(caught[0] if caught else 0):
                    raise Interrupted(signum, saved or self.save())
        return self.progress

    def step(self, iteration: int) -> None:
        """One iteration: the objective's turns, in order."""
        # Dropout and the like draw from the global generator; keyed by iteration it needs no place in a checkpoint.
        torch.manual_seed(key(self.config.seed, iteration, self.accelerator.process_index))
        if (stage := self.stages.at(iteration)) != self.progress.stage:
            self._enter(stage)
        for turn in self.objective.turns.at(iteration - self.stages.starts[stage]):
            if turn in self.players:  # a method without a fake score has no critic's turn
                self.update(turn, iteration)

    def update(self, turn: Turn, iteration: int) -> None:
        """One player's update: losses of all micro-batches, backward, clip, step."""
        optimizer, config = self.optimizers[turn], getattr(self.config, turn)
        done = self.progress.updates[turn] - self.progress.before[turn]
        rate = learning_rate(config, done, self._planned[turn]) * self.stages.rate(self.progress.stage)
        since = iteration - self.stages.starts[self.progress.stage]  # a stage's objective counts from its own start
        for group in optimizer.param_groups:
            group["lr"] = rate
        metrics = []
        with self.trio.turn(turn):
            for ids in self._micro_batches(iteration):
                batch = self.data.batch(ids, self.accelerator.device)
                rng = self.rng(self.config.seed, since, turn, ids, self.accelerator.device)
                losses = getattr(self.objective, f"{turn}_loss")(self.trio, batch, rng)
                for loss in [losses] if isinstance(losses, Loss) else losses:
                    self.accelerator.backward(loss.total / self.config.accumulate)
                    if self.offload is not None:
                        self.offload.leave()
                    metrics.append({**loss.metrics, **shares(loss.grads)})
            if self._descend(turn, optimizer, config.clip):  # a skipped step's NaN would be the whole interval's mean
                for row in metrics:
                    self._collect(row)

    def _descend(self, turn: Turn, optimizer: Any, clip: float) -> bool:
        """Clip and step, or skip and count if the gradient is not finite; True if it was a step.

        The norm is the step's only synchronisation.
        """
        weights = self.trio.weights(turn)
        parallel.average_gradients(weights, self.accelerator)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(optimizer)
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(weights, clip))
        finite = bool(norm.isfinite())
        if finite:
            self._collect({f"{turn}/grad_norm": norm})
        if finite or self.accelerator.scaler is not None:  # a loss scaler skips by itself, and learns from it
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if finite:
            self.progress.updated(turn)
            if turn == "generator":
                self.ema.update(self.trio.generator)
        else:
            self._skipped(turn)
        return finite

    def _skipped(self, turn: Turn) -> None:
        self.tracker.say(self.progress.skip(turn))
        if self.progress.skipped_in_a_row[turn] >= PATIENCE:
            raise Diverged(
                f"{PATIENCE} steps of the {turn} in a row had non-finite gradients. Start anew with --overwrite and a "
                f"lower learning rate (--lr), or --precision fp32 or bf16; what {self.out} holds can be evaluated."
            )

    def _micro_batches(self, iteration: int) -> Iterator[tuple[int, ...]]:
        """This rank's global sample indices, micro-batch by micro-batch."""
        size = self.config.batch_size // self.accelerator.num_processes
        first = iteration * self.config.batch_size + self.accelerator.process_index * size
        micro = size // self.config.accumulate
        for part in range(self.config.accumulate):
            start = first + part * micro
            yield tuple(range(start, start + micro))

    def _prepare(self) -> None:
        """Hand networks and optimisers to accelerate: device, autocast, loss scaling."""
        self.players = self.trio.players()
        trained = [network for networks in self.players.values() for network in networks.values()]
        fsdp.place((self.trio.real_score, self.ema.denoiser), trained, self.accelerator)
        for network in (self.trio.real_score, *trained):
            for module in network.networks():
                parallel.prepare(module, self.accelerator)
            if self.config.compile and isinstance(network, Denoiser):
                network.compile_networks()
        device = self.accelerator.device
        away = self.config.offload_teacher and device.type != "cpu"
        self.offload = Offload(self.trio.real_score, device, trained) if away else None

    def begin(self, stage: int) -> None:
        """Set a stage up, as the run begins, goes from one to the next, or resumes."""
        self.objective = self.stages[stage]
        if begin := getattr(self.objective, "begin", None):
            begin(self.trio)
        self.optimizers = {
            turn: self.accelerator.prepare_optimizer(self.optimizer(self.trio.weights(turn), config))
            for turn, config in (("generator", self.config.generator), ("critic", self.config.critic))
            if turn in self.players
        }
        self._planned = {turn: self.stages.planned(stage, turn) for turn in self.players}

    def _enter(self, stage: int) -> None:
        """Go from one stage to the next: what the last one learned, on average, is what this one builds on."""
        self.trio.generator.load(self.ema.denoiser.state())
        self.ema.restart(self.trio.generator)
        self.trio.reset_fake_score()
        self.progress.enter(stage)
        self.begin(stage)
        self.tracker.say(f"stage {stage + 1} of {len(self.stages)}, to iteration {self.stages.ends[stage]}")

    # -- cadences -----------------------------------------------------------------------------------------------

    def _cadence(self, done: int) -> Path | None:
        """After `done` iterations: log, evaluate, save, each when due; everything at the end.  Returns what it saved.

        A stop that was asked for leaves none of it out: the resumed run goes on after this iteration.
        """
        end = done == self.config.iterations
        if done % self.config.log_every == 0 or end:
            self._log(done)
        self.progress.seconds = self.tracker.seconds
        improved = (done % self.config.evaluate_every == 0 or end) and self._evaluate(done)
        self.progress.seconds = self.tracker.seconds
        return self.save() if improved or end or done % self.config.checkpoint_every == 0 else None

    def _agree(self, value: int) -> int:
        """What one process must do (save, stop), all do at the same iteration."""
        return parallel.largest(value, self.accelerator)

    def _log(self, done: int) -> None:
        means = {k: parallel.mean(torch.stack(v).mean(), self.accelerator) for k, v in self.sums.items()}
        self.sums = {}
        row: dict[str, float | int] = {name: float(value) for name, value in sorted(means.items())}
        row |= {"generator_updates": self.progress.updates["generator"], "skipped": self.progress.skipped}
        if self.accelerator.is_main_process:
            self.tracker.log(done, row, images=done * self.config.batch_size)

    def _evaluate(self, done: int) -> bool:
        """Judge the averaged student; True on all processes if it is the best so far.  On errors, save."""
        improved, failed = False, True
        try:
            with parallel.failing_together("the evaluation", self.accelerator):
                improved = self._judge(done)
            failed = False
        finally:
            if failed:
                self.save()
        return bool(self._agree(improved))

    def _judge(self, done: int) -> bool:
        main = self.accelerator.is_main_process
        if self.monitor is None:
            return False
        student = self.ema.denoiser
        training = student.training  # without an average, it is the generator itself
        # Its batches are of other sizes, and each would be compiled anew; the teacher's weights are the real score's.
        with uncompiled(), self.offload.staying() if self.offload is not None else nullcontext():
            figures = self.monitor.evaluate(student.eval(), done)
        student.train(training)
        if not main:
            return False
        rank = figures.pop("rank", None)
        self.tracker.log(done, {f"eval/{name}": value for name, value in figures.items()})
        self.tracker.say(f"iteration {done}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        self.tracker.advise(asdict(self.config))
        improved = self.progress.is_best(rank)
        if rank is not None and improved:
            self.progress.best = {"iteration": done, "rank": rank}
        return improved

    def _collect(self, metrics: Any) -> None:
        for name, value in metrics.items():
            self.sums.setdefault(name, []).append(value.detach().float())

    # -- state --------------------------------------------------------------------------------------------------

    @cached_property
    def teacher_weights(self) -> str:
        """Tells by which teacher a checkpoint was made."""
        return checkpoint.fingerprint(self.trio.real_score)

    def save(self) -> Path:
        """Write a checkpoint of the present iteration, then delete what `keep` does not cover."""
        folder = checkpoint.folder_of(self.out, self.progress.iteration)
        unlogged = {k: parallel.mean(torch.stack(v), self.accelerator) for k, v in self.sums.items()}
        with parallel.failing_together("saving", self.accelerator):
            state = capture(self, unlogged)
            if self.accelerator.is_main_process:
                checkpoint.write(folder, state)
                best = self.progress.best
                kept = int(best["iteration"]) if best else None
                checkpoint.prune(self.out, self.config.keep, kept, written=folder)
        return folder

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.  Raises ValueError if it is damaged, or not of this run's data and teacher."""
        restore(self, folder)
