"""Bugs of Decoupled DMD."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

FILE = "fewstep/objectives/decoupled_dmd.py"
TESTS = "tests/unit/objectives/test_decoupled_dmd.py"

MUTANTS = (
    Mutant(
        "decoupled-reversed-time",
        "decoupled",
        "guidance looks at levels noisier than the input: the paper's t taken for ours",
        FILE,
        (
            "indices = DiscreteUniform(self.min_index, min(last, self.max_index))\n"
            "        return Clamped(Shifted(indices, self.shift), self.min_index / 999, level)"
        ),
        (
            "indices = DiscreteUniform(min(last, self.max_index), self.max_index)\n"
            "        return Clamped(Shifted(indices, self.shift), level, self.max_index / 999)"
        ),
        (
            f"{TESTS}::test_augmentation_looks_only_where_the_signal_is_cleaner_than_the_input",
            f"{TESTS}::test_the_mean_settles_at_the_fixed_point_of_the_step",
            f"{TESTS}::test_augmentation_alone_drifts_without_end",
        ),
    ),
    Mutant(
        "decoupled-level-before-shift",
        "decoupled",
        "the level is compared with indices before the shift",
        FILE,
        "shift_time(torch.tensor(level).double(), 1 / self.shift)",
        "torch.tensor(level).double()",
        (f"{TESTS}::test_a_shifted_constrained_law_is_the_full_one_cut_off",),
    ),
    Mutant(
        "decoupled-index-rounded-away",
        "decoupled",
        "the index of a table's own time is the one below",
        FILE,
        " + 1e-4)",
        ")",
        (f"{TESTS}::test_the_constrained_law_is_uniform_up_to_the_level",),
    ),
    Mutant(
        "decoupled-matching-cut-off",
        "decoupled",
        "in hybrid the matching term is cut off, too",
        FILE,
        '(self.law_below(level) if self.times == "constrained" else full)',
        '(self.law_below(level) if self.times != "full" else full)',
        (
            f"{TESTS}::test_the_matching_terms_times_do_not_depend_on_the_step",
            f"{TESTS}::test_augmentation_looks_only_where_the_signal_is_cleaner_than_the_input",
            f"{TESTS}::test_the_mean_settles_at_the_fixed_point_of_the_step",
        ),
    ),
    Mutant(
        "decoupled-augmentation-not-cut-off",
        "decoupled",
        "in hybrid guidance looks anywhere",
        FILE,
        '(full if self.times == "full" else self.law_below(level))',
        "full",
        (
            f"{TESTS}::test_augmentation_looks_only_where_the_signal_is_cleaner_than_the_input",
            f"{TESTS}::test_the_mean_settles_at_the_fixed_point_of_the_step",
            f"{TESTS}::test_augmentation_alone_drifts_without_end",
        ),
    ),
    Mutant(
        "decoupled-augmentation-sign",
        "decoupled",
        "guidance pushes towards the empty prompt",
        FILE,
        "(prompted - trio.real_score(*at, cond.unconditional()).x0)",
        "(trio.real_score(*at, cond.unconditional()).x0 - prompted)",
        (
            f"{TESTS}::test_augmentation_alone_drifts_without_end",
            f"{TESTS}::test_the_gradient_on_gaussians_is_the_closed_form",
        ),
    ),
    Mutant(
        "decoupled-matching-sign",
        "decoupled",
        "the matching term flees the teacher",
        FILE,
        'delta, scale_of = {"dm": real - fake}',
        'delta, scale_of = {"dm": fake - real}',
        (
            f"{TESTS}::test_the_gradient_on_gaussians_is_the_closed_form",
            f"{TESTS}::test_the_mean_settles_at_the_fixed_point_of_the_step",
        ),
    ),
    Mutant(
        "decoupled-guidance-not-lowered",
        "decoupled",
        "guidance counts once more: the matching term has it already",
        FILE,
        "(self.guidance - 1) * (prompted",
        "self.guidance * (prompted",
        (
            f"{TESTS}::test_the_gradient_on_gaussians_is_the_closed_form",
            f"{TESTS}::test_augmentation_alone_drifts_without_end",
        ),
    ),
    Mutant(
        "decoupled-needless-augmentation",
        "decoupled",
        "guidance 1 asks for the empty prompt, and counts",
        FILE,
        "if self.guidance != 1:\n",
        "if True:\n",
        (f"{TESTS}::test_network_calls_are_as_many_as_needed",),
    ),
    Mutant(
        "decoupled-level-as-told",
        "decoupled",
        "the first step's level is the time that it is told",
        FILE,
        "float(self.sampler.grid(schedule)[step]) if step else 1.0",
        "float(self.sampler.grid(schedule)[step])",
        (f"{TESTS}::test_the_first_steps_level_is_pure_noise_whatever_it_is_told",),
    ),
    Mutant(
        "decoupled-level-of-the-step-before",
        "decoupled",
        "the level is that of the step before",
        FILE,
        "self.level(trio.generator.schedule, rollout.step)",
        "self.level(trio.generator.schedule, max(rollout.step - 1, 0))",
        (
            f"{TESTS}::test_augmentation_looks_only_where_the_signal_is_cleaner_than_the_input",
            f"{TESTS}::test_the_mean_settles_at_the_fixed_point_of_the_step",
        ),
    ),
    Mutant(
        "decoupled-noise-always-shared",
        "decoupled",
        "both terms have one noise unasked",
        FILE,
        'eps if self.share_noise else rng.randn_like(x, "matching.ca.eps")',
        "eps",
        (f"{TESTS}::test_terms_share_their_noise_only_if_asked_to",),
    ),
    Mutant(
        "decoupled-needless-call",
        "decoupled",
        "a shared level asks the teacher twice",
        FILE,
        "prompted = real if ca is dm else",
        "prompted =",
        (
            f"{TESTS}::test_one_shared_level_is_dmd2",
            f"{TESTS}::test_network_calls_are_as_many_as_needed",
        ),
    ),
    Mutant(
        "decoupled-per-term-one-scale",
        "decoupled",
        "both terms are divided by the matching term's",
        FILE,
        "self.augmentation(trio, ca, cond, prompted), prompted",
        "self.augmentation(trio, ca, cond, prompted), real",
        (f"{TESTS}::test_normalisers_divide_what_they_say",),
    ),
    Mutant(
        "decoupled-sum-not-guided",
        "decoupled",
        "the guided normaliser is not guided",
        FILE,
        'real_g = real + (delta["ca"]',
        'real_g = real + 0 * (delta["ca"]',
        (
            f"{TESTS}::test_one_shared_level_is_dmd2",
            f"{TESTS}::test_normalisers_divide_what_they_say",
        ),
    ),
    Mutant(
        "decoupled-levels-always-shared",
        "decoupled",
        "both terms look at one level",
        FILE,
        'if self.times == "shared" or self.guidance == 1:',
        "if True:",
        (
            f"{TESTS}::test_augmentation_looks_only_where_the_signal_is_cleaner_than_the_input",
            f"{TESTS}::test_network_calls_are_as_many_as_needed",
            f"{TESTS}::test_the_mean_settles_at_the_fixed_point_of_the_step",
        ),
    ),
    Mutant(
        "decoupled-move-reversed",
        "decoupled",
        "x moves against delta",
        FILE,
        "scale_of - delta",
        "scale_of + delta",
        (
            f"{TESTS}::test_move_goes_along_delta_and_reports_half_its_square",
            f"{TESTS}::test_augmentation_alone_drifts_without_end",
        ),
    ),
)
