"""The Triton kernels against the reference in float64, in Triton's interpreter: what they compute, not how they run.

bfloat16 is compared with twice the tolerance: the interpreter truncates where a device rounds.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from fewstep_cuda import attention, attention_jvp

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2 * 2e-2}
SHAPES = {  # B, Hq, Hk, N, M, D, Dv
    "ragged": (1, 2, 2, 50, 37, 16, 16),
    "padded head": (1, 1, 1, 33, 40, 40, 24),
    "groups": (2, 4, 2, 5, 70, 8, 8),
    "one": (1, 1, 1, 1, 1, 72, 3),
    "d128": (1, 1, 1, 20, 33, 128, 128),
    "d256": (1, 1, 1, 17, 18, 256, 256),
}


def draw(shape, dtype, seed=0):
    b, hq, hk, n, m, d, dv = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(b, hq, n, d), (b, hk, m, d), (b, hk, m, dv)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes * 2]


def both(inputs, given=(1, 1, 1), used="both", **options):
    """[(o, to, gradients...)] by the kernels, and in float64 by the reference."""
    found = []
    for backend, dtype in (("triton", inputs[0].dtype), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        tangents = [x if there else None for x, there in zip(leaves[3:], given)]
        o, to = attention_jvp(*leaves[:3], *tangents, **options, backend=backend)
        generator = torch.Generator().manual_seed(5)
        go, gt = (torch.randn(o.shape, generator=generator).to(inputs[0].dtype).to(dtype) for _ in range(2))
        outputs, gradients = {"both": ((o, to), (go, gt)), "o": ((o,), (go,)), "to": ((to,), (gt,))}[used]
        by = [x for x, there in zip(leaves, (1, 1, 1, *given)) if there]
        found.append([o, to, *torch.autograd.grad(outputs, by, gradients, allow_unused=True)])
    return found


def close(found, wanted, dtype):
    for f, w in zip(found, wanted):
        assert (f is None) == (w is None)
        if f is not None and w is not None:
            assert f.dtype == dtype
            error = float((f.double() - w).abs().max())
            assert error <= TOLERANCE[dtype] * max(1.0, float(w.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients(name, dtype):
    """Mutations: mu moved without G; mask of d < D left out; a group's heads but the first skipped."""
    close(*both(draw(SHAPES[name], dtype)), dtype)


@pytest.mark.parametrize("used", ["o", "to", "both"])
@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_tangents_and_gradients_that_are_left_out(given, used):
    """Mutation: sum_d gt to left out when there is no go."""
    close(*both(draw((1, 2, 1, 20, 37, 16, 16), torch.float32), given, used), torch.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "full", "additive"])
def test_masks(kind, causal):
    """With rows without keys.  Mutations: keys j < i; the additive mask not in units of log 2."""
    shape = (2, 2, 2, 37, 40, 16, 16)
    generator = torch.Generator().manual_seed(1)
    full = torch.rand(2, 2, 37, 40, generator=generator) < 0.6
    full[0, 1, 3] = False
    mask = {
        "none": None,
        "padding": torch.arange(40) < torch.tensor([40, 7])[:, None, None, None],
        "full": full,
        "additive": torch.randn(2, 37, 40, generator=generator).masked_fill(~full[0], -torch.inf),
    }[kind]
    close(*both(draw(shape, torch.float32), mask=mask, causal=causal), torch.float32)


def test_strides():
    """[B, N, H, D] seen as [B, H, N, D], and D not contiguous.  Mutation: the strides of tq taken for tk's."""
    for axes in ((0, 2, 1, 3), (0, 1, 3, 2)):
        inputs = draw((2, 2, 2, 9, 11, 16, 16), torch.float32)
        back = [axes.index(i) for i in range(4)]
        views = [x.permute(axes).contiguous().permute(back) if i % 2 == 0 else x for i, x in enumerate(inputs)]
        close(*both(views), torch.float32)


def test_primal_and_dual_numbers():
    """Mutation: a tangent that is silently zero."""
    inputs = draw((1, 2, 2, 9, 20, 16, 16), torch.float32)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    found = [attention(*leaves, causal=True, backend=backend) for backend in ("triton", "reference")]
    assert_close(*found, rtol=1e-5, atol=1e-6)
    assert_close(*(torch.autograd.grad(o.sin().sum(), leaves) for o in found), rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(inputs[:3], inputs[3:])]
        tangents = [forward_ad.unpack_dual(attention(*duals, backend=b)).tangent for b in ("triton", "reference")]
    assert float(tangents[1].abs().max()) > 0.1
    assert_close(*tangents, rtol=1e-5, atol=2e-6)
