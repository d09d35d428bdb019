"""Bugs of how networks of pipelines are called."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

DIT, TESTS = "fewstep/teachers/dit.py", "tests/unit/teachers/test_dit.py"
Z_IMAGE, Z_TESTS = "fewstep/teachers/z_image.py", "tests/unit/teachers/test_z_image.py"
WAN, WAN_TESTS = "fewstep/teachers/wan.py", "tests/unit/teachers/test_wan.py"
TWO = "test_teacher_of_two_networks_samples_what_its_pipeline_samples"
SAMPLES = "test_teacher_samples_what_its_pipeline_samples"

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
        (f"{TESTS}::{SAMPLES}",),
    ),
    Mutant(
        "z-image-time",
        "z-image",
        "the network is told our time, at which 0 is data",
        Z_IMAGE,
        "        return 1 - t.float()\n",
        "        return t.float()\n",
        tuple(f"{Z_TESTS}::{test}" for test in ("test_time_and_flow_run_as_everywhere", SAMPLES)),
    ),
    Mutant(
        "z-image-sign",
        "z-image",
        "its output, x0 - eps, is taken for the flow",
        Z_IMAGE,
        "        return -torch.stack(made)",
        "        return torch.stack(made)",
        tuple(f"{Z_TESTS}::{test}" for test in ("test_time_and_flow_run_as_everywhere", SAMPLES)),
    ),
    Mutant(
        "z-image-padding",
        "z-image",
        "a prompt is given the zeros that fill it up to the longest",
        Z_IMAGE,
        "row[:length]",
        "row",
        (f"{Z_TESTS}::test_padding_between_prompts_is_not_seen", f"{Z_TESTS}::{SAMPLES}"),
    ),
    Mutant(
        "wan-boundary",
        "wan",
        "the boundary itself is the second network's",
        WAN,
        "[float(bound)]",
        "[pipe.config.boundary_ratio]",
        (f"{WAN_TESTS}::test_boundary_is_the_first_networks",),
    ),
    Mutant(
        "wan-experts",
        "wan",
        "the networks are exchanged",
        WAN,
        "return Experts(denoisers, ",
        "return Experts(denoisers[::-1], ",
        tuple(f"{WAN_TESTS}::{test}" for test in ("test_boundary_is_the_first_networks", TWO)),
    ),
)
