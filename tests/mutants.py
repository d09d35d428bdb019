"""Known bugs, put in one by one: each must make the tests that guard against it fail.

python -m tests.mutants [NAME or TRAP ...]

A guard that nobody has seen fail proves nothing.  The tests run in a copy of the tree, first as it is and then with
each bug; only the copy is ever changed.  Exits 1 if a bug survives.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.bugs import (
    attention,
    boot,
    cache,
    decoupled_dmd,
    dmd2,
    evaluation,
    fsdp,
    jvp,
    kernels,
    meanflow,
    norms,
    outside,
    perception,
    phased_dmd,
    protocols,
    sid,
    swiftbrush,
    tangents,
    tbcm,
    teachers,
    tmd,
)
from tests.bugs.mutant import Mutant

ROOT = Path(__file__).resolve().parents[1]
TREE = ("fewstep", "fewstep_cuda", "tests", "configs", "eval", "pyproject.toml")
LIBRARIES = ("torch._dynamo", "accelerate", "diffusers", "peft", "transformers", "omegaconf", "pytest", "rich.progress")
"""Imported once and inherited by the forked processes that run pytest: this takes longer than most of the tests."""
LIMIT = 600
"""Seconds that one run of pytest may take."""
CRASHES = ("NameError", "TypeError", "AttributeError", "ImportError", "SyntaxError", "IndentationError")


FILES = (
    attention,
    boot,
    cache,
    decoupled_dmd,
    dmd2,
    evaluation,
    fsdp,
    jvp,
    kernels,
    meanflow,
    norms,
    outside,
    perception,
    phased_dmd,
    protocols,
    sid,
    swiftbrush,
    tangents,
    tbcm,
    teachers,
    tmd,
)
MUTANTS = tuple(mutant for file in FILES for mutant in file.MUTANTS)


def chosen(names: list[str]) -> list[Mutant]:
    """The mutants of these names and traps; all if none is given."""
    known = {mutant.name for mutant in MUTANTS} | {mutant.trap for mutant in MUTANTS}
    if odd := sorted(set(names) - known):
        raise SystemExit(f"no mutant or trap named {', '.join(odd)}; known: {', '.join(sorted(known))}")
    return [mutant for mutant in MUTANTS if not names or {mutant.name, mutant.trap} & set(names)]


def copy_of_tree(tree: Path) -> None:
    """What the tests need, in a folder of its own; its conftest refuses to test another tree than that."""
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    with (tree / "tests" / "conftest.py").open("a") as conftest:
        conftest.write(f"\nimport fewstep, fewstep_cuda\nassert fewstep.__path__ == [{str(tree / 'fewstep')!r}]\n")
        conftest.write(f"assert fewstep_cuda.__path__ == [{str(tree / 'fewstep_cuda')!r}]\n")


def mutated(tree: Path, mutant: Mutant) -> str:
    """The file's text with the bug in it."""
    text = (tree / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.name}: {mutant.file} holds its old text {text.count(mutant.old)} times, not once; the code has "
            "moved, so bring the mutant up to date"
        )
    return text.replace(mutant.old, mutant.new)


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code and output, from a forked process in which `tree` is all there is of this project."""
    log = tree / "log.txt"
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(tree, tests, log))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def _pytest(tree: Path, tests: tuple[str, ...], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(tree)
    # COLUMNS: pytest would cut the lines that `verdict` reads.
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    sys.path[:] = [str(tree)] + [path for path in sys.path if Path(path).resolve() != ROOT]
    sys.modules.pop("tests", None)  # the package of this file
    sys.exit(importlib.import_module("pytest").main(["-q", "-p", "no:cacheprovider", *tests]))


def verdict(code: int, log: str, tests: tuple[str, ...]) -> str:
    """ "caught" if every one of the tests failed, and by what it found: a bug that cannot run proves nothing."""
    failed = [line.removeprefix("FAILED ") for line in log.splitlines() if line.startswith("FAILED ")]
    if code not in (0, 1) or any(f" - {error}" in line for line in failed for error in CRASHES):
        return "CRASHED"
    passed = [t for t in tests if not any(line.startswith((f"{t} ", f"{t}[", f"{t}::")) for line in failed)]
    return "SURVIVED" if passed else "caught"


def main(names: list[str]) -> int:
    """Returns the exit code."""
    mutants = chosen(names)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tests/conftest.py does, which comes after torch here
    sys.dont_write_bytecode = True  # two texts of one size within one second would share their bytecode
    for library in LIBRARIES:
        importlib.import_module(library)
    assert not {"fewstep", "fewstep_cuda"} & sys.modules.keys()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree, survivors, began = Path(folder).resolve(), 0, time.monotonic()
        copy_of_tree(tree)
        texts = [mutated(tree, mutant) for mutant in mutants]  # all, before any takes its time
        code, log = run_tests(tree, tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests)))
        if code:
            print(log, "the tests must pass before a bug is put in", sep="\n")
            return 2
        print(f"without a bug all pass ({time.monotonic() - began:.0f} s)", flush=True)
        for mutant, text in zip(mutants, texts):
            file, start = tree / mutant.file, time.monotonic()
            original = file.read_text(encoding="utf-8")
            file.write_text(text, encoding="utf-8")
            code, log = run_tests(tree, mutant.tests)
            file.write_text(original, encoding="utf-8")
            said, seconds = verdict(code, log, mutant.tests), time.monotonic() - start
            print(f"{said:8} {seconds:5.1f} s  {mutant.trap:13}  {mutant.name:29}  {mutant.bug}", flush=True)
            if said != "caught":
                survivors += 1
                print(log, *mutant.tests, "each of these had to fail", sep="\n")
        print(f"{len(mutants) - survivors} of {len(mutants)} caught in {time.monotonic() - began:.0f} s")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
