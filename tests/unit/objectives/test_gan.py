"""DMD2's GAN: its terms (T9), who gets gradients, and that taps and times are what they should be."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.testing import assert_close

from fewstep.diffusion import RectifiedFlow
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.models.discriminator import Head
from fewstep.models.trio import Trio
from fewstep.objectives.dmd2 import DMD2
from fewstep.objectives.terms import approximate_r1, gan_critic, gan_generator
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Loss, Real


class Net(Backbone):
    """Two linear maps of the input plus the prompt; the first is the feature that the head reads."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    @property
    def taps(self):
        return ("1",)

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        self.seen.append((x.detach().clone(), network_time.clone(), cond.tensors["prompt"].clone()))
        return self.module(x + cond.tensors["prompt"])


IDS = tuple(range(6))
PROMPT = Condition({"prompt": torch.zeros(6, 3)}, {"prompt": torch.zeros(1, 3)})
CAPTION = Condition({"prompt": torch.ones(6, 3)}, {"prompt": torch.zeros(1, 3)})
REAL = torch.arange(18.0).reshape(6, 3) / 10


def trio() -> Trio:
    made = [Denoiser(Net(seed), RectifiedFlow(), "x0") for seed in (1, 2, 3)]
    players = Trio(generator=made[0], real_score=made[1], fake_score=made[2], head=Head({"1": (8,)}))
    for network in (*made, players.discriminator()):
        network.requires_grad_(False)
    return players


def batch() -> Batch:
    return Batch(PROMPT, (3,), IDS, Real(REAL, CAPTION))


def rng(turn: str = "generator", iteration: int = 1) -> Rng:
    return Rng(0, iteration, turn, IDS)


GAN = DMD2(guidance=1.0, gan_weight=0.5)


def both(method: DMD2, players: Trio) -> list[Loss]:
    """The critic's two losses."""
    denoising, gan = method.critic_loss(players, batch(), rng("critic"))
    return [denoising, gan]


def test_zero_logits_give_the_coins_losses():
    """T9: ln 2 and 2 ln 2."""
    zeros = torch.zeros(7, 2)
    assert gan_generator(zeros).item() == pytest.approx(math.log(2))
    assert gan_critic(zeros, zeros).item() == pytest.approx(2 * math.log(2))


