"""Rules of derivatives against torch's dual numbers, and what would lose a derivative without a word."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from fewstep.diffusion.tangent_rules import RULES, Lost
from fewstep.diffusion.tangents import Tangents

G = torch.Generator().manual_seed(0)
X, Y = (torch.randn(3, 4, 6, generator=G, dtype=torch.float64) for _ in range(2))
DX, DY = (torch.randn(3, 4, 6, generator=G, dtype=torch.float64) for _ in range(2))
W = torch.randn(5, 6, generator=G, dtype=torch.float64)
KERNEL = torch.randn(2, 4, 3, 3, generator=G, dtype=torch.float64)
BIAS = torch.randn(2, generator=G, dtype=torch.float64)
ROW = torch.randn(6, generator=G, dtype=torch.float64)
KEYS = torch.randn(1, 3, 4, 6, generator=G, dtype=torch.float64)
TURN = torch.polar(torch.ones(3, dtype=torch.float64), ROW[:3])
FOUR = torch.randn(4, generator=G, dtype=torch.float64)

FUNCTIONS = {
    "add": lambda x, y: torch.add(x, y, alpha=3) + 1,
    "add a row": lambda x, y: ROW + x[:, :1] + y,
    "sub": lambda x, y: torch.sub(x, y, alpha=2) - 1,
    "reversed": lambda x, y: (1 - x) / (2 + y.square()) + 3 / (4 + x * x),
    "rsub": lambda x, y: torch.rsub(x, y, alpha=2) + torch.rsub(x, 3),
    "mul": lambda x, y: 2 * x * y * ROW,
    "div": lambda x, y: x / (y.square() + 1) / 3 + ROW / (2 + x.square()),
    "matmul": lambda x, y: x @ y.mT @ W[:4, :4] + torch.bmm(x, y.transpose(1, 2)),
    "linear": lambda x, y: F.linear(x, W, ROW[:5]) + F.linear(y, weight=W, bias=None),
    "moving weight": lambda x, y: F.linear(x, y[0]) + F.linear(x, weight=y[0]),
    "moving weights of norms": lambda x, y: F.layer_norm(x, (6,), y[0, 0], ROW) + F.group_norm(x, 2, y[1, :, 0], FOUR),
    "moving biases of norms": lambda x, y: F.layer_norm(x, (6,), ROW, y[0, 1]) + F.group_norm(x, 2, FOUR, y[1, :, 1]),
    "conv": lambda x, y: F.conv2d(torch.stack([x, y], 3), KERNEL, BIAS, padding=1),
    "views": lambda x, y: x.view(3, 2, 2, 6).permute(1, 0, 3, 2).reshape(2, 3, -1)[:, 1:, ::2].unsqueeze(1).flatten(1),
    "pieces": lambda x, y: torch.cat([*x.chunk(2, -1)[::-1], y.split(2, -1)[1], torch.ones_like(x)], -1),
    "stack": lambda x, y: torch.stack(x.unbind(1)).sum(0) + y.mean(1, keepdim=True).squeeze(1).expand(3, 6),
    "casts": lambda x, y: x.double().to(torch.float64).contiguous().clone() + y.type_as(x),
    "unary": lambda x, y: x.sin() + y.cos() + x.exp() + y.tanh() + torch.sigmoid(x) + F.silu(y) + F.gelu(x),
    "powers": lambda x, y: x**2 + (x.square() + 1).sqrt() + (y**2 + 1).rsqrt() + (y.square() + 1).log() + x.pow(3),
    "gelu tanh": lambda x, y: F.gelu(x, approximate="tanh") + F.relu(y) + (y.square() + 1).reciprocal(),
    "softmax": lambda x, y: x.softmax(-1) + F.softmax(y, dim=1),
    "layer norm": lambda x, y: F.layer_norm(x, (6,), ROW, ROW, 1e-6) + F.layer_norm(y, (6,)),
    "group norm": lambda x, y: F.group_norm(x, 2, FOUR, FOUR, 1e-6) + F.group_norm(y, 4),
    "rms norm": lambda x, y: F.rms_norm(x, (6,), ROW),
    "clamp": lambda x, y: x.clamp(-1, 1) + torch.where(x > 0, x, 2 * y) + torch.maximum(x, y),
    "einsum": lambda x, y: torch.einsum("bij,bkj->bik", x, y) + torch.linalg.vector_norm(x),
    "interpolate": lambda x, y: F.interpolate(x, scale_factor=2.0, mode="linear") + y.repeat_interleave(2, -1),
    "by name": lambda x, y: torch.cat(tensors=[x, y], dim=1) + F.linear(input=x, weight=W).sum(),
    "second by name": lambda x, y: x.mul(other=y) + x.pow(exponent=2) + torch.div(x, other=2 + y * y).add_(other=y),
    "rotary": lambda x, y: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (3, 2))) * torch.polar(ROW[:3].abs(), ROW[3:])
        + torch.complex(y, x)[..., :3]
    ),
    "complex": lambda x, y: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * TURN).flatten(2) + y,
    "pad": lambda x, y: F.pad(x, (1, 1)),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None], y[None], x[None] + 1),
    "attention of constants": lambda x, y: F.scaled_dot_product_attention(x[None], KEYS, KEYS, scale=0.3),
    "masked attention": lambda x, y: F.scaled_dot_product_attention(
        x[None], y[None], y[None], attn_mask=x[0, :1, :4] > 0
    ),
    "causal attention": lambda x, y: F.scaled_dot_product_attention(
        x[:, None], y[:, None], KEYS[0][:, None], is_causal=True
    ),
    "moving mask": lambda x, y: F.scaled_dot_product_attention(KEYS, KEYS, y[None], attn_mask=x[None, :, :, :4]),
    "attention of points": lambda x, y: F.scaled_dot_product_attention(x, y, y),
}


def in_place(x, y):
    z = x * 1
    z += y
    z *= ROW
    z -= 1
    z /= y.square() + 1
    z[:, 1:3] = y[:, :2]
    z[:, 0] = 0.5
    return z.add_(x, alpha=2)


def in_place_by_flag(x, y):
    z = x * 1
    F.silu(z, inplace=True)
    return z + F.leaky_relu(y - 0.5, 0.2, inplace=True)


def assigned(x, y):
    z = x + 1
    z[:, 0] = 0.5
    return z * x + y


FUNCTIONS |= {"in place": in_place, "in place by flag": in_place_by_flag, "assigned": assigned}


def by_dual_numbers(f, moves):
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        inputs = [p if d is None else forward_ad.make_dual(p.clone(), d) for p, d in zip((X, Y), moves)]
        return forward_ad.unpack_dual(f(*inputs))


def beside(f, moves, inputs=(X, Y)):
    with Tangents() as moving:
        value = f(*(p if d is None else moving.move(p, d) for p, d in zip(inputs, moves)))
        return value, moving.of(value)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("moves", [(DX, DY), (DX, None), (None, DY)], ids=["both", "first", "second"])
def test_the_tangent_is_that_of_dual_numbers(name, moves):
    """Fails for any rule with a wrong factor, a lost operand, or a broadcast that the tangent does not share."""
    wanted, slope = by_dual_numbers(FUNCTIONS[name], moves)
    value, found = beside(FUNCTIONS[name], moves)
    assert_close(value, wanted)
    if slope is None:
        assert found is None
    else:
        assert found is not None and found.shape == value.shape
        assert_close(found, slope, rtol=1e-10, atol=1e-12)


def test_values_are_recorded_and_tangents_are_not():
    """Mutation: a rule outside no_grad, whose graph the loss would keep."""
    x = X.clone().requires_grad_()
    value, tangent = beside(lambda x, y: F.layer_norm(x @ y.mT, (4,)).sin(), (DX, DY), (x, Y))
    assert value.requires_grad and not tangent.requires_grad
    (grad,) = torch.autograd.grad(value.sum(), x)
    (wanted,) = torch.autograd.grad(F.layer_norm(x @ Y.mT, (4,)).sin().sum(), x)
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.long(),
        lambda x: x.to(torch.int64),
        lambda x: x[0, 0, 0].item(),
        lambda x: float(x[0, 0, 0]),
        lambda x: x.tolist(),
        lambda x: x.masked_fill_(x > 0, 0.0),
    ],
    ids=["long", "to", "item", "float", "tolist", "in place"],
)
def test_what_would_lose_a_derivative_raises(f):
    """Mutation: the value without its tangent, as torch's own forward mode gives it."""
    with pytest.raises(Lost, match=r"finds no derivative of .*mode='central'"):
        beside(lambda x, y: f(x * 1), (DX, None))


