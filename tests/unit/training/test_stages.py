"""A run of several stages: what begins anew at each, and that a resumed run does not tell the difference."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fewstep.objectives.base import Turns
from fewstep.objectives.dmd2 import DMD2
from fewstep.objectives.phased_dmd import PhasedDMD
from fewstep.objectives.tmd import TMD
from fewstep.training.optim import OptimConfig
from fewstep.training.stages import Stages
from fewstep.training.trainer import Trainer

TrainerOf = Callable[..., Trainer]
METHOD = PhasedDMD(num_steps=2, guidance=1.0, turns=Turns(critic_per_generator=2))


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every weight that the run has: generator's, average's, fake score's."""
    networks = {"g": trainer.trio.generator, "ema": trainer.ema.denoiser, "fake": trainer.trio.critic()}
    return {f"{role}.{k}": v.clone() for role, network in networks.items() for k, v in network.state().items()}


def test_stages_divide_the_iterations():
    stages = Stages(METHOD, 11)
    assert stages.starts == (0, 6) and stages.ends == (6, 11)
    assert [stages.at(i) for i in (0, 5, 6, 10, 11)] == [0, 0, 1, 1, 1]
    assert [stages[k].phase for k in range(2)] == [0, 1]
    assert (stages.planned(0, "generator"), stages.planned(1, "generator")) == (3, 3)
    plain = DMD2(guidance=1.0)
    assert Stages(plain, 11).ends == (11,) and Stages(plain, 11)[0] is plain


def test_a_stage_without_iterations_is_refused():
    with pytest.raises(ValueError, match="more --iterations"):
        Stages(METHOD, 1)


def test_what_begins_anew_at_a_stage(trainer_of: TrainerOf):
    """The fake score is the teacher's copy again, optimisers are empty, the trained expert is its own average and stays
    so.  Fails if any of these is forgotten; each would go unnoticed in the losses."""
    trainer = trainer_of(METHOD, iterations=12, ema=0.9, generator=OptimConfig(warmup=3))
    start = snapshot(trainer)
    for i in range(6):
        trainer.step(i)
    before = snapshot(trainer)
    assert any(not torch.equal(before[k], start[k]) for k in before if k.startswith("fake"))
    assert any(not torch.equal(before[f"g.{k}"], before[f"ema.{k}"]) for k in trainer.trio.generator.state())
    trainer._enter(1)
    after = snapshot(trainer)
    for name, value in after.items():
        role, key = name.split(".", 1)
        wanted = before[f"ema.{key}"] if role != "fake" else start[name]
        assert_close(value, wanted, atol=0, rtol=0)
    assert not trainer.optimizers["generator"].state and not trainer.optimizers["critic"].state
    assert trainer.ema.updates == 0 and trainer.progress.before == {"generator": 3, "critic": 6}
    for i in range(6, 12):
        trainer.step(i)
    end = snapshot(trainer)
    assert all(torch.equal(end[k], after[k]) for k in end if k.startswith(("g.0.", "ema.0.")))
    for prefix in ("g.1.", "ema.1.", "fake."):
        assert any(not torch.equal(end[k], after[k]) for k in end if k.startswith(prefix))


def test_rates_start_anew(trainer_of: TrainerOf):
    """Warm-up and decay are a stage's own."""
    trainer = trainer_of(METHOD, iterations=12, generator=OptimConfig(warmup=1, schedule="cosine", lr=1e-3))
    rates = []
    for i in range(12):
        trainer.step(i)
        rates.append(trainer.optimizers["generator"].param_groups[0]["lr"])
    assert rates[0:6:2] == rates[6:12:2] and rates[0] == pytest.approx(5e-4)


@pytest.mark.parametrize("stop", [4, 6, 9])
def test_a_resumed_run_is_the_unbroken_one(stop: int, trainer_of: TrainerOf, tmp_path: Path):
    """Before, at and after the change of stages, bit by bit.  Fails if a stage is entered twice or not at all."""
    whole = trainer_of(METHOD, iterations=12, ema=0.9, out=tmp_path / "whole")
    for i in range(12):
        whole.step(i)
    first = trainer_of(METHOD, iterations=12, ema=0.9, out=tmp_path / "part")
    for i in range(stop):
        first.step(i)
        first.progress.iteration = i + 1
    folder = first.save()
    again = trainer_of(METHOD, iterations=12, ema=0.9, out=tmp_path / "part")
    again.load(folder)
    for i in range(stop, 12):
        again.step(i)
    wanted = snapshot(whole)
    for name, value in snapshot(again).items():
        assert_close(value, wanted[name], atol=0, rtol=0)


def test_a_resumed_run_of_stages_keeps_its_length(trainer_of: TrainerOf, tmp_path: Path):
    """More iterations would move the change of stages into what is done."""
    first = trainer_of(METHOD, iterations=12, out=tmp_path / "part")
    folder = first.save()
    with pytest.raises(ValueError, match="would move the ends of the stages"):
        trainer_of(METHOD, iterations=20, out=tmp_path / "part").load(folder)
    trainer_of(DMD2(guidance=1.0), iterations=12, out=tmp_path / "plain").save()


def test_objectives_count_from_their_stages_start(trainer_of: TrainerOf, monkeypatch: pytest.MonkeyPatch):
    """What starts late in a method looks at rng.iteration."""
    seen, plain = [], PhasedDMD.critic_loss

    def spy(self, trio, batch, rng):
        seen.append((self.phase, rng.iteration))
        return plain(self, trio, batch, rng)

    monkeypatch.setattr(PhasedDMD, "critic_loss", spy)
    trainer = trainer_of(METHOD, iterations=4)
    for i in range(4):
        trainer.step(i)
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_stage_has_learning_rates_of_its_own(trainer_of: TrainerOf):
    """Fails if a stage's rate is forgotten, or carried into the next."""
    trainer = trainer_of(METHOD, iterations=12, generator=OptimConfig(lr=1e-3), critic=OptimConfig(lr=1e-4))
    first, second = trainer.stages.stages
    trainer.stages.stages = (first._replace(rate=3.0), second)
    seen = []
    for i in (0, 6):
        trainer.step(i)
        seen.append([trainer.optimizers[turn].param_groups[0]["lr"] for turn in ("generator", "critic")])
    assert seen == [pytest.approx([3e-3, 3e-4]), pytest.approx([1e-3, 1e-4])]


def test_transition_matching_passes_its_rate_on():
    assert [stage.rate for stage in TMD(pretraining_rate=3.0).stages] == [3.0, 1.0]
