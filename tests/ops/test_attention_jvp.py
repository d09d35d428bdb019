"""Attention and its tangent against torch.func.jvp of plain attention in float64; gradients against autograd."""

import math
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from fewstep_cuda import attention, attention_chunked, attention_jvp, backends, dispatch

CPU = pytest.param("cpu", marks=pytest.mark.skipif(backends()["cpu"] != "ok", reason=backends()["cpu"]))
BACKENDS = ["reference", "chunked", CPU]
PLAIN = ["reference", "chunked"]
ALL = (True, True, True)
SHAPES = {  # B, Hq, Hk, N, M, D, Dv
    "one query": (1, 2, 2, 1, 7, 8, 8),
    "one key": (2, 1, 1, 5, 1, 8, 8),
    "prime": (2, 3, 3, 17, 17, 32, 32),
    "cross": (1, 2, 2, 77, 250, 40, 40),
    "crossed": (1, 2, 2, 250, 77, 64, 64),
    "d72": (1, 1, 1, 49, 33, 72, 72),
    "d128": (1, 2, 2, 64, 48, 128, 128),
    "d256": (1, 1, 1, 33, 50, 256, 256),
    "wide values": (1, 2, 2, 20, 30, 16, 40),
    "narrow values": (1, 2, 2, 20, 30, 40, 3),
    "groups": (2, 6, 2, 19, 101, 24, 24),
    "one head of keys": (2, 4, 1, 50, 50, 5, 7),
    "several blocks": (1, 2, 1, 200, 300, 33, 33),
}
SMALL = (2, 4, 2, 5, 7, 3, 4)


def draw(shape, dtype=torch.float64, seed=0):
    """q, k, v and their tangents."""
    b, hq, hk, n, m, d, dv = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(b, hq, n, d), (b, hk, m, d), (b, hk, m, dv)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes * 2]


def some(tensors, given):
    """The tangents, None for those that are not given."""
    return [x if there else None for x, there in zip(tensors, given)]


def masks(kind, shape):
    b, hq, _, n, m, _, _ = shape
    generator = torch.Generator().manual_seed(1)
    if kind == "padding":
        return torch.arange(m) < torch.randint(1, m + 1, (b, 1, 1, 1), generator=generator)
    if kind == "full":
        return torch.rand(b, hq, n, m, generator=generator) < 0.6
    if kind == "heads":
        return torch.rand(hq, 1, m, generator=generator) < 0.6
    if kind == "additive":
        return torch.randn(n, m, generator=generator)
    if kind == "additive inf":
        return torch.zeros(b, 1, n, m).masked_fill(torch.rand(b, 1, n, m, generator=generator) < 0.5, -torch.inf)
    return None


