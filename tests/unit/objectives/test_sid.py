"""SiD against closed forms: its identity, its gradient through both scores, its guidance and its turns."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fewstep.diffusion import EDM, RectifiedFlow, VPTable
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.models.discriminator import Head
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns
from fewstep.objectives.sid import SiD
from fewstep.objectives.terms import distribution_matching, score_identity
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Loss, Real
from tests.affine import check_isolation, rng

SCHEDULES = {"flow": RectifiedFlow(), "vp": VPTable.scaled_linear(), "edm": EDM()}
S, SIGMA = 0.5, 0.6
GOLDEN = {  # theta: gradient by theta at alpha 0, 1, 1.2; of DMD; of the squared difference
    0.2: (-0.07314, -0.11154, -0.11922, -0.06197, 0.03840),
    0.5: (0.0, 0.0, 0.0, 0.0, 0.0),
    2.0: (1.19826, 0.16765, -0.03848, 1.01519, 1.03061),
    5.0: (3.39916, 0.08176, -0.58172, 2.87984, 3.31740),
}


class Affine(Backbone):
    """raw = w x + b + 0.1 prompt; remembers times, conditions and whether it was in training mode."""

    def __init__(self, w: float, b: float, dropout: float = 0.0, recompute: bool = False) -> None:
        super().__init__(nn.Linear(1, 1).requires_grad_(False))
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))
        self.dropout, self.recompute = nn.Dropout(dropout), recompute
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]] = []

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        prompt = cond.tensors["prompt"].to(x)
        self.seen.append((x.detach().clone(), network_time.clone(), prompt.clone(), self.training))

        def body(x):
            return self.dropout(torch.tanh(self.w * x) + self.b + 0.1 * prompt[:, :, None, None])

        return checkpoint(body, x, use_reentrant=False) if self.recompute else body(x)


def trio(weights=((0.5, 0.1), (0.3, 0.2), (0.4, -0.1)), schedule=None, **options):
    made = [Denoiser(Affine(w, b, **options), schedule or RectifiedFlow(), "x0").double() for w, b in weights]
    made[1].eval()
    return Trio(generator=made[0], real_score=made[1], fake_score=made[2])


def batch(size=6):
    prompt = torch.arange(size).double()[:, None] + 1
    return Batch(Condition({"prompt": prompt}, {"prompt": torch.zeros(1, 1)}), (1, 4, 3), tuple(range(size)))


def gaussian_estimates(theta, detach=False):
    """x, f_phi, f_psi of one "sample" whose four elements have the exact second moments of z and e; and theta."""
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    e = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    x = theta * z
    x_t = (x.detach() if detach else x) + SIGMA * e
    b = theta.item() ** 2 / (theta.item() ** 2 + SIGMA**2)
    return theta, x, S**2 / (S**2 + SIGMA**2) * x_t, b * x_t


def gradient(loss_and_weight, theta):
    """d/dtheta at weight 1."""
    loss, weight = loss_and_weight
    (grad,) = torch.autograd.grad(loss, theta)
    return (grad / weight).item()


@pytest.mark.parametrize("theta", GOLDEN)
def test_gradients_of_a_gaussian_are_the_closed_form(theta):
    """All terms are quadratic, so four points give the expectations exactly.  Fails with detached scores, a swapped
    sign or alpha on the other term."""
    *sid, dmd, naive = GOLDEN[theta]
    a, b = S**2 / (S**2 + SIGMA**2), theta**2 / (theta**2 + SIGMA**2)
    found = {}
    for alpha, golden in zip((0.0, 1.0, 1.2), sid, strict=True):
        leaf, x, real, fake = gaussian_estimates(theta)
        found[alpha] = gradient(score_identity(x, real, fake, alpha=alpha), leaf)
        assert found[alpha] == pytest.approx(2 * theta * (a - b) * (a - 1 - alpha * (a - b)), abs=1e-12)
        assert found[alpha] == pytest.approx(golden, abs=6e-6)
    leaf, x, real, fake = gaussian_estimates(theta)
    assert gradient(distribution_matching(x, real, fake), leaf) == pytest.approx(dmd, abs=6e-6)
    assert found[0.0] - found[1.0] == pytest.approx(naive, abs=6e-6)  # L2 - (L2 - L1)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_the_value_is_the_closed_form_too(alpha):
    """(1 - alpha)(A - B)^2 (theta^2 + sigma^2): identically 0 at alpha = 1, so no measure of progress."""
    _, x, real, fake = gaussian_estimates(2.0)
    a, b = S**2 / (S**2 + SIGMA**2), 4 / (4 + SIGMA**2)
    loss, weight = score_identity(x, real, fake, alpha=alpha)
    assert (loss / weight).item() == pytest.approx((1 - alpha) * (a - b) ** 2 * (4 + SIGMA**2), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2, 5.0])
def test_with_detached_scores_it_is_distribution_matching(alpha, draw):
    """So whatever sets SiD apart is the gradient through the scores."""
    shape = (3, 2, 5, 3)
    x, real, _ = draw(0, shape, torch.float64)
    fake = draw(1, shape, torch.float64)[0]
    x.requires_grad_()
    identity, weight = score_identity(x, real, fake, alpha=alpha)
    matching, other = distribution_matching(x, real, fake)
    assert_close(torch.autograd.grad(identity, x), torch.autograd.grad(matching, x))
    assert_close(weight, other)


def test_both_forms_of_the_divergence_agree_for_any_generator():
    """E[d (f_phi - x)] = E[d^2] where f_psi is the posterior mean: a generator of two atoms, any f_phi."""
    generator = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(1, 2_000_000, generator=generator, dtype=torch.float64) < 0.3, -1.0, 0.7)
    x_t = x + SIGMA * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    odds = 0.3 / 0.7 * torch.exp(((x_t - 0.7) ** 2 - (x_t + 1) ** 2) / (2 * SIGMA**2))
    fake = (0.7 - odds) / (1 + odds)
    loss, weight = score_identity(x, torch.sin(x_t), fake, alpha=1.0)
    # One standard error of d (f_psi - x), both below 1, is under 5e-4.
    assert (loss / weight).item() == pytest.approx(0, abs=2e-3)
    assert (torch.sin(x_t) - fake).square().mean() > 0.04


def test_the_weight_is_one_of_each_sample_and_takes_no_gradient(draw):
    x, real, fake = draw(0, (3, 2, 5, 3), torch.float64)[:2] + (draw(1, (3, 2, 5, 3), torch.float64)[0],)
    x.requires_grad_()
    loss, weight = score_identity(x, real, fake, alpha=1.2)
    constant = 1 / (x - real).detach().abs().mean((1, 2, 3))
    assert_close(weight, constant)
    by_hand = (constant * ((real - fake) * (real - x - 1.2 * (real - fake))).mean((1, 2, 3))).mean()
    assert_close(loss, by_hand)
    assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(by_hand, x))
    assert score_identity(real, real, fake, alpha=1.0)[1].tolist() == pytest.approx([1e5] * 3)  # its floor


def test_alpha_one_leaves_the_fake_scores_own_error(draw):
    """d ((f_phi - x) - d) = d (f_psi - x)."""
    x, real, fake = draw(0, (1, 2, 5, 3), torch.float64)[:2] + (draw(1, (1, 2, 5, 3), torch.float64)[0],)
    loss, weight = score_identity(x, real, fake, alpha=1.0)
    assert_close(loss, weight[0] * ((real - fake) * (fake - x)).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_estimates_are_subtracted_in_float32(dtype, draw):
    """Fails if the cast follows the subtraction: near-equal estimates lose their difference."""
    x, real, _ = draw(0, (3, 2, 5, 3))
    real = real.to(dtype)
    fake = real.float() + 1e-3
    loss, weight = score_identity(x, real, fake, alpha=1.0)
    expected = (weight * (-1e-3 * (fake - x)).mean((1, 2, 3))).mean()
    assert_close(loss, expected, rtol=1e-3, atol=0)


# -- the generator's step ----------------------------------------------------------------------------------------------


def gradients(network):
    return network.backbone.w.grad.clone(), network.backbone.b.grad.clone()


@pytest.mark.parametrize("recompute", [False, True])
def test_two_backwards_give_the_gradient_of_one(recompute):
    """Through scores first and generator second, also with recomputed activations; accumulation scales both."""
    made, method = [], SiD(guidance=2.0, fake_guidance=1.5, alpha=1.2)
    for plain in (False, True):
        players = trio(recompute=recompute)
        with players.turn("generator"):
            if plain:
                draws = rng()
                x = method.rollout(players, batch(), draws).x
                total, _ = method.identity(players, x, batch().cond, draws)
            else:
                total = method.generator_loss(players, batch(), rng()).total
            (total / 4).backward()
        made.append((total.detach(), *gradients(players.generator)))
    assert_close(*made, rtol=1e-12, atol=1e-14)
    assert made[0][1].abs() > 1e-4


def test_the_generators_step_by_hand():
    """All of it re-computed with plain tensors: start at sigma(t0) eps, re-noising, both guidances, the identity."""
    players, method = trio(), SiD(guidance=3.0, fake_guidance=0.5, alpha=1.2)
    with players.turn("generator"):
        method.generator_loss(players, batch(), rng()).total.backward()
    draws, prompt = rng(), 0.1 * batch().cond.tensors["prompt"][:, :, None, None]
    w, b = (torch.tensor(v, dtype=torch.float32).double().requires_grad_() for v in (0.5, 0.1))
    z = draws.randn("rollout.noise", (1, 4, 3)).double()
    x = torch.tanh(w * torch.tensor(0.714, dtype=torch.float32).double() * z) + b + prompt
    t = method.law().sample(draws, "identity.t").double()[:, None, None, None]
    x_t = (1 - t) * x + t * draws.randn("identity.eps", (1, 4, 3))

    def guided(network, scale):
        return torch.tanh(network.w.detach() * x_t) + network.b.detach() + scale * prompt

    real, fake = guided(players.real_score.backbone, 3.0), guided(players.fake_score.backbone, 0.5)
    n = (x - real).detach().abs().mean((1, 2, 3), keepdim=True)
    ((real - fake) * ((real - x) - 1.2 * (real - fake)) / n).mean().backward()
    # z and the schedule's numbers are float32.
    assert_close(gradients(players.generator), (w.grad, b.grad), rtol=1e-6, atol=1e-8)


def test_each_turn_moves_only_its_player():
    check_isolation(SiD(guidance=2.0), trio(), batch())


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_at_the_start_equal_guidance_moves_nothing(guidance):
    """Loss and gradient are exactly 0, dropout or not.  Fails with an unguided fake score, or one that drops out."""
    players = trio([(0.3, 0.2)] * 3, dropout=0.5)
    with players.turn("generator"):
        total = SiD(guidance=guidance).generator_loss(players, batch(), rng()).total
        total.backward()
    assert total == 0
    assert all(grad == 0 for grad in gradients(players.generator))


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_the_networks_predict_does_not_matter_to_the_generator(name, kind):
    """One function as x0, eps, v or flow network: the same gradient."""
    schedule = SCHEDULES[name]
    made = []
    for predicted in ("x0", kind):
        players = Trio(*(Denoiser(Gain(g, schedule, predicted), schedule, predicted).double() for g in (0.6, 0.7, 0.8)))
        with players.turn("generator"):
            SiD(guidance=1.0).generator_loss(players, batch(), rng()).total.backward()
        made.append(players.generator.backbone.gain.grad)
    assert made[0].abs() > 1e-3
    assert_close(*made, rtol=1e-6, atol=0)


class Gain(Backbone):
    """x0 = gain alpha x_t / (alpha^2 + sigma^2), said in any kind."""

    def __init__(self, gain, schedule, kind):
        super().__init__(nn.Linear(1, 1))
        self.gain, self.schedule, self.kind = nn.Parameter(torch.tensor(gain)), schedule, kind

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        c = self.schedule.at(network_time.to(x.dtype)).like(x)
        x0 = self.gain * c.alpha / (c.alpha**2 + c.sigma**2) * x
        eps = (x - c.alpha * x0) / c.sigma
        return {"x0": x0, "eps": eps, "v": c.alpha * eps - c.sigma * x0, "flow": eps - x0}[self.kind]


# -- the fake score's step ---------------------------------------------------------------------------------------------


def test_a_v_network_is_fitted_in_eps():
    """snr / (snr + 1) of v's squared error is eps's.  Fails with v's own error."""
    schedule = VPTable.scaled_linear()
    losses = []
    for kind in ("eps", "v"):
        players = Trio(*(Denoiser(Gain(g, schedule, kind), schedule, kind).double() for g in (0.6, 0.7, 0.8)))
        losses.append(SiD(guidance=1.0).critic_loss(players, batch(), rng("critic")).total.detach())
    assert_close(*losses, rtol=1e-6, atol=0)


