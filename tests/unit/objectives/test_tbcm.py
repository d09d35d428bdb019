"""TBCM and sCM: the tangent by closed form, the trajectory and its pairs, and what the loss does with them."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import Prediction, RectifiedFlow, VPTable, directional_derivative, like, match
from fewstep.models.perception import Perception
from fewstep.models.trio import Trio
from fewstep.objectives.consistency import (
    TRIG,
    LogWeight,
    Pairs,
    consistency_loss,
    consistency_tangent,
    teacher_velocity,
)
from fewstep.objectives.consistency import _path as path
from fewstep.objectives.scm import SCM
from fewstep.objectives.tbcm import TBCM, jittered, reference_grid
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Real
from fewstep_cuda import tangent_normalise
from tests.affine import batch, rng, trio

GOLDEN = (
    *(1.5708, 1.5423, 1.5095, 1.4714, 1.4268, 1.3741, 1.3112, 1.2356),
    *(1.1440, 1.0331, 0.8997, 0.7425, 0.5642, 0.3734, 0.1832, 0.0063),
)
MEAN, STD = 1.5, 0.5
DATA_FREE = {"guidance": 1.0, "warmup": 0, "calm_r": 1.0}


def waves(t, x):
    """cos and sin of the angle, and the noised Gaussian's variance D, shaped like x."""
    c, s = (t.double() * math.pi / 2).cos(), (t.double() * math.pi / 2).sin()
    return like(c, x), like(s, x), like(STD**2 * c**2 + s**2, x)


def velocity(x, t):
    """The probability flow's dx/da for N(MEAN, STD^2)."""
    c, s, d = waves(t, x)
    return -MEAN * s + (1 - STD**2) * s * c / d * (x - MEAN * c)


class Consistent:
    """Its exact consistency function, as a network of a kind on a native schedule."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, t, cond, *, taps=()):
        time, scale = match(t.double(), self.schedule, TRIG)
        x = like(scale, x_t) * x_t
        c, _, d = waves(time, x)
        return Prediction(MEAN + STD / d.sqrt() * (x - MEAN * c), x_t, t, "x0", self.schedule)


def drawn(count=7, seed=0):
    """Noised draws and the teacher's velocity there, away from the ends of VP's table; float64."""
    made = torch.Generator().manual_seed(seed)
    t = 0.05 + 0.85 * torch.rand(count, generator=made, dtype=torch.float64)
    x0, eps = torch.randn(2, count, 2, 3, generator=made, dtype=torch.float64)
    x = TRIG.add_noise(MEAN + STD * x0, eps, t)
    return Pairs(x, t, velocity(x, t), Condition())


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VPTable.scaled_linear(), TRIG], ids=["flow", "vp", "trig"])
def test_the_tangent_of_the_exact_consistency_function_is_zero(schedule):
    """Fails for a wrong sign of any term, a missing cos sin or 2 / pi, a state that moves otherwise."""
    pairs = drawn()
    value, jvp = directional_derivative(*path(Consistent(schedule), pairs))
    assert consistency_tangent(value, pairs, jvp, 1.0).abs().max() < 1e-8
    # Calmed, the loss does not rest there.
    assert consistency_tangent(value, pairs, jvp, 0.75).abs().max() > 0.01


def test_a_student_of_unit_data_is_half_an_angle():
    """Data N(0, 1): v = 0, F* = -x tan(a / 2)."""
    pairs = drawn()
    a = like(pairs.t * math.pi / 2, pairs.x)
    exact, pairs = -pairs.x * (a / 2).tan(), pairs._replace(v=torch.zeros_like(pairs.x))
    slope = -pairs.x / (2 * (a / 2).cos() ** 2)
    g = consistency_tangent(exact, pairs, a.cos() * a.sin() * slope, 1.0)
    assert g.abs().max() < 1e-12


def test_without_the_students_own_term_it_is_the_pull_to_the_teacher():
    pairs = drawn()
    student, c = torch.randn_like(pairs.x), waves(pairs.t, pairs.x)[0]
    nothing = torch.full_like(pairs.x, 7.0)
    assert_close(consistency_tangent(student, pairs, nothing, 0.0), -(c**2) * (student - pairs.v))
    assert not consistency_tangent(pairs.v, pairs, nothing, 0.0).any()


def test_the_tangent_is_cos_times_the_derivative_of_f():
    """By finite differences along the teacher's flow, for a student that is not consistent."""
    pairs, h = drawn(), 1e-6

    def f(x, a):
        field = torch.sin(x) + like(a.cos(), x)
        return like(a.cos(), x) * x - like(a.sin(), x) * field, field

    a = pairs.t * math.pi / 2
    ends = [f(pairs.x + k * h * pairs.v, a + k * h) for k in (1, -1)]
    df, dfield = ((ends[0][i] - ends[1][i]) / (2 * h) for i in (0, 1))
    c, s, _ = waves(pairs.t, pairs.x)
    g = consistency_tangent(f(pairs.x, a)[1], pairs, c * s * dfield, 1.0)
    assert_close(g, c * df, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("norm", "size"), [("sum", 5.0), ("mean", 5.0 / math.sqrt(2))])
