"""Derivatives along paths: closed forms, finite differences, and every way in which torch loses a tangent silently."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fewstep.api import load_teacher
from fewstep.diffusion import RectifiedFlow, VPTable, check_jvp, directional_derivative
from fewstep.models.adapters import LoRA
from fewstep.models.backbones import CogView4, UNet2DCondition
from fewstep.models.denoiser import Denoiser
from fewstep.models.trio import Trio
from fewstep.types import Condition
from tests.tiny_pipeline import tiny_transformer, tiny_unet

MODES = ["exact", "dual", "central", "forward"]


def state(dtype=torch.float64):
    """x, t and tangents: B = W = 3, so that a [B] broadcast against [..., W] would go unseen but for the values."""
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(3, 2, 5, 3, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return (x, torch.tensor([0.2, 0.5, 0.9], dtype=dtype)), (v, torch.tensor([1.0, -0.5, 2.0], dtype=dtype))


def wave(x, t):
    return torch.sin(x) * torch.exp(2 * t).view(-1, 1, 1, 1)


def wave_slope(x, t, v, s):
    t, s = t.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
    return torch.exp(2 * t) * (torch.cos(x) * v + 2 * s * torch.sin(x))


def unet() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(UNet2DCondition(tiny_unet(), 999), VPTable.scaled_linear(), "eps").train()


def dit() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(CogView4(tiny_transformer(), 4), RectifiedFlow(), "flow").train()


TINY = {"unet": unet, "dit": dit}


def tiny_call(denoiser):
    g = torch.Generator().manual_seed(1)
    x, v, text = (torch.randn(2, *s, generator=g) for s in ((4, 4, 4), (4, 4, 4), (5, 16)))
    cond = Condition({"text": text})
    return lambda x, t: denoiser(x, t, cond).raw, (x, torch.tensor([0.3, 0.8])), (v, torch.ones(2))


def gradients(loss, denoiser):
    loss.backward()
    found = [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]
    denoiser.zero_grad()
    return found


# Closed forms


@pytest.mark.parametrize("mode, tolerance", [("exact", 1e-14), ("central", 1e-6), ("forward", 2e-3)])
def test_each_sample_moves_by_its_own_tangent(mode, tolerance):
    """Times of three velocities.  Fails if [B] meets [..., W]: here B = W, and nothing raises.

    Bounds: |f'''| and |f''| < 8 e^2 |2 + |v||^3 < 1e4, h <= 2e-4: h^2 / 6 |f'''| < 1e-4 relative to slopes of 20.
    """
    primals, tangents = state()
    value, slope = directional_derivative(wave, primals, tangents, mode=mode)
    wanted = wave_slope(*primals, *tangents)
    assert torch.equal(value, wave(*primals))
    assert (slope - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_tangent_means_constant(mode, which):
    """The derivative is linear: the two alone add up to both."""
    primals, tangents = state()
    alone = [d if i == which else None for i, d in enumerate(tangents)]
    zero = [d if i == which else 0 * d for i, d in enumerate(tangents)]
    slope = directional_derivative(wave, primals, alone, mode=mode).tangent
    # 1e-3: the forward difference at its two strides; exact and central agree far better
    wanted = wave_slope(*primals, *zero)
    assert (slope - wanted).norm() <= {"exact": 1e-14, "dual": 1e-14, "central": 1e-4, "forward": 1e-2}[
        mode
    ] * wanted.norm()


def test_the_denoiser_of_a_gaussian_along_its_ode(schedule, gaussian):
    """d/dt x0(x_t, t) along dx/dt = alpha' x0 + sigma' eps.

    On the ODE x - alpha mean = sqrt(V(t)) const, V = alpha^2 std^2 + sigma^2, and x0 = mean + alpha std^2 / V (x -
    alpha mean), so that d x0/dt = std^2 (x - alpha mean) / V (alpha' - alpha V' / 2V).
    """
    # between two of the VP table's indices: at an index its interpolation has a kink
    mean, std, t = 1.5, 0.5, torch.tensor([200.5, 500.5, 800.5], dtype=torch.float64) / 999
    denoise = gaussian(schedule, mean, std)
    x = schedule.prior(state()[0][0])
    here, c = denoise(x, t, Condition()), schedule.at(t).like(x)
    dx = c.d_alpha * here.x0 + c.d_sigma * here.eps
    var, d_var = c.alpha**2 * std**2 + c.sigma**2, 2 * (c.alpha * c.d_alpha * std**2 + c.sigma * c.d_sigma)
    wanted = std**2 * (x - c.alpha * mean) / var * (c.d_alpha - c.alpha * d_var / (2 * var))
    found = directional_derivative(lambda x, t: denoise(x, t, Condition()).x0, (x, t), (dx, torch.ones_like(t)))
    assert_close(found.tangent, wanted, rtol=1e-9, atol=1e-11)
    rough = directional_derivative(
        lambda x, t: denoise(x, t, Condition()).x0, (x, t), (dx, torch.ones_like(t)), mode="central", step=1e-5
    )
    assert (rough.tangent - wanted).norm() <= 1e-6 * wanted.norm()


def test_the_mean_velocity_of_a_gaussian_satisfies_meanflow():
    """u = v - (t - r) du/dt along (v, 0, 1), r constant     [MeanFlow, arXiv:2505.13447]

    Data N(mean, std^2) on rectified flow: x_r = (1 - r) mean + sqrt(V(r) / V(t)) (x - (1 - t) mean).
    """
    mean, std = 1.5, 0.5
    (x, t), _ = state()
    r = t / 3

    def var(t):
        return ((1 - t) ** 2 * std**2 + t**2).view(-1, 1, 1, 1)

    def u(x, r, t):
        there = (1 - r).view(-1, 1, 1, 1) * mean
        return (x - there - (var(r) / var(t)).sqrt() * (x - (1 - t).view(-1, 1, 1, 1) * mean)) / (t - r).view(
            -1, 1, 1, 1
        )

    b = t.view(-1, 1, 1, 1)
    v = -mean + (b - (1 - b) * std**2) / var(t) * (x - (1 - b) * mean)
    value, slope = directional_derivative(u, (x, r, t), (v, None, torch.ones_like(t)))
    assert_close(value, v - (t - r).view(-1, 1, 1, 1) * slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_derivative_is_homogeneous(mode):
    """sCM takes its tangents times cos sin.  Fails if a step is fixed while the tangents shrink, or divided twice."""
    primals, tangents = state()
    one = directional_derivative(wave, primals, tangents, mode=mode).tangent
    small = directional_derivative(wave, primals, [d / 64 for d in tangents], mode=mode).tangent
    assert_close(64 * small, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_that_does_not_move_has_no_derivative(mode):
    """cos t sin t = 0 at both ends of sCM.  Fails as 0 / 0."""
    primals, (v, s) = state()
    still = torch.tensor([1.0, 0.0, 1.0], dtype=v.dtype)
    slope = directional_derivative(wave, primals, (v * still.view(-1, 1, 1, 1), s * still), mode=mode).tangent
    assert slope[1].abs().max() == 0 and slope[0].abs().max() > 1


# Finite differences


@pytest.mark.parametrize("mode, order", [("central", 2), ("forward", 1)])
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_orders_of_the_differences_also_at_the_ends(mode, order, t):
    """Halving h divides the error by 2^order.  Fails if central becomes one-sided of order 1 at an end."""
    x = torch.ones(1, 2, dtype=torch.float64)
    f = lambda x, t: x * torch.exp(3 * t).view(-1, 1)  # noqa: E731
    times = torch.full((1,), t, dtype=torch.float64)
    wanted = 3 * f(x, times)
    errors = [
        float((directional_derivative(f, (x, times), (None, torch.ones(1)), mode=mode, step=h).tangent - wanted).norm())
        for h in (2e-3, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.02)


@pytest.mark.parametrize("mode, calls", [("exact", 1), ("central", 3), ("forward", 2)])
def test_no_call_leaves_the_bounds_and_none_is_wasted(mode, calls):
    """Each sample on its own: ends, near them, the middle.  Fails with one rule for the batch, or clamped points."""
    seen = []

    def f(x, t):
        seen.append(t.detach().clone())
        return x * (t**2).view(-1, 1)

    t = torch.tensor([0.0, 5e-5, 0.5, 1 - 5e-5, 1.0], dtype=torch.float64)
    x = torch.ones(5, 3, dtype=torch.float64)
    slope = directional_derivative(f, (x, t), (None, torch.ones(5)), mode=mode).tangent
    assert len(seen) == calls and all(bool(((s >= 0) & (s <= 1)).all()) for s in seen)
    # a parabola is exact for every formula of order 2; forward's error is h
    assert_close(slope, (2 * t).view(-1, 1).expand(5, 3), rtol=0, atol=1.01e-4 if mode == "forward" else 1e-9)
    if mode == "central":
        assert seen[1][2] > 0.5 > seen[2][2]


def test_time_moves_by_the_step_and_angles_have_other_bounds():
    """TMD's delta is a distance in time, whatever the velocity's size."""
    seen = []
    f = lambda x, t: (seen.append(t), x * t.view(-1, 1))[1]  # noqa: E731
    t, x = torch.tensor([1.2]), torch.ones(1, 2)
    directional_derivative(f, (x, t), (9 * x, 0.5 * t), mode="central", step=5e-3, bounds=(0, math.pi / 2))
    assert_close(seen[1], t + 5e-3, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"times must be in \[0\.0, 1\.0\] .* samples \[0\]"):
        directional_derivative(f, (x, t), (x, t), mode="central")


@pytest.mark.parametrize("mode", ["central", "forward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_of_half_precision_are_refused(mode, dtype):
    """bfloat16: 2^-8 / 1e-4 = 78 times the output is noise.  bfloat16 states of a float32 network are raised first."""
    primals, tangents = state(dtype)
    with pytest.raises(ValueError, match=f"{dtype} network's finite differences are noise"):
        directional_derivative(lambda x, t: wave(x, t).to(dtype), primals, tangents, mode=mode)
    primals, tangents = ([p.to(torch.bfloat16).float() for p in group] for group in (primals, tangents))
    low, slow = ([p.to(torch.bfloat16) for p in group] for group in (primals, tangents))
    slope = directional_derivative(lambda x, t: wave(x.float(), t.float()), low, slow, mode=mode).tangent
    wanted = wave_slope(*primals, *tangents)
    assert slope.dtype == torch.float32 and (slope - wanted).norm() < 1e-2 * wanted.norm()


def test_autocast_differences_are_refused_and_exact_ones_work():
    torch.manual_seed(0)
    net, x, v = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3)), torch.randn(2, 3), torch.randn(2, 3)
    wanted = directional_derivative(net, (x,), (v,)).tangent
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="autocast"):
            directional_derivative(net, (x,), (v,), mode="central")
        value, slope = directional_derivative(net, (x,), (v,))
    assert value.dtype == torch.bfloat16 and slope.dtype == torch.float32
    assert (slope - wanted).norm() < 0.02 * wanted.norm()  # a few units of 2^-8


@pytest.mark.parametrize("mode, graph", [("exact", True), ("exact", False), ("dual", True), ("central", False)])
def test_dropout_is_one_function_of_all_calls(mode, graph):
    """Linear in x, so that every difference is exact.  Fails with fresh masks: the gap of two masks, divided by h."""
    net = nn.Dropout(0.5)
    x, v = torch.ones(3, 50, dtype=torch.float64), torch.full((3, 50), 2.0, dtype=torch.float64)
    torch.manual_seed(3)
    value, slope = directional_derivative(net, (x,), (v,), mode=mode, graph=graph)
    after = torch.rand(())
    assert_close(slope, 2 * value, rtol=1e-9, atol=1e-9)
    torch.manual_seed(3)
    assert torch.equal(net(x), value) and torch.equal(torch.rand(()), after)


# Graphs and contexts


@pytest.mark.parametrize("mode", ["exact", "dual"])
@pytest.mark.parametrize("name", TINY)
def test_the_value_has_plain_gradients_and_the_tangent_none(name, mode):
    """Fails if a tangent's rule records, or spoils what the reverse pass saved."""
    denoiser = TINY[name]()
    f, primals, tangents = tiny_call(denoiser)
    wanted = gradients(f(*primals).square().mean(), denoiser)
    value, slope = directional_derivative(f, primals, tangents, mode=mode, graph=True)
    assert value.requires_grad and not slope.requires_grad
    found = gradients(value.square().mean(), denoiser)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_what_made_the_state(mode):
    """SiD-like objectives go through x_t.  Fails if primals are detached."""
    (x, t), tangents = state()
    x.requires_grad_()
    directional_derivative(wave, (x, t), tangents, mode=mode, graph=True).value.sum().backward()
    assert_close(x.grad, torch.cos(x.detach()) * torch.exp(2 * t).view(-1, 1, 1, 1))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_recorded_unless_asked_for(mode):
    net = nn.Linear(3, 3)
    value, slope = directional_derivative(net, (torch.ones(2, 3),), (torch.ones(2, 3),), mode=mode)
    assert not value.requires_grad and not slope.requires_grad
    with torch.no_grad():
        silent = directional_derivative(net, (torch.ones(2, 3),), (torch.ones(2, 3),), mode=mode, graph=True)
    assert not silent.value.requires_grad
    assert torch.equal(silent.tangent, slope)