def test_gradients_of_the_terms_are_sigmoids():
    """T9: d softplus(-l) = -sigmoid(-l).  Fails with swapped signs, which no loss curve would show."""
    real, fake = (torch.linspace(-3, 3, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    gan_critic(real, fake).backward()
    assert_close(real.grad, -torch.sigmoid(-real.detach()).double() / 5, atol=1e-6, rtol=0)
    assert_close(fake.grad, torch.sigmoid(fake.detach()).double() / 5, atol=1e-6, rtol=0)
    fake.grad = None
    gan_generator(fake).backward()
    assert_close(fake.grad, -torch.sigmoid(-fake.detach()).double() / 5, atol=1e-6, rtol=0)


def test_the_optimal_logit_is_the_log_ratio_of_noised_gaussians():
    """T9: for N(m_r, s^2) against N(m_f, s^2) at level t, a (m_r - m_f) / V x_t - a^2 (m_r^2 - m_f^2) / (2 V).

    A linear discriminator fitted by gan_critic finds both numbers.
    """
    m_r, m_f, s, t = 0.8, -0.4, 0.5, 0.4
    a, V = 1 - t, (1 - t) ** 2 * s**2 + t**2
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    real, fake = a * m_r + V**0.5 * z[0], a * m_f + V**0.5 * z[1]
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = gan_critic(w[0] * real + w[1], w[0] * fake + w[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = torch.tensor([a * (m_r - m_f) / V, -(a**2) * (m_r**2 - m_f**2) / (2 * V)]).double()
    assert_close(w.detach(), wanted, atol=0.02, rtol=0)


def test_approximate_r1_is_the_squared_gradient():
    """l = w.x: E (w.n)^2 = |w|^2.  Fails without the division by sigma^2."""
    w, sigma = torch.tensor([1.0, -2.0, 0.5]), 0.1
    x = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))
    shaken = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = approximate_r1((x @ w)[:, None], (shaken @ w)[:, None], sigma)
    assert found.item() == pytest.approx(w.square().sum().item(), rel=0.02)


def test_the_generators_turn_moves_neither_fake_score_nor_head():
    """T9.  The gradient passes through both.  Fails if the turn leaves them trainable, or detaches the features."""
    plain, players = trio(), trio()
    with plain.turn("generator"):
        DMD2(guidance=1.0).generator_loss(plain, batch(), rng()).total.backward()
    with players.turn("generator"):
        GAN.generator_loss(players, batch(), rng()).total.backward()
    assert all(p.grad is None for net in (players.critic(), players.discriminator()) for p in net.parameters())
    without, with_gan = ([p.grad for p in t.generator.parameters()] for t in (plain, players))
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(without, with_gan))


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_critics_turn_moves_head_and_own_features_but_nobody_else(features: str):
    """The feature network learns from the GAN together with the head, unless it is the teacher."""
    players = trio()
    method = DMD2(guidance=1.0, gan_weight=0.5, gan_critic_weight=1.0, gan_features=features)
    with players.turn("critic"):
        method.gan_critic_loss(players, batch(), torch.randn(6, 3), rng("critic")).total.backward()
    assert all(p.grad.abs().max() > 0 for p in players.discriminator().parameters())
    before_the_tap = players.critic().backbone.module[0].weight
    assert (before_the_tap.grad is not None) == (features == "fake")
    assert all(p.grad is None for net in (players.generator, players.real_score) for p in net.parameters())


def test_a_tap_is_what_its_module_gave():
    """Fails if the hook keeps the module's input."""
    critic = trio().critic()
    made = critic(REAL, torch.full((6,), 0.5), PROMPT, taps=("1",))
    assert torch.equal(critic.backbone.module[2](made.taps["1"]), made.raw)


def test_the_critics_losses_reach_no_generator_whoever_trains():
    """Fails if the turn alone keeps it out: without no_grad, the rollout's graph would be kept and walked."""
    players = trio()
    for network in (players.generator, players.critic(), players.discriminator()):
        network.requires_grad_(True)
    for loss in GAN.critic_loss(players, batch(), rng("critic")):
        loss.total.backward()
    assert all(p.grad is None for p in players.generator.parameters())


def test_the_critics_gan_loss_by_hand():
    """Value and gradients.  Fails with real and fake exchanged, R1 subtracted, or one of R1's logits detached."""
    players, x = trio(), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    method = DMD2(guidance=1.0, gan_weight=0.5, gan_critic_weight=0.1, r1_weight=2.0)
    with players.turn("critic"):
        found = method.gan_critic_loss(players, batch(), x, rng("critic")).total
        draws = rng("critic")
        level = method.noise(REAL, draws, "gan.real")
        real = method.logits(players, REAL, CAPTION, *level)
        fake = method.logits(players, x, PROMPT, *method.noise(x, draws, "gan.fake"))
        shaken = method.logits(players, REAL + 0.1 * draws.randn_like(REAL, "gan.r1"), CAPTION, *level)
        r1 = (shaken - real).square().mean() / 0.1**2
        wanted = 0.1 * (softplus(-real).mean() + softplus(fake).mean() + 2.0 * r1)
        head = list(players.discriminator().parameters())
        assert_close(found, wanted)
        assert_close(torch.autograd.grad(found, head), torch.autograd.grad(wanted, head))


def test_the_generators_gan_loss_by_hand():
    """Its gradient is added to the matching term's.  Fails if it is subtracted, or its weight is left out."""
    players, draws = trio(), rng()
    with players.turn("generator"):
        weights = players.weights("generator")
        matching, both = (
            torch.autograd.grad(method.generator_loss(players, batch(), rng()).total, weights)
            for method in (DMD2(guidance=1.0), GAN)
        )
        x = GAN.rollout(players, batch(), draws).x
        logits = GAN.logits(players, x, PROMPT, *GAN.noise(x, draws, "gan"))
        gan = torch.autograd.grad(0.5 * softplus(-logits).mean(), weights)
    for found, first, second in zip(both, matching, gan):
        assert_close(found, first + second)


def test_real_samples_come_with_their_own_captions():
    """Fails if the prompts of the batch are told with real samples: the head would learn the mismatch."""
    players = trio()
    both(GAN, players)
    told = [prompt.mean().item() for _, _, prompt in players.critic().backbone.seen]
    assert told == [0.0, 1.0, 0.0]  # denoising, real, fake


def test_real_fake_and_matching_have_times_of_their_own():
    """Fails with one shared stream."""
    players = trio()
    both(GAN, players)
    times = [t for _, t, _ in players.critic().backbone.seen]
    assert len(times) == 3 and len({tuple(t.tolist()) for t in times}) == 3
    x, t, _ = players.critic().backbone.seen[1]
    draws = rng("critic")
    t_real, eps = GAN.noise(REAL, draws, "gan.real")
    assert torch.equal(t, t_real)
    assert_close(x, (1 - t)[:, None] * REAL + t[:, None] * eps)


def test_r1_compares_at_one_noise():
    """The shaken sample is re-noised to the same level by the same noise.  Fails with a fresh draw, which dominates."""
    players = trio()
    both(DMD2(guidance=1.0, gan_weight=0.5, r1_weight=1.0), players)
    seen = players.critic().backbone.seen
    (real, t_real, _), (shaken, t_shaken, _) = seen[1], seen[3]
    assert torch.equal(t_real, t_shaken)
    assert ((shaken - real).abs() < 0.6 * (1 - t_real)[:, None] + 1e-6).all() and not torch.equal(real, shaken)


def test_the_generators_loss_tells_the_gans_gradient_from_the_matching_terms():
    """Twice the weight is twice the GAN's gradient and the same matching term's; at x, before the generator's weights.

    Fails if the two are exchanged, or the GAN's is taken without its weight.
    """
    seen, players = {}, trio()
    for weight in (0.5, 1.0):
        with players.turn("generator"):
            loss = DMD2(guidance=1.0, gan_weight=weight).generator_loss(players, batch(), rng())
            loss.total.backward()
        seen[weight] = loss.grads
    assert seen[0.5]["gan"].shape == (6, 3) and seen[0.5]["gan"].abs().max() > 0
    assert_close(seen[1.0]["gan"], 2 * seen[0.5]["gan"])
    assert_close(seen[1.0]["dm"], seen[0.5]["dm"], rtol=0, atol=0)


def test_the_gan_waits_for_its_start():
    """Off before gan_start; the generator follows the critic.  Fails with >= for both: a head that has never moved
    would judge first, as the generator's turn comes before the critic's."""
    late = DMD2(guidance=1.0, gan_weight=0.5, gan_start=5)
    seen = []
    for iteration in (4, 5, 6):
        loss = late.generator_loss(trio(), batch(), rng(iteration=iteration))
        critic = late.critic_loss(trio(), batch(), rng("critic", iteration))
        seen.append(("gan" in loss.metrics, not isinstance(critic, Loss)))
    assert seen == [(False, False), (False, True), (True, True)]


def test_without_a_gan_nothing_is_asked_for():
    assert DMD2().roles == {"fake_score"} and not DMD2().needs
    assert GAN.roles == {"fake_score", "head"} and GAN.needs == {"latents"}
    with pytest.raises(ValueError, match="real latents"):
        list(GAN.critic_loss(trio(), Batch(PROMPT, (3,), IDS), rng("critic")))
    for bad, said in (
        ({"gan_weight": -1.0}, "gan_weight must be"),
        ({"gan_weight": 1.0, "gan_critic_weight": 0.0}, "random head"),
        ({"r1_weight": 1.0}, "give gan_weight"),
        ({"r1_sigma": 0.0}, "r1_sigma must be"),
    ):
        with pytest.raises(ValueError, match=said):
            DMD2(**bad)


def test_the_critics_two_losses_never_hold_two_graphs():
    """Fails with one sum: denoising, real, fake and R1 would keep four networks' activations at once."""
    players = trio()
    with players.turn("critic"):
        losses = GAN.critic_loss(players, batch(), rng("critic"))
        next(losses).total.backward()
        calls = len(players.critic().backbone.seen)
        next(losses).total.backward()
    assert calls == 1 and len(players.critic().backbone.seen) == 3