def test_the_tangent_is_bounded_sample_by_sample(norm, size):
    """Fails for a norm over the batch."""
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0], [300.0, 400.0]], dtype=torch.float64)
    made, sizes = tangent_normalise(g, 0.1, norm=norm)
    assert_close(sizes, torch.tensor([size, 0.0, 100 * size], dtype=torch.float64))
    assert_close(made[0], g[0] / (size + 0.1))
    assert not made[1].any()
    assert_close(made[2], g[2] / (100 * size + 0.1))


@pytest.mark.parametrize(("norm", "share"), [("sum", 1.0), ("mean", 1 / 6)])
def test_the_gradient_is_minus_twice_the_tangent(norm, share):
    g, student = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    consistency_loss(student.requires_grad_(), g, norm).backward()
    assert_close(student.grad, -2 * share * g / 4)


def test_a_small_tangent_keeps_its_digits_beside_a_large_answer():
    """Fails for F - (F + g), where g would be rounded to F's last bits."""
    student, g = torch.full((1, 2), 1000.0, requires_grad=True), torch.full((1, 2), 1.2345e-3)
    consistency_loss(student, g, "sum").backward()
    assert_close(student.grad, -2 * g, rtol=1e-6, atol=0.0)


def test_the_learnt_weight_rests_where_the_weighted_loss_is_one():
    """d/dw = 0 at exp(w) |g|^2 = 1: the paper's log(D / |g|^2) less log D."""
    g, student = 0.3 * torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    w = (-g.square().sum(1).log()).requires_grad_()
    consistency_loss(student, g, "sum", w).backward()
    assert_close(w.grad, torch.zeros(3, dtype=torch.float64))
    other = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    consistency_loss(student, g, "sum", other).backward()
    assert (other.grad < 0).all()  # |g|^2 < 1: the weight is to grow


def test_the_learnt_weight_is_a_map_of_time_that_starts_at_zero():
    weight, t = LogWeight(), torch.rand(5)
    assert not weight(t).any()
    weight(t).square().sub(1).square().sum().backward()
    weight(t).sum().backward()
    assert weight.outer.weight.grad is not None and weight.outer.weight.grad.abs().max() > 0


def test_the_reference_grid_is_the_codes():
    assert_close(reference_grid(16) * math.pi / 2, torch.tensor(GOLDEN, dtype=torch.float64), rtol=0.0, atol=1e-4)


