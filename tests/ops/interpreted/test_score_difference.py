"""Triton's kernels of matching against float64.  What the interpreter cannot see: see conftest.py."""

import pytest
import torch
from torch.testing import assert_close

from fewstep_cuda import (
    score_difference,
    score_difference_from_raw,
    score_difference_two,
    score_identity,
    tangent_normalise,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 2, 5, 3), (1, 1), (2, 4096), (2, 9001)]  # less than a block, a whole one, several and a rest


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(5)]


def plain(x, real, fake, *others, **options):
    return score_difference(x, real, fake, **options)


def two(x, real, fake, cond, uncond, **options):
    return score_difference_two(x, (real, fake), (cond, uncond), strength=3.5, **options)


def identity(x, real, fake, *others, **options):
    return score_identity(x, real, fake, alpha=1.2, **options)


def check(found, wanted):
    """Outputs are float32 and inputs are widened exactly, so that one tolerance serves all dtypes."""
    for mine, truth in zip(found, wanted):
        assert mine.dtype == torch.float32
        scale = float(truth.abs().max())
        assert_close(mine.double(), truth, rtol=2e-6, atol=1e-7 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_score_difference(shape, dtype):
    """Mutations: no mask over the last block; the subtraction in half precision."""
    x, real, fake, *_ = inputs(shape, dtype)
    wanted = score_difference(x.double(), real.double(), fake.double())
    check(score_difference(x, real, fake, backend="triton"), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_score_difference_from_raw(kind, guidance, dtype):
    given = inputs((3, 2, 5, 3), dtype)
    levels = torch.linspace(0.2, 0.9, 3), torch.linspace(0.9, 0.3, 3)
    if guidance == 1:
        given[4] = None
    options = {"guidance": guidance, "kind": kind}
    doubles = [None if tensor is None else tensor.double() for tensor in given]
    wanted = score_difference_from_raw(*doubles, *(level.double() for level in levels), **options)
    check(score_difference_from_raw(*given, *levels, **options, backend="triton"), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", [two, identity])
def test_two_terms_and_the_identity(operator, shape, dtype):
    """Mutations: the first term's partial sums for both; 1 - alpha for alpha; the power of two left out."""
    given = inputs(shape, dtype)
    check(operator(*given, backend="triton"), operator(*(tensor.double() for tensor in given)))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("operator", [two, identity])
def test_magnitudes_do_not_matter(operator, scale):
    """Mutations: a sum of squares, or the product of SiD's two factors, of what is not divided yet."""
    given = [scale * tensor for tensor in inputs((2, 4099), torch.float32)]
    options = {"floor": 1e-35}
    check(operator(*given, **options, backend="triton"), operator(*(tensor.double() for tensor in given), **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tangent_normalise(shape, norm, dtype):
    g, *_ = inputs(shape, dtype)
    check(tangent_normalise(g, 0.1, norm=norm, backend="triton"), tangent_normalise(g.double(), 0.1, norm=norm))


@pytest.mark.parametrize("operator", [plain, two, identity])
def test_mixed_dtypes_and_strides(operator):
    x, real, *others = inputs((3, 2, 5, 4), torch.float32)
    mixed = [x.bfloat16(), *(tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in (real.half(), *others))]
    check(operator(*mixed, backend="triton"), operator(*(tensor.double() for tensor in mixed)))


@pytest.mark.parametrize("operator", [plain, two, identity])
def test_more_blocks_than_lanes_that_add_them(operator):
    """Mutations: `total` stops after its first lanes; it starts at another sample's or another term's."""
    given = inputs((2, 33 * 4096 + 5), torch.float32)
    check(operator(*given, backend="triton"), operator(*(tensor.double() for tensor in given)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(5))
def test_what_is_not_finite_spoils_its_sample_and_the_value_alone(which, bad):
    """Mutations: tl.maximum for the floor, which drops NaN; infinity as divisor, which makes a silent 0."""
    given, levels = inputs((3, 40), torch.float32), [torch.full((3,), 0.5)] * 2
    given[which][1, 17] = bad
    options = {"guidance": 4.5, "kind": "flow"}
    found = score_difference_from_raw(*given, *levels, **options, backend="triton")
    wanted = score_difference_from_raw(*given, *levels, **options, backend="reference")
    for mine, truth in zip(found, wanted):
        assert torch.equal(mine.isfinite(), truth.isfinite()) and torch.equal(mine.isnan(), truth.isnan())
    bounded, size = tangent_normalise(given[which], 0.1, backend="triton")
    assert not size[1].isfinite() and not bounded[1].isfinite().any() and bounded[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("operator", [two, identity])
def test_what_is_not_finite_spoils_its_term_alone(operator, which, bad):
    """The same of two terms, each by its own normaliser and value, and of the identity."""
    given = inputs((3, 40), torch.float32)
    given[which][1, 17] = bad
    for mine, truth in zip(operator(*given, backend="triton"), operator(*given, backend="reference")):
        assert torch.equal(mine.isfinite(), truth.isfinite()) and torch.equal(mine.isnan(), truth.isnan())


def test_x_t_takes_no_part_where_networks_predict_x0():
    """Mutation: 0 * x_t."""
    given, levels = inputs((3, 40), torch.float32), [torch.full((3,), 0.5)] * 2
    given[1][1, 17] = float("nan")
    found = score_difference_from_raw(*given, *levels, guidance=4.5, kind="x0", backend="triton")
    assert all(output.isfinite().all() for output in found)


@pytest.mark.parametrize("operator", [plain, two, identity])
def test_floor_is_the_least_normaliser(operator):
    x, _, fake, *_ = inputs((3, 40), torch.float32)
    weight = operator(x, x, fake, x, fake, floor=1e-3, backend="triton").weight
    assert_close(weight, torch.full_like(weight, 1e3))
