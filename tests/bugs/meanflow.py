"""Bugs of MeanFlow."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

OBJECTIVE = "fewstep/objectives/meanflow.py"
TESTS = "tests/unit/objectives/test_meanflow.py"
EXACT, HAND = f"{TESTS}::test_the_exact_average_has_no_loss", f"{TESTS}::test_the_loss_by_hand"

MUTANTS = (
    Mutant(
        "meanflow-sign",
        "meanflow",
        "the target is v + (t - r) du/dt",
        OBJECTIVE,
        "(v - like(t - r, z) * du)",
        "(v + like(t - r, z) * du)",
        (EXACT, HAND),
    ),
    Mutant(
        "meanflow-still-time",
        "meanflow",
        "the derivative is taken along (v, 0, 0)",
        OBJECTIVE,
        "(v, torch.ones_like(t)),\n            mode=",
        "(v, torch.zeros_like(t)),\n            mode=",
        (EXACT, HAND),
    ),
    Mutant(
        "meanflow-weight-with-gradient",
        "meanflow",
        "the weight is differentiated",
        OBJECTIVE,
        "(error.detach() + self.constant)",
        "(error + self.constant)",
        (HAND,),
    ),
    Mutant(
        "meanflow-flow-times",
        "meanflow",
        "the network is told rectified flow's r instead of its own",
        OBJECTIVE,
        "until=match(r, FLOW, generator.schedule)[0]",
        "until=r",
        (
            f"{TESTS}::test_a_network_is_told_its_own_times_and_the_cleanest_of_them_means_data",
            f"{TESTS}::test_the_few_step_sampler_jumps_along_the_average_velocity",
        ),
    ),
    Mutant(
        "meanflow-two-meanings-of-clean",
        "meanflow",
        "times below the cleanest level keep their values, which the network cannot tell apart",
        OBJECTIVE,
        "r = torch.where(r > low, r, 0.0)",
        "r = r + 0",
        (f"{TESTS}::test_a_network_is_told_its_own_times_and_the_cleanest_of_them_means_data",),
    ),
    Mutant(
        "meanflow-few-instants",
        "meanflow",
        "r = t in a quarter of the samples instead of three",
        OBJECTIVE,
        "< self.instant, t, r)",
        "< self.instant, r, t)",
        (f"{TESTS}::test_times_are_ordered_and_three_quarters_are_instants",),
    ),
    Mutant(
        "meanflow-unguided",
        "meanflow",
        "the teacher's velocity is not guided",
        OBJECTIVE,
        "on_schedule(guided(trio.real_score, self.guidance), trio",
        "on_schedule(trio.real_score, trio",
        (f"{TESTS}::test_guidance_is_the_teachers_and_its_velocity_is_the_path_of_the_derivative",),
    ),
    Mutant(
        "meanflow-stochastic",
        "meanflow",
        "the student's steps draw fresh noise",
        OBJECTIVE,
        "StudentSampler(self.num_steps, stochastic=False,",
        "StudentSampler(self.num_steps, stochastic=True,",
        (f"{TESTS}::test_the_few_step_sampler_jumps_along_the_average_velocity",),
    ),
)
