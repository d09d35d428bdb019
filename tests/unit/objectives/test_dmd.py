"""DMD as a whole: two losses on two streams, the pairs' own captions, one step."""

import pytest
import torch
from torch.testing import assert_close

from fewstep.models.perception import Perception
from fewstep.objectives.dmd import DMD
from fewstep.objectives.dmd2 import DMD2
from fewstep.types import Batch, Condition, Pair
from tests.affine import batch, rng, trio

PLAIN = DMD(guidance=2.0, regression_weight=0.0)


def with_pairs(scale: float = 1.0) -> Batch:
    """Six pairs that look like nothing else in the batch; captions 11..16."""
    draws, plain = torch.Generator().manual_seed(3), batch()
    noise, x0 = torch.randn(2, 6, 1, 4, 3, generator=draws)
    cond = Condition({"prompt": torch.arange(6).float()[:, None] + 11}, plain.cond.null)
    return Batch(plain.cond, plain.shape, plain.sample_ids, pair=Pair(noise, scale * x0, cond))


def gradient(method, given: Batch) -> torch.Tensor:
    players = trio()
    with players.turn("generator"):
        method.generator_loss(players, given, rng()).total.backward()
    net = players.generator.backbone
    assert players.fake_score.backbone.w.grad is None and players.real_score.backbone.w.grad is None
    return torch.stack([net.w.grad, net.b.grad])


def test_without_regression_the_generators_turn_is_dmd2s():
    assert_close(gradient(PLAIN, batch()), gradient(DMD2(guidance=2.0), batch()), atol=0, rtol=0)


def test_the_regression_by_hand():
    """The generator at noise z_ref under the pair's own caption, against y_ref; mean over all elements.  Fails if it
    reads the batch's prompts or the matching term's noise."""
    given = with_pairs()
    added = gradient(DMD(guidance=2.0, regression_weight=0.25), given) - gradient(PLAIN, given)
    noise, x0, cond = given.pair
    error = 0.5 * noise + 0.1 + 0.1 * cond.tensors["prompt"][:, :, None, None] - x0
    by_hand = 0.25 * 2 * torch.stack([(error * noise).mean(), error.mean()])
    assert_close(added, by_hand, atol=1e-5, rtol=1e-4)


def test_both_terms_gradients_are_told_apart():
    """The regression's at its own sample, w 2 (x_ref - y) / n; the matching term's is as it is alone.

    Fails if the weight is left out, or both are taken at one sample.
    """
    given, losses, players = with_pairs(), [], trio()
    with players.turn("generator"):
        for weight in (0.25, 0.0):
            losses.append(DMD(guidance=2.0, regression_weight=weight).generator_loss(players, given, rng()))
            losses[-1].total.backward()
    noise, x0, cond = given.pair
    error = 0.5 * noise + 0.1 + 0.1 * cond.tensors["prompt"][:, :, None, None] - x0
    assert losses[0].grads.keys() == {"dm", "regression"} and losses[1].grads.keys() == {"dm"}
    assert_close(losses[0].grads["regression"], 0.25 * 2 * error / error.numel())
    assert_close(losses[0].grads["dm"], losses[1].grads["dm"], rtol=0, atol=0)


def test_the_regression_is_still_where_the_generator_already_gives_the_pairs():
    given, players = with_pairs(), trio()
    noise, _, cond = given.pair
    with torch.no_grad():
        made = players.generator(noise, torch.ones(6), cond).x0
    exact = Batch(given.cond, given.shape, given.sample_ids, pair=Pair(noise, made, cond))
    assert_close(gradient(DMD(guidance=2.0), exact), gradient(PLAIN, exact), atol=0, rtol=0)


def test_the_matching_term_does_not_read_the_pairs():
    logged = [DMD(guidance=2.0).generator_loss(trio(), with_pairs(scale), rng()).metrics["dm"] for scale in (1.0, 50.0)]
    assert_close(*logged, atol=0, rtol=0)


def test_the_critic_reads_no_pairs():
    players = trio()
    DMD(guidance=2.0).critic_loss(players, batch(), rng("critic")).total.backward()
    assert len(players.fake_score.backbone.seen) == 1 and players.real_score.backbone.seen == []


def test_it_needs_pairs_only_for_the_regression():
    assert DMD().needs == {"pairs"} and PLAIN.needs == frozenset()
    with pytest.raises(ValueError, match="needs pairs in the batch"):
        DMD(guidance=2.0).generator_loss(trio(), batch(), rng())


def test_both_networks_move_at_every_iteration():
    """1:1, algorithm 1."""
    assert {DMD().turns.at(i) for i in range(9)} == {("generator", "critic")}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 4}, "num_steps must be 1, got 4: for more steps take --method dmd2"),
        ({"regression_weight": -1.0}, "regression_weight"),
        ({"distance": "lpips", "regression_weight": 0.0}, "compares pairs, and regression_weight = 0 takes none"),
        ({"guidance": 0.0}, "guidance"),
        ({"min_index": 990}, "low_index=990"),
        ({"first_time": 1.5}, "time"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DMD(**wrong)


def test_lpips_compares_what_the_pairs_show():
    """The mean over the batch of the distance between both decoded, the generator's first."""
    given, players = with_pairs(), trio()
    method = DMD(guidance=2.0, distance="lpips")
    assert method.needs == {"pairs", "lpips"}
    players.perception = Perception(lambda x: 3 * x, lambda a, b: (a - 2 * b).flatten(1).mean(1))
    noise, x0, cond = given.pair
    x = 0.5 * noise + 0.1 + 0.1 * cond.tensors["prompt"][:, :, None, None]
    assert_close(method.regression(players, given, {}), 3 * x.mean() - 6 * x0.mean())
