"""Networks of diffusers, unmodified and untrained: their derivatives through our operators against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep_cuda.networks import FusedDuals
from tests.tiny_networks import FAMILIES, made

R = torch.randn


def math_attention(q, k, v, *, mask=None, causal=False, scale=None):
    """torch's attention on the only kernel that has a jvp."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


@pytest.fixture(params=FAMILIES)
def network(request):
    """module, f(x, t), x, t, tangents of x and t."""
    net, call, x = made(request.param)
    return net.requires_grad_(False), call, x, torch.tensor([0.31, 0.72]), R(x.shape), torch.ones(2)


def dual(f, x, t, tx, tt):
    with forward_ad.dual_level():
        x = x if tx is None else forward_ad.make_dual(x, tx)
        t = t if tt is None else forward_ad.make_dual(t, tt)
        return forward_ad.unpack_dual(f(x, t))


@pytest.mark.parametrize("which", ["both", "state", "time"])
def test_derivatives_are_torchs(network, which):
    """By each input alone, so that neither hides the other's loss; and value = plain call.

    Mutations: the bias applied to the tangent; x - c with -c in the tangent; a mask that does not reach attention.
    """
    _, f, x, t, tx, tt = network
    tx, tt = None if which == "time" else tx, None if which == "state" else tt
    with sdpa_kernel(SDPBackend.MATH):
        wanted = dual(f, x, t, tx, tt)
    with FusedDuals(norms=True):
        found = dual(f, x, t, tx, tt)
    size = float(wanted.tangent.abs().max())
    assert size > 0
    assert float((found.tangent - wanted.tangent).abs().max()) < 1e-5 * size
    assert float((found.primal - f(x, t)).abs().max()) < 1e-5 * float(found.primal.abs().max())


def test_derivatives_are_central_differences(network):
    """By each input, at its own step. Mutation: a tangent lost on torch's route and ours alike."""
    _, f, x, t, tx, tt = network
    with FusedDuals(norms=True):
        by_state, by_time = dual(f, x, t, tx, None).tangent, dual(f, x, t, None, tt).tangent
    for found, h, moved in ((by_state, 1e-2, (tx, 0)), (by_time, 1e-4, (0, tt))):
        ends = [f(x + sign * h * moved[0], t + sign * h * moved[1]) for sign in (1, -1)]
        rough = (ends[0] - ends[1]) / (2 * h)
        assert float((found - rough).norm()) < 2e-2 * float(rough.norm())


def test_func_jvp_inside_and_around(network):
    """Mutation: tangents looked for at the wrong level."""
    _, f, x, t, tx, tt = network
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(f, (x, t), (tx, tt))[1]

    def inside(x, t):
        with FusedDuals(norms=True):
            return f(x, t)

    with FusedDuals(norms=True):
        around = torch.func.jvp(f, (x, t), (tx, tt))[1]
    for found in (around, torch.func.jvp(inside, (x, t), (tx, tt))[1]):
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_gradients_of_value_beside_a_tangent(network):
    """A graph recorded in the dual pass: gradients are the plain pass's. Mutation: adaln without its graph."""
    net, f, x, t, tx, tt = network
    net.requires_grad_(True)
    parameters = [p for p in net.parameters()]
    wanted = torch.autograd.grad(f(x, t).square().sum(), parameters, allow_unused=True)
    with FusedDuals(norms=True):
        value = dual(f, x, t, tx, tt).primal
    found = torch.autograd.grad(value.square().sum(), parameters, allow_unused=True)
    size = max(float(g.abs().max()) for g in wanted if g is not None)
    for mine, theirs in zip(found, wanted):
        assert (mine is None) == (theirs is None)
        assert mine is None or float((mine - theirs).abs().max()) < 1e-5 * size


def test_plain_calls_and_checkpointing_are_untouched(network):
    """Bit for bit, with gradient checkpointing within it. Mutation: calls without tangents answered too."""
    net, f, x, t, *_ = network
    with FusedDuals(norms=True):
        assert torch.equal(f(x, t), f(x, t))
        inside = f(x, t)
    assert torch.equal(inside, f(x, t))
    if not net._supports_gradient_checkpointing:
        return
    net.train().requires_grad_(True).enable_gradient_checkpointing()
    parameters = [p for p in net.parameters()]
    torch.manual_seed(1)  # dropout of labels
    wanted = torch.autograd.grad(f(x, t).sum(), parameters, allow_unused=True)
    torch.manual_seed(1)
    with FusedDuals(norms=True):
        y = f(x, t)
    found = torch.autograd.grad(y.sum(), parameters, allow_unused=True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(found, wanted))


