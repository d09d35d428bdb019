"""Claims about the streaming moments and the Frechet distance; float64, closed forms as oracles."""

import pytest
import torch
from torch.testing import assert_close

from fewstep.metrics.frechet import Moments, frechet_distance, moments_distance


def features(n: int, d: int, seed: int = 0, offset: float = 30.0) -> torch.Tensor:
    """Correlated features far from the origin, where raw sums would lose digits."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + offset


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    """For diagonal covariances the distance is sum (m1 - m2)^2 + (s1 - s2)^2 with standard deviations s."""
    m1, m2, s1, s2 = torch.tensor(
        [[0.0, 1.0, -2.0], [0.5, 1.0, 3.0], [1.0, 2.0, 0.1], [3.0, 2.0, 0.7]], dtype=torch.float64
    )
    expected = float(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum())
    found = frechet_distance(m1, torch.diag(s1**2), m2, torch.diag(s2**2))
    assert found == pytest.approx(expected, rel=1e-12)


def test_distance_is_unchanged_by_a_common_rotation():
    """A wrong matrix root passes on diagonal matrices; a rotation of both Gaussians must not change the distance."""
    turn, _ = torch.linalg.qr(features(4, 4, seed=3, offset=0.0))
    s1, s2 = (torch.diag(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, 4, 9, 16], [2.0, 3, 5, 7]))
    zero = torch.zeros(4)
    straight = frechet_distance(zero, s1, zero, s2)
    assert frechet_distance(zero, turn @ s1 @ turn.T, zero, turn @ s2 @ turn.T) == pytest.approx(straight, rel=1e-12)


def test_distance_is_symmetric_for_full_covariances():
    """R S2 R and R' S1 R' have the same eigenvalues, so the order of the sets must not matter."""
    one, two = Moments.of(features(50, 5, seed=1)), Moments.of(features(60, 5, seed=2))
    assert moments_distance(one, two) == pytest.approx(moments_distance(two, one), rel=1e-10)


def test_identical_sets_have_distance_zero_and_never_less():
    """Rounding leaves about -1e-10, which must come out as 0 and not as a negative distance."""
    moments = Moments.of(features(200, 16))
    assert 0 <= moments_distance(moments, moments) < 1e-8


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_moments_do_not_depend_on_the_batch_size(batch_size):
    """Streaming in any batch size equals torch.cov of everything at once to 1e-12 relative."""
    data = features(257, 6)
    moments = Moments.empty(6)
    for batch in data.split(batch_size):
        moments = moments.update(batch)
    assert moments.count == 257
    assert_close(moments.mean, data.mean(0), rtol=1e-12, atol=0)
    assert_close(moments.cov, torch.cov(data.T), rtol=1e-12, atol=1e-12)


def test_merge_of_unequal_parts_equals_one_pass():
    """Two ranks with 40 and 217 vectors joined give the moments of all 257; an unweighted mean would not."""
    data = features(257, 6)
    merged = Moments.of(data[:40]).merge(Moments.of(data[40:]))
    whole = Moments.of(data)
    assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    assert_close(merged.m2, whole.m2, rtol=1e-12, atol=1e-10)


def test_empty_batches_change_nothing():
    """A rank without samples contributes nothing."""
    moments = Moments.of(features(9, 3))
    assert moments.update(torch.zeros(0, 3)) == moments
    assert Moments.empty(3).merge(moments) == moments


def test_float32_features_are_accumulated_in_float64():
    """float32 features with a large mean keep their small covariance."""
    data = (features(500, 3) / 1000 + 1000).float()
    assert_close(Moments.of(data).cov, torch.cov(data.double().T), rtol=1e-9, atol=0)


def test_too_few_samples_warn():
    """With n <= D the covariance is singular and the reader must be told."""
    with pytest.warns(UserWarning, match="take more samples"):
        moments_distance(Moments.of(features(5, 6)), Moments.of(features(50, 6)))


def test_mismatched_shapes_are_refused():
    """Features of two extractors must not be compared silently."""
    with pytest.raises(ValueError, match="do not belong together"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="length 3"):
        Moments.empty(3).merge(Moments.empty(4))


def test_covariance_of_one_vector_is_refused():
    """n - 1 = 0 would give nan."""
    with pytest.raises(ValueError, match="at least 2"):
        _ = Moments.of(features(1, 3)).cov


def gaussians(n: int, d: int) -> tuple[Moments, Moments]:
    """Two correlated sets with means that differ."""
    return Moments.of(features(n, d, seed=1, offset=0.0)), Moments.of(features(n, d, seed=2, offset=0.5))


@pytest.mark.parametrize("d", [3, 40])
def test_trace_of_the_root_is_that_of_the_unsymmetric_product(d):
    """tr (S1 S2)^(1/2) by the eigenvalues of S1 S2 itself, the formula of torch-fidelity; needs no package."""
    one, two = gaussians(500, d)
    roots = torch.linalg.eigvals(one.cov @ two.cov).sqrt().real.sum()
    expected = (one.mean - two.mean).square().sum() + one.cov.trace() + two.cov.trace() - 2 * roots
    assert moments_distance(one, two) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("d", [3, 40])
def test_clean_fid_agrees(d):
    """Its matrix square root, at full rank.

    clean-fid passes `disp` to scipy's sqrtm, which scipy 1.18 no longer takes; `make oracles` takes an older one.
    """
    fid = pytest.importorskip("cleanfid.fid", reason="clean-fid is not installed: make oracles")
    scipy = pytest.importorskip("scipy")
    if tuple(int(part) for part in scipy.__version__.split(".")[:2]) >= (1, 18):
        pytest.skip("clean-fid calls sqrtm(disp=False), which scipy >= 1.18 refuses")
    one, two = gaussians(500, d)
    theirs = fid.frechet_distance(one.mean.numpy(), one.cov.numpy(), two.mean.numpy(), two.cov.numpy())
    assert moments_distance(one, two) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("d", [3, 40])
def test_torch_fidelity_agrees(d):
    """Eigenvalues of the product S1 S2, which is not symmetric: a third way to the same number."""
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed: make oracles")
    one, two = gaussians(500, d)
    stats = [{"mu": m.mean.numpy(), "sigma": m.cov.numpy()} for m in (one, two)]
    theirs = fid.fid_statistics_to_metric(*stats, verbose=False)[fid.KEY_METRIC_FID]
    assert moments_distance(one, two) == pytest.approx(theirs, rel=1e-6)