@pytest.mark.parametrize("name", TINY)
def test_checkpointed_networks(name):
    """Same gradients and tangents.  Fails if a rule saves what the recomputation, which knows no tangents, does not."""
    denoiser = TINY[name]()
    f, primals, tangents = tiny_call(denoiser)
    plain = directional_derivative(f, primals, tangents, graph=True)
    wanted = gradients(plain.value.square().mean(), denoiser)
    denoiser.backbone.checkpoint_activations()
    again = directional_derivative(f, primals, tangents, graph=True)
    found = gradients(again.value.square().mean(), denoiser)
    assert_close(again.tangent, plain.tangent)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert_close(directional_derivative(f, primals, tangents).tangent, again.tangent, rtol=1e-4, atol=1e-4)


def test_reentrant_checkpointing():
    """An old-style Function without a jvp, of which dual numbers know nothing; the functions within it are seen."""
    net, v = nn.Linear(3, 3), torch.arange(6.0).view(2, 3)
    x = torch.ones(2, 3, requires_grad=True)
    f = lambda x: checkpoint(net, x, use_reentrant=True)  # noqa: E731
    for graph in (False, True):
        assert_close(directional_derivative(f, (x,), (v,), graph=graph).tangent, v @ net.weight.T)
    with pytest.raises(NotImplementedError, match="jvp"):
        directional_derivative(f, (x,), (v,), mode="dual")


