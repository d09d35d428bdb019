"""Micro-batches are invisible to the optimiser."""

from pathlib import Path

import pytest

from tests.invariants.gradients import gradients, relative_error


@pytest.mark.parametrize("num_steps", [1, 4])
def test_four_micro_batches_of_two_give_the_gradient_of_one_batch_of_eight(num_steps: int, tmp_path: Path):
    """Both turns, every parameter.  float64 sums of 8 terms in another order differ by about 1e-15.

    Fails without the division by `accumulate` (error 3), with noise keyed by the position in the micro-batch instead
    of the global sample index, and for 4 steps with a step index keyed by the samples.
    """
    split, split_steps = gradients(tmp_path, num_steps, accumulate=4)
    whole, whole_steps = gradients(tmp_path, num_steps)
    assert relative_error(split, whole) < 1e-10
    assert split_steps == [step for step in whole_steps for _ in range(4)]
    assert len(set(whole_steps)) > 1 or num_steps == 1  # several steps were met, or the index would prove nothing
