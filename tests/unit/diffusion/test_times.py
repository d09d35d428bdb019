import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fewstep.diffusion import (
    EDM,
    Clamped,
    DiscreteUniform,
    Interval,
    LogitNormal,
    LogNormalSigma,
    RectifiedFlow,
    Shifted,
    Uniform,
    shift_time,
)
from fewstep.rng import Rng

LARGEST = 1 - 2**-24  # the largest float32 below 1: what `rand` may return


class Fixed(Rng):
    """An Rng that answers with the numbers that a test wants to see handled."""

    def __init__(self, *values: float) -> None:
        super().__init__(0, 0, "generator", range(len(values)))
        self.values = torch.tensor(values)

    def rand(self, stream: str) -> Tensor:
        return self.values

    def randn(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        return self.values


LAWS = [
    Uniform(0.02, 0.98),
    DiscreteUniform(),
    LogitNormal(0.5, 0.7),
    LogNormalSigma(EDM()),
    Interval(LogitNormal(), 0.3, 0.9),
    Shifted(Uniform(), 5.0),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_every_law_draws_one_float32_time_per_sample(law):
    t = law.sample(Rng(0, 0, "generator", range(100)), "t", "cpu")
    assert (t.shape, t.dtype) == ((100,), torch.float32)
    assert 0 <= t.min() < t.max() <= 1


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_a_samples_time_does_not_depend_on_its_batch(law):
    """Sample 7 gets the same t alone as among ten. Fails if a law draws [B] from one generator."""
    among = law.sample(Rng(3, 4, "critic", range(10)), "t")
    assert torch.equal(law.sample(Rng(3, 4, "critic", [7]), "t"), among[7:8])


def test_uniform_includes_its_noisy_end_and_not_its_clean_end():
    """Losses divide by sigma. Fails as low + (high - low) u, which returns t = 0 for u = 0."""
    t = Uniform().sample(Fixed(0.0, LARGEST), "t")
    assert t[0] == 1
    assert t[1] > 0


def test_discrete_uniform_reaches_both_ends_and_no_further():
    """T8: 20..980 inclusive. Fails with high - low values (randint(20, 980)), or with round for floor (index 981)."""
    t = DiscreteUniform(20, 980).sample(Fixed(0.0, LARGEST), "t")
    assert (t * 999).tolist() == [20, 980]


def test_discrete_uniform_gives_each_index_its_share():
    """Four indices in 4000 draws: 1000 each, within 5 standard deviations (27)."""
    index = DiscreteUniform(2, 5, count=11).sample(Rng(0, 0, "critic", range(4000)), "t") * 10
    counts = torch.bincount(index.round().long(), minlength=11)
    assert counts[:2].sum() == counts[6:].sum() == 0
    assert (counts[2:6] - 1000).abs().max() < 5 * 27.4


def test_logit_normal_is_a_sigmoid_of_a_normal():
    t = LogitNormal(mean=0.5, std=2.0).sample(Fixed(-1.0, 0.0, 1.0), "t")
    assert_close(t, torch.sigmoid(torch.tensor([-1.5, 0.5, 2.5])))


def test_log_normal_sigma_places_the_noise_level():
    """log(sigma / alpha) = mean + std n on any schedule. Fails with log sigma^2, or without the sign of log-SNR."""
    for schedule in (EDM(), RectifiedFlow()):
        t = LogNormalSigma(schedule, mean=-1.2, std=1.2).sample(Fixed(-1.0, 0.0, 2.0), "t")
        c = schedule.at(t)
        assert_close((c.sigma / c.alpha).log(), torch.tensor([-2.4, -1.2, 1.2]), atol=1e-5, rtol=0)


def test_interval_squeezes_a_law():
    t = Interval(LogitNormal(), 0.2, 0.6).sample(Fixed(0.0), "t")
    assert_close(t, torch.tensor([0.4]))


def test_interval_never_falls_below_its_low_end():
    """renoise refuses t < s, and 1/3, 5/6 are no float32 numbers: rounded times must still not precede rounded s."""
    for low in (1 / 3, 5 / 6):
        t = Interval(Uniform(), low).sample(Fixed(LARGEST, LARGEST, 0.0), "t")
        RectifiedFlow().renoise(torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor([low] * 3), t)
        assert t[2] == 1


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(5.0, [1, 0.9375, 0.8333333, 0.625]), (3.0, [1, 0.9, 0.75, 0.5]), (1.0, [1, 0.75, 0.5, 0.25])],
)
def test_shift_has_the_published_values(shift, expected):
    """Section 0.1. Fails with the shift inverted (k -> 1 / k)."""
    assert_close(shift_time(torch.tensor([1, 0.75, 0.5, 0.25]), shift), torch.tensor(expected, dtype=torch.float32))


def test_shift_multiplies_the_noise_to_signal_ratio():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    gain = RectifiedFlow().at(t).log_snr - RectifiedFlow().at(shift_time(t, 3.0)).log_snr
    assert_close(gain, torch.full((3,), 2 * math.log(3), dtype=torch.float64))


def test_shifted_moves_every_draw():
    t = Shifted(Uniform(), 3.0).sample(Fixed(0.0, 0.25, 0.5), "t")
    assert_close(t, torch.tensor([1, 0.9, 0.75]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0.5, 0.5), "low=0.5, high=0.5"),
        (lambda: Uniform(20, 980), "divide an index by 999"),
        (lambda: Interval(Uniform(), -0.1, 0.5), "low=-0.1"),
        (lambda: DiscreteUniform(0, 1000), "high_index < count"),
        (lambda: DiscreteUniform(30, 20), "low_index <= high_index"),
        (lambda: LogitNormal(0.0, 0.0), "std must be positive"),
        (lambda: LogNormalSigma(EDM(), std=-1.0), "std must be positive"),
        (lambda: Shifted(Uniform(), 0.0), "shift must be positive"),
        (lambda: shift_time(torch.ones(1), float("inf")), "shift must be positive"),
    ],
)
def test_impossible_laws_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_clamped_moves_what_lies_outside_to_the_ends():
    """DMD2 on flows bounds t after the shift.  Fails if the clamp comes before it: 0.98 becomes 0.996."""
    law = Clamped(Shifted(DiscreteUniform(20, 980), 5.0), 20 / 999, 980 / 999)
    t = law.sample(Rng(0, 0, "generator", range(4000)), "t")
    assert t.max().item() == pytest.approx(980 / 999) and t.min().item() > 20 / 999
    assert (t == t.max()).sum() > 100
