"""TMD: transition matching by its equations, the rollout that DMD2 gets, and who is trained when."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fewstep.teachers.point_split  # noqa: F401 - registers the small network's pieces
from fewstep.diffusion import RectifiedFlow
from fewstep.models.backbones import CogView4
from fewstep.models.denoiser import Denoiser
from fewstep.models.flow_head import flow_head
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, stages_of
from fewstep.objectives.tmd import TMD, TransitionMeanFlow
from fewstep.rng import Rng
from fewstep.teachers import gaussian, mixture
from fewstep.types import Batch, Condition, Real
from tests.tiny_pipeline import LATENTS, tiny_transformer

B = 6
PLAIN = {"head_blocks": 1, "gate": 0.0, "gan_weight": 0.0, "guidance": 1.0, "pretraining_guidance": 1.0}


def method(**settings):
    return TMD(**(PLAIN | settings))


def trio(made, classes=None, dtype=torch.float64):
    teacher = mixture(classes=classes, fit_steps=3)
    assert teacher.student is not None
    built = Trio.build(teacher.student().to(dtype), made.roles, student=lambda make: made.student(make, 0).to(dtype))
    built.real_score.zero_grad()  # of its fit
    built.generator.requires_grad_(True)
    torch.manual_seed(3)
    for p in built.fake_score.parameters() if built.fake_score else ():  # as if it had moved
        p.data += 0.05 * torch.randn_like(p)
    for name, p in built.generator.weights().items():
        if name.startswith("own.fusion.gap.outer"):  # as if it had learnt of r
            nn.init.normal_(p, std=0.5)
    return built


def batch(classes=False, size=B, dtype=torch.float64):
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(size, 2, generator=draws, dtype=dtype)
    labels = torch.arange(size) % 2
    null = {"class": torch.tensor([-1])} if classes else {}
    shown, real = (Condition({"class": v} if classes else {}, null) for v in (1 - labels, labels))
    return Batch(shown, (2,), tuple(range(size)), real=Real(x, real))


def rng(turn="generator", size=B, iteration=0):
    return Rng(0, iteration, turn, tuple(range(size)))


def place(made, players, given, still):
    """The numbers of stage 1, drawn once more, and (y_s, s) -> head."""
    draws, head = rng(), flow_head(players.generator)
    x, x1, x_t, t = made.transition(players, given, draws)
    y, y1 = x1 - x, draws.randn_like(x, "inner.noise")
    draw = TransitionMeanFlow(made).draw(players, given, rng(), still)
    memory = head.main(x_t, t, given.real.cond)
    return y, y1, draw, lambda y_s, s: head.head(memory, y_s, s, draw.r)


def test_with_r_at_s_the_loss_is_the_error_of_y():
    """|y - head|^2 under 1 / (|..|^2 + c), c = D times `adaptive`; its gradient sees the weight as a number."""
    made = method(still=1.0, adaptive=0.3)
    players, given = trio(made), batch()
    y, _, draw, head = place(made, players, given, still=True)
    error = (y - head(draw.y_s, draw.s)).square().mean(1)
    loss = TransitionMeanFlow(made).generator_loss(players, given, rng())
    assert torch.equal(draw.r, draw.s)
    assert_close(loss.metrics["tm/still"], error.detach().mean())
    assert_close(loss.total, (error / (error + 0.3)).mean())
    weights = list(players.generator.weights().values())
    expected = torch.autograd.grad((error / (error + 0.3).detach()).mean(), weights, allow_unused=True)
    found = torch.autograd.grad(loss.total, weights, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("how", "allowed"), [({"jvp": "exact"}, 1e-6), ({"jvp_step": 1e-4}, 1e-4)])
def test_with_r_below_s_the_heads_target_is_y_less_its_own_change(how, allowed):
    """y - (s - r) d head / ds along (y1 - y, 1), by double precision's differences.  Fails with the sign turned, the
    head taken for u, r moving with s, or the tangent in y_s or in s left out."""
    made = method(still=0.0, adaptive=1e9, **how)
    players, given = trio(made), batch()
    y, y1, draw, head = place(made, players, given, still=False)
    s, h = draw.s.double(), 1e-6
    with torch.no_grad():
        change = (head(draw.y_s + h * (y1 - y), s + h) - head(draw.y_s - h * (y1 - y), s - h)) / (2 * h)
    target = y - (s - draw.r)[:, None] * change
    assert ((s - draw.r)[:, None] * change).abs().max() > 0.05  # else it could be left out
    error = (head(draw.y_s, draw.s) - target).square().mean(1)
    loss = TransitionMeanFlow(made).generator_loss(players, given, rng())
    assert_close(loss.metrics["tm/moving"], error.detach().mean(), atol=0, rtol=allowed)
    weights = list(players.generator.weights().values())
    expected = torch.autograd.grad(error.mean() / 1e9, weights, allow_unused=True)
    found = torch.autograd.grad(loss.total, weights, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=1e-9 * allowed, rtol=10 * allowed)


def test_the_exact_flow_map_of_a_gaussian_is_where_the_loss_stands_still():
    """y ~ N(m, d^2), whatever x_t: with the exact u, the target's mean given y_s is u, by regression on (1, y_s).
    Fails for a target of the other sign, v + (s - r) du/ds."""
    n, mean, std = 200_000, 0.7, 0.4
    y, y1 = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, r = mean + std * y, 0.3

    def u(y_s, s):
        spread_s, spread_r = ((((1 - v) * std) ** 2 + v**2).sqrt() for v in (s, torch.tensor(r).double()))
        return (y_s - mean * (1 - r) - spread_r / spread_s * (y_s - mean * (1 - s))) / (s - r)

    made = method(still=0.0, jvp="exact")
    stage = TransitionMeanFlow(made)
    s = torch.full((n,), 0.8, dtype=torch.float64)
    y_s = (1 - s) * y + s * y1
    stage_draw = place(made, trio(made), batch(), still=False)[2]
    draw = stage_draw._replace(u=u, y_s=y_s, v=y1 - y, s=s, r=torch.full_like(s, r))
    target = stage.target(draw)[1]
    away = target - u(y_s, s)
    known = torch.stack([torch.ones_like(y_s), (y_s - y_s.mean()) / y_s.std()])
    assert (known @ away / n).abs().max() < 4 * away.std() / n**0.5
    assert away.std() > 0.1
    turned = (y1 - y) + (y1 - y - target) - u(y_s, s)
    assert (known @ turned / n).abs().max() > 20 * turned.std() / n**0.5


def test_stage_one_trains_the_whole_network():
    """m is not detached.  Fails if it is: the first block and the way in would stand still."""
    for still in (0.0, 1.0):
        made = method(still=still)
        players = trio(made)
        with players.turn("generator"):
            TransitionMeanFlow(made).generator_loss(players, batch(), rng()).total.backward()
        grads = {name: p.grad for name, p in players.generator.weights().items()}
        for name in ("inner.weight", "layers.0.weight", "layers.1.weight", "outer.weight", "own.fusion.gate"):
            assert grads[name] is not None
            assert grads[name].abs().max() > 1e-6, name


def test_the_velocity_is_guided_and_a_dropped_prompts_is_not():
    """w v + (1 - w) u(y_s, s, s) of the empty prompt.  Fails if the network is guided instead, or with r for s."""
    made = method(pretraining_guidance=3.0, drop_prompt=0.5)
    players, given = trio(made, classes=[0, 1] * 4), batch(classes=True)
    plain = TransitionMeanFlow(dataclasses.replace(made, pretraining_guidance=1.0))
    for still in (True, False):
        draw = TransitionMeanFlow(made).draw(players, given, rng(), still)
        unguided = plain.draw(players, given, rng(), still)
        head, draws = flow_head(players.generator), rng()
        dropped = rng().rand("inner.drop") < 0.5
        _, _, x_t, t = made.transition(players, given, draws)
        y1 = draws.randn_like(x_t, "inner.noise")
        empty = head.main(x_t, t, given.real.cond.unconditional())
        u_empty = y1 - head.head(empty, draw.y_s, draw.s, draw.s)
        expected = torch.where(dropped[:, None], unguided.v, 3 * unguided.v - 2 * u_empty)
        assert 0 < dropped.sum() < B
        assert_close(draw.v, expected, atol=1e-12, rtol=1e-12)
        told = torch.where(dropped, -1, given.real.cond.tensors["class"])
        memory = head.main(x_t, t, Condition({"class": told}))
        assert_close(draw.u(draw.y_s, draw.s), y1 - head.head(memory, draw.y_s, draw.s, draw.r))
        assert not draw.v.requires_grad


def test_three_quarters_of_the_batches_have_r_at_s_each_as_a_whole():
    stage, players = TransitionMeanFlow(method()), trio(method(), dtype=torch.float32)
    given, kinds = batch(size=1, dtype=torch.float32), []
    for iteration in range(200):
        with torch.no_grad():
            kinds += stage.generator_loss(players, given, rng(size=1, iteration=iteration)).metrics
    assert kinds.count("tm/still") == pytest.approx(150, abs=3 * (200 * 0.75 * 0.25) ** 0.5)
    assert kinds.count("tm/still") + kinds.count("tm/moving") == 200


def test_whether_r_is_at_s_is_one_for_the_global_batch():
    """Whatever the micro-batch.  Fails if it is drawn by sample."""
    stage, players = TransitionMeanFlow(method(still=0.5)), trio(method(), dtype=torch.float32)
    for iteration in range(6):
        kinds = set()
        for size in (1, 2, 3):
            given = batch(size=size, dtype=torch.float32)
            metrics = stage.generator_loss(players, given, rng(size=size, iteration=iteration)).metrics
            kinds |= metrics.keys() & {"tm/still", "tm/moving"}
        assert len(kinds) == 1


def test_times_are_the_papers():
    """t uniform on the sampler's grid; s = sh_3(U(.001, .999)); r the grid's time below s."""
    made, n = method(num_steps=4, inner_steps=4), 4000
    players, given = trio(made, dtype=torch.float32), batch(size=n, dtype=torch.float32)
    x, x1, x_t, t = made.transition(players, given, rng(size=n))
    times, counts = t.unique(return_counts=True)
    assert times.tolist() == pytest.approx([0.769, 0.909, 0.968, 0.999], abs=6e-4)
    assert (counts.double() / n - 0.25).abs().max() < 4 * (0.25 * 0.75 / n) ** 0.5
    assert_close(x_t, (1 - t)[:, None] * x + t[:, None] * x1)
    draw = TransitionMeanFlow(made).draw(players, given, rng(size=n), still=False)
    assert draw.s.min() >= 0.003 / 1.002 - 1e-4
    assert draw.s.max() <= 0.9997
    assert draw.s.median() == pytest.approx(0.75, abs=0.02)
    assert set(draw.r.unique().tolist()) == set(flow_head(players.generator).grid.tolist())
    assert (draw.r <= draw.s).all()


def test_the_second_stages_sample_is_the_noise_less_the_rollout():
    """x1 - y, not x_t - t y, which would mix the data in; under the data's captions, with noise of its own."""
    made = method()
    players, given = trio(made, classes=[0, 1] * 4), batch(classes=True)
    draws, head = rng(), flow_head(players.generator)
    _, x1, x_t, t = made.transition(players, given, draws)
    noise = draws.randn_like(x1, "inner.noise")
    x = made.rollout(players, made.shown(given), rng()).x
    assert_close(x, x1 - head.roll(head.main(x_t, t, given.real.cond), noise))
    assert (x - (x_t - t[:, None] * (x1 - x))).abs().max() > 1e-2
    state = dataclasses.replace(made, judged="state").rollout(players, made.shown(given), rng()).x
    assert_close(state, x_t - t[:, None] * (x1 - x), atol=1e-6, rtol=0)
    assert made.shown(given).cond is given.real.cond
    assert TMD(simulated=True).shown(given) is given


