"""Bugs of SwiftBrush and of DMD's pairs."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

TERMS, OBJECTIVE = "fewstep/objectives/terms.py", "fewstep/objectives/swiftbrush.py"
TESTS = "tests/unit/objectives/test_swiftbrush.py"
PAIRS = "tests/unit/training/test_pairs.py"

MUTANTS = (
    Mutant(
        "vsd-sign",
        "vsd",
        "the student flees the teacher",
        TERMS,
        "* (fake.x0 - real.x0)\n    return with_gradient",
        "* (real.x0 - fake.x0)\n    return with_gradient",
        (f"{TESTS}::test_the_gradient_is_the_papers_on_vp_whatever_the_networks_predict",),
    ),
    Mutant(
        "vsd-chain-factor",
        "vsd",
        "the gradient is taken through x_t = alpha x + sigma eps",
        TERMS,
        "    grad = c.alpha * c.sigma /",
        "    grad = c.alpha * c.alpha * c.sigma /",
        (f"{TESTS}::test_the_gradient_of_the_scale_of_a_gaussian",),
    ),
    Mutant(
        "vsd-literal-sigma",
        "vsd",
        "VP's weight is taken literally on other schedules",
        TERMS,
        "c.alpha * c.sigma / (c.alpha.square() + c.sigma.square()) * (fake",
        "c.alpha * c.sigma * (fake",
        (f"{TESTS}::test_other_schedules_weigh_as_vp_at_equal_signal_to_noise",),
    ),
    Mutant(
        "vsd-fake-unguided",
        "vsd",
        "the fake score is not guided",
        OBJECTIVE,
        "fake = guided(trio.critic(), self.guidance)(x_t, t, batch.cond)",
        "fake = trio.critic()(x_t, t, batch.cond)",
        (f"{TESTS}::test_both_scores_are_guided_and_see_one_state",),
    ),
    Mutant(
        "vsd-fit-unweighted",
        "vsd",
        "the fake score's loss has no alpha^2",
        TERMS,
        "    return (share * error.square()).mean()",
        "    return error.square().mean()",
        (f"{TESTS}::test_the_fake_scores_loss_is_in_noise_whatever_it_predicts",),
    ),
    Mutant(
        "vsd-drop-by-sample",
        "vsd",
        "whether prompts are dropped depends on the process",
        OBJECTIVE,
        'rng.shared_int("critic.drop", 1_000_000) <',
        'float(rng.rand("critic.drop")[-1]) * 1_000_000 <',
        (f"{TESTS}::test_a_tenth_of_the_fake_scores_turns_see_no_prompt_each_as_a_whole",),
    ),
    Mutant(
        "vsd-drop-the-students",
        "vsd",
        "the student, too, loses its prompt, and the fake score's empty one means what nobody trains",
        OBJECTIVE,
        "            x = self.rollout(trio, batch, rng).x\n        #",
        "            empty = type(batch)(batch.cond.unconditional(), batch.shape, batch.sample_ids)\n"
        "            x = self.rollout(trio, empty if self.drops(rng) else batch, rng).x\n        #",
        (f"{TESTS}::test_a_tenth_of_the_fake_scores_turns_see_no_prompt_each_as_a_whole",),
    ),
    Mutant(
        "pairs-of-other-noise",
        "pairs",
        "each sample is paired with its neighbour's noise",
        "fewstep/training/pairs.py",
        "manual_seed(card.seed + row) for row in rows",
        "manual_seed(card.seed + row + (len(rows) > 3)) for row in rows",
        (f"{PAIRS}::test_a_pair_is_the_noise_of_its_number_and_what_the_teacher_makes_of_it",),
    ),
    Mutant(
        "pairs-of-other-prompts",
        "pairs",
        "the captions are those of the batch's rows",
        "fewstep/training/pairs.py",
        "self._captions[rows % len(self._captions)]",
        "self._captions[torch.arange(len(rows)) % len(self._captions)]",
        (f"{PAIRS}::test_a_pair_is_the_noise_of_its_number_and_what_the_teacher_makes_of_it",),
    ),
    Mutant(
        "pairs-from-another-generator",
        "pairs",
        "noise that cannot be made again is not noticed",
        "fewstep/training/pairs.py",
        'if not torch.equal(self._shards.tensor(0, "first_noise"), _numbered(self.card, [0])):',
        "if False:",
        (f"{PAIRS}::test_noise_that_cannot_be_made_again_is_noticed",),
    ),
    Mutant(
        "regression-on-the-batchs-prompts",
        "pairs",
        "the regression reads the batch's prompts, not the pairs'",
        "fewstep/objectives/dmd.py",
        "trio.generator(schedule.prior(noise), t, cond).x0",
        "trio.generator(schedule.prior(noise), t, batch.cond).x0",
        ("tests/unit/objectives/test_dmd.py::test_the_regression_by_hand",),
    ),
)
