"""No method drifts: its first fifty iterations are those on record."""

import json

import pytest
import torch

import fewstep.config  # noqa: F401 - registers every method
from fewstep.objectives.base import METHODS
from tests.golden.trajectories import RECORD, STEPS, trajectory

KNOWN = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


def test_every_method_is_on_record():
    """A new one: make golden REASON="..."; it must not be forgotten."""
    ours = {name for name in METHODS.names() if METHODS.get(name).__module__.startswith("fewstep.")}
    assert ours == set(KNOWN)


@pytest.mark.parametrize("method", sorted(KNOWN))
def test_a_methods_trajectory_is_the_one_on_record(method):
    """Losses and gradient norms of all updates: relative 1e-6 over the first ten, 1e-3 to the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = trajectory(method)
    torch.set_num_threads(threads)
    for turn, wanted in KNOWN[method]["trajectory"].items():
        assert len(made[turn]) == len(wanted) and 0 < len(wanted) <= STEPS
        for update, (mine, theirs) in enumerate(zip(made[turn], wanted, strict=True)):
            tolerance = 1e-6 if update < 10 else 1e-3
            assert mine == pytest.approx(theirs, rel=tolerance, abs=1e-12), (turn, update)
