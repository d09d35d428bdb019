"""The command line in this process and in a fresh one, and one finished run of each kind of teacher to work on."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.tiny_pipeline import build

ROOT = Path(__file__).resolve().parents[2]
TOY = [
    "distill", "--teacher", "gaussian", "--method", "dmd2", "--set", "method.guidance=1", "--set",
    "teacher.fit_steps=2", "--iterations", "2", "--batch-size", "4", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """cli(*arguments): `fewstep arguments` in this process; .exit_code, .stdout, .stderr, .exception."""
    from fewstep.cli import app

    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="session")
def shell() -> Callable[..., subprocess.CompletedProcess]:
    """shell(*arguments, cwd=...): `fewstep arguments` in a fresh process without a terminal."""

    def run(*arguments: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fewstep.cli", *(str(a) for a in arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=600)

    return run


@pytest.fixture
def toy() -> list[str]:
    """A command that distils a closed-form teacher in about a second; --out is to be added."""
    return list(TOY)


@pytest.fixture(scope="session")
def toy_run(cli, tmp_path_factory) -> Path:
    """A finished run on the toy teacher.  Tests must leave it as it is."""
    out = tmp_path_factory.mktemp("toy") / "run"
    done = cli(*TOY, "--out", out)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> Path:
    """A tiny diffusers pipeline folder.  Tests must leave it as it is."""
    return build(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def pipeline_run(cli, pipeline_folder, tmp_path_factory) -> Path:
    """A finished run on the tiny pipeline.  Tests must leave it as it is."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    (out.parent / "prompts.txt").write_text("a photo of a bag\na coat\n")
    done = cli(
        "distill", "--teacher", pipeline_folder, "--prompts", out.parent / "prompts.txt",
        "--method", "dmd2", "--set", "method.guidance=2",
        "--iterations", "2", "--batch-size", "2", "--lr", "1e-3", "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return out
