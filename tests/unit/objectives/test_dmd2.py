"""DMD2 as a whole: its ranges, its guidance, its turns, and who gets gradients (T7-T8, T10)."""

import dataclasses

import pytest
from torch.testing import assert_close

from fewstep.objectives.base import Turns
from fewstep.objectives.dmd2 import DMD2
from fewstep.rng import Rng
from tests.affine import batch, check_isolation, rng, trio


def test_the_generators_gradient_is_the_score_difference_by_hand():
    """The whole step re-computed with plain tensors: rollout, re-noising, guidance, normaliser, chain rule."""
    players, method = trio(), DMD2(guidance=2.0)
    with players.turn("generator"):
        method.generator_loss(players, batch(), rng()).total.backward()
    draws = rng()
    z = draws.randn("rollout.noise", (1, 4, 3))
    t = method.law(20, 980).sample(draws, "matching.t")[:, None, None, None]
    prompt = 0.1 * batch().cond.tensors["prompt"][:, :, None, None]
    x = 0.5 * z + 0.1 + prompt
    x_t = (1 - t) * x + t * draws.randn("matching.eps", (1, 4, 3))
    conditional, unconditional = 0.3 * x_t + 0.2 + prompt, 0.3 * x_t + 0.2
    real = unconditional + 2.0 * (conditional - unconditional)
    fake = 0.4 * x_t - 0.1 + prompt
    g = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    net = players.generator.backbone
    assert_close(net.w.grad, (g * z).mean())
    assert_close(net.b.grad, g.mean())


def test_only_the_real_score_is_guided_and_both_branches_see_one_state():
    """T7.  Fails if the fake score is guided too, or if the branches draw noise of their own."""
    players = trio()
    DMD2(guidance=2.0).generator_loss(players, batch(), rng())
    real, fake = players.real_score.backbone.seen, players.fake_score.backbone.seen
    assert len(real) == 2 and len(fake) == 1
    assert_close(real[0][0], real[1][0])
    assert_close(real[0][1], real[1][1])
    assert_close(real[0][0], fake[0][0])
    assert real[0][2].sum() > 0 and real[1][2].sum() == 0 and fake[0][2].sum() > 0


def test_guidance_one_asks_the_real_score_once():
    players = trio()
    DMD2(guidance=1.0).generator_loss(players, batch(), rng())
    assert len(players.real_score.backbone.seen) == 1


def test_re_noising_times_lie_on_the_papers_indices():
    """T8: 20..980 for the matching term, 0..999 for the fake score, both ends reached."""
    ids = tuple(range(20_000))
    times = {
        name: (DMD2().law(*ends).sample(Rng(0, 0, "generator", ids), name) * 999).double()
        for name, ends in {"matching": (20, 980), "critic": (0, 999)}.items()
    }
    assert (times["matching"].min().round(), times["matching"].max().round()) == (20, 980)
    assert (times["critic"].min().round(), times["critic"].max().round()) == (0, 999)
    for t in times.values():
        assert_close(t, t.round(), atol=1e-3, rtol=0)


def test_each_turn_moves_only_its_player():
    check_isolation(DMD2(guidance=2.0), trio(), batch())


def test_the_critic_reads_neither_real_score_nor_empty_prompt():
    players = trio()
    DMD2(guidance=2.0).critic_loss(players, batch(), rng("critic"))
    assert players.real_score.backbone.seen == []
    assert players.fake_score.backbone.seen[0][2].sum() > 0


def test_turns_follow_the_two_time_scale_rule():
    """T10: 100 iterations at ratio 5 are 20 generator and 100 critic updates, or 20 and 80 if exclusive."""
    for exclusive, critic in ((False, 100), (True, 80)):
        turns = [Turns(critic_per_generator=5, exclusive=exclusive).at(i) for i in range(100)]
        assert sum("generator" in now for now in turns) == 20
        assert sum("critic" in now for now in turns) == critic
    warm = [Turns(critic_per_generator=2, critic_warmup=3).at(i) for i in range(6)]
    assert ["generator" in now for now in warm] == [False, False, False, True, False, True]


def test_options_are_frozen_and_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DMD2().guidance = 3.0
    for bad in ({"num_steps": 0}, {"guidance": -1.0}, {"floor": float("nan")}, {"min_index": 990}, {"max_index": 1000}):
        with pytest.raises(ValueError, match=r"num_steps|guidance|floor|indices"):
            DMD2(**bad)
    for bad in ({"first_time": 0.0}, {"first_time": 1.5}):
        with pytest.raises(ValueError, match=r"first_time|strictly descending"):
            DMD2(**bad)
