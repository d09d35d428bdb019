import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.objectives.base import Turns
from fewstep.objectives.dmd2 import DMD2
from fewstep.training import checkpoint
from fewstep.training.optim import OptimConfig
from fewstep.training.trainer import Diverged, Progress, Trainer
from fewstep.types import Loss

TrainerOf = Callable[..., Trainer]
FAST = {"generator": OptimConfig(lr=1e-2), "critic": OptimConfig(lr=1e-2)}


@dataclass(frozen=True, kw_only=True)
class Broken(DMD2):
    """A generator's (or critic's) loss that is not finite at the given iterations."""

    generator_at: frozenset[int] = frozenset()
    critic_at: frozenset[int] = frozenset()

    def generator_loss(self, trio, batch, rng):
        return spoilt(super().generator_loss(trio, batch, rng), rng.iteration in self.generator_at)

    def critic_loss(self, trio, batch, rng):
        return spoilt(super().critic_loss(trio, batch, rng), rng.iteration in self.critic_at)


def spoilt(loss: Loss, now: bool) -> Loss:
    return loss._replace(total=loss.total * float("inf")) if now else loss


def broken(*, turns: Turns = Turns(), **at: Any) -> Broken:
    return Broken(guidance=1.0, turns=turns, **{k: frozenset(v) for k, v in at.items()})


