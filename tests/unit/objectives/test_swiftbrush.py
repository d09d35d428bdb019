"""SwiftBrush: the gradient in its several forms, guidance on both scores, and turns without prompts."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import EDM, Prediction, RectifiedFlow, VPTable, raw_of
from fewstep.models.adapters import LoRA
from fewstep.models.perception import Perception
from fewstep.models.trio import Trio
from fewstep.objectives.swiftbrush import SwiftBrush
from fewstep.objectives.terms import distribution_matching, noise_error, variational
from fewstep.rng import Rng
from tests.affine import batch, check_isolation, rng, trio

SCHEDULES = {"vp": VPTable.scaled_linear(), "flow": RectifiedFlow(), "edm": EDM()}


def predictions(schedule, draw, kind="x0", t=None):
    """x, and two predictions of one kind that say different things about its re-noised self; float64."""
    x, eps, times = draw(seed=4, dtype=torch.float64)
    t = times if t is None else t
    x_t = schedule.add_noise(x, eps, t)
    made = []
    for seed in (5, 6):
        told = draw(seed=seed, dtype=torch.float64)[0]
        noise = (x_t - schedule.at(t.double()).like(x).alpha * told) / schedule.at(t.double()).like(x).sigma
        made.append(Prediction(raw_of(kind, told, noise, t, schedule), x_t, t, kind, schedule))
    return x.requires_grad_(), *made


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_the_gradient_is_the_papers_on_vp_whatever_the_networks_predict(draw, kind):
    """sigma^2 (eps_real - eps_fake) = alpha sigma (fake_x0 - real_x0).  Fails with the sign turned."""
    x, real, fake = predictions(SCHEDULES["vp"], draw, kind)
    variational(x, real, fake).backward()
    sigma = real.coefficients.sigma
    assert_close(x.grad * x.numel(), sigma**2 * (real.eps - fake.eps), atol=1e-6, rtol=1e-6)


def test_the_surrogates_value_and_gradient(draw):
    x, real, fake = predictions(SCHEDULES["vp"], draw)
    loss = variational(x, real, fake)
    loss.backward()
    g = x.grad * x.numel()
    assert_close(loss.detach(), 0.5 * g.square().mean())
    again = x.detach().requires_grad_()
    (0.5 * (again - (again - g).detach()).square().mean()).backward()
    assert_close(x.grad, again.grad)


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_other_schedules_weigh_as_vp_at_equal_signal_to_noise(draw, name):
    """A sample at sigma / alpha = r on any schedule is VP's rescaled.  Fails if sigma^2 is taken literally on EDM."""
    log_snr = torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64)
    weights = []
    for schedule in (SCHEDULES[name], SCHEDULES["vp"]):
        t = schedule.time_of(log_snr).float()
        x, real, fake = predictions(schedule, draw, t=t)
        variational(x, real, fake).backward()
        weights.append((x.grad * x.numel() / (fake.x0 - real.x0)).mean((1, 2, 3)))
    assert_close(*weights, atol=2e-3, rtol=2e-3)
    r = (-log_snr / 2).exp()
    assert_close(weights[0], r / (1 + r**2), atol=2e-3, rtol=2e-3)


