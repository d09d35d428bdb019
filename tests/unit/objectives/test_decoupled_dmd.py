"""Decoupled DMD: the split of DMD2's gradient, where its two terms look, and what they do to Gaussians (T17-T19)."""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fewstep.diffusion import EDM, RectifiedFlow, VPTable
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.models.trio import Trio
from fewstep.objectives.decoupled_dmd import DecoupledDMD, move
from fewstep.objectives.dmd2 import DMD2
from fewstep.rng import Rng
from fewstep.types import Batch, Condition
from tests import affine
from tests.unit.objectives import test_gan as gan

SPREAD, MEANS, EMPTY = 0.5, {"real": 1.0, "fake": 0.3}, -0.2
LEVELS = (1.0, 0.9375, 0.8333, 0.625)
KAPPA = (0.644816, 0.621161, 0.574383, 0.445045)  # its mean over (0, level), by numerical integration
RATIO = (1.0, 0.9633, 0.8908, 0.6902)


class Formula(Backbone):
    """E[x0 | x_t] of N(mean, .5^2) with the prompt, of N(-.2, .5^2) with the empty one; remembers what it saw."""

    def __init__(self, mean: float, schedule) -> None:
        super().__init__(nn.Linear(1, 1).requires_grad_(False))
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.schedule = schedule
        self.seen: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    @property
    def dtype(self):
        return torch.float64

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        empty = bool((cond.tensors["prompt"] == 0).all())
        self.seen.append((x.detach().clone(), network_time.clone(), empty))
        c, mean = self.schedule.at(network_time.double()).like(x), EMPTY if empty else self.mean
        gain = c.alpha * SPREAD**2 / (c.alpha**2 * SPREAD**2 + c.sigma**2)
        return mean + gain * (x - c.alpha * mean)


class Point(Formula):
    """A generator that answers its mean plus a little of its input, so that samples differ."""

    def forward(self, x, network_time, cond):
        self.seen.append((x.detach().clone(), network_time.clone(), False))
        return self.mean + 0.1 * x


class StepRng(Rng):
    """Every shared integer is `step`, so that a rollout ends where the test wants it."""

    step = 0

    def shared_int(self, stream, high):
        return self.step


class Stratified:
    """The quantiles of [0, 1) in order, for integrals through a law without noise."""

    def __init__(self, count: int) -> None:
        self.count = count

    def rand(self, stream):
        return (torch.arange(self.count) + 0.5) / self.count


def players(schedule=RectifiedFlow(), **means: float) -> Trio:  # noqa: B008
    means = {**MEANS, "generator": MEANS["fake"], **means}
    generator = Denoiser(Point(means["generator"], schedule), schedule, "x0")
    real, fake = (Denoiser(Formula(means[name], schedule), schedule, "x0") for name in ("real", "fake"))
    return Trio(generator=generator, real_score=real, fake_score=fake)


def batch(size: int = 6) -> Batch:
    return Batch(Condition({"prompt": torch.ones(size, 1)}, {"prompt": torch.zeros(1, 1)}), (2, 3), tuple(range(size)))


def rng(step: int = 0, size: int = 6, iteration: int = 0) -> Rng:
    made = StepRng(0, iteration, "generator", tuple(range(size)))
    made.step = step
    return made


def gradient(method: DMD2, trio: Trio, **draws: int) -> torch.Tensor:
    """numel(x) dL/dx: minus the way that each sample moves."""
    rollout = method.rollout(trio, batch(draws.get("size", 6)), rng(**draws))
    x = rollout.x.detach().requires_grad_()
    total, _ = method.matching(trio, batch(len(x)), rollout._replace(x=x), rng(**draws), {})
    (grad,) = torch.autograd.grad(total, x)
    return grad * x.numel()


def calls(trio: Trio) -> tuple[int, int]:
    """How often the teacher and the fake score were asked."""
    return len(trio.real_score.backbone.seen), len(trio.critic().backbone.seen)


def kappa(t: torch.Tensor, schedule=RectifiedFlow()) -> torch.Tensor:  # noqa: B008
    """s^2 / (a^2 c^2 + s^2): D_c - D_u = kappa (m_c - m_u) at every x_t."""
    c = schedule.at(t.double())
    return c.sigma**2 / (c.alpha**2 * SPREAD**2 + c.sigma**2)


