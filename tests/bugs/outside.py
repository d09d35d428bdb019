"""Bugs of scores that other environments give: what is believed of an answer, and what becomes of the process."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

CONTRACT, PROCESS, START = (f"fewstep/metrics/outside/{name}.py" for name in ("contract", "process", "start"))
OF_CONTRACT, OF_PROCESS = (f"tests/unit/metrics/outside/test_{name}.py" for name in ("contract", "process"))

MUTANTS = (
    Mutant(
        "score-not-finite",
        "outside",
        "NaN is a score, since Python's JSON reads it",
        CONTRACT,
        " or not math.isfinite(value):",
        ":",
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
)