def test_the_fake_score_is_fitted_as_it_is_guided():
    """Its guided output is regressed on x: here 0.1 prompt becomes 0.1 k prompt."""
    players, method = trio(), SiD(guidance=2.0, fake_guidance=3.0, drop_prompt=0.0)
    with torch.no_grad():
        found = method.critic_loss(players, batch(), rng("critic")).total
        (x_t, t, prompt, _), (x_u, t_u, empty, _) = players.fake_score.backbone.seen
        draws = rng("critic")
        x = method.rollout(players, batch(), draws).x
    assert torch.equal(x_t, x_u) and torch.equal(t, t_u) and prompt.sum() > 0 and empty.sum() == 0
    fake = players.fake_score.backbone
    estimate = torch.tanh(fake.w * x_t) + fake.b + 0.1 * 3.0 * prompt[:, :, None, None]
    weight = ((1 - t) / t).square().double() + 4
    assert_close(found, (weight * (estimate - x).square().mean((1, 2, 3))).mean().detach(), rtol=1e-6, atol=0)


def test_zero_guidance_asks_the_fake_score_once_and_without_prompt():
    """Zero-CFG.  Fails if the prompt's branch is evaluated for nothing, or prompts of the generator are dropped."""
    players, method = trio(), SiD(guidance=1.0, fake_guidance=0.0, drop_prompt=0.9)
    method.generator_loss(players, batch(), rng())
    method.critic_loss(players, batch(), rng("critic"))
    assert [prompt.sum().item() for *_, prompt, _ in players.fake_score.backbone.seen] == [0, 0]
    assert [prompt.sum().item() for *_, prompt, _ in players.real_score.backbone.seen] == [21]
    assert [prompt.sum().item() for *_, prompt, _ in players.generator.backbone.seen] == [21, 21]


