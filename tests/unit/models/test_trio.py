"""Who may train when, and that the three roles hold weights of their own."""

import copy

import pytest
import torch

from fewstep.models.trio import Trio
from fewstep.teachers import gaussian


def build(roles=frozenset({"fake_score"})):
    teacher = gaussian(fit_steps=0)
    return Trio.build(teacher.denoiser, roles, init=teacher.student)


def test_roles_start_equal_and_share_nothing():
    """Fails if a role is the same object: the fake score would follow the generator."""
    trio = build()
    pairs = list(zip(trio.generator.parameters(), trio.critic().parameters(), strict=True))
    assert pairs and all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_only_the_named_player_requires_gradients_and_nobody_afterwards():
    trio = build()
    for turn, other in (("generator", trio.critic()), ("critic", trio.generator)):
        mine = trio.weights(turn)
        with trio.turn(turn):
            assert mine and all(p.requires_grad for p in mine)
            assert not any(p.requires_grad for p in other.parameters())
            assert not any(p.requires_grad for p in trio.real_score.parameters())
        assert not any(p.requires_grad for p in mine)


def test_a_turn_freezes_a_real_score_that_came_trainable():
    """Fails if the turn trusts its caller: a GAN on the teacher's features would pile up gradients in it."""
    trio = build()
    trio.real_score = copy.deepcopy(trio.critic()).requires_grad_(True)
    with trio.turn("critic"):
        assert not any(p.requires_grad for p in trio.real_score.parameters())


def test_a_turn_ends_even_if_its_loss_raises():
    trio = build()
    with pytest.raises(RuntimeError, match="boom"), trio.turn("generator"):
        raise RuntimeError("boom")
    assert not any(p.requires_grad for p in trio.generator.parameters())


def test_without_a_fake_score_there_is_no_critic():
    trio = build(frozenset())
    assert list(trio.players()) == ["generator"]
    with pytest.raises(ValueError, match="fake_score"):
        trio.critic()


def test_unknown_sharing_is_refused():
    teacher = gaussian(fit_steps=0)
    with pytest.raises(ValueError, match=r"sharing='telepathy'.*copies"):
        Trio.build(teacher.denoiser, frozenset(), sharing="telepathy", init=teacher.student)


def test_roles_that_cannot_be_supplied_are_refused():
    with pytest.raises(ValueError, match=r"asks for the roles \['ema'\]"):
        build(frozenset({"ema"}))