def test_each_sample_has_a_time_of_its_own_in_each_interval():
    """Fails for strata that overlap, and for times shared by the batch."""
    grid, size = reference_grid(16), 500
    times = jittered(grid, rng(size=size), torch.device("cpu"))
    assert times.shape == (16, size) and times.dtype == torch.float32
    assert (times[0] == 1).all() and (times.diff(dim=0) < 0).all()
    share = (times[1:].double() - grid[1:, None]) / (grid[:-1] - grid[1:])[:, None]
    assert share.min() > -1e-4 and share.max() < 1 + 1e-4
    assert_close(share.mean(1), torch.full((15,), 0.5, dtype=torch.float64), atol=0.06, rtol=0.0)
    assert_close(share.std(1), torch.full((15,), 12**-0.5, dtype=torch.float64), atol=0.03, rtol=0.0)


def gaussian_trio():
    """The closed-form teacher in one dimension; the generator is a stand-in."""

    class Exact(torch.nn.Module):
        schedule = RectifiedFlow()

        def forward(self, x_t, t, cond, *, taps=()):
            c = self.schedule.at(t.double()).like(x_t)
            gain = c.alpha * STD**2 / (c.alpha**2 * STD**2 + c.sigma**2)
            return Prediction(MEAN + gain * (x_t - c.alpha * MEAN), x_t, t, "x0", self.schedule)

    return Trio(generator=Exact(), real_score=Exact())


def test_recorded_states_have_the_teachers_marginals():
    """x at T_i ~ N(MEAN cos, D(T_i)) but for DDIM's error, of first order; each velocity is the teacher's at its state.

    Fails for a step of the wrong sign, one from the wrong time, and for velocities recorded after the step.
    """
    size, errors = 2000, []
    given = Batch(Condition(), (1,), tuple(range(size)))
    for steps in (16, 128):
        made = TBCM(grid_steps=steps, **DATA_FREE).pairs(gaussian_trio(), given, rng(size=size))
        assert_close(made.v.double(), velocity(made.x, made.t), rtol=1e-3, atol=1e-3)
        c, _, d = waves(made.t, made.x)
        unit = ((made.x - MEAN * c) / d.sqrt()).reshape(steps - 1, size)
        # The starting noise is one draw for all states: what changes from the first state on is the steps' error alone.
        assert unit.mean(1)[0].abs() < 5 / math.sqrt(size) and (unit.std(1)[0] - 1).abs() < 5 / math.sqrt(size)
        errors.append((unit.std(1) - unit.std(1)[0]).abs().max().item())
    assert errors[0] < 0.16 and errors[1] < 0.025
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.3)


def test_the_start_of_a_trajectory_is_left_out():
    """At pure noise cos is 0, and so is the tangent."""
    made = TBCM(**DATA_FREE).pairs(trio(), batch(), rng())
    assert len(made.x) == len(made.t) == len(made.v) == 15 * 6
    assert made.t.max() < 1
    grid = reference_grid(16)
    assert (made.t.reshape(15, 6).double() >= grid[1:, None] - 1e-6).all()
    assert (made.t.reshape(15, 6).double() <= grid[:-1, None] + 1e-6).all()


def test_every_state_keeps_its_samples_prompt():
    """Fails where prompts are repeated sample by sample and states are not."""
    method = TBCM(guidance=3.0, warmup=0)
    made = method.pairs(trio(), batch(), rng())
    assert made.cond.tensors["prompt"].flatten().tolist() == [1, 2, 3, 4, 5, 6] * 15
    again = teacher_velocity(trio(), 3.0)(made.x, made.t, made.cond)
    assert_close(made.v, again)
    assert not torch.allclose(made.v, teacher_velocity(trio(), 1.0)(made.x, made.t, made.cond), atol=1e-2)


