"""Norms and what follows them against compositions of plain torch: values, derivatives in both modes, and both at once.

The oracles write LayerNorm out: torch 2.14's own loses part of the gradient through its tangent (test below).
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

import fewstep_cuda as ops
from fewstep_cuda import dispatch

OPERATORS = ("adaln", "adaln-rms", "adaln-plain", "heads", "heads-half", "heads-layer", "group", "group-time", "gated")
BACKENDS = [name for name in ("reference", "cpu") if name == "reference" or not dispatch._missing("adaln", "cpu")]


def written_out(x, axes=1, centred=True, eps=1e-6):
    axes = tuple(range(-axes, 0))
    x = x - x.mean(axes, keepdim=True) if centred else x
    return x * (x.square().mean(axes, keepdim=True) + eps).rsqrt()


def turning(x, cos, sin, interleaved):
    """As complex numbers, [.., D / 2]."""
    if interleaved:
        u, v = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[:, 0::2], sin[:, 0::2]
        return torch.stack((u * cos - v * sin, u * sin + v * cos), -1).flatten(-2)
    u, v = x.chunk(2, -1)
    cos, sin = cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]
    return torch.cat((u * cos - v * sin, u * sin + v * cos), -1)


def angles(length, size, interleaved, dtype):
    half = torch.outer(torch.arange(length, dtype=torch.float64), 0.3 ** torch.arange(size // 2, dtype=torch.float64))
    full = half.repeat_interleave(2, 1) if interleaved else half.repeat(1, 2)
    return full.cos().to(dtype), full.sin().to(dtype)


class Case:
    """An operator on inputs of its own: `ours(*inputs)`, `plain(*inputs)`, `openly(inputs, tangents)`."""

    def __init__(self, name, dtype=torch.float32, backend=None, sizes=None, scale=1.0, device="cpu"):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        def twice(*shapes):
            return [draw(*s) for s in shapes], [draw(*s) for s in shapes]

        batch, length, size = sizes or (3, 5, 14)
        kind, _, which = name.partition("-")
        if kind == "adaln":
            keep = {"norm": "rms" if which == "rms" else "layer", "backend": backend, "eps": 1e-6}
            centred = which != "rms"
            shapes = [(batch, length, size)]
            if which == "plain":
                self.ours = functools.partial(ops.adaln, **keep)
                self.dual = functools.partial(ops.adaln_jvp, **keep)
                self.plain = written_out
                self.places = (0,)
            else:
                shapes += [(batch, size), (batch, 1, size)]
                w, b = draw(size), draw(size)
                self.ours = functools.partial(ops.adaln, weight=w, bias=b, **keep)
                self.dual = functools.partial(ops.adaln_jvp, weight=w, bias=b, **keep)

                def plain(x, s, h):
                    w_, b_ = w.to(x), b.to(x)
                    return (written_out(x, 1, centred) * w_ + b_) * (1 + s[:, None]) + h

                self.plain = plain
        elif kind == "heads":
            shapes = [(2, batch, length, size)]
            interleaved = which != "half"
            cos, sin = (table.to(device) for table in angles(length, size, interleaved, dtype))
            w = draw(size)
            keep = {
                "cos": cos, "sin": sin, "weight": w, "backend": backend, "eps": 1e-6,
                "norm": "layer" if which == "layer" else "rms", "layout": "interleaved" if interleaved else "half",
            }  # fmt: skip
            self.ours = functools.partial(ops.qk_norm_rope, **keep)
            self.dual = functools.partial(ops.qk_norm_rope_jvp, **keep)

            def plain(q):
                z = written_out(q, 1, which == "layer") * w.to(q)
                return turning(z, cos.to(q), sin.to(q), interleaved)

            self.plain = plain
        elif kind == "group":
            shapes = [(batch, size, length, 3)] + [(batch, size)] * 2 * (which == "time")
            w, b = draw(size), draw(size)
            keep = {"weight": w, "bias": b, "backend": backend, "eps": 1e-6, "silu": True}
            self.ours = lambda x, *rest: ops.group_norm_silu(x, 2, scale=None, **keep) if not rest else (
                ops.group_norm_silu(x, 2, scale=rest[0], shift=rest[1], **keep)
            )  # fmt: skip
            self.dual = lambda x, *rest, **tangents: ops.group_norm_silu_jvp(
                x, 2, scale=rest[0] if rest else None, shift=rest[1] if rest else None, **keep, **tangents
            )

            def plain(x, *rest):
                z = written_out(x.reshape(len(x), 2, -1)).view_as(x) * w.to(x)[:, None, None] + b.to(x)[:, None, None]
                if rest:
                    z = z * (1 + rest[0][:, :, None, None]) + rest[1][:, :, None, None]
                return F.silu(z)

            self.plain = plain
        else:
            shapes = [(batch, length, size), (batch, 1, size), (batch, length, size)]
            self.ours = functools.partial(ops.gated_residual, backend=backend)
            self.dual = functools.partial(ops.gated_residual_jvp, backend=backend)
            self.plain = lambda x, g, y: x + g * y
        self.inputs, self.tangents = twice(*shapes)
        self.inputs[0] = self.inputs[0] * scale
        self.tangents[0] = self.tangents[0] * scale
        names = {"adaln": ("tx", "tscale", "tshift"), "heads": ("tq",), "gated": ("tx", "tgate", "ty")}
        self.names = names.get(kind, ("tx", "tscale", "tshift"))[: len(self.inputs)]

    def openly(self, inputs, tangents):
        return self.dual(*inputs, **dict(zip(self.names, tangents)))

    def truth(self, inputs=None, tangents=None):
        """y, ty in float64 by torch.func.jvp of the composition."""
        inputs, tangents = inputs or self.inputs, tangents or self.tangents
        return torch.func.jvp(self.plain, tuple(i.double() for i in inputs), tuple(t.double() for t in tangents))

    def gradients(self, function, wide=False):
        """By inputs and tangents of a function of (inputs, tangents) -> y, ty, weighted by fixed numbers."""
        leaves = [t.detach().double() if wide else t.detach() for t in (*self.inputs, *self.tangents)]
        leaves = [t.clone().requires_grad_() for t in leaves]
        n = len(self.inputs)
        y, ty = function(leaves[:n], leaves[n:])
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        return torch.autograd.grad((weights * y).sum() + (weights.flip(0) * ty).sum(), leaves, allow_unused=True)


def error(found, truth):
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sizes", [(3, 5, 14), (2, 3, 64), (1, 7, 258), (1, 1, 2)], ids=str)
def test_value_and_tangent_are_the_compositions(name, sizes, backend):
    """Twice the error of plain torch in float32, or four roundings where that has none.

    Mutations: k without r (the tangent of the norm's scale); no mean of tx; sin of the wrong sign; a tile's remainder.
    """
    case = Case(name, backend=backend, sizes=sizes)
    truth = case.truth()
    plain = torch.func.jvp(case.plain, tuple(case.inputs), tuple(case.tangents))
    for found in (
        case.openly(case.inputs, case.tangents),
        torch.func.jvp(case.ours, tuple(case.inputs), tuple(case.tangents)),
    ):
        for mine, theirs, true in zip(found, plain, truth):
            # Two entries of one row, centred and normalised, are 1 and -1: their derivative is all cancellation.
            least = 5e-7 if sizes[-1] > 2 or name in ("gated", "heads", "heads-half") else 2e-4
            assert error(mine, true) <= max(2 * error(theirs, true), least)
    assert_close(case.ours(*case.inputs).double(), truth[0], rtol=2e-6, atol=2e-6 * float(truth[0].abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
@pytest.mark.parametrize("name", OPERATORS)
def test_tiny_and_huge_inputs(name, scale, backend):
    """Mutation: moments as E[x^2] - E[x]^2, or eps outside the root."""
    case = Case(name, backend=backend, scale=scale)
    plain = torch.func.jvp(case.plain, tuple(case.inputs), tuple(case.tangents))
    for mine, theirs, true in zip(case.openly(case.inputs, case.tangents), plain, case.truth()):
        assert error(mine, true) <= max(2 * error(theirs, true), 5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "gated"])
def test_a_large_mean_costs_no_more_than_in_torch(name, backend):
    """Mutation: the variance from sums of squares in one pass."""
    case = Case(name, backend=backend)
    case.inputs[0] = case.inputs[0] + 300
    plain = torch.func.jvp(case.plain, tuple(case.inputs), tuple(case.tangents))
    for mine, theirs, true in zip(case.openly(case.inputs, case.tangents), plain, case.truth()):
        assert error(mine, true) <= max(2 * error(theirs, true), 5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["adaln", "adaln-plain", "heads-layer", "group"])
@pytest.mark.parametrize("moved", [0, 1], ids=["value", "tangent"])
def test_first_entries_that_say_nothing_of_the_rest(name, moved, backend):
    """Mutation: one pass about the mean of the first entries, without a second where that is far from the row's."""
    case = Case(name, backend=backend, sizes=(2, 3, 200))
    far = (case.inputs, case.tangents)[moved]
    far[0] = far[0] + 1000 * (torch.arange(far[0].numel()).view(far[0].shape) % 200 >= 64)
    near = (case.inputs, case.tangents)[1 - moved]
    near[0][..., :100] += 1000
    plain = torch.func.jvp(case.plain, tuple(case.inputs), tuple(case.tangents))
    for mine, theirs, true in zip(case.openly(case.inputs, case.tangents), plain, case.truth()):
        assert error(mine, true) <= max(2 * error(theirs, true), 5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["adaln", "heads-layer", "group-time"])
def test_a_row_without_variance(name, backend):
    """xhat is 0, and its derivative (tx - mean tx) / sqrt(eps): finite. Mutation: no eps."""
    case = Case(name, backend=backend)
    case.inputs[0] = torch.full_like(case.inputs[0], 2.5)
    y, ty = case.openly(case.inputs, case.tangents)
    true = case.truth()
    assert_close(y.double(), true[0], rtol=1e-6, atol=1e-6)
    assert error(ty, true[1]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_far_from_zero(backend):
    """0 and z, with slopes 0 and 1. Mutation: an exponential that leaves float's range."""
    x, tx, shift = torch.randn(1, 2, 3), torch.randn(1, 2, 3), torch.tensor([[-100.0, 100.0]])
    found = ops.group_norm_silu_jvp(x, 1, shift=shift, tx=tx, backend=backend)
    plain = ops.group_norm_silu_jvp(x, 1, shift=shift, tx=tx, silu=False, backend="reference")
    for mine, straight in zip(found, plain):
        assert_close(mine, straight * torch.tensor([[0.0], [1.0]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", ["adaln", "heads"])
def test_outputs_that_pass_the_caches(name, backend):
    """2^21 entries and more, every other row aligned. Mutation: a line of them that is not the tile's."""
    case, plain = (Case(name, backend=b, sizes=(2, 8200, 130)) for b in (backend, "reference"))
    for mine, true in zip(case.openly(case.inputs, case.tangents), plain.openly(case.inputs, case.tangents)):
        assert error(mine, true.double()) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_strides_change_nothing(name, backend):
    """Inputs and tangents transposed, each in its own way. Mutation: the tangent read with its primal's strides."""
    case = Case(name, backend=backend)
    wanted = case.openly(case.inputs, case.tangents)
    inputs = [t.transpose(1, -1).contiguous().transpose(1, -1) if t.ndim > 2 else t for t in case.inputs]
    tangents = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in case.tangents]
    for mine, theirs in zip(case.openly(inputs, tangents), wanted):
        assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_as_attention_has_them(backend):
    """[B, N, H, D] seen as [B, H, N, D], and a slice of a fused projection. Mutation: H and N in the wrong order."""
    case = Case("heads", backend=backend, sizes=(3, 5, 8))
    (q,), (tq,) = case.inputs, case.tangents
    wanted = case.openly([q], [tq])
    moved = q.transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.stack((tq, tq + 1), -2).transpose(1, 2).contiguous().transpose(1, 2)[..., 0, :]
    for mine, theirs in zip(case.openly([moved], [fused]), wanted):
        assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_backward_through_value_and_tangent(name, backend):
    """Of the explicit form, by inputs and tangents. Mutation: any one of the three terms of gx behind gty left out."""
    case = Case(name, backend=backend)
    truth = case.gradients(lambda i, t: torch.func.jvp(case.plain, tuple(i), tuple(t)), wide=True)
    for mine, true in zip(case.gradients(case.openly), truth):
        assert mine.shape == true.shape
        assert error(mine, true) < 2e-6


@pytest.mark.parametrize("name", OPERATORS)
def test_both_modes_and_their_products_in_float64(name):
    """gradcheck and gradgradcheck, forward over reverse too. Mutation: the fast dual route where a graph is recorded.

    (It would hold primals without their tangents, and the tangent of the gradient would be zero without a word.)
    """
    case = Case(name, dtype=torch.float64, sizes=(2, 2, 4))
    inputs = [t.requires_grad_() for t in case.inputs]
    assert gradcheck(case.ours, inputs, check_forward_ad=True)
    assert gradgradcheck(case.ours, inputs, check_fwd_over_rev=True)
    both = [*inputs, *(t.requires_grad_() for t in case.tangents)]
    assert gradcheck(lambda *all_: case.openly(all_[: len(inputs)], all_[len(inputs) :]), both)


@pytest.mark.parametrize("name", OPERATORS)
def test_transforms_of_functorch_in_any_order(name):
    """Mutation: as above."""
    case = Case(name, dtype=torch.float64, backend="reference")
    x, *rest = case.inputs
    t = case.tangents[0]

    def first(function):
        return lambda z: function(z, *rest).sin().sum()

    for transform in (
        lambda f: torch.func.grad(lambda z: torch.func.jvp(lambda y: f(y, *rest), (z,), (t,))[1].sin().sum())(x),
        lambda f: torch.func.jvp(torch.func.grad(first(f)), (x,), (t,))[1],
        lambda f: torch.func.grad(lambda z: (torch.func.grad(first(f))(z) * t).sum())(x),
    ):
        assert_close(transform(case.ours), transform(case.plain), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_each_tangent_alone_and_none_of_them(name, backend):
    """None is a constant; no tangent in is none out. Mutation: a None taken for its primal, or the rest dropped."""
    case = Case(name, backend=backend)
    for i in range(len(case.inputs)):
        zeros = [t if j == i else torch.zeros_like(t) for j, t in enumerate(case.tangents)]
        alone = [t if j == i else None for j, t in enumerate(case.tangents)]
        _, true = case.truth(tangents=zeros)
        _, mine = case.openly(case.inputs, alone)
        assert true.any() and error(mine, true) < 1e-6
        with forward_ad.dual_level():
            duals = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(case.inputs, alone)]
            assert error(forward_ad.unpack_dual(case.ours(*duals)).tangent, true) < 1e-6
    assert case.openly(case.inputs, [None] * len(case.inputs))[1] is None


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_tangent_is_not_zero(name, backend, recorded):
    """As dual numbers, with and without a graph. Mutation: a custom op in place of the autograd.Function."""
    case = Case(name, backend=backend)
    true = case.truth()[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.requires_grad_(recorded), t) for x, t in zip(case.inputs, case.tangents)]
        found = forward_ad.unpack_dual(case.ours(*duals))
        assert found.tangent is not None and error(found.tangent.detach(), true) < 2e-6
        assert found.tangent.requires_grad == recorded


def test_parameters_may_carry_tangents():
    """Weight and bias, through torch's own rules. Mutation: weights folded in without their derivative."""
    torch.manual_seed(0)
    x, s, w, b = torch.randn(2, 3, 6), torch.randn(2, 6), torch.randn(6), torch.randn(6)
    tw, tb = torch.randn(6), torch.randn(6)
    _, mine = torch.func.jvp(lambda w, b: ops.adaln(x, s, weight=w, bias=b), (w, b), (tw, tb))
    assert_close(mine, (written_out(x) * tw + tb) * (1 + s[:, None]))


@pytest.mark.parametrize("name", ["adaln", "heads", "group-time", "gated"])
def test_compiled_calls_have_the_right_tangent(name):
    """jvp inside the compiled function, for both forms. Mutation: no torch.compiler.disable (a zero tangent)."""
    case = Case(name)
    inputs, tangents = tuple(case.inputs), tuple(case.tangents)
    true = case.truth()[1]
    torch.compiler.reset()
    inside = torch.compile(lambda *i: torch.func.jvp(case.ours, i, tangents)[1], backend="eager")
    assert error(inside(*inputs), true) < 2e-6
    explicit = torch.compile(lambda *i: case.openly(i, tangents)[1], backend="eager")
    assert error(explicit(*inputs), true) < 2e-6
    with pytest.raises(Exception, match="disable"):
        torch.compile(lambda *i: case.ours(*i), backend="eager", fullgraph=True)(*inputs)


def test_a_second_forward_derivative_is_refused():
    """Of the explicit form; mutation: a jvp of it that forgets the tangents of tangents."""
    x = torch.randn(2, 3, 4)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda z: ops.adaln_jvp(z, tx=x)[1], (x,), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision_is_computed_in_float32(name, dtype):
    """To one rounding of the output. Mutation: moments in the inputs' dtype."""
    case = Case(name, dtype=dtype)
    for mine, true in zip(case.openly(case.inputs, case.tangents), case.truth()):
        assert mine.dtype == dtype
        assert error(mine, true) < torch.finfo(dtype).eps


def test_linear_is_one_product_and_right_in_every_mode():
    """Mutation: the bias added to the tangent."""
    torch.manual_seed(0)
    x, tx, w, b = (t.double() for t in (torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)))
    y, ty = ops.linear_jvp(x, w, b, tx)
    wanted = torch.func.jvp(lambda z: F.linear(z, w, b), (x,), (tx,))
    assert_close((y, ty), wanted)
    leaves = [t.requires_grad_() for t in (x, w, b, tx)]
    assert gradcheck(ops.linear_jvp, leaves)
    compiled = torch.compile(ops.linear_jvp, backend="eager", fullgraph=True)
    assert_close(compiled(*leaves), (y, ty))
    assert ops.linear_jvp(x, w)[1] is None


def test_torch_loses_part_of_the_gradient_through_layer_norms_tangent():
    """Why the oracles write it out and why training through a tangent should use `adaln`; torch 2.14's defect.

    If this fails, torch has mended it: compare with F.layer_norm again.
    """
    torch.manual_seed(0)
    x, t = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)

    def through(f):
        return torch.func.grad(lambda z: torch.func.jvp(f, (z,), (t,))[1].sin().sum())(x)

    true = through(written_out)
    assert_close(through(lambda z: ops.adaln(z)), true)
    assert error(through(lambda z: F.layer_norm(z, (6,), eps=1e-6)), true) > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.adaln(x, torch.ones(3, 4)), r"scale \[2, 4\], \[2, 1, 4\]"),
        (lambda x: ops.adaln(x, weight=torch.ones(3)), r"weight \[4\]"),
        (lambda x: ops.adaln(x, norm="batch"), "layer, rms"),
        (lambda x: ops.adaln(x, eps=0.0), "positive"),
        (lambda x: ops.adaln(x.long()), "floats"),
        (lambda x: ops.adaln(x, backend="chunked"), "cannot run adaln: it has no kernel for it"),
        (lambda x: ops.qk_norm_rope(x[None], backend="chunked"), "cannot run qk_norm_rope"),
        (lambda x: ops.group_norm_silu(x, 1, backend="chunked"), "cannot run group_norm_silu"),
        (lambda x: ops.gated_residual(x, x[:, 0], x, backend="chunked"), "cannot run gated_residual"),
        (lambda x: ops.adaln_jvp(x, tx=x[:1]), "x's shape"),
        (lambda x: ops.adaln_jvp(x, tscale=torch.ones(2, 4)), "tscale must have scale's shape None"),
        (lambda x: ops.group_norm_silu(x, 2), "does not divide"),
        (lambda x: ops.qk_norm_rope(x), r"\[B, H, N, D\]"),
        (lambda x: ops.qk_norm_rope(x[None], torch.ones(3, 4)), "together"),
        (lambda x: ops.qk_norm_rope(x[None], torch.ones(3, 2), torch.ones(3, 2)), r"cos must be \[N, D\] = \[3, 4\]"),
        (lambda x: ops.qk_norm_rope(x[None], layout="quarters"), "interleaved, half"),
        (lambda x: ops.gated_residual(x, torch.ones(2, 4), x.double()), "alike"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 4))


def test_positions_with_a_derivative_are_refused():
    q, table = torch.ones(1, 2, 3, 4), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="cos carries a derivative"):
        torch.func.jvp(lambda c: ops.qk_norm_rope(q, c, table), (table,), (table,))
