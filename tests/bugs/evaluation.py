"""Bugs of evaluations: shares of several processes, what a CLIP is shown, and variety."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

PROCESSES, OF_PROCESSES = "fewstep/processes.py", "tests/unit/test_processes.py"
TOGETHER = "tests/invariants/test_eval_processes.py"

MUTANTS = (
    Mutant(
        "cut-batches",
        "processes",
        "samples are divided evenly, so that other ones go through the network together",
        PROCESSES,
        "        return range(first * batch, min((first + own) * batch, n))",
        "        return range(self.rank * n // self.count, (self.rank + 1) * n // self.count)",
        (f"{OF_PROCESSES}::test_shares_are_the_batches_that_one_process_has",),
    ),
    Mutant(
        "shares-in-another-order",
        "processes",
        "features are gathered in another order than that of their samples",
        PROCESSES,
        "for share, part in zip(shares, found):",
        "for share, part in zip(shares, found[::-1]):",
        (f"{TOGETHER}::test_a_folder_has_the_figures_of_one_process",),
    ),
    Mutant(
        "same-noise",
        "processes",
        "every process makes samples of the first noise",
        "fewstep/evaluation.py",
        "first + own.start, **options",
        "first, **options",
        (f"{TOGETHER}::test_a_run_has_the_figures_of_one_process",),
    ),
    Mutant(
        "same-noise-in-previews",
        "processes",
        "every process of a training makes the preview's first samples",
        "fewstep/training/preview.py",
        "asked, seed + share.start, batch_size",
        "asked, seed, batch_size",
        ("tests/invariants/test_two_ranks.py::test_two_processes_make_the_preview_of_one",),
    ),
    Mutant(
        "clip-sees-the-extractors-size",
        "clip",
        "the CLIP sees what is cropped and resized for the extractor",
        "fewstep/metrics/look.py",
        "scorer.cosines(views[-1],",
        "scorer.cosines(views[0],",
        ("tests/unit/metrics/test_look.py::test_a_scorer_may_be_shown_the_pictures_otherwise",),
    ),
    Mutant(
        "one-set-is-all",
        "seeds",
        "every set has the samples of the first",
        "fewstep/measuring/pictures.py",
        "partial(pictures, seed)",
        "partial(pictures, firsts[0])",
        ("tests/cli/test_protocols.py::test_seeds_give_mean_deviation_and_minimum_of_disjoint_sets",),
    ),
    Mutant(
        "picture-beside-itself",
        "diversity",
        "every picture is compared with itself, too",
        "fewstep/metrics/diversity.py",
        "enumerate(shown[:-1, None], 1)",
        "enumerate(shown[:, None])",
        ("tests/unit/metrics/test_diversity.py::test_every_pair_counts_once_and_every_prompt_alike",),
    ),
    Mutant(
        "one-noise-for-all-prompts",
        "diversity",
        "pictures of all prompts are of the same noise",
        "fewstep/diversity.py",
        "seed + i * per_prompt",
        "seed",
        ("tests/cli/test_diversity.py::test_figure_is_the_mean_over_pairs_of_each_prompt",),
    ),
    Mutant(
        "mean-of-own-prompts",
        "diversity",
        "processes return the means over the prompts of their own",
        "fewstep/diversity.py",
        "processes.on_main(lambda: float(values.mean()))",
        "float(values.mean())",
        ("tests/cli/test_diversity.py::test_every_process_returns_the_main_ones_figure",),
    ),
)