def test_prompts_are_dropped_in_the_fake_scores_step_alone():
    """A tenth of them, sample by sample, for generator and fake score alike; unguided ones keep all."""
    size, players = 2000, trio()
    SiD(guidance=2.0).generator_loss(players, batch(size), rng(size=size))
    SiD(guidance=2.0).critic_loss(players, batch(size), rng("critic", size))
    (_, _, kept, _), (_, _, mine, _) = players.generator.backbone.seen
    assert (kept > 0).all()
    assert (mine == 0).double().mean().item() == pytest.approx(0.1, abs=0.03)  # binomial: .0067
    assert torch.equal(players.fake_score.backbone.seen[2][2], mine)
    players = trio()
    SiD(guidance=2.0, fake_guidance=1.0).critic_loss(players, batch(size), rng("critic", size))
    assert (players.fake_score.backbone.seen[0][2] > 0).all()


def test_negative_guidance_leads_away_from_the_prompt():
    """Anti-CFG: k = -1 is 2 u - c."""
    players = trio()
    metrics = SiD(guidance=1.0, fake_guidance=-1.0).generator_loss(players, batch(), rng()).metrics
    real, (x_t, _, prompt, _) = players.real_score.backbone, players.real_score.backbone.seen[0]
    fake = players.fake_score.backbone
    push = 0.1 * prompt[:, :, None, None]
    gap = torch.tanh(fake.w * x_t) + fake.b - push - (torch.tanh(real.w * x_t) + real.b + push)
    assert_close(metrics["sid/gap_rms"], gap.square().mean().sqrt().detach())


