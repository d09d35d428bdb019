"""Resumed = unbroken, through the command line: every byte of the last checkpoint and every figure of metrics.jsonl."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.invariants.conftest import SETTINGS, CommandLine, Outcome, fault, outcome

SIGTERM, SIGINT = signal.SIGTERM, signal.SIGINT


def assert_resumes_to(unbroken: Outcome, cli: CommandLine, run: Path) -> str:
    """Resume until done; the outcome is the unbroken one's.  Returns what the resumed run said."""
    done = cli.distill(run, "--resume")
    assert done.code == 0, done.log
    seen = outcome(run)
    assert seen.rows == unbroken.rows
    assert seen.progress == unbroken.progress
    assert seen.files.keys() == unbroken.files.keys()
    assert [name for name in seen.files if seen.files[name] != unbroken.files[name]] == []
    assert not list(run.glob("**/.writing-*")) and not list(run.glob("*.tmp"))
    return done.log


def test_unbroken_run_trains_what_the_comparison_covers(unbroken: Outcome):
    """20 of 40 iterations move the generator, two evaluations ranked it, and no state file is missing."""
    assert unbroken.progress["updates"] == {"generator": 20, "critic": 40}
    assert unbroken.progress["best"] is not None
    names = ("ema", "unlogged", "generator", "fake_score", "optimizer_generator", "optimizer_critic")
    assert unbroken.files.keys() == {f"{name}.safetensors" for name in names}
    assert unbroken.files["ema.safetensors"] != unbroken.files["generator.safetensors"]
    assert [row["iteration"] for row in unbroken.rows] == [15, 20, 30, 40, 40]


@pytest.mark.parametrize(
    ("where", "code", "saved"),
    [
        pytest.param(fault("step", 13, signum=SIGTERM), 143, 13, id="SIGTERM in a step"),
        pytest.param(fault("step", 7, "after", SIGINT), 130, 7, id="SIGINT before any checkpoint"),
        pytest.param(fault("step", 20, signum=SIGTERM), 143, 20, id="SIGTERM where an evaluation is due"),
        pytest.param(fault("log", 1, signum=SIGTERM), 143, 15, id="SIGTERM while logging"),
        pytest.param(fault("step", 40, signum=SIGINT), 130, 40, id="SIGINT in the last step"),
    ],
)
def test_signal_saves_and_the_run_goes_on(
    where: dict, code: int, saved: int, cli: CommandLine, unbroken: Outcome, run_folder: Path
):
    """Exit 143 or 130 after the present iteration, with a checkpoint of it.

    Fails with the metrics since the last row left out of the checkpoint (rows 15 and 30 differ); with the evaluation
    skipped because of the stop ("evaluation is due": its row is missing); with the wish to stop read before logging
    ("while logging": no checkpoint 15).
    """
    stopped = cli.distill(run_folder, fault=where)
    assert stopped.code == code, stopped.log
    assert f"{saved:08d}" in stopped.log and "--resume" in stopped.log
    assert (run_folder / "checkpoints" / f"{saved:08d}" / "manifest.json").is_file()
    assert_resumes_to(unbroken, cli, run_folder)


# A checkpoint is 6 tensor files, state, manifest, folder, parent: 10 flushes; config and environment take one each.
@pytest.mark.parametrize(
    "where",
    [
        pytest.param(fault("write", 9), id="between two temporary files"),
        pytest.param(fault("write", 9, "half"), id="within a temporary file"),
        pytest.param(fault("fsync", 16), id="between two flushes"),
        pytest.param(fault("fsync", 7, "after"), id="in the first checkpoint"),
        pytest.param(fault("rename", 2), id="before the rename"),
        pytest.param(fault("rename", 2, "after"), id="after the rename, before its flush"),
        pytest.param(fault("prune", 1), id="before pruning"),
        pytest.param(fault("prune", 1, "half"), id="within pruning"),
        pytest.param(fault("prune", 1, "after"), id="after pruning"),
        pytest.param(fault("rename", 4, "after"), id="after the last rename"),
    ],
)
def test_kill_while_saving_loses_nothing(where: dict, cli: CommandLine, unbroken: Outcome, run_folder: Path):
    """SIGKILL at each stage of saving.

    Fails ("within a temporary file") with checkpoints written in place and believed without a manifest.
    """
    killed = cli.distill(run_folder, fault=where)
    assert killed.code == -signal.SIGKILL, killed.log
    assert_resumes_to(unbroken, cli, run_folder)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(fault("config"), id="while the configuration is written"),
        pytest.param(fault("rows"), id="while later rows are dropped"),
        pytest.param(fault("rename", 1), id="before its first checkpoint"),
        pytest.param(fault("prune", 1, "half"), id="while a damaged checkpoint is replaced"),
    ],
)
def test_kill_of_a_resumed_run_loses_nothing(where: dict, cli: CommandLine, unbroken: Outcome, run_folder: Path):
    """The second run is killed too: it falls back from a half-deleted checkpoint 20 to 10, and dies on its way.

    Fails with config.yaml opened for writing in place (the third run finds it empty), and with `damage` that does not
    look for missing files.
    """
    assert cli.distill(run_folder, fault=fault("step", 23)).code == -signal.SIGKILL
    (run_folder / "checkpoints" / "00000020" / "ema.safetensors").unlink()
    assert cli.distill(run_folder, "--resume", fault=where).code == -signal.SIGKILL
    assert_resumes_to(unbroken, cli, run_folder)