def weights(networks: Any) -> dict[str, Tensor]:
    """A copy of the state of one network, or of all networks of a player."""
    networks = networks if isinstance(networks, dict) else {"": networks}
    return {f"{role}.{k}": v.clone() for role, network in networks.items() for k, v in network.state().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steps(trainer: Trainer, first: int, last: int) -> None:
    """Iterations first .. last - 1, counted as `run` counts them."""
    for iteration in range(first, last):
        trainer.step(iteration)
        trainer.progress.iteration = iteration + 1


@pytest.mark.parametrize(
    ("turns", "generator", "critic"),
    [
        (Turns(critic_per_generator=5), 20, 100),
        (Turns(critic_per_generator=5, exclusive=True), 20, 80),
        (Turns(critic_per_generator=5, critic_warmup=50), 10, 100),
        (Turns(), 100, 100),
    ],
)
def test_two_time_scales_over_100_iterations(turns: Turns, generator: int, critic: int, trainer_of: TrainerOf):
    """T10.  The optimisers are asked too.  Fails with parity counted from 1 or without the warm-up."""
    trainer = trainer_of(DMD2(guidance=1.0, turns=turns))
    steps(trainer, 0, 100)
    taken = {turn: next(iter(o.state.values()))["step"].item() for turn, o in trainer.optimizers.items()}
    assert taken == {"generator": generator, "critic": critic} == trainer.progress.updates == trainer._planned


@pytest.mark.parametrize("turn", ["generator", "critic"])
def test_non_finite_gradient_changes_nothing_but_the_count(turn: str, trainer_of: TrainerOf):
    """Weights, average and optimiser stay to the bit.  Fails if the step is taken, or the average moves anyway."""
    trainer = trainer_of(broken(**{f"{turn}_at": {3}}), ema=0.9, **FAST)
    steps(trainer, 0, 3)
    player, average = weights(trainer.players[turn]), weights(trainer.ema.denoiser)
    moments = copy.deepcopy(trainer.optimizers[turn].state_dict())
    steps(trainer, 3, 4)
    assert same(weights(trainer.players[turn]), player)
    assert same(weights(trainer.ema.denoiser), average) == (turn == "generator")
    after = trainer.optimizers[turn].state_dict()
    assert all(same(after["state"][i], moments["state"][i]) for i in moments["state"])
    other = "critic" if turn == "generator" else "generator"
    assert trainer.progress.updates == {turn: 3, other: 4}
    assert (trainer.progress.skipped, trainer.progress.skipped_in_a_row) == (1, {turn: 1, other: 0})
    steps(trainer, 4, 5)
    assert not same(weights(trainer.players[turn]), player)


def test_a_skipped_step_is_said(trainer_of: TrainerOf):
    trainer = trainer_of(broken(generator_at={1}))
    steps(trainer, 0, 2)
    said = trainer.console.file.getvalue()  # type: ignore[attr-defined]
    assert said == "iteration 1: the generator's gradient is not finite; step skipped (1 in a row, 1 in all)\n"


@pytest.mark.parametrize("turn", ["generator", "critic"])
def test_twenty_in_a_row_stop_with_advice(turn: str, trainer_of: TrainerOf):
    """Fails with one count for both players: the good steps of the other would reset it for ever."""
    trainer = trainer_of(broken(**{f"{turn}_at": range(100)}))
    steps(trainer, 0, 19)
    with pytest.raises(Diverged, match=rf"20 steps of the {turn} in a row .*--lr"):
        steps(trainer, 19, 20)


def test_recovery_resets_the_row(trainer_of: TrainerOf):
    """19 bad, 1 good, 19 bad: still running, 38 counted in all.  Fails without the reset."""
    trainer = trainer_of(broken(generator_at=set(range(39)) - {19}))
    steps(trainer, 0, 39)
    assert (trainer.progress.skipped, trainer.progress.skipped_in_a_row["generator"]) == (38, 19)
    steps(trainer, 39, 40)
    assert trainer.progress.skipped_in_a_row["generator"] == 0


def test_average_moves_only_after_generator_steps(trainer_of: TrainerOf):
    """Fails with an update in every iteration: ratio 5 would average four equal weights."""
    trainer = trainer_of(DMD2(guidance=1.0, turns=Turns(critic_per_generator=5)), ema=0.9, **FAST)
    seen = []
    for iteration in range(11):
        before = weights(trainer.ema.denoiser)
        steps(trainer, iteration, iteration + 1)
        seen.append(not same(weights(trainer.ema.denoiser), before))
    assert [i for i, moved in enumerate(seen) if moved] == [0, 5, 10]
    assert trainer.ema.updates == 3


def test_each_turn_moves_its_own_player_and_never_the_real_score(trainer_of: TrainerOf):
    """The real score is a network here, as a teacher with weights is.  Fails with one optimiser for both turns."""
    trainer = trainer_of(**FAST)
    trainer.trio.real_score = copy.deepcopy(trainer.trio.generator)
    real = weights(trainer.trio.real_score)
    for turn, other in (("generator", "critic"), ("critic", "generator")):
        mine, others = weights(trainer.players[turn]), weights(trainer.players[other])
        trainer.update(turn, 0)
        assert not same(weights(trainer.players[turn]), mine)
        assert same(weights(trainer.players[other]), others)
    assert same(weights(trainer.trio.real_score), real)
    assert all(p.grad is None for p in trainer.trio.real_score.parameters())


def test_nothing_requires_grad_after_a_turn(trainer_of: TrainerOf):
    """Fails without the clean-up at the end of `Trio.turn`."""
    trainer = trainer_of()
    steps(trainer, 0, 1)
    trained = [network for networks in trainer.players.values() for network in networks.values()]
    modules = [*trained, trainer.trio.real_score, trainer.ema.denoiser]
    assert not any(p.requires_grad or p.grad is not None for module in modules for p in module.parameters())


def test_gradient_is_clipped_to_each_players_own_norm(trainer_of: TrainerOf):
    """Fails if one player's limit is used for both.  The logged norm is the one before clipping."""
    trainer = trainer_of(generator=OptimConfig(clip=1e-3), critic=OptimConfig(clip=2e-3))
    norms = {}
    for turn, optimizer in trainer.optimizers.items():

        def stepped(turn=turn):
            norms[turn] = torch.stack([p.grad.norm() for p in trainer.trio.weights(turn)]).norm().item()

        optimizer.step = stepped
    steps(trainer, 0, 1)
    assert norms == pytest.approx({"generator": 1e-3, "critic": 2e-3}, rel=1e-3)  # torch divides by norm + 1e-6
    assert trainer.sums["critic/grad_norm"][0] > 0.1


def test_rates_follow_each_players_own_updates(trainer_of: TrainerOf):
    """Warm-up and cosine count the player's updates, not iterations.  Fails with `iteration` for `updates`."""
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    trainer = trainer_of(
        DMD2(guidance=1.0, turns=Turns(critic_per_generator=5)),
        iterations=20,
        generator=cosine,
        critic=OptimConfig(lr=1.0, warmup=9),
    )
    steps(trainer, 0, 11)  # generator updates 0, 1, 2 of 4; critic updates 0..10
    rates = {turn: o.param_groups[0]["lr"] for turn, o in trainer.optimizers.items()}
    assert rates == pytest.approx({"generator": 0.5, "critic": 1.0})


@dataclass
class Ranks:
    """A monitor with figures given in advance; it draws random numbers, as a monitor may."""

    ranks: list[float]

    def evaluate(self, student: Any, iteration: int) -> dict[str, float]:
        torch.rand(3)
        return {"rank": self.ranks.pop(0)}


def test_best_checkpoint_is_kept_and_not_a_number_is_never_best(trainer_of: TrainerOf):
    """Ranks nan, 3, 5, 2, nan at 10..50.  Fails with `rank >= best` as the test of improvement: nan stays best."""
    trainer = trainer_of(iterations=50, evaluate_every=10, checkpoint_every=7, keep=1)
    trainer.monitor = Ranks([float("nan"), 3.0, 5.0, 2.0, float("nan")])
    progress = trainer.run()
    assert progress.best == {"iteration": 40, "rank": 2.0}
    assert sorted(int(p.name) for p in checkpoint.all_of(trainer.out)) == [40, 50]


def test_network_that_draws_from_the_global_generator_resumes_exactly(trainer_of: TrainerOf, tmp_path: Path):
    """Dropout.  Fails without the seed at the start of each iteration."""
    whole = trainer_of(dropout=True, out=tmp_path / "whole", ema=0.9, **FAST)
    steps(whole, 0, 7)
    first = trainer_of(dropout=True, out=tmp_path / "parts", ema=0.9, **FAST)
    steps(first, 0, 4)
    folder = first.save()
    torch.manual_seed(12345)
    second = trainer_of(dropout=True, out=tmp_path / "parts", ema=0.9, **FAST)
    torch.rand(7)
    second.load(folder)
    steps(second, 4, 7)
    for turn in ("generator", "critic"):
        assert same(weights(second.players[turn]), weights(whole.players[turn]))
    assert same(weights(second.ema.denoiser), weights(whole.ema.denoiser))
    assert not same(weights(whole.players["generator"]), weights(first.players["generator"]))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_student_is_judged_in_eval_mode_and_trained_in_train_mode(decay: float, trainer_of: TrainerOf):
    """Fails if the generator, which is judged itself where nothing is averaged, keeps its dropout or loses it."""
    seen = []

    class Judge:
        def evaluate(self, student: Any, iteration: int) -> dict[str, float]:
            seen.append((student is trainer.trio.generator, student.training))
            return {}

    trainer = trainer_of(dropout=True, ema=decay, iterations=2, evaluate_every=1)
    trainer.monitor = Judge()
    trainer.run()
    assert seen == 2 * [(decay == 0, False)]
    assert trainer.trio.generator.training


def test_dropout_does_draw(trainer_of: TrainerOf):
    """Guards the test above."""
    trainer = trainer_of(dropout=True)
    student, cond = trainer.trio.generator, trainer.data.batch(range(64)).cond
    x, t = torch.randn(64, 2), torch.ones(64)
    assert not torch.equal(student(x, t, cond).x0, student(x, t, cond).x0)


def test_metrics_between_two_rows_survive_a_resume(trainer_of: TrainerOf, tmp_path: Path):
    """A row is the mean over its whole interval.  Fails if a checkpoint forgets what was not yet logged."""
    whole, parts = (trainer_of(out=tmp_path / name, log_every=10, iterations=10) for name in ("whole", "parts"))
    whole.run()
    steps(parts, 0, 6)
    folder = parts.save()
    resumed = trainer_of(out=tmp_path / "parts", log_every=10, iterations=10)
    resumed.load(folder)
    resumed.run()
    rows = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("whole", "parts")]
    for row in rows:
        del row["seconds"]
    assert rows[0] == rows[1]


