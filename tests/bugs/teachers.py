"""Bugs of how networks of pipelines are called."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

DIT, TESTS = "fewstep/teachers/dit.py", "tests/unit/teachers/test_dit.py"

MUTANTS = (
    Mutant(
        "dit-drops-labels",
        "dit",
        "a student in training is shown no class in a tenth of its calls",
        DIT,
        "                part.dropout_prob = 0.0\n",
        "                pass\n",
        (f"{TESTS}::test_no_class_is_taken_away_in_training",),
    ),
    Mutant(
        "dit-variance",
        "dit",
        "the prediction of the variance is taken for that of the noise",
        DIT,
        "[:, : x.shape[1]]",
        "[:, -x.shape[1] :]",
        (f"{TESTS}::test_teacher_samples_what_its_pipeline_samples",),
    ),
)