def test_a_view_of_what_was_changed_in_place_is_not_used():
    """The view's values have changed, its tangent has not.  Mutation: no search for tensors of the same memory."""

    def stale(x, y):
        z = x * 1
        row = z[:, 0]
        z[:, 0] = y[:, 0]
        return row * 2

    with pytest.raises(Lost, match="changed in place"):
        beside(stale, (DX, DY))
    assert_close(
        beside(lambda x, y: in_place(x, y)[:, 0] * 2, (DX, DY))[1], 2 * by_dual_numbers(in_place, (DX, DY))[1][:, 0]
    )


def test_detached_values_stand_still():
    _, tangent = beside(lambda x, y: x * x.detach() + y.data, (DX, DY))
    assert_close(tangent, DX * X)
    assert beside(lambda x, y: torch.zeros_like(x) + x.detach(), (DX, None))[1] is None


def test_dropout_has_one_mask():
    """Linear, so that the tangent is the mask times DX.  Mutation: a second draw."""
    torch.manual_seed(0)
    value, tangent = beside(lambda x, y: F.dropout(x, 0.5, True), (DX, None))
    after = torch.rand(())
    assert_close(tangent, value / X * DX)
    torch.manual_seed(0)
    F.dropout(X, 0.5, True)
    assert torch.equal(torch.rand(()), after)


def test_modules_are_seen():
    net = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 2)).double().eval()
    assert_close(beside(lambda x, y: net(x), (DX, None))[1], by_dual_numbers(lambda x, y: net(x), (DX, None))[1])


def test_nothing_is_left_when_it_ends():
    """Mutation: tangents that live as long as the graph that keeps the values."""
    x = X.clone().requires_grad_()
    with Tangents() as moving:
        value = moving.move(x, DX).exp()
        assert moving.of(value) is not None
    assert moving.of(value) is None


def test_every_rule_is_asked_for_by_a_test():
    """A rule's name that no function above calls could be wrong unseen; views are one rule."""
    called = set()

    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.add(func.__self__.__name__ if func.__name__ == "__get__" else func.__name__)
            return func(*args, **(kwargs or {}))

    with Names():
        for f in FUNCTIONS.values():
            f(X, Y)
    of_their_own = {rule for name, rule in RULES.items() if name in called}
    assert set(RULES.values()) - of_their_own == set() or {
        name for name, rule in RULES.items() if rule not in of_their_own
    } <= {"conv1d", "conv3d"}
