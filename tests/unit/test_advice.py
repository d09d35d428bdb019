"""Sentences on a run's figures: each is said where it should be, and not where nothing is wrong."""

import pytest

from fewstep.advice import CHANCE, advice

TRAIN = {"evaluate_every": 100, "generator": {"clip": 10.0}, "critic": {"clip": 10.0}}


def rows(n=100, **series):
    """n rows; a series is a number or a function of the row's place in 0..1."""
    made = []
    for i in range(1, n + 1):
        place = i / n
        made.append({"iteration": 10 * i} | {k: v(place) if callable(v) else v for k, v in series.items()})
    return made


def measured(*values):
    return [{"iteration": 100 * (i + 1), "eval/fmd@1000": value} for i, value in enumerate(values)]


def test_a_good_run_is_left_alone():
    good = {
        "dm/gap_rms": lambda p: 1 - p / 2,
        "x/std": 1.0,
        "gan/critic": 1.3,
        "grad/dm": lambda p: 0.98 if p < 0.99 else 0.999,
        "grad/gan": lambda p: 0.02 if p < 0.99 else 0.001,
        "generator/grad_norm": 0.5,
        "skipped": 1,
    }
    assert advice(rows(**good) + measured(3, 2, 2.1, 1.9, 1.95, 1.9), TRAIN) == {}
    assert advice([], TRAIN) == {}


@pytest.mark.parametrize(
    ("rule", "found", "words"),
    [
        ("skipped", rows(skipped=50), "50 updates were skipped"),
        ("rising", measured(3, 1, 2, 3, 4), "below its best, 1 at iteration 200, in the 3 evaluations since (now 4)"),
        ("unmeasured", rows(dm=1.0), "brings no metric"),
        ("drift", rows(**{"x/std": lambda p: 1 + (p > 0.8)}) + measured(1, 2), "more contrast"),
        ("drift", rows(**{"x/std": lambda p: 1 - (p > 0.8) / 2}) + measured(1, 2), "less contrast"),
        ("derivative", rows(**{"meanflow/du_rms": lambda p: 6 + 50 * (p > 0.5)}), "has grown from 6 to 56"),
        ("lag", rows(**{"dm/gap_rms": lambda p: 0.1 + p}), "lags behind the student"),
        ("lag", rows(**{"sid/gap_rms": lambda p: 0.1 + p}), "lags behind the student"),
        ("discriminator", rows(**{"gan/critic": 0.05}), "nearly always"),
        ("discriminator", rows(**{"gan/critic": CHANCE}), "told nothing apart"),
        ("drowned", rows(**{"grad/dm": 0.996, "grad/gan": 0.004}), "raise method.gan_weight, or leave the term out"),
        ("drowned", rows(**{"grad/dm": 0.004, "grad/gan": 0.996}), "dm gives 0.40% of the gradient"),
        ("drowned", rows(**{"grad/dm": 0.004, "grad/gan": 0.996}), "lower method.gan_weight"),
        ("drowned", rows(**{"grad/dm": 1, "grad/regression": 1e-4}), "raise method.regression_weight"),
        ("drowned", rows(**{"grad/vsd": 1e-4, "grad/clip": 1}), "lower method.clip_weight"),
        ("drowned", rows(**{"grad/dm": 0.005, "grad/ca": 0.695, "grad/gan": 0.3}), "lower method.guidance"),
        ("clip", rows(**{"critic/grad_norm": 400.0}), "Every late gradient of the critic is clipped"),
    ],
)
def test_each_rule_speaks(rule, found, words):
    assert words in advice(found, TRAIN)[rule]


def test_an_evaluation_that_is_still_to_come_is_no_lack():
    assert "unmeasured" not in advice(rows(5, dm=1.0), TRAIN)


def test_a_term_is_drowned_in_every_late_reading_or_not_at_all():
    """And one that gives exactly nothing, as a hinge that is satisfied, is no case for a larger weight.

    Fails if the last reading alone decides, or the term's mean.
    """
    once = rows(**{"grad/dm": 0.99, "grad/gan": lambda p: 0.011 if p == 0.95 else 0.001})
    satisfied = rows(**{"grad/vsd": 1.0, "grad/clip": 0.0})
    few = rows(19, **{"grad/dm": 0.999, "grad/gan": 0.001})
    assert not any("drowned" in advice(found, TRAIN) for found in (once, satisfied, few))