def test_each_network_drops_out_only_where_it_trains():
    """The fake score is evaluated in the generator's step, the generator in the fake score's; both modes come back."""
    players, method = trio(), SiD(guidance=2.0)
    method.generator_loss(players, batch(), rng())
    assert [mode for *_, mode in players.generator.backbone.seen] == [True]
    assert [mode for *_, mode in players.fake_score.backbone.seen] == [False, False]
    assert players.fake_score.training and players.fake_score.backbone.module.training
    method.critic_loss(players, batch(), rng("critic"))
    assert [mode for *_, mode in players.generator.backbone.seen] == [True, False]
    assert [mode for *_, mode in players.fake_score.backbone.seen][2:] == [True, True]
    assert players.generator.training


# -- the GAN ----------------------------------------------------------------------------------------------------------


class Judge(Backbone):
    """Two maps of each element plus the prompt; the first's four channels are what is judged by."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Tanh(), nn.Conv2d(4, 1, 1)))
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]] = []

    @property
    def w(self):
        return self.module[0].weight

    @property
    def taps(self):
        return ("0",)

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        prompt = cond.tensors["prompt"].to(x)[:, :, None, None]
        self.seen.append((x.detach().clone(), network_time.clone(), prompt.flatten().clone(), self.training))
        return self.module(x + 0.1 * prompt)


def judges(head=False, shift=0.0) -> Trio:
    """A trio of those.  shift: of the fake score's features."""
    made = [Denoiser(Judge(seed), RectifiedFlow(), "x0").double() for seed in (1, 2, 3)]
    with torch.no_grad():
        made[2].backbone.module[0].bias += shift
    return Trio(*made, head=Head({"0": (4, 4, 3)}).double() if head else None)


