"""Triton's norms against their reference, in the interpreter."""

import pytest
import torch

import fewstep_cuda as ops

ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def both(run, dtype):
    """Values and tangents of Triton and of the reference in float64, of one operator on inputs of a dtype."""
    found = run("triton", lambda t: t)
    wanted = run("reference", lambda t: t.double())
    for mine, true in zip(found, wanted, strict=True):
        assert mine.dtype == dtype and true.any()
        assert float((mine.double() - true).abs().max() / true.abs().max()) < ROUNDING[dtype]


def draw(dtype, *shape):
    return torch.randn(*shape).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("size", [8, 75])
def test_adaln(dtype, norm, size):
    """Mutation: entries beyond the row counted in the variance, or eps added to the root."""
    x, tx = draw(dtype, 2, 3, size) + 2, draw(dtype, 2, 3, size) + 2
    scale, tscale = draw(dtype, 2, size), draw(dtype, 2, size)
    shift, tshift = draw(dtype, 1, 1, size), draw(dtype, 1, 1, size)

    def run(backend, wide):
        inputs = [wide(t) for t in (x, scale, shift, tx, tscale, tshift)]
        keep = {"norm": norm, "eps": 0.1, "backend": backend}
        return *ops.adaln_jvp(*inputs, **keep), ops.adaln(*inputs[:3], **keep)

    both(run, dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("layout", ["interleaved", "half", None])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_heads(dtype, layout, norm):
    """Strided, with a size that is no power of two. Mutation: the tangent's pair with the primal's strides."""
    q = draw(dtype, 2, 5, 3, 12).transpose(1, 2)
    tq = draw(dtype, 2, 3, 5, 12)
    weight, angle = draw(dtype, 12), torch.randn(5, 6)
    angle = angle.repeat(1, 2) if layout == "half" else angle.repeat_interleave(2, 1)
    cos, sin = (None, None) if layout is None else (angle.cos(), angle.sin())

    def run(backend, wide):
        keep = {"norm": norm, "layout": layout or "half", "weight": wide(weight), "eps": 0.1, "backend": backend}
        tables = [t if t is None else wide(t) for t in (cos, sin)]
        return (
            *ops.qk_norm_rope_jvp(wide(q), *tables, wide(tq), **keep),
            ops.qk_norm_rope(wide(q), *tables, **keep),
        )

    both(run, dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("silu", [True, False])
def test_groups_in_several_chunks(dtype, silu, monkeypatch):
    """Mutation: the last chunk's missing entries counted."""
    from fewstep_cuda.triton import norm_jvp

    monkeypatch.setattr(norm_jvp, "CHUNK", 16)
    x, tx = draw(dtype, 2, 6, 3, 5) + 1, draw(dtype, 2, 6, 3, 5) + 1
    weight, bias, scale, shift = draw(dtype, 6), draw(dtype, 6), draw(dtype, 2, 6), draw(dtype, 2, 6)

    def run(backend, wide):
        inputs = [wide(t) for t in (weight, bias, scale, shift)]
        keep = {"silu": silu, "eps": 0.1, "backend": backend}
        tangents = {"tx": wide(tx), "tscale": wide(shift), "tshift": wide(scale)}
        return (
            *ops.group_norm_silu_jvp(wide(x), 2, *inputs, **tangents, **keep),
            ops.group_norm_silu(wide(x), 2, *inputs, **keep),
        )

    both(run, dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_gated_residual(dtype):
    """Mutation: the gate of the next sample at a block's end."""
    x, y, tx, ty = (draw(dtype, 3, 5, 90) for _ in range(4))
    gate, tgate = draw(dtype, 3, 90), draw(dtype, 3, 1, 90)

    def run(backend, wide):
        x_, g_, y_ = wide(x), wide(gate), wide(y)
        moved = [wide(tx), wide(tgate).view(3, 90), wide(ty)]
        return (
            *ops.gated_residual_jvp(x_, g_, y_, *moved, backend=backend),
            ops.gated_residual(x_, g_, y_, backend=backend),
        )

    both(run, dtype)


def test_derivatives_go_through_it():
    """torch.func.jvp and a backward pass. Mutation: the kernel called without the autograd.Function."""
    x, t = torch.randn(2, 3, 8), torch.randn(2, 3, 8)

    def run(backend):
        leaf = x.clone().requires_grad_()
        ops.adaln(leaf, backend=backend).sin().sum().backward()
        return torch.func.jvp(lambda z: ops.adaln(z, backend=backend), (x,), (t,))[1], leaf.grad

    for mine, true in zip(run("triton"), run("reference")):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-6)
