"""Bugs of scores that other environments give: what is believed of an answer, and what becomes of the process."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

CONTRACT, PROCESS, START = (f"fewstep/metrics/outside/{name}.py" for name in ("contract", "process", "start"))
FIGURES, MEANS, VBENCH = (f"fewstep/metrics/{name}.py" for name in ("outside/figures", "means", "vbench"))
ITEMS, SCORES, SCORING = (
    f"fewstep/{name}.py" for name in ("metrics/outside/items", "metrics/outside/scores", "scoring")
)
OF_ITEMS = "tests/unit/metrics/outside/test_items.py"
OF_CONTRACT, OF_PROCESS, OF_FIGURES, OF_MEANS, OF_VBENCH = (
    f"tests/unit/metrics/{folder}test_{name}.py"
    for folder, name in (("outside/", "contract"), ("outside/", "process"), ("outside/", "figures"))
    + (("", "means"), ("", "vbench"))
)

MUTANTS = (
    Mutant(
        "score-not-finite",
        "outside",
        "NaN is a score, since Python's JSON reads it",
        CONTRACT,
        "not abs(value) <= sys.float_info.max:",
        "abs(value) > sys.float_info.max:",
        (f"{OF_CONTRACT}::test_a_bad_answer_is_refused",),
    ),
    Mutant(
        "score-of-another-file",
        "outside",
        "scores of files that were not asked for are kept",
        CONTRACT,
        "if unknown := sorted(set(scores) - asked):",
        "if unknown := sorted(set(scores) - asked - set(scores)):",
        (f"{OF_CONTRACT}::test_a_bad_answer_is_refused",),
    ),
    Mutant(
        "files-left-out",
        "outside",
        "a mean over the files that went well",
        CONTRACT,
        "if missing := sorted(asked - set(scores)):",
        "if missing := sorted(asked - set(scores) - asked):",
        (f"{OF_CONTRACT}::test_a_bad_answer_is_refused",),
    ),
    Mutant(
        "answer-of-another-contract",
        "outside",
        "any version of the contract is read",
        CONTRACT,
        'if found["contract"] != CONTRACT:',
        'if found["contract"] is None:',
        (f"{OF_CONTRACT}::test_a_bad_answer_is_refused",),
    ),
    Mutant(
        "environment-handed-on",
        "outside",
        "a child inherits PYTHONPATH, which holds our packages, and tokens",
        PROCESS,
        "passed = {name: variables[name] for name in PASSED if name in variables}",
        "passed = dict(variables)",
        (f"{OF_PROCESS}::test_the_childs_environment_is_chosen",),
    ),
    Mutant(
        "child-killed-alone",
        "outside",
        "what the child started goes on",
        PROCESS,
        "os.killpg(child.pid, signal.SIGKILL)",
        "child.kill()",
        (f"{OF_PROCESS}::test_after_its_time_it_is_dead_and_so_is_what_it_started",),
    ),
    Mutant(
        "parent-not-watched",
        "outside",
        "a child goes on when its parent was killed",
        START,
        "args=(pipe,), daemon=True).start()",
        "args=(pipe,), daemon=True)",
        (f"{OF_PROCESS}::test_a_killed_parent_takes_it_along",),
    ),
    Mutant(
        "not-as-a-script",
        "outside",
        "an adapter does not find the modules beside it",
        START,
        "    sys.path[0] = os.path.dirname(adapter)",
        "    os.path.dirname(adapter)",
        (f"{OF_PROCESS}::test_an_adapter_finds_the_modules_beside_it",),
    ),
    Mutant(
        "missing-dimensions-are-zero",
        "outside",
        "a total of VBench is made of what was measured",
        VBENCH,
        "if missing := [name for name in RANGES if name not in dimensions]:",
        "if missing := [name for name in () if name not in dimensions]:",
        (f"{OF_VBENCH}::test_missing_dimensions_are_refused_by_name",),
    ),
    Mutant(
        "dynamic-degree-in-full",
        "outside",
        "all dimensions of quality count the same",
        VBENCH,
        '{"dynamic degree": 0.5}',
        '{"dynamic degree": 1.0}',
        (f"{OF_VBENCH}::test_published_rows_come_out",),
    ),
    Mutant(
        "range-of-motion",
        "outside",
        "motion smoothness is scaled to 1",
        VBENCH,
        "(0.706, 0.9975)",
        "(0.706, 1.0)",
        (f"{OF_VBENCH}::test_published_rows_come_out",),
    ),
    Mutant(
        "geneval-over-pictures",
        "outside",
        "tasks of many pictures count more",
        FIGURES,
        "over_parts(list(means.values()), [1.0] * len(TASKS))",
        "over_parts(list(means.values()), [len(groups[task]) for task in TASKS])",
        (f"{OF_FIGURES}::test_geneval_is_the_mean_of_six_accuracies",),
    ),
    Mutant(
        "geneval-of-five",
        "outside",
        "the mean of the tasks that are there",
        FIGURES,
        "if missing := [task for task in TASKS if task not in groups]:",
        "if missing := [task for task in () if task not in groups]:",
        (f"{OF_FIGURES}::test_geneval_refuses_what_makes_no_mean_of_six",),
    ),
    Mutant(
        "pictures-independent",
        "outside",
        "pictures of one prompt are taken for independent draws",
        MEANS,
        "for score, prompt in zip(scores, prompts):",
        "for prompt, score in enumerate(scores):",
        (f"{OF_MEANS}::test_with_equal_counts_the_error_is_that_of_the_prompts_means",),
    ),
    Mutant(
        "prompts-of-the-neighbours",
        "outside",
        "pictures get the prompts in their order, whatever their names say",
        ITEMS,
        "replace(known.pop(stem), file=",
        "replace(known.pop(next(iter(known))), file=",
        (f"{OF_ITEMS}::test_a_missing_picture_moves_no_other",),
    ),
    Mutant(
        "strange-names-passed-over",
        "outside",
        "a picture of a wrong name is left out of the figure",
        ITEMS,
        """                raise ValueError(f"{path} belongs to no prompt; names are as {items[0].file}.png")""",
        "                continue",
        (f"{OF_ITEMS}::test_wrong_names_are_told",),
    ),
    Mutant(
        "published-name-of-few",
        "outside",
        "figures of some pictures have the benchmark's name",
        SCORING,
        "(published and len(items) == found.count)",
        "published",
        ("tests/cli/test_scores.py::test_a_benchmark_in_part_says_so",),
    ),
    Mutant(
        "answer-thrown-away",
        "outside",
        "hours of scores are lost when no figure can be made of them",
        SCORING,
        "write_text(kept, json.dumps(asdict(answer), ensure_ascii=False)",
        "str(json.dumps(asdict(answer), ensure_ascii=False)",
        ("tests/cli/test_scores.py::test_an_answer_is_kept_when_nothing_can_be_made_of_it",),
    ),
    Mutant(
        "ours-by-name",
        "outside",
        "a user's adapter called like a score of ours has its hash and its options",
        SCORES,
        "return SCORES.get(score.name) is score",
        "return score.name in SCORES",
        ("tests/cli/test_scores.py::test_an_adapter_called_like_a_score_of_ours_is_its_own",),
    ),
    Mutant(
        "answers-overwritten",
        "outside",
        "the answer of the last measurement is kept under the name of all",
        SCORING,
        "-{_digest(record, images or target, answer)}.json",
        ".json",
        ("tests/cli/test_scores.py::test_each_measurement_keeps_its_answer",),
    ),
    Mutant(
        "first-seed-for-all",
        "outside",
        "every batch of a student's pictures is of the same noise",
        SCORING,
        "prompts, seed + start, batch_size=batch_size",
        "prompts, seed, batch_size=batch_size",
        ("tests/unit/test_scoring.py::test_every_picture_is_of_its_own_seed",),
    ),
)
