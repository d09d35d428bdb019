"""Bugs of what looks at pictures: LPIPS, CLIP and the filter of black ones; and of a stage's own learning rate."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

LOOKERS, CLIP = "fewstep/models/perception.py", "fewstep/metrics/clip_score.py"
TESTS, SWIFTBRUSH = "tests/unit/models/test_perception.py", "tests/unit/objectives/test_swiftbrush.py"
TBCM, STAGES = "tests/unit/objectives/test_tbcm.py", "tests/unit/training/test_stages.py"

MUTANTS = (
    Mutant(
        "lpips-over-channels",
        "perception",
        "squares are averaged over channels, not added up",
        LOOKERS,
        ".square().sum(1).flatten(1).mean(1)",
        ".square().mean(1).flatten(1).mean(1)",
        (f"{TESTS}::test_the_distance_by_hand",),
    ),
    Mutant(
        "lpips-over-the-batch",
        "perception",
        "one distance for the whole batch",
        LOOKERS,
        ".square().sum(1).flatten(1).mean(1)",
        ".square().sum(1).mean().expand(len(x))",
        (f"{TESTS}::test_each_two_pictures_have_a_distance_of_their_own",),
    ),
    Mutant(
        "lpips-follows-its-target",
        "perception",
        "the gradient reaches the teacher's sample, too",
        LOOKERS,
        "        with torch.no_grad():\n            target = self.render(y)",
        "        target = self.render(y)",
        (f"{TESTS}::test_the_gradient_goes_through_the_decoder_to_the_first_alone",),
    ),
    Mutant(
        "decoder-without-gradient",
        "perception",
        "pictures are decoded without a graph, so that no loss of theirs trains anything",
        "fewstep/teachers/codecs.py",
        "    def render(self, x: Tensor)",
        "    @torch.no_grad()\n    def render(self, x: Tensor)",
        ("tests/unit/teachers/test_codecs.py::test_pictures_are_rendered_with_a_gradient_and_not_clamped",),
    ),
    Mutant(
        "clip-of-other-pixels",
        "perception",
        "CLIP sees pictures in [-1, 1] where it was trained on [0, 1], normalised",
        CLIP,
        "((pixels + 1) / 2 - mean) / std",
        "(pixels - mean) / std",
        ("tests/unit/metrics/test_clip_score.py::test_it_sees_with_a_gradient_what_it_scores",),
    ),
    Mutant(
        "clip-sign",
        "perception",
        "pictures are pushed away from their prompts",
        "fewstep/objectives/swiftbrush.py",
        "(self.clip_margin - cosines).clamp_min(0)",
        "(cosines - self.clip_margin).clamp_min(0)",
        (f"{SWIFTBRUSH}::test_the_clip_loss_pulls_pictures_to_their_prompts_until_they_fit",),
    ),
    Mutant(
        "clip-unclamped",
        "perception",
        "the CLIP loss never lets go",
        "fewstep/objectives/swiftbrush.py",
        "(self.clip_margin - cosines).clamp_min(0)",
        "(self.clip_margin - cosines)",
        (f"{SWIFTBRUSH}::test_the_clip_loss_pulls_pictures_to_their_prompts_until_they_fit",),
    ),
    Mutant(
        "black-of-the-last-state",
        "perception",
        "the filter looks at a state that still holds noise",
        "fewstep/objectives/tbcm.py",
        "self.passed(c.alpha * x - c.sigma * velocities[-1], ",
        "self.passed(states[-1], ",
        (f"{TBCM}::test_the_filter_judges_where_the_trajectory_ends",),
    ),
    Mutant(
        "black-kept",
        "perception",
        "the filter keeps what is black",
        "fewstep/objectives/tbcm.py",
        'rng.rand("tbcm.black") < distance',
        'rng.rand("tbcm.black") >= distance',
        (f"{TBCM}::test_black_trajectories_are_left_out_by_how_black_they_are",),
    ),
    Mutant(
        "black-counts",
        "perception",
        "what the filter found is not used",
        "fewstep/objectives/consistency.py",
        "return rows.mean() if keep is None else (keep * rows).mean()",
        "return rows.mean()",
        (f"{TBCM}::test_states_that_do_not_count_have_no_gradient",),
    ),
    Mutant(
        "stage-rate-lost",
        "stages",
        "a stage's own learning rate is forgotten",
        "fewstep/training/trainer.py",
        " * self.stages.rate(self.progress.stage)",
        "",
        (f"{STAGES}::test_a_stage_has_learning_rates_of_its_own",),
    ),
)