def with_real(size=6) -> Batch:
    """Real samples with captions of their own, 101 to 100 + size."""
    given = batch(size)
    caption = dataclasses.replace(given.cond, tensors={"prompt": 100 + given.cond.tensors["prompt"]})
    x = torch.randn(size, 1, 4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return dataclasses.replace(given, real=Real(x, caption))


ADVERSARIAL = SiD(guidance=1.0, gan_weight=0.7, gan_critic_weight=0.3)


def judgement(players, x, prompt, t, eps):
    """The logits with plain tensors: a map of the re-noised sample, its mean over channels."""
    t, first = t.double()[:, None, None, None], players.fake_score.backbone.module[0]
    features = first((1 - t) * x + t * eps + 0.1 * prompt[:, :, None, None])
    return features.sum(1).flatten(1) / 4


def level(draws, x):
    return SiD().law().sample(draws, "gan.t"), draws.randn_like(x, "gan.eps")


def test_before_the_gan_takes_part_nothing_differs():
    """To the bit, in the generator's turn and in the fake score's first loss, real samples or not."""
    made = []
    for method, given in ((SiD(), batch()), (SiD(), with_real()), (SiD(gan_weight=0.7, gan_warmup=3), with_real())):
        players = judges()
        with players.turn("generator"):
            loss = method.generator_loss(players, given, rng(iteration=2))
            loss.total.backward()
        critic = method.critic_loss(players, given, rng("critic"))
        first = critic if isinstance(critic, Loss) else next(iter(critic))
        made.append((loss.total, first.total, *(p.grad for p in players.generator.parameters())))
        assert "gan" not in loss.metrics and isinstance(critic, Loss) == (not method.gan_weight)
    for plain, real, waiting in zip(*made, strict=True):
        assert torch.equal(plain, real) and torch.equal(plain, waiting)


def test_the_generators_gan_loss_by_hand():
    """Value and gradient: the softplus of the negative pooled logit, times the mean of the identity's weights.

    Fails with the sign of either reversed, with detached samples, and without the normaliser.
    """
    players, given, made = judges(), with_real(), []
    with players.turn("generator"):
        weights = players.weights("generator")
        for method in (SiD(guidance=1.0), ADVERSARIAL):
            loss = method.generator_loss(players, given, rng(iteration=1))
            made.append((loss, torch.autograd.grad(loss.total, weights)))
        (plain, without), (loss, both) = made
        draws = rng(iteration=1)
        x = ADVERSARIAL.rollout(players, given, draws).x
        logits = judgement(players, x, given.cond.tensors["prompt"], *level(draws, x))
        wanted = 0.7 * softplus(-logits).mean() * plain.metrics["sid/weight"]
        assert_close(loss.total - plain.total, wanted, rtol=1e-6, atol=0)
        assert_close(0.7 * loss.metrics["gan"], wanted, rtol=1e-6, atol=0)
        for found, first, second in zip(both, without, torch.autograd.grad(wanted, weights), strict=True):
            assert_close(found - first, second, rtol=1e-5, atol=1e-10)
            assert second.abs().max() > 1e-4


def test_the_critics_gan_loss_by_hand():
    """Real is positive.  Fails with the two exchanged, and with captions or noise of another."""
    players, given = judges(), with_real()
    with players.turn("critic"):
        _, found = ADVERSARIAL.critic_loss(players, given, rng("critic"))
        draws = rng("critic")
        x = ADVERSARIAL.rollout(players, given, draws).x.detach()
        noise = level(draws, x)
        real = judgement(players, given.real.x0, given.real.cond.tensors["prompt"], *noise)
        fake = judgement(players, x, given.cond.tensors["prompt"], *noise)
        wanted = 0.3 * (softplus(-real).mean() + softplus(fake).mean())
        first = list(players.fake_score.backbone.module[0].parameters())
        assert_close(found.total, wanted, rtol=1e-6, atol=0)
        assert_close(torch.autograd.grad(found.total, first), torch.autograd.grad(wanted, first), rtol=1e-6, atol=1e-9)
    assert_close(found.metrics["gan/real"], real.mean().detach(), rtol=1e-6, atol=0)
    assert_close(found.metrics["gan/fake"], fake.mean().detach(), rtol=1e-6, atol=0)


def test_the_identitys_gradient_is_told_from_the_gans():
    """The identity's is what it is without a GAN.  Fails if it is taken for the whole, or the two are exchanged."""
    with_gan, alone = (
        method.generator_loss(judges(), with_real(), rng(iteration=1)).grads
        for method in (ADVERSARIAL, SiD(guidance=1.0))
    )
    assert with_gan.keys() == {"sid", "gan"} and with_gan["gan"].abs().max() > 0
    assert_close(with_gan["sid"], alone["sid"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["pooled", "learned"])
def test_the_gans_turns_move_only_their_players(head):
    """The generator's gradient goes through the discriminator's weights and not into them; the critic's reaches the
    fake score and the head."""
    method = dataclasses.replace(ADVERSARIAL, gan_head=head)
    check_isolation(method, judges(head == "learned"), with_real(), iteration=1)
    players = judges(head == "learned")
    for turn, losses in (("generator", method.generator_loss), ("critic", method.critic_loss)):
        with players.turn(turn):
            made = losses(players, with_real(), rng(turn, iteration=1))
            for loss in [made] if isinstance(made, Loss) else made:
                loss.total.backward()
        if head == "learned":
            assert all((p.grad is not None) == (turn == "critic") for p in players.discriminator().parameters())


def test_the_critics_losses_reach_no_generator_whoever_trains():
    players = judges()
    for loss in ADVERSARIAL.critic_loss(players, with_real(), rng("critic")):
        loss.total.backward()
    assert all(p.grad is None for p in players.generator.parameters())
    assert all(p.grad is not None for p in players.fake_score.parameters())


def test_real_and_generated_samples_share_level_and_noise():
    """At a pair's one t and eps, x_t - (1 - t) x is the same; t keeps to the indices of the other losses."""
    players, given, method = judges(), with_real(), dataclasses.replace(ADVERSARIAL, min_index=500, max_index=501)
    list(method.critic_loss(players, given, rng("critic")))
    _, (real, t_real, *_), (fake, t_fake, *_) = players.fake_score.backbone.seen
    assert torch.equal(t_real, t_fake) and set((t_real * 999).round().tolist()) == {500, 501}
    clean = (1 - t_real).double()[:, None, None, None]
    x = method.rollout(players, given, rng("critic")).x.detach()
    assert_close(real - clean * given.real.x0, fake - clean * x, rtol=0, atol=1e-6)
    method.generator_loss(players, given, rng(iteration=1))
    *_, (_, t, *_) = players.fake_score.backbone.seen
    assert set((t * 999).round().tolist()) == {500, 501}


def test_the_judge_hears_the_prompt_whatever_the_guidance():
    """Zero-CFG's fake score denoises without, and judges with it: real samples under their own."""
    players, method = judges(), SiD(guidance=1.0, fake_guidance=0.0, gan_weight=0.7)
    list(method.critic_loss(players, with_real(), rng("critic")))
    method.generator_loss(players, with_real(), rng(iteration=1))
    told = [prompt.sum().item() for *_, prompt, _ in players.fake_score.backbone.seen]
    assert told == [0, 621, 21, 0, 21]  # denoising, real, fake; identity, GAN


def test_real_samples_lose_their_prompts_with_the_generated_ones():
    """Fails if only the generated ones do: no prompt would mean generated."""
    players = judges()
    list(SiD(guidance=2.0, gan_weight=0.7, drop_prompt=0.5).critic_loss(players, with_real(40), rng("critic", 40)))
    *_, (_, _, real, _), (_, _, fake, _) = players.fake_score.backbone.seen
    assert torch.equal(real == 0, fake == 0) and 8 < (fake == 0).sum() < 32
    assert set((real - fake).tolist()) == {0, 100}


def test_the_judge_drops_out_only_where_it_trains():
    players = judges()
    ADVERSARIAL.generator_loss(players, with_real(), rng(iteration=1))
    assert [mode for *_, mode in players.fake_score.backbone.seen] == [False, False]
    list(ADVERSARIAL.critic_loss(players, with_real(), rng("critic")))
    assert [mode for *_, mode in players.fake_score.backbone.seen][2:] == [True, True, True]


@pytest.mark.parametrize(("shift", "loss"), [(30.0, math.log1p(math.exp(-10))), (-200.0, math.log1p(math.exp(10)))])
def test_the_generator_does_not_follow_logits_beyond_ten(shift, loss):
    """SiDA clamps them: the loss is that of 10 or -10, its gradient 0."""
    made = []
    for method in (SiD(guidance=1.0), ADVERSARIAL):
        players = judges(shift=shift)
        with players.turn("generator"):
            total, metrics, _ = method.generator_loss(players, with_real(), rng(iteration=1))
            total.backward()
        made.append([p.grad for p in players.generator.parameters()])
    assert (metrics["gan"] / metrics["sid/weight"]).item() == pytest.approx(loss)
    for plain, judged in zip(*made, strict=True):
        assert torch.equal(plain, judged)


def test_the_generator_is_judged_after_the_warmup_and_the_critic_learns_from_the_first():
    method = dataclasses.replace(ADVERSARIAL, gan_warmup=5)
    judged = ["gan" in method.generator_loss(judges(), with_real(), rng(iteration=i)).metrics for i in (0, 4, 5)]
    assert judged == [False, False, True]
    assert len(list(method.critic_loss(judges(), with_real(), rng("critic", iteration=0)))) == 2


def test_the_critics_two_losses_never_hold_two_graphs():
    players = judges()
    losses = iter(ADVERSARIAL.critic_loss(players, with_real(), rng("critic")))
    next(losses)
    assert len(players.fake_score.backbone.seen) == 1


def test_taps_may_be_named():
    """Two modules: their places side by side."""
    players, x, prompt = judges(), with_real().real.x0, batch().cond.tensors["prompt"]
    method = dataclasses.replace(ADVERSARIAL, gan_taps=("0", "2"))
    logits = method.logits(players, x, batch().cond, *level(rng(), x))
    assert logits.shape == (6, 24)
    assert_close(logits[:, :12], judgement(players, x, prompt, *level(rng(), x)), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="Linear has no default features for a GAN"):
        list(ADVERSARIAL.critic_loss(trio(), with_real(), rng("critic")))


def test_what_the_gan_asks_for_and_refuses():
    assert SiD().roles == {"fake_score"} and not SiD().needs
    assert ADVERSARIAL.roles == {"fake_score"} and ADVERSARIAL.needs == {"latents"}
    assert dataclasses.replace(ADVERSARIAL, gan_head="learned").roles == {"fake_score", "head"}
    with pytest.raises(ValueError, match="real latents"):
        list(ADVERSARIAL.critic_loss(judges(), batch(), rng("critic")))
    for bad, said in (
        ({"gan_weight": -1.0}, "gan_weight must be .*-1"),
        ({"gan_weight": 1.0, "gan_critic_weight": 0.0}, "gan_critic_weight must be"),
        ({"gan_weight": 1.0, "gan_head": "mean"}, "'pooled' or 'learned', got 'mean'"),
        ({"gan_weight": 1.0, "gan_warmup": 0}, "gan_warmup must be >= 1"),
        ({"gan_critic_weight": 1.0, "gan_warmup": 7}, "gan_critic_weight, gan_warmup would .* give gan_weight > 0"),
        ({"gan_head": "learned"}, "gan_head would have no effect"),
        ({"gan_taps": ("0",)}, "gan_taps would have no effect"),
    ):
        with pytest.raises(ValueError, match=said):
            SiD(**bad)


# -- its ranges, turns and options -------------------------------------------------------------------------------------


def test_levels_are_the_papers():
    """SiD-LSG: indices 20..979 in both turns; SiD on EDM: u in [0, .8], whose ends are .002 and 24.41, is 0..799."""
    players, ids = trio(), tuple(range(20_000))
    times = SiD().law().sample(Rng(0, 0, "generator", ids), "t") * 999
    assert (times.min().round(), times.max().round()) == (20, 979)
    method = SiD(min_index=500, max_index=501)
    method.generator_loss(players, batch(), rng())
    method.critic_loss(players, batch(), rng("critic"))
    for _, t, *_ in players.fake_score.backbone.seen:
        assert set((t * 999).round().tolist()) <= {500, 501}
    sigma = EDM().at(torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)).sigma
    assert sigma.tolist() == pytest.approx([0.002, 0.085, 2.515, 24.4083, 80], rel=3e-3)


def test_the_fake_score_moves_first_and_then_one_to_one():
    order = [turn for i in range(4) for turn in SiD().turns.at(i)]
    assert order == ["critic", "generator", "critic", "generator", "critic", "generator", "critic"]


def test_the_student_starts_at_the_papers_level():
    """Index 625 of Stable Diffusion's table, sigma 2.5 of EDM's, t = .714 of rectified flow."""
    method = SiD(num_steps=4)
    assert (method.sampler.grid(VPTable.scaled_linear()) * 999).round().tolist() == [625, 468, 312, 156]
    assert method.sampler.grid(RectifiedFlow()).tolist() == pytest.approx([0.714, 0.536, 0.357, 0.179])
    assert method.sampler.begin(torch.ones(1), EDM()).item() == pytest.approx(2.5, rel=2e-3)
    assert SiD(init_sigma=None).sampler.grid(VPTable.scaled_linear()).tolist() == [1]


def test_options_are_frozen_and_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SiD().guidance = 3.0
    for name, value in (
        *(("num_steps", 0), ("guidance", 0.0), ("floor", math.nan), ("alpha", -1.0), ("fake_guidance", math.inf)),
        *(("init_sigma", 0.0), ("init_sigma", math.inf), ("drop_prompt", 1.0), ("student_shift", 0.0)),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
            SiD(**{name: value})
    with pytest.raises(ValueError, match="indices"):
        SiD(max_index=1000)
    assert SiD(turns=Turns(critic_per_generator=5)).turns.critic_per_generator == 5