def times(trio: Trio) -> tuple[torch.Tensor, torch.Tensor]:
    """The times of DM (the fake score's) and of CA (the empty prompt's, where it is asked at another one)."""
    ((_, dm, _),) = trio.critic().backbone.seen
    empty = [t for _, t, empty in trio.real_score.backbone.seen if empty]
    return dm, next((t for t in empty if not torch.equal(t, dm)), empty[0])


# -- T17: the identity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4])
def test_one_shared_level_is_dmd2(num_steps):
    """T17: to float64 rounding and for as many network calls.  The networks are affine maps with unlike slopes."""
    made, method = {}, {"num_steps": num_steps, "guidance": 3.0}
    for name, objective in (
        ("dmd2", DMD2(**method)),
        ("decoupled", DecoupledDMD(**method, times="shared", normaliser="sum-guided")),
    ):
        trio = affine.trio()
        for network in (trio.generator, trio.real_score, trio.critic()):
            network.double()
        with trio.turn("generator"):
            objective.generator_loss(trio, affine.batch(), affine.rng()).total.backward()
        made[name] = [p.grad for p in trio.weights("generator")] + [trio.generator.backbone.w.grad]
        assert calls(trio) == (2, 1)
        assert made[name][-1].dtype == torch.float64
    assert_close(made["decoupled"], made["dmd2"], rtol=1e-12, atol=0)


def test_guidance_one_leaves_the_matching_alone_and_asks_nothing_more():
    """T17: CA is zero, costs no call, and what is left is DMD2 without guidance, whatever the normaliser."""
    wanted = gradient(DMD2(guidance=1.0), players())
    for normaliser in ("per-term", "sum-conditional", "sum-guided"):
        trio = players()
        found = gradient(DecoupledDMD(guidance=1.0, times="shared", normaliser=normaliser), trio)
        assert calls(trio) == (1, 1)
        assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("normaliser", ["per-term", "sum-conditional", "sum-guided"])
def test_a_fake_score_that_equals_the_real_one_leaves_augmentation_alone(normaliser):
    """T17: the gradient is (guidance - 1)(D_u - D_c) / n.  Fails if DM's real score is guided: it would move x too."""
    method = DecoupledDMD(guidance=3.0, normaliser=normaliser, floor=10.0)
    trio = players(fake=MEANS["real"])
    found = gradient(method, trio)
    _, t = times(trio)
    assert_close(found, (-2.0 * (MEANS["real"] - EMPTY) * kappa(t) / 10.0)[:, None, None].expand(found.shape))


@pytest.mark.parametrize(
    ("settings", "real", "fake"),
    [
        ({"times": "hybrid"}, 3, 1),
        ({"times": "full"}, 3, 1),
        ({"times": "constrained"}, 3, 1),
        ({"times": "shared"}, 2, 1),
        ({"times": "hybrid", "normaliser": "sum-conditional"}, 3, 1),
        ({"times": "hybrid", "normaliser": "sum-guided"}, 4, 1),
        ({"times": "shared", "normaliser": "sum-guided"}, 2, 1),
        ({"times": "constrained", "guidance": 1.0}, 1, 1),
    ],
)
def test_network_calls_are_as_many_as_needed(settings, real, fake):
    trio = players()
    gradient(DecoupledDMD(num_steps=4, **{"guidance": 3.0, **settings}), trio)
    assert calls(trio) == (real, fake)


# -- where the terms look ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VPTable.scaled_linear(), EDM()], ids=["flow", "vp", "edm"])
@pytest.mark.parametrize(("shift", "student_shift"), [(1.0, 1.0), (3.0, 3.0), (5.0, 1.0), (1.0, 5.0)])
@pytest.mark.parametrize("mode", ["hybrid", "constrained"])
def test_augmentation_looks_only_where_the_signal_is_cleaner_than_the_input(schedule, shift, student_shift, mode):
    """T18, in SNR, both shifts applied.  Fails with the paper's time read as ours, or with a comparison before a shift.

    The level is read off the network's own input at the step that trains.
    """
    method = DecoupledDMD(num_steps=4, guidance=3.0, times=mode, shift=shift, student_shift=student_shift)
    for step in range(4):
        trio = players(schedule)
        gradient(method, trio, step=step, size=200)
        told = trio.generator.backbone.seen[-1][1]
        dm, ca = (schedule.at(t.double()).log_snr for t in times(trio))
        level = schedule.at(told.double()).log_snr
        assert (ca >= level).all()
        assert (dm >= level).all() or (mode == "hybrid" and step > 0)
        assert (dm < level).any() == (mode == "hybrid" and step > 0)