def test_the_second_stage_moves_every_part_of_its_player_only():
    """Both inner steps and m: the first block too."""
    made = method()
    players = trio(made)
    for turn, network in (("generator", players.generator), ("critic", players.fake_score)):
        with players.turn(turn):
            loss = getattr(made, f"{turn}_loss")(players, batch(), rng(turn))
            loss.total.backward()
        for player in (players.generator, players.fake_score, players.real_score):
            moved = [p for p in player.parameters() if p.grad is not None and p.grad.abs().max() > 0]
            assert bool(moved) == (player is network)
        if turn == "generator":
            assert network.weights()["inner.weight"].grad.abs().max() > 1e-9
        network.zero_grad()


def test_simulated_states_are_the_students_own():
    """As DMD2's; prompts are the batch's, and no real sample is read."""
    made = method(simulated=True, pretraining=0.0)
    players, given = trio(made), dataclasses.replace(batch(), real=None)
    assert "latents" not in made.needs
    assert made.rollout(players, given, rng()).x.shape == (B, 2)
    made.generator_loss(players, given, rng()).total.backward()


def test_the_sampler_goes_by_euler_steps_along_y():
    """x - (t - t') y over the grid, the last step to 0: what few_step makes of a flow with no noise between steps."""
    from fewstep.diffusion import few_step

    grid, schedule = method(num_steps=2).sampler.grid(RectifiedFlow()).double(), RectifiedFlow()
    assert grid.tolist() == pytest.approx([0.999, 0.909], abs=1e-6)
    noise, (first, second) = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)
    said = iter([first, second])
    found = few_step(lambda x, t: x - t.double()[:, None] * next(said), noise, grid, schedule)
    assert_close(found, noise - (grid[0] - grid[1]) * first - grid[1] * second, atol=1e-6, rtol=0)
    assert not method().sampler.stochastic