@pytest.mark.parametrize("number", range(5))
def test_kill_at_a_random_moment_loses_nothing(number: int, cli: CommandLine, unbroken: Outcome, run_folder: Path):
    """kill -9 from outside, at a time drawn anew at each run between start and the length of a run."""
    length = timed_run(cli, run_folder.with_name("timed"))
    delay = random.SystemRandom().uniform((number + 0.05) / 5, (number + 0.95) / 5) * length
    pid, log = cli.start("distill", *SETTINGS, "--out", str(run_folder))
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    code = cli.wait(pid, log).code
    print(f"killed after {delay:.2f} of {length:.2f} s: exit {code}")
    if not (run_folder / "config.yaml").is_file():  # so early that nothing was begun: there is nothing to resume
        shutil.rmtree(run_folder, ignore_errors=True)
        assert cli.distill(run_folder).code == 0
    assert_resumes_to(unbroken, cli, run_folder)


def timed_run(cli: CommandLine, run: Path, known: dict[str, float] = {}) -> float:  # noqa: B006 - kept on purpose
    """Seconds of a whole run, measured once a session."""
    if "seconds" not in known:
        began = time.monotonic()
        assert cli.distill(run).code == 0
        known["seconds"] = time.monotonic() - began
    return known["seconds"]


@pytest.fixture
def half_run(cli: CommandLine, run_folder: Path) -> Path:
    """A run that was killed in iteration 25: checkpoints 10 and 20."""
    assert cli.distill(run_folder, fault=fault("step", 25)).code == -signal.SIGKILL
    assert sorted(p.name for p in (run_folder / "checkpoints").iterdir()) == ["00000010", "00000020"]
    return run_folder


def test_damaged_byte_falls_back_and_says_so(cli: CommandLine, unbroken: Outcome, half_run: Path):
    """One flipped bit in the newest checkpoint.  Fails with `damage` that compares sizes instead of sums."""
    path = half_run / "checkpoints" / "00000020" / "optimizer_generator.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = assert_resumes_to(unbroken, cli, half_run)
    assert "DAMAGED" in said and "optimizer_generator.safetensors" in said
    assert "after iteration 10" in said


def test_no_valid_checkpoint_is_an_error(cli: CommandLine, half_run: Path):
    """Starting anew unasked would hide that a disk is failing."""
    for manifest in half_run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    done = cli.distill(half_run, "--resume")
    assert (done.code, "no valid checkpoint" in done.log, "Traceback" in done.log) == (2, True, False)


def test_resume_after_completion_changes_nothing(cli: CommandLine, unbroken: Outcome, run_folder: Path):
    assert cli.distill(run_folder).code == 0
    before = {p: p.stat().st_mtime_ns for p in run_folder.glob("checkpoints/*/*")}
    assert_resumes_to(unbroken, cli, run_folder)
    assert {p: p.stat().st_mtime_ns for p in run_folder.glob("checkpoints/*/*")} == before


def test_iterations_may_grow(cli: CommandLine, tmp_path: Path):
    """10 and then 10 more = 20, with constant rates (a cosine depends on the planned length)."""
    constant = ("--set", "train.generator.schedule=constant", "--set", "train.critic.schedule=constant")
    assert cli.distill(tmp_path / "whole", *constant, "--iterations", "20").code == 0
    assert cli.distill(tmp_path / "parts", *constant, "--iterations", "10").code == 0
    done = cli.distill(tmp_path / "parts", *constant, "--iterations", "20", "--set", "train.log_every=7", "--resume")
    assert done.code == 0, done.log
    whole, parts = (outcome(tmp_path / name, 20) for name in ("whole", "parts"))
    assert parts.files == whole.files


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("--set teacher.fit_steps=21", "teacher.fit_steps: 20 -> 21"),
        ("--set teacher.modes=7", "teacher.modes: None -> 7"),
        ("--set method.guidance=3", "method.guidance: 2.0 -> 3.0"),
        ("--num-steps 1", "method.num_steps: 2 -> 1"),
        ("--set method.turns.exclusive=true", "method.turns.exclusive: False -> True"),
        ("--batch-size 8", "train.batch_size: 16 -> 8"),
        ("--seed 1", "train.seed: 0 -> 1"),
        ("--precision bf16", "train.precision: fp32 -> bf16"),
        ("--set train.ema=0.5", "train.ema: 0.9 -> 0.5"),
        ("--lr 0.1", "train.critic.lr: 0.001 -> 0.1"),
    ],
)
def test_resume_refuses_other_settings_and_names_them(setting: str, key: str, cli: CommandLine, begun: Path):
    """Exit 2 and one line with the changed keys.  Fails with `differences` that returns nothing."""
    done = cli.distill(begun, *setting.split(), "--resume")
    assert (done.code, key in done.log, "Traceback" in done.log) == (2, True, False), done.log


