"""Networks of diffusers, unmodified and untrained: their derivatives through our operators against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep_cuda.networks import FusedDuals, math_attention

R = torch.randn


def cogview4():
    from tests.tiny_pipeline import tiny_transformer

    net, text, size = tiny_transformer(), R(2, 3, 16), torch.full((2, 2), 4)

    def call(x, t):
        keep = {"original_size": size, "target_size": size, "crop_coords": torch.zeros(2, 2), "return_dict": False}
        return net(x, text, 1000 * t, **keep)[0]

    return net, call, (4, 4, 4)


def unet():
    from tests.tiny_pipeline import tiny_unet

    net, text = tiny_unet(), R(2, 3, 16)
    return net, lambda x, t: net(x, 1000 * t, text, return_dict=False)[0], (4, 4, 4)


def sd3():
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    text, pooled = R(2, 3, 16), R(2, 8)
    return net, lambda x, t: net(x, text, pooled, 1000 * t, return_dict=False)[0], (4, 8, 8)


def flux():
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    text, pooled, places, none = R(2, 3, 16), R(2, 8), R(6, 3), torch.zeros(3, 3)
    return net, lambda x, t: net(x, text, pooled, t, img_ids=places, txt_ids=none, return_dict=False)[0], (6, 4)


def wan():
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2,
    )  # fmt: skip
    text = R(2, 3, 16)
    return net, lambda x, t: net(x, 1000 * t, text, return_dict=False)[0], (4, 2, 4, 4)


def pixart():
    from diffusers import PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    text, mask = R(2, 3, 16), torch.tensor([[1, 1, 1], [1, 0, 0]])
    keep = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}
    return net, lambda x, t: net(x, text, 1000 * t, encoder_attention_mask=mask, **keep)[0], (4, 8, 8)


def dit():
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return net, lambda x, t: net(x, 1000 * t, class_labels=torch.tensor([1, 2]), return_dict=False)[0], (4, 8, 8)


def sana():
    from diffusers import SanaTransformer2DModel

    net = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    text = R(2, 3, 16)
    return net, lambda x, t: net(x, text, 1000 * t, return_dict=False)[0], (4, 8, 8)


FAMILIES = (cogview4, unet, sd3, flux, wan, pixart, dit, sana)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def network(request):
    """module, f(x, t), x, t, tangents of x and t; nothing in it is zero, as untrained gates would be."""
    torch.manual_seed(0)
    net, call, shape = request.param()
    with torch.no_grad():
        for p in net.eval().parameters():
            p.copy_(p + 0.1 * R(p.shape))
    return net.requires_grad_(False), call, R(2, *shape), torch.tensor([0.31, 0.72]), R(2, *shape), torch.ones(2)


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
    with FusedDuals():
        found = dual(f, x, t, tx, tt)
    size = float(wanted.tangent.abs().max())
    assert size > 0
    assert float((found.tangent - wanted.tangent).abs().max()) < 1e-5 * size
    assert float((found.primal - f(x, t)).abs().max()) < 1e-5 * float(found.primal.abs().max())


def test_derivatives_are_central_differences(network):
    """By each input, at its own step. Mutation: a tangent lost on torch's route and ours alike."""
    _, f, x, t, tx, tt = network
    with FusedDuals():
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
        with FusedDuals():
            return f(x, t)

    with FusedDuals():
        around = torch.func.jvp(f, (x, t), (tx, tt))[1]
    for found in (around, torch.func.jvp(inside, (x, t), (tx, tt))[1]):
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_gradients_of_value_beside_a_tangent(network):
    """A graph recorded in the dual pass: parameters' gradients are the plain pass's. Mutation: _recorded is False."""
    net, f, x, t, tx, tt = network
    net.requires_grad_(True)
    parameters = [p for p in net.parameters()]
    wanted = torch.autograd.grad(f(x, t).square().sum(), parameters, allow_unused=True)
    with FusedDuals():
        value = dual(f, x, t, tx, tt).primal
    found = torch.autograd.grad(value.square().sum(), parameters, allow_unused=True)
    size = max(float(g.abs().max()) for g in wanted if g is not None)
    for mine, theirs in zip(found, wanted):
        assert (mine is None) == (theirs is None)
        assert mine is None or float((mine - theirs).abs().max()) < 1e-5 * size


def test_plain_calls_and_checkpointing_are_untouched(network):
    """Bit for bit, with gradient checkpointing within it. Mutation: calls without tangents answered too."""
    net, f, x, t, *_ = network
    with FusedDuals():
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
    with FusedDuals():
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
    "rms_norm": lambda x, c: F.rms_norm(x, x.shape[-1:], c[0, 0]),
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

    Mutations: the sum's tangent shared with its argument's ("in place"); alpha ignored; c - x taken for x - c.
    """
    torch.manual_seed(0)
    x, tx, c = R(4, 6, 6), R(4, 6, 6), R(4, 6, 6) + 3
    before = tx.clone()
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        wanted = forward_ad.unpack_dual(CALLS[name](forward_ad.make_dual(x, tx.clone()), c))
    with FusedDuals(math_attention), forward_ad.dual_level():
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
    with FusedDuals(), pytest.raises(NotImplementedError, match=r"dropout_p=0\.1"):
        torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, x, x, dropout_p=0.1), (x,), (x,))