# Lost tangents


@torch.library.custom_op("fewstep_test_jvp::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


class Cube(torch.autograd.Function):
    """The remedy: the same op, with its jvp."""

    @staticmethod
    def forward(x):
        return cube(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dx):
        return 3 * ctx.saved_tensors[0] ** 2 * dx


DROPPED = {
    "custom op": cube,
    "detach": lambda x: 2 * x.detach(),
    "data": lambda x: 2 * x.data,
    "numpy": lambda x: torch.from_numpy(2 * x.detach().numpy()),
    "item": lambda x: torch.tensor(x.tolist(), dtype=x.dtype) * 2,
}


@pytest.mark.parametrize("trap", DROPPED)
def test_a_dropped_tangent_raises(trap):
    """torch.func.jvp answers zeros to each of these.  Central differences still work, as the message says."""
    x, v = state()[0][0], state()[1][0]
    assert torch.equal(torch.func.jvp(cube, (x,), (v,))[1], torch.zeros_like(x))
    with pytest.raises(RuntimeError, match=r"finds no derivative.*mode='central'"):
        directional_derivative(DROPPED[trap], (x,), (v,))
    wanted = 3 * x**2 * v if trap == "custom op" else 2 * v
    assert_close(
        directional_derivative(DROPPED[trap], (x,), (v,), mode="central").tangent, wanted, rtol=1e-3, atol=1e-3
    )


def test_the_remedy_for_a_custom_op_works():
    x, v = state()[0][0], state()[1][0]
    assert_close(directional_derivative(Cube.apply, (x,), (v,), mode="dual").tangent, 3 * x**2 * v)
    check_jvp(Cube.apply, (x,), (v,), mode="dual")


def test_inference_mode_is_refused_and_no_grad_is_not():
    """make_dual keeps no tangent in inference mode; a no_grad section loses none."""
    primals, tangents = state()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode .* use torch\.no_grad"):
        directional_derivative(wave, primals, tangents)
    wanted = wave_slope(*primals, *tangents)
    assert_close(directional_derivative(torch.no_grad()(wave), primals, tangents).tangent, wanted)
    check_jvp(torch.no_grad()(wave), primals, tangents)


TIME_LOST = {
    "detach": lambda t: torch.sin(40 * t.detach()),
    "integer": lambda t: torch.sin(torch.arange(1000).to(t) / 25)[(t * 999).long()],
    "rounded": lambda t: torch.sin((t * 999).round() / 25),
    "custom op": cube,
    "float": lambda t: torch.tensor([math.sin(time) for time in t.tolist()]).to(t),
}


@pytest.mark.parametrize("trap", TIME_LOST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_lost_time_beside_a_sound_state_is_found(trap, dtype):
    """Dual numbers' joint tangent looks fine: only x's part is there.  Fails if inputs are checked together only when
    zero.  `exact` sees most of it happen."""
    primals, tangents = state(dtype)

    def f(x, t):
        return torch.sin(x) * (2 + TIME_LOST[trap](t)).view(-1, 1, 1, 1)

    assert directional_derivative(f, primals, tangents, mode="dual").tangent.abs().max() > 0.1
    for mode in ("exact", "dual"):
        with pytest.raises(RuntimeError, match="derivative by the time is lost"):
            check_jvp(f, primals, tangents, names=("the state", "the time"), mode=mode)
    if trap in ("integer", "custom op", "float"):
        with pytest.raises(RuntimeError, match="finds no derivative of"):
            directional_derivative(f, primals, tangents)


@pytest.mark.parametrize("scale", [1e-2, 1.0])
def test_a_part_of_the_state_that_is_lost_is_found(scale):
    """One custom op beside a residual path.  scale 0.01 changes the derivative by 3%, above the tolerance."""
    primals, tangents = state()
    f = lambda x: x + scale * cube(x)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"by primals\[0\] is wrong"):
        check_jvp(f, primals[:1], tangents[:1], tolerance=0.01, mode="dual")


def test_a_sound_function_passes_and_an_ignored_input_is_no_loss():
    """Fails if a derivative that is zero were taken for a lost one: a zero-initialised time embedding."""
    primals, tangents = state()
    assert max(check_jvp(wave, primals, tangents).values()) < 1e-4
    report = check_jvp(lambda x, t: x**2 + 0 * t.detach().view(-1, 1, 1, 1), primals, tangents, names=("x", "t"))
    assert report["t"] == 0 and report["x"] < 1e-6


def test_checking_leaves_the_random_numbers_alone():
    """A run with the check is the run without it.  Fails if the calls move torch's generator."""
    torch.manual_seed(3)
    check_jvp(nn.Dropout(0.5), (torch.ones(3, 50),), (torch.ones(3, 50),))
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(()), after)


