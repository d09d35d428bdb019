"""Claims about the child: it gets what it was sent and no more, its failures are told, and it never outlives us."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fewstep.metrics.outside import process
from fewstep.metrics.outside.contract import Item, Request
from fewstep.metrics.outside.process import PASSED, Place, ask, environment_of

ROOT = Path(__file__).resolve().parents[4]
ANSWER = """
import json, os, subprocess, sys, time
asked = json.load(sys.stdin)
scores = {item["file"]: float(len(item["prompt"])) for item in asked["items"]}
answer = {"contract": 1, "metric": asked["metric"], "scores": scores, "seconds": 0.5}
"""
PRINT = "print(json.dumps(answer))\n"


@pytest.fixture
def place(tmp_path):
    """place(code): an adapter of this code, after what reads the request and makes an answer, in this interpreter."""

    def written(code: str) -> Place:
        path = tmp_path / "adapter.py"
        path.write_text(ANSWER + textwrap.dedent(code))
        return Place(Path(sys.executable), path, "Make one with: pip install thing.")

    return written


def request(folder: Path, n: int = 4, **options) -> Request:
    return Request("length", folder, [Item(f"{i}.png", "x" * i) for i in range(n)], options=options)


def alive(pid: int) -> bool:
    """Whether it runs: a killed one may stay as a zombie until its new parent looks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def test_an_answer_comes_back(place, tmp_path):
    answer = ask(place(PRINT), request(tmp_path), timeout=60)
    assert answer.scores == {"0.png": 0.0, "1.png": 1.0, "2.png": 2.0, "3.png": 3.0} and answer.seconds == 0.5


def test_much_text_in_both_directions_blocks_nothing(place, tmp_path):
    """Mutation: pipes that nobody empties, which hold 64 KiB."""
    noise = "print('noise ' * 40000, file=sys.stderr)\nprint(json.dumps(answer) + ' ' * 300000)\n"
    assert len(ask(place(noise), request(tmp_path, 1500), timeout=60).scores) == 1500


def test_progress_is_told_in_items(place, tmp_path):
    """In whatever unit it counts; a line that goes back is passed over."""
    code = "for n in (1, 2, 1, 3): print(f'progress: {n}/3', file=sys.stderr)\n" + PRINT
    told = []
    ask(place(code), request(tmp_path, 10), timeout=60, advance=told.append)
    assert told == [3, 3, 4]


def test_the_childs_environment_is_chosen(place, tmp_path, monkeypatch):
    """Mutation: the whole environment handed on, with PYTHONPATH, which holds our packages, and with tokens."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HPS_ROOT", "/weights")
    code = "answer['package'] = ' '.join(sorted(os.environ))\n" + PRINT
    names = (ask(place(code), request(tmp_path), timeout=60).package or "").split()
    assert "HPS_ROOT" in names and set(names) <= {*PASSED, "PYTHONUNBUFFERED", "PYTHONIOENCODING"}


def test_on_the_cpu_no_gpu_is_seen():
    assert environment_of("cpu", {"CUDA_VISIBLE_DEVICES": "1"})["CUDA_VISIBLE_DEVICES"] == ""
    assert environment_of("auto", {"CUDA_VISIBLE_DEVICES": "1"})["CUDA_VISIBLE_DEVICES"] == "1"


def test_an_adapter_finds_the_modules_beside_it(place, tmp_path):
    """As a script does that is started by itself. Mutation: the folder of start.py in its place."""
    (tmp_path / "beside.py").write_text("PACKAGE = 'beside 1'\n")
    code = "import beside\nanswer['package'] = beside.PACKAGE\n" + PRINT
    assert ask(place(code), request(tmp_path), timeout=60).package == "beside 1"


FAILURES = {
    "exit": (
        "print('no weights', file=sys.stderr)\nsys.exit(3)\n",
        ["exited with code 3", "no weights", "pip install"],
    ),
    "raise": ("import nothing_such\n", ["exited with code 1", "No module named 'nothing_such'", "pip install thing"]),
    "killed": ("import signal; os.kill(os.getpid(), signal.SIGTERM)\n", ["killed by signal 15"]),
    "silent": ("", ["length: its standard output is no JSON", "begins 'nothing'", "adapter.py"]),
    "chatty": ("print('loading')\n" + PRINT, ["begins 'loading {"]),
    "nan": ("answer['scores']['1.png'] = float('nan')\n" + PRINT, ["the score of '1.png' is nan"]),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_told(place, tmp_path, case):
    """Once each, with the last lines of standard error and how to make the environment."""
    code, words = FAILURES[case]
    with pytest.raises((ValueError, ChildProcessError)) as caught:
        ask(place(code), request(tmp_path), timeout=60)
    assert [word for word in words if word not in str(caught.value)] == []


def test_only_the_last_lines_are_repeated(place, tmp_path):
    code = "for n in range(50): print(f'line {n}', file=sys.stderr)\nsys.exit(1)\n"
    with pytest.raises(ChildProcessError, match=r"line 45 \| .* \| line 49\. ") as caught:
        ask(place(code), request(tmp_path), timeout=60)
    assert "line 44" not in str(caught.value)


SLEEPER = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(asked["options"]["pids"], "w").write(f"{os.getpid()} {child.pid}\\n")
"""