@pytest.fixture(scope="module")
def begun(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration, for tests that only read it."""
    run = tmp_path_factory.mktemp("begun") / "run"
    assert cli.distill(run, "--iterations", "1").code == 0
    return run


def test_existing_run_without_resume_or_overwrite_is_an_error(cli: CommandLine, begun: Path):
    before = {p: p.stat().st_mtime_ns for p in begun.glob("**/*")}
    done = cli.distill(begun)
    assert done.code == 2 and "--resume" in done.log and "--overwrite" in done.log
    assert {p: p.stat().st_mtime_ns for p in begun.glob("**/*")} == before


def test_resume_of_nothing_is_an_error(cli: CommandLine, run_folder: Path):
    done = cli.distill(run_folder, "--resume")
    assert (done.code, "no run to resume" in done.log, run_folder.exists()) == (2, True, False)


def test_changed_prompt_file_is_refused(cli: CommandLine, run_folder: Path, tmp_path: Path):
    """The file keeps its name, the prompts do not.  Fails without the digest in the checkpoint."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("class 0\n")
    arguments = ("--prompts", str(prompts), "--iterations", "1")
    assert cli.distill(run_folder, *arguments).code == 0
    prompts.write_text("class 1\n")
    done = cli.distill(run_folder, *arguments, "--resume")
    assert (done.code, "other prompts" in done.log) == (2, True), done.log


def test_moved_prompt_file_resumes(cli: CommandLine, run_folder: Path, tmp_path: Path):
    """The prompts keep their content, the file does not keep its path.  Fails if the path counts as a setting."""
    for name in ("here.txt", "there.txt"):
        (tmp_path / name).write_text("class 0\n")
    assert cli.distill(run_folder, "--prompts", str(tmp_path / "here.txt"), "--iterations", "1").code == 0
    done = cli.distill(run_folder, "--prompts", str(tmp_path / "there.txt"), "--iterations", "1", "--resume")
    assert done.code == 0, done.log


def test_overwrite_deletes_only_what_the_run_wrote(cli: CommandLine, begun: Path, run_folder: Path):
    """Fails with rmtree of the whole folder, and where the figures of the run before stay: a table averages both."""
    shutil.copytree(begun, run_folder)
    (run_folder / "notes.txt").write_text("mine")
    figures = [run_folder / name for name in ("figures.jsonl", "figures-hpsv2.1.json", "figures-hpsv2.1.tmp")]
    for path in figures:
        path.touch()
    stale = run_folder / "checkpoints" / "00000077"
    stale.mkdir()
    done = cli.distill(run_folder, "--iterations", "1", "--overwrite")
    assert done.code == 0, done.log
    assert (run_folder / "notes.txt").read_text() == "mine" and not stale.exists()
    assert not any(path.exists() for path in figures)
    assert len((run_folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_overwrite_with_a_bad_request_deletes_nothing(cli: CommandLine, begun: Path, run_folder: Path):
    """The mistake is found only when the teacher is built.  Fails if the old run is deleted before."""
    shutil.copytree(begun, run_folder)
    done = cli.distill(run_folder, "--set", "teacher.classes=[0,1]", "--overwrite")
    assert done.code == 2, done.log
    assert (
        json.loads((run_folder / "checkpoints" / "00000001" / "state.json").read_text())["progress"]["iteration"] == 1
    )


def test_adapters_and_gan_resume_exactly(cli: CommandLine, run_folder: Path):
    """LoRA roles, a GAN head that starts late, real samples, R1: killed after its first checkpoint, resumed to the end.

    Fails with a head or adapters left out of the checkpoint, or initialised from torch's global generator.
    """
    more = (
        "--sharing lora --lora-rank 2 --set method.gan_weight=0.1 --set method.r1_weight=0.1 --set method.gan_start=5"
    )
    whole = cli.distill(run_folder.with_name("whole"), *more.split())
    assert whole.code == 0, whole.log
    killed = cli.distill(run_folder, *more.split(), fault=fault("step", 17))
    assert killed.code == -signal.SIGKILL, killed.log
    resumed = cli.distill(run_folder, *more.split(), "--resume")
    assert resumed.code == 0, resumed.log
    first, second = outcome(run_folder.with_name("whole")), outcome(run_folder)
    assert "head.safetensors" in first.files and first.files == second.files
    assert first.rows == second.rows and any("gan/critic" in row for row in first.rows)