def plain(q, k, v, mask=None, causal=False, scale=None):
    """Attention as anyone would write it; a row without keys is 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.zeros(s.shape, dtype=torch.bool)
    if mask is not None:
        hidden = hidden | (~mask if mask.dtype == torch.bool else mask == -torch.inf)
        s = s if mask.dtype == torch.bool else s + mask.to(s).masked_fill(mask == -torch.inf, 0)
    if causal:
        hidden = hidden | ~torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    # Half of the largest number, not infinity: autograd of a softmax without any finite score is NaN.
    p = s.masked_fill(hidden, torch.finfo(s.dtype).min / 2).softmax(-1).masked_fill(hidden, 0)
    return p @ v


def oracle(primals, tangents, **options):
    """(o, to) by torch.func.jvp; a tangent of None is zero."""
    tangents = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents))
    return torch.func.jvp(lambda *x: plain(*x, **options), tuple(primals), tangents)


def no_worse(found, torchs, wanted, floor):
    """Error at most twice plain torch's in the same dtype, or `floor` of the result's size: root mean square, and three
    times that for the largest, a noisy number."""
    for f, t, w in zip(found, torchs, wanted):
        assert f.dtype == t.dtype and f.shape == t.shape
        ours, plains, size = f.double() - w, t.double() - w, w.abs().max()
        assert ours.square().mean().sqrt() <= max(2 * plains.square().mean().sqrt(), floor * size)
        assert ours.abs().max() <= max(3 * plains.abs().max(), 3 * floor * size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_value_and_tangent(name, backend):
    """Mutations: mu o not subtracted; the rescale of one accumulator left out; a tail of rows, keys or D skipped."""
    inputs = draw(SHAPES[name], torch.float32)
    wanted = oracle(*(([x.double() for x in part]) for part in (inputs[:3], inputs[3:])))
    no_worse(attention_jvp(*inputs, backend=backend), oracle(inputs[:3], inputs[3:]), wanted, 5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "full", "heads", "additive", "additive inf"])
def test_masks(kind, causal, backend):
    """Mutations: keys j < i for causal; the mask of the first head for all; an additive one times the scale."""
    for shape in ((2, 4, 2, 37, 130, 20, 20), (2, 2, 2, 130, 37, 20, 20)):
        inputs, options = draw(shape, torch.float32), {"mask": masks(kind, shape), "causal": causal}
        wanted = oracle(*(([x.double() for x in part]) for part in (inputs[:3], inputs[3:])), **options)
        found = attention_jvp(*inputs, **options, backend=backend)
        no_worse(found, oracle(inputs[:3], inputs[3:], **options), wanted, 5e-7)
        assert_close(attention(*inputs[:3], **options, backend=backend), wanted[0].float(), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_a_tangent_of_none_is_zero(given, backend):
    """Mutation: tq k^T taken for tq k^T + q tk^T when tk is there."""
    inputs = draw((1, 2, 2, 21, 70, 20, 20), torch.float32)
    tangents = some(inputs[3:], given)
    zeros = [torch.zeros_like(p) if t is None else t for p, t in zip(inputs[:3], tangents)]
    found = attention_jvp(*inputs[:3], *tangents, backend=backend)
    assert_close(found, attention_jvp(*inputs[:3], *zeros, backend=backend), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_strides(axes, backend):
    """[B, N, H, D] seen as [B, H, N, D], as diffusers makes it, and the worst: D not contiguous.  Mutation: data_ptr
    of a tensor whose strides are taken for contiguous ones."""
    inputs = draw((2, 3, 3, 19, 21, 24, 24), torch.float32)
    back = [axes.index(i) for i in range(4)]
    views = [x.permute(axes).contiguous().permute(back) for x in inputs]
    assert not any(x.is_contiguous() for x in views)
    found, wanted = (attention_jvp(*x, backend=backend) for x in (views, inputs))
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    """Strides of 0: the same keys for every sample and head.  Mutation: an output laid out like such an input."""
    q, k, v, tq, tk, tv = draw((2, 2, 2, 9, 11, 8, 8), torch.float32)
    few = [x[:1, :1].expand_as(x) for x in (q, k, v, tq, tk, tv)]
    assert_close(attention_jvp(*few, backend=backend), attention_jvp(*[x.clone() for x in few], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_are_zero(backend):
    """Mutation: a row of -inf scores, whose softmax is 0 / 0; poison in what is masked."""
    inputs = draw((2, 2, 2, 70, 90, 8, 8), torch.float32)
    mask = torch.ones(2, 1, 70, 90, dtype=torch.bool)
    mask[0] = False
    mask[1, :, 3:5] = False
    leaves = [x.clone().requires_grad_() for x in inputs]
    for hidden in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        o, to = attention_jvp(*leaves, mask=hidden, backend=backend)
        assert not o[0].any() and not to[0].any() and not o[1, :, 3:5].any() and not to[1, :, 3:5].any()
        assert bool(o[1, :, 5:].all()) and bool(to[1, :, 5:].all())
        gradients = torch.autograd.grad((o.sum() + to.square().sum()), leaves)
        assert all(bool(g.isfinite().all()) and not g[0].any() for g in gradients)
    assert not attention(*inputs[:3], mask=mask)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-18, 1e-3, 30.0, 1e4])
def test_huge_and_tiny_values(size, backend):
    """Mutation: exp without the row's maximum; an exponential whose argument's clamp is wrong."""
    q, k, v, tq, tk, tv = draw((1, 2, 2, 40, 70, 16, 16), torch.float32)
    inputs = [size * q, k, size * v, tq, tk, size * tv]
    wanted = oracle(*(([x.double() for x in part]) for part in (inputs[:3], inputs[3:])))
    # Scores of 4 size round by 3e-7 size, and a row with two near maxima moves by as much of its size.
    no_worse(attention_jvp(*inputs, backend=backend), oracle(inputs[:3], inputs[3:]), wanted, max(5e-7, 1e-7 * size))


@pytest.mark.parametrize("backend", BACKENDS)
def test_identities(backend):
    """The tangent is linear; tv = v gives o; the same shift of all keys moves nothing.  Mutations: mu taken from S."""
    q, k, v, tq, tk, tv = draw((1, 2, 2, 33, 90, 16, 16), torch.float32)
    o, to = attention_jvp(q, k, v, tq, tk, tv, backend=backend)
    assert_close(attention_jvp(q, k, v, 4 * tq, 4 * tk, 4 * tv, backend=backend)[1], 4 * to, rtol=1e-6, atol=1e-6)
    assert_close(attention_jvp(q, k, v, None, None, v, backend=backend)[1], o, rtol=1e-6, atol=1e-6)
    shift = torch.randn(1, 2, 1, 16).expand_as(k)
    assert float(attention_jvp(q, k, v, None, shift, None, backend=backend)[1].abs().max()) < 1e-5


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    """Mutation: the softmax in the inputs' dtype."""
    inputs = draw((1, 4, 2, 60, 50, 32, 32), dtype)
    wanted = oracle(*(([x.double() for x in part]) for part in (inputs[:3], inputs[3:])))
    no_worse(attention_jvp(*inputs, backend=backend), oracle(inputs[:3], inputs[3:]), wanted, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads, backend):
    """Mutation: scratch memory that threads share."""
    inputs, before = draw((2, 4, 4, 150, 130, 32, 32), torch.float32), torch.get_num_threads()
    wanted = attention_jvp(*inputs, backend=backend)
    try:
        torch.set_num_threads(threads)
        assert_close(attention_jvp(*inputs, backend=backend), wanted, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("used", ["o", "to", "both"])
@pytest.mark.parametrize("given", [ALL, (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("kind", ["none", "full", "additive"])
def test_gradients_through_both_outputs(kind, given, used, backend):
    """Closed form against autograd through torch.func.jvp.  Mutations: sum(gt to) left out of gS; n not centred."""
    inputs, mask = draw(SMALL), masks(kind, SMALL)
    go, gt = (torch.randn(2, 4, 5, 4, dtype=torch.float64) for _ in range(2))

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o, to = function(leaves[:3], some(leaves[3:], given))
        value = (o * go).sum() * (used != "to") + (to * gt).sum() * (used != "o")
        if used == "o":
            value = (o * go).sum()
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves)]

    found = gradients(lambda p, t: attention_jvp(*p, *t, mask=mask, backend=backend))
    assert_close(found, gradients(lambda p, t: oracle(p, t, mask=mask)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_float32(causal, backend):
    """In several blocks, with groups.  Mutation: a block's gradient by keys written, not added."""
    shape = (2, 4, 2, 150, 130, 16, 24)
    inputs, mask = draw(shape, torch.float32), masks("padding", shape)

    def gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        o, to = function(leaves[:3], leaves[3:])
        return torch.autograd.grad(o.sin().sum() + to.sin().sum(), leaves)

    wanted = gradients(lambda p, t: oracle(p, t, mask=mask, causal=causal), torch.float64)
    torchs = gradients(lambda p, t: oracle(p, t, mask=mask, causal=causal), torch.float32)
    options = {"mask": mask, "causal": causal, "backend": backend}
    no_worse(gradients(lambda p, t: attention_jvp(*p, *t, **options), torch.float32), torchs, wanted, 2e-6)


def test_blocks_are_several(monkeypatch):
    """Mutation: blocks of rows that start at 0."""
    inputs = [x.requires_grad_() for x in draw((3, 4, 2, 70, 9, 3, 4))]

    def everything():
        o, to = attention_jvp(*inputs, causal=True, backend="chunked")
        return [o, to, *torch.autograd.grad(o.sin().sum() + to.sin().sum(), inputs)]

    wanted = everything()
    monkeypatch.setattr(attention_chunked, "SCORES", 4 * 9 * 32)
    assert_close(everything(), wanted, rtol=1e-12, atol=1e-12)


# --- dual numbers ----------------------------------------------------------------------------------------------------


def dual(function, primals, tangents):
    with forward_ad.dual_level():
        given = [p if t is None else forward_ad.make_dual(p, t) for p, t in zip(primals, tangents)]
        return forward_ad.unpack_dual(function(*given))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("given", [ALL, (1, 0, 0), (0, 1, 1)])
def test_dual_numbers(given, backend):
    """Both ways of forward mode.  Mutation: kernels behind an op without a jvp: the tangent is silently zero."""
    inputs = draw((2, 4, 2, 15, 17, 8, 8), torch.float32)
    tangents = some(inputs[3:], given)
    wanted = oracle(inputs[:3], tangents)
    assert float(wanted[1].abs().max()) > 0.1
    zeros = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(inputs[:3], tangents))
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            assert_close(tuple(dual(partial(attention, backend=backend), inputs[:3], tangents)), wanted)
            assert_close(torch.func.jvp(partial(attention, backend=backend), tuple(inputs[:3]), zeros), wanted)


def test_value_and_tangent_come_from_one_pass(monkeypatch):
    """Mutation: the jvp computes the value again."""
    calls = []
    real = dispatch.kernel
    monkeypatch.setattr(dispatch, "kernel", lambda *x: calls.append(x[0]) or real(*x))
    inputs = draw(SMALL)
    dual(attention, inputs[:3], inputs[3:])
    torch.func.jvp(attention, tuple(inputs[:3]), tuple(inputs[3:]))
    assert calls == ["attention_jvp"] * 2


@pytest.mark.parametrize("backend", PLAIN)
def test_derivatives_by_finite_differences(backend):
    """First, with forward mode, and second, forward over reverse and reverse over reverse.  Mutation: the gradient's
    tangent without its part through go."""
    q, k, v, *tangents = (x.requires_grad_() for x in draw((1, 2, 1, 2, 3, 2, 2)))
    for mask in (None, torch.tensor([[True, True, False], [True, True, True]])):
        value = partial(attention, mask=mask, backend=backend)
        assert gradcheck(value, (q, k, v), check_forward_ad=True)
        assert gradgradcheck(value, (q, k, v), check_fwd_over_rev=True)
        assert gradcheck(partial(attention_jvp, mask=mask, backend=backend), (q, k, v, *tangents))


NESTED = {
    "jvp of grad": lambda f, p, t: torch.func.jvp(torch.func.grad(lambda *x: f(*x).sin().sum(), (0, 1, 2)), p, t)[1],
    "grad of jvp": lambda f, p, t: torch.func.grad(lambda *x: torch.func.jvp(f, x, t)[1].sin().sum(), (0, 1, 2))(*p),
    "vmap of jvp": lambda f, p, t: torch.vmap(lambda q: torch.func.jvp(f, (q, *p[1:]), t)[1])(torch.stack([p[0]] * 3)),
    "jvp of vmap": lambda f, p, t: torch.func.jvp(
        lambda k: torch.vmap(lambda q: f(q, k, p[2]))(torch.stack([p[0], t[0]])), (p[1],), (t[1],)
    )[1],
    "jacfwd": lambda f, p, t: torch.func.jacfwd(lambda q: f(q, *p[1:]))(p[0]),
    "jacrev": lambda f, p, t: torch.func.jacrev(lambda k: f(p[0], k, p[2]))(p[1]),
    "grad of grad": lambda f, p, t: torch.func.grad(
        lambda q: torch.func.grad(lambda q: f(q, *p[1:]).sin().sum())(q).sin().sum()
    )(p[0]),
}


@pytest.mark.parametrize("backend", [None, *PLAIN])
@pytest.mark.parametrize("name", NESTED)
def test_function_transforms_nest(name, backend):
    """Mutation: a tangent that is read at the wrong level, which gives zeros."""
    inputs, mask = draw(SMALL), masks("full", SMALL)
    arguments = tuple(inputs[:3]), tuple(inputs[3:])
    wanted = NESTED[name](lambda *x: plain(*x, mask=mask), *arguments)
    found = NESTED[name](lambda *x: attention(*x, mask=mask, backend=backend), *arguments)
    assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_the_dual_pass(backend):
    """Value and tangent of a dual pass both carry a graph.  Mutation: the tangent is stored without one."""
    inputs = draw(SMALL, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    o, to = dual(lambda *x: attention(*x, backend=backend), leaves[:3], leaves[3:])
    found = torch.autograd.grad(o.sin().sum() + to.sin().sum(), leaves)
    o, to = oracle(leaves[:3], leaves[3:])
    assert_close(found, torch.autograd.grad(o.sin().sum() + to.sin().sum(), leaves), rtol=1e-4, atol=1e-5)


def test_second_tangents_are_refused():
    """Mutation: jvp of jvp gives zeros."""
    inputs = draw(SMALL)
    once = lambda *x: torch.func.jvp(attention, x, tuple(inputs[3:]))[1]  # noqa: E731
    with pytest.raises(RuntimeError, match="second derivative in forward mode"):
        torch.func.jvp(once, tuple(inputs[:3]), tuple(inputs[3:]))


def test_third_derivatives_are_refused():
    """Mutation: a backward that is run without recording: its gradient would be silently missing."""
    q, k, v, *_ = (x.requires_grad_() for x in draw(SMALL))
    o = attention(q, k, v, backend="chunked").sin().sum()
    (g,) = torch.autograd.grad(o, q, create_graph=True)
    (g,) = torch.autograd.grad(g.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="one too many"):
        torch.autograd.grad(g.sum(), q)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("how", ["compile of jvp", "jvp of compile", "compile of dual"])
def test_compiled_it_is_right_or_refused(how, full):
    """With fullgraph it may be refused.  Mutation: a jvp of zeros, which is what dynamo makes of a Function that it
    looks into.  With torch 2.14 it does not, even without torch.compiler.disable: the tangents break its graph."""
    inputs = draw(SMALL)
    arguments = tuple(inputs[:3]), tuple(inputs[3:])
    f = lambda *x: attention(*(y.sin() for y in x)).cos()  # noqa: E731
    compiled = lambda g: torch.compile(g, backend="eager", fullgraph=full)  # noqa: E731
    torch._dynamo.reset()
    wanted = torch.func.jvp(lambda *x: plain(*(y.sin() for y in x)).cos(), *arguments)
    ways = {
        "compile of jvp": lambda: compiled(lambda p, t: torch.func.jvp(f, p, t))(*arguments),
        "jvp of compile": lambda: torch.func.jvp(compiled(f), *arguments),
        "compile of dual": lambda: tuple(compiled(lambda p, t: dual(f, p, t))(*arguments)),
    }
    with suppress(RuntimeError) if full else nullcontext():
        assert_close(ways[how](), wanted, rtol=1e-10, atol=1e-12)


def test_without_tangents_it_is_sdpa():
    """Bit for bit, with its gradient, masks and groups."""
    shape = (2, 4, 2, 33, 40, 16, 16)
    q, k, v, *_ = (x.requires_grad_() for x in draw(shape, torch.float32))
    for options in ({}, {"mask": masks("padding", shape)}, {"causal": True}, {"scale": 0.3}):
        names = {"mask": "attn_mask", "causal": "is_causal"}
        more = {names.get(name, name): value for name, value in options.items()}
        wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **more)
        found = attention(q, k, v, **options)
        assert torch.equal(found, wanted)
        assert torch.equal(*(torch.autograd.grad(x.sin().sum(), k)[0] for x in (found, wanted)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_value(backend):
    """A backend's own, asked for by name.  Mutation: dq without the scale."""
    shape = (2, 4, 2, 33, 140, 16, 24)
    q, k, v, *_ = (x.requires_grad_() for x in draw(shape, torch.float32))
    found = torch.autograd.grad(attention(q, k, v, causal=True, backend=backend).sin().sum(), (q, k, v))
    assert_close(found, torch.autograd.grad(plain(q, k, v, causal=True).sin().sum(), (q, k, v)), rtol=1e-4, atol=2e-5)


def test_autocast_is_sdpas():
    """Mutation: a normalised q in float32 beside a v in bfloat16 is refused."""
    q, k, v, tq, tk, tv = draw(SMALL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, to = dual(attention, (q, k, v.bfloat16()), (tq, tk, tv.bfloat16()))
        assert attention(q, k, v.bfloat16()).dtype == torch.bfloat16
    assert o.dtype == to.dtype == torch.bfloat16
    assert_close(to.float(), oracle((q, k, v), (tq, tk, tv))[1], rtol=0.05, atol=0.05)


def test_the_value_may_be_changed_in_place():
    """As SDPA's may."""
    inputs = draw(SMALL)
    found = dual(lambda *x: attention(*x).mul_(2), [x.requires_grad_() for x in inputs[:3]], inputs[3:])
    assert_close(found.tangent, 2 * oracle(inputs[:3], inputs[3:])[1])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused():
    q, k, v, tq, *_ = draw(SMALL)
    for arguments, options, what in [
        ((q, k, v), {}, "needs a tangent"),
        ((q[0], k, v, tq), {}, "needs q"),
        ((q[:, :3], k, v), {}, "multiple of Hk"),
        ((q, k, v[:, :, 1:], tq), {}, "needs q"),
        ((q[:, :, :0], k, v), {}, "none empty"),
        ((q, k, v, tq[..., :2]), {}, "tq must have"),
        ((q, k.float(), v, tq), {}, "k torch.float32"),
        ((q.long(), k.long(), v.long(), tq), {}, "floats"),
        ((q, k, v, tq), {"mask": torch.ones(4, 3, dtype=torch.bool)}, "broadcastable"),
        ((q, k, v, tq), {"mask": torch.ones(5, 7, dtype=torch.int64)}, "bool or float"),
        ((q, k, v, tq), {"backend": "fastest"}, "no such backend"),
        ((q, k, v, tq), {"backend": "cpu"}, "cannot run|no kernel|it takes"),
    ]:
        with pytest.raises(ValueError, match=what):
            attention_jvp(*arguments, **options)
    with pytest.raises(ValueError, match="at most 256"):
        attention(*draw((1, 1, 1, 1, 1, 257, 4))[:3])
    with pytest.raises(ValueError, match="cannot run"):
        attention(q, k, v, backend="cpu")


def test_what_would_be_lost_is_refused():
    """Mutation: a learned mask gets no gradient, an input's own tangent is dropped, in silence."""
    q, k, v, tq, tk, tv = draw(SMALL)
    with pytest.raises(RuntimeError, match="a mask is a constant"):
        attention(q, k, v, mask=torch.zeros(5, 7, dtype=torch.float64, requires_grad=True))
    with pytest.raises(RuntimeError, match="takes its tangents as arguments"):
        dual(lambda q: attention_jvp(q, k, v, tq, tk, tv)[0], (q,), (tq,))


def test_default_scale_is_of_the_keys_size():
    """Mutation: 1 / sqrt(Dv)."""
    q, k, v, tq, tk, tv = draw((1, 1, 1, 3, 4, 16, 2))
    found = attention_jvp(q, k, v, tq, tk, tv)
    assert_close(found, attention_jvp(q, k, v, tq, tk, tv, scale=1 / math.sqrt(16)))