@pytest.mark.parametrize(
    ("steps", "inner", "heads", "depth", "cost"),
    [
        (2, 2, 5, 30, 2.33),
        (2, 4, 5, 30, 3.0),
        (1, 2, 5, 30, 1.17),
        (1, 4, 5, 30, 1.5),
        (1, 4, 5, 40, 1.38),
        (2, 4, 5, 40, 2.75),
    ],
)
def test_the_cost_is_the_papers(steps, inner, heads, depth, cost):
    made = method(num_steps=steps, inner_steps=inner, head_blocks=heads)
    assert made.evaluations(depth) == pytest.approx(cost, abs=0.0051)


def test_a_run_is_two_stages_of_which_the_first_has_no_critic():
    first, second = stages_of(method())
    assert (first.share, second.share) == pytest.approx((3 / 7, 4 / 7))
    assert isinstance(first.objective, TransitionMeanFlow)
    assert second.objective == method()
    assert {first.objective.turns.at(i) for i in range(20)} == {("generator",)}
    assert [stage.objective for stage in stages_of(method(pretraining=0.0))] == [method(pretraining=0.0)]
    assert [type(stage.objective) for stage in stages_of(method(pretraining=1.0))] == [TransitionMeanFlow]


def test_the_second_stage_updates_the_critic_four_times_of_five():
    turns = [TMD().turns.at(i) for i in range(10)]
    assert turns.count(("critic",)) == 8
    assert turns.count(("generator",)) == 2