def test_fewer_pairs_are_a_random_part_of_the_same_trajectories():
    whole = TBCM(**DATA_FREE).pairs(trio(), batch(), rng())
    part = TBCM(trajectory_pairs=4, **DATA_FREE).pairs(trio(), batch(), rng())
    assert len(part.x) == 4 * 6
    at = (part.t[:, None] == whole.t).nonzero()[:, 1]
    assert len(at) == 24 == len(set(at.tolist()))
    for name in ("x", "v"):
        assert_close(getattr(part, name), getattr(whole, name)[at])
    assert_close(part.cond.tensors["prompt"], whole.cond.tensors["prompt"][at])
    rows = (at // 6).reshape(4, 6).T.sort(1).values
    assert len({tuple(row) for row in rows.tolist()}) > 1  # not the same for all samples
    counts = torch.zeros(15)
    for i in range(200):
        counts += torch.bincount(TBCM(trajectory_pairs=4).chosen(6, rng(iteration=i)).flatten() - 1, minlength=15)
    assert_close(counts, torch.full((15,), 200 * 24 / 15), rtol=0.25, atol=0.0)


def test_micro_batches_see_what_one_batch_would():
    method = TBCM(trajectory_pairs=5, **DATA_FREE)
    whole, given = method.pairs(trio(), batch(), rng()), batch()
    half = Batch(given.cond[slice(3, 6)], given.shape, (3, 4, 5))
    part = method.pairs(trio(), half, Rng(0, 0, "generator", (3, 4, 5)))
    assert_close(part.x.reshape(5, 3, -1), whole.x.reshape(5, 6, -1)[:, 3:])
    assert_close(part.t.reshape(5, 3), whole.t.reshape(5, 6)[:, 3:])


def test_guidance_is_in_the_pull_and_in_the_direction():
    """The tangent of the exact student of the guided teacher is zero only if both use its velocity."""
    made = drawn()
    shifted = made._replace(v=made.v + 0.5)
    clean, other = (directional_derivative(*path(Consistent(TRIG), p)) for p in (made, shifted))
    assert consistency_tangent(clean.value, shifted, clean.tangent, 1.0).abs().max() > 0.01
    assert consistency_tangent(other.value, made, other.tangent, 1.0).abs().max() > 0.01


def by_hand(players, pairs, r, floor=0.1):
    """The gradients by w and b of the affine student f = w x / (cos + sin) + b + .1 prompt, written out."""
    c, s, _ = waves(pairs.t, pairs.x)
    x, v, n = pairs.x.double(), pairs.v.double(), c + s
    w, b = (p.detach().double() for p in (players.generator.backbone.w, players.generator.backbone.b))
    f = w * x / n + b + 0.1 * pairs.cond.tensors["prompt"][:, :, None, None]
    df = w * (v / n - x * (c - s) / n**2)
    big = (c * x - f) / s
    dbig = (-s * x + c * v - df) / s - c * (c * x - f) / s**2
    g = -(c**2) * (big - v) - r * c * s * (x + dbig)
    g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + floor)
    return [(-2 * g * slope).sum() / len(x) for slope in (-x / n / s, -1 / s)]


@pytest.mark.parametrize(("iteration", "r"), [(0, 0.0), (10, 0.25), (40, 1.0), (400, 1.0)])
def test_the_loss_descends_the_tangent_of_an_affine_student(iteration, r):
    """The gradient by both parameters, written out; the teacher gets none.  Fails for any error on the way to it."""
    players, method = trio(), TBCM(guidance=2.0, warmup=40)
    with players.turn("generator"):
        loss = method.generator_loss(players, batch(), rng(iteration=iteration))
        loss.total.backward()
    pairs = method.pairs(trio(), batch(), rng(iteration=iteration))
    expected = by_hand(players, pairs, r)
    w, b = players.generator.backbone.w.grad, players.generator.backbone.b.grad
    assert_close(w.double(), expected[0], rtol=1e-4, atol=1e-5)
    assert_close(b.double(), expected[1], rtol=1e-4, atol=1e-5)
    assert players.real_score.backbone.w.grad is None
    assert float(loss.metrics["g/r"]) == r


@pytest.mark.parametrize("mode", ["central", "forward"])
def test_finite_differences_give_the_same_gradient(mode):
    grads = []
    for how in ({}, {"mode": mode, "step": 1e-4 if mode == "forward" else 1e-3}):
        players = trio()
        with players.turn("generator"):
            TBCM(**DATA_FREE, **how).generator_loss(players, batch(), rng()).total.backward()
        grads.append(players.generator.backbone.w.grad)
    assert_close(*grads, rtol=5e-2, atol=1e-3)


