"""Claims about the kernel distance; float64, double loops and published packages as oracles."""

import math
from itertools import combinations

import pytest
import torch

from fewstep.metrics import kernel
from fewstep.metrics.kernel import gaussian_distance, kernel_distance, subset_kernel_distance


def features(n: int, d: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    """n random vectors; sizes of the two sets and of the vectors always differ here."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def naive(x: torch.Tensor, y: torch.Tensor) -> float:
    """The definition, pair by pair."""

    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b)) / len(a) + 1) ** 3

    own = [
        sum(k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    return own[0] + own[1] - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("block", [1000, 3])
def test_distance_is_the_sum_over_pairs_in_any_block_size(block, monkeypatch):
    """Mutations: diagonal not left out, mixed blocks counted once, D of the wrong set."""
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = features(7, 4, 0, 0.5), features(5, 4, 1)
    assert kernel_distance(x, y) == pytest.approx(naive(x, y), rel=1e-12)


def test_estimate_is_unbiased():
    """A U-statistic equals the mean of itself over all subsets, exactly; an estimate with the diagonal does not."""
    x, y = features(5, 3, 0, 0.3), features(4, 3, 1)
    pairs = [(list(i), list(j)) for i in combinations(range(5), 2) for j in combinations(range(4), 2)]
    mean = sum(kernel_distance(x[i], y[j]) for i, j in pairs) / len(pairs)
    assert kernel_distance(x, y) == pytest.approx(mean, rel=1e-12)


def test_equal_distributions_scatter_around_zero():
    """The mean over disjoint sets lies within 3 standard errors of 0, and values of both signs occur."""
    values = torch.tensor([kernel_distance(features(40, 6, 2 * s), features(50, 6, 2 * s + 1)) for s in range(40)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 40**0.5
    assert float(values.min()) < 0 < float(values.max())


def test_full_subset_has_no_spread_and_random_subsets_scatter_around_the_full_value():
    """Subsets of everything are everything; the mean of 200 smaller ones is within 4 standard errors of the whole."""
    x, y = features(60, 5, 0, 0.4), features(60, 5, 1)
    whole = kernel_distance(x, y)
    all_of_it = subset_kernel_distance(x, y, torch.Generator().manual_seed(0), subset_size=60, num_subsets=3)
    assert all_of_it.mean == pytest.approx(whole, rel=1e-12) and all_of_it.std < 1e-12
    parts = subset_kernel_distance(x, y, torch.Generator().manual_seed(0), subset_size=20, num_subsets=200)
    assert abs(parts.mean - whole) < 4 * parts.std / 200**0.5


def test_subsets_belong_to_the_generator():
    """Same seed, same figure; another seed, another one."""
    x, y = features(30, 5, 0), features(40, 5, 1)
    first, again, other = (
        subset_kernel_distance(x, y, torch.Generator().manual_seed(seed), subset_size=10, num_subsets=4)
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        (((3, 4), (5, 6)), {}, r"\(3, 4\) and \(5, 6\)"),
        (((1, 4), (5, 4)), {}, "at least 2"),
        (((9, 4), (5, 4)), {"subset_size": 6}, r"2\.\.5"),
        (((9, 4), (5, 4)), {"subset_size": 5, "num_subsets": 1}, "at least 2 to have a spread"),
    ],
)
def test_what_cannot_be_measured_is_refused(shapes, options, message):
    """Nothing shrinks in silence."""
    x, y = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        subset_kernel_distance(x, y, torch.Generator(), **options)


@pytest.mark.parametrize("block", [1000, 3])
def test_gaussian_distance_is_the_mean_over_all_pairs(block, monkeypatch):
    """Pair by pair, i = j included. Mutations: the diagonal left out, 2 sigma^2 without its square, no factor 1000."""
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = (torch.nn.functional.normalize(features(n, 4, n, 0.3), dim=1) for n in (7, 5))

    def mean(a, b):
        return torch.stack([torch.exp(-(p - q).square().sum() / 200) for p in a for q in b]).mean()

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert gaussian_distance(x, y) == pytest.approx(float(expected), rel=1e-9)
    assert gaussian_distance(x, x) == pytest.approx(0, abs=1e-12)


def test_gaussian_distance_of_two_gaussians_is_the_closed_form():
    """E k of N(m, s^2 I) pairs is (1 + 2 s^2 / w^2)^(-D/2) exp(-|m|^2 / (2 (w^2 + 2 s^2))): within 3% at n = 4000."""
    d, s, w = 3, 0.5, 2.0
    x, y = features(4000, d, 0) * s, features(4000, d, 1) * s + 1.0
    own = (1 + 2 * s**2 / w**2) ** (-d / 2)
    expected = 2 * own * (1 - math.exp(-d / (2 * (w**2 + 2 * s**2))))
    assert gaussian_distance(x, y, sigma=w, scale=1) == pytest.approx(expected, rel=0.03)


def test_clean_fid_agrees():
    """Its subsets of everything, at equal sizes, leave nothing to chance."""
    fid = pytest.importorskip("cleanfid.fid", reason="clean-fid is not installed: make oracles")
    x, y = features(50, 8, 0, 0.4), features(50, 8, 1)
    theirs = fid.kernel_distance(x.numpy(), y.numpy(), num_subsets=2, max_subset_size=50)
    assert kernel_distance(x, y) == pytest.approx(theirs, rel=1e-9)


def test_torch_fidelity_agrees():
    """The same by a second implementation."""
    metric = pytest.importorskip("torch_fidelity.metric_kid", reason="torch-fidelity is not installed: make oracles")
    x, y = features(50, 8, 0, 0.4), features(50, 8, 1)
    found = metric.kid_features_to_metric(x, y, kid_subsets=2, kid_subset_size=50, verbose=False)
    assert kernel_distance(x, y) == pytest.approx(found[metric.KEY_METRIC_KID_MEAN], rel=1e-9)
