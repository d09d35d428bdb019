"""Noise is keyed by what it is for."""

import pytest
import torch

from fewstep.rng import Rng, key


def rng(ids=(4, 5, 6), seed=1, iteration=2, turn="generator") -> Rng:
    return Rng(seed, iteration, turn, ids)


@pytest.mark.parametrize("draw", [lambda r: r.randn("a", (2, 3)), lambda r: r.rand("a")], ids=["randn", "rand"])
def test_samples_draw_the_same_in_any_batch(draw):
    """Fails if noise is keyed by position: accumulation and several processes would change the run."""
    whole = draw(rng((4, 5, 6)))
    assert torch.equal(whole[1:], draw(rng((5, 6))))
    assert torch.equal(whole[[2, 0]], draw(rng((6, 4))))


@pytest.mark.parametrize(
    "other",
    [rng(seed=0), rng(iteration=1), rng(turn="critic"), rng(ids=(7, 8, 9))],
    ids=["seed", "iteration", "turn", "ids"],
)
def test_any_other_key_draws_other_numbers(other):
    assert not (rng().randn("a", (4,)) == other.randn("a", (4,))).any()


def test_streams_are_independent():
    r = rng()
    assert not (r.randn("a", (4,)) == r.randn("b", (4,))).any()


def test_what_was_drawn_before_does_not_matter():
    r = rng()
    r.randn("b", (7,))
    assert torch.equal(r.randn("a", (4,)), rng().randn("a", (4,)))


@pytest.mark.parametrize("again", [lambda r: r.randn("a"), lambda r: r.rand("a"), lambda r: r.shared_int("a", 3)])
def test_stream_drawn_twice_is_refused(again):
    """Fails if a claim is not kept: the second draw would repeat the first one's numbers."""
    r = rng()
    r.randn("a", (2,))
    with pytest.raises(ValueError, match="stream 'a' was drawn already"):
        again(r)


def test_shared_integer_is_the_same_for_any_sample_ids():
    """Fails if it is keyed by sample: ranks would train different steps of the rollout."""
    assert len({rng(ids).shared_int("step", 1000) for ids in ((0,), (4, 5, 6), range(64))}) == 1


def test_shared_integer_covers_its_range_and_no_more():
    drawn = {rng(iteration=i).shared_int("step", 4) for i in range(64)}
    assert drawn == {0, 1, 2, 3}


def test_numbers_have_their_distribution():
    """n = 20,000; five standard errors: .036 for means, .05 for the variance, .0102 for the uniform mean."""
    many = Rng(0, 0, "critic", range(20_000))
    normal, uniform = many.randn("n").double(), many.rand("u").double()
    assert abs(normal.mean()) < 0.036 and abs(normal.var() - 1) < 0.05
    assert abs(uniform.mean() - 0.5) < 0.0102 and uniform.min() >= 0 and uniform.max() < 1


def test_randn_like_has_shape_and_dtype_of_its_model():
    x = torch.zeros(3, 2, 5, dtype=torch.float64)
    assert torch.equal(rng().randn_like(x, "a"), rng().randn("a", (2, 5)).double())


def test_keys_are_the_same_on_every_machine():
    """Written down from one run; hash() would change with every process."""
    assert key("a") == 2340832890917691671
    assert key(0, 1, "critic", "t", 5) == 4887996637174464319