def test_scm_and_tbcm_are_one_loss_of_their_pairs():
    """Given the same states: those of noised data and of an exact flow are of one distribution."""
    players, made = trio(), TBCM(**DATA_FREE).pairs(trio(), batch(), rng())
    found = []
    for kind in (TBCM, SCM):
        fixed = type("Fixed", (kind,), {"pairs": lambda self, trio, batch, rng: made})
        with players.turn("generator"):
            loss = fixed(guidance=1.0, warmup=0).generator_loss(players, batch(), rng())
            loss.total.backward()
        found.append((float(loss.total.detach()), float(players.generator.backbone.w.grad)))
        players.generator.zero_grad()
    assert found[0] == found[1]


def test_scm_noises_real_data_under_their_own_captions():
    given = batch()
    real = Real(torch.randn(6, 1, 4, 3), Condition({"prompt": torch.full((6, 1), 9.0)}, given.cond.null))
    players = trio()
    made = SCM(guidance=2.0).pairs(players, replace(given, real=real), rng())
    assert made.cond is real.cond
    assert {float(seen[2].max()) for seen in players.real_score.backbone.seen} == {9.0, 0.0}
    c, s = TRIG.at(made.t).like(made.x).alpha, TRIG.at(made.t).like(made.x).sigma
    assert_close(made.x, c * real.x0 + s * rng().randn_like(real.x0, "scm.eps"))
    assert_close(made.v, teacher_velocity(trio(), 2.0)(made.x, made.t, real.cond))
    with pytest.raises(ValueError, match="real latents"):
        SCM().pairs(players, given, rng())


def test_scms_levels_are_the_papers_quantiles():
    """P_mean -.8, P_std 1.6 at a spread of .5: 5, 25, 50, 75, 95% at .07, .30, .73, 1.21, 1.49."""
    t = SCM().law().sample(rng(size=20_000), "t")
    angle = torch.quantile(t * math.pi / 2, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    assert_close(angle, torch.tensor([0.07, 0.30, 0.73, 1.21, 1.49]), atol=0.012, rtol=0.0)


def test_warm_up_and_calm_down():
    method = TBCM()
    assert [method.share(i) for i in (0, 2000, 4000, 15_000)] == [0, 0.5, 1, 1]
    assert [method.share(i) for i in (16_000, 17_000, 90_000)] == pytest.approx([0.875, 0.75, 0.75])
    assert [SCM().share(i) for i in (0, 5000, 90_000)] == [0, 0.5, 1]
    assert TBCM(warmup=0).share(0) == 1


def test_the_learnt_weight_trains_with_the_student_and_is_its_own():
    """Fails where w takes no part: its gradient is |g|^2 - 1 in the mean."""
    players, method = trio(), TBCM(weight=True, **DATA_FREE)
    players.generator = method.student(lambda: players.generator, 0)
    assert {"own.log_weight.outer.weight", "own.log_weight.outer.bias"} <= players.generator.weights().keys()
    with players.turn("generator"):
        total = method.generator_loss(players, batch(), rng()).total
        total.backward()
    plain = TBCM(**DATA_FREE).generator_loss(trio(), batch(), rng()).total
    assert_close(total, plain)  # w = 0 at first
    grad = players.generator.own["log_weight"].outer.bias.grad
    assert grad is not None
    assert_close(grad[0], plain.detach() - 1)


def test_sound_networks_pass_the_probe():
    assert TBCM(**DATA_FREE).probe(trio(), batch(2), rng(size=2)) is None  # it raises nothing


def test_a_time_that_is_only_looked_up_fails_the_probe():
    """A network of whole thousandths has no derivative by time."""
    players = trio()
    network = players.generator.backbone
    plain = network.forward
    network.forward = lambda x, time, cond: plain(x, time, cond) + (time * 1000).long().view(-1, 1, 1, 1) / 1000
    with pytest.raises(RuntimeError, match="derivative by t"):
        TBCM(**DATA_FREE).probe(players, batch(2), rng(size=2))


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        (TBCM, {"grid_steps": 1}, "grid_steps must be >= 2, got 1"),
        (TBCM, {"trajectory_pairs": 16}, "1 to grid_steps - 1 = 15"),
        (TBCM, {"calm_r": 1.5}, "calm_r"),
        (TBCM, {"num_steps": 0}, "num_steps must be >= 1, got 0"),
        (TBCM, {"warmup": -1}, "warmup must be >= 0, got -1"),
        (SCM, {"guidance": 0.0}, "guidance"),
        (SCM, {"norm_floor": 0.0}, "norm_floor"),
        (SCM, {"std": 0.0}, "std must be positive"),
        (SCM, {"step": 1e-3}, "with mode central or forward"),
    ],
)
def test_bad_settings_are_refused(method, wrong, message):
    with pytest.raises(ValueError, match=message):
        method(**wrong)


