"""Claims about means: their errors are those over draws of prompts, and fixed parts add none."""

import math
import statistics

import pytest

from fewstep.metrics.means import NORMAL_95, Mean, mean_by_prompt, over_parts


def test_with_equal_counts_the_error_is_that_of_the_prompts_means():
    """Mutation: pictures of one prompt taken for independent: two copies of all would make the error smaller."""
    scores, prompts = [1.0, 2.0, 4.0, 6.0, 9.0, 5.0], ["a", "a", "b", "b", "c", "c"]
    expected = statistics.stdev([1.5, 5.0, 7.0]) / math.sqrt(3)
    assert mean_by_prompt(scores, prompts) == Mean(pytest.approx(4.5), pytest.approx(expected))
    assert mean_by_prompt(scores * 2, prompts * 2).error == pytest.approx(expected)


def test_with_other_counts_every_picture_counts_the_same():
    found = mean_by_prompt([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"])
    assert found.value == 2.0
    assert found.error == pytest.approx(math.sqrt(2 * (3**2 + 3**2)) / 4)  # the prompts' sums of what exceeds 2: -3, 3


def test_one_prompt_has_no_error():
    assert mean_by_prompt([1.0, 2.0], ["a", "a"]) == Mean(1.5, None) and Mean(1.5, None).interval is None


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """Normal scores, 200 prompts of 3 that share most of their noise: 95% of 2,000 draws, give or take 1.5."""
    import numpy

    draws = numpy.random.default_rng(0)
    prompts = [str(i // 3) for i in range(600)]
    covered = 0
    for _ in range(2000):
        scores = draws.standard_normal(200).repeat(3) + 0.3 * draws.standard_normal(600)
        low, high = mean_by_prompt(scores.tolist(), prompts).interval or (1, -1)
        covered += low < 0 < high
    assert 0.935 < covered / 2000 < 0.965


def test_fixed_parts_add_no_error_of_their_own():
    """Mutation: the deviation between the styles counted as error."""
    found = over_parts([Mean(1.0, 0.3), Mean(9.0, 0.4)], [1, 1])
    assert found == Mean(5.0, pytest.approx(0.25))
    assert over_parts([Mean(1.0, 0.3), Mean(9.0, 0.4)], [300, 100]).value == pytest.approx(3.0)
    assert over_parts([Mean(1.0, 0.3), Mean(9.0, None)], [1, 1]).error is None
    low, high = found.interval or (0, 0)
    assert (low, high) == pytest.approx((5 - NORMAL_95 / 4, 5 + NORMAL_95 / 4))