CALLS = {
    "x c": lambda x, c: x * c,
    "c x": lambda x, c: c * x,
    "2 x": lambda x, c: 2.0 * x,
    "x / c": lambda x, c: x / c,
    "c / x": lambda x, c: c / x,
    "x + c": lambda x, c: x + c,
    "c + x": lambda x, c: c + x,
    "1 + x": lambda x, c: 1 + x,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "1 - x": lambda x, c: 1 - x,
    "alpha": lambda x, c: torch.add(x, c, alpha=3),
    "broadcast": lambda x, c: x[:1, :1] + c,
    "x @ c": lambda x, c: x @ c.transpose(-1, -2),
    "c @ x": lambda x, c: c @ x.transpose(-1, -2),
    "in place": lambda x, c: (x + c).mul_(x) + x,
    "promoted": lambda x, c: x * c.double(),
    "floor": lambda x, c: torch.div(x, c, rounding_mode="floor") + x,
    "linear": lambda x, c: F.linear(x, c[0], c[0, :, 0]),
    "linear, dual weight": lambda x, c: F.linear(c, x[0], c[0, :, 0]),
    "conv": lambda x, c: F.conv1d(x, c[:, :, :3], c[0, 0, :4], padding=1),
    "layer_norm": lambda x, c: F.layer_norm(x, x.shape[1:], c[0], c[1]),
    "group_norm": lambda x, c: F.group_norm(x, 3, c[0, :, 0], c[1, :, 0]),
    "rms_norm": lambda x, c: F.rms_norm(1e-3 * x, x.shape[-1:], c[0, 0]),
    "attention": lambda x, c: F.scaled_dot_product_attention(x, c, x, is_causal=True, scale=0.3),
    "bool mask": lambda x, c: F.scaled_dot_product_attention(
        x[:, None], c[:, None], x[:, None], (c @ c.mT)[:, None] > 50
    ),
    "groups": lambda x, c: F.scaled_dot_product_attention(
        x[None], x[None, :1], c[None, :1], attn_mask=(c @ c.mT)[None], enable_gqa=True
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_form_of_a_call(name):
    """Tangent and value against torch; and the argument's own tangent is still what it was.

    Mutations: the sum's tangent shared with its argument's ("in place"); alpha ignored; c - x taken for x - c; a norm's
    bias left out; another eps.
    """
    torch.manual_seed(0)
    x, tx, c = R(4, 6, 6), R(4, 6, 6), R(4, 6, 6) + 3
    before = tx.clone()
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        wanted = forward_ad.unpack_dual(CALLS[name](forward_ad.make_dual(x, tx.clone()), c))
    with FusedDuals(math_attention, norms=True), forward_ad.dual_level():
        found = forward_ad.unpack_dual(CALLS[name](forward_ad.make_dual(x, tx), c))
    torch.testing.assert_close(found.primal, wanted.primal, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.tangent, wanted.tangent, rtol=1e-5, atol=1e-4)
    assert torch.equal(tx, before)


@pytest.mark.parametrize("name", ["x c", "x / c", "x @ c", "linear", "conv", "layer_norm", "attention"])
def test_forward_over_reverse(name):
    """Tangents of gradients by the moving input and by weights. Mutation: _recorded is False (the weights' is lost)."""
    torch.manual_seed(0)
    x, tx, c = R(4, 6, 6, requires_grad=True), R(4, 6, 6), R(4, 6, 6).add_(3).requires_grad_()

    def second():
        moving = forward_ad.make_dual(x, tx)
        grads = torch.autograd.grad(CALLS[name](moving, c).sin().sum(), (moving, c))
        return [forward_ad.unpack_dual(g).tangent for g in grads]

    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        wanted = second()
        with FusedDuals(math_attention):
            found = second()
    assert all(t.any() for t in wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_in_attention_is_refused():
    x = R(1, 2, 3, 4)
    with FusedDuals(norms=True), pytest.raises(NotImplementedError, match=r"dropout_p=0\.1"):
        torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, x, x, dropout_p=0.1), (x,), (x,))