def test_needs_and_turns():
    assert TBCM().needs == {"jvp"} and SCM().needs == {"jvp", "latents"}
    assert TBCM().roles == SCM().roles == frozenset()
    assert TBCM().turns.at(3) == ("generator", "critic")
    grid = TBCM(num_steps=2, student_shift=math.tan(1.0)).sampler.grid(RectifiedFlow())
    time = match(grid, RectifiedFlow(), TRIG)[0] * math.pi / 2
    assert time.tolist() == pytest.approx([math.pi / 2, 1.0], abs=1e-3)


def test_black_trajectories_are_left_out_by_how_black_they_are():
    """A sample is kept with probability min(1, mean |x0 - black|^2), whatever its elements' count."""
    size = 4000
    x0, black = torch.full((size, 1, 2, 3), 0.5), torch.zeros(1, 1, 2, 3)
    kept = TBCM.passed(x0, black, rng(size=size))
    assert set(kept.tolist()) == {0.0, 1.0} and kept.mean().item() == pytest.approx(0.25, abs=0.03)
    assert TBCM.passed(x0 + 0.6, black, rng(size=size)).all()
    assert not TBCM.passed(x0, black + 0.5, rng(size=size)).any()


def test_the_filter_judges_where_the_trajectory_ends():
    """On the exact teacher it ends within the data; a black picture there is the sample itself.

    Fails if the last recorded state is judged, which still holds noise."""
    size = 40
    given, players = Batch(Condition(), (1,), tuple(range(size))), gaussian_trio()
    method = TBCM(black_filter=True, grid_steps=16, **DATA_FREE)
    assert method.needs == {"jvp", "black"}
    with pytest.raises(ValueError, match="'black'"):
        players.perception = Perception(lambda x: x)
        method.pairs(players, given, rng(size=size))
    players.perception = Perception(lambda x: x, black=torch.full((1, 1), 100.0))
    made = method.pairs(players, given, rng(size=size))
    assert made.keep is not None and made.keep.shape == made.t.shape and made.keep.all()
    c, _, d = waves(made.t, made.x)
    last = ((made.x - MEAN * c) * STD / d.sqrt() + MEAN)[-size:]  # the exact flow of the last states to data
    for row in range(3):
        players.perception = Perception(lambda x: x, black=last[row : row + 1].float())
        keep = method.pairs(players, given, rng(size=size)).keep.reshape(-1, size)
        assert not keep[:, row].any()  # all states of that trajectory
        assert keep.any()


def test_states_that_do_not_count_have_no_gradient():
    g, student = torch.randn(2, 4, 3, dtype=torch.float64)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0])
    consistency_loss(student.requires_grad_(), g, "sum", keep=keep).backward()
    assert_close(student.grad, -2 * keep[:, None].double() * g / 4)
