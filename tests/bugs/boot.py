"""Bugs of BOOT."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

OBJECTIVE = "fewstep/objectives/boot.py"
TESTS = "tests/unit/objectives/test_boot.py"
READS = f"{TESTS}::test_the_student_reads_noise_and_a_time_and_the_teacher_the_state_of_the_same_noise"

MUTANTS = (
    Mutant(
        "boot-first-order",
        "boot",
        "the teacher's share of a step is its first order, which exceeds 1 near data",
        OBJECTIVE,
        "1.0, -torch.expm1(rate))",
        "1.0, -rate)",
        (f"{TESTS}::test_steps_on_a_cosine_schedule_have_the_known_errors",),
    ),
    Mutant(
        "boot-other-noise",
        "boot",
        "the teacher sees the student's signal under noise of its own",
        OBJECTIVE,
        "x0 = denoise(schedule.add_noise(y_t, e, t), t)",
        "x0 = denoise(schedule.add_noise(y_t, torch.randn_like(e), t), t)",
        (READS, f"{TESTS}::test_a_linear_student_converges_to_the_solvers_recursion_and_not_to_the_ode"),
    ),
    Mutant(
        "boot-heun-is-the-end",
        "boot",
        "Heun's step takes the end's x0 instead of the mean",
        OBJECTIVE,
        "x0 = (x0 + denoise(schedule.add_noise(y_s, e, s), s)) / 2",
        "x0 = denoise(schedule.add_noise(y_s, e, s), s)",
        (f"{TESTS}::test_steps_on_a_cosine_schedule_have_the_known_errors",),
    ),
    Mutant(
        "boot-target-with-graph",
        "boot",
        "the gradient flows through the target, too",
        OBJECTIVE,
        "with torch.no_grad():\n            y_t",
        "with torch.enable_grad():\n            y_t",
        (f"{TESTS}::test_only_the_wanted_signal_is_differentiated",),
    ),
    Mutant(
        "boot-no-anchor",
        "boot",
        "t is drawn and s = t - step: the last step below noise has no target",
        OBJECTIVE,
        "return s, (s + self.step).clamp_max(1)",
        "return (s - self.step).clamp_min(0), s",
        (f"{TESTS}::test_every_target_has_an_anchor_and_both_ends_their_share",),
    ),
    Mutant(
        "boot-told-the-start",
        "boot",
        "the wanted signal's time is told as t",
        OBJECTIVE,
        "y_s = self.signal(trio.generator, e, s, batch.cond)",
        "y_s = self.signal(trio.generator, e, t, batch.cond)",
        (READS,),
    ),
    Mutant(
        "boot-unguided",
        "boot",
        "the teacher is not guided",
        OBJECTIVE,
        "on_schedule(guided(trio.real_score, self.guidance), trio",
        "on_schedule(trio.real_score, trio",
        (f"{TESTS}::test_guidance_is_in_the_boundary_and_in_the_steps",),
    ),
    Mutant(
        "boot-first-time-untold",
        "boot",
        "the student is told the time of its noise, whatever first_time says",
        OBJECTIVE,
        "told = torch.full_like(time, float(self.sampler.grid(generator.schedule)[0]))",
        "told = torch.ones_like(time)",
        (f"{TESTS}::test_an_eps_network_may_be_told_another_first_time",),
    ),
)