def test_the_matching_terms_times_do_not_depend_on_the_step():
    """T18: in "hybrid" they are DMD2's own at every step.  Fails if they are cut off too, which over-saturates."""
    ids = {"size": 50}
    plain = players()
    gradient(DMD2(num_steps=4, guidance=1.0), plain, **ids)
    for step in range(4):
        trio = players()
        gradient(DecoupledDMD(num_steps=4, guidance=3.0), trio, step=step, **ids)
        assert torch.equal(times(trio)[0], plain.critic().backbone.seen[-1][1])


@pytest.mark.parametrize(("level", "last"), [(1.0, 980), (0.75, 749), (0.5, 499), (749 / 999, 749), (0.021, 20)])
def test_the_constrained_law_is_uniform_up_to_the_level(level, last):
    """Every index from min_index to the level's own equally often; a one-step student, at 1, sees the full range.

    749 / 999 in float32 is the index of a table's student: it must not be lost to rounding.
    """
    level = float(torch.tensor(level))
    count = last - 20 + 1
    t = DecoupledDMD(num_steps=4, guidance=3.0).law_below(level).sample(Stratified(7 * count), "")
    seen = Counter((t.double() * 999).round().int().tolist())
    assert seen == {index: 7 for index in range(20, last + 1)}


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shifted_constrained_law_is_the_full_one_cut_off(shift):
    """P(t | t <= level), so that the shift bends both alike.  Fails if the law is shifted past it and clamped."""
    method = DecoupledDMD(num_steps=4, guidance=3.0, shift=shift)
    full = method.law(20, 980).sample(Stratified(961), "")
    for level in (0.9, 0.6, 0.3):
        wanted = full[full <= level]
        assert_close(method.law_below(level).sample(Stratified(len(wanted)), ""), wanted, atol=1e-6, rtol=0)