def test_it_is_distribution_matching_up_to_a_positive_weight_of_each_sample(draw):
    x, real, fake = predictions(SCHEDULES["vp"], draw)
    variational(x, real, fake).backward()
    other = x.detach().requires_grad_()
    distribution_matching(other, real.x0, fake.x0)[0].backward()
    ratio = (x.grad / other.grad).flatten(1)
    assert (ratio > 0).all()
    assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_the_gradient_of_the_scale_of_a_gaussian():
    """VP, x = theta z, data of spread S: E[g z] = a^2 s theta (B' - A'), A' = a S^2 / (a^2 S^2 + s^2), B' with theta.
    Fails if a chain factor alpha of x_t = alpha x + sigma eps is applied."""
    schedule, theta, spread = SCHEDULES["vp"], 0.8, 0.5
    n = 400_000
    draws = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, n, generator=draws, dtype=torch.float64)
    t = torch.full((1,), 500 / 999)
    a, s = (float(value) for value in (schedule.at(t.double()).alpha, schedule.at(t.double()).sigma))
    real, fake = (a * v**2 / (a**2 * v**2 + s**2) for v in (spread, theta))
    scale = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    x = (scale * z)[None]
    x_t = a * x.detach() + s * eps
    made = [Prediction(gain * x_t, x_t, t, "x0", schedule) for gain in (real, fake)]
    variational(x, *made).backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(a**2 * s * theta * (fake - real), rel=0.02)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_the_fake_scores_loss_is_in_noise_whatever_it_predicts(draw, kind):
    """mean alpha^2 (eps_hat - eps)^2."""
    schedule = SCHEDULES["vp"]
    x0, eps, t = draw(seed=1, dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    said = eps + 0.1 * draw(seed=2, dtype=torch.float64)[1]
    c = schedule.at(t.double()).like(x0)
    pred = Prediction(raw_of(kind, (x_t - c.sigma * said) / c.alpha, said, t, schedule), x_t, t, kind, schedule)
    assert_close(noise_error(pred, x0, eps), (c.alpha * (said - eps)).square().mean(), atol=1e-6, rtol=1e-5)


def test_the_fake_scores_loss_is_finite_at_both_ends():
    schedule = SCHEDULES["flow"]
    x0, eps, t = torch.ones(2, 1, 4, 3), torch.ones(2, 1, 4, 3), torch.tensor([0.0, 1.0])
    x_t = schedule.add_noise(x0, eps, t)
    for kind in ("x0", "flow", "v"):
        assert noise_error(Prediction(0.5 * x0, x_t, t, kind, schedule), x0, eps).isfinite()


def test_both_scores_are_guided_and_see_one_state():
    players = trio()
    SwiftBrush().generator_loss(players, batch(), rng())
    real, fake = players.real_score.backbone.seen, players.fake_score.backbone.seen
    assert len(real) == len(fake) == 2
    for seen in (*real, *fake):
        assert_close(seen[0], real[0][0])
        assert_close(seen[1], real[0][1])
    assert [float(seen[2].sum()) > 0 for seen in (*real, *fake)] == [True, False, True, False]


def test_each_turn_moves_only_its_player():
    check_isolation(SwiftBrush(), trio(), batch())


def test_a_tenth_of_the_fake_scores_turns_see_no_prompt_each_as_a_whole():
    method, without = SwiftBrush(drop_prompt=0.3), 0
    for iteration in range(200):
        players = trio()
        method.critic_loss(players, batch(), rng("critic", iteration=iteration))
        prompts = players.fake_score.backbone.seen[0][2]
        assert (prompts == 0).all() or (prompts > 0).all()
        assert (players.generator.backbone.seen[0][2] > 0).all()  # without, it is judged by what it makes with them
        without += bool((prompts == 0).all())
    assert without == pytest.approx(60, abs=3 * math.sqrt(200 * 0.3 * 0.7))
    sizes = {method.drops(Rng(0, 7, "critic", tuple(range(n)))) for n in (1, 4, 64)}
    assert len(sizes) == 1  # whatever the micro-batch


def test_the_first_gradient_is_zero_under_a_fresh_adapter():
    """A LoRA fake score starts as the teacher."""
    from fewstep.teachers import gaussian

    teacher = gaussian(fit_steps=2)
    assert teacher.student is not None
    network = teacher.student()
    players = Trio.build(network, frozenset({"fake_score"}), sharing="lora-fake", lora=LoRA(rank=2))
    given = dataclasses.replace(batch(), cond=teacher.encode([""] * 6), shape=(2,))
    with players.turn("generator"):
        SwiftBrush(guidance=1.0).generator_loss(players, given, rng()).total.backward()
    assert all(float(p.grad.abs().max()) == 0 for p in players.weights("generator") if p.grad is not None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 2}, "num_steps must be 1, got 2: for more steps take --method dmd2 or sid"),
        ({"drop_prompt": 1.0}, "drop_prompt"),
        ({"guidance": -1.0}, "guidance"),
        ({"min_index": 990}, "low_index=990"),
        ({"first_time": 2.0}, "got \\[2.0\\]"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SwiftBrush(**wrong)


def clip_gradient(iteration=0, **settings):
    """What the CLIP loss adds to the gradient of the generator's bias; a cosine is .2 plus a hundredth of the mean."""
    asked = []

    def agreement(images, texts):
        asked.append(texts)
        return 0.2 + images.flatten(1).mean(1) / 100

    def gradient(method):
        players = trio()
        players.perception = Perception(lambda x: x, agreement=agreement)
        with players.turn("generator"):
            given = dataclasses.replace(batch(), prompts=tuple("abcdef"))
            loss = method.generator_loss(players, given, rng(iteration=iteration))
            loss.total.backward()
        assert loss.grads.keys() == ({"vsd", "clip"} if method.clip_share(iteration) else {"vsd"})
        if "clip" in loss.grads:  # the sum over a sample is what moves b
            assert float(loss.grads["clip"].sum()) == pytest.approx(
                float(players.generator.backbone.b.grad) - float(loss.grads["vsd"].sum()), abs=1e-6
            )
        return float(players.generator.backbone.b.grad)

    method = SwiftBrush(guidance=2.0, clip_weight=0.5, **settings)
    added = gradient(method) - gradient(SwiftBrush(guidance=2.0))
    assert asked == ([tuple("abcdef")] if method.clip_share(iteration) else [])
    return added


def test_the_clip_loss_pulls_pictures_to_their_prompts_until_they_fit():
    """Gradient -weight / 100 by the mean; none once the cosine is above the margin.  Fails with the sign turned, and
    for a loss that is not clamped."""
    assert clip_gradient(clip_margin=0.35) == pytest.approx(-0.5 / 100, abs=1e-6)
    assert clip_gradient(clip_margin=0.1) == pytest.approx(0.0, abs=1e-6)


def test_the_clip_loss_fades():
    assert clip_gradient(25, clip_until=100) == pytest.approx(-0.75 * 0.5 / 100, abs=1e-6)
    assert clip_gradient(100, clip_until=100) == 0
    method = SwiftBrush(clip_weight=0.1)
    assert method.needs == {"clip"} and method.clip_share(10**6) == 0.1
    assert SwiftBrush().needs == frozenset()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clip_weight": -0.1}, "clip_weight"),
        ({"clip_weight": 0.1, "clip_margin": 1.5}, "clip_margin is a cosine"),
        ({"clip_weight": 0.1, "clip_until": 0}, "clip_until must be >= 1"),
        ({"clip": "folder"}, "no meaning at clip_weight 0"),
    ],
)
def test_bad_clip_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SwiftBrush(**wrong)