def test_a_step_too_wide_for_the_networks_time_is_found():
    """sin(1000 t): TMD's 5e-3 turns the phase by 5."""
    f = lambda x, t: x * torch.sin(1000 * t).view(-1, 1, 1, 1)  # noqa: E731
    primals, tangents = state()
    check_jvp(f, primals, tangents, mode="central")
    with pytest.raises(RuntimeError, match=r"wrong by .* step 0\.005 does not suit"):
        check_jvp(f, primals, tangents, mode="central", step=5e-3)


@pytest.mark.parametrize("mode, said", [("exact", "cannot be checked"), ("central", "is lost")])
def test_hidden_half_precision_cannot_be_checked(mode, said):
    """accelerate's autocast returns float32.  Fails if the noise were taken for the truth."""
    primals, tangents = state(torch.float32)
    f = lambda x, t: (torch.sin(x) * (1 + 1e-2 * t.view(-1, 1, 1, 1))).bfloat16().float()  # noqa: E731
    with pytest.raises(RuntimeError, match=f"derivative by t {said}"):
        check_jvp(f, primals, (None, tangents[1]), names=("x", "t"), mode=mode)


# Real networks


@pytest.mark.parametrize("name", ["fashion-dit", "fashion-unet"])
def test_embedded_teachers(name):
    """Measured in float64 against central differences: x 1e-5, t 1e-3 (its embedding is float32 and holds 1000 t)."""
    teacher = load_teacher(name)
    denoiser = teacher.denoiser.double().requires_grad_(False)
    cond = teacher.encode(list(teacher.prompts[:2]))
    g = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, *teacher.shape, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.31, 0.72], dtype=torch.float64)
    f = lambda x, t: denoiser(x, t, cond).raw  # noqa: E731
    report = check_jvp(f, (x, t), (v, torch.ones(2)), names=("x", "t"))
    assert report["x"] < 1e-4 and report["t"] < 5e-3
    exact = directional_derivative(f, (x, t), (v, torch.ones_like(t))).tangent
    rough = directional_derivative(f, (x, t), (v, torch.ones_like(t)), mode="central").tangent
    assert (exact - rough).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("name", TINY)