def test_the_first_steps_level_is_pure_noise_whatever_it_is_told():
    """first_time names a time to the network; the input holds nothing, so nothing is decided."""
    method = DecoupledDMD(num_steps=4, guidance=3.0, first_time=0.4)
    assert method.sampler.grid(RectifiedFlow()).tolist() == pytest.approx([0.8, 0.75, 0.5, 0.25])
    assert [method.level(RectifiedFlow(), k) for k in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_both_prompts_of_a_term_see_one_state_and_the_terms_different_ones():
    """Guidance is a difference at one x_t.  Fails with noise drawn anew for the empty prompt."""
    trio = players()
    gradient(DecoupledDMD(num_steps=4, guidance=3.0, normaliser="sum-guided"), trio, step=1)
    (at_dm, at_ca), fake = ([], []), trio.critic().backbone.seen[0]
    for x_t, t, empty in trio.real_score.backbone.seen:
        (at_dm if torch.equal(t, fake[1]) else at_ca).append((x_t, empty))
    for pair in (at_dm, at_ca):
        assert torch.equal(pair[0][0], pair[1][0]) and {empty for _, empty in pair} == {True, False}
    assert torch.equal(at_dm[0][0], fake[0]) and not fake[2]
    assert not torch.equal(at_dm[0][0], at_ca[0][0])


@pytest.mark.parametrize("shared", [True, False])
def test_terms_share_their_noise_only_if_asked_to(shared):
    """eps read back from x_t and x."""
    trio = players()
    method = DecoupledDMD(num_steps=4, guidance=3.0, share_noise=shared)
    x = method.rollout(trio, batch(), rng(step=1)).x
    gradient(method, trio, step=1)
    states = (trio.critic().backbone.seen[0], trio.real_score.backbone.seen[-1])
    first, second = ((x_t - (1 - t)[:, None, None] * x) / t[:, None, None] for x_t, t, _ in states)
    assert bool((first - second).abs().max() < 1e-5) == shared


# -- closed forms on Gaussians -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "kappa_mean", "ratio"), list(zip(LEVELS, KAPPA, RATIO)))
def test_the_laws_weights_are_the_integrals(level, kappa_mean, ratio):
    """E kappa over (0, level), flow, c = .5, and R = E_CA / E_DM.

    The indices 0..999 are a trapezoid rule with half a point too much at each end: 1 / (2 * 1000 level) at most.
    """
    method = DecoupledDMD(num_steps=4, guidance=3.0, min_index=0, max_index=999)
    found = kappa(method.law_below(level).sample(Stratified(100_000), "")).mean().item()
    full = kappa(method.law(0, 999).sample(Stratified(100_000), "")).mean().item()
    assert found == pytest.approx(kappa_mean, abs=5e-4)
    assert found / full == pytest.approx(ratio, abs=1e-3)


def test_the_gradient_on_gaussians_is_the_closed_form():
    """-(kappa(t_dm)(m_c - m_f) + (guidance - 1) kappa(t_ca)(m_c - m_u)), wherever x_t is."""
    trio = players()
    found = gradient(DecoupledDMD(num_steps=4, guidance=3.0, floor=10.0), trio, step=2)
    dm, ca = times(trio)
    wanted = -(kappa(dm) * (MEANS["real"] - MEANS["fake"]) + 2.0 * kappa(ca) * (MEANS["real"] - EMPTY)) / 10.0
    assert_close(found, wanted[:, None, None].expand(found.shape), rtol=1e-12, atol=0)


def test_normalisers_divide_what_they_say():
    """Each by hand from the estimates; with real levels and no floor in the way."""
    base = {"num_steps": 4, "guidance": 3.0, "share_noise": True}
    for normaliser in ("per-term", "sum-conditional", "sum-guided"):
        trio = players()
        method = DecoupledDMD(**base, normaliser=normaliser)
        x = method.rollout(trio, batch(), rng(step=1)).x.detach()
        found = gradient(method, trio, step=1)
        at_dm, t_dm, _ = trio.critic().backbone.seen[0]
        at_ca, t_ca = next((x_t, t) for x_t, t, _ in trio.real_score.backbone.seen if not torch.equal(t, t_dm))
        prompt, null = batch().cond, batch().cond.unconditional()
        c_dm, c_ca, u_dm, u_ca = (
            trio.real_score(*state, cond).x0
            for cond, state in itertools.product((prompt, null), ((at_dm, t_dm), (at_ca, t_ca)))
        )
        f_dm = trio.critic()(at_dm, t_dm, prompt).x0
        n = {"c_dm": c_dm, "c_ca": c_ca, "guided": u_dm + 3.0 * (c_dm - u_dm)}
        n = {name: (x - value).abs().mean((1, 2), keepdim=True) for name, value in n.items()}
        first, second = {
            "per-term": (n["c_dm"], n["c_ca"]),
            "sum-conditional": (n["c_dm"], n["c_dm"]),
            "sum-guided": (n["guided"], n["guided"]),
        }[normaliser]
        assert_close(found, (f_dm - c_dm) / first + 2.0 * (u_ca - c_ca) / second)


class Quantiles(StepRng):
    """Uniform numbers at the midpoints of equal shares, so that means over the batch are the laws' integrals."""

    def rand(self, stream):
        return Stratified(len(self._sample_ids)).rand(stream)


def mean_dynamics(step: int, updates: int, matching: bool = True) -> list[float]:
    """The generator's mean under its own loss at one step, guidance 2, a fake score that is always right: m_f = m.

    Without `matching` the fake score says what the real one says.
    """
    ids = tuple(range(250))
    method = DecoupledDMD(num_steps=4, guidance=2.0, student_shift=5.0, min_index=0, max_index=999, floor=10.0)
    many = Batch(Condition({"prompt": torch.ones(250, 1)}, {"prompt": torch.zeros(1, 1)}), (1,), ids)
    path = [0.0]
    for update in range(updates):
        trio = players(generator=path[-1], fake=path[-1] if matching else MEANS["real"])
        draws = Quantiles(0, update, "generator", ids)
        draws.step = step
        with trio.turn("generator"):
            method.generator_loss(trio, many, draws).total.backward()
        path.append(path[-1] - 10.0 * trio.generator.backbone.mean.grad.item())  # 10: the floor
    return path


@pytest.mark.parametrize("step", range(4))
def test_the_mean_settles_at_the_fixed_point_of_the_step(step):
    """T19: m = m_c + (guidance - 1)(m_c - m_u) R, R by the step's level.  The last step settles short of CFG's mean.

    Each update leaves 1 - .645 of the distance: 1e-6 after 14.  The steps are at whole thousandths.
    """
    path = mean_dynamics(step, updates=14)
    assert path[-1] == pytest.approx(MEANS["real"] + (MEANS["real"] - EMPTY) * RATIO[step], abs=2e-3)


def test_augmentation_alone_drifts_without_end():
    """T19: the mean leaves the empty prompt's by the same amount every update.  Fails for a flipped sign of CA."""
    drift = torch.tensor(mean_dynamics(step=3, updates=5, matching=False)).diff()
    assert (drift > 0).all()  # m_c > m_u: up is away
    assert_close(drift, torch.full_like(drift, (MEANS["real"] - EMPTY) * KAPPA[3]), rtol=2e-3, atol=0)


def test_move_goes_along_delta_and_reports_half_its_square():
    """dL/dx numel = -delta / n, n per sample and at least the floor."""
    draw = torch.Generator().manual_seed(0)
    x, delta, at = (torch.randn(3, 2, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    at[1] = x[1]  # this sample's n is the floor
    x.requires_grad_()
    loss = move(x, delta, at, floor=0.1)
    (grad,) = torch.autograd.grad(loss, x)
    n = (x.detach() - at).abs().mean((1, 2), keepdim=True).clamp_min(0.1)
    assert_close(grad * x.numel(), -delta / n)
    assert_close(loss, 0.5 * (delta / n).square().mean())


# -- what is logged, refused, inherited ----------------------------------------------------------------------------


def test_metrics_name_both_terms_by_what_they_move():
    trio = players()
    method = DecoupledDMD(num_steps=4, guidance=3.0, floor=10.0)
    with trio.turn("generator"):
        logged = method.generator_loss(trio, batch(), rng(step=2)).metrics
    dm, ca = times(trio)
    rms = {"dm": kappa(dm) * 0.7 / 10.0, "ca": 2.0 * kappa(ca) * 1.2 / 10.0}
    for name, value in rms.items():
        assert_close(logged[f"{name}/rms"], value.square().mean().sqrt())
    assert_close(logged["dm/gap_rms"], rms["dm"].square().mean().sqrt() * 10.0)
    assert_close(logged["dm"], 0.5 * sum(value.square().mean() for value in rms.values()))
    assert -1 <= logged["dm/cos"] <= 1 and logged["dm/lag"] > 0
    assert {"x/mean", "x/std"} <= logged.keys()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"times": "decoupled"}, "allowed: shared, full, constrained, hybrid"),
        ({"normaliser": "N1"}, "allowed: per-term, sum-conditional, sum-guided"),
        ({"guidance": 1.0}, "use --method dmd2"),
        ({"guidance": 1.0, "times": "full"}, "use --method dmd2"),
        ({"guidance": 1.0, "times": "constrained", "share_noise": True}, "share_noise=True has no effect"),
        ({"times": "shared", "share_noise": True}, "share_noise=True has no effect"),
        ({"num_steps": 16, "shift": 5.0}, "raise student_shift"),
        ({"num_steps": 8, "min_index": 125}, "lower min_index"),
        ({"num_steps": 0}, "num_steps"),
        ({"r1_weight": 1.0}, "give gan_weight"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        DecoupledDMD(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_steps": 16, "shift": 5.0, "times": "full"},
        {"num_steps": 16, "shift": 5.0, "student_shift": 5.0},
        {"guidance": 1.0, "times": "shared"},
        {"guidance": 1.0, "times": "constrained", "num_steps": 4},
    ],
)
def test_the_neighbours_of_refused_settings_are_taken(settings):
    method = DecoupledDMD(**settings)
    assert all(getattr(method, name) == value for name, value in settings.items())


def test_a_gan_is_added_as_in_dmd2():
    """Fails if the overridden term leaves generator_loss's GAN out."""
    grads = {}
    for weight in (0.0, 0.5):
        for method in (DMD2(guidance=3.0, gan_weight=weight), DecoupledDMD(guidance=3.0, gan_weight=weight)):
            trio = gan.trio()
            with trio.turn("generator"):
                loss = method.generator_loss(trio, gan.batch(), gan.rng())
                loss.total.backward()
            assert ("gan" in loss.metrics) == bool(weight)
            grads[type(method), weight] = [p.grad.clone() for p in trio.generator.parameters()]
    for a, b, c, d in zip(*(grads[kind, weight] for kind in (DMD2, DecoupledDMD) for weight in (0.0, 0.5))):
        assert_close(b - a, d - c, atol=1e-6, rtol=1e-4)
        assert (d - c).abs().max() > 1e-4