def test_progress_is_json_and_back(trainer_of: TrainerOf):
    progress = Progress(iteration=3, best={"iteration": 2, "rank": 0.1})
    progress.updated("critic"), progress.skip("generator")
    assert Progress(**json.loads(json.dumps(vars(progress)))) == progress


def test_batch_that_does_not_split_is_refused(trainer_of: TrainerOf):
    with pytest.raises(ValueError, match="not a multiple of accumulate"):
        trainer_of(batch_size=6, accumulate=4)


def test_a_method_without_a_fake_score_has_no_critics_turn(trainer_of: TrainerOf):
    """Turns name a critic by default.  Fails with a bare KeyError if the loop asks for a player that is not there."""

    @dataclass(frozen=True, kw_only=True)
    class Regression(DMD2):
        roles = frozenset()

        def generator_loss(self, trio, batch, rng):
            return Loss(self.rollout(trio, batch, rng).x.square().mean())

    trainer = trainer_of(Regression(guidance=1.0, turns=Turns()))
    steps(trainer, 0, 3)
    assert trainer.progress.updates == {"generator": 3, "critic": 0}


def test_a_skipped_steps_figures_are_not_logged(trainer_of: TrainerOf):
    """Fails if they are collected before the finite check: one NaN would be the mean of the whole interval."""
    trainer = trainer_of(broken(generator_at=[1]))
    steps(trainer, 0, 3)
    assert len(trainer.sums["dm"]) == 2 and len(trainer.sums["critic"]) == 3


def test_a_resumed_run_cannot_shrink(trainer_of: TrainerOf):
    longer = trainer_of(iterations=5)
    steps(longer, 0, 4)
    with pytest.raises(ValueError, match="has done 4; a resumed run may only grow"):
        trainer_of(iterations=3).load(longer.save())


def test_accelerates_own_accumulation_is_refused(trainer_of: TrainerOf, monkeypatch: pytest.MonkeyPatch):
    """It would divide the loss once more.  Fails without the check."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"4 gradient accumulation steps.*train\.accumulate"):
        trainer_of()


def test_an_evaluation_that_fails_ends_the_run(trainer_of: TrainerOf):
    class Failing:
        def evaluate(self, student: Any, iteration: int) -> dict[str, float]:
            raise ArithmeticError("no figure")

    trainer = trainer_of(iterations=2, evaluate_every=1)
    trainer.monitor = Failing()
    with pytest.raises(ArithmeticError, match="no figure"):
        trainer.run()