def test_adapted_networks(name):
    """LoRA on shared weights, adapters that change something: exact = central, value = plain call."""
    trio = Trio.build(TINY[name](), frozenset({"fake_score"}), sharing="lora", lora=LoRA(rank=2, alpha=2.0))
    with torch.no_grad():
        for p in trio.generator.weights().values():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    f, primals, tangents = tiny_call(trio.generator)
    check_jvp(f, primals, tangents, names=("x", "t"))
    with trio.turn("generator"):
        value, slope = directional_derivative(f, primals, tangents, graph=True)
        value.square().mean().backward()
    assert all(p.grad is not None for p in trio.generator.weights().values()) and not slope.requires_grad
    base = directional_derivative(tiny_call(trio.real_score)[0], primals, tangents).tangent
    assert (slope - base).norm() > 0.01 * base.norm()


# Errors


@pytest.mark.parametrize(
    "change, match",
    [
        ({"mode": "reverse"}, "no mode 'reverse'; known: exact, dual, central, forward"),
        ({"step": 1e-3}, "no meaning in mode 'exact'"),
        ({"mode": "central", "step": 0.0}, "positive"),
        ({"tangents": (None, None)}, "not all None"),
        ({"tangents": (torch.ones(3, 2, 5, 3),)}, "one tangent for each of 2 primals"),
        ({"tangents": (None, torch.ones(1))}, r"tangent 1 must have its primal's shape .* got \[1\]"),
        ({"tangents": (None, torch.ones(3, dtype=torch.long))}, "must be floats"),
        ({"tangents": (torch.ones(3), None)}, "tangent 0 must have its primal's shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    primals, tangents = state()
    with pytest.raises(ValueError, match=match):
        directional_derivative(wave, primals, **{"tangents": tangents, **change})
