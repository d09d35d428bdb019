"""Claims about the nearest-neighbour figures; loops over exact distances as oracles."""

import pytest
import torch
from torch.testing import assert_close

from fewstep.metrics import manifold as module
from fewstep.metrics.manifold import Manifold, manifold, nearest_distances, neighbour_radii


def features(n: int, d: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|x_i - y_j| by subtraction, without a matrix product."""
    return (x.double()[:, None] - y.double()[None]).square().sum(2).sqrt()


def oracle(fake: torch.Tensor, real: torch.Tensor, k: int, k_density: int) -> Manifold:
    """The formulas of the `prdc` package (authors of density and coverage), open balls and all."""

    def radius(x, nearest):
        return distances(x, x).kthvalue(nearest + 1, dim=1).values  # the nearest is the vector itself

    cross = distances(real, fake)
    dense = cross < radius(real, k_density)[:, None]
    return Manifold(
        precision=float((cross < radius(real, k)[:, None]).any(0).double().mean()),
        recall=float((cross < radius(fake, k)[None]).any(1).double().mean()),
        density=float(dense.sum(0).double().mean()) / k_density,
        coverage=float((cross.min(1).values < radius(real, k_density)).double().mean()),
        nearest=float(cross.min(0).values.mean()),
    )


@pytest.mark.parametrize("block", [500, 7])
@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_figures_are_those_of_the_formulas_in_any_block_size(block, shift, monkeypatch):
    """Random features have no ties, so open and closed balls agree. Mutations: fakes and reals, or k, exchanged."""
    monkeypatch.setattr(module, "BLOCK", block)
    fake, real = features(31, 4, 0, shift), features(45, 4, 1)
    assert_close(torch.tensor(manifold(fake, real)), torch.tensor(oracle(fake, real, 3, 5)), rtol=1e-6, atol=0)
    found = manifold(fake, real, k=4, k_density=2)
    assert_close(torch.tensor(found), torch.tensor(oracle(fake, real, 4, 2)), rtol=1e-6, atol=0)
    assert 0 < found.precision < 1 and 0 < found.recall < 1 and 0 < found.coverage < 1  # nothing saturated


def test_a_hand_made_line():
    """Reals 0, 1, 2, 10 with k = 1: radii 1, 1, 1, 8. Fakes 0.5, 2.5, 20, 21: radii 2, 2, 1, 1."""
    real, fake = torch.tensor([[0.0], [1], [2], [10]]), torch.tensor([[0.5], [2.5], [20], [21]])
    found = manifold(fake, real, k=1, k_density=1)
    # 0.5 lies in the balls of 0 and 1; 2.5 in those of 2 and of 10 (|2.5 - 10| = 7.5); 20 and 21 in none.
    assert found.precision == 0.5 and found.density == 1.0 and found.coverage == 1.0
    # 0 and 1 and 2 lie in the ball of 0.5 or 2.5; 10 in none.
    assert found.recall == 0.75
    assert found.nearest == pytest.approx((0.5 + 0.5 + 10 + 11) / 4, rel=1e-12)


def test_a_fake_on_the_edge_of_a_ball_is_inside():
    """Closed balls, as in arXiv:1904.06991; 4 lies exactly at the radius of the real at 2."""
    real, fake = torch.tensor([[0.0], [2]]), torch.tensor([[4.0], [40]])
    assert manifold(fake, real, k=1, k_density=1).precision == 0.5


def test_radii_are_sorted_distances_to_the_others():
    """Against exact distances, at k up to N - 1; a copy is a neighbour at distance 0."""
    data = features(9, 3, 0)
    assert_close(neighbour_radii(data, 8), distances(data, data).sort(1).values[:, 1:], rtol=1e-9, atol=1e-9)
    assert float(neighbour_radii(torch.cat([data, data[:1]]), 1)[0]) < 1e-7


def test_far_from_the_origin_nothing_is_lost():
    """|x|^2 + |y|^2 - 2 x.y at an offset of 10^6 would keep 4 of 16 digits, were the features not centred."""
    real = features(45, 4, 1)
    assert_close(neighbour_radii(real + 1e6, 5), neighbour_radii(real, 5), rtol=1e-8, atol=0)


def test_known_radii_are_used_and_their_shape_is_checked():
    """The suite works them out once; radii of another set are refused."""
    fake, real = features(31, 4, 0), features(45, 4, 1)
    assert manifold(fake, real, radii=neighbour_radii(real, 5)) == manifold(fake, real)
    with pytest.raises(ValueError, match="radii must be"):
        manifold(fake, real, radii=neighbour_radii(real, 4))


def test_copies_are_found_out():
    """Samples copied from the reals have distance 0 to them, exactly, where fresh ones have not."""
    real, fresh = features(60, 6, 0, 3.0), features(40, 6, 1, 3.0)
    assert float(nearest_distances(real[7:30].float(), real.float()).max()) == 0
    assert_close(nearest_distances(fresh, real), distances(fresh, real).min(1).values, rtol=1e-12, atol=0)
    copies = manifold(real[7:30], real)
    assert copies.nearest == 0 and copies.precision == 1
    assert manifold(fresh, real).nearest == pytest.approx(float(nearest_distances(fresh, real).mean()), rel=1e-12)


def test_a_lost_mode_costs_recall_and_coverage_but_not_precision():
    """Samples of one of two far clusters: every one is good, half of the reals are missed."""
    real = torch.cat([features(40, 3, 0), features(40, 3, 1, 50.0)])
    found = manifold(features(80, 3, 2), real)
    assert found.precision > 0.9 and found.recall <= 0.5 and found.coverage <= 0.5


def test_equal_distributions_have_density_one():
    """E[density] = 1 for fakes drawn like the reals (arXiv:2002.09797): within 0.05 at n = 1000."""
    assert manifold(features(1000, 5, 0), features(1000, 5, 1)).density == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "fake, real, message",
    [((5, 3), (9, 4), r"\(5, 3\) and \(9, 4\)"), ((3, 4), (9, 4), "k 3"), ((9, 4), (5, 4), "k 5")],
)
def test_what_has_too_few_neighbours_is_refused(fake, real, message):
    with pytest.raises(ValueError, match=message):
        manifold(torch.zeros(fake), torch.zeros(real))