def pids_in(path: Path, seconds: float = 20.0) -> list[int]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.is_file() and path.read_text().endswith("\n"):
            return [int(pid) for pid in path.read_text().split()]
        time.sleep(0.02)
    raise AssertionError(f"nothing in {path}")


def test_after_its_time_it_is_dead_and_so_is_what_it_started(place, tmp_path):
    """Mutation: the child alone is killed, which leaves the workers of its package on the GPU."""
    for timeout in (1, 4, 16):  # on a busy machine the child may not have got far enough to start anything
        with pytest.raises(TimeoutError, match=rf"no answer within {timeout} s \(--timeout\)"):
            ask(place(SLEEPER + "time.sleep(60)\n"), request(tmp_path, pids=str(tmp_path / "pids")), timeout=timeout)
        if (tmp_path / "pids").is_file():
            break
    assert all(map(ended, pids_in(tmp_path / "pids")))


def test_workers_it_left_behind_end_with_it(place, tmp_path):
    """They hold its standard error open, which must not make us wait for them."""
    began = time.monotonic()
    ask(place(SLEEPER + PRINT), request(tmp_path, pids=str(tmp_path / "pids")), timeout=60)
    assert all(map(ended, pids_in(tmp_path / "pids"))) and time.monotonic() - began < 30


def test_once_it_has_answered_no_progress_is_told(place, tmp_path, monkeypatch):
    """A worker that left the group holds standard error and writes on.  Mutations: a bar that is closed is moved;
    standard error is never closed.
    """
    monkeypatch.setattr(process, "PATIENCE", 0.1)
    children, told = [], []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            children.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    late = "import sys, time; time.sleep(2); print('progress: 4/4', file=sys.stderr)"
    worker = f"subprocess.Popen([sys.executable, '-c', {late!r}], start_new_session=True)\n"
    ask(place(worker + PRINT), request(tmp_path), timeout=60, advance=told.append)
    (child,) = children
    until = time.monotonic() + 20
    while not child.stderr.closed and time.monotonic() < until:
        time.sleep(0.02)
    assert child.stderr.closed and told == []


def test_a_killed_parent_takes_it_along(place, tmp_path):
    """SIGKILL, which no handler sees.  Mutation: a child that does not watch the pipe."""
    there = place(SLEEPER + "time.sleep(60)\n")
    program = f"""
        from pathlib import Path
        from fewstep.metrics.outside.contract import Item, Request
        from fewstep.metrics.outside.process import Place, ask
        asked = Request("length", Path("."), [Item("0.png", "")], options={{"pids": {str(tmp_path / "pids")!r}}})
        ask(Place(Path({sys.executable!r}), Path({str(there.adapter)!r})), asked, timeout=60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT)
    pids = pids_in(tmp_path / "pids")
    assert all(map(alive, pids))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert all(map(ended, pids))


@pytest.mark.parametrize(
    ("python", "adapter", "words"),
    [("nowhere", True, "no Python at"), (".", True, "no Python at"), ("plain", True, "cannot be executed")]
    + [("plain", False, "no adapter at")],
)
def test_a_place_that_is_none_is_refused_before_anything_starts(tmp_path, place, python, adapter, words):
    (tmp_path / "plain").write_text("")
    there = place(PRINT).adapter if adapter else tmp_path / "missing.py"
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        ask(Place(tmp_path / python, there), request(tmp_path), timeout=60)
