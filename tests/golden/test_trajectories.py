"""No method drifts: its first fifty iterations are those on record."""

import json
from dataclasses import replace

import pytest
import torch

import fewstep.config  # noqa: F401 - registers every method
from fewstep.objectives.base import METHODS
from fewstep.teachers.pipelines import from_pipeline
from fewstep_cuda.cpu.build import failure
from tests import tiny_pipeline
from tests.golden.trajectories import RECORD, STEPS, trajectory

KNOWN = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


def test_every_method_is_on_record():
    """A new one: make golden REASON="..."; it must not be forgotten."""
    ours = {name for name in METHODS.names() if METHODS.get(name).__module__.startswith("fewstep.")}
    assert ours == set(KNOWN)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_follows(made, wanted, early: float, late: float):
    """Losses and gradient norms of all updates, to a relative tolerance over the first ten and another to the end."""
    for turn in wanted:
        assert len(made[turn]) == len(wanted[turn]) and 0 < len(wanted[turn]) <= STEPS
        for update, (mine, theirs) in enumerate(zip(made[turn], wanted[turn], strict=True)):
            tolerance = early if update < 10 else late
            assert mine == pytest.approx(theirs, rel=tolerance, abs=1e-12), (turn, update)


@pytest.mark.parametrize("method", sorted(KNOWN))
def test_a_methods_trajectory_is_the_one_on_record(method):
    """In float64, where every operator is the reference."""
    assert_follows(trajectory(method), KNOWN[method]["trajectory"], 1e-6, 1e-3)


needs_kernels = pytest.mark.skipif(
    bool(failure("score_difference")), reason=f"no C++ kernels here: {failure('score_difference')}"
)


def with_and_without(monkeypatch, *args, **options):
    """A trajectory in float32 by the fastest kernels that there are, and by none."""
    made = []
    for backend in ("auto", "reference"):
        monkeypatch.setenv("FEWSTEP_KERNELS", backend)
        made.append(trajectory(*args, dtype=torch.float32, **options))
    return made


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(KNOWN))
def test_kernels_on_and_off_follow_the_record(method, monkeypatch):
    """In float32, within 1e-5 and 1e-4 of each other and ten times that of the record; found: 1e-6, 9e-6, 3e-5."""
    on, off = with_and_without(monkeypatch, method)
    assert_follows(on, off, 1e-5, 1e-4)
    for made in (on, off):
        assert_follows(made, KNOWN[method]["trajectory"], 1e-4, 1e-3)


@needs_kernels
@pytest.mark.parametrize("method", ["tbcm", "decoupled_dmd", "sid"])
def test_kernels_on_and_off_agree_on_a_transformer(method, monkeypatch, tmp_path):
    """Attention's tangent, matching in one term and in two: ten iterations on CogView4 in miniature, within 1e-5."""
    teacher = replace(
        from_pipeline(str(tiny_pipeline.build(tmp_path / "tiny"))), prompts=("a bag", "a coat", "a shirt")
    )
    on, off = with_and_without(monkeypatch, method, 10, teacher=teacher)
    assert_follows(on, off, 1e-5, 1e-5)
    assert on != off, "both ran the same code"
