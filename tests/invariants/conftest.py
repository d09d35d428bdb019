"""The command line as forked processes (see zygote.py), and what must be equal at the end of two runs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

# Everything that has a state of its own: averaging, both schedules, two steps with fresh noise, micro-batches, prompts
# with classes and guidance, and a log interval that no checkpoint falls on.
LINE = """--teacher mixture --method dmd2 --num-steps 2 --iterations 40 --batch-size 16
--set teacher.fit_steps=20 --set teacher.classes=[0,1,0,1,0,1,0,1]
--set method.guidance=2 --set method.turns.critic_per_generator=2
--set train.ema=0.9 --set train.accumulate=2 --set train.generator.warmup=3
--set train.generator.schedule=cosine --set train.critic.schedule=cosine
--set train.checkpoint_every=10 --set train.evaluate_every=20 --set train.log_every=15"""
SETTINGS = LINE.split()
DEADLINE = 300.0
"""Seconds that processes have together: one that waits for a lost one would wait for `processes.PATIENCE`."""


@contextmanager
def group_of(count: int) -> Iterator[dict[str, str]]:
    """The environment in which so many processes find each other: at a store of this one's, as at torchrun's.

    It has its port before anyone is told of it; one that was only free a moment ago may be another's by then.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    yield {**group, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


@dataclass
class Finished:
    code: int
    log: str


@dataclass
class CommandLine:
    """`fewstep` in processes of its own."""

    server: "subprocess.Popen[str]"
    logs: Path
    count: int = 0

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *argv: str, fault: dict[str, Any] | None = None, **environment: str) -> tuple[int, Path]:
        """A process that runs `fewstep ARGV`, and the file that its output goes to."""
        self.count += 1
        log = self.logs / f"{self.count}.log"
        request = {"argv": list(argv), "log": str(log), "fault": fault, "environment": environment}
        return self.ask(request), log

    def run(self, *argv: str, fault: dict[str, Any] | None = None) -> Finished:
        """Run `fewstep ARGV` to its end."""
        pid, log = self.start(*argv, fault=fault)
        return self.wait(pid, log)

    def together(self, count: int, *argv: str) -> list[Finished]:
        """Run `fewstep ARGV` in several processes that know of each other, as `accelerate launch` starts them."""
        with group_of(count) as group:
            ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
            return self.wait_for([self.start(*argv, **rank, **group) for rank in ranks])

    def wait(self, pid: int, log: Path) -> Finished:
        return self.wait_for([(pid, log)])[0]

    def wait_for(self, started: Sequence[tuple[int, Path]], seconds: float = DEADLINE) -> list[Finished]:
        """Wait for all; where that takes too long, they are killed, and the test fails with what they said."""
        codes = self.ask({"wait": [pid for pid, _ in started], "seconds": seconds})
        said = [log.read_text() for _, log in started]
        if not codes:
            pytest.fail("\n".join([f"not all processes ended in {seconds:g} s; they said:", *said]))
        return [Finished(code, log) for code, log in zip(codes, said)]

    def distill(self, out: Path, *more: str, fault: dict[str, Any] | None = None) -> Finished:
        return self.run("distill", *SETTINGS, "--out", str(out), *more, fault=fault)


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """fewstep's command line; the processes are forked from one that has done the imports."""
    script = Path(__file__).with_name("zygote.py")
    server = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    yield CommandLine(server, tmp_path_factory.mktemp("logs"))
    assert server.stdin is not None
    server.stdin.close()
    server.wait(60)


@dataclass
class Outcome:
    """What a run leaves that must not depend on interruptions: the last checkpoint's bytes, rows and counts."""

    files: dict[str, bytes]
    rows: list[dict[str, Any]]
    progress: dict[str, Any]


def outcome(run: Path, iteration: int = 40) -> Outcome:
    last = run / "checkpoints" / f"{iteration:08d}"
    files = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    progress = json.loads((last / "state.json").read_text())["progress"]
    for row in [*rows, progress]:
        del row["seconds"]
    return Outcome(files, rows, progress)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome of an uninterrupted run, by `python -m fewstep.cli` as a user starts it."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    command = [sys.executable, "-m", "fewstep.cli", "distill", *SETTINGS, "--out", str(run)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return outcome(run)


def fault(event: str, n: int = 1, moment: str = "before", signum: int = signal.SIGKILL) -> dict[str, Any]:
    """See zygote.arm."""
    return {"event": event, "n": n, "moment": moment, "signum": int(signum)}