def test_what_it_asks_for_follows_from_its_stages():
    assert method().needs == {"blocks", "latents", "jvp"}
    assert method(pretraining=0.0).needs == {"blocks", "latents"}
    assert method(pretraining=0.0, simulated=True, gan_weight=0.1).needs == {"blocks", "latents"}
    assert method(pretraining=1.0, gan_weight=0.1).roles == set()
    assert method(gan_weight=0.1).roles == {"fake_score", "head"}


@pytest.mark.parametrize("how", [{"jvp": "exact"}, {}])
def test_the_probe_lets_a_transformer_pass_and_a_lost_time_not(how):
    """In float32, as a run calls it."""
    made = method(**how)
    given = Condition({"text": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))})
    real = Real(torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(1)), given)
    batch = Batch(given, LATENTS, (0, 1), real=real)
    for time, lost in ((lambda t: 1000 * t, False), (lambda t: (1000 * t).long(), True)):
        torch.manual_seed(0)
        family = CogView4(tiny_transformer().eval(), 4)
        family.network_time = time
        network = made.student(lambda family=family: Denoiser(family, RectifiedFlow(), "flow"), 0)
        players = Trio(network, network)
        if lost:
            with pytest.raises(RuntimeError, match="derivative by s"):
                made.probe(players, batch, rng(size=2))
        else:
            made.probe(players, batch, rng(size=2))


def test_a_batch_without_real_latents_is_refused():
    made = method()
    players, given = trio(made), dataclasses.replace(batch(), real=None)
    for loss in (made.generator_loss, made.critic_loss, TransitionMeanFlow(made).generator_loss):
        with pytest.raises(ValueError, match="noises real latents, which this batch has none of"):
            loss(players, given, rng())


def test_a_teacher_off_rectified_flow_is_refused():
    teacher = gaussian(schedule="vp", fit_steps=2)
    with pytest.raises(ValueError, match="take a flow teacher"):
        method().student(teacher.student, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head_blocks": 0}, "head_blocks must be >= 1, got 0"),
        ({"inner_steps": 0}, "inner_steps must be >= 1, got 0"),
        ({"pretraining": 1.5}, r"pretraining is a share and must be in \[0, 1\], got 1.5"),
        ({"drop_prompt": -0.1}, "drop_prompt is a share"),
        ({"still": 2.0}, "still is a share"),
        ({"inner_shift": 0.0}, "inner_shift must be a positive finite number"),
        ({"adaptive": 0.0}, "adaptive must be a positive finite number"),
        ({"gate": float("inf")}, "gate must be finite"),
        ({"jvp_step": -1.0}, "jvp_step=-1.0 has no meaning"),
        ({"jvp": "exact", "jvp_step": 1e-4}, "jvp_step=0.0001 has no meaning with jvp='exact'; leave it out"),
        ({"num_steps": 0}, "num_steps must be >= 1"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TMD(**wrong)


def test_the_defaults_are_the_papers():
    made = TMD()
    assert (made.inner_steps, made.head_blocks, made.gan_weight, made.shift) == (2, 5, 0.03, 5.0)
    assert made.turns == Turns(critic_per_generator=5, exclusive=True)
    t = made.law(made.min_index, made.max_index).sample(Rng(0, 0, "generator", tuple(range(20_000))), "t")
    assert t.median() == pytest.approx(5 * 0.5 / 3, abs=0.01)
